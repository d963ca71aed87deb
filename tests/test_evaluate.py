"""Nothing is dropped: failures stay in every denominator."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from llmrec.errors import LlmrecError
from llmrec.evaluate import Protocol, compare, evaluate
from llmrec.types import Answer, Case, Ranking, Rating, Request, Text, Unparsed

PROTOCOL = Protocol(split="leave_one_out", candidates="uniform-4", cutoffs=(1, 2), resamples=200, seed=0, catalogue=9)
ITEMS = ("a", "b", "c", "d")


class Canned:
    name = "canned"

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = list(answers)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return self.answers


def case(k: int, truth: str | float, candidates: tuple[str, ...] | None = ITEMS) -> Case:
    return Case(request=Request(id=f"r{k}", user_id=f"u{k}", candidates=candidates, item="a"), truth=truth)


def ranking(k: int, items: str, scores: Sequence[float]) -> Ranking:
    return Ranking(request_id=f"r{k}", items=tuple(items), scores=tuple(scores))


def test_rankings_with_a_tie_a_miss_and_a_failure() -> None:
    cases = [case(0, "a"), case(1, "b"), case(2, "d"), case(3, "a")]
    answers: list[Answer] = [
        ranking(0, "abcd", [4, 3, 2, 1]),
        ranking(1, "abcd", [5, 5, 1, 0]),
        ranking(2, "ab", [2, 1]),
        Unparsed(request_id="r3", reason="no label", raw="I cannot"),
    ]
    found = evaluate(Canned(answers), cases, family="direct", protocol=PROTOCOL)
    assert found.figures["metrics"]["HR@1"]["value"] == pytest.approx((1 + 0.5) / 4)
    assert found.figures["metrics"]["HR@2"]["value"] == pytest.approx((1 + 1) / 4)
    assert found.figures["metrics"]["NDCG@2"]["value"] == pytest.approx((1 + (1 + 1 / np.log2(3)) / 2) / 4)
    assert found.figures["parse_rate"] == 0.75
    assert found.figures["tie_rate"] == 0.25
    assert found.figures["failures"] == [{"request_id": "r3", "reason": "no label", "raw": "I cannot"}]
    assert [record["rank"] for record in found.records] == [1.0, 1.5, None, None]
    assert found.figures["metrics"]["HR@1"]["signature"].startswith("HR@1|gain:binary|ties:expected|cand:uniform-4|")


def test_more_failures_never_raise_a_figure() -> None:
    cases = [case(k, "a") for k in range(10)]
    good: list[Answer] = [ranking(k, "abcd", [4, 3, 2, 1]) for k in range(10)]
    last = 2.0
    for failed in range(11):
        answers = [Unparsed(request_id=f"r{k}", reason="x") if k < failed else good[k] for k in range(10)]
        value = evaluate(Canned(answers), cases, family="sequential", protocol=PROTOCOL).figures["metrics"]["MRR"][
            "value"
        ]
        assert value < last or failed == 0
        last = value


def test_ratings_fall_back_and_count_it() -> None:
    cases = [case(0, 4.0), case(1, 2.0)]
    answers: list[Answer] = [Rating(request_id="r0", value=3.0), Unparsed(request_id="r1", reason="x")]
    found = evaluate(Canned(answers), cases, family="rating", protocol=PROTOCOL, fallback=lambda request: 5.0)
    assert found.figures["metrics"]["RMSE"]["value"] == pytest.approx(np.sqrt((1 + 9) / 2))
    assert found.figures["metrics"]["MAE"]["value"] == pytest.approx(2.0)
    assert found.figures["parse_rate"] == 0.5
    with pytest.raises(LlmrecError, match="fallback"):
        evaluate(Canned(answers), cases, family="rating", protocol=PROTOCOL)


def test_texts_that_fail_are_empty_texts() -> None:
    pytest.importorskip("rouge_score", reason="the text extra is not installed")
    cases = [case(k, "it is very quiet and cleans well") for k in range(2)]
    answers: list[Answer] = [
        Text(request_id="r0", text="it is very quiet and cleans well"),
        Unparsed(request_id="r1", reason="empty answer", raw=""),
    ]
    found = evaluate(Canned(answers), cases, family="explanation", protocol=PROTOCOL)
    assert found.figures["metrics"]["ROUGE-L"]["value"] == pytest.approx(0.5)
    assert found.figures["metrics"]["Distinct-2"]["low"] is None
    assert json.loads(found.records[1]["parsed"]) is None


def test_a_predictor_that_leaves_gaps_is_refused() -> None:
    with pytest.raises(LlmrecError, match="canned"):
        evaluate(Canned([]), [case(0, "a")], family="direct", protocol=PROTOCOL)
    with pytest.raises(LlmrecError, match="no case"):
        evaluate(Canned([]), [], family="direct", protocol=PROTOCOL)


def test_comparison_of_rmse_is_of_root_means() -> None:
    a, b = np.array([1.0, 9.0, 4.0, 4.0]), np.array([4.0, 16.0, 9.0, 1.0])
    found = compare("RMSE", a, b, ["u0", "u1", "u2", "u3"], resamples=200, seed=0)
    assert found.value == pytest.approx(np.sqrt(a.mean()) - np.sqrt(b.mean()))
