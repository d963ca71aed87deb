"""The command `llmrec check`: validates a recipe with its data, or all recipes that a benchmark uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import say, say_if_verbose, store_facts
from llmrec.cli.options import RecipeOptions
from llmrec.errors import RecipeError
from llmrec.registry import extension_hook

if TYPE_CHECKING:
    from llmrec.pipeline.study import Study


@dataclass(frozen=True, kw_only=True)
class CheckOptions(RecipeOptions):
    """Options of `llmrec check`."""

    recipe: Annotated[str, OptionHelp(argument=True, metavar="PAGE", help="Recipe, suite or benchmark file.")]
    dry_run: Annotated[
        bool, OptionHelp(help="Also count training examples and tokens, render prompts, and estimate time and memory.")
    ] = False


def check(options: CheckOptions) -> None:
    """Validate a recipe, its data and its model.

    Finds the errors that a run would report, without loading model weights. Suites and benchmarks are checked with the
    recipes that they use.

    Example:
        llmrec check recipes/quickstart.yaml --dry-run
    """
    from llmrec.recipe.load import detect_page_kind

    page, kind = options.recipe, detect_page_kind(options.recipe)
    store_facts(page=page, kind=kind)
    if kind == "recipe":
        _check_recipe(page, options.overrides, dry_run=options.dry_run)
        return
    if options.dry_run:
        raise RecipeError(
            f"--dry-run is only for recipes, and {page} is a {kind}; remove the option", kind="contradiction"
        )
    extension_hook("check-page")(kind, page, options.overrides)


def _check_recipe(page: str, overrides: Sequence[str], *, dry_run: bool) -> None:
    from llmrec.data.stats import basket_warning
    from llmrec.pipeline.preflight import build_checked_study
    from llmrec.pipeline.results import cutoff_warning
    from llmrec.pipeline.study import leak_warning, leaking_users
    from llmrec.recipe.load import load_recipe

    loaded = load_recipe(page, overrides)
    study = build_checked_study(loaded)
    template_ids = {family: [template.id for template in study.eval_templates(family)] for family in study.tasks}
    cases = {family: len(study.cases(family)) for family in template_ids}
    store_facts(
        name=loaded.name, split=loaded.eval.split, cases=cases, templates=template_ids, warnings=(warned := list[str]())
    )
    for family, templates in template_ids.items():
        say_if_verbose(f"{family}: {cases[family]} {loaded.eval.split} cases, evaluated with {', '.join(templates)}")
    for table in study.tables:
        if cut := basket_warning(table):
            warned.append(cut)
            say(cut)
        if result := study.leaks(table):
            warned.append(leak_warning(table, result))
            say(f"{warned[-1]}; create profiles from training interactions only")
            say(f"    users: {', '.join(leaking_users(result))}")
    if wide := cutoff_warning(study):
        warned.append(wide)
        say(wide)
    if dry_run:
        from llmrec.cli.estimate import show_dry_run

        show_dry_run(study)
    say(f"recipe {loaded.name} is valid: {_describe_study(study, cases)}")


def _describe_study(study: Study, cases: Mapping[str, int]) -> str:
    """Return one line about the data, prompts and metrics of a run."""
    recipe, data = study.recipe, study.data.dataset
    size = f"{data.interactions['user_id'].n_unique():,} users, {len(data.items):,} items"
    models = f"{recipe.model.name} {', '.join(recipe.eval.arms)}" if recipe.eval.arms else "no language model"
    counts = ", ".join(f"{family} {count:,}" for family, count in cases.items())
    return f"{data.name} ({size}); {models}; {recipe.eval.split} cases: {counts}"
