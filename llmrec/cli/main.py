"""The command line. Heavy modules are imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrec import __version__
from llmrec.answer.predict.options import PredictOptions
from llmrec.bench.app import app as comparing
from llmrec.chat.command import app as talking
from llmrec.cli import common
from llmrec.cli.augment import app as augmenting
from llmrec.cli.common import Overrides, RecipePath
from llmrec.cli.features import app as features
from llmrec.cli.options import takes
from llmrec.cli.rank import app as ranking
from llmrec.cli.score.app import app as scoring
from llmrec.cli.show.app import app as showing
from llmrec.cli.show.console import (
    finish,
    say,
    short,
    show,
    show_prompts,
    show_tables,
    tell,
    tell_before,
    written,
)
from llmrec.cluster.merge.app import app as merging
from llmrec.cluster.merge.options import Cluster, Piece
from llmrec.serve.command import app as serving
from llmrec.start.auto.app import app as searching
from llmrec.start.init.app import app as starting
from llmrec.start.tune.app import app as tuning
from llmrec.systems.m6.compress.app import app as compressing

if TYPE_CHECKING:
    from llmrec.recipe.schema import Recipe

PANELS = {
    "Start": ("init", "auto", "doctor"),
    "Train and evaluate": ("check", "run", "train", "eval", "report", "audit", "compare", "tune", "score"),
    "Serve": ("rank", "predict", "serve", "serve-key", "refresh", "chat", "export"),
    "Data": ("data", "prompts", "index", "augment", "features"),
    "Advanced": ("fuse", "tune-encoder", "compress", "merge", "schema"),
}
"""The commands as `--help` groups them."""

app = common.App(
    PANELS,
    name="llmrec",
    help="Tune a language model into a recommender, and measure it honestly.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(ranking)
app.add_typer(merging)
app.add_typer(scoring)
app.add_typer(comparing)
app.add_typer(compressing)
app.add_typer(serving)
app.add_typer(talking)
app.add_typer(starting)
app.add_typer(searching)
app.add_typer(tuning)
app.add_typer(augmenting)
app.add_typer(showing)
app.add_typer(features, name="features", help="Manage stores of texts that a language model wrote.")

Out = Annotated[Path | None, typer.Option("--out", help="Run folder; runs/<name> by default.")]


@app.command()
def run(
    recipe: RecipePath, overrides: Overrides = None, out: Out = None, shard: Piece = None, ray: Cluster = None
) -> None:
    """Run a recipe end to end: data, training, evaluation, report.

    A second run reuses every stage whose inputs did not change; a killed run resumes where it was. A shard trains
    nothing: train first.
    """
    from llmrec.pipeline import run as pipeline

    if shard is not None or ray is not None:
        from llmrec.cluster.asking import ask_shards

        ask_shards(recipe, overrides or (), out, shard, ray)
        return
    finish(pipeline.run(_recipe(recipe, overrides), out, before=tell_before))


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(metavar="PAGE", help="A recipe, or a suite or benchmark.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Also count rows and tokens, render prompts, estimate time and memory.")
    ] = False,
) -> None:
    """Check a recipe, its data and its model without weights.

    It refuses what a run would refuse, also of a suite or a benchmark and the recipes that it names.
    """
    from llmrec.cli.show.checking import check

    check(recipe, overrides or (), dry_run=dry_run)


@app.command()
def data(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print statistics of a recipe's data and its split."""
    from llmrec.cli.show.statistics import lines, of_candidates
    from llmrec.data.stats import statistics
    from llmrec.pipeline import study as studies

    study = studies.build_study(_recipe(recipe, overrides))
    tables = [statistics(used) for used in study.tables]
    tell(data=tables)
    for used, found in zip(study.tables, tables, strict=True):
        show(used.dataset.name, lines(found), told={})
    if (sets := study.candidates) is not None:
        told = {"candidates": {"count": sets.count, "kind": sets.kind, "digest": sets.digest}}
        show("candidates", of_candidates(sets), told=told)


@app.command()
def prompts(
    recipe: RecipePath,
    overrides: Overrides = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Prompts per task, or per template named here; 1.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template", "-t", metavar="NAME|FILE", help="Show this template alone, trained on or not; repeatable."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME", help="Show the templates of this set alone, such as m6; repeatable."),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Say of every template what it shows and writes, and show three prompts a task."),
    ] = False,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--diff", metavar="A B", help="Compare two templates, or template A with how run folder B had it."
        ),
    ] = None,
) -> None:
    """Show the prompts of a recipe as a model reads them.

    The templates that it uses, and one rendered training prompt a task. What is learned stands in «these marks». A
    template that the recipe does not train on is rendered where it is named.
    """
    from llmrec.cli.show import prompts as listing
    from llmrec.models.load import resolve
    from llmrec.pipeline import study as studies

    loaded, names = listing.with_files(_recipe(recipe, overrides), template or (), Path(recipe).parent)
    study = studies.build_study(loaded)
    chosen = listing.named(study, names, sets or ())
    if diff is None:
        tell(templates=chosen)
        detailed = every or template or sets
        for line in listing.lines(study, chosen) if detailed else listing.names(study):
            say(line)
        if not detailed:
            say("--all says what each shows and writes; --template NAME renders any of them\n")
    encoder = studies.encoder_of(study, resolve(loaded.model, seed=loaded.seed))
    if diff is not None:
        lines = list(listing.compare(study, encoder, *diff))
        tell(differences=lines)
        say("\n".join(lines))
    elif template or sets:
        show_prompts({each.id: list(listing.rendered(study, encoder, [each], count or 1)) for each in chosen})
    else:
        show_prompts(listing.by_task(study, encoder, count or (listing.SHOWN if every else 1)))


@app.command()
def index(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; runs/<name>/index by default.")] = None,
    items: Annotated[
        str | None, typer.Option("--items", metavar="ID,ID", help="Items to show, with those nearest to them.")
    ] = None,
) -> None:
    """Build a recipe's item index and show its codes.

    It writes a page with figures and examples.
    """
    from llmrec.pipeline import index_report

    asked = [name for part in (items or "").split(",") if (name := part.strip())]
    made = index_report.index(_recipe(recipe, overrides), out, items=asked)
    tell(index=made.folder, page=made.page, seconds=made.seconds, diagnostics=made.found)
    for title, rows in index_report.summary(made).items():
        show(title, rows, told={})


@app.command()
def train(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Out = None,
    launch: Annotated[
        int | None, typer.Option("--launch", min=1, metavar="N", help="Train in N processes of this machine.")
    ] = None,
) -> None:
    """Train and merge only; `run` and `eval` reuse the result.

    torchrun and accelerate launch can start it too, also on several machines: see docs/scaling.md.
    """
    from llmrec.cli.launching import train

    words = ["train", recipe, *(overrides or ()), *common.said(context.meta)]
    record = train(_recipe(recipe, overrides), out, words, launch)
    shown = ("method", "steps", "tokens", "target_tokens", "processes", "distributed", "seconds", "tokens_per_second")
    show("training", {name: record[name] for name in (*shown, "adapter_sha256") if name in record}, short)


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
    shard: Piece = None,
    ray: Cluster = None,
) -> None:
    """Evaluate a recipe without training, or run a suite.

    The tuned setting takes the adapter that `train` left. A suite puts predictors under one protocol, a benchmark
    recipes beside each other, a suite of conversations managers before the same simulated users; all go on where they
    were killed.
    """
    from llmrec.pipeline import run as pipeline
    from llmrec.recipe.load import kind_of_page

    kind = kind_of_page(recipe)
    if shard is not None or ray is not None:
        from llmrec.cluster.asking import ask_shards

        ask_shards(recipe, overrides or (), out, shard, ray)
        return
    if kind != "recipe":
        from llmrec.bench.run import run_page

        run_page(kind, recipe, overrides or (), out, results)
        return
    finish(pipeline.run(_recipe(recipe, overrides), out, may_train=False))


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart, or a folder such as eval/results."),
    ],
    table: Annotated[bool, typer.Option("--table", help="Of a run folder: also print its tables.")] = False,
) -> None:
    """Write the report of a run again from its results.

    Of a folder of results such as eval/results: the leaderboard and the benchmarks' pages.
    """
    from llmrec.bench import pages
    from llmrec.pipeline import run as pipeline

    if pages.holds_results(folder):
        found = pages.rewrite(folder)
        tell(pages=found)
        say("\n".join(f"page: {path}" for path in found))
        return
    page = pipeline.report(folder)
    if table:
        show_tables(folder)
    written({"report": page})


@app.command("tune-encoder")
def tune_encoder(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")],
    overrides: Overrides = None,
    encoder: Annotated[
        str, typer.Option("--encoder", metavar="NAME", help="The text encoder to begin from: a name or a folder.")
    ] = "all-MiniLM-L6-v2",
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="How many of its last blocks are tuned.")] = 2,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs of 80 steps, at most.")] = 3,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", min=1e-12, help="At its height; it falls to 0 over the epochs.")
    ] = 1e-4,
) -> None:
    """Fine-tune a text encoder on a recipe's interactions.

    It learns which items follow each other in training. The folder can stand wherever a recipe names an encoder, with
    the same data and seed: `transitions-text`, `content`, `tower`, semantic IDs and item tokens. Rows that use it count
    as language models.
    """
    from llmrec.baselines.towers.pairs import TransitionsTunedConfig
    from llmrec.pipeline.encoder_tuning import tune_encoder as tuned

    config = TransitionsTunedConfig(encoder=encoder, blocks=blocks, epochs=epochs, learning_rate=learning_rate)
    told = tuned(_recipe(recipe, overrides), out, config)
    tell(folder=out, **told)
    say(f"encoder: {out}, tuned on {told['interactions']:,} interactions of {told['data']}")


@app.command()
def fuse(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs over the same cases.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")],
) -> None:
    """Combine the rows of finished runs into ensembles.

    Weights come from users of the validation split. Nothing is asked again. Each family gets the fusion of rows that
    know events alone, of those that read texts too, and of all with the language models, beside the rows themselves and
    compared with them.
    """
    from llmrec.pipeline import run as pipeline

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
    """Write a tuned model as a folder that stands alone.

    llmrec, transformers and vLLM load it; it has a model card and checksums.
    """
    from llmrec.exports.untuned import refuse_untuned

    refuse_untuned(run)
    from llmrec.exports import export as exports

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
    done = exports.export(run, options, say=say)
    tell(exported=done)
    for title, rows in exports.summary(done):
        show(title, rows, told={})


@app.command()
@takes(PredictOptions)
def predict(options: PredictOptions) -> None:
    """Answer a file of questions about one item each.

    Ratings, yes or no, explanations, reviews. A killed call resumes where it was. Exit code 0: every line answered; 1:
    some failed, and say why; 2: nothing done.
    """
    from llmrec.answer.predict.run import predict_file

    told = predict_file(options)
    show("answers", told, short)
    raise typer.Exit(int(told["failed"] != 0))


@app.command()
def doctor(
    security: Annotated[
        bool,
        typer.Option(
            "--security", help="Look for what is outdated or unsafe instead: packages, weights, modes, keys, services."
        ),
    ] = False,
) -> None:
    """Check versions, hardware, model and data.

    One line each, with the fix; exit code 1 if something is wrong.
    """
    from llmrec.cli.doctor.told import healthy

    if not healthy(security=security):
        raise typer.Exit(1)


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.")],
    memory: Annotated[
        bool, typer.Option("--memory", help="Also ask the untuned model for the catalogue; loads it.")
    ] = False,
) -> None:
    """Look for held-out data where it must not be.

    And for what else may explain a figure. Exit code 1 on a leak.
    """
    from llmrec.cli.show.audits import leaks

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
) -> None:
    pass


def main() -> None:
    """Run the command line; expected failures print one paragraph and exit with 2."""
    common.main(app)


def _recipe(path: str, overrides: list[str] | None) -> Recipe:
    from llmrec.recipe.load import load_recipe

    return load_recipe(path, overrides or ())


if __name__ == "__main__":
    main()
