"""Records the gradients and losses of a training with the real trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llmrec.backends.encode import Encoder
from llmrec.models.load import load_tokenizer
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import plan
from llmrec.train.steps import Step
from tests.train.test_training import examples

Gradients = list[dict[str, torch.Tensor]]


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradients of every step, before they are used."""

    def __init__(self) -> None:
        self.steps: Gradients = []

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name: p.grad.float().clone() for name, p in named if p.grad is not None})


def moved(model: Any, spread: float = 0.05) -> Any:
    """Have adapters be other than at the start, where half of their gradients are 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, spread)
    return model


def recorded(monkeypatch: pytest.MonkeyPatch, model: Any, *given: Any, **options: Any) -> tuple[list[float], Gradients]:
    """Train, and return the losses and gradients of the steps; arguments are those of `sft.train`."""
    recorder = Recorder()
    monkeypatch.setattr(sft, "callbacks", lambda *_: [recorder])
    done = sft.train(moved(model), *given, seed=0, quiet=True, device="cpu", **options)
    return [line["loss"] for line in done.log[1:]], recorder.steps


def trained(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    out: Path,
    *,
    dtype: str = "float32",
    steps: int = 2,
    width: int | None = None,
    **settings: Any,
) -> tuple[list[float], Gradients]:
    """Train a tiny model with a section's settings, and return the losses and gradients of the steps."""
    section = ModelSection(name=str(folder), dtype=dtype, device="cpu")
    values = {"lora": LoraSection(rank=4), "learning_rate": 1e-3, "valid_rows": 0, "report_to": (), **settings}
    train = TrainSection(steps=steps, **values)
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=256)
    planned: Sequence[Step] = plan(
        iter([encoder.row(example) for example in examples()[:200]]), steps=steps, batch_tokens=256, seed=0, width=width
    )
    torch.manual_seed(0)
    model = lora.load_trainable(str(folder), section, train)
    return recorded(monkeypatch, model, encoder, planned, {}, train, folder=out)


def assert_equal(one: Gradients, two: Gradients, tolerance: float) -> None:
    """Compare gradients, relative to the largest number of each tensor."""
    assert len(one) == len(two) > 0
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys() and first
        for name, value in first.items():
            gap = float((value - second[name]).abs().max())
            assert gap <= tolerance * float(value.abs().max()) + 1e-12, (name, gap, float(value.abs().max()))
