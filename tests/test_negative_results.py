"""The page of negative results takes its figures and verdicts from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.benchmarks import negative
from eval.benchmarks.figures.pointers import PointerError

PAIR = {"a": "x", "b": "y", "value": -0.01234, "low": -0.02, "high": 0.0, "metric": "NDCG@10"}


def page(tmp_path: Path, pair: dict[str, Any], **entry: str) -> str:
    (tmp_path / "eval" / "results").mkdir(parents=True)
    (tmp_path / "eval" / "results" / "made.json").write_text(json.dumps({"pairs": [pair]}))
    tested = {"data": "D", "compared": "x − y", "at": "made:pairs[a=x]", **entry}
    (tmp_path / negative.SOURCE).write_text(yaml.safe_dump([{"idea": "I", "tested": [tested]}]))
    return negative.write(tmp_path).splitlines()[-1]


@pytest.mark.parametrize(
    ("changed", "effect", "verdict"),
    [
        ({}, "−.0123 [−.0200, .0000]", "not tested"),
        ({"verdict": "not shown"}, "−.0123 [−.0200, .0000]", "no significant difference"),
        ({"verdict": "contradicted"}, "−.0123 [−.0200, .0000]", "significantly worse"),
        ({"p": 0.01}, "−.0123 [−.0200, .0000]", "significantly worse"),
        ({"p": 0.01, "metric": "RMSE"}, "−.012 [−.020, .000]", "significantly better"),
        ({"p": 0.2, "value": 1.5}, "+1.500 [−.020, .000]", "no significant difference"),
    ],
)
def test_effect_and_verdict_of_a_comparison(tmp_path: Path, changed: dict[str, Any], effect: str, verdict: str) -> None:
    metric = changed.get("metric", "NDCG@10")
    expected = f"| I | D | x − y | {metric} | {effect} | {verdict} | [made](results/made.json) |"
    assert page(tmp_path, {**PAIR, **changed}) == expected


def test_rejects_a_pointer_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(PointerError, match="no entry has a=z"):
        page(tmp_path / "d", PAIR, at="made:pairs[a=z]")


DIALOGUES = [{"dialogues": {"manager": "rules", "users": 400}}, {"dialogues": {"manager": "a/model", "users": 12}}]
ARMS = [{"arm": "tuned", "seeds": 3}, {"arm": "zero-shot", "seeds": 1}, {"arm": "tuned", "seeds": 2}]


@pytest.mark.parametrize(
    ("result", "small"),
    [
        ({"kind": "suite", "protocol": {"users": 943, "seeds": [0, 1, 2]}}, False),
        ({"kind": "suite", "protocol": {"users": 166, "seeds": [0, 1, 2]}}, True),
        ({"kind": "suite", "protocol": {"users": 943, "seeds": [0]}}, True),
        ({"kind": "chat", "protocol": {"seeds": [0, 1, 2]}, "rows": DIALOGUES}, True),
        ({"kind": "benchmark", "tables": [{"users": 400}], "rows": ARMS}, True),
        ({"headline": {}, "rows": [{"arm": "baseline", "n": 300}]}, False),
        ({"headline": {}, "rows": [{"arm": "tuned", "users": 300}]}, True),
        ({"users": 250, "seeds": [0, 1, 2]}, False),
        ({"users": 250, "hours": 1.0}, True),
        ({"rows": [], "seconds": 3.0}, False),
    ],
)
def test_few_users_or_seeds_are_exploratory(tmp_path: Path, result: dict[str, Any], small: bool) -> None:
    (tmp_path / "some.json").write_text(json.dumps(result), encoding="utf-8")
    assert negative.exploratory(tmp_path) == ({"some"} if small else set())
