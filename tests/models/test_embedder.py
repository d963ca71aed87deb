"""Vectors of texts are remembered, whatever order the texts come in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmrec.models import text_encoder


def test_a_set_of_texts_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    read: list[list[str]] = []

    def lengths(folder: str, texts: Sequence[str]) -> np.ndarray:
        read.append(list(texts))
        return np.array([[len(text)] for text in texts], dtype=np.float32)

    monkeypatch.setattr(text_encoder, "encode_texts", lengths)
    embed = text_encoder.Embedder("folder", "stamp")
    assert embed(["bb", "a", "bb"]).tolist() == [[2.0], [1.0], [2.0]]
    assert embed(["a", "bb"]).tolist() == [[1.0], [2.0]]
    assert read == [["a", "bb"]]
    assert embed(["ccc"]).tolist() == [[3.0]]
