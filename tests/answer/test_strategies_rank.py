"""`llmrec rank` with every strategy: whole rankings, whatever the order and the place in the file."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from llmrec.answer.prompting import notes_of, rank_requests
from llmrec.answer.strategy import Asking
from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.data.requests import RankRequest, read_request
from llmrec.pipeline import bundle
from llmrec.types import Ranking, Unparsed
from tests.answer.rank_cases import TITLES, records

pytest.importorskip("torch", reason="the train extra is not installed")

STRATEGIES = (
    *("label", "permutation", "window", "pairwise", "setwise", "pointwise-yes", "two-step"),
    "likelihood-prior",
)
SMALL = ("window", "setwise", "pointwise-yes")


def way_of(name: str) -> Asking:
    if name.startswith("likelihood"):
        return Asking("sequential", "continue-list", name)
    return Asking("direct", "with-profile" if name == "two-step" else "shortlist", name)


def requests(count: int, candidates: int) -> list[RankRequest]:
    made = []
    for n, record in enumerate(records(count, candidates=candidates), start=1):
        texts = {key: [{"item_id": i, "title": TITLES[i]} for i in record[key]] for key in ("history", "candidates")}
        made.append(read_request({**record, **texts}, n, None))
    return made


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_candidate_is_ranked_and_neither_order_nor_line_show(
    name: str, tools: tuple[bundle.Bundle, HFBackend, Encoder]
) -> None:
    found, backend, encoder = tools
    asked = requests(3, 6)
    turned = []
    for request in asked[::-1]:
        pool = list(request.candidates)
        random.Random(request.id).shuffle(pool)
        turned.append(replace(request, candidates=tuple(pool)))
    first, second = (
        rank_requests(found, each, way=way_of(name), backend=backend, encoder=encoder, batch=2)
        for each in (asked, turned)
    )
    for request, one, other in zip(asked, first, second[::-1], strict=True):
        assert isinstance(one, Ranking) and isinstance(other, Ranking)
        assert sorted(one.items) == sorted(item.item_id for item in request.candidates)
        assert list(one.scores) == sorted(one.scores, reverse=True)
        assert one.items == other.items and one.cost.forwards > 0
        assert one.scores == pytest.approx(other.scores, abs=1e-3)


def test_one_candidate_is_asked_about_by_its_title_alone(tools: tuple[bundle.Bundle, HFBackend, Encoder]) -> None:
    found, backend, encoder = tools
    (request,) = requests(1, 1)
    for name in STRATEGIES:
        (answer,) = rank_requests(found, [request], way=way_of(name), backend=backend, encoder=encoder, batch=1)
        assert isinstance(answer, Ranking)
        assert (
            (answer.cost.forwards == 0) == (name != "likelihood-prior") == bool(notes_of(way_of(name), request, answer))
        )


def test_small_questions_take_sets_that_no_prompt_holds(tools: tuple[bundle.Bundle, HFBackend, Encoder]) -> None:
    found, backend, encoder = tools
    many = [{"item_id": item, "title": each} for item, each in list(TITLES.items())[:40]]
    request = read_request({"id": "large", "candidates": many}, 1, None)
    tight = Encoder(encoder.tokenizer, max_length=620)
    narrow = HFBackend(backend.model, tight)
    for name in ("label", *SMALL):
        (answer,) = rank_requests(found, [request], way=way_of(name), backend=narrow, encoder=tight, batch=1)
        if name == "label":
            assert isinstance(answer, Unparsed) and "more than the maximum of 620" in answer.reason
        else:
            assert isinstance(answer, Ranking) and len(answer.items) == 40
