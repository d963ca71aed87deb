"""The functions `llmrec.fit`, `llmrec.init`, `llmrec.auto` and `llmrec.tune`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrec.answer.known import Histories, KnownEntities
from llmrec.answer.loaded import Loaded, load
from llmrec.answer.opening import open_fitted_baseline, prediction_family
from llmrec.answer.options import RecommenderOptions
from llmrec.baselines.base import Trainable
from llmrec.baselines.parameters import create_baseline
from llmrec.data.frames import temporary_frame_folder, write_frame
from llmrec.data.sets.table import load_data, read_listed_items
from llmrec.data.split import split_without_test
from llmrec.display import Displayed, Summary, format_name_list
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.keywords import function_keywords, replace_options_by_keywords
from llmrec.pipeline.run import run
from llmrec.progress import Progress, ignore_line, log_line
from llmrec.recipe.load import Overrides, as_recipe, format_overrides, load_recipe
from llmrec.recipe.pages import format_yaml_value
from llmrec.recipe.schema import BaselineSection, Recipe
from llmrec.registry import BASELINES, import_component, is_plugin
from llmrec.results import Choice
from llmrec.start import init as start
from llmrec.start.auto import RECIPE_ENDINGS, Auto, build_recommender
from llmrec.start.columns import requested_roles
from llmrec.start.options import AutoOptions, InitOptions, TuneOptions
from llmrec.start.tune import TuneResult, search_hyperparameters
from llmrec.tasks.family import missing_controls
from llmrec.types import Predictor

_COLUMN_ROLES = ("user", "item", "rating", "time", "title", "text", "fields", "dates", "split")
# Share of users on whose last interaction early stopping of neural networks is based.
_EARLY_STOPPING_SHARE = 0.1
LANGUAGE_MODEL = "smollm2-lora"
"""The name of SmolLM2-135M-Instruct, fine-tuned with LoRA to predict the next item, for `fit`."""


@dataclass(frozen=True, repr=False)
class InitOutcome(Displayed):
    """The result of `init` for a data frame.

    Attributes:
        recipe: For `llmrec.run`, which takes the frame as ``data`` and the items as ``items``.
        found: The role of each column and the reason, figures of the data, and the tasks that it supports.
    """

    recipe: Recipe
    found: str

    def _summary(self) -> Summary:
        title = f"Recipe {self.recipe.name!r} for {format_name_list(self.recipe.tasks.present())}"
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
) -> InitOutcome:
    """Return a recipe for a data frame of interactions.

    A role that is not given is guessed; ``"none"`` leaves it out.

    Args:
        frame: Interactions as a frame, see `llmrec.data.frames.with_frames`, or the path of a table.
        items: Items as a frame or the path of a table, one row per item.
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
    roles = _named_columns(locals())
    with _recipe_for(frame, items, roles, name=name) as (recipe, findings):
        frames = {"path": frame, "items": items}
        absent = {key: None for key, table in frames.items() if not isinstance(table, str | Path)}
        data = recipe.data.model_copy(update=absent)
        return InitOutcome(
            recipe.model_copy(update={"data": data}), replace_options_by_keywords(findings, function_keywords(init))
        )


def _named_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a function that name columns."""
    return {role: values[role] for role in _COLUMN_ROLES if values.get(role) is not None}


@contextmanager
def _recipe_for(
    interactions: Any, items: Any, roles: Mapping[str, Any], *, name: str, only_data: bool = False
) -> Iterator[tuple[Recipe, str]]:
    """Yield the recipe and the findings of `init` for data frames or tables.

    With ``only_data`` only its section ``data`` is of use, and faults of the table are fixed.
    """
    options = InitOptions(table="frame", **roles)
    with temporary_frame_folder() as (folder, named):
        tables = {}
        for key, entry in (("path", interactions), ("items", items)):
            if entry is not None:
                tables[key] = str(entry if isinstance(entry, str | Path) else write_frame(entry, folder, key))
        result = start.write_recipe(
            tables["path"],
            items=tables.get("items"),
            out=folder / "recipe.yaml",
            name=name,
            requested=requested_roles(options),
            mend=folder / "mended.csv" if only_data else None,
            in_memory=True,
            only_data=only_data,
        )
        yield load_recipe(result.recipe), named(result.found)


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
    """Build a recommender from a table within a time budget: tune models, combine them and evaluate the result.

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
    roles = _named_columns(locals())
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
        **roles,
        query=query,
    )
    with Progress("auto", None, quiet=quiet) as bar:

        def say(line: str) -> None:
            # Notebooks show no log, but a progress bar.
            log_line(line)
            bar.advance(0, line)

        listener = ignore_line if quiet else say
        return build_recommender(options, listener, data=None if named else table, items=None if path else items)


def fit(
    interactions: Any = None,
    items: Any = None,
    model: Any = "auto",
    budget: str = "5m",
    *,
    out: str | Path | None = None,
    seed: int = 0,
    quiet: bool = False,
    user: str | None = None,
    item: str | None = None,
    rating: str | None = None,
    time: str | None = None,
    title: str | None = None,
    text: str | None = None,
    fields: str | None = None,
    dates: str | None = None,
    split: str | None = None,
) -> Loaded:
    """Fit a recommender to interactions, and return it ready to answer.

    Args:
        interactions: Interactions as a frame, see `llmrec.data.frames.with_frames`, or the path of a table. Optional
            with a recipe that names its data.
        items: Items as a frame or the path of a table, one row per item. Baselines that read texts also rank items
            without interactions.
        model: One of: ``"auto"``, the best ensemble that `llmrec.auto` finds within the budget; the name of a baseline
            (docs/baselines-and-ensembles.md), such as ``"transitions-tuned"`` or ``"sasrec"``; a baseline, such as
            ``llmrec.baselines.ItemKNN(history=5)``; ``"smollm2-lora"``, SmolLM2-135M-Instruct fine-tuned with LoRA to
            predict the next item, by the recipe of `llmrec.init`; or a recipe as `llmrec.run` takes it, such as the
            path of a file. A baseline learns from all interactions; the others hold some out, on which they are
            measured.
        budget: Wall time of ``"auto"``, such as ``"90s"``, ``"5m"`` or ``"2h"``.
        out: The run folder of ``"auto"`` or of a recipe; by default as in `llmrec.auto` and `llmrec.run`.
        seed: The random seed of a baseline given by name.
        quiet: Whether to print no lines about the steps.
        user: Column of users; each column is guessed if it is not given.
        item: Column of items.
        rating: Column of ratings, which only baselines that predict ratings or answers read.
        time: Column of times; ``"none"``: the order of the rows.
        title: Column of item titles; ``"none"``: ids are shown.
        text: Column of texts that users wrote, which only baselines that write texts read.
        fields: Further item columns, comma-separated; ``"none"``: no columns.
        dates: Order in dates such as 03/04/2024: ``"day-first"`` or ``"month-first"``.
        split: Column of the parts train, valid and test.

    Raises:
        LlmrecError: If the interactions or the model cannot be used.
    """
    columns = _named_columns(locals())
    frame = None if isinstance(interactions, str | Path) else interactions
    if isinstance(model, str) and model == "auto":
        # the model reads no texts written by users
        named = {role: column for role, column in columns.items() if role != "text"}
        built = auto(interactions, items, budget=budget, out=out, quiet=quiet, **named)
        return load(str(built.folder), frame=frame)
    if isinstance(model, str) and model == LANGUAGE_MODEL:
        model, columns = _language_model_recipe(interactions, items, columns), {}
        fields = None
    if isinstance(model, Recipe | Mapping) or (isinstance(model, str | Path) and str(model).endswith(RECIPE_ENDINGS)):
        tables = {"path": interactions, "items": items}
        changed = {f"data.{key}": str(table) for key, table in tables.items() if isinstance(table, str | Path)}
        named = {**columns, "fields": fields.split(",")} if fields is not None else columns
        changed |= {f"data.columns.{role}": column for role, column in named.items()}
        frames = {key: None if isinstance(table, str | Path) else table for key, table in tables.items()}
        result = run(model, out, overrides=changed, data=frames["path"], items=frames["items"], quiet=quiet)
        return load(str(result.folder), frame=frame)
    return _fit_baseline(interactions, items, _resolve_baseline(model, seed), columns, frame)


def _language_model_recipe(interactions: Any, items: Any, columns: Mapping[str, Any]) -> Recipe:
    """Return the recipe of `init` for the prediction of the next item by a fine-tuned language model."""
    _check_interactions_given(interactions)
    recipe = init(interactions, items, name=LANGUAGE_MODEL, **{"rating": "none", "text": "none", **columns}).recipe
    if recipe.tasks.sequential is None:
        raise DataError(
            f"model: {LANGUAGE_MODEL} predicts the next item, for which these interactions are too few; llmrec.init "
            "gives the reason",
            kind="too-few",
            column="model",
        )
    only = dict.fromkeys(recipe.tasks.present()) | {"sequential": recipe.tasks.sequential}
    tasks = recipe.tasks.model_copy(update=only)
    return recipe.model_copy(update={"tasks": tasks, "eval": recipe.eval.model_copy(update={"arms": ("tuned",)})})


def _resolve_baseline(model: Any, seed: int) -> Any:
    """Return a baseline by name, or the given baseline."""
    if not isinstance(model, str | Path):
        if isinstance(model, Predictor) and isinstance(model, Trainable):
            return model
        raise RecipeError(
            f"model: {model!r} does not have the methods fit and answer; pass a baseline",
            kind="bad-value",
            column="model",
        )
    name = str(model)
    if name not in BASELINES and not is_plugin(BASELINES, name):
        known = ["auto", LANGUAGE_MODEL, *BASELINES]
        raise RecipeError(
            f"model: unknown {name!r}{did_you_mean(name, known)}; pass the path of a recipe, or one of: "
            f"{', '.join(known)}",
            kind="unknown-name",
            column="model",
        )
    return create_baseline(name, {}, seed=seed)


def _check_interactions_given(interactions: Any) -> None:
    """Reject a call without interactions."""
    if interactions is None:
        raise DataError(
            "interactions: pass a data frame or the path of a table", kind="missing-value", column="interactions"
        )


def _fit_baseline(interactions: Any, items: Any, model: Any, columns: Mapping[str, Any], frame: Any) -> Loaded:
    """Fit a baseline on all interactions, in memory."""
    _check_interactions_given(interactions)
    kind = type(model)
    registered = model.name in BASELINES and import_component(BASELINES, model.name, "baseline") is kind
    section = BaselineSection(
        name=model.name if registered else f"{kind.__module__}:{kind.__qualname__}",
        parameters=model.config.model_dump(mode="json", exclude_defaults=True) if hasattr(model, "config") else {},
    )
    family = prediction_family(model.name) if registered else None
    # Ranking models do not read ratings, and a row without a rating is still an interaction.
    roles = {"rating": "none", **columns} if family is None else columns
    seed = model.get_params()["seed"] if hasattr(model, "get_params") else 0
    with _recipe_for(interactions, items, roles, name="fitted", only_data=True) as (recipe, _):
        core = recipe.data.filter.model_copy(update={"user_core": 1, "item_core": 1})
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"filter": core})})
        dataset = load_data(recipe.data, seed=seed)
        if items is not None and getattr(kind, "READS", "events") != "events":
            dataset = replace(dataset, items={**read_listed_items(recipe.data), **dataset.items})
    stops = getattr(getattr(model, "config", None), "patience", None) is not None
    data = split_without_test(
        dataset, seed=seed, ties=recipe.data.split.ties, valid=_EARLY_STOPPING_SHARE if stops else 0.0
    )
    models = open_fitted_baseline(section, data, seed=seed, model=model)
    known = KnownEntities(models.items, Histories.of(dataset, seed))
    named = _recipe_with_baseline(recipe, section, family or "sequential", seed)
    return Loaded(RecommenderOptions(model=section.label), models, known, recipe=named, frame=frame)


def _recipe_with_baseline(
    recipe: Recipe, section: BaselineSection, family: str, seed: int
) -> tuple[Recipe, Choice | None]:
    """Add a baseline to a recipe, and return the baseline as the model to serve."""
    if section.name.startswith("__main__:"):
        return recipe, None
    values = recipe.model_dump(mode="json")
    controls = [{"name": name} for name in missing_controls(family, [section.name])]
    values["tasks"] = {family: {"baselines": [*controls, section.model_dump(mode="json")]}}
    values["eval"], values["seed"] = {"arms": []}, seed
    values["data"] |= {"path": None, "items": None}
    return as_recipe(values), Choice(row=f"{family}/baseline/{section.label}", metric="", value=0.0, users=0)


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
    """Tune keys of a recipe on validation users within a time budget, and write a recipe with the best values.

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
        over=tuple(_search_arguments(over)),
        overrides=tuple(format_overrides(overrides)),
        budget=str(budget),
        trials=trials,
        metric=metric,
        out=None if out is None else Path(out),
    )
    return search_hyperparameters(
        options, ignore_line if quiet else log_line, recipe=None if page else as_recipe(recipe), data=data, items=items
    )


def _search_arguments(over: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Return the search space as command-line arguments ``key=value,value``."""
    if not isinstance(over, Mapping):
        return [over] if isinstance(over, str) else list(over)
    lists = {key: values if isinstance(values, list | tuple | range) else [values] for key, values in over.items()}
    return [
        f"{key}={over[key] if isinstance(over[key], str) else ','.join(map(format_yaml_value, values))}"
        for key, values in lists.items()
    ]
