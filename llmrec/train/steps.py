"""Optimiser steps planned in advance, stored as flat arrays until a step is read.

A `TokenRow` takes about fifty bytes per token, since every integer is an object. Here a token takes five: its id and
whether it has loss. Rows and steps are created from the arrays when they are read.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, overload

import numpy as np

from llmrec.backends.encode import IGNORED, TokenRow
from llmrec.durable import checksum
from llmrec.train.packing import PackedRows
from llmrec.types import Case

if TYPE_CHECKING:
    from llmrec.models.soft_prompt import SoftPrompt


@dataclass(frozen=True, slots=True)
class Step:
    """The examples of an optimiser step and, with ``bins``, how they are packed into sequences."""

    rows: tuple[TokenRow, ...]
    bins: tuple[PackedRows, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Number of tokens of each packed sequence, or of each example; shared prefixes count once."""
        return [item.columns for item in self.bins] or [len(row.ids) for row in self.rows]

    @property
    def padded_tokens(self) -> int:
        """Number of tokens computed, including padding."""
        sizes = self.sizes
        return len(sizes) * max(sizes)

    @property
    def tokens(self) -> int:
        """Number of tokens computed, without padding."""
        return sum(self.sizes)

    @property
    def targets(self) -> int:
        """Number of tokens with loss."""
        return sum(row.targets for row in self.rows)

    def split(self, count: int) -> list[Step]:
        """Split the step into parts with about equal numbers of tokens, assigning the longest examples first.

        If there are fewer rows or packed sequences than parts, some parts are empty.
        """
        sizes = self.sizes
        loads, parts = [0] * count, [[] for _ in range(count)]  # type: tuple[list[int], list[list[int]]]
        for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
            least = loads.index(min(loads))
            loads[least] += sizes[n]
            parts[least].append(n)
        return [self.part(sorted(part)) for part in parts]

    def part(self, numbers: Sequence[int]) -> Step:
        """Return a step with some of the examples or packed sequences, selected by index."""
        if not self.bins:
            return Step(tuple(self.rows[n] for n in numbers))
        bins = tuple(self.bins[n] for n in numbers)
        return Step(tuple(row for item in bins for row in item.rows), bins)


class RowTable:
    """Tokenised examples in flat arrays, in the order in which they were added."""

    def __init__(self) -> None:
        self._ids, self._learned = array("i"), bytearray()
        self._ends = array("q", [0])
        # Only for examples whose labels differ from the tokens.
        self._labels: dict[int, array[int]] = {}

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, row: TokenRow) -> None:
        """Append an example."""
        ids, labels = array("i", row.ids), array("i", row.labels)
        encoded = np.frombuffer(labels, dtype=np.int32)
        learned = encoded != IGNORED
        if not np.array_equal(encoded[learned], np.frombuffer(ids, dtype=np.int32)[learned]):
            self._labels[len(self)] = labels
        self._ids.extend(ids)
        self._learned += learned.tobytes()
        self._ends.append(len(self._ids))

    def row(self, number: int, weight: float = 1.0) -> TokenRow:
        """Return an example by its index, with a weight."""
        start, end = self._ends[number], self._ends[number + 1]
        ids = self._ids[start:end]
        labels = self._labels.get(number)
        if labels is None:
            learned = np.frombuffer(self._learned[start:end], dtype=np.bool_)
            labels = np.where(learned, np.frombuffer(ids, dtype=np.int32), IGNORED).tolist()
        return TokenRow(tuple(ids), tuple(labels), weight)

    def tokens(self, number: int) -> int:
        """Return the number of tokens of an example."""
        return self._ends[number + 1] - self._ends[number]

    def targets(self, number: int) -> int:
        """Return the number of tokens with loss of an example."""
        return self._learned.count(1, self._ends[number], self._ends[number + 1])


@dataclass(frozen=True)
class TrainingPlan:
    """Planned steps, the number of examples per task, and validation examples by task.

    ``dropped`` counts rows without a target within ``train.max_row_tokens``; ``loss_shares`` is the share of the loss
    by task; ``cases`` are the questions that rollouts answer, by row number; ``soft`` describes the soft prompts.
    """

    steps: PlannedSteps
    rows: Mapping[str, int]
    dropped: Mapping[str, int]
    valid: Mapping[str, list[TokenRow]]
    loss_shares: Mapping[str, float] = field(default_factory=dict)
    cases: Sequence[Case] = ()
    soft: SoftPrompt | None = None


class PlannedSteps(Sequence[Step]):
    """Planned steps in order; a step is created when it is read.

    Attributes:
        table: All rows in the order in which they were drawn, a few more than the steps use.
    """

    def __init__(self, table: RowTable) -> None:
        self.table = table
        self._weights: Sequence[float] = ()
        # Example indices of consecutive steps; rows and columns of each bin; ends of steps in both.
        self._order, self._ends = array("i"), array("q", [0])
        self._sizes, self._columns, self._bin_ends = array("i"), array("i"), array("q", [0])

    def add(self, step: Step, numbers: Mapping[int, int]) -> None:
        """Append a step; ``numbers`` contains the indices of its examples."""
        self._order.extend([numbers[id(row)] for row in step.rows])
        self._ends.append(len(self._order))
        self._sizes.extend([len(item.rows) for item in step.bins])
        self._columns.extend([item.columns for item in step.bins])
        self._bin_ends.append(len(self._sizes))

    def weighing(self, weights: Sequence[float]) -> PlannedSteps:
        """Return the same steps with a weight for each example."""
        result = copy(self)
        result._weights = weights
        return result

    def numbers(self) -> Iterator[Sequence[int]]:
        """Yield the example indices of each step."""
        return (self._order[start:end] for start, end in pairwise(self._ends))

    def digest(self) -> str:
        """Return a hash, 32 hex digits, over the tokens and their division into steps."""
        table = self.table
        arrays = (table._ids, table._ends, self._order, self._ends, self._sizes, array("d", self._weights))
        return checksum(b"".join(item.tobytes() for item in arrays) + bytes(table._learned))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        if isinstance(index, slice):
            return [self[n] for n in range(len(self))[index]]
        n = range(len(self))[index]
        numbers = self._order[self._ends[n] : self._ends[n + 1]]
        rows = tuple(self.table.row(k, self._weights[k] if self._weights else 1.0) for k in numbers)
        span = slice(self._bin_ends[n], self._bin_ends[n + 1])
        ends = list(accumulate(self._sizes[span], initial=0))
        bins = zip(pairwise(ends), self._columns[span], strict=True)
        return Step(rows, tuple(PackedRows(rows[start:end], columns) for (start, end), columns in bins))


def balance_task_losses(steps: PlannedSteps, families: Sequence[str]) -> tuple[PlannedSteps, dict[str, float]]:
    """Weight examples so that each task's average share of the loss is its share of the tokens.

    Returns the steps with weighted examples, and each task's mean share of the loss.

    Families are drawn by shares of tokens. The loss of a step is a mean over its targets, and a list example has many
    more targets than a question with one answer, so it would have nearly all of the loss. So a family's targets are
    weighted by tokens / targets, one weight per family; ``families`` has the family of every drawn row.

    The mean weight is 1, and the rows of a single family are unchanged.
    """
    table, tokens, targets = steps.table, defaultdict[str, int](int), defaultdict[str, int](int)
    for numbers in steps.numbers():
        for n in numbers:
            tokens[families[n]] += table.tokens(n)
            targets[families[n]] += table.targets(n)
    if len(tokens) < 2:
        return steps, dict.fromkeys(tokens, 1.0)
    ratio = sum(targets.values()) / sum(tokens.values())
    weights = {family: tokens[family] / targets[family] * ratio for family in tokens}
    parts = defaultdict[str, float](float)
    for numbers in steps.numbers():
        mass = defaultdict[str, float](float)
        for n in numbers:
            mass[families[n]] += weights[families[n]] * table.targets(n)
        for family, weight in mass.items():
            parts[family] += weight / sum(mass.values()) / len(steps)
    # Examples may have been drawn for a task that no step contains.
    return steps.weighing([weights.get(family, 1.0) for family in families]), dict(parts)
