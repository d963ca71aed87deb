"""Chooses a baseline's parameters on the validation split, from a small declared grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from llmrec.baselines.validation import mean_ndcg, ranking_cases, rating_cases, root_mean_squared_error
from llmrec.errors import DataError, RecipeError
from llmrec.registry import BASELINES, FAMILY_BASELINES, lookup

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

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
        parameters: The best point, as keyword arguments of the baseline.
        trials: Every point, in the order of the grid.
        metric: ``NDCG@10`` over the whole catalogue with the history excluded, higher is better; for ratings
            ``RMSE``, lower is better.
    """

    parameters: Parameters
    trials: tuple[Trial, ...]
    metric: str


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
        RecipeError: If there is no such baseline, or it writes texts, which have no such figure.
        DataError: If the split holds nothing out for validation.
    """
    made = lookup(BASELINES, name, "baseline")
    rates = name in FAMILY_BASELINES["rating"]
    if name in FAMILY_BASELINES["explanation"]:
        raise RecipeError(f"the baseline {name!r} writes texts and has nothing to tune; leave it out of the tuning")
    cases = rating_cases(data) if rates else ranking_cases(data)
    if not cases:
        raise DataError(
            f"{data.dataset.name}: the split {data.kind} holds no {'ratings' if rates else 'interactions'} out for "
            f"validation, which tuning {name!r} needs; set data.split.valid above 0, or use leave_one_out"
        )
    trials = []
    for parameters in points(made.GRID if grid is None else grid):
        model = made(**parameters, seed=seed)
        model.fit(data)
        value = root_mean_squared_error(model, cases) if rates else mean_ndcg(model.items, model.scores, cases)
        trials.append(Trial(parameters, value))
    best = min(trials, key=lambda trial: trial.value if rates else -trial.value)
    return Tuned(parameters=best.parameters, trials=tuple(trials), metric="RMSE" if rates else "NDCG@10")


def points(grid: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return every combination of a grid's values; one empty point for an empty grid."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
