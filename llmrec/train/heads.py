"""Trains rating heads, soft prompts and whole-word embeddings together with a model's other trainable weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmrec.backends.encode import Encoder
from llmrec.errors import ModelError, require
from llmrec.models import bottleneck, soft_prompt
from llmrec.models.exits import check_early_exits
from llmrec.models.load import device, dtype, load_model
from llmrec.models.rating_head import HEAD_WEIGHTS_FILE, HeadShape, RatingHead, new_rating_head, set_standardisation
from llmrec.models.soft_prompt import SoftPrompt
from llmrec.models.tensors import base_of
from llmrec.models.traits import is_encoder_decoder, is_plain_head
from llmrec.models.whole_words import (
    WHOLE_WORDS_FILE,
    attach_whole_words,
    new_word_table,
    token_kinds,
    whole_word_embeddings,
)
from llmrec.recipe.schema import ModelSection, TeacherSection, TrainSection
from llmrec.tasks.rating import RatingScale
from llmrec.train.batches import pad_rows
from llmrec.train.loss import DistillationLoss, ExitLoss, HeadlessLoss, ItemLoss, StateLoss, label_loss
from llmrec.train.steps import Step

_HEAD_ATTRIBUTE = "rating_head"
# Number of hidden states from which mean and standard deviation are estimated.
_SAMPLED_STATES = 512


def attach_rating_head(
    model: torch.nn.Module, scale: RatingScale, *, alpha: float, counts: Sequence[int], frozen: bool
) -> RatingHead:
    """Add a new rating head to a model from `load_trainable`, to be trained with the other trainable weights, or alone.

    ``alpha`` is the weight of the cross-entropy; ``counts`` has the frequency of each value of the scale in training.
    """
    width = model.config.get_text_config().hidden_size
    head = new_rating_head(HeadShape(values=scale.values, alpha=alpha, width=width), counts)
    if frozen:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    setattr(model, _HEAD_ATTRIBUTE, head.to(model.device).linear)
    return head


def fit_standardisation(head: RatingHead, model: torch.nn.Module, steps: Sequence[Step], pad: int) -> None:
    """Set the mean and scale with which a head standardises hidden states, estimated on the first steps.

    Labels of the steps are classes; ``pad`` is any token id.
    """
    results: list[Any] = []

    def keep(states: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        results.append(states.float())
        return states.new_zeros(())

    was_training = model.training
    model.eval()
    with torch.no_grad():
        for step in steps:
            ids, labels = (torch.tensor(item, device=model.device) for item in pad_rows(step.rows, pad))
            label_loss(model, ids, labels, keep)
            if sum(map(len, results)) >= _SAMPLED_STATES:
                break
    model.train(was_training)
    set_standardisation(head, torch.cat(results))


def detach_rating_head(model: torch.nn.Module) -> None:
    """Remove a rating head from a model, before the weights of the model are saved."""
    delattr(model, _HEAD_ATTRIBUTE)


@dataclass(frozen=True, slots=True)
class RatingHeadLoss:
    """The loss of a rating head: ``alpha * CE + (1 - alpha) * MSE`` over the scale.

    The squared error is that of the predicted rating, the expectation over classes. A head with one unit has only the
    squared error of its output.
    """

    head: RatingHead

    def __call__(self, states: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Return the summed loss of the states before ratings, shape (n, width); classes are indices on the scale."""
        outputs, alpha = self.head.outputs(states), self.head.shape.alpha
        total = outputs.new_zeros(())
        if alpha > 0:
            total = total + alpha * torch.nn.functional.cross_entropy(outputs, classes, reduction="sum")
        if alpha < 1:
            truth = outputs.new_tensor(self.head.shape.values)[classes]
            total = total + (1 - alpha) * (self.head.expectation(outputs) - truth).square().sum()
        return total


def restore_rating_head(head: RatingHead, checkpoint: Path) -> None:
    """Load the rating head of a checkpoint."""
    head.linear.load_state_dict(load_file(checkpoint / HEAD_WEIGHTS_FILE))


# Soft prompts, option tuning and option-adapter tuning (M6-Rec, Cui et al., arXiv 2205.08084, as in its section
# 3).
#
# ``prompt`` trains soft prompts with the loss of the language model. ``option`` trains them with a softmax over
# the labels only, and the last C soft prompts are also the class vectors of the C labels: logit_c = h . p_c. One
# tensor is used for both, so it gets the gradients of both. ``option-adapter`` also trains a bottleneck adapter in
# every layer.


log = logging.getLogger(__name__)

MAX_TRAINED_SHARE = 0.015
"""Maximum share of all weights that are trained; M6-Rec trains about 1 %."""


@dataclass(frozen=True, slots=True)
class OptionLoss:
    """The cross-entropy over labels, with the last soft prompts as class vectors.

    Attributes:
        rows: All soft prompts, a trainable tensor of shape (count, width).
        labels: Number of labels.
    """

    rows: Any
    labels: int

    def __call__(self, states: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Return the summed loss of hidden states, shape (n, width), for label numbers, shape (n,)."""
        with torch.autocast(states.device.type, enabled=False):
            logits = states.float() @ self.rows[-self.labels :].float().T
            return torch.nn.functional.cross_entropy(logits, classes, reduction="sum")


def soft_prompt_encoder(encoder: Encoder, train: TrainSection) -> Encoder:
    """Return an encoder that puts soft prompts before prompts and training examples."""
    return Encoder(
        soft_prompt.tokenizer_with_soft_tokens(encoder.tokenizer, train.soft.prompts), max_length=encoder.max_length
    )


def load_soft_prompt_model(
    folder: str, model: ModelSection, train: TrainSection, encoder: Encoder, prompt: SoftPrompt
) -> Any:
    """Load a base model with the soft prompts of `soft_prompt_encoder`, and adapters if the method requires them."""
    base = load_model(folder, model)
    ids = _soft_token_ids(encoder, prompt)
    soft_prompt.add_soft_prompts(base, prompt, ids)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    peft = require("peft", "train")
    # With a resized vocabulary, PEFT would save whole embeddings instead of the trained rows.
    base.name_or_path = ""
    tuned = peft.get_peft_model(base, peft.TrainableTokensConfig(token_indices=ids))
    if train.method == "option-adapter":
        bottleneck.attach(tuned, train.soft.rank, seed=prompt.seed)
    tuned.llmrec_float32 = dtype(model) == torch.float32
    share = sum(p.numel() for p in tuned.parameters() if p.requires_grad) / sum(p.numel() for p in tuned.parameters())
    if share > MAX_TRAINED_SHARE:
        log.warning(
            "training: %.1f %% of all weights are trained, more than the %.1f %% expected for %s; lower "
            "train.soft.rank or train.soft.prompts",
            100 * share,
            100 * MAX_TRAINED_SHARE,
            train.method,
        )
    return tuned


def soft_prompt_rows(model: torch.nn.Module) -> Any:
    """Return the soft prompts of a model, shape (count, width)."""
    return model.get_input_embeddings().trainable_tokens_delta["default"]


def merge_soft_prompt_model(folder: str, model: ModelSection, adapter: Path, prompt: SoftPrompt) -> Any:
    """Merge base and adapter into a plain float32 model."""
    peft, base = require("peft", "train"), load_model(folder, model, dtype=torch.float32)
    ids = list(peft.PeftConfig.from_pretrained(str(adapter)).token_indices)
    soft_prompt.add_soft_prompts(base, prompt, ids)
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    soft_prompt.set_label_vectors(merged, prompt, ids)
    bottleneck.load(merged, adapter)
    return merged


def _soft_token_ids(encoder: Encoder, prompt: SoftPrompt) -> list[int]:
    ids: Sequence[int] = encoder.tokenizer.convert_tokens_to_ids(soft_prompt.soft_token_names(prompt.count))
    return [int(item) for item in ids]


def add_whole_words(model: torch.nn.Module, encoder: Encoder, *, size: int, seed: int) -> None:
    """Add trainable whole-word embeddings to a model; a new table has ``size`` rows, the maximum word number + 1.

    Raises:
        RecipeError: If the model is not an encoder-decoder.
    """
    known = whole_word_embeddings(model)
    rows = model.get_input_embeddings().weight.shape[0]
    table = new_word_table(model, size, seed=seed) if known is None else known.weight.detach()
    attach_whole_words(model, table, token_kinds(encoder.tokenizer, encoder.control, rows))


def restore_whole_words(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the whole-word embeddings of a checkpoint, if the model has any."""
    words = whole_word_embeddings(model)
    if words is not None:
        with torch.no_grad():
            words.weight.copy_(load_file(checkpoint / WHOLE_WORDS_FILE)["table"])


# Losses on hidden states: of a rating head, tied labels, early exits or distillation.


def state_loss(
    model: torch.nn.Module,
    section: TrainSection,
    head: RatingHead | None,
    soft: SoftPrompt | None,
    taught: DistillationLoss | None,
    items: Sequence[int] = (),
) -> StateLoss | None:
    """Return the loss that replaces the loss of the language-model head; None if it is not replaced.

    Raises:
        ModelError: If ``train.exits`` is set and the model does not support early exits.
    """
    classes: HeadlessLoss | None = None if head is None else RatingHeadLoss(head)
    if soft is not None and soft.tied:
        classes = OptionLoss(soft_prompt_rows(model), len(soft.labels))
    if section.exits:
        check_early_exits(base_of(model), "train.exits")
        return ExitLoss(classes, section.distill)
    if section.softmax == "items" and classes is None and taught is None:
        return ItemLoss(tuple(sorted(items)))
    return classes or taught


def load_distillation_loss(
    folder: str, model: ModelSection, section: TeacherSection, vocabulary: int
) -> DistillationLoss:
    """Load a teacher's merged model, which has the student's tokenizer, and return the distillation loss.

    Raises:
        ModelError: If it is an encoder-decoder, its head is more than one matrix product, or its vocabulary differs.
    """
    teacher = load_model(folder, model).to(device(model)).eval().requires_grad_(False)
    if is_encoder_decoder(teacher.config) or not is_plain_head(teacher.config, teacher.get_output_embeddings()):
        raise ModelError(
            f"train.teacher: a {teacher.config.model_type} is not a decoder with a linear output layer; choose a run "
            "of another model",
            kind="unsupported",
            column="train.teacher",
        )
    if (size := len(teacher.get_output_embeddings().weight)) != vocabulary:
        raise ModelError(
            f"train.teacher: the output layer of {folder} has {size} rows, but the trained model has {vocabulary}; "
            "choose a teacher with an output layer of the same size (the same tokenizer may be padded differently)",
            kind="mismatch",
            column="train.teacher",
        )
    return DistillationLoss(teacher, section.share, section.relations)


def head_vocabulary_size(model: torch.nn.Module) -> int:
    """Return the vocabulary size of the head of a model."""
    head = model.get_output_embeddings()
    return len(getattr(getattr(head, "token_adapter", None), "base_layer", head).weight)
