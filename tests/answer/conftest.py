from __future__ import annotations

from pathlib import Path

import pytest

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.models.load import load_model, load_tokenizer
from llmrec.pipeline import bundle, engines
from tests.conftest import section


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of these tests are small; collecting garbage after each would take longer than ranking."""
    monkeypatch.setattr(engines, "release_memory", lambda: None)


@pytest.fixture(scope="module")
def tools(llama_folder: Path) -> tuple[bundle.Bundle, HFBackend, Encoder]:
    found = bundle.read(str(llama_folder), section(llama_folder))
    encoder = Encoder(load_tokenizer(found.folder, found.model), max_length=found.model.max_length)
    return found, HFBackend(load_model(found.folder, found.model), encoder), encoder
