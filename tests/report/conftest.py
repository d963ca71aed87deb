"""A seeded run folder with four tasks, and texts that try to break out of the report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.report.made import hostile_results, made_results, save_run, templated
from tests.report.payloads import SCRIPTS

_MADE = made_results()
_TEMPLATED = templated()


@pytest.fixture
def results() -> dict[str, Any]:
    """The content of results.json, free to be changed by a test."""
    return copy.deepcopy(_MADE)


@pytest.fixture
def several() -> dict[str, Any]:
    """The content of a results.json whose tasks were measured with one template and with several."""
    return copy.deepcopy(_TEMPLATED)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run without its report."""
    return save_run(tmp_path / "run", _MADE)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes changed results to a run folder of their own."""
    return lambda content: save_run(tmp_path / "changed", content)


@pytest.fixture
def payloads() -> list[str]:
    """A hundred and twenty texts that try to run a script."""
    return list(SCRIPTS)


@pytest.fixture
def hostile() -> Callable[[dict[str, Any], Sequence[str]], dict[str, Any]]:
    """Puts texts wherever a run can carry text that others wrote."""
    return hostile_results
