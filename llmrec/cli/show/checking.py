"""What `llmrec check` looks at: a recipe with its data, or the pages that a suite or a benchmark names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmrec.baselines.retrieve import check_retriever
from llmrec.cli.show.console import detail, say, show_dry_run, tell
from llmrec.data.stats import baskets
from llmrec.errors import RecipeError
from llmrec.pipeline.preflight import checked_study
from llmrec.pipeline.results import too_wide
from llmrec.pipeline.study import Study, sentence, users
from llmrec.recipe.load import kind_of_page, load_benchmark, load_chat, load_recipe, load_suite


def check(page: str, overrides: Sequence[str], *, dry_run: bool) -> None:
    """Validate a page and print what it would ask.

    Raises:
        RecipeError: If a key or a value is wrong, of the page or of one that it names.
        DataError: If a recipe's data cannot be used.
        ModelError: If its model is not there, or its configuration or tokenizer cannot be opened.
    """
    kind = kind_of_page(page)
    tell(page=page, kind=kind)
    if kind != "recipe" and dry_run:
        raise RecipeError(f"--dry-run estimates a recipe, and {page} is a {kind}; leave it out", kind="contradiction")
    if kind == "suite":
        from llmrec.bench.suite import check_rows

        suite = load_suite(page, overrides)
        check_rows(suite)
        for row in suite.rows:
            if row.recipe:
                load_recipe(row.recipe, row.overrides)
        tell(name=suite.suite, rows=[row.label for row in suite.rows], pairs=suite.pairs)
        say(f"suite {suite.suite} is valid: {len(suite.rows)} rows, {len(suite.pairs)} planned comparisons")
        return
    if kind == "benchmark":
        from llmrec.bench.recipes import points, recipe_of

        bench = load_benchmark(page, overrides)
        todo = list(points(bench))
        for point in todo:
            recipe_of(bench, point, Path("runs"))
        tell(name=bench.benchmark, runs=[run.name for run in bench.runs], models=len(todo))
        say(f"benchmark {bench.benchmark} is valid: {len(bench.runs)} runs, {len(todo)} models")
        return
    if kind == "chat":
        talks = load_chat(page, overrides)
        load_recipe(talks.recipe, talks.overrides)
        check_retriever(talks.recommender, "recommender")
        tell(name=talks.chat, rows=[row.label for row in talks.rows], pairs=talks.pairs)
        say(f"conversations {talks.chat} are valid: {len(talks.rows)} rows, {len(talks.pairs)} planned comparisons")
        return
    loaded = load_recipe(page, overrides)
    study = checked_study(loaded)
    asked = {family: [template.id for template in study.eval_templates(family)] for family in study.tasks}
    cases = {family: len(study.cases(family)) for family in asked}
    tell(name=loaded.name, split=loaded.eval.split, cases=cases, templates=asked, warnings=(warned := list[str]()))
    for family, templates in asked.items():
        detail(f"{family}: {cases[family]} {loaded.eval.split} cases, evaluated with {', '.join(templates)}")
    for table in study.tables:
        if cut := baskets(table):
            warned.append(cut)
            say(cut)
        if found := study.told(table):
            warned.append(sentence(table, found))
            say(f"{warned[-1]}; write profiles from training interactions alone")
            say(f"    users: {', '.join(users(found))}")
    if wide := too_wide(study):
        warned.append(wide)
        say(wide)
    if dry_run:
        show_dry_run(study)
    say(f"recipe {loaded.name} is valid: {_facts(study, cases)}")


def _facts(study: Study, cases: Mapping[str, int]) -> str:
    """Return what a run would read, ask and measure, in one line."""
    recipe, data = study.recipe, study.data.dataset
    size = f"{data.interactions['user_id'].n_unique():,} users, {len(data.items):,} items"
    models = f"{recipe.model.name} {', '.join(recipe.eval.arms)}" if recipe.eval.arms else "no language model"
    asked = ", ".join(f"{family} {count:,}" for family, count in cases.items())
    return f"{data.name} ({size}); {models}; {recipe.eval.split} cases: {asked}"
