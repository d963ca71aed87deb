"""Sentences of the summary, and numbers in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.display import escape_hidden
from llmrec.report.results import parse_results
from llmrec.report.summary import summary_paragraph
from llmrec.report.wording import (
    difference,
    format_duration,
    format_number,
    format_p_value,
    format_percentage,
    orient_comparison,
    tuning_sentence,
    verdict,
    winner_sentence,
)
from llmrec.results import Comparison, Results


def _sentences(results: Results, task: str) -> str:
    result = verdict(results, task)
    return f"{winner_sentence(result)} {tuning_sentence(result, results.rows)}"


def test_best_model_is_a_baseline(results: dict[str, Any]) -> None:
    result = parse_results(results)
    assert _sentences(result, "sequential") == (
        "The best model is a baseline, markov-1, with NDCG@10 0.560 [0.521, 0.603]. The best "
        "language model, fine-tuned · likelihood · continue-list, has 0.500. Difference: NDCG@10 +0.060 "
        "[+0.035, +0.085], significantly better. Fine-tuning is significantly better than zero-shot: NDCG@10 +0.190 "
        "[+0.165, +0.215]."
    )
    assert "The best model is a baseline, user-item-bias" in _sentences(result, "rating")
    assert "A baseline is better than every language model in 2 of 4 tasks" in summary_paragraph(result)


def test_best_model_is_a_language_model(results: dict[str, Any]) -> None:
    text = _sentences(parse_results(results), "direct")
    assert text.startswith(
        "The best model is a language model, fine-tuned · label · pick-one, with NDCG@10 0.520 [0.484, 0.560]."
    )
    assert "item-knn, has 0.470. Difference: NDCG@10 +0.050 [+0.024, +0.076], significantly better." in text


@pytest.mark.parametrize(
    ("outcome", "start", "tally"),
    [
        ("shown", "Fine-tuning is significantly better than", "4 tasks: significantly better in"),
        ("not shown", "There is no significant difference", "no significant difference in Pick from candidates"),
        ("contradicted", "Fine-tuning is significantly worse than", "significantly worse in Pick from candidates"),
        (None, "Fine-tuned − zero-shot, exploratory", "3 tasks: significantly better in"),
    ],
)
def test_sentences_of_verdicts(results: dict[str, Any], outcome: str | None, start: str, tally: str) -> None:
    entry = next(entry for entry in results["comparisons"] if entry["task"] == "direct" and "zero-shot" in entry["b"])
    entry["verdict"] = outcome
    result = parse_results(results)
    assert tuning_sentence(verdict(result, "direct"), result.rows).startswith(start)
    assert tally in summary_paragraph(result)


@pytest.mark.parametrize("outcome", ["shown", "not shown", "contradicted"])
def test_facing_reverses_a_comparison(outcome: str) -> None:
    entry = Comparison(task="t", metric="m", a="a", b="b", value=0.3, low=-0.2, high=0.9, p=0.5, verdict=outcome)
    swapped = orient_comparison(entry, "b")
    assert (swapped.a, swapped.b, swapped.value, swapped.low, swapped.high) == ("b", "a", -0.3, -0.9, 0.2)
    assert orient_comparison(swapped, "a") == orient_comparison(entry, "a") == entry


def test_contribution_of_the_model_to_an_ensemble(results: dict[str, Any]) -> None:
    missing = "The contribution of the fine-tuned model to an ensemble of baselines was not measured"
    assert missing in summary_paragraph(parse_results(results))
    rows = [row for row in results["rows"] if row["task"] == "sequential"]
    control = next(row for row in rows if row["arm"] == "baseline")
    tuned = next(row for row in rows if row["arm"] == "tuned")
    weights = {"form": "logit", "parts": [{"name": "markov-1", "weight": 1.0}]}
    for row, name, level in (
        (control, "sequential/baseline/fusion", 0.57),
        (control, "sequential/baseline/fusion with texts", 0.6),
        (tuned, "sequential/tuned/fusion with models", 0.62),
    ):
        joined = copy.deepcopy(row) | {"id": name, "predictor": name.rpartition("/")[2], "fusion": weights}
        joined["metrics"]["NDCG@10"]["value"] = level
        results["rows"].append(joined)
    numbers = {"low": -0.03, "high": -0.01, "p": 0.01, "p_raw": 0.01, "verdict": "contradicted"}
    for rival, value in (("fusion", -0.05), ("fusion with texts", -0.02)):
        entry = {"task": "sequential", "metric": "NDCG@10", "a": f"sequential/baseline/{rival}"}
        more = {"b": "sequential/tuned/fusion with models", "detectable": None, "level": 0.95}
        results["comparisons"].append({**entry, **more, **numbers, "value": value})
    # The stronger of the ensembles without the model is used, in either order of the comparison.
    assert (
        "Adding the fine-tuned model to the ensemble of the baselines: NDCG@10 +0.020 [+0.010, "
        "+0.030] in Next item from history, significantly better. "
    ) in summary_paragraph(parse_results(results))


def test_run_without_a_tuned_model(results: dict[str, Any]) -> None:
    results["rows"] = [row for row in results["rows"] if row["arm"] != "tuned"]
    results.update(comparisons=[], training=None)
    result = parse_results(results)
    assert tuning_sentence(verdict(result, "rating"), result.rows) == "This run has no fine-tuned model."
    text = summary_paragraph(result)
    assert "was not fine-tuned" in text and "No comparison of fine-tuned and zero-shot was planned" in text


def test_sentences_use_planned_comparisons(results: dict[str, Any]) -> None:
    before = _sentences(parse_results(results), "direct")
    rows = {row["arm"]: row for row in results["rows"] if row["task"] == "direct"}
    unseen = next(row for row in results["rows"] if row["task"] == "direct" and "unseen" in row["id"])
    entry = next(entry for entry in results["comparisons"] if entry["task"] == "direct")
    kept = {key: value for key, value in entry.items() if key not in ("p", "p_raw", "verdict", "level")}
    results["comparisons"].insert(0, {**kept, "a": unseen["id"], "b": rows["zero-shot"]["id"], "value": 0.4})
    assert _sentences(parse_results(results), "direct") == before


def test_small_bounds_are_not_printed_as_0() -> None:
    assert format_number(0.0002, sign=True) == "+0.0002" and format_number(-0.0002, sign=True) == "−0.0002"
    assert format_number(0.0, sign=True) == "+0.000"
    assert difference(0.01, 0.00003, 0.02, 3) == "+0.010 [+3e-05, +0.020]"
    assert difference(0.01, 0.0, 0.02, 4) == "+0.0100 [+0.0000, +0.0200]" and difference(0.1, None, 0.2) == "–"


# --------------------------------------------------------------------------- numbers


def test_numbers_in_words() -> None:
    assert [format_number(value) for value in (0.12345, 23.456, None)] == ["0.123", "23.5", "–"]
    assert format_number(-0.5, sign=True) == "−0.500"
    shares = (1.0, 0.99999, 0.00001, 0.0, 0.125)
    assert [format_percentage(value) for value in shares] == ["100 %", "> 99.9 %", "< 0.1 %", "0 %", "12.5 %"]
    assert [format_p_value(value) for value in (0.0004, 0.0456)] == ["< 0.001", "0.046"]
    assert [format_duration(seconds) for seconds in (0.25, 59, 361, 7260)] == [
        "0.25 s",
        "59 s",
        "6 min 1 s",
        "2 h 1 min",
    ]


@given(st.text(alphabet=st.characters(codec=None)))
def test_visible_escapes_invisible_characters(text: str) -> None:
    shown = escape_hidden(text)
    assert escape_hidden(shown) == shown
    assert all(
        character in "\t\n" or (ord(character) >= 32 and ord(character) not in range(127, 160)) for character in shown
    )
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    shown.encode()
