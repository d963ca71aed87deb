"""Soft prompts, option tuning and option-adapter tuning (M6-Rec, Cui et al., arXiv 2205.08084, as in its section 3).

``prompt`` trains soft prompts with the language model's own loss. ``option`` trains them with a softmax over the labels
alone, and the last C of them are the class vectors of the C labels too: logit_c = h . p_c. One tensor holds both, so
it gets the gradient of either use. ``option-adapter`` also trains a bottleneck adapter in every layer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmrec.backends.encode import Encoder
from llmrec.errors import require
from llmrec.models import bottleneck, soft_prompt
from llmrec.models.load import dtype, load_model
from llmrec.models.soft_prompt import SoftPrompt
from llmrec.recipe.schema import ModelSection, TrainSection

log = logging.getLogger(__name__)

LARGEST = 0.015
"""The share of all weights that may be trained; M6-Rec trains about 1 %."""


@dataclass(frozen=True, slots=True)
class OptionLoss:
    """The cross-entropy over labels, whose class vectors are the last soft prompts.

    Attributes:
        rows: All soft prompts, a trainable tensor of shape (count, width).
        labels: How many labels there are.
    """

    rows: Any
    labels: int

    def __call__(self, states: Any, classes: Any) -> Any:
        """Return the summed loss of states, shape (n, width), and their labels' numbers, shape (n,)."""
        with torch.autocast(states.device.type, enabled=False):
            logits = states.float() @ self.rows[-self.labels :].float().T
            return torch.nn.functional.cross_entropy(logits, classes, reduction="sum")


def soft_encoder(encoder: Encoder, train: TrainSection) -> Encoder:
    """Return what encodes prompts and rows with soft prompts before them."""
    return Encoder(soft_prompt.softened(encoder.tokenizer, train.soft.prompts), max_length=encoder.max_length)


def load_soft(folder: str, model: ModelSection, train: TrainSection, encoder: Encoder, prompt: SoftPrompt) -> Any:
    """Load a base model with soft prompts that are trainable, and adapters where the method has them.

    Args:
        folder: The base model.
        model: How to load it.
        train: What is trained.
        encoder: From `soft_encoder`.
        prompt: How many there are, and the labels.
    """
    base = load_model(folder, model)
    if train.gradient_checkpointing:
        base.enable_input_require_grads()
    ids = _ids(encoder, prompt)
    soft_prompt.put_on(base, prompt, ids)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    peft = require("peft", "train")
    # Beside a base of another size PEFT would save whole embeddings, and not the rows alone that are trained.
    base.name_or_path = ""
    tuned = peft.get_peft_model(base, peft.TrainableTokensConfig(token_indices=ids))
    if train.method == "option-adapter":
        bottleneck.attach(tuned, train.soft.rank, seed=prompt.seed)
    tuned.llmrec_float32 = dtype(model) == torch.float32
    share = sum(p.numel() for p in tuned.parameters() if p.requires_grad) / sum(p.numel() for p in tuned.parameters())
    if share > LARGEST:
        log.warning(
            "training: %.1f %% of all weights are trained, more than the %.1f %% that make %s a small addition; lower "
            "train.soft.rank or train.soft.prompts",
            100 * share,
            100 * LARGEST,
            train.method,
        )
    return tuned


def rows_of(model: Any) -> Any:
    """Return the soft prompts of a model that is trained, shape (count, width)."""
    return model.get_input_embeddings().trainable_tokens_delta["default"]


def assembled(folder: str, model: ModelSection, adapter: Path, prompt: SoftPrompt) -> Any:
    """Return base and adapter as one plain model in float32, with bottleneck adapters where there are any.

    Args:
        folder: The base model.
        model: How to load it.
        adapter: What training left.
        prompt: What lies there of soft prompts.
    """
    peft, base = require("peft", "train"), load_model(folder, model, dtype=torch.float32)
    ids = list(peft.PeftConfig.from_pretrained(str(adapter)).token_indices)
    soft_prompt.put_on(base, prompt, ids)
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    soft_prompt.set_labels(merged, prompt, ids)
    bottleneck.load(merged, adapter)
    return merged


def _ids(encoder: Encoder, prompt: SoftPrompt) -> list[int]:
    ids: Sequence[int] = encoder.tokenizer.convert_tokens_to_ids(soft_prompt.names(prompt.count))
    return [int(each) for each in ids]
