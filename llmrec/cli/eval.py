"""The command `llmrec eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import show_run_results
from llmrec.cli.run import RunOptions
from llmrec.registry import extension_hook


@dataclass(frozen=True, kw_only=True)
class EvalOptions(RunOptions):
    """Options of `llmrec eval`."""

    recipe: Annotated[
        str,
        OptionHelp(
            argument=True, metavar="PAGE", help="Recipe, or a suite or benchmark such as eval/suites/toys.yaml."
        ),
    ]
    results: Annotated[
        Path,
        OptionHelp(
            help="With a suite or benchmark: folder for the results. The Markdown page is written next to this folder."
        ),
    ] = Path("eval/results")


def evaluate(options: EvalOptions) -> None:
    """Evaluate a recipe without training, or run a suite.

    The fine-tuned model is the one that llmrec train wrote. A suite evaluates models with one protocol; a benchmark
    compares runs of recipes. An interrupted evaluation resumes.

    Example:
        llmrec eval recipes/quickstart.yaml eval.users=500
    """
    from llmrec.pipeline import run as pipeline
    from llmrec.recipe.load import detect_page_kind, load_recipe

    kind = detect_page_kind(options.recipe)
    if options.in_shards:
        extension_hook("shards")(options)
    elif kind != "recipe":
        extension_hook("run-page")(kind, options.recipe, options.overrides, options.out, options.results)
    else:
        show_run_results(pipeline.run(load_recipe(options.recipe, options.overrides), options.out, may_train=False))
