"""The command line. Heavy modules are imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrec import __version__
from llmrec.commands.ending import mend_of, told_of_signals
from llmrec.commands.features.app import app as features
from llmrec.commands.init.options import InitOptions
from llmrec.commands.options import takes
from llmrec.commands.predict.options import PredictOptions
from llmrec.commands.rank.options import RankOptions
from llmrec.commands.serve.app import app as serving
from llmrec.commands.show.console import finish, readable, say, short, show

if TYPE_CHECKING:
    from llmrec.recipe.schema import Recipe

app = typer.Typer(
    name="llmrec",
    help="Tune a language model into a recommender, and measure it honestly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(serving)
app.add_typer(features, name="features", help="Stores of what a language model wrote: make, show, compare, correct.")

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
    from llmrec import pipeline

    finish(pipeline.run(_recipe(recipe, overrides), out, quiet=quiet))


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(metavar="PAGE", help="A recipe, or a suite or benchmark.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Also count rows and tokens, render prompts, estimate time and memory.")
    ] = False,
) -> None:
    """Validate a recipe, its data, templates and names, or the pages that a suite names, without loading weights."""
    from llmrec.commands.show.checking import check

    check(recipe, overrides or (), dry_run=dry_run)


@app.command()
def data(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print statistics of a recipe's data and of its split."""
    from llmrec.data.stats import statistics
    from llmrec.experiment import study as studies

    study = studies.build_study(_recipe(recipe, overrides))
    for used in filter(None, (study.data, study.reviews)):
        show(used.dataset.name, {name: readable(value) for name, value in statistics(used).items()})
    if study.candidates is not None:
        sets = study.candidates
        show("candidates", {"count": str(sets.count), "kind": sets.kind, "digest": sets.digest})


@app.command()
def prompts(
    recipe: RecipePath,
    overrides: Overrides = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Prompts per task (3), or per template named here (1).")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template", "-t", metavar="NAME", help="Show this template alone, trained on or not; repeatable."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME", help="Show the templates of this set alone, such as m6; repeatable."),
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--diff", metavar="A B", help="Compare two templates, or template A with how run folder B had it."
        ),
    ] = None,
) -> None:
    """Show a recipe's templates, what each shows and writes, and rendered training prompts.

    What is learned stands in «these marks». A template that the recipe does not train on is rendered where it is named.
    """
    from llmrec.commands.show import estimate
    from llmrec.commands.show import prompts as listing
    from llmrec.experiment import study as studies
    from llmrec.models.load import resolve

    loaded = _recipe(recipe, overrides)
    study = studies.build_study(loaded)
    chosen = listing.named(study, template or (), sets or ())
    if diff is None:
        for line in listing.lines(study, chosen):
            say(line)
    encoder = studies.encoder_of(study, resolve(loaded.model, seed=loaded.seed))
    if diff is not None:
        for line in listing.compare(study, encoder, *diff):
            say(line)
    elif template or sets:
        for text in listing.rendered(study, encoder, chosen, count or 1):
            say(text + "\n")
    else:
        for texts in estimate.rendered(study, encoder, count or estimate.SHOWN).values():
            for text in texts:
                say(text + "\n")


@app.command()
def index(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; runs/<name>/index by default.")] = None,
    items: Annotated[
        str | None, typer.Option("--items", metavar="ID,ID", help="Items to show, with those nearest to them.")
    ] = None,
) -> None:
    """Build a recipe's item index, and show what its codes are like: a page, figures, examples."""
    from llmrec.experiment import index_report

    asked = [name for part in (items or "").split(",") if (name := part.strip())]
    for title, rows in index_report.summary(index_report.index(_recipe(recipe, overrides), out, items=asked)).items():
        show(title, rows)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, out: Out = None, quiet: Quiet = False) -> None:
    """Train and merge only; `run` and `eval` reuse the result."""
    from llmrec import pipeline

    record = pipeline.train(_recipe(recipe, overrides), out, quiet=quiet)
    shown = ("method", "steps", "tokens", "target_tokens", "seconds", "tokens_per_second", "adapter_sha256")
    show("training", {name: short(record[name]) for name in shown})


@app.command("eval")
def evaluate(
    recipe: Annotated[
        str, typer.Argument(metavar="PAGE", help="A recipe, or a suite or benchmark such as eval/suites/NAME.yaml.")
    ],
    overrides: Overrides = None,
    out: Out = None,
    results: Annotated[
        Path, typer.Option("--results", help="Of a suite: folder for its results; its page goes beside the folder.")
    ] = Path("eval/results"),
    quiet: Quiet = False,
) -> None:
    """Evaluate a recipe with the adapter that `train` left, never training; or run a suite or a benchmark.

    A suite puts predictors under one protocol, a benchmark recipes beside each other; both train what they name, and go
    on where they were killed.
    """
    from llmrec import pipeline
    from llmrec.recipe.load import kind_of_page, load_benchmark, load_suite

    kind = kind_of_page(recipe)
    if kind == "benchmark":
        from llmrec.commands.compare.benchmark import run_benchmark

        page = load_benchmark(recipe, overrides or ())
        folder = out or Path("runs") / "benchmarks" / page.benchmark
        made = run_benchmark(page, out=folder, results=results, say=say, quiet=quiet)
        say("\n".join(f"{name}: {path}" for name, path in made.items()))
        return
    if kind == "suite":
        from llmrec.commands.compare.suite import run_suite

        suite = load_suite(recipe, overrides or ())
        ran = run_suite(suite, out=out or Path("runs") / "suites" / suite.suite, results=results, say=say)
        say(f"results: {ran.file}" + (f"\nleaderboard: {ran.leaderboard}" if ran.leaderboard else ""))
        return
    finish(pipeline.run(_recipe(recipe, overrides), out, quiet=quiet, may_train=False))


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart, or a folder such as eval/results."),
    ],
) -> None:
    """Write a run's report again from its results, or the leaderboard and the benchmarks' pages from theirs."""
    from llmrec import pipeline
    from llmrec.commands.compare import pages

    if pages.holds_results(folder):
        say("\n".join(f"page: {path}" for path in pages.rewrite(folder)))
        return
    say(f"report: {pipeline.report(folder)}")


@app.command("tune-encoder")
def tune_encoder(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")],
    overrides: Overrides = None,
    encoder: Annotated[
        str, typer.Option("--encoder", metavar="NAME", help="The text encoder to begin from: a name or a folder.")
    ] = "all-MiniLM-L6-v2",
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="How many of its last blocks are tuned.")] = 1,
    step: Annotated[
        float, typer.Option("--step", min=1e-6, help="How far vectors, of length 1, are to move in an epoch.")
    ] = 0.1,
) -> None:
    """Tune a text encoder on a recipe's training interactions: which texts follow which.

    The folder can stand wherever a recipe names an encoder, with the same data and seed: `transitions-text`, `content`,
    `tower`, semantic IDs and item tokens. Rows that use it count as language models.
    """
    from llmrec.baselines.tower import TunedTowerConfig
    from llmrec.experiment.tuning.encoder import tune_encoder as tuned

    told = tuned(_recipe(recipe, overrides), out, TunedTowerConfig(encoder=encoder, blocks=blocks, step=step))
    say(f"encoder: {out}, tuned on {told['interactions']:,} interactions of {told['data']}")


@app.command()
def augment(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="The store; <run folder>/features by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and a prompt.")] = False,
    quiet: Quiet = False,
) -> None:
    """Have a language model write texts of users and items, and store them with their vectors as features.

    A killed call goes on where it was. Texts on users are written from what nothing else learns from, where
    data.split.kind=prefix keeps it apart.
    """
    from llmrec.commands.features import augment as command

    command.run(_recipe(recipe, overrides), out, dry_run=dry_run, quiet=quiet)


@app.command()
def fuse(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs over the same cases.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")],
) -> None:
    """Join the rows of finished runs: one list from many, with weights from users of the validation split.

    Nothing is asked again. Each family gets the fusion of rows that know events alone, of those that read texts too,
    and of all with the language models, beside the rows themselves and compared with them.
    """
    from llmrec import pipeline

    finish(pipeline.fuse(runs, out))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder, such as runs/quickstart.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|float32|bfloat16|float16", help="Of the weights; auto: the one that the run was evaluated in."
        ),
    ] = "auto",
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Write the adapter, not a whole model.")] = False,
    with_items: Annotated[
        bool, typer.Option("--with-items/--no-items", help="Whether the catalogue goes in; it may have an owner.")
    ] = True,
    with_interactions: Annotated[
        bool,
        typer.Option("--with-interactions", help="Training interactions too, so that `rank --fuse` works there."),
    ] = False,
    check_users: Annotated[
        int, typer.Option("--check-users", min=0, help="Validation cases a task on which the export is checked.")
    ] = 50,
    licence: Annotated[str | None, typer.Option("--licence", help="Of the tuned weights and the card.")] = None,
    base_licence: Annotated[
        str | None, typer.Option("--base-licence", help="Of the base model, where it does not say itself.")
    ] = None,
    push: Annotated[str | None, typer.Option("--push", metavar="USER/NAME", help="Upload to the model hub.")] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Whether what is uploaded is private.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a tuned model as a folder of its own, for llmrec, transformers and vLLM, with a model card."""
    from llmrec.commands.export import export as exports

    options = exports.Options(
        out=out,
        dtype=dtype,
        adapter_only=adapter_only,
        with_items=with_items,
        with_interactions=with_interactions,
        users=check_users,
        licence=licence,
        base_licence=base_licence,
        push=push,
        private=private,
        force=force,
    )
    for title, rows in exports.summary(exports.export(run, options, say=say)):
        show(title, rows)


@app.command()
@takes(RankOptions)
def rank(options: RankOptions) -> None:
    """Rank candidate sets: a file of requests in, a file of ranked lists with scores out.

    A killed run goes on where it was. Exit code 0: every line ranked; 1: some failed, and say why; 2: nothing done.
    """
    from llmrec.commands.rank.progress import console_rows
    from llmrec.commands.rank.run import rank_file
    from llmrec.commands.rank.users import rank_users

    if options.all_users:
        told = rank_users(options)
        show("lists", dict(told))
        raise typer.Exit(int(told["failed"] != "0"))
    summary = rank_file(options)
    show("ranking", console_rows(summary))
    if summary["failed"]:
        raise typer.Exit(1)


@app.command()
@takes(PredictOptions)
def predict(options: PredictOptions) -> None:
    """Answer a file of questions about one item each: ratings, yes or no, explanations, reviews.

    A killed call goes on where it was. Exit code 0: every line answered; 1: some failed, and say why; 2: nothing done.
    """
    from llmrec.commands.predict.run import predict_file

    told = predict_file(options)
    show("answers", dict(told))
    raise typer.Exit(int(told["failed"] != "0"))


@app.command()
@takes(InitOptions)
def init(options: InitOptions) -> None:
    """Look at a table and write a recipe for it, saying which column was taken for what, and why."""
    from llmrec.commands.init import start

    made = start.init(
        options.table,
        items=options.items,
        query=options.query,
        out=options.out,
        name=options.name,
        asked=options.asked,
        mend=options.mend,
        force=options.force,
    )
    say(made.told)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    security: Annotated[
        bool,
        typer.Option(
            "--security", help="Look for what is outdated or unsafe instead: packages, weights, modes, keys, services."
        ),
    ] = False,
) -> None:
    """Check versions, hardware, model and data, one line each with the mend; exit code 1 if something is wrong."""
    from llmrec.commands.doctor.told import tell

    if tell(as_json=as_json, security=security):
        raise typer.Exit(1)


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.")],
    memory: Annotated[
        bool, typer.Option("--memory", help="Also ask the untuned model for the catalogue; loads it.")
    ] = False,
) -> None:
    """Look for held-out data where it must not be, and for what else may explain a figure; exit code 1 on a leak."""
    from llmrec.commands.show.audits import leaks

    if leaks(folder, memory=memory):
        raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        say(__version__)
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
    with told_of_signals():
        try:
            app()
        except Exception as error:
            said = mend_of(error)
            if not said:
                raise
            sys.stderr.write(f"error: {said}\n")
            sys.exit(2)


def _recipe(path: str, overrides: list[str] | None) -> Recipe:
    from llmrec.recipe.load import load_recipe

    return load_recipe(path, overrides or ())


if __name__ == "__main__":
    main()
