from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.metrics.signature import Signature, kind_of, parse_signature, same_protocol, signature
from llmrec.results import better

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
        *("HR@1", "Recall@20", "Precision@5", "NDCG@10", "MRR", "MRR@10", "MAP", "MAP@10"),
        *("Coverage@10", "Novelty@10", "Gini@10", "PopularityLift@10", "ILD@10", "Serendipity@10"),
        *("RMSE", "MAE", "AUC", "GAUC", "LogLoss", "ECE"),
        *("BLEU-4", "ROUGE-1", "ROUGE-2", "ROUGE-L", "Distinct-1", "Distinct-2"),
    ]
)
_WORD = st.text(alphabet="abcXYZ019._-:", min_size=1, max_size=12)


_PARTS = st.fixed_dictionaries(
    {"candidates": _WORD, "seen": _WORD, "split": _WORD, "version": _WORD},
    optional={"users": _WORD, "slice": _WORD, "how": _WORD, "gain": _WORD, "ties": _WORD},
)


@given(metric=_METRIC, parts=_PARTS)
def test_signatures_survive_a_round_trip(metric: str, parts: dict[str, str]) -> None:
    text = signature(metric, **parts)
    assert str(parse_signature(text)) == text
    assert same_protocol(text, text)


@given(metric=_METRIC, other=_METRIC, parts=_PARTS, more=_PARTS)
def test_figures_that_differ_in_anything_never_share_a_table(
    metric: str, other: str, parts: dict[str, str], more: dict[str, str]
) -> None:
    one, two = signature(metric, **parts), signature(metric, **more)
    assert same_protocol(one, two) == (one == two)
    for third in (signature(other, **parts), signature(other, **more)):
        assert same_protocol(one, third) == same_protocol(third, one)
    # Whatever bears on every metric must agree between any two.
    if any(parts.get(key) != more.get(key) for key in ("users", "slice", "split", "version")):
        assert not same_protocol(one, signature(other, **more))


@given(text=st.one_of(st.text(max_size=60), st.lists(st.sampled_from(RANKED.split("|")), max_size=9).map("|".join)))
def test_reading_is_total(text: str) -> None:
    try:
        found = parse_signature(text)
    except ValueError:
        with pytest.raises(ValueError, match="not a metric signature"):
            same_protocol(text, RANKED)
    else:
        assert str(found) == text
        assert same_protocol(text, text)
        assert same_protocol(text, RANKED) == same_protocol(RANKED, text)


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
    assert [kind_of(name) for name in ("MAP@5", "ILD@10", "MAE", "GAUC", "ROUGE-2", "AUC@5", "")] == [
        *("ranking", "lists", "rating", "probability", "text"),
        *(None, None),
    ]
    lower = {"RMSE", "MAE", "LogLoss", "ECE", "Gini@10", "PopularityLift@5"}
    names = [*lower, "AUC", "NDCG@10", "Coverage@10", "Gini", "ROUGE-L"]
    assert {name for name in names if better(name) == "lower"} == lower


def test_metrics_of_one_protocol_share_a_table() -> None:
    assert same_protocol(RANKED, _sign("HR@1"))
    assert same_protocol(RANKED, _sign("Coverage@10"))
    assert same_protocol(_sign("AUC"), _sign("ECE", how="mass-10"))
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
        {"users": "1000"},
        {"slice": "item:cold-below-5"},
    ],
)
def test_any_change_of_protocol_is_seen(change: dict[str, str]) -> None:
    assert not same_protocol(RANKED, _sign("NDCG@10", **change))
    assert not same_protocol(RANKED, _sign("HR@1", **change))


def test_different_kinds_of_metric_share_no_table() -> None:
    assert not same_protocol(RANKED, _sign("RMSE"))
    assert not same_protocol(_sign("RMSE"), _sign("BLEU-4"))
    assert not same_protocol(_sign("RMSE"), _sign("LogLoss"))
    assert not same_protocol(RANKED, _sign("Coverage@10", seen="included"))
    assert not same_protocol(_sign("ILD@10", how="jaccard-genres"), _sign("ILD@10", how="cosine"))
    assert not same_protocol(_sign("BLEU-4"), _sign("BLEU-4").replace("13a", "intl"))


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
