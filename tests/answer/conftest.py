from __future__ import annotations

import pytest

from llmrec.pipeline import engines


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of these tests are small; collecting garbage after each would take longer than ranking."""
    monkeypatch.setattr(engines, "release_memory", lambda: None)
