"""What features say of a few requests, and what they change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from llmrec.baselines.parameters import stores_of
from llmrec.data.features import FeatureStore
from llmrec.guard import clean
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.shown.entries import INPUT, drawn, product_of, ranked, shortened, user_of
from llmrec.pipeline.study import Study
from llmrec.records import Exhibit
from llmrec.results import Prediction

EXHIBITS = 8
"""Requests a family that show what features say and change."""
_READ = 6


def exhibits(study: Study, rows: Sequence[ResultRow]) -> list[Exhibit]:
    """Return ``gallery`` of results.json: what features say of a few requests, and what they change.

    Of each family the first baseline that reads features is shown, beside the rows of the same baseline.
    """
    return [exhibit for family in study.tasks for exhibit in _exhibits(study, family, rows)]


def _exhibits(study: Study, family: str, rows: Sequence[ResultRow]) -> Iterator[Exhibit]:
    named = {each.label: each for each in study.baselines(family)}
    folders = {label: stores_of(each.name, each.parameters) for label, each in named.items()}
    reading = [label for label, found in folders.items() if found and not named[label].parameters.get("shuffled")]
    if not reading:
        return
    first, folder = named[reading[0]], next(iter(folders[reading[0]]))
    store, cases, data = FeatureStore.open(folder), study.cases(family), study.task_data(family).dataset
    alike = [
        row
        for row in rows
        if row.figures.task == family
        and row.figures.predictor in named
        and named[row.figures.predictor].name == first.name
    ]
    seen = store.seen_by("user")
    told = [place for place, case in enumerate(cases) if case.request.user_id in seen] or list(range(len(cases)))
    for n in drawn([cases[place].request.id for place in told], study.recipe.seed, EXHIBITS):
        place, request = told[n], cases[told[n]].request
        user, item = request.user_id, str(request.item or cases[told[n]].truth)
        pairs = sorted(each for _, each in seen.get(user, ()) if each in data.items)
        yield Exhibit(
            task=family,
            request_id=request.id,
            user=user_of(data, user),
            item=product_of(data, item),
            store=folder,
            read=tuple(clean(data.items[each].title) for each in pairs[:_READ]),
            events=len(pairs),
            profile=shortened(clean(store.texts("user", [user]).get(user, ""), INPUT)),
            described=shortened(clean(store.texts("item", [item]).get(item, ""), INPUT)),
            truth=f"{truth:g}" if isinstance(truth := cases[place].truth, float) else str(truth),
            answers={row.figures.id: _said(row.records[place], item) for row in alike},
        )


def _said(record: Prediction, item: str) -> str:
    """Return an answer in a few words: a number as it is, of a ranking the place of the item."""
    if answer := ranked(record.parsed):
        return f"place {answer.index(item) + 1}" if item in answer else f"not among the first {len(answer)}"
    said = json.loads(record.parsed)
    return f"{said:.3f}" if isinstance(said, float) else "could not be read" if said is None else str(said)
