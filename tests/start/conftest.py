"""What tests of `llmrec init` share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import shop


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the shop's tables."""
    shop.write_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
