"""Grid search: small grids exhaustively, large grids one parameter at a time, and the bounds of each grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from llmrec.baselines.tune import (
    SMALL_GRID_SIZE,
    grid_combinations,
    parameters_at_grid_edge,
    search_grid,
    search_values,
)
from llmrec.recipe.schema import Section

LADDER = tuple(range(12))


class _Objective:
    """Evaluates points with one function per table; records the evaluated points."""

    def __init__(self, most: int | None = None, **tables: Callable[[Mapping[str, Any]], float]) -> None:
        self.seen: dict[str, dict[str, float]] = {}
        self._tables, self._most = tables, most

    def __call__(self, point: dict[str, Any]) -> Mapping[str, float] | None:
        if str(point) not in self.seen:
            if len(self.seen) == self._most:
                return None
            self.seen[str(point)] = {name: value(point) for name, value in self._tables.items()}
        return self.seen[str(point)]

    def best(self, table: str) -> str:
        return max(self.seen, key=lambda point: self.seen[point][table])


def test_small_grid_is_searched_completely() -> None:
    grid = {"a": (1, 2, 3), "b": ("x", "y")}
    objective = _Objective(t=lambda point: 0.0)
    search_grid(grid, {"a": 1, "b": "x"}, ["t"], objective)
    assert (
        list(objective.seen) == [str(point) for point in grid_combinations(grid)]
        and len(objective.seen) <= SMALL_GRID_SIZE
    )


@given(peak=st.tuples(st.sampled_from(LADDER), st.sampled_from(LADDER), st.sampled_from("xyz")), start=st.data())
def test_finds_the_peak_with_few_points(peak: tuple[int, int, str], start: Any) -> None:
    grid: dict[str, tuple[Any, ...]] = {"a": LADDER, "b": LADDER, "c": ("x", "y", "z")}
    begin = {name: start.draw(st.sampled_from(values)) for name, values in grid.items()}
    objective = _Objective(
        t=lambda p: -((p["a"] - peak[0]) ** 2) - 2 * (p["b"] - peak[1]) ** 2 - 3 * (p["c"] != peak[2])
    )
    search_grid(grid, begin, ["t"], objective)
    assert objective.best("t") == str(dict(zip("abc", peak, strict=True)))
    assert len(objective.seen) < 60  # of 432


def test_each_table_has_its_search() -> None:
    grid = {"a": LADDER, "b": LADDER}
    objective = _Objective(
        one=lambda p: -abs(p["a"] - 2) - abs(p["b"] - 9), other=lambda p: -abs(p["a"] - 10) - abs(p["b"] - 1)
    )
    search_grid(grid, {"a": 5, "b": 5}, ["one", "other"], objective)
    assert objective.best("one") == str({"a": 2, "b": 9}) and objective.best("other") == str({"a": 10, "b": 1})


def test_hill_climbing() -> None:
    # One worse value does not stop the search.
    bumpy = {5: 1.0, 6: 0.9, 7: 2.0}
    objective = _Objective(t=lambda p: bumpy.get(p["a"], 0.0))
    search_grid({"a": LADDER, "b": (0, 1)}, {"a": 5, "b": 0}, ["t"], objective)
    assert "'a': 7" in objective.best("t")
    objective = _Objective(4, t=lambda p: -abs(p["a"] - 2) - abs(p["b"] - 3))
    search_grid({"a": (1, 2, 3), "b": (1, 2, 3, 4)}, {"a": 2, "b": 2}, ["t"], objective, most=4)
    assert objective.best("t") == str({"a": 2, "b": 3}) and len(objective.seen) <= 4


def test_ladder_includes_the_start() -> None:
    assert search_values((1, 3, 5), 4) == (1, 3, 4, 5) and search_values((1, 3), 3) == (1, 3)
    assert search_values(("x", "y"), None) == ("x", "y", None)


class _Config(Section):
    decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    order: Annotated[int, Field(gt=0)] = 3
    kind: str = "x"


def test_ends_of_the_grid_are_borders() -> None:
    grid: dict[str, tuple[Any, ...]] = {"decay": (0.5, 0.8, 1.0), "order": (1, 3, 5), "kind": ("x", "y")}
    assert parameters_at_grid_edge(_Config, grid, {"decay": 0.5, "order": 5, "kind": "x"}) == ("decay", "order")
    assert parameters_at_grid_edge(_Config, grid, {"decay": 1.0, "order": 1, "kind": "y"}) == ()
    assert parameters_at_grid_edge(_Config, grid, {"decay": 0.8, "order": 3, "kind": "y"}) == ()
    assert parameters_at_grid_edge(_Config, {"order": (3,)}, {"order": 3}) == ()
