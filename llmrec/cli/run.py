"""The command `llmrec run`."""

from __future__ import annotations

from dataclasses import dataclass

from llmrec.cli.console import finish
from llmrec.cli.options import Out, Ray, RecipeOptions, Shard
from llmrec.registry import hook


@dataclass(frozen=True, kw_only=True)
class RunOptions(RecipeOptions):
    """A recipe, its run folder, and whether its cases are cut into shards."""

    out: Out = None
    shard: Shard = None
    ray: Ray = None


def run(options: RunOptions) -> None:
    """Run a recipe end to end: data, training, evaluation, report.

    A second run reuses every stage whose inputs did not change; a killed run resumes where it was. A shard trains
    nothing: train first.
    """
    from llmrec.cli.estimate import print_estimate
    from llmrec.pipeline import run as pipeline
    from llmrec.recipe.load import load_recipe

    if options.shard is not None or options.ray is not None:
        hook("shards")(options.recipe, options.overrides, options.out, options.shard, options.ray)
        return
    finish(pipeline.run(load_recipe(options.recipe, options.overrides), options.out, before=print_estimate))
