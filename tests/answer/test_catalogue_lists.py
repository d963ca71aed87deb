"""The best items of the catalogue: excluded items, and the order of ties, for one request and in a batch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmrec.answer.classic import rank_top_items, recommendable_mask
from llmrec.data.requests import RankRequest
from llmrec.types import Event, Request

NAMES = tuple(f"i{n}" for n in range(12))
COLUMNS = {name: column for column, name in enumerate(NAMES)}


def names(least: int = 0) -> st.SearchStrategy[frozenset[str]]:
    # "new" is not an item of the recommender.
    return st.frozensets(st.sampled_from([*NAMES, "new"]), min_size=least)


@st.composite
def request_pairs(draw: st.DrawFn) -> tuple[RankRequest, Request]:
    request = RankRequest(id="r", candidates=(), barred=draw(names()), keep_seen=draw(st.booleans()))
    history = tuple(Event(item_id=name) for name in sorted(draw(names())))
    return request, Request(id="r", user_id="u", history=history)


@given(pairs=st.lists(request_pairs(), min_size=1, max_size=4), items=names())
def test_excluded_items_are_not_listed(pairs: list[tuple[RankRequest, Request]], items: frozenset[str]) -> None:
    requests, translated = zip(*pairs, strict=True)
    for row, (request, same) in zip(recommendable_mask(requests, translated, COLUMNS, items), pairs, strict=True):
        seen = set() if request.keep_seen else {event.item_id for event in same.history}
        assert row.tolist() == [name in items and name not in request.barred | seen for name in NAMES]


@given(
    rows=st.lists(
        st.tuples(
            # Few values, so that many items tie.
            st.lists(st.sampled_from([-1.5, 0.0, 0.5, 2.0]), min_size=len(NAMES), max_size=len(NAMES)),
            st.lists(st.booleans(), min_size=len(NAMES), max_size=len(NAMES)),
        ),
        min_size=1,
        max_size=4,
    ),
    depth=st.integers(0, len(NAMES) + 2),
)
def test_ties_are_in_column_order(rows: list[tuple[list[float], list[bool]]], depth: int) -> None:
    requests = [RankRequest(id=str(n), candidates=()) for n in range(len(rows))]
    scores, able = (np.array(part) for part in zip(*rows, strict=True))
    rankings = rank_top_items(requests, NAMES, scores, able, depth)
    for request, ranking, values, which in zip(requests, rankings, scores, able, strict=True):
        order = sorted(np.flatnonzero(which).tolist(), key=lambda column: -values[column])[:depth]
        assert ranking.request_id == request.id
        assert ranking.items == tuple(NAMES[column] for column in order)
        assert ranking.scores == tuple(values[order].tolist())
        assert rank_top_items([request], NAMES, values[None], which[None], depth) == [ranking]
