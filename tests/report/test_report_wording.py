"""What the summary says, and that it says it plainly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.report.escape import visible
from llmrec.report.results import results_of
from llmrec.report.summary import summary
from llmrec.report.wording import (
    difference,
    duration,
    facing,
    number,
    outcome,
    p_value,
    share,
    tuning_sentence,
    verdict,
    winner_sentence,
)
from llmrec.results import Comparison, Results
from llmrec.tasks.family import families
from tests.report.made import turn


def _said(results: Results, task: str) -> str:
    found = verdict(results, task)
    return f"{winner_sentence(found)} {tuning_sentence(found, results.rows)}"


def test_a_baseline_that_wins_is_named_as_one(results: dict[str, Any]) -> None:
    found = results_of(results)
    assert _said(found, "sequential") == (
        "The best model is a baseline, markov-1, with NDCG@10 0.560 [0.521, 0.603]. The best "
        "language model, fine-tuned · likelihood · continue-list, has 0.500. Difference: NDCG@10 +0.060 "
        "[+0.035, +0.085], significantly better. Fine-tuning is significantly better than zero-shot: NDCG@10 +0.190 "
        "[+0.165, +0.215]."
    )
    assert "The best model is a baseline, user-item-bias" in _said(found, "rating")
    assert "A baseline is better than every language model in 2 of 4 tasks" in summary(found)
    assert "trivial" not in summary(found)


def test_a_model_that_wins_is_set_against_the_best_baseline(results: dict[str, Any]) -> None:
    said = _said(results_of(results), "direct")
    assert said.startswith(
        "The best model is a language model, fine-tuned · label · pick-one, with NDCG@10 0.520 [0.484, 0.560]."
    )
    assert "item-knn, has 0.470. Difference: NDCG@10 +0.050 [+0.024, +0.076], significantly better." in said


@pytest.mark.parametrize(
    ("outcome", "start", "tally"),
    [
        ("shown", "Fine-tuning is significantly better than", "4 tasks: significantly better in"),
        ("not shown", "There is no significant difference", "no significant difference in Pick from candidates"),
        ("contradicted", "Fine-tuning is significantly worse than", "significantly worse in Pick from candidates"),
        (None, "Fine-tuned − zero-shot, exploratory", "3 tasks: significantly better in"),
    ],
)
def test_each_verdict_has_its_own_words(results: dict[str, Any], outcome: str | None, start: str, tally: str) -> None:
    entry = next(entry for entry in results["comparisons"] if entry["task"] == "direct" and "zero-shot" in entry["b"])
    entry["verdict"] = outcome
    found = results_of(results)
    assert tuning_sentence(verdict(found, "direct"), found.rows).startswith(start)
    assert tally in summary(found)


def test_a_turned_comparison_reads_the_same(results: dict[str, Any]) -> None:
    before = _said(results_of(results), "rating")
    turn(results)
    assert _said(results_of(results), "rating") == before


@given(st.floats(-5, 5), st.floats(0, 2), st.sampled_from(["shown", "not shown", "contradicted"]))
def test_facing_twice_is_the_identity(value: float, half: float, outcome: str) -> None:
    entry = Comparison(
        task="t", metric="m", a="a", b="b", value=value, low=value - half, high=value + half, p=0.5, verdict=outcome
    )
    turned = facing(entry, "b")
    assert (turned.a, turned.b) == ("b", "a") and turned.low is not None and turned.high is not None
    assert turned.low <= turned.high
    assert facing(turned, "a") == entry
    assert facing(entry, "a") == entry


def test_what_the_model_adds_is_said(results: dict[str, Any]) -> None:
    missing = "The contribution of the fine-tuned model to an ensemble of baselines was not measured"
    assert missing in summary(results_of(results))
    own = [row for row in results["rows"] if row["task"] == "sequential"]
    control = next(row for row in own if row["arm"] == "baseline")
    tuned = next(row for row in own if row["arm"] == "tuned")
    weights = {"form": "logit", "parts": [{"name": "markov-1", "weight": 1.0}]}
    for row, name, level in (
        (control, "sequential/baseline/fusion", 0.57),
        (control, "sequential/baseline/fusion with texts", 0.6),
        (tuned, "sequential/tuned/fusion with models", 0.62),
    ):
        made = copy.deepcopy(row) | {"id": name, "predictor": name.rpartition("/")[2], "fusion": weights}
        made["metrics"]["NDCG@10"]["value"] = level
        results["rows"].append(made)
    numbers = {"value": -0.02, "low": -0.03, "high": -0.01, "p": 0.01, "p_raw": 0.01, "verdict": "contradicted"}
    for place, rival in enumerate(("fusion", "fusion with texts")):
        entry = {"task": "sequential", "metric": "NDCG@10", "a": f"sequential/baseline/{rival}"}
        more = {"b": "sequential/tuned/fusion with models", "detectable": None, "level": 0.95}
        results["comparisons"].append({**entry, **more, **numbers, "value": -0.02 - 0.03 * (1 - place)})
    # Of the fusions without the model the stronger one counts, whichever way the comparison was written.
    assert (
        "Adding the fine-tuned model to the ensemble of the baselines: NDCG@10 +0.020 [+0.010, "
        "+0.030] in Next item from history, significantly better. "
    ) in summary(results_of(results))


def test_nothing_tuned_is_said(results: dict[str, Any]) -> None:
    results["rows"] = [row for row in results["rows"] if row["arm"] != "tuned"]
    results.update(comparisons=[], training=None)
    found = results_of(results)
    assert tuning_sentence(verdict(found, "rating"), found.rows) == "This run has no fine-tuned model."
    assert "was not fine-tuned" in summary(
        found
    ) and "No comparison of fine-tuned and zero-shot was planned" in summary(found)


def test_what_was_not_planned_makes_no_sentence(results: dict[str, Any]) -> None:
    """A better tuned row that nobody planned to test does not take the planned one's part."""
    before = _said(results_of(results), "direct")
    rows = {row["arm"]: row for row in results["rows"] if row["task"] == "direct"}
    unseen = next(row for row in results["rows"] if row["task"] == "direct" and "unseen" in row["id"])
    entry = next(entry for entry in results["comparisons"] if entry["task"] == "direct")
    kept = {key: value for key, value in entry.items() if key not in ("p", "p_raw", "verdict", "level")}
    results["comparisons"].insert(0, {**kept, "a": unseen["id"], "b": rows["zero-shot"]["id"], "value": 0.4})
    assert _said(results_of(results), "direct") == before


def test_a_verdict_has_one_wording_everywhere() -> None:
    assert [outcome(word) for word in ("shown", "contradicted", "not shown", None)] == [
        "significantly better", "significantly worse", "no significant difference", "exploratory",
    ]  # fmt: skip


def test_an_end_that_is_not_0_is_not_printed_as_0() -> None:
    assert number(0.0002, sign=True) == "+0.0002" and number(-0.0002, sign=True) == "−0.0002"
    assert number(0.0, sign=True) == "+0.000"
    assert difference(0.01, 0.00003, 0.02, 3) == "+0.010 [+3e-05, +0.020]"
    assert difference(0.01, 0.0, 0.02, 4) == "+0.0100 [+0.0000, +0.0200]" and difference(0.1, None, 0.2) == "–"


def test_every_family_has_a_title(results: dict[str, Any]) -> None:
    titles = [family.title for family in families().values()]
    assert len(set(titles)) == len(titles) and set(families()) > set(results["headline"])


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.12345), "0.123"),
        (number(-0.5, sign=True), "−0.500"),
        (number(0.5, sign=True), "+0.500"),
        (number(23.456), "23.5"),
        (number(None), "–"),
        (share(1.0), "100 %"),
        (share(0.99999), "> 99.9 %"),
        (share(0.00001), "< 0.1 %"),
        (share(0.0), "0 %"),
        (share(0.125), "12.5 %"),
        (p_value(0.0004), "< 0.001"),
        (p_value(0.0456), "0.046"),
        (duration(0.25), "0.25 s"),
        (duration(59.0), "59 s"),
        (duration(361), "6 min 1 s"),
        (duration(7260), "2 h 1 min"),
    ],
)
def test_numbers_in_words(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.text(alphabet=st.characters(codec=None)))
def test_visible_leaves_nothing_hidden(text: str) -> None:
    shown = visible(text)
    assert visible(shown) == shown
    assert all(
        character in "\t\n" or (ord(character) >= 32 and ord(character) not in range(127, 160)) for character in shown
    )
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    shown.encode()
