"""Chooses a baseline's parameters on the validation split, from a small declared grid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from llmrec.baselines.parameters import make
from llmrec.baselines.validation import (
    mean_log_loss,
    mean_ndcg,
    ranking_cases,
    rating_cases,
    root_mean_squared_error,
)
from llmrec.data.split import scale_of, threshold
from llmrec.errors import DataError, RecipeError
from llmrec.registry import BASELINES, lookup
from llmrec.tasks.family import WRITERS, families
from llmrec.types import Probability, Rating

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

log = logging.getLogger(__name__)

RANKED, RATED, JUDGED = "NDCG@10", "RMSE", "LogLoss"

Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of a grid and its figure on the validation split."""

    parameters: Parameters
    value: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning chose.

    Attributes:
        parameters: The best point, by name of the baseline's parameters.
        trials: Every point, in the order of the grid.
        metric: ``NDCG@10`` over the whole catalogue with the history excluded, higher is better; for ratings
            ``RMSE`` and for yes/no answers ``LogLoss``, lower is better.
        model: The best point as it was fitted, so that nobody need fit it again with this seed; None where nothing was.
    """

    parameters: Parameters
    trials: tuple[Trial, ...]
    metric: str
    model: Any = field(default=None, compare=False, repr=False)


def tune(name: str, data: SplitDataset, *, seed: int, grid: Mapping[str, tuple[Any, ...]] | None = None) -> Tuned:
    """Fit a baseline at every point of its grid and keep the best on the validation split.

    Training interactions are learned from and validation interactions measured; the test split is not looked at. Of
    equal points the first is kept.

    Args:
        name: Of the baseline.
        data: The split.
        seed: Of every fit.
        grid: Values by parameter, all combinations of which are tried; None for the baseline's own ``GRID``. An
            empty one is the single point of its defaults.

    Raises:
        RecipeError: If there is no such baseline or parameter, or it writes texts, which have no such figure.
        DataError: If the split holds nothing out for validation.
    """
    made = lookup(BASELINES, name, "baseline")
    if name in WRITERS:
        raise RecipeError(f"the baseline {name!r} writes texts and has nothing to tune; leave it out of the tuning")
    metric, measure = _measured(name, data)
    trials: list[Trial] = []
    best: tuple[Trial, Any] | None = None
    for parameters in points(made.GRID if grid is None else grid):
        model = make(name, parameters, seed=seed)
        model.fit(data)
        value = measure(model, parameters)
        trials.append(Trial(parameters, value))
        log.info("%s %s: validation %s %.4f", name, parameters, metric, value)
        if best is None or (value > best[0].value if metric == RANKED else value < best[0].value):
            best = trials[-1], model
    assert best is not None  # an empty grid has one point
    kept, model = best
    return Tuned(parameters=kept.parameters, trials=tuple(trials), metric=metric, model=model)


def _measured(name: str, data: SplitDataset) -> tuple[str, Callable[[Any, Parameters], float]]:
    """Return the metric that a baseline is chosen by, and how a fitted point is measured."""
    rates, judges = (
        any(name in known.baselines for known in families().values() if known.answer is answer)
        for answer in (Rating, Probability)
    )
    cases = rating_cases(data) if rates or judges else ranking_cases(data)
    if not cases:
        raise DataError(
            f"{data.dataset.name}: the split {data.kind} holds no {'ratings' if rates or judges else 'interactions'} "
            f"out for validation, which tuning {name!r} needs; set data.split.valid above 0, or use leave_one_out"
        )
    if rates:
        return RATED, lambda model, parameters: root_mean_squared_error(model, cases)
    if judges:
        scale = scale_of(data)
        return JUDGED, lambda model, parameters: mean_log_loss(model, cases, threshold(scale, parameters.get("liked")))
    return RANKED, lambda model, parameters: mean_ndcg(model.items, model.scores, cases)


def points(grid: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return every combination of a grid's values; one empty point for an empty grid."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
