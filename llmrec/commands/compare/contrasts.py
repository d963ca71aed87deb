"""Which rows of a suite are compared: what its page plans, as one family over all tables, and what is described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmrec.commands.compare.records import PairSlice, SuitePair
from llmrec.data.split import SplitDataset
from llmrec.evaluate.compare import Contrast, Contrasts, Standing, exploratory, planned, reach
from llmrec.evaluate.slices import FEW, target_slices
from llmrec.recipe.comparisons import AnyPair, PartialPair, Suite, names_of
from llmrec.types import Case

# Slices of targets: requests for one item are drawn together.
_OF_TARGETS = ("count:", "words:")


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
    found = {seen: Contrasts(metric, rows, users) for seen, rows in tables.items()}
    meant, later = (
        [each for seen, table in found.items() for each in _asked(pairs, seen, table, cases, data)]
        for pairs in (suite.pairs, suite.explored)
    )
    names = {row.name for rows in tables.values() for row in rows}
    unrun = len(tables) * sum(not names.issuperset(names_of(pair)) for pair in suite.pairs)
    able = [each for each in meant if each.contrast is not None]
    tested = planned([each.contrast for each in able if each.contrast], resamples=suite.bootstrap, more=unrun)
    numbers = iter(tested)
    parts = target_slices(cases, data) if suite.task == "ranking" else {}
    named = [
        each.frame if each.contrast is None else _filled(each, next(numbers), cases, parts, suite.bootstrap)
        for each in meant
    ]
    seen_later = exploratory([each.contrast for each in later if each.contrast], resamples=suite.bootstrap)
    numbers = iter(seen_later)
    explored = [
        each.frame if each.contrast is None else _filled(each, next(numbers), cases, parts, suite.bootstrap)
        for each in later
    ]
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
    return Compared(tuple(named), tuple(described), tuple(explored), detectable, unrun)


def _asked(
    pairs: Sequence[AnyPair], seen: str, table: Contrasts, cases: Sequence[Case], data: SplitDataset
) -> list[_Asked]:
    """Return the comparisons of a page in one table; those of rows that were not run are left out."""
    rows = {row.name: row for row in table.rows}
    found = []
    for asked in pairs:
        a, b = names_of(asked)
        if a not in rows or b not in rows or None in (rows[a].value, rows[b].value):
            continue
        frame = SuitePair(seen=seen, metric=table.metric, a=a, b=b)
        if not isinstance(asked, PartialPair):
            found.append(_Asked(frame, Contrast(table.metric, rows[a], rows[b], table.users)))
            continue
        known = set(data.train["item_id"].to_list())
        places = np.flatnonzero([(case.truth in known) == (asked.items == "warm") for case in cases])
        targets = [str(cases[place].truth) for place in places.tolist()]
        cold = asked.items == "cold"
        told = {"items": asked.items, "n": len(places), "clusters": len(set(targets)) if cold else None}
        contrast = None
        if len(places):
            # Cold events are few and crowd on few items, so that the item is the unit.
            owners = targets if cold else [table.users[place] for place in places.tolist()]
            one, other = (replace(row, values=row.values[places]) for row in (rows[a], rows[b]))
            contrast = Contrast(table.metric, one, other, owners)
        found.append(_Asked(frame.model_copy(update=told), contrast))
    return found


def _filled(
    asked: _Asked, pair: object, cases: Sequence[Case], parts: Mapping[str, NDArray[np.bool_]], resamples: int
) -> SuitePair:
    """Return a comparison with its figures; one over all requests with where the difference comes from."""
    assert asked.contrast is not None
    numbers = {name: value for name, value in vars(pair).items() if name not in ("a", "b")}
    slices = _sliced(asked.contrast, cases, parts, resamples) if asked.frame.items is None else ()
    return asked.frame.model_copy(update={**numbers, "slices": slices})


def _sliced(
    contrast: Contrast, cases: Sequence[Case], parts: Mapping[str, NDArray[np.bool_]], resamples: int
) -> tuple[PairSlice, ...]:
    """Return a comparison over some of its requests; without a figure where they are too few to say anything."""
    found = []
    for name, member in parts.items():
        places = np.flatnonzero(member).tolist()
        if not places:
            continue
        targets = [str(cases[place].truth) for place in places] if name.startswith(_OF_TARGETS) else []
        told = PairSlice(name=name, n=len(places), clusters=len(set(targets)) if targets else None)
        if len(places) >= FEW:
            one, other = (replace(row, values=row.values[places]) for row in (contrast.a, contrast.b))
            owners = targets or [contrast.users[place] for place in places]
            (pair,) = exploratory([Contrast(contrast.metric, one, other, owners)], resamples=resamples)
            told = told.model_copy(update={"value": pair.value, "low": pair.low, "high": pair.high})
        found.append(told)
    return tuple(found)
