"""Vectors of texts: an encoder whose last blocks are trained, and the cache of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmrec.errors import ModelError
from llmrec.models import text_encoder
from llmrec.models.text_encoder import TunedEncoder, encode_texts
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

torch = pytest.importorskip("torch")
from transformers import BertModel  # noqa: E402

TEXTS = ["a long garden hose", "toy", "the wooden toy train with rails", "a knife", "knife"]


@pytest.mark.parametrize(("kind", "blocks"), [("Bert", 1), ("MPNet", 2), ("Llama", 1)])
def test_untrained_vectors_equal_those_of_the_encoder(kind: str, blocks: int) -> None:
    folder = tiny_encoder(kind)
    expected, encoder = encode_texts(folder, TEXTS), TunedEncoder(folder, TEXTS, blocks=blocks)
    # The states below the trained blocks are kept in half precision.
    assert np.abs(encoder.every().numpy() - expected).max() < 0.02
    assert np.abs(encoder([2, 0]).detach().numpy() - expected[[2, 0]]).max() < 0.02


def test_training_changes_vectors_through_last_blocks_only() -> None:
    encoder = TunedEncoder(tiny_encoder(), TEXTS, blocks=1)
    before = encoder.every()
    towards = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
    optimiser = torch.optim.Adam(encoder.blocks.parameters(), lr=1e-3)
    for _ in range(5):
        optimiser.zero_grad()
        (-encoder([0, 4]) @ towards).sum().backward()
        assert all(parameter.grad is not None for parameter in encoder.blocks.parameters())
        optimiser.step()
    after = encoder.every()
    assert ((after - before)[[0, 4]] @ towards > 0.01).all()
    # The encoder on disk is unchanged.
    assert torch.equal(TunedEncoder(tiny_encoder(), TEXTS, blocks=1).every(), before)


def test_vectors_do_not_depend_on_batch() -> None:
    encoder = TunedEncoder(tiny_encoder(), TEXTS, blocks=1)
    with torch.no_grad():
        alone = torch.cat([encoder([row]) for row in range(len(TEXTS))])
        together = encoder([4, 3, 2, 1, 0]).flip(0)
    assert torch.allclose(alone, together, atol=0.02)


@pytest.mark.parametrize("native", [True, False], ids=["Ampere", "Turing"])
def test_gpu_training_uses_native_bfloat16(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    casts: list[tuple[str, object, bool]] = []

    def autocast(device: str, dtype: object, enabled: bool) -> AbstractContextManager[None]:
        casts.append((device, dtype, enabled))
        return nullcontext()

    move = torch.Tensor.to

    def stay(tensor: torch.Tensor, *args: object, device: object = None, **kwargs: object) -> torch.Tensor:
        return move(tensor, *[value for value in args if not isinstance(value, torch.device)], **kwargs)

    encoder = TunedEncoder(tiny_encoder(), TEXTS, blocks=1)
    monkeypatch.setattr(BertModel, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(text_encoder, "gpu_has_bf16", lambda: native)
    monkeypatch.setattr(torch, "autocast", autocast)
    encoder([0, 4])
    assert casts == [("cuda", torch.bfloat16, native)]


def test_rejects_more_blocks_than_the_encoder_has() -> None:
    with raises(ModelError, Facts("bad-value", tiny_encoder(), says="has only 2 blocks")):
        TunedEncoder(tiny_encoder(), TEXTS, blocks=3)


def test_vectors_of_a_set_of_texts_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    calls: list[list[str]] = []
    loads: list[str] = []

    def lengths(texts: Sequence[str]) -> np.ndarray:
        calls.append(list(texts))
        return np.array([[len(text)] for text in texts], dtype=np.float32)

    def load(folder: str) -> Any:
        loads.append(folder)
        return SimpleNamespace(vectors=lengths)

    monkeypatch.setattr(text_encoder, "load_text_encoder", load)
    embed = text_encoder.Embedder("folder", "stamp")
    assert embed(["bb", "a", "bb"]).tolist() == [[2.0], [1.0], [2.0]]
    assert embed(["a", "bb"]).tolist() == [[1.0], [2.0]]
    assert calls == [["a", "bb"]]
    assert embed(["ccc"]).tolist() == [[3.0]] and loads == ["folder"]
