"""An encoder whose last blocks learn makes the vectors of the whole encoder, and changes nothing below."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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


@pytest.mark.parametrize("kind", ["Bert", "MPNet", "Llama"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_before_it_learns_its_vectors_are_those_of_the_encoder(blocks: int, kind: str) -> None:
    folder = tiny_encoder(kind)
    whole, encoder = encode_texts(folder, TEXTS), TunedEncoder(folder, TEXTS, blocks=blocks)
    # States below are kept in half precision.
    assert np.abs(encoder.every().numpy() - whole).max() < 0.02
    assert np.abs(encoder([2, 0]).detach().numpy() - whole[[2, 0]]).max() < 0.02


def test_only_its_last_blocks_have_gradients_and_vectors_follow_them() -> None:
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
    # The encoder on disk is as it was.
    assert torch.equal(TunedEncoder(tiny_encoder(), TEXTS, blocks=1).every(), before)


def test_neither_order_nor_company_of_texts_changes_a_vector() -> None:
    encoder = TunedEncoder(tiny_encoder(), TEXTS, blocks=1)
    with torch.no_grad():
        alone = torch.cat([encoder([row]) for row in range(len(TEXTS))])
        together = encoder([4, 3, 2, 1, 0]).flip(0)
    assert torch.allclose(alone, together, atol=0.02)


@pytest.mark.parametrize("native", [True, False], ids=["Ampere", "Turing"])
def test_on_a_gpu_it_learns_in_bfloat16_where_that_is_native(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_more_blocks_than_there_are_are_refused() -> None:
    with raises(ModelError, Facts("bad-value", tiny_encoder(), says="has only 2 blocks")):
        TunedEncoder(tiny_encoder(), TEXTS, blocks=3)
