"""Writes the training examples of a recipe as chat messages, for other training programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmrec.backends.encode import Encoder, marked_pieces
from llmrec.durable import replace_atomically
from llmrec.errors import LlmrecError, RecipeError
from llmrec.guard import neutralise
from llmrec.models.load import load_config, resolve_config_folder, resolve_model_folder
from llmrec.models.traits import is_encoder_decoder
from llmrec.pipeline.objectives import listwise_settings, rating_head_classes
from llmrec.pipeline.preflight import load_recipe_encoder
from llmrec.pipeline.study import Study
from llmrec.pipeline.training import iterate_training_rows, plan_training
from llmrec.recipe.schema import SOFT_PROMPT_METHODS
from llmrec.train.rows import TextRow
from llmrec.train.steps import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class WrittenConversations:
    """The number of conversations written, and what was left out.

    Attributes:
        rows: Number of conversations, one per line.
        steps: The recipe's steps, which these rows fill.
        partly: Conversations with answer tokens that have no loss in llmrec, such as the first events of a list.
        share: Share of the tokens of these answers that have loss.
        cut: Conversations that end before their row, which ``train.max_row_tokens`` limits.
        dropped: Rows without a conversation, because the answer exceeds ``train.max_row_tokens``.
        different: Conversations whose tokens under the chat template differ from those of the row.
    """

    rows: int
    steps: int
    partly: int
    share: float
    cut: int
    dropped: int
    different: int


def write_conversations(study: Study, file: Path) -> WrittenConversations:
    """Write training examples in training order: ``{"messages": [{"role", "content"}, ...]}``.

    Neither torch nor weights are loaded. A file is replaced only if it is complete.

    Raises:
        RecipeError: If the recipe's rows are not conversations.
        LlmrecError: If the file exists.
    """
    if file.exists():
        raise LlmrecError(
            f"{file} exists; remove this file, or choose another one", kind="exists", at=file, column="--chat"
        )
    base = resolve_config_folder(study.recipe.model) or resolve_model_folder(study.recipe.model, seed=study.recipe.seed)
    encoder, paired = load_recipe_encoder(study, base)
    if "tuned" not in study.recipe.eval.arms:
        paired = is_encoder_decoder(load_config(base, study.recipe.model))
    _check_chat_recipe(study, encoder, paired=paired)
    plan = plan_training(study, encoder)
    counts = dict.fromkeys(("rows", "partly", "cut", "dropped", "different"), 0)
    learned, shown = 0, 0
    with replace_atomically(file) as draft, draft.open("w", encoding="utf-8") as stream:
        for row in _planned_rows(study, encoder, plan):
            messages, tokens = _chat_messages(row, encoder)
            if messages is None:
                counts["dropped"] += 1
                continue
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            counts["rows"] += 1
            counts["cut"] += tokens < len(row.ids)
            answer = len(row.ids) - len(encoder.chat(row.example.messages if row.example is not None else ()))
            if row.targets < answer:
                counts["partly"] += 1
                learned, shown = learned + row.targets, shown + answer
            counts["different"] += encoder.whole(messages)[:tokens] != list(row.ids[:tokens])
    return WrittenConversations(steps=len(plan.steps), share=learned / max(shown, 1), **counts)


def _check_chat_recipe(study: Study, encoder: Encoder, *, paired: bool) -> None:
    """Reject a recipe whose training examples cannot be written as chat messages."""
    recipe, index = study.recipe, study.index
    what = key = ""
    if paired:
        key, what = "model.name", "an encoder-decoder does not read chat messages; choose a decoder"
    elif index is not None and index.vocabulary:
        key, what = (
            "index",
            "items are new tokens, which other trainers do not add to the model; set index=null, or use titles",
        )
    elif recipe.train.method in SOFT_PROMPT_METHODS:
        key, what = "train.method", "soft prompts are vectors, not text; set train.method=lora"
    elif recipe.train.reward is not None:
        key, what = "train.reward", "answers are generated during training; set train.reward=null"
    elif listwise_settings(study) is not None:
        key = "train.preference" if recipe.train.preference is not None else "tasks.<family>.loss"
        what = "a training example compares several answers; remove the key"
    elif rating_head_classes(study, encoder) is not None:
        key, what = "tasks.rating.head", "ratings are classes of a rating head, not text; remove the key"
    if key:
        raise RecipeError(
            f"{key}: the training examples cannot be written as chat messages: {what}", kind="unsupported", column=key
        )


def _planned_rows(study: Study, encoder: Encoder, plan: TrainingPlan) -> Iterator[TextRow]:
    """Yield the planned training examples as text, step by step."""
    drawn = (row for _, row in iterate_training_rows(study, encoder, texts=True) if isinstance(row, TextRow))
    waiting: dict[int, TextRow] = {}
    count = 0
    for numbers in plan.steps.numbers():
        for n in numbers:
            while count <= n:
                waiting[count], count = next(drawn), count + 1
            row = waiting.pop(n)
            if row.ids != plan.steps.table.row(n).ids:
                raise RuntimeError(f"training example {n} has different tokens when written as text")
            yield row


def _chat_messages(row: TextRow, encoder: Encoder) -> tuple[list[dict[str, str]] | None, int]:
    """Return the messages of an example and their number of tokens; None if truncation removed the answer."""
    assert row.example is not None
    tokens = len(encoder.chat(row.example.messages))
    answer: list[str] = []
    for text, _ in marked_pieces(row.example.answer):
        tokens += len(encoder.piece(text))
        if tokens > len(row.ids):
            tokens -= len(encoder.piece(text))
            break
        answer.append(neutralise(text, encoder.control))
    complete = tokens + row.example.ends_turn == len(row.ids)
    if not answer or (row.example.ends_turn and not complete):
        return None, 0
    content = {"role": "assistant", "content": "".join(answer)}
    return [*encoder.turns(row.example.messages), content], len(row.ids) if complete else tokens
