"""The command line. Heavy modules are imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmrec import __version__
from llmrec.errors import LlmrecError

if TYPE_CHECKING:
    from llmrec.recipe import Recipe

app = typer.Typer(
    name="llmrec",
    help="Tune a language model into a recommender, and measure it honestly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="Path of a recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.steps=20 eval.users=100.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; runs/<name> by default.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bars.")]


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, out: Out = None, quiet: Quiet = False) -> None:
    """Run a recipe end to end: data, training, evaluation, report.

    A second run reuses every stage whose inputs did not change; a killed run goes on where it was.
    """
    from llmrec.build import pipeline

    _finish(pipeline.run(_recipe(recipe, overrides), out, quiet=quiet))


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Also count rows and tokens, render prompts, estimate time and memory.")
    ] = False,
) -> None:
    """Validate a recipe, its data, templates and names, without loading weights."""
    from llmrec.build import study as studies

    loaded = _recipe(recipe, overrides)
    study = studies.build_study(loaded)
    for family in study.tasks:
        templates = ", ".join(template.id for template in study.eval_templates(family))
        _say(f"{family}: {len(study.cases(family))} {loaded.eval.split} cases, evaluated with {templates}")
    if dry_run:
        _dry_run(study)
    _say(f"recipe {loaded.name} is valid")


@app.command()
def data(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print statistics of a recipe's data and of its split."""
    from llmrec.build import study as studies
    from llmrec.data.stats import statistics

    study = studies.build_study(_recipe(recipe, overrides))
    for used in filter(None, (study.data, study.reviews)):
        _table(used.dataset.name, {name: str(value) for name, value in statistics(used).items()})
    if study.candidates is not None:
        sets = study.candidates
        _table("candidates", {"count": str(sets.count), "kind": sets.kind, "digest": sets.digest})


@app.command()
def prompts(
    recipe: RecipePath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Prompts per task.")] = 3,
) -> None:
    """Show a recipe's templates and rendered training prompts; what is learned stands in «these marks»."""
    from llmrec.backends.encode import Encoder
    from llmrec.backends.models import load_tokenizer, resolve
    from llmrec.build import dryrun
    from llmrec.build import study as studies

    loaded = _recipe(recipe, overrides)
    study = studies.build_study(loaded)
    encoder = Encoder(load_tokenizer(resolve(loaded.model), loaded.model), max_length=loaded.model.max_length)
    for family, known in study.templates.items():
        _table(f"{family} templates", {t.id: f"version {t.version}, {t.use}, {t.shape}" for t in known.values()})
    for texts in dryrun.rendered(study, encoder, count).values():
        for text in texts:
            _say(text + "\n")


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, out: Out = None, quiet: Quiet = False) -> None:
    """Train and merge only; `run` and `eval` reuse the result."""
    from llmrec.build import pipeline

    record = pipeline.train(_recipe(recipe, overrides), out, quiet=quiet)
    shown = ("method", "steps", "tokens", "target_tokens", "seconds", "tokens_per_second", "adapter_sha256")
    _table("training", {name: _short(record[name]) for name in shown})


@app.command("eval")
def evaluate(recipe: RecipePath, overrides: Overrides = None, out: Out = None, quiet: Quiet = False) -> None:
    """Evaluate with the adapter that `train` left, and write the report; never trains."""
    from llmrec.build import pipeline

    _finish(pipeline.run(_recipe(recipe, overrides), out, quiet=quiet, may_train=False))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.")],
) -> None:
    """Write a run's report again from its results."""
    from llmrec.build import pipeline

    _say(f"report: {pipeline.report(folder)}")


@app.command()
def doctor() -> None:
    """Check versions, hardware, model and data, one line each with the mend; exit code 1 if something is wrong."""
    from llmrec.build.doctor import examine

    wrong = 0
    for finding in examine():
        wrong += bool(finding.mend)
        mend = f". Mend: {finding.mend}" if finding.mend else ""
        _say(f"{'✗' if finding.mend else '✓'} {finding.name}: {finding.found}{mend}")
    if wrong:
        raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        _say(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say which stages are reused.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("llmrec").setLevel(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """Run the command line; expected failures print one paragraph and exit with 2."""
    try:
        app()
    except LlmrecError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _recipe(path: str, overrides: list[str] | None) -> Recipe:
    from llmrec.recipe_file import load_recipe

    return load_recipe(path, overrides or ())


def _finish(done: Any) -> None:
    """Print the tables, the budget and where the report lies."""
    from rich.console import Console

    from llmrec.report.table import console_tables

    # Piped output has no width of its own; 80 columns would fold every cell.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    for table in console_tables(done.results):
        console.print(table)
    budget = {entry["stage"]: f"{entry['seconds']:.0f} s" for entry in done.results["budget"]}
    _table("budget", {**budget, "total": f"{done.results['seconds']:.0f} s"})
    _say(f"results: {done.folder / 'results.json'}\nreport: {done.report}")


def _dry_run(study: Any) -> None:
    from llmrec.backends.encode import Encoder
    from llmrec.backends.models import load_tokenizer, resolve
    from llmrec.build import dryrun

    model = study.recipe.model
    base = resolve(model)
    encoder = Encoder(load_tokenizer(base, model), max_length=model.max_length)
    for texts in dryrun.rendered(study, encoder).values():
        for text in texts:
            _say(text + "\n")
    rows = dryrun.train_rows(study, encoder) if "tuned" in study.recipe.eval.arms else {}
    if rows:
        _table("training rows", {name: json.dumps(value) for name, value in rows.items()})
    found = dryrun.estimate(study, encoder, base, rows)
    arms = {
        f"{arm}: about": f"{count:,} tokens, {found.eval_seconds[arm]:.0f} s"
        for arm, count in found.eval_tokens.items()
    }
    _table(
        "estimate",
        {
            "parameters": f"{found.parameters:,}",
            "training: about": f"{found.train_tokens:,} tokens, {found.train_seconds:.0f} s",
            **arms,
            "memory: about": f"{found.memory_gb} GiB",
        },
    )


def _table(title: str, rows: dict[str, str]) -> None:
    width = max((len(name) for name in rows), default=0)
    _say(title)
    for name, value in rows.items():
        _say(f"  {name:<{width}}  {value}")


def _short(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _say(text: str) -> None:
    typer.echo(text)


if __name__ == "__main__":
    main()
