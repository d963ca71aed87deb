"""Which rows of a suite are compared: what its page plans, as one family over all tables, and what is described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmrec.bench.records import PairSlice, SuitePair
from llmrec.data.split import SplitDataset
from llmrec.evaluate.compare import Contrast, Contrasts, Standing, exploratory, planned, reach
from llmrec.evaluate.slices import FEW, target_slices
from llmrec.recipe.comparisons import AnyPair, PartialPair, Suite, names_of
from llmrec.results import Pair
from llmrec.types import Case

# Slices of targets: requests for one item are drawn together.
_OF_TARGETS = ("count:", "words:")
# That of targets without training interactions.
_COLD = "count:0-0"


@dataclass(frozen=True)
class Compared:
    """The comparisons of a suite.

    Attributes:
        planned: Tested as one family.
        described: The best row of each table with every other.
        explored: What the page thought of after the test split was seen.
        detectable: By table, what its comparisons could have shown.
        unrun: Planned comparisons with rows that were not run.
    """

    planned: tuple[SuitePair, ...]
    described: tuple[SuitePair, ...]
    explored: tuple[SuitePair, ...]
    detectable: dict[str, str]
    unrun: int


@dataclass(frozen=True)
class _Asked:
    """A comparison that can be made, or one on requests that there are none of."""

    frame: SuitePair
    contrast: Contrast | None


def compared(
    suite: Suite, metric: str, tables: Mapping[str, Sequence[Standing]], cases: Sequence[Case], data: SplitDataset
) -> Compared:
    """Compare the rows of a suite.

    Args:
        suite: Its page.
        metric: What rows are compared by.
        tables: The rows of each table.
        cases: The requests, in the order of the rows' values.
        data: The split that they are of.
    """
    users = [case.request.user_id for case in cases]
    targets = [str(case.truth) for case in cases]
    found = {seen: Contrasts(metric, rows, users) for seen, rows in tables.items()}
    parts = target_slices(cases, data) if suite.task == "ranking" else {}
    meant, later = (
        [each for seen, table in found.items() for each in _asked(pairs, seen, table, targets, parts)]
        for pairs in (suite.pairs, suite.explored)
    )
    names = {row.name for rows in tables.values() for row in rows}
    unrun = len(tables) * sum(not names.issuperset(names_of(pair)) for pair in suite.pairs)
    tested = planned(_able(meant), resamples=suite.bootstrap, more=unrun)
    named, explored = (
        _filled(asked, numbers, targets, parts, suite.bootstrap)
        for asked, numbers in ((meant, tested), (later, exploratory(_able(later), resamples=suite.bootstrap)))
    )
    described = [
        SuitePair(seen=seen, metric=metric, **pair.as_json())
        for seen, table in found.items()
        for pair in exploratory(table.best_with_others(), resamples=suite.bootstrap)
    ]
    family = len(tested) + unrun
    detectable = {
        seen: reach(
            metric,
            [pair for pair in (*named, *described) if pair.seen == seen and pair.items is None],
            users=len(set(users)),
            comparisons=family,
        )
        for seen in tables
    }
    return Compared(named, tuple(described), explored, detectable, unrun)


def _asked(
    pairs: Sequence[AnyPair],
    seen: str,
    table: Contrasts,
    targets: Sequence[str],
    parts: Mapping[str, NDArray[np.bool_]],
) -> list[_Asked]:
    """Return the comparisons of a page in one table; those of rows that were not run are left out."""
    run = {row.name for row in table.rows}
    found = []
    for asked in pairs:
        if not run.issuperset(names_of(asked)):
            continue
        for contrast in table.named([names_of(asked)]):
            frame = SuitePair(seen=seen, metric=table.metric, a=contrast.a.name, b=contrast.b.name)
            if not isinstance(asked, PartialPair):
                found.append(_Asked(frame, contrast))
                continue
            cold = asked.items == "cold"
            places = np.flatnonzero(parts[_COLD] == cold).tolist()
            # Cold events are few and crowd on few items, so that the item is the unit.
            owners = [(targets if cold else table.users)[place] for place in places]
            told = {"items": asked.items, "n": len(places), "clusters": len(set(owners)) if cold else None}
            found.append(_Asked(frame.model_copy(update=told), _on(contrast, places, owners) if places else None))
    return found


def _able(asked: Sequence[_Asked]) -> list[Contrast]:
    return [each.contrast for each in asked if each.contrast is not None]


def _filled(
    asked: Sequence[_Asked],
    numbers: Sequence[Pair],
    targets: Sequence[str],
    parts: Mapping[str, NDArray[np.bool_]],
    resamples: int,
) -> tuple[SuitePair, ...]:
    """Return comparisons with their figures; those over all requests with where the difference comes from."""
    left, found = iter(numbers), []
    for each in asked:
        pair = each.frame
        if each.contrast is not None:
            pair = pair.model_copy(update=dict(next(left)))
            if pair.items is None:
                pair = pair.model_copy(update={"slices": _sliced(each.contrast, targets, parts, resamples)})
        found.append(pair)
    return tuple(found)


def _sliced(
    contrast: Contrast, targets: Sequence[str], parts: Mapping[str, NDArray[np.bool_]], resamples: int
) -> tuple[PairSlice, ...]:
    """Return a comparison over some of its requests; without a figure where they are too few to say anything."""
    found = []
    for name, member in parts.items():
        places = np.flatnonzero(member).tolist()
        if not places:
            continue
        by_target = name.startswith(_OF_TARGETS)
        owners = [(targets if by_target else contrast.users)[place] for place in places]
        told = PairSlice(name=name, n=len(places), clusters=len(set(owners)) if by_target else None)
        if len(places) >= FEW:
            (pair,) = exploratory([_on(contrast, places, owners)], resamples=resamples)
            told = told.model_copy(update={"value": pair.value, "low": pair.low, "high": pair.high})
        found.append(told)
    return tuple(found)


def _on(contrast: Contrast, places: Sequence[int], owners: Sequence[str]) -> Contrast:
    """Return a comparison on some of its requests, with whose they are."""
    one, other = (replace(row, values=row.values[..., list(places)]) for row in (contrast.a, contrast.b))
    return Contrast(contrast.metric, one, other, owners)
