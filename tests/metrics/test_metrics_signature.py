from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.metrics.signature import Signature, parse_signature, same_protocol, signature

RANKED = "NDCG@10|gain:binary|ties:expected|cand:uniform-20|seen:excluded|split:leave_one_out|llmrec:0.1.0"


def _sign(metric: str, **changes: str) -> str:
    parts = {"candidates": "uniform-20", "seen": "excluded", "split": "leave_one_out", "version": "0.1.0"}
    return signature(metric, **(parts | changes))


def test_the_order_of_parts_is_fixed() -> None:
    assert _sign("NDCG@10") == RANKED
    assert _sign("RMSE") == "RMSE|split:leave_one_out|llmrec:0.1.0"
    assert _sign("BLEU-4") == "BLEU-4|text:sacrebleu-13a-exp|split:leave_one_out|llmrec:0.1.0"
    assert _sign("ROUGE-L") == "ROUGE-L|text:rouge-score-nostem|split:leave_one_out|llmrec:0.1.0"
    assert _sign("Distinct-2") == "Distinct-2|text:words-lower|split:leave_one_out|llmrec:0.1.0"


def test_parsing_gives_the_parts_back() -> None:
    assert parse_signature(RANKED) == Signature(
        metric="NDCG@10",
        gain="binary",
        ties="expected",
        candidates="uniform-20",
        seen="excluded",
        split="leave_one_out",
        version="0.1.0",
    )


_METRIC = st.sampled_from(
    ["HR@1", "NDCG@10", "MRR", "MRR@10", "RMSE", "MAE", "BLEU-4", "ROUGE-1", "ROUGE-L", "Distinct-2"]
)
_WORD = st.text(alphabet="abcXYZ019._-:", min_size=1, max_size=12)


@given(metric=_METRIC, candidates=_WORD, seen=_WORD, split=_WORD, version=_WORD)
def test_signatures_survive_a_round_trip(metric: str, candidates: str, seen: str, split: str, version: str) -> None:
    text = signature(metric, candidates=candidates, seen=seen, split=split, version=version)
    assert str(parse_signature(text)) == text
    assert same_protocol(text, text)


def test_metrics_of_one_protocol_share_a_table() -> None:
    assert same_protocol(RANKED, _sign("HR@1"))
    assert same_protocol(_sign("RMSE"), _sign("MAE"))
    assert same_protocol(_sign("BLEU-4"), _sign("ROUGE-L"))


@pytest.mark.parametrize(
    "change",
    [
        {"candidates": "full"},
        {"candidates": "uniform-100"},
        {"seen": "included"},
        {"split": "global_time"},
        {"version": "0.2.0"},
        {"ties": "best"},
        {"gain": "rating"},
    ],
)
def test_any_change_of_protocol_is_seen(change: dict[str, str]) -> None:
    assert not same_protocol(RANKED, _sign("NDCG@10", **change))
    assert not same_protocol(RANKED, _sign("HR@1", **change))


def test_different_kinds_of_metric_share_no_table() -> None:
    assert not same_protocol(RANKED, _sign("RMSE"))
    assert not same_protocol(_sign("RMSE"), _sign("BLEU-4"))
    assert not same_protocol(_sign("BLEU-4"), _sign("BLEU-4").replace("13a", "intl"))


@pytest.mark.parametrize("metric", ["NDCG", "NDCG@0", "ndcg@10", "AUC", "BLEU", "ROUGE-X", ""])
def test_unknown_metrics_are_errors(metric: str) -> None:
    with pytest.raises(ValueError, match="unknown metric"):
        _sign(metric)


def test_a_ranking_metric_needs_its_candidates() -> None:
    with pytest.raises(ValueError, match="candidates and seen"):
        signature("HR@5", split="leave_one_out", version="0.1.0")
    with pytest.raises(ValueError, match="one word"):
        _sign("HR@5", seen="a|b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NDCG@10",
        "NDCG@10|split:x",
        "RMSE|llmrec:1|split:x",
        "RMSE|split:|llmrec:1",
        RANKED + "|llmrec:2",
        "a|b:c|split:x|llmrec:1",
    ],
)
def test_other_texts_are_not_signatures(text: str) -> None:
    with pytest.raises(ValueError, match="not a metric signature"):
        parse_signature(text)
