"""The functions `llmrec.init`, `llmrec.auto` and `llmrec.tune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from llmrec.data.frames import as_arrow, only_for_a_moment
from llmrec.display import Displayed, Summary, listed
from llmrec.keywords import in_python, keywords_of
from llmrec.progress import note, silent
from llmrec.recipe.load import Overrides, as_recipe, in_words, load_recipe
from llmrec.recipe.pages import flow
from llmrec.recipe.schema import Recipe
from llmrec.start import init as start
from llmrec.start.auto import Auto, build
from llmrec.start.columns import asked
from llmrec.start.options import AutoOptions, InitOptions, TuneOptions
from llmrec.start.tune import TuneResult, search


@dataclass(frozen=True, repr=False)
class Begun(Displayed):
    """The result of `init` for a frame.

    Attributes:
        recipe: For `llmrec.run`, which takes the frame as ``data`` and the items as ``items``.
        found: The role of each column and the reason, figures of the data, and the tasks that it supports.
    """

    recipe: Recipe
    found: str

    def _summary(self) -> Summary:
        title = f"Recipe {self.recipe.name!r} for {listed(self.recipe.tasks.present())}"
        return Summary(title, text=self.found)


def init(
    frame: Any,
    items: Any = None,
    *,
    name: str = "frame",
    user: str | None = None,
    item: str | None = None,
    rating: str | None = None,
    time: str | None = None,
    title: str | None = None,
    text: str | None = None,
    fields: str | None = None,
    dates: str | None = None,
    split: str | None = None,
) -> Begun:
    """Return a recipe for a frame of interactions.

    A role that is not given is guessed; ``"none"`` means that there is no such column.

    Args:
        frame: Interactions; see `llmrec.data.frames.with_frames`.
        items: Items as a frame, one row per item.
        name: The recipe's name.
        user: Column of users.
        item: Column of items.
        rating: Column of ratings.
        time: Column of times.
        title: Column of item titles.
        text: Column of texts that users wrote.
        fields: Further columns about items, comma-separated.
        dates: Order in dates such as 03/04/2024: ``"day-first"`` or ``"month-first"``.
        split: Column of the parts train, valid and test.

    Raises:
        DataError: If the roles cannot be guessed, or the frame supports no task.
    """
    options = InitOptions(
        table="frame",
        user=user,
        item=item,
        rating=rating,
        time=time,
        title=title,
        text=text,
        fields=fields,
        dates=dates,
        split=split,
    )
    with only_for_a_moment() as (place, named):
        tables = {}
        for key, entry in (("interactions", frame), ("items", items)):
            if entry is not None:
                tables[key] = str(place / f"{key}.parquet")
                pq.write_table(as_arrow(entry, f"{key} frame"), tables[key])
        made = start.init(
            tables["interactions"],
            items=tables.get("items"),
            out=place / "recipe.yaml",
            name=name,
            asked=asked(options),
            in_memory=True,
        )
        recipe, result = load_recipe(made.recipe), in_python(named(made.found), keywords_of(init))
    data = recipe.data.model_copy(update={"path": None, "items": None})
    return Begun(recipe.model_copy(update={"data": data}), result)


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
    """Build a recommender from a table within a time budget: recommenders are tuned, combined and measured.

    A killed call resumes where it was. ``llmrec.load(made.folder)`` opens the recommender.

    Args:
        table: Interactions as a frame, see `llmrec.data.frames.with_frames`; or the path of a table or of a recipe.
        items: Items as a frame or the path of a table, one row per item.
        budget: Wall time for all of it, such as ``"90s"``, ``"30m"`` or ``"2h"``.
        out: The run folder; ``runs/<name>-auto`` by default.
        name: Name of the run; by default that of the file, or ``frame``.
        users: Test users that the finished recommender is measured on.
        classic: Whether to leave language models out, whatever the budget allows.
        user: Column of users; each column is guessed if it is not given.
        item: Column of items.
        rating: Column of ratings, which no recommender of the search reads; left out by default.
        time: Column of times; ``"none"``: the order of the rows.
        title: Column of item titles; ``"none"``: ids are shown.
        fields: Further item columns, comma-separated; ``"none"``: no columns.
        dates: Order in dates such as 03/04/2024: ``"day-first"`` or ``"month-first"``.
        split: Column of the parts train, valid and test; ``"none"``: draw a split.
        query: The query of a database: one SELECT.
        quiet: Whether to print no lines about the steps.

    Raises:
        LlmrecError: If the table or the folder cannot be used, or nothing could be fitted.
    """
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
    return build(options, silent if quiet else note, data=None if named else table, items=None if path else items)


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
) -> TuneResult:
    """Search keys of a recipe on the validation split within a time budget, and write the best values as a recipe.

    The test split is not used. A killed call resumes where it was.

    Args:
        recipe: See `llmrec.run`.
        over: Values to try by key: a list such as ``[8, 16]``, or a range such as ``"1e-4..1e-3"``.
        overrides: Keys of the recipe that are set in every trial.
        budget: Wall time of this call, such as ``"90s"``, ``"30m"`` or ``"2h"``.
        trials: Trials in all; by default as many as the budget allows.
        metric: ``FAMILY/METRIC`` to optimise; by default the headline metric of the recipe's first family.
        out: The folder of trials; ``runs/<name>-tune`` by default.
        data: Interactions as a frame, in place of ``data.path``.
        items: Items as a frame, one row per item, in place of ``data.items``.
        quiet: Whether to print no lines about the trials.

    Raises:
        MissingExtra: If Optuna is not installed.
        RecipeError: If a key, a value or the metric cannot be used, or the folder holds another search.
        LlmrecError: If the first trials all fail.
    """
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
    return search(
        options, silent if quiet else note, recipe=None if page else as_recipe(recipe), data=data, items=items
    )


def _searched(over: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Return keys and values in the form of the command line."""
    if not isinstance(over, Mapping):
        return [over] if isinstance(over, str) else list(over)
    lists = {key: values if isinstance(values, list | tuple | range) else [values] for key, values in over.items()}
    return [
        f"{key}={over[key] if isinstance(over[key], str) else ','.join(map(flow, values))}"
        for key, values in lists.items()
    ]
