from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.metrics.signature import Signature, parse_signature, signature
from llmrec.registry import better, metric_of

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
    [
        *("HR@1", "Recall@20", "Precision@5", "NDCG@10", "MRR", "MRR@10", "MAP", "MAP@10", "RankAUC"),
        *("Coverage@10", "Novelty@10", "Gini@10", "PopularityLift@10", "ILD@10", "Serendipity@10"),
        *("Exposure@10", "ColdItems@10"),
        *("RMSE", "MAE", "AUC", "GAUC", "LogLoss", "ECE"),
        *("BLEU-4", "ROUGE-1", "ROUGE-2", "ROUGE-L", "Distinct-1", "Distinct-2"),
    ]
)
_WORD = st.text(alphabet="abcXYZ019._-:", min_size=1, max_size=12)


_PARTS = st.fixed_dictionaries(
    {"candidates": _WORD, "seen": _WORD, "split": _WORD, "version": _WORD},
    optional={"users": _WORD, "slice": _WORD, "how": _WORD, "gain": _WORD},
)


@given(metric=_METRIC, parts=_PARTS)
def test_signatures_survive_a_round_trip(metric: str, parts: dict[str, str]) -> None:
    text = signature(metric, **parts)
    assert str(parse_signature(text)) == text


@given(text=st.one_of(st.text(max_size=60), st.lists(st.sampled_from(RANKED.split("|")), max_size=9).map("|".join)))
def test_reading_is_total(text: str) -> None:
    try:
        found = parse_signature(text)
    except ValueError as error:
        assert "not a metric signature" in str(error)
        return
    assert str(found) == text


def test_the_new_parts_stand_in_their_places() -> None:
    found = signature(
        "NDCG@10", candidates="full", seen="included", users="22363", slice="item:cold-below-5", split="x", version="1"
    )
    assert found == (
        "NDCG@10|gain:binary|ties:expected|cand:full|seen:included|users:22363|slice:item:cold-below-5|split:x|llmrec:1"
    )
    assert parse_signature(found).slice == "item:cold-below-5"
    assert _sign("ILD@10", how="jaccard-genres") == (
        "ILD@10|ties:seeded|cand:uniform-20|seen:excluded|how:jaccard-genres|split:leave_one_out|llmrec:0.1.0"
    )
    assert _sign("ECE", how="mass-10") == "ECE|how:mass-10|split:leave_one_out|llmrec:0.1.0"


def test_kinds_and_directions() -> None:
    found = [metric_of(name) for name in ("MAP@5", "ILD@10", "MAE", "GAUC", "ROUGE-2")]
    assert [entry and entry.kind for entry in found] == ["ranking", "lists", "rating", "probability", "text"]
    assert metric_of("AUC@5") is None and metric_of("") is None
    lower = {"RMSE", "MAE", "LogLoss", "ECE", "Gini@10", "PopularityLift@5"}
    names = [*lower, "AUC", "NDCG@10", "Coverage@10", "Gini", "ROUGE-L"]
    assert {name for name in names if better(name) == "lower"} == lower


@pytest.mark.parametrize("metric", ["NDCG", "NDCG@0", "ndcg@10", "AUC@1", "Gini", "BLEU", "ROUGE-X", ""])
def test_unknown_metrics_are_errors(metric: str) -> None:
    with pytest.raises(ValueError, match="unknown metric"):
        _sign(metric)


def test_a_ranking_metric_needs_its_candidates() -> None:
    with pytest.raises(ValueError, match="candidates and seen"):
        signature("HR@5", split="leave_one_out", version="0.1.0")
    with pytest.raises(ValueError, match="candidates and seen"):
        signature("Gini@5", split="leave_one_out", version="0.1.0")
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
