"""Nothing that a model is asked or trained with lies on another device than the model."""

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
from llmrec.models.load import load_model, load_tokenizer  # noqa: E402
from llmrec.recipe.schema import ModelSection  # noqa: E402
from llmrec.train.batches import padded  # noqa: E402
from llmrec.train.loss import label_loss, packed_loss  # noqa: E402
from llmrec.train.packing import stack, tree  # noqa: E402
from llmrec.types import Message, Prompt, Segment  # noqa: E402

PROMPTS = [
    Prompt(messages=(Message("user", (Segment("text", text),)),))
    for text in ("Toy Story Heat", "Answer with one number", "Jaws Rocky Alien")
]
TITLES = ["Toy Story", "Heat", "Fargo", "Casino", "Alien", "Brazil"]


def test_devices_that_meet_are_refused() -> None:
    with fake_cuda():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert str(there.device) == "cuda:0" and str((there * 2).device) == "cuda:0"
        assert str(here.to(there.device).device) == "cuda:0" and str(there.cpu().device) == "cpu"
        for wrong in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: there.numpy(),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: torch.nn.functional.linear(here, there),
        ):
            with pytest.raises((RuntimeError, TypeError), match=r"cuda:0|same device"):
                wrong()
        assert (there + torch.tensor(1.0)).tolist() == [2.0] * 3
        assert there[torch.tensor([0])].item() == 1.0
        there[0] = 5
        assert there.cpu().numpy().tolist() == [5.0, 1.0, 1.0]


@pytest.fixture(params=["llama_folder", "qwen_folder"])
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Encoder]:
    folder: Path = request.getfixturevalue(request.param)
    section = ModelSection(name=str(folder), dtype="float32")
    return load_model(str(folder), section), Encoder(load_tokenizer(str(folder), section), max_length=256)


def _answers(model: Any, encoder: Encoder) -> list[Any]:
    backend = HFBackend(model, encoder)
    scores = backend.score(PROMPTS, [TITLES] * 3)
    # More tokens behind a prompt than the reader of prefixes takes at once.
    many = backend.score(PROMPTS[:1], [[f"{one} {other} again and again" for one in TITLES for other in TITLES]])
    labels = backend.score(PROMPTS, [["1", "2", "3", "4"]] * 3, closed=False)
    found = backend.search(PROMPTS, TITLES, k=3, width=4)
    generated = backend.generate(PROMPTS, max_tokens=4)
    numbers = [each.logprobs for each in (*scores, *many, *labels)]
    return [numbers, [each.items for each in found], [each.text for each in generated]]


def test_asking_a_model_on_a_gpu(loaded: tuple[Any, Encoder]) -> None:
    model, encoder = loaded
    expected = _answers(model, encoder)
    with fake_cuda():
        found = _answers(on_cuda(model), encoder)
    assert isinstance(next(model.parameters()), FakeCuda)
    for one, other in zip(expected[0], found[0], strict=True):
        assert np.allclose(one, other, atol=1e-4)
    assert found[1:] == expected[1:]


def test_losses_of_a_model_on_a_gpu(loaded: tuple[Any, Encoder]) -> None:
    model, _ = loaded
    rows = [TokenRow((5, 6, 7, *end), (*[IGNORED] * 3, *end)) for end in ((10, 11), (12, 13, 14), (15,))]
    ids, labels = (torch.tensor(each) for each in padded(rows, 0))
    packed = {name: torch.from_numpy(each) for name, each in asdict(stack([tree(rows)], 0)).items()}
    expected = [
        float(loss(model, *given)[0].detach())
        for loss, given in ((label_loss, (ids, labels)), (packed_loss, (packed,)))
    ]
    with fake_cuda():
        on_cuda(model)
        total, _ = label_loss(model, on_cuda(ids), on_cuda(labels))
        total.backward()
        there = {name: on_cuda(each) for name, each in packed.items()}
        found = [float(each.detach()) for each in (total, packed_loss(model, there)[0])]
    assert found == pytest.approx(expected, rel=1e-4)
    assert any(parameter.grad is not None for parameter in model.parameters())
