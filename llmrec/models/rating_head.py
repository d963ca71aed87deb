"""A head that predicts a rating from the final hidden state at the last token of a prompt.

Two formulations (Kang et al., arXiv 2305.06474, section 4): one class for each value of the scale, whose expectation is
the rating, or one unit whose output is the rating. Its weights are stored with a model's as
``rating_head.safetensors``, their meaning in ``rating_head.json``.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.durable import parse_json, write_json
from llmrec.errors import require
from llmrec.models.tensors import base_of, reading_trained_file

if TYPE_CHECKING:
    import torch

HEAD_WEIGHTS_FILE = "rating_head.safetensors"
HEAD_CONFIG_FILE = "rating_head.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """What the outputs of a rating head mean.

    Attributes:
        values: The rating scale, lowest first.
        alpha: Weight of the cross-entropy in its training; 0: a head with one unit.
        width: Dimension of the hidden states.
    """

    values: tuple[float, ...]
    alpha: float
    width: int

    @property
    def outputs(self) -> int:
        """Number of outputs: 1, or one class per rating value."""
        return 1 if self.alpha == 0 else len(self.values)


@dataclass(frozen=True, slots=True)
class RatingHead:
    """A rating head: its shape, a linear layer in float32, and the statistics for standardising its input."""

    shape: HeadShape
    linear: Any

    def to(self, device: Any) -> RatingHead:
        """Move the head to a device, in place."""
        self.linear.to(device)
        return self

    def outputs(self, states: torch.Tensor) -> Any:
        """Return the outputs for hidden states of shape (n, width): class logits, or one rating, in float32.

        Every dimension of the states is standardised first.
        """
        torch = require("torch", "train")
        # In bfloat16 a rating of 4 has an error of up to .016, so the head is always computed in float32.
        with torch.autocast(states.device.type, enabled=False):
            return self.linear((states.float() - self.linear.center) / self.linear.spread)

    def expectation(self, outputs: Any) -> Any:
        """Return ratings of shape (n,): the mean over class probabilities, or the single output."""
        if self.shape.outputs == 1:
            return outputs[:, 0]
        return outputs.softmax(-1) @ outputs.new_tensor(self.shape.values)

    def ratings(self, states: torch.Tensor) -> list[float]:
        """Return a rating within the scale for each hidden state of shape (n, width)."""
        result = self.expectation(self.outputs(states).detach())
        return [float(value) for value in result.clamp(self.shape.values[0], self.shape.values[-1])]


def new_rating_head(shape: HeadShape, counts: Sequence[int]) -> RatingHead:
    """Create a head that initially predicts the average training rating for every hidden state.

    Its weights are 0 and its biases the log shares of the classes with add-one smoothing, or the mean rating. So
    training starts at the mean and nothing is random. ``counts`` has the frequency of each value of the scale in
    training.
    """
    torch = require("torch", "train")
    linear = _new_linear_layer(shape)
    total = sum(counts)
    if shape.outputs == 1:
        bias = [sum(n * value for n, value in zip(counts, shape.values, strict=True)) / total]
    else:
        bias = [math.log((n + 1) / (total + len(counts))) for n in counts]
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor(bias))
    return RatingHead(shape, linear)


def set_standardisation(head: RatingHead, states: torch.Tensor) -> None:
    """Set mean and deviation for standardising hidden states, from samples of shape (n, width).

    A few dimensions of a language model's states are a hundred times larger than the others and hardly vary. With one
    learning rate for all weights, the other dimensions would be learned too slowly.
    """
    result = states.float()
    spread = result.std(dim=0, correction=0)
    head.linear.center.copy_(result.mean(dim=0))
    # constant dimensions carry no information and must not be scaled up
    head.linear.spread.copy_(spread.clamp(min=max(1e-3 * float(spread.mean()), 1e-6)))


def _new_linear_layer(shape: HeadShape) -> Any:
    torch = require("torch", "train")
    linear = torch.nn.Linear(shape.width, shape.outputs)
    linear.register_buffer("center", torch.zeros(shape.width))
    linear.register_buffer("spread", torch.ones(shape.width))
    return linear


def save_rating_head(head: RatingHead, folder: Path) -> None:
    """Save a head to a folder."""
    safetensors = require("safetensors.torch", "train")
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.linear.state_dict().items()}
    safetensors.save_file(tensors, folder / HEAD_WEIGHTS_FILE)
    write_json(folder / HEAD_CONFIG_FILE, asdict(head.shape))


def load_rating_head(folder: Path) -> RatingHead | None:
    """Load the rating head of a model folder; None if it has none.

    Raises:
        ModelError: If its files cannot be read or are inconsistent.
    """
    if not (folder / HEAD_WEIGHTS_FILE).is_file():
        return None
    safetensors = require("safetensors.torch", "train")
    with reading_trained_file(f"the rating head in {folder} cannot be read", folder):
        config = parse_json((folder / HEAD_CONFIG_FILE).read_text(encoding="utf-8"))
        shape = HeadShape(
            values=tuple(float(value) for value in config["values"]),
            alpha=float(config["alpha"]),
            width=int(config["width"]),
        )
        linear = _new_linear_layer(shape)
        linear.load_state_dict(safetensors.load_file(folder / HEAD_WEIGHTS_FILE))
    return RatingHead(shape, linear)


def copy_rating_head(source: Path, target: Path) -> None:
    """Copy the files of a rating head, if there is one, and index the weights in the target folder.

    Some engines, vLLM among them, load every safetensors file of a folder as part of the model unless an index names
    the right ones.
    """
    if not (source / HEAD_WEIGHTS_FILE).is_file():
        return
    for name in (HEAD_WEIGHTS_FILE, HEAD_CONFIG_FILE):
        shutil.copyfile(source / name, target / name)
    model = target / "model.safetensors"
    if model.is_file():
        safetensors = require("safetensors", "train")
        with safetensors.safe_open(model, framework="np") as opened:
            names = list(opened.keys())
        index = {"metadata": {"total_size": model.stat().st_size}, "weight_map": dict.fromkeys(names, model.name)}
        write_json(target / f"{model.name}.index.json", index)


def last_states(model: torch.nn.Module, ids: Any, mask: torch.Tensor) -> Any:
    """Return the hidden state of the last token of each text, shape (rows, width).

    Args:
        model: A causal language model, with or without PEFT adapters.
        ids: Token ids, padded on either side, shape (rows, columns).
        mask: 1 on tokens and 0 on padding, same shape.
    """
    torch = require("torch", "train")
    # Positions start at the beginning of the text, after padding on the left.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    decoder = base_of(model).get_decoder()
    states = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    columns = torch.arange(ids.shape[1], device=ids.device)
    return states[torch.arange(len(ids), device=ids.device), (mask * columns).argmax(-1)]
