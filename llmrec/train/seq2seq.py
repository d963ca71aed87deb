"""Training rows of encoder-decoders: the encoder reads what stands before a target, the decoder learns the target.

A row is a `Row` whose labels are one stretch at its end. What comes before is the source: to the token what evaluation
asks with, since the prompt of a request and the beginning of a row are cut into the same pieces. The labels are what a
search looks for: the answer with what closes it. So rows are planned, counted and cut into steps like those of any
other model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmrec.backends.encode import IGNORED, Encoder, Row, pieces
from llmrec.errors import require
from llmrec.models.traits import is_paired
from llmrec.train.batches import padded
from llmrec.types import Example

if TYPE_CHECKING:
    from llmrec.train.loss import StateLoss


def target_rows(example: Example, encoder: Encoder, limit: int) -> list[Row]:
    """Return a row for each target of an example that fits ``limit`` tokens.

    A list of n targets gives n rows, each with everything before its target as the source, as teacher forcing of one
    decoder row gives n predictions (TIGER, NeurIPS 2023, section 3.2, trains on such pairs).
    """
    question = encoder.chat(example.messages)
    last = len(example.answer) - 1
    rows: list[Row] = []
    for place, segment in enumerate(example.answer):
        if segment.kind != "target":
            continue
        source = [*question, *(i for text in pieces(example.answer[:place]) for i in encoder.piece(text))]
        target = [*encoder.line(segment.text), *([encoder.end_id] if example.ends_turn and place == last else [])]
        if len(source) + len(target) > limit:
            break
        rows.append(Row((*source, *target), (*[IGNORED] * len(source), *target)))
    return rows


def cut(row: Row) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a row's source and target."""
    return row.ids[: -row.targets], row.labels[-row.targets :]


def paired_inputs(rows: Sequence[Row], pad: int) -> dict[str, list[list[int]]]:
    """Return right-padded sources with their mask, and labels, each of shape (rows, longest)."""
    halves = [cut(row) for row in rows]
    wide, deep = max(len(source) for source, _ in halves), max(len(target) for _, target in halves)
    return {
        "input_ids": [[*source, *[pad] * (wide - len(source))] for source, _ in halves],
        "attention_mask": [[1] * len(source) + [0] * (wide - len(source)) for source, _ in halves],
        "labels": [[*target, *[IGNORED] * (deep - len(target))] for _, target in halves],
    }


def paired_loss(model: Any, input_ids: Any, attention_mask: Any, labels: Any, weights: Any = None) -> tuple[Any, float]:
    """Return the summed cross-entropy over targets and their number, or what they count.

    Args:
        model: An encoder-decoder, with or without PEFT adapters.
        input_ids: Sources, right-padded, shape (rows, longest source).
        attention_mask: 1 on tokens, 0 on padding, same shape.
        labels: Targets, shape (rows, longest target); -100 behind their ends. The decoder reads them one place later,
            behind its start token; what stands behind an end is not seen by what comes before it.
        weights: What each target of a row counts, shape (rows,); None: 1.
    """
    from llmrec.train.loss import cross_entropy

    torch = require("torch", "train")
    before = labels.new_full(labels.shape, int(model.config.decoder_start_token_id))
    # Any id will do behind the ends; that of the start token is one.
    before[:, 1:] = torch.where(labels[:, :-1] == IGNORED, before[:, 1:], labels[:, :-1])
    logits = model(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=before, use_cache=False).logits
    wanted = labels != IGNORED
    counts = None if weights is None else weights[:, None].expand_as(wanted)[wanted]
    total = cross_entropy(logits[wanted], labels[wanted], counts)
    return total, int(wanted.sum()) if counts is None else float(counts.sum())


def laid_out(model: Any, rows: Sequence[Row], pad: int) -> dict[str, Any]:
    """Return rows as `rows_loss` takes them for this model, as lists of equal length."""
    weighted = {"weights": [row.weight for row in rows]} if any(row.weight != 1.0 for row in rows) else {}
    if is_paired(model.config):
        return paired_inputs(rows, pad) | weighted
    ids, labels = padded(rows, pad)
    return {"input_ids": ids, "labels": labels} | weighted


def rows_loss(model: Any, inputs: Mapping[str, Any], by: StateLoss | None = None) -> tuple[Any, float]:
    """Return the summed loss over the targets of rows and what they count, whichever kind the model is.

    ``by`` is that of `llmrec.train.loss.label_loss`; an encoder-decoder takes none.
    """
    from llmrec.train.loss import label_loss

    return paired_loss(model, **inputs) if is_paired(model.config) else label_loss(model, **inputs, by=by)
