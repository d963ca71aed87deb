from __future__ import annotations

from pathlib import Path

import pytest

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.models.load import load_model, load_tokenizer
from llmrec.pipeline import bundle, engines
from tests.answer.rank_cases import make_run
from tests.conftest import section


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of these tests are small; collecting garbage after each would take longer than ranking."""
    monkeypatch.setattr(engines, "release_memory", lambda: None)


@pytest.fixture(scope="module")
def tools(llama_folder: Path) -> tuple[bundle.Bundle, HFBackend, Encoder]:
    opened = bundle.read(str(llama_folder), section(llama_folder))
    encoder = Encoder(load_tokenizer(opened.folder, opened.model), max_length=opened.model.max_length)
    return opened, HFBackend(load_model(opened.folder, opened.model), encoder), encoder


@pytest.fixture(scope="session")
def tuned(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run; do not write to it."""
    return make_run(llama_folder, tmp_path_factory.mktemp("tuned"))
