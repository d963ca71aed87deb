"""The command `llmrec run`."""

from __future__ import annotations

from dataclasses import dataclass

from llmrec.cli.console import show_run_results
from llmrec.cli.options import Launch, Out, Ray, RecipeOptions, Shard, check_exclusive_options
from llmrec.registry import extension_hook


@dataclass(frozen=True, kw_only=True)
class RunOptions(RecipeOptions):
    """Options of `llmrec run`."""

    out: Out = None
    shard: Shard = None
    ray: Ray = None
    launch: Launch = None

    @property
    def in_shards(self) -> bool:
        """Whether the test cases are divided into shards."""
        check_exclusive_options(self.shard, self.ray, self.launch)
        return (self.shard, self.ray, self.launch) != (None, None, None)


def run(options: RunOptions) -> None:
    """Run a recipe: prepare data, train, evaluate, report.

    A second run reuses every stage whose inputs have not changed, and an interrupted run resumes. With --launch,
    training and evaluation use N processes. --shard and --ray distribute the evaluation only: run llmrec train first.

    Example:
        llmrec run recipes/quickstart.yaml train.steps=50 eval.users=100
    """
    from llmrec.cli.estimate import show_estimate_if_costly
    from llmrec.pipeline import run as pipeline
    from llmrec.recipe.load import load_recipe

    if options.in_shards:
        extension_hook("shards")(options, trains=True)
        return
    show_run_results(
        pipeline.run(load_recipe(options.recipe, options.overrides), options.out, before=show_estimate_if_costly)
    )
