from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.metrics.signature import Signature, parse_signature, signature
from llmrec.registry import find_metric, metric_direction

RANKED = "NDCG@10|gain:binary|ties:expected|cand:uniform-20|seen:excluded|split:leave_one_out|llmrec:0.1.0"


def _sign(metric: str, **changes: str) -> str:
    parts = {"candidates": "uniform-20", "seen": "excluded", "split": "leave_one_out", "version": "0.1.0"}
    return signature(metric, **(parts | changes))


def test_order_of_parts() -> None:
    assert _sign("NDCG@10") == RANKED
    assert _sign("RMSE") == "RMSE|split:leave_one_out|llmrec:0.1.0"
    assert _sign("BLEU-4") == "BLEU-4|text:sacrebleu-13a-exp|split:leave_one_out|llmrec:0.1.0"
    assert _sign("ROUGE-L") == "ROUGE-L|text:rouge-score-nostem|split:leave_one_out|llmrec:0.1.0"
    assert _sign("Distinct-2") == "Distinct-2|text:words-lower|split:leave_one_out|llmrec:0.1.0"
    assert _sign("ILD@10", how="jaccard-genres") == (
        "ILD@10|ties:seeded|cand:uniform-20|seen:excluded|how:jaccard-genres|split:leave_one_out|llmrec:0.1.0"
    )
    assert _sign("ECE", how="mass-10") == "ECE|how:mass-10|split:leave_one_out|llmrec:0.1.0"
    assert signature(
        "NDCG@10", candidates="full", seen="included", users="22363", slice="item:cold-below-5", split="x", version="1"
    ) == (
        "NDCG@10|gain:binary|ties:expected|cand:full|seen:included|users:22363|slice:item:cold-below-5|split:x|llmrec:1"
    )


def test_parses_every_part() -> None:
    assert parse_signature(RANKED) == Signature(
        metric="NDCG@10",
        gain="binary",
        ties="expected",
        candidates="uniform-20",
        seen="excluded",
        split="leave_one_out",
        version="0.1.0",
    )


_METRIC = st.sampled_from(["HR@1", "MRR", "MAP@10", "RankAUC", "Coverage@10", "ILD@10", "RMSE", "ECE", "ROUGE-L"])
_WORD = st.text(alphabet="abcXYZ019._-:", min_size=1, max_size=12)


_PARTS = st.fixed_dictionaries(
    {"candidates": _WORD, "seen": _WORD, "split": _WORD, "version": _WORD},
    optional={"users": _WORD, "slice": _WORD, "how": _WORD, "gain": _WORD},
)


@given(metric=_METRIC, parts=_PARTS)
def test_round_trip(metric: str, parts: dict[str, str]) -> None:
    text = signature(metric, **parts)
    assert str(parse_signature(text)) == text


@given(text=st.one_of(st.text(max_size=60), st.lists(st.sampled_from(RANKED.split("|")), max_size=9).map("|".join)))
def test_parses_or_rejects_any_text(text: str) -> None:
    try:
        result = parse_signature(text)
    except ValueError as error:
        assert "not a metric signature" in str(error)
        return
    assert str(result) == text


def test_kinds_and_directions() -> None:
    entries = [find_metric(name) for name in ("MAP@5", "ILD@10", "MAE", "GAUC", "ROUGE-2", "FMR")]
    assert [entry and entry.kind for entry in entries] == ["ranking", "lists", "rating", "probability", "text", "text"]
    assert find_metric("AUC@5") is None and find_metric("") is None
    lower = {"RMSE", "MAE", "LogLoss", "ECE", "Gini@10", "PopularityLift@5", "DIV", "Hallucination", "CopyRate"}
    names = [*lower, "AUC", "NDCG@10", "Coverage@10", "Gini", "ROUGE-L", "FMR", "FCR", "USR"]
    assert {name for name in names if metric_direction(name) == "lower"} == lower


@pytest.mark.parametrize("metric", ["NDCG", "NDCG@0", "ndcg@10", "AUC@1", ""])
def test_rejects_unknown_metrics(metric: str) -> None:
    with pytest.raises(ValueError, match="unknown metric"):
        _sign(metric)


def test_ranking_metrics_require_candidates() -> None:
    with pytest.raises(ValueError, match="candidates and seen"):
        signature("HR@5", split="leave_one_out", version="0.1.0")
    with pytest.raises(ValueError, match="one word"):
        _sign("HR@5", seen="a|b")


@pytest.mark.parametrize(
    "text",
    [
        *("", "NDCG@10", "NDCG@10|split:x", "RMSE|llmrec:1|split:x", "RMSE|split:|llmrec:1"),
        *(f"{RANKED}|llmrec:2", "a|b:c|split:x|llmrec:1"),
    ],
)
def test_rejects_other_texts(text: str) -> None:
    with pytest.raises(ValueError, match="not a metric signature"):
        parse_signature(text)
