"""Commands as functions of Python: `llmrec.auto`, `tune`, `export`, `fuse` and `compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.progress import note
from llmrec.recipe.pages import flow
from llmrec.recipe.shared import RESAMPLES

if TYPE_CHECKING:
    from llmrec.bench.runs import ComparedRuns
    from llmrec.exports.export import Exported
    from llmrec.pipeline.run import Run
    from llmrec.recipe.load import Overrides
    from llmrec.recipe.schema import Recipe
    from llmrec.start.auto.run import Auto
    from llmrec.start.tune.run import Found


def auto(
    table: Any,
    items: Any = None,
    *,
    budget: str = "30m",
    out: str | Path | None = None,
    name: str | None = None,
    users: int = 5000,
    classic: bool = False,
    user: str | None = None,
    item: str | None = None,
    rating: str | None = None,
    time: str | None = None,
    title: str | None = None,
    fields: str | None = None,
    dates: str | None = None,
    split: str | None = None,
    query: str | None = None,
    quiet: bool = False,
) -> Auto:
    """Make a recommender from a table within a budget of time: recommenders are tuned, joined and measured.

    A call that was killed resumes where it was. ``llmrec.load(made.folder)`` opens the recommender.

    Args:
        table: Interactions as a frame, see `llmrec.data.frames.with_frames`; or the path of a table or of a recipe.
        items: One row an item, as a frame or the path of a table.
        budget: Wall time for all of it, such as ``"90s"``, ``"30m"`` or ``"2h"``.
        out: The run folder; ``runs/<name>-auto`` by default.
        name: What the run is called; by default the name of the file, or ``frame``.
        users: Test users that the finished recommender is measured on.
        classic: Tune no language model, whatever the budget allows.
        user: Column of users; a column is guessed where none is named.
        item: Column of items.
        rating: Column of ratings, which nothing here reads; left out by default.
        time: Column of times; ``"none"``: the order of the rows.
        title: Column of item titles; ``"none"``: ids are shown.
        fields: Further item columns, with commas between them; ``"none"``: no columns.
        dates: Order in dates such as 03/04/2024: ``"day-first"`` or ``"month-first"``.
        split: Column of the parts train, valid and test; ``"none"``: draw a split.
        query: What is asked of a database: one SELECT.
        quiet: Write no line for every step.

    Raises:
        LlmrecError: If the table or the folder cannot be used, or nothing could be fitted.
    """
    from llmrec.start.auto.options import AutoOptions
    from llmrec.start.auto.run import auto as made

    named = isinstance(table, str | Path)
    path = items is None or isinstance(items, str | Path)
    options = AutoOptions(
        table=str(table) if named else "frame",
        items=str(items) if items is not None and path else None,
        budget=str(budget),
        out=None if out is None else Path(out),
        name=name or (None if named else "frame"),
        users=users,
        classic=classic,
        user=user,
        item=item,
        rating=rating,
        time=time,
        title=title,
        fields=fields,
        dates=dates,
        split=split,
        query=query,
    )
    say = _silent if quiet else note
    return made(options, say, data=None if named else table, items=None if path else items)


def tune(
    recipe: Recipe | str | Path | Mapping[str, Any],
    over: Mapping[str, Any] | Sequence[str],
    *,
    overrides: Overrides = (),
    budget: str = "2h",
    trials: int | None = None,
    metric: str | None = None,
    out: str | Path | None = None,
    data: Any = None,
    items: Any = None,
    quiet: bool = False,
) -> Found:
    """Search keys of a recipe on the validation split within a budget of time, and write the best as a recipe.

    The test split is not looked at. A call that was killed resumes where it was.

    Args:
        recipe: See `llmrec.run`.
        over: By key the values that are tried: a list such as ``[8, 16]``, or a range such as ``"1e-4..1e-3"``.
        overrides: Keys of the recipe that stay as they are.
        budget: Wall time of this call, such as ``"90s"``, ``"30m"`` or ``"2h"``.
        trials: Trials in all; by default as many as the budget allows.
        metric: ``FAMILY/METRIC``, which decides; by default the headline metric of the recipe's first family.
        out: The folder of trials; ``runs/<name>-tune`` by default.
        data: Interactions as a frame, in place of ``data.path``.
        items: One row an item, as a frame, in place of ``data.items``.
        quiet: Write no line for every trial.

    Raises:
        MissingExtra: If Optuna is not installed.
        RecipeError: If a key, a value or the metric cannot be used, or the folder holds another search.
        LlmrecError: If the first trials all fail.
    """
    from llmrec.recipe.load import as_recipe, in_words
    from llmrec.start.tune.options import TuneOptions
    from llmrec.start.tune.run import tune as found

    page = isinstance(recipe, str | Path)
    options = TuneOptions(
        recipe=str(recipe) if page else "recipe",
        over=tuple(_searched(over)),
        overrides=tuple(in_words(overrides)),
        budget=str(budget),
        trials=trials,
        metric=metric,
        out=None if out is None else Path(out),
    )
    say = _silent if quiet else note
    return found(options, say, recipe=None if page else as_recipe(recipe), data=data, items=items)


def export(
    run: Run | str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    adapter_only: bool = False,
    with_items: bool = True,
    with_interactions: bool = False,
    check_users: int = 50,
    licence: str | None = None,
    base_licence: str | None = None,
    push: str | None = None,
    private: bool = True,
    force: bool = False,
    quiet: bool = False,
) -> Exported:
    """Write a tuned model as a folder of its own, for llmrec, transformers and vLLM, with a model card.

    Args:
        run: A finished run, or its folder.
        out: The folder to write.
        dtype: Of the weights; ``"auto"``: the one that the run was evaluated in.
        adapter_only: Write the adapter, not a whole model.
        with_items: Whether the catalogue is included; it may have an owner.
        with_interactions: Whether training interactions are included.
        check_users: Validation cases a task on which the export is checked.
        licence: Of the tuned weights and the card.
        base_licence: Of the base model, where it does not say itself.
        push: Name on the model hub, ``USER/NAME``, to upload to.
        private: Whether what is uploaded is private.
        force: Replace an earlier export.
        quiet: Write no line for every step.

    Raises:
        LlmrecError: If the run is unfinished or altered, the folder cannot be written, or the upload failed.
    """
    from llmrec.exports.export import Options
    from llmrec.exports.export import export as done

    options = Options(
        out=Path(out),
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
    return done(_folder(run), options, say=_silent if quiet else note)


def fuse(runs: Sequence[Run | str | Path], out: str | Path) -> Run:
    """Join the rows of finished runs over the same cases, with weights from users of the validation split.

    Args:
        runs: Finished runs, or their folders.
        out: The folder to write.

    Raises:
        DataError: If a run is not finished, is about other data or cases, or no rows can be joined.
    """
    from llmrec.pipeline.run import fuse as joined

    return joined([_folder(run) for run in runs], Path(out))


def _folder(run: Run | str | Path) -> Path:
    return Path(run) if isinstance(run, str | Path) else run.folder


def _searched(over: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Return keys and their values as the command line has them."""
    if not isinstance(over, Mapping):
        return [over] if isinstance(over, str) else list(over)
    lists = {key: values if isinstance(values, list | tuple | range) else [values] for key, values in over.items()}
    return [
        f"{key}={over[key] if isinstance(over[key], str) else ','.join(map(flow, values))}"
        for key, values in lists.items()
    ]


def _silent(line: str) -> None:
    pass


def compare(a: Any, b: Any, *, resamples: int = RESAMPLES, seed: int = 0) -> ComparedRuns:
    """Compare two finished runs on the same users, items, candidates and split: A − B, paired by user.

    Args:
        a: A run folder, or what `llmrec.run` returned.
        b: Another one.
        resamples: Of the users, for the 95 % intervals.
        seed: Of the resamples.

    Raises:
        LlmrecError: If a folder is not a finished run, or the runs have no task, users or candidates in common.
    """
    from llmrec.bench.runs import compare_runs

    return compare_runs(a, b, resamples=resamples, seed=seed)
