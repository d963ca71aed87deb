"""What the tests of the data layer share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """`init` times the machine for its estimate, which is seconds a call; tests of the commands do that, not these."""
    monkeypatch.setattr("llmrec.commands.init.measure.seconds_of", lambda study: None)
