"""Rows, trainings and recorded gradients of tiny models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llmrec.backends.encode import TokenRow
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import encoder_decoder_inputs, plan_steps
from llmrec.train.packing import pack_rows, stack_sequences
from llmrec.train.steps import Step
from llmrec.types import Example, Message, Segment
from tests.conftest import encoder_of

FILMS = ("Heat", "Fargo", "The Big Lebowski", "Alien")


def user(*segments: str | Segment) -> tuple[Message, ...]:
    """Return a user's turn."""
    parts = tuple(each if isinstance(each, Segment) else Segment("text", each) for each in segments)
    return (Message("user", parts),)


def example(messages: str | tuple[Message, ...], *answer: str | Segment, **changes: Any) -> Example:
    """Return an example whose turn ends with its answer; strings are the user's question and targets."""
    values: dict[str, Any] = {"id": "1", "user_id": "u", "task": "rating", "template": "x", "ends_turn": True}
    segments = tuple(each if isinstance(each, Segment) else Segment("target", each) for each in answer)
    turns = user(messages) if isinstance(messages, str) else messages
    return Example(messages=turns, answer=segments, **{**values, **changes})


def examples() -> list[Example]:
    """Return ratings that follow from the film."""
    question = user("Answer with one number")
    return [
        example(question, Segment("item", f"Heat {k % 3}: "), str(1 + k % 3), "\n", id=str(k), ends_turn=False)
        for k in range(480)
    ]


def lists(count: int = 12) -> list[Example]:
    """Return questions whose first answer is the chosen one: the film after that in the question."""
    examples = []
    for n in range(count):
        chosen = n % len(FILMS)
        question = user("Next to: ", Segment("item", FILMS[chosen - 1]))
        rejected = tuple(title for title in FILMS if title != FILMS[chosen])
        examples.append(example(question, FILMS[chosen], id=str(n), task="sequential", rejected=rejected))
    return examples


def alone(row: TokenRow) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a row's ids and labels, as the inputs of `label_loss`."""
    return torch.tensor([row.ids]), torch.tensor([row.labels])


def packed(*bins: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
    """Return masked rows, as the inputs of `packed_loss`."""
    return {
        name: torch.from_numpy(each)
        for name, each in asdict(stack_sequences([pack_rows(rows) for rows in bins], 0)).items()
    }


def pairs(rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
    """Return rows of an encoder-decoder, as the inputs of `encoder_decoder_loss`."""
    return {name: torch.tensor(each) for name, each in encoder_decoder_inputs(rows, 0).items()}


def fit(
    model: Any,
    encoder: Any,
    steps: Sequence[Step],
    train: TrainSection,
    folder: Path,
    valid: Mapping[str, Sequence[TokenRow]] | None = None,
    **losses: Any,
) -> sft.TrainingResult:
    """Train with seed 0; ``losses`` are the arguments of `sft.train` for its loss."""
    return sft.train(model, encoder, steps, valid or {}, train, folder=folder, seed=0, quiet=True, **losses)


def tear(folder: Path, step: int) -> None:
    """Empty a run's checkpoint, as if the run was killed while it was written."""
    for file in (folder / "checkpoints" / f"checkpoint-{step}").iterdir():
        file.unlink()


Gradients = list[dict[str, torch.Tensor]]


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradients of every step, before they are used."""

    def __init__(self) -> None:
        self.steps: Gradients = []

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name: p.grad.float().clone() for name, p in named if p.grad is not None})


def moved(model: Any, spread: float = 0.05) -> Any:
    """Change adapters, because half of the gradients of new ones are 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, spread)
    return model


def recorded(monkeypatch: pytest.MonkeyPatch, model: Any, *args: Any, **options: Any) -> tuple[list[float], Gradients]:
    """Train, and return the losses and gradients of the steps; arguments are those of `sft.train`."""
    recorder = Recorder()
    monkeypatch.setattr(sft, "tracker_callbacks", lambda *_: [recorder])
    done = sft.train(moved(model), *args, seed=0, quiet=True, device="cpu", **options)
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
    encoder = encoder_of(folder)
    planned: Sequence[Step] = plan_steps(
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
