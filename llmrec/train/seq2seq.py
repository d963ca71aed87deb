"""Training rows of encoder-decoders: the encoder reads what stands before a target, the decoder learns the target.

A row is a `TokenRow` whose labels are one stretch at its end. What comes before is the source: to the token what
evaluation asks with, since the prompt of a request and the beginning of a row are cut into the same pieces. The
labels are what a search looks for: the answer with what closes it. So rows are planned, counted and cut into steps like
those of any other model.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.backends.encode import IGNORED, Encoder, TokenRow, pieces
from llmrec.types import Example


def target_rows(example: Example, encoder: Encoder, limit: int) -> list[TokenRow]:
    """Return a row for each target of an example that fits ``limit`` tokens.

    A list of n targets gives n rows, each with everything before its target as the source, as teacher forcing of one
    decoder row gives n predictions (TIGER, NeurIPS 2023, section 3.2, trains on such pairs).
    """
    question = encoder.chat(example.messages)
    last = len(example.answer) - 1
    rows: list[TokenRow] = []
    for place, segment in enumerate(example.answer):
        if segment.kind != "target":
            continue
        source = [*question, *(i for text in pieces(example.answer[:place]) for i in encoder.piece(text))]
        target = [*encoder.line(segment.text), *([encoder.end_id] if example.ends_turn and place == last else [])]
        if len(source) + len(target) > limit:
            break
        rows.append(TokenRow((*source, *target), (*[IGNORED] * len(source), *target)))
    return rows


def cut(row: TokenRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a row's source and target."""
    return row.ids[: -row.targets], row.labels[-row.targets :]


def paired_inputs(rows: Sequence[TokenRow], pad: int) -> dict[str, list[list[int]]]:
    """Return right-padded sources with their mask, and labels, each of shape (rows, longest)."""
    halves = [cut(row) for row in rows]
    wide, deep = max(len(source) for source, _ in halves), max(len(target) for _, target in halves)
    return {
        "input_ids": [[*source, *[pad] * (wide - len(source))] for source, _ in halves],
        "attention_mask": [[1] * len(source) + [0] * (wide - len(source)) for source, _ in halves],
        "labels": [[*target, *[IGNORED] * (deep - len(target))] for _, target in halves],
    }
