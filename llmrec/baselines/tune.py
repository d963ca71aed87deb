"""Tunes the hyperparameters of a baseline on the validation split, separately for each table of results."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.parameters import baseline_config
from llmrec.baselines.validation import (
    mean_log_loss,
    mean_ndcgs,
    ranking_cases,
    rating_cases,
    root_mean_squared_error,
)
from llmrec.data.split import liked_threshold, scale_of
from llmrec.errors import DataError, RecipeError
from llmrec.recipe.schema import Section
from llmrec.registry import BASELINES, import_component
from llmrec.tasks.family import families, is_family_supported
from llmrec.types import Answer, Probability, Rating, Text

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset


# --------------------------------------------------------------------------- search
# All settings of a small grid; one parameter at a time in a large grid.


ParameterSetting = dict[str, Any]
"""A hyperparameter setting: a value for every parameter of a grid."""

Grid = Mapping[str, tuple[Any, ...]]

SettingEvaluator = Callable[[ParameterSetting], Mapping[str, float] | None]
"""Returns the results of a setting by table, higher is better; None if no further fit is allowed."""

SMALL_GRID_SIZE = 12
"""Maximum number of settings of a grid that is searched completely."""

# Maximum number of rounds over all parameters.
_MAX_ROUNDS = 3
# Number of values without improvement after which the search along a parameter stops.
_PATIENCE = 2


def grid_combinations(grid: Grid) -> list[ParameterSetting]:
    """Return all combinations of values in a grid; one empty combination for an empty grid."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def search_grid(
    grid: Grid, start: Mapping[str, Any], tables: Sequence[str], judge: SettingEvaluator, *, most: int | None = None
) -> None:
    """Evaluate hyperparameter settings until the best one for each table is found.

    All settings of a grid of at most `SMALL_GRID_SIZE` settings, and of at most ``most``, are tried. In a larger grid,
    coordinate search moves one parameter at a time along its values while the metric improves, until a round over all
    parameters changes nothing. Values that are not numbers have no order and are all tried.

    Args:
        grid: Values by parameter; numbers ascending.
        start: The first setting of the search in a large grid; a value missing from the grid is added to it.
        tables: The tables for which settings are evaluated. Each has a separate search, in this order.
        judge: Evaluates a setting; called each time the search reaches it.
        most: The maximum number of settings that ``judge`` accepts; None: unlimited.
    """
    # A grid that is only tried in part would leave out values of its first parameters.
    every = (
        grid_combinations(grid)
        if math.prod(map(len, grid.values())) <= min(SMALL_GRID_SIZE, most or SMALL_GRID_SIZE)
        else []
    )
    for point in every:
        if judge(point) is None:
            return
    if every:
        return
    ladders = {name: search_values(values, start[name]) for name, values in grid.items()}
    for table in tables:
        _run_coordinate_search(ladders, {name: start[name] for name in grid}, table, judge)


def search_values(values: Sequence[Any], start: Any) -> tuple[Any, ...]:
    """Return the values of a parameter in ascending order, including the start value of the search."""
    if start in values:
        return tuple(values)
    result = (*values, start)
    return tuple(sorted(result)) if _is_numeric(result) else result


def parameters_at_grid_edge(config: type[Section], grid: Grid, point: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parameters at an end of their grid, where a larger grid may give a better value.

    Ends at a bound of the config, such as a count of 1, are excluded.
    """
    return tuple(
        name
        for name, values in grid.items()
        if len(values) > 1
        and _is_numeric(values)
        and (
            (point[name] == min(values) and _can_extend_range(config, point, name, below=True))
            or (point[name] == max(values) and _can_extend_range(config, point, name, below=False))
        )
    )


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _can_extend_range(config: type[Section], point: Mapping[str, Any], name: str, *, below: bool) -> bool:
    value = point[name]
    step = 1 if isinstance(value, int) else max(abs(value), 1.0) * 1e-6
    try:
        config.model_validate({**point, name: value - step if below else value + step})
    except ValidationError:
        return False
    return True


def _run_coordinate_search(ladders: Grid, start: ParameterSetting, table: str, judge: SettingEvaluator) -> None:
    result = judge(start)
    if result is None:
        return
    best, value = start, result[table]
    for _ in range(_MAX_ROUNDS):
        before = best
        for name, values in ladders.items():
            for others in _search_directions(values, best[name]):
                improved, missed = False, 0
                for other in others:
                    point = {**best, name: other}
                    if (result := judge(point)) is None:
                        return
                    if result[table] > value:
                        best, value, improved, missed = point, result[table], True, 0
                    else:
                        missed += 1
                    if missed == _PATIENCE and _is_numeric(values):
                        break
                if improved:
                    break
        if best == before:
            return


def _search_directions(values: Sequence[Any], current: Any) -> list[Sequence[Any]]:
    """Return the values on each side of the current value, nearest first."""
    position = list(values).index(current)
    if not _is_numeric(values):
        return [[value for value in values if value != current]]
    return [values[position + 1 :], values[:position][::-1]]


log = logging.getLogger(__name__)

RANKING_METRIC, RATING_METRIC, CTR_METRIC = "NDCG@10", "RMSE", "LogLoss"

# Maximum number of scores, and of validation requests, per setting.
_MAX_SCORES, _MAX_CASES = 30_000_000, 10_000

Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """A hyperparameter setting with its validation result for each table."""

    parameters: Parameters
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ChosenSetting:
    """The setting chosen for a table.

    Attributes:
        parameters: The best setting, by parameter name.
        border: The parameters whose value is at an end of the grid; see `parameters_at_grid_edge`.
        model: The fitted model of the best setting with this seed; None if nothing was fitted.
    """

    parameters: Parameters
    border: tuple[str, ...] = ()
    model: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class TuningResult:
    """The result of tuning a baseline.

    Attributes:
        choices: The choices by table.
        trials: All evaluated settings, in order.
        metric: ``NDCG@10`` over the whole catalogue, higher is better; for ratings ``RMSE`` and for yes/no answers
            ``LogLoss``, lower is better.
        recalled: The original duration of restored fits in seconds.
    """

    choices: Mapping[str, ChosenSetting]
    trials: tuple[Trial, ...]
    metric: str
    recalled: float = 0.0

    @property
    def parameters(self) -> Parameters:
        """The hyperparameters chosen for the first result table."""
        return next(iter(self.choices.values())).parameters


def tune(
    name: str,
    data: SplitDataset,
    *,
    seed: int,
    tables: Sequence[str] = ("excluded",),
    grid: Grid | None = None,
    known: Sequence[Trial] = (),
    kept: Callable[[Sequence[Trial]], None] = lambda trials: None,
) -> TuningResult:
    """Fit all settings of a grid, and return the best one on the validation split.

    Models are fitted on training interactions and evaluated on validation interactions; the test split is not used.
    Each fitted setting is evaluated for every table; of equal settings, the first is kept.
    `llmrec.baselines.tune.search_grid` describes the search, which ends after ``FITS`` fits if the class sets a limit.

    Args:
        name: The name of the baseline.
        data: The split.
        seed: The seed of every fit.
        tables: The tables to choose for. For rankings, whether items of the history can be ranked: ``excluded``,
            ``included`` or both. Ratings and yes/no answers have one table of any name.
        grid: Values by parameter; None for the ``GRID`` of the baseline. An empty grid tries the default setting only.
        known: Settings that an earlier call tried with the same data and seed; they are not fitted again.
        kept: Called with all trials after each new one.

    Raises:
        RecipeError: If the baseline or a parameter is unknown, or the baseline writes texts.
        DataError: If the split has no validation interactions.
    """
    baseline_class = import_component(BASELINES, name, "baseline")
    if _has_answer_type(name, Text):
        raise RecipeError(
            f"the baseline {name!r} generates texts, which have no metric for tuning; do not tune this baseline",
            kind="contradiction",
        )
    metric, measure = _validation_metric(name, data, tables)
    declared: Grid = baseline_class.GRID if grid is None else grid
    single = {key: values[0] for key, values in declared.items() if len(values) == 1}
    defaults = baseline_config(name, single, f"grid of {name}").model_dump()
    search = _Search(name, data, seed, metric, measure, kept, baseline_class.FITS, list(known))
    search_grid(declared, defaults, tables, search.judge, most=baseline_class.FITS)
    choices = {}
    for table in tables:
        best = search.best(table)
        model = search.model(best)
        if model is not None and len(search.trials) > 1:
            model.looked_at |= frozenset(data.valid["user_id"].to_list())
        choices[table] = ChosenSetting(
            best.parameters, parameters_at_grid_edge(baseline_class.Config, declared, best.parameters), model
        )
    return TuningResult(choices=choices, trials=tuple(search.trials), metric=metric, recalled=search.recalled)


@dataclass
class _Search:
    """Fits and evaluates each hyperparameter setting once, and keeps the best models."""

    name: str
    data: SplitDataset
    seed: int
    metric: str
    measure: Callable[[Any, Parameters], Mapping[str, float]]
    kept: Callable[[Sequence[Trial]], None]
    fits: int | None
    trials: list[Trial]
    recalled: float = 0.0
    _models: dict[str, tuple[Trial, Any]] = field(default_factory=dict)
    _last: Any = None

    def judge(self, point: dict[str, Any]) -> Mapping[str, float] | None:
        """Return the validation results of a hyperparameter setting; None if the maximum number of fits is reached."""
        trial = next((trial for trial in self.trials if dict(trial.parameters) == point), None)
        if trial is None:
            points = (point, *(trial.parameters for trial in self.trials))
            if self.fits is not None and len(set(map(self._fit_key, points))) > self.fits:
                return None
            trial = self._try(point)
        return {table: self._sign() * value for table, value in trial.values.items()}

    def best(self, table: str) -> Trial:
        """Return the best hyperparameter setting for a table of results."""
        return max(self.trials, key=lambda trial: self._sign() * trial.values[table])

    def model(self, trial: Trial) -> Any:
        """Return the fitted model of the best setting; None if it was fitted in an earlier call."""
        return next((model for other, model in self._models.values() if other is trial), None)

    def _try(self, point: dict[str, Any]) -> Trial:
        like = [self._last, *(model for _, model in self._models.values())]
        model = fit_baseline(
            self.name, point, self.data, seed=self.seed, like=[item for item in like if item is not None]
        )
        self.recalled += model.recalled
        trial = Trial(point, self.measure(model, point))
        log.info("%s %s: validation %s %s", self.name, point, self.metric, trial.values)
        self.trials.append(trial)
        for table in trial.values:
            if self.best(table) is trial:
                self._models[table] = trial, model
        self._last = model
        self.kept(self.trials)
        return trial

    def _sign(self) -> int:
        return 1 if self.metric == RANKING_METRIC else -1

    def _fit_key(self, point: Parameters) -> str:
        answering = import_component(BASELINES, self.name, "baseline").AT_ANSWER
        return json.dumps({key: value for key, value in point.items() if key not in answering}, sort_keys=True)


def _has_answer_type(name: str, kind: type[Answer]) -> bool:
    """Whether a baseline gives answers of a type."""
    return any(
        is_family_supported(known, BASELINES, name, silent=False)
        for known in families().values()
        if known.answer is kind
    )


def _validation_metric(
    name: str, data: SplitDataset, tables: Sequence[str]
) -> tuple[str, Callable[[Any, Parameters], Mapping[str, float]]]:
    """Return the metric by which settings are chosen, and the function that evaluates a fitted model."""
    rates, judges = _has_answer_type(name, Rating), _has_answer_type(name, Probability)
    limit = min(_MAX_CASES, max(1, _MAX_SCORES // len(data.dataset.items)))
    cases = rating_cases(data) if rates or judges else ranking_cases(data, limit)
    if not cases:
        raise DataError(
            f"{data.dataset.name}: tuning {name!r} needs validation "
            f"{'ratings' if rates or judges else 'interactions'}, which the split {data.kind} does not have; set "
            "data.split.valid above 0, provide a validation split, or use leave_one_out",
            kind="empty",
            at=data.dataset.name,
            column="data.split.valid",
        )
    (only, *_) = tables
    if rates:
        return RATING_METRIC, lambda model, parameters: {only: root_mean_squared_error(model, cases)}
    if judges:
        scale = scale_of(data)
        return CTR_METRIC, lambda model, parameters: {
            only: mean_log_loss(model, cases, liked_threshold(scale, parameters.get("liked")))
        }
    return RANKING_METRIC, lambda model, parameters: mean_ndcgs(model, cases, tables)
