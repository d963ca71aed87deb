"""The command `llmrec eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About
from llmrec.cli.console import finish
from llmrec.cli.run import RunOptions
from llmrec.registry import hook


@dataclass(frozen=True, kw_only=True)
class EvalOptions(RunOptions):
    """A recipe, or a page that compares; its folder, and whether its cases are cut into shards."""

    recipe: Annotated[
        str,
        About(argument=True, metavar="PAGE", help="A recipe, or a suite or benchmark such as eval/suites/NAME.yaml."),
    ]
    results: Annotated[Path, About(help="Of a suite: folder for its results; its page goes beside the folder.")] = Path(
        "eval/results"
    )


def evaluate(options: EvalOptions) -> None:
    """Evaluate a recipe without training, or run a suite.

    The tuned setting takes the adapter that `train` left. A suite puts predictors under one protocol, a benchmark
    recipes beside each other, a suite of conversations managers before the same simulated users; all go on where they
    were killed.
    """
    from llmrec.pipeline import run as pipeline
    from llmrec.recipe.load import kind_of_page, load_recipe

    kind = kind_of_page(options.recipe)
    if options.in_shards:
        hook("shards")(options)
    elif kind != "recipe":
        hook("run-page")(kind, options.recipe, options.overrides, options.out, options.results)
    else:
        finish(pipeline.run(load_recipe(options.recipe, options.overrides), options.out, may_train=False))
