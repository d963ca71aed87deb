"""Which loss stands behind a model's states: a head's, that of tied labels, one at every depth, or a teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmrec.errors import ModelError
from llmrec.models.exits import check as check_exits
from llmrec.models.load import device, load_model
from llmrec.models.rating_head import RatingHead
from llmrec.models.soft_prompt import SoftPrompt
from llmrec.models.traits import is_paired, plain_head
from llmrec.recipe.schema import ModelSection, TeacherSection, TrainSection
from llmrec.train.heads.option import OptionLoss, rows_of
from llmrec.train.heads.rating_head import HeadLoss
from llmrec.train.loss import ExitLoss, ItemLoss, StateLoss, TaughtLoss


def state_loss(
    model: Any,
    section: TrainSection,
    head: RatingHead | None,
    soft: SoftPrompt | None,
    taught: TaughtLoss | None,
    items: Sequence[int] = (),
) -> StateLoss | None:
    """Return what stands in for the language-model head's loss; None: nothing does.

    Args:
        model: What is trained.
        section: The recipe's ``train`` section.
        head: A rating head on the model.
        soft: Its soft prompts.
        taught: A teacher beside it.
        items: Ids of the item tokens.

    Raises:
        ModelError: If ``train.exits`` is set and answers cannot leave the model early.
    """
    by: StateLoss | None = taught if head is None else HeadLoss(head)
    if soft is not None and soft.tied:
        by = OptionLoss(rows_of(model), len(soft.labels))
    if section.softmax == "items" and by is None:
        by = ItemLoss(tuple(sorted(items)))
    if section.exits:
        check_exits(model.get_base_model() if hasattr(model, "get_base_model") else model, "train.exits")
        by = ExitLoss(by, section.distill)
    return by


def open_teacher(folder: str, model: ModelSection, section: TeacherSection, vocabulary: int) -> TaughtLoss:
    """Load a teacher as the loss of its pupil.

    Args:
        folder: The teacher's merged model, whose tokenizer is that of the pupil.
        model: The recipe's section, for device and dtype.
        section: How it teaches.
        vocabulary: Tokens that the pupil's head has.

    Raises:
        ModelError: If it is an encoder-decoder, its head is more than one matrix product, or it has other tokens.
    """
    teacher = load_model(folder, model).to(device(model)).eval().requires_grad_(False)
    if is_paired(teacher.config) or not plain_head(teacher.config, teacher.get_output_embeddings()):
        raise ModelError(
            f"train.teacher: a {teacher.config.model_type} has no plain head over the states of a decoder; name a run "
            "of another model",
            kind="unsupported",
            column="train.teacher",
        )
    if (size := len(teacher.get_output_embeddings().weight)) != vocabulary:
        raise ModelError(
            f"train.teacher: the head of {folder} has {size} rows, and that of the model to be trained {vocabulary}; "
            "heads of one tokenizer may be padded otherwise, so take a teacher whose head is as long",
            kind="mismatch",
            column="train.teacher",
        )
    return TaughtLoss(teacher, section.share, section.relations)


def tokens_of(model: Any) -> int:
    """Return how many tokens the head of a model that is trained knows."""
    head = model.get_output_embeddings()
    return len(getattr(getattr(head, "token_adapter", None), "base_layer", head).weight)
