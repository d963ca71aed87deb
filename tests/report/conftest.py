"""A seeded run with four tasks, its report, and hostile texts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmrec.report.page import write_report
from tests.report.payloads import SCRIPTS
from tests.report.sample_run import hostile_results, sample_results, save_run, templated

_RESULTS = sample_results()
_TEMPLATED = templated()


@pytest.fixture
def results() -> dict[str, Any]:
    """The content of results.json, which a test may change."""
    return copy.deepcopy(_RESULTS)


@pytest.fixture
def several() -> dict[str, Any]:
    """The content of a results.json whose tasks were measured with one template and with several."""
    return copy.deepcopy(_TEMPLATED)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of the run; tests only read it."""
    return write_report(save_run(tmp_path_factory.mktemp("report"), _RESULTS))


@pytest.fixture(scope="session")
def several_pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of the run with several templates; tests only read it."""
    return write_report(save_run(tmp_path_factory.mktemp("several"), _TEMPLATED))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run without its report."""
    return save_run(tmp_path / "run", _RESULTS)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes changed results to a separate run folder."""
    return lambda content: save_run(tmp_path / "changed", content)


@pytest.fixture
def payloads() -> list[str]:
    """120 texts that try to run a script."""
    return list(SCRIPTS)


@pytest.fixture
def hostile() -> Callable[[dict[str, Any], Sequence[str]], dict[str, Any]]:
    """Puts texts into all fields of a run that users or models write."""
    return hostile_results
