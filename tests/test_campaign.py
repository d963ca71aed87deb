"""Malformed inputs are determined by their seed, and the committed campaign has no open defect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.benchmarks.campaign.surfaces import SURFACES, cases
from llmrec.resources import resource

GENERATED = ("recipes", "suites", "templates", "tables", "spreadsheets", "requests", "server answers")


@pytest.mark.parametrize("name", GENERATED)
def test_inputs_follow_from_the_seed(name: str) -> None:
    first, again, other = (list(cases(name, SURFACES[name], Path(), seed, 30)) for seed in (0, 0, 1))
    assert first == again
    assert len({case.fault for case in first}) > 20
    assert first != other


def test_campaign_has_no_open_defects() -> None:
    result = json.loads(resource("eval/results/campaign.json").read_text(encoding="utf-8"))
    runs = [result, *result["further"].values()]
    assert {name for run in runs for name in run["surfaces"]} == set(SURFACES)
    for counts in (counts for run in runs for counts in run["surfaces"].values()):
        assert counts["tried"] >= 40
        assert counts["answered"] + counts["refused"] == counts["tried"]
        assert counts["refused_without_a_place"] == 0
    assert result["all"]["tried"] >= 1500
    assert result["earlier"]["all"]["tracebacks"] >= 50
