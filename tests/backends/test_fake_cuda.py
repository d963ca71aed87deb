"""Inputs of scoring and training are on the device of the model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from fake_cuda import FakeCuda, fake_cuda, on_cuda  # noqa: E402

from llmrec.backends.encode import IGNORED, Encoder, TokenRow  # noqa: E402
from llmrec.backends.hf.backend import HFBackend  # noqa: E402
from llmrec.train.batches import pad_rows  # noqa: E402
from llmrec.train.loss import label_loss, packed_loss  # noqa: E402
from llmrec.train.packing import pack_rows, stack_sequences  # noqa: E402
from tests.conftest import opened  # noqa: E402
from tests.servers.client import question  # noqa: E402

PROMPTS = [question(text) for text in ("Toy Story Heat", "Answer with one number", "Jaws Rocky Alien")]
TITLES = ["Toy Story", "Heat", "Fargo", "Casino", "Alien", "Brazil"]


def test_fake_device_refuses_mixed_devices() -> None:
    with fake_cuda():
        on_cpu, on_gpu = torch.ones(3), torch.ones(3, device="cuda")
        assert str(on_gpu.device) == "cuda:0" and str((on_gpu * 2).device) == "cuda:0"
        assert str(on_cpu.to(on_gpu.device).device) == "cuda:0" and str(on_gpu.cpu().device) == "cpu"
        for mixed in (
            lambda: on_cpu + on_gpu,
            lambda: torch.cat([on_cpu, on_gpu]),
            lambda: on_gpu.numpy(),
            lambda: on_cpu[torch.tensor([0], device="cuda")],
            lambda: torch.nn.functional.linear(on_cpu, on_gpu),
        ):
            with pytest.raises((RuntimeError, TypeError), match=r"cuda:0|same device"):
                mixed()
        assert (on_gpu + torch.tensor(1.0)).tolist() == [2.0] * 3
        assert on_gpu[torch.tensor([0])].item() == 1.0
        on_gpu[0] = 5
        assert on_gpu.cpu().numpy().tolist() == [5.0, 1.0, 1.0]


@pytest.fixture
def loaded(qwen_folder: Path) -> tuple[Any, Encoder]:
    return opened(qwen_folder)


def _answers(model: Any, encoder: Encoder) -> list[Any]:
    backend = HFBackend(model, encoder)
    scores = backend.score(PROMPTS, [TITLES] * 3)
    # More tokens after a prompt than the prefix reader takes at once.
    many = backend.score(PROMPTS[:1], [[f"{one} {other} again and again" for one in TITLES for other in TITLES]])
    labels = backend.score(PROMPTS, [["1", "2", "3", "4"]] * 3, closed=False)
    results = backend.search(PROMPTS, TITLES, k=3, width=4)
    generated = backend.generate(PROMPTS, max_tokens=4)
    numbers = [each.logprobs for each in (*scores, *many, *labels)]
    return [numbers, [each.items for each in results], [each.text for each in generated]]


def test_answers_of_a_model_on_a_gpu(loaded: tuple[Any, Encoder]) -> None:
    model, encoder = loaded
    expected = _answers(model, encoder)
    with fake_cuda():
        answers = _answers(on_cuda(model), encoder)
    assert isinstance(next(model.parameters()), FakeCuda)
    for one, other in zip(expected[0], answers[0], strict=True):
        assert np.allclose(one, other, atol=1e-4)
    assert answers[1:] == expected[1:]


def test_losses_of_a_model_on_a_gpu(loaded: tuple[Any, Encoder]) -> None:
    model, _ = loaded
    rows = [TokenRow((5, 6, 7, *end), (*[IGNORED] * 3, *end)) for end in ((10, 11), (12, 13, 14), (15,))]
    ids, labels = (torch.tensor(each) for each in pad_rows(rows, 0))
    packed = {name: torch.from_numpy(each) for name, each in asdict(stack_sequences([pack_rows(rows)], 0)).items()}
    expected = [
        float(loss(model, *inputs)[0].detach())
        for loss, inputs in ((label_loss, (ids, labels)), (packed_loss, (packed,)))
    ]
    with fake_cuda():
        on_cuda(model)
        total, _ = label_loss(model, on_cuda(ids), on_cuda(labels))
        total.backward()
        packed_on_gpu = {name: on_cuda(each) for name, each in packed.items()}
        losses = [float(each.detach()) for each in (total, packed_loss(model, packed_on_gpu)[0])]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert any(parameter.grad is not None for parameter in model.parameters())
