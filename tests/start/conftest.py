"""Fixtures of the tests of `llmrec init`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import shop


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that contains only the shop's tables."""
    shop.write_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
