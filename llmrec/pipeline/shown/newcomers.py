"""Items that nobody had chosen, as a report shows them: what they read like, and in whose lists they stand."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from llmrec.errors import LlmrecError
from llmrec.guard import clean
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.shown.entries import drawn, product_of, ranked, user_of
from llmrec.pipeline.study import Study, vectors_of
from llmrec.records import Nearby, Newcomer, Visit
from llmrec.tasks.family import family_of
from llmrec.types import Case

log = logging.getLogger(__name__)

LENGTH = 10
"""Places of a list that count."""
# Items of a family, neighbours of an item, lists of a row, and titles of a history.
_ITEMS, _NEAR, _VISITS, _TITLES = 6, 4, 2, 3


def newcomers(study: Study, rows: Sequence[ResultRow]) -> list[Newcomer]:
    """Return ``newcomers`` of results.json: a few of the items that the split holds out wholly.

    They are drawn by the seed among those that some user is asked for, never by who finds them. Of each family that
    ranks for users; nothing where the split has no cold items.
    """
    return [
        each for family in study.tasks if family_of(family).ranks_for_users for each in _newcomers(study, family, rows)
    ]


def _newcomers(study: Study, family: str, rows: Sequence[ResultRow]) -> Iterator[Newcomer]:
    data, cases = study.task_data(family), study.cases(family)
    asked = sorted({str(case.truth) for case in cases} & data.cold)
    if not asked:
        return
    chosen = [asked[place] for place in drawn(asked, study.recipe.seed, _ITEMS)]
    own = [row for row in rows if row.figures.task == family]
    lists = {row.figures.id: [ranked(record.parsed)[:LENGTH] for record in row.records] for row in own}
    near = _neighbours(study, family, chosen)
    for item in chosen:
        places = {
            name: [(n, found.index(item) + 1) for n, found in enumerate(each) if item in found]
            for name, each in lists.items()
        }
        shown = {name: _one_a_user(found, cases)[:_VISITS] for name, found in places.items()}
        yield Newcomer(
            task=family,
            item=product_of(data.dataset, item),
            neighbours=near[item],
            wanted=sum(str(case.truth) == item for case in cases),
            lists={name: len(found) for name, found in places.items()},
            visits={
                name: tuple(_visit(study, family, cases[n], place, item) for n, place in found)
                for name, found in shown.items()
                if found
            },
        )


def _one_a_user(found: Sequence[tuple[int, int]], cases: Sequence[Case]) -> list[tuple[int, int]]:
    """Leave out further lists of a user, who may be asked about several items."""
    first = {cases[n].request.user_id: (n, place) for n, place in reversed(found)}
    return sorted(first.values())


def _visit(study: Study, family: str, case: Case, place: int, item: str) -> Visit:
    dataset = study.task_data(family).dataset
    latest = (clean(dataset.items[event.item_id].title) for event in case.request.history[-_TITLES:])
    return Visit(
        user=user_of(dataset, case.request.user_id),
        latest=tuple(latest),
        place=place,
        wanted=str(case.truth) == item,
    )


def _neighbours(study: Study, family: str, asked: Sequence[str]) -> dict[str, tuple[Nearby, ...]]:
    """Return the items of training that read most like each, by the recipe's text encoder; none without one."""
    data, found = study.task_data(family), dict[str, tuple[Nearby, ...]]()
    warm = sorted(data.train["item_id"].unique().cast(pl.String).to_list())
    shown = {item: data.dataset.items[item] for item in (*asked, *warm)}
    try:
        vectors = vectors_of(shown, study.recipe.encoder)
        likeness = vectors.of(asked) @ vectors.of(warm).T
    except LlmrecError as error:
        # All is measured by now, and none of it may be lost for this.
        log.warning("new items stand without neighbours in the report: %s", error)
        return dict.fromkeys(asked, ())
    for item, row in zip(asked, likeness, strict=True):
        best = np.argsort(-row, kind="stable")[:_NEAR]
        found[item] = tuple(
            Nearby(title=clean(data.dataset.items[warm[place]].title), cosine=float(row[place]))
            for place in best.tolist()
        )
    return found
