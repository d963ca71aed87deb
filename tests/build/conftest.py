"""What tests of ranking share: an untuned toy model, opened as `llmrec rank` opens one, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrec.backends.encode import Encoder
from llmrec.build import bundle
from llmrec.recipe import ModelSection


@pytest.fixture(scope="module")
def plain(llama_folder: Path) -> bundle.Bundle:
    return bundle.read(str(llama_folder), ModelSection(name=str(llama_folder), dtype="float32"))


@pytest.fixture(scope="module")
def encoder(plain: bundle.Bundle) -> Encoder:
    from llmrec.backends.models import load_tokenizer

    return Encoder(load_tokenizer(plain.folder, plain.model), max_length=plain.model.max_length)
