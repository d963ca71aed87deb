"""The registry entries for jobs in shards."""

from llmrec.entries import Command

COMMANDS = {
    "merge": Command(
        "llmrec.cluster.command:merge", "Advanced", "Merge the shards of a distributed job.", resumes=True
    ),
}
HOOKS = {
    "shards": "llmrec.cluster.actors:ask_shards",
    "rank-on-ray": "llmrec.cluster.actors:rank_on",
    "recipe-on-ray": "llmrec.cluster.actors:finish_on",
}
