"""Evaluation of a predictor: failures stay in every denominator."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from llmrec.errors import LlmrecError
from llmrec.evaluate.compare import compare_values
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import EvaluationResult, evaluate
from llmrec.metrics.stats import verdict
from llmrec.records import Reliability
from llmrec.results import Failure
from llmrec.tasks.family import family_of
from llmrec.types import Answer, Case, Probability, Ranking, Rating, Request, Text, Unparsed
from tests.facts import Facts, raises

PROTOCOL = EvalProtocol(
    split="leave_one_out", candidates="uniform-4", cutoffs=(1, 2), resamples=200, seed=0, catalogue=9
)
ITEMS = ("a", "b", "c", "d")


class Canned:
    name = "canned"

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = list(answers)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return self.answers


def measured(
    answers: Sequence[Answer], cases: Sequence[Case], family: str, fallback: Callable[[Request], float] | None = None
) -> EvaluationResult:
    kind = family_of(family).answer
    return evaluate(Canned(answers), cases, name=family, kind=kind, protocol=PROTOCOL, fallback=fallback)


def case(k: int, truth: str | float, candidates: tuple[str, ...] | None = ITEMS) -> Case:
    return Case(request=Request(id=f"r{k}", user_id=f"u{k}", candidates=candidates, item="a"), truth=truth)


def ranking(k: int, items: str, scores: Sequence[float]) -> Ranking:
    return Ranking(request_id=f"r{k}", items=tuple(items), scores=tuple(scores))


def test_rankings_with_a_tie_a_miss_and_a_failure() -> None:
    assert "users" not in PROTOCOL.sign("HR@1")
    assert "|users:1000|" in replace(PROTOCOL, users="1000").sign("HR@1")
    cases = [case(0, "a"), case(1, "b"), case(2, "d"), case(3, "a")]
    answers: list[Answer] = [
        ranking(0, "abcd", [4, 3, 2, 1]),
        ranking(1, "abcd", [5, 5, 1, 0]),
        ranking(2, "ab", [2, 1]),
        Unparsed(request_id="r3", reason="no label", raw="I cannot"),
    ]
    result = measured(answers, cases, "direct")
    assert result.figures.metrics["HR@1"].value == pytest.approx((1 + 0.5) / 4)
    assert result.figures.metrics["HR@2"].value == pytest.approx((1 + 1) / 4)
    assert result.figures.metrics["NDCG@2"].value == pytest.approx((1 + (1 + 1 / np.log2(3)) / 2) / 4)
    assert result.figures.parse_rate == 0.75
    assert result.figures.tie_rate == 0.25
    assert result.figures.failures == (Failure(request_id="r3", reason="no label", raw="I cannot"),)
    assert [record.rank for record in result.records] == [1.0, 1.5, None, None]
    assert result.figures.metrics["HR@1"].signature.startswith("HR@1|gain:binary|ties:expected|cand:uniform-4|")


def test_more_failures_never_improve_a_metric() -> None:
    cases = [case(k, "a") for k in range(10)]
    good: list[Answer] = [ranking(k, "abcd", [4, 3, 2, 1]) for k in range(10)]
    last = 2.0
    for failed in (0, 1, 2, 9, 10):
        answers = [Unparsed(request_id=f"r{k}", reason="x") if k < failed else good[k] for k in range(10)]
        value = measured(answers, cases, "sequential").figures.metrics["MRR"].value
        assert value < last or failed == 0
        last = value


def test_failed_ratings_use_the_fallback() -> None:
    cases = [case(0, 4.0), case(1, 2.0)]
    answers: list[Answer] = [Rating(request_id="r0", value=3.0), Unparsed(request_id="r1", reason="x")]
    result = measured(answers, cases, "rating", fallback=lambda request: 5.0)
    assert result.figures.metrics["RMSE"].value == pytest.approx(np.sqrt((1 + 9) / 2))
    assert result.figures.metrics["MAE"].value == pytest.approx(2.0)
    assert result.figures.parse_rate == 0.5
    with raises(LlmrecError, Facts("missing-value", says="request r1")):
        measured(answers, cases, "rating")


def test_failed_texts_are_empty() -> None:
    pytest.importorskip("rouge_score", reason="the text extra is not installed")
    cases = [case(k, "it is very quiet and cleans well") for k in range(2)]
    answers: list[Answer] = [
        Text(request_id="r0", text="it is very quiet and cleans well"),
        Unparsed(request_id="r1", reason="empty answer", raw=""),
    ]
    result = measured(answers, cases, "explanation")
    assert result.figures.metrics["ROUGE-L"].value == pytest.approx(0.5)
    assert {"ROUGE-1", "ROUGE-2", "Distinct-1"} <= result.figures.metrics.keys()
    assert result.figures.metrics["Distinct-1"].value == 1.0  # seven words, each once
    assert result.figures.metrics["Distinct-2"].low is None
    assert json.loads(result.records[1].parsed) is None


def test_rejects_missing_answers_and_empty_tables() -> None:
    with raises(LlmrecError, Facts("defect", says="'canned'")):
        measured([], [case(0, "a")], "direct")
    with raises(LlmrecError, Facts("empty", says="direct")):
        measured([], [], "direct")


def yes_no(k: int, user: str, truth: float) -> Case:
    return Case(request=Request(id=f"r{k}", user_id=user, item="a"), truth=truth)


def probability(k: int, value: float) -> Answer:
    return Probability(request_id=f"r{k}", value=value)


def test_yes_no_answers() -> None:
    cases = [
        yes_no(k, user, truth) for k, (user, truth) in enumerate([("u", 1), ("u", 0), ("v", 1), ("v", 0), ("w", 1)])
    ]
    answers: list[Answer] = [probability(k, value) for k, value in enumerate((0.9, 0.2, 0.4, 0.4))]
    answers.append(Unparsed(request_id="r4", reason="x"))
    result = measured(answers, cases, "ctr")
    metrics = result.figures.metrics
    # Positives: .9 .4 .5; negatives: .2 .4; only .4 and .4 are tied.
    assert metrics["AUC"].value == pytest.approx(5.5 / 6)
    assert metrics["GAUC"].value == pytest.approx((1 + 0.5) / 2)
    assert metrics["GAUC"].signature.startswith("GAUC|how:users-alike|")
    assert result.figures.users_left_out == 1
    assert result.figures.parse_rate == 0.8
    losses = -np.log([0.9, 0.8, 0.4, 0.6, 0.5])
    assert metrics["LogLoss"].value == pytest.approx(losses.mean())
    assert metrics["ECE"].low is None
    assert result.figures.tie_rate == 2 / 5
    bins = result.figures.reliability
    assert sum(each.n for each in bins) == 5 and Reliability(n=2, said=0.4, so=0.5) in bins
    assert json.loads(result.records[0].parsed) == 0.9
    better = measured(answers, cases, "ctr", fallback=lambda request: 1.0)
    assert better.values["LogLoss"][4] == 0.0


def test_yes_no_answers_of_one_class_have_no_auc() -> None:
    cases = [yes_no(k, "u", 1.0) for k in range(3)]
    result = measured([probability(k, 0.0) for k in range(3)], cases, "ctr")
    assert result.figures.metrics["AUC"].as_json() == {
        "value": None,
        "low": None,
        "high": None,
        "signature": PROTOCOL.sign("AUC"),
        "undefined": "all labels are of the same class",
    }
    assert result.figures.metrics["GAUC"].value is None
    assert result.figures.metrics["GAUC"].undefined == "no user has both positive and negative labels"
    assert "undefined" not in result.figures.metrics["LogLoss"].as_json()
    json.dumps(result.figures.as_json(), allow_nan=False)
    with raises(LlmrecError, Facts("too-few", says="GAUC")):
        compare_values("GAUC", result.values["GAUC"], result.values["GAUC"], ["u"] * 3, resamples=10, seed=0)


@pytest.mark.parametrize("metric", ["AUC", "GAUC"])
def test_areas_of_two_rows_are_compared(metric: str) -> None:
    rng = np.random.default_rng(0)
    users = [f"u{k // 8}" for k in range(800)]
    truth = rng.integers(0, 2, 800)
    cases = [yes_no(k, user, float(t)) for k, (user, t) in enumerate(zip(users, truth, strict=True))]
    rows = [
        measured(
            [probability(k, float(p)) for k, p in enumerate(np.clip(0.5 + edge * (truth - 0.5) + noise, 0, 1))],
            cases,
            "ctr",
        )
        for edge, noise in ((0.5, rng.normal(0, 0.3, 800)), (0.1, rng.normal(0, 0.3, 800)))
    ]
    stored = [np.array(json.loads(json.dumps(list(row.values[metric])))) for row in rows]
    result = compare_values(metric, *stored, users, resamples=300, seed=0)
    value = [row.figures.metrics[metric].value for row in rows]
    assert result.value == pytest.approx(value[0] - value[1])
    assert verdict(result) == "shown"
    assert compare_values(metric, stored[0], stored[0], users, resamples=300, seed=0).value == 0
    flipped = np.copysign(stored[1], -stored[1])
    with raises(LlmrecError, Facts("mismatch", says="AUC")):
        compare_values(metric, stored[0], flipped, users, resamples=10, seed=0)
    # With two seeds, the mean of the metrics is compared, not the metric of the mean answer.
    both = compare_values(metric, np.stack(stored), stored[1], users, resamples=300, seed=0)
    assert both.value == pytest.approx(result.value / 2)


def test_label_of_probability_zero_is_kept() -> None:
    cases = [yes_no(0, "u", 0.0), yes_no(1, "u", 1.0)]
    result = measured([probability(0, 0.0), probability(1, 0.0)], cases, "ctr")
    stored = np.array(json.loads(json.dumps(list(result.values["AUC"]))))
    assert np.signbit(stored).tolist() == [True, False]
    assert result.figures.metrics["AUC"].value == 0.5


def test_interval_of_rare_hits_is_asymmetric() -> None:
    cases = [case(k, "a" if k < 4 else "d") for k in range(100)]
    answers: list[Answer] = [ranking(k, "abcd", [4, 3, 2, 1]) for k in range(100)]
    figure = measured(answers, cases, "direct").figures.metrics["HR@1"]
    assert figure.value == 0.04
    assert (figure.high or 0) - 0.04 > 0.04 - (figure.low or 0) > 0


def test_rmse_is_compared_by_root_means() -> None:
    a, b = np.array([1.0, 9.0, 4.0, 4.0]), np.array([4.0, 16.0, 9.0, 1.0])
    result = compare_values("RMSE", a, b, ["u0", "u1", "u2", "u3"], resamples=200, seed=0)
    assert result.value == pytest.approx(np.sqrt(a.mean()) - np.sqrt(b.mean()))
