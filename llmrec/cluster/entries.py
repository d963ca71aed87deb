"""The registry entries for jobs in shards."""

from llmrec.entries import Command

COMMANDS = {
    "merge": Command(
        "llmrec.cluster.command:merge", "Advanced", "Merge the shards of a distributed job.", resumes=True
    ),
}
HOOKS = {
    "shards": "llmrec.cluster.actors:evaluate_in_shards",
    "rank-on-ray": "llmrec.cluster.actors:rank_on_cluster",
    "recipe-on-ray": "llmrec.cluster.actors:run_recipe_on_cluster",
}
