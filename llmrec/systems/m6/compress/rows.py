"""Combinations and their figures: which of them are on the Pareto front, and which is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Kind = Literal["bfloat16", "float32", "int8"]
"""How weights are stored; int8: those of the linear layers within the blocks, the others in bfloat16."""


@dataclass(frozen=True, slots=True)
class Row:
    """One combination.

    Attributes:
        layers: Behind how many it answers.
        dtype: How its weights are stored.
        quality: The headline figure on the cases; None where it is not defined.
        ms: Milliseconds for 20 candidates.
        mb: Megabytes of its weights.
        pareto: No other is as good in all three and better in one.
    """

    layers: int
    dtype: Kind
    quality: float | None
    ms: float
    mb: float
    pareto: bool = False


@dataclass(frozen=True, slots=True)
class Compressed:
    """What was measured.

    Attributes:
        metric: The figure, and of which family.
        cases: Validation cases that it was measured on.
        target_ms: Milliseconds that 20 candidates may take.
        rows: Combinations, fastest first.
        chosen: The best that is fast enough, if any is.
        folder: Where it was exported.
    """

    metric: str
    cases: int
    target_ms: float
    rows: tuple[Row, ...]
    chosen: Row | None
    folder: Path | None


def with_front(rows: Sequence[Row], *, lower: bool) -> tuple[Row, ...]:
    """Return rows, the fastest first, and say of each whether it is on the Pareto front."""

    def figures(row: Row) -> tuple[float, float, float]:
        quality = float("-inf") if row.quality is None else -row.quality if lower else row.quality
        return quality, -row.ms, -row.mb

    def beaten(row: Row) -> bool:
        own = figures(row)
        return any(
            all(o >= s for o, s in zip(other, own, strict=True)) and other != own for other in map(figures, rows)
        )

    return tuple(sorted((replace(row, pareto=not beaten(row)) for row in rows), key=lambda row: row.ms))


def chosen(rows: Sequence[Row], target_ms: float, *, lower: bool) -> Row | None:
    """Return the best row within the target, of equal ones the fastest; None where there is none."""
    fast = [row for row in rows if row.ms <= target_ms and row.quality is not None]
    return max(fast, key=lambda row: ((-1 if lower else 1) * float(row.quality or 0), -row.ms), default=None)
