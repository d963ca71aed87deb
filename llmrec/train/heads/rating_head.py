"""Trains a rating head with what else is trainable of a model, through the trainer of token rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmrec.models.rating_head import WEIGHTS, HeadShape, RatingHead, new_head, standardise
from llmrec.tasks.rating import Scale
from llmrec.train.batches import padded
from llmrec.train.loss import label_loss
from llmrec.train.steps import Step

_NAME = "rating_head"
# States whose mean and deviation stand for all.
_MEASURED = 512


def attach(model: Any, scale: Scale, *, alpha: float, counts: Sequence[int], frozen: bool) -> RatingHead:
    """Put a new head on a model, so that it is trained with what else is trainable.

    Args:
        model: From `llmrec.train.lora.load_trainable`.
        scale: The rating scale.
        alpha: Weight of the cross-entropy.
        counts: How often each value of the scale is a target in training.
        frozen: Train nothing but the head.
    """
    width = model.config.get_text_config().hidden_size
    head = new_head(HeadShape(values=scale.values, alpha=alpha, width=width), counts)
    if frozen:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    setattr(model, _NAME, head.to(model.device).linear)
    return head


def measure(head: RatingHead, model: Any, steps: Sequence[Step], pad: int) -> None:
    """Standardise a head's states by what they are before training, in the first planned steps.

    Args:
        head: The head.
        model: The model that it is on.
        steps: Planned steps, whose labels are classes.
        pad: Any token id.
    """
    found: list[Any] = []

    def keep(states: Any, classes: Any) -> Any:
        found.append(states.float())
        return states.new_zeros(())

    was_training = model.training
    model.eval()
    with torch.no_grad():
        for step in steps:
            ids, labels = (torch.tensor(each, device=model.device) for each in padded(step.rows, pad))
            label_loss(model, ids, labels, keep)
            if sum(map(len, found)) >= _MEASURED:
                break
    model.train(was_training)
    standardise(head, torch.cat(found))


def detach(model: Any) -> None:
    """Take a head off a model again, before its own weights are saved."""
    delattr(model, _NAME)


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """The loss of a head: ``alpha * CE + (1 - alpha) * MSE`` over the scale.

    The squared error is that of the expectation over classes, so that one number is trained and one is answered; a
    head of one unit has no classes and the squared error of its number.
    """

    head: RatingHead

    def __call__(self, states: Any, classes: Any) -> Any:
        """Return the summed loss.

        Args:
            states: Hidden states before the ratings, shape (n, width).
            classes: Places of the true ratings on the scale, shape (n,).
        """
        outputs, alpha = self.head.outputs(states), self.head.shape.alpha
        total = outputs.new_zeros(())
        if alpha > 0:
            total = total + alpha * torch.nn.functional.cross_entropy(outputs, classes, reduction="sum")
        if alpha < 1:
            truth = outputs.new_tensor(self.head.shape.values)[classes]
            total = total + (1 - alpha) * (self.head.expectation(outputs) - truth).square().sum()
        return total


def restore(head: RatingHead, checkpoint: Path) -> None:
    """Go on with the head that a checkpoint holds."""
    weights: Mapping[str, Any] = load_file(checkpoint / WEIGHTS)
    head.linear.load_state_dict(weights)
