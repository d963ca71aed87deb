"""Malformed inputs follow from their seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.benchmarks.campaign.surfaces import SURFACES, cases

MADE_FROM_NOTHING = ("recipes", "suites", "templates", "tables", "requests", "server answers")


@pytest.mark.parametrize("name", MADE_FROM_NOTHING)
def test_inputs_follow_from_the_seed(name: str) -> None:
    first, again, other = (list(cases(name, SURFACES[name], Path(), seed, 30)) for seed in (0, 0, 1))
    assert first == again
    assert len({case.fault for case in first}) > 20
    assert first != other
