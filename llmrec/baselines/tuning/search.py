"""Searches the parameters of a baseline: every point of a small grid, one parameter after another in a large one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from pydantic import ValidationError

from llmrec.recipe.schema import Section

Point = dict[str, Any]
"""A value for every parameter of a grid."""

Grid = Mapping[str, tuple[Any, ...]]

Judge = Callable[[Point], Mapping[str, float] | None]
"""Returns the figures of a point, higher is better, one for each table; None where no more may be fitted."""

SMALL = 12
"""Grids of at most so many points are tried whole."""

# Times that the search goes over all parameters, at most.
_ROUNDS = 3
# Values without improvement after which the search along a parameter stops.
_PATIENCE = 2


def points(grid: Grid) -> list[Point]:
    """Return every combination of a grid's values; one empty point for an empty grid."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def explore(grid: Grid, start: Mapping[str, Any], tables: Sequence[str], judge: Judge) -> None:
    """Have points judged until the best one for each table is found.

    A grid of at most `SMALL` points is tried whole. In a larger one each parameter is moved along its values while the
    figure rises, the others held, until a round over all parameters changes nothing. Values that are no numbers have
    no order, and all are tried.

    Args:
        grid: Values by parameter; numbers ascending.
        start: Where the search of a large grid begins; a value that the grid lacks is taken into it.
        tables: What the points are judged by. Each has a search of its own, in this order.
        judge: Called for a point as often as it is met.
    """
    every = points(grid) if _size(grid) <= SMALL else []
    for point in every:
        if judge(point) is None:
            return
    if every:
        return
    ladders = {name: ladder(values, start[name]) for name, values in grid.items()}
    for table in tables:
        _climb(ladders, {name: start[name] for name in grid}, table, judge)


def ladder(values: Sequence[Any], start: Any) -> tuple[Any, ...]:
    """Return the values of a parameter with the one that a search begins at, numbers ascending."""
    if start in values:
        return tuple(values)
    found = (*values, start)
    return tuple(sorted(found)) if _ordered(found) else found


def borders(config: type[Section], grid: Grid, point: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parameters whose value stands at an end of the grid, where a better one may lie beyond.

    An end beyond which the config allows no value, such as 1 of a count, is none.
    """
    return tuple(
        name
        for name, values in grid.items()
        if len(values) > 1
        and _ordered(values)
        and (
            (point[name] == min(values) and _allowed(config, point, name, below=True))
            or (point[name] == max(values) and _allowed(config, point, name, below=False))
        )
    )


def _size(grid: Grid) -> int:
    found = 1
    for values in grid.values():
        found *= len(values)
    return found


def _ordered(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _allowed(config: type[Section], point: Mapping[str, Any], name: str, *, below: bool) -> bool:
    value = point[name]
    step = 1 if isinstance(value, int) else max(abs(value), 1.0) * 1e-6
    try:
        config.model_validate({**point, name: value - step if below else value + step})
    except ValidationError:
        return False
    return True


def _climb(ladders: Grid, start: Point, table: str, judge: Judge) -> None:
    found = judge(start)
    if found is None:
        return
    best, value = start, found[table]
    for _ in range(_ROUNDS):
        before = best
        for name, values in ladders.items():
            for others in _ways(values, best[name]):
                improved, missed = False, 0
                for other in others:
                    point = {**best, name: other}
                    if (found := judge(point)) is None:
                        return
                    if found[table] > value:
                        best, value, improved, missed = point, found[table], True, 0
                    else:
                        missed += 1
                    if missed == _PATIENCE and _ordered(values):
                        break
                if improved:
                    break
        if best == before:
            return


def _ways(values: Sequence[Any], current: Any) -> list[Sequence[Any]]:
    """Return the values on both sides of the current one, nearest first; all others where they have no order."""
    place = list(values).index(current)
    if not _ordered(values):
        return [[value for value in values if value != current]]
    return [values[place + 1 :], values[:place][::-1]]
