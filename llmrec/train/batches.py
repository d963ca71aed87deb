"""Groups training examples into optimiser steps of about equal cost, and builds their labels.

The class of a target takes the position of its first token; the target's other tokens have no loss. Planning, counting,
packing and resuming are therefore the same as for token targets. The rating head reads the hidden state before each
rating: in a chat example that of the prompt's last token, in a list example one before every rating.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from llmrec.backends.encode import IGNORED, Encoder, TokenRow, answer_pieces
from llmrec.errors import RecipeError
from llmrec.models.batching import group_by_length
from llmrec.models.traits import is_encoder_decoder
from llmrec.tasks.parsing import parse_number
from llmrec.tasks.rating import RatingScale
from llmrec.train.packing import PackedRows, pack_into_bins, pack_into_one_bin
from llmrec.train.steps import PlannedSteps, RowTable, Step
from llmrec.types import Example

if TYPE_CHECKING:
    import torch

# Training examples of encoder-decoders: the encoder reads the text before a target, the decoder predicts the target.
#
# An example is a `TokenRow` whose labels are one span at its end. The tokens before it are the source, with the same
# tokens as in evaluation, since the prompt of a request and the beginning of an example are tokenised in the same
# pieces. The labels are the answer with its closing tokens, as in a search. Examples can therefore be planned,
# counted and grouped into steps like those of decoder-only models.


def target_rows(example: Example, encoder: Encoder, limit: int) -> list[TokenRow]:
    """Return an encoder-decoder example for each target of an example that fits ``limit`` tokens.

    A list of n targets gives n rows, each with everything before its target as the source, as teacher forcing in a
    decoder gives n predictions (TIGER, NeurIPS 2023, section 3.2, trains on such pairs).
    """
    question = encoder.chat(example.messages)
    last = len(example.answer) - 1
    rows: list[TokenRow] = []
    for index, segment in enumerate(example.answer):
        if segment.kind != "target":
            continue
        source = [*question, *(i for text in answer_pieces(example.answer[:index]) for i in encoder.piece(text))]
        target = [*encoder.line(segment.text), *([encoder.end_id] if example.ends_turn and index == last else [])]
        if len(source) + len(target) > limit:
            break
        rows.append(TokenRow((*source, *target), (*[IGNORED] * len(source), *target)))
    return rows


def split_source_target(row: TokenRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split a tokenised example into source and target."""
    return row.ids[: -row.targets], row.labels[-row.targets :]


def encoder_decoder_inputs(rows: Sequence[TokenRow], pad: int) -> dict[str, list[list[int]]]:
    """Return right-padded sources with their mask, and labels, each of shape (rows, longest)."""
    sources, targets = zip(*map(split_source_target, rows), strict=True)
    return {
        "input_ids": _padded(sources, pad),
        "attention_mask": _padded([[1] * len(source) for source in sources], 0),
        "labels": _padded(targets, IGNORED),
    }


def _padded(rows: Sequence[Sequence[int]], pad: int) -> list[list[int]]:
    """Pad rows on the right to the length of the longest."""
    longest = max(map(len, rows))
    return [[*row, *[pad] * (longest - len(row))] for row in rows]


# Number of examples to sort by length together: more means less padding, fewer means better mixed steps.
_BUFFER_STEPS = 8


def plan_steps(
    rows: Iterator[TokenRow],
    *,
    steps: int,
    batch_tokens: int,
    seed: int,
    width: int | None = None,
    lists: int | None = None,
    behind: int = 0,
) -> PlannedSteps:
    """Group tokenised examples into steps of at most ``batch_tokens`` padded tokens, in seeded order.

    Args:
        rows: Training examples, drawn as needed.
        steps: Maximum number of steps.
        batch_tokens: Padded tokens per step. A longer row is a separate step.
        seed: Seed of the order of steps.
        width: Pack rows into sequences of this number of columns. None: rows of similar length are padded.
        lists: Number of consecutive rows that are the candidates of one list, the chosen one first, in one packed
            sequence; targets of the others get weight 0. None: rows are independent.
        behind: Tokens appended to each row for its rollouts.
    """
    rng = random.Random(seed)
    table = RowTable()
    planned = PlannedSteps(table)
    while len(planned) < steps:
        buffer: list[TokenRow] = []
        packed: list[PackedRows] = []
        first, tokens = len(table), 0
        while tokens < _BUFFER_STEPS * batch_tokens and len(group := list(islice(rows, lists or 1))) == (lists or 1):
            buffer += group
            for row in group:
                table.add(row)
            if lists is None:
                tokens += len(group[0].ids) + behind
            else:
                # Tokens shared by the examples of a list are computed once.
                packed.append(pack_into_one_bin(group))
                tokens += packed[-1].columns
        if not buffer:
            break
        if lists is not None:
            cut = _packed_steps(packed, batch_tokens)
        elif width is None:
            cut = _padded_steps(buffer, batch_tokens, behind)
        else:
            cut = _packed_steps(pack_into_bins(buffer, min(width, batch_tokens)), batch_tokens)
        rng.shuffle(cut)
        numbers = {id(row): first + n for n, row in enumerate(buffer)}
        for step in cut[: steps - len(planned)]:
            planned.add(step, numbers)
    return planned if lists is None else planned.weighing([float(n % lists == 0) for n in range(len(table))])


def _padded_steps(rows: Sequence[TokenRow], batch_tokens: int, behind: int) -> list[Step]:
    lengths = [len(row.ids) + behind for row in rows]
    return [Step(tuple(rows[n] for n in indices)) for indices in group_by_length(lengths, batch_tokens)]


def _packed_steps(packed: Sequence[PackedRows], batch_tokens: int) -> list[Step]:
    columns = [item.columns for item in packed]
    groups = [tuple(packed[n] for n in indices) for indices in group_by_length(columns, batch_tokens)]
    return [Step(tuple(row for item in group for row in item.rows), group) for group in groups]


def micro_batch_indices(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Split examples into parts of at most ``limit`` padded tokens, and return the indices of each part.

    A longer row is a separate part. None: one part.
    """
    if limit is None or len(lengths) * max(lengths, default=0) <= limit:
        return [list(range(len(lengths)))]
    return group_by_length(lengths, limit)


def micro_steps(step: Step, limit: int | None) -> list[Step]:
    """Split a step into parts of at most ``limit`` padded tokens; see `micro_batch_indices`."""
    parts = micro_batch_indices(step.sizes, limit)
    return [step] if len(parts) == 1 else [step.part(numbers) for numbers in parts]


def truncated_row(example: Example, encoder: Encoder, limit: int) -> TokenRow | None:
    """Tokenise an example and truncate it to ``limit`` tokens; None if no target is left.

    The remaining targets see the same context as before.
    """
    row = encoder.row(example)
    if len(row.ids) > limit:
        row = TokenRow(row.ids[:limit], row.labels[:limit])
    return row if row.targets else None


def pad_rows(rows: Sequence[TokenRow], pad: int) -> tuple[list[list[int]], list[list[int]]]:
    """Pad token ids and labels on the right to the length of the longest example."""
    return _padded([row.ids for row in rows], pad), _padded([row.labels for row in rows], IGNORED)


def padded_inputs(model: torch.nn.Module, rows: Sequence[TokenRow], pad: int) -> dict[str, Any]:
    """Return the inputs of `llmrec.train.loss.rows_loss` for this model, as padded lists."""
    weighted = {"weights": [row.weight for row in rows]} if any(row.weight != 1.0 for row in rows) else {}
    if is_encoder_decoder(model.config):
        return encoder_decoder_inputs(rows, pad) | weighted
    ids, labels = pad_rows(rows, pad)
    return {"input_ids": ids, "labels": labels} | weighted


@dataclass(frozen=True)
class RatingClasses:
    """Maps each target of a training example to its value on the rating scale, for rating heads."""

    encoder: Encoder
    scale: RatingScale
    _texts: dict[tuple[int, ...], str] = field(default_factory=dict)

    def row(self, row: TokenRow) -> TokenRow | None:
        """Replace the labels of an example by indices on the rating scale; None if no target is left.

        A truncated target that could be a different value, such as the 1 of a 10, has no loss.
        """
        labels = [IGNORED] * len(row.ids)
        for start, end in target_spans(row.labels):
            label = self._class_index(row.labels[start:end], last=end == len(row.ids))
            if label is not None:
                labels[start] = label
        labelled = TokenRow(row.ids, tuple(labels))
        return labelled if labelled.targets else None

    def counts(self, rows: Iterable[TokenRow]) -> list[int]:
        """Return how often each value of the rating scale is a target, lowest value first."""
        result = [0] * len(self.scale.values)
        for row in rows:
            for label in row.labels:
                if label != IGNORED:
                    result[label] += 1
        return result

    def _class_index(self, run: tuple[int, ...], *, last: bool) -> int | None:
        """Return the index of a target on the rating scale; None if it is not a valid rating."""
        if run not in self._texts:
            self._texts[run] = self.encoder.tokenizer.decode(list(run), skip_special_tokens=True)
        text = self._texts[run]
        value = parse_number(text, self.scale.low, self.scale.high)
        if value is None:
            return None
        label = self.scale.label(value)
        open_ended = last and run[-1] != self.encoder.end_id and text.endswith(label)
        if open_ended and any(other != label and other.startswith(label) for other in self.scale.labels):
            return None
        return self.scale.labels.index(label)


@dataclass(slots=True)
class AnswerLabels:
    """Maps each target of a training example to a label, which the first token of the answer identifies.

    Labels are numbered in the order of addition: first those that a family declares, then those of examples.

    Attributes:
        encoder: The tokenizer with the soft prompts.
        limit: Maximum number of labels: one per soft prompt.
        tied: Train on labels; otherwise on tokens, and answers need not be labels.
        ids: Tokens of the labels so far; empty if answers are not labels.
        closed: Whether all training examples were read, so that no label is added.
    """

    encoder: Encoder
    limit: int
    tied: bool
    ids: list[int] = field(default_factory=list)
    closed: bool = False
    _open: bool = False

    def row(self, row: TokenRow) -> TokenRow | None:
        """Replace the labels of an example by label numbers at the start of each target.

        None if no target is left: once labels are ``closed``, other answers have no loss.

        Raises:
            RecipeError: If labels are tied, and an answer is more than one token, or there are too many labels.
        """
        if self.closed and not self.tied:
            return row
        labels = [IGNORED] * len(row.ids)
        for start, end in target_spans(row.labels):
            if not self.add(row.labels[start:end]):
                return row
            if row.labels[start] in self.ids:
                labels[start] = self.ids.index(row.labels[start])
        labelled = replace(row, labels=tuple(labels)) if self.tied else row
        return labelled if labelled.targets else None

    def add(self, answer: tuple[int, ...]) -> bool:
        """Add an answer as a label, and return whether all answers so far are labels.

        Raises:
            RecipeError: If they must be labels, and this one is more than one token or exceeds the limit.
        """
        why = "" if self.closed else self._read(answer)
        if why and self.tied:
            raise RecipeError(
                f"train.method: {why}, but option tuning needs tasks with a few one-token labels, such as ctr; "
                "exclude other tasks (train.only), or set train.method=prompt or lora",
                kind="contradiction",
                column="train.method",
            )
        if why:
            self._open = True
            self.ids.clear()
        return not self._open

    def _read(self, answer: tuple[int, ...]) -> str:
        """Add an answer as a label, or return why it cannot be one."""
        rest = [token for token in answer[1:] if token != self.encoder.end_id]
        if self.encoder.tokenizer.decode(rest).strip():
            return f"the answer {self.encoder.tokenizer.decode(list(answer))!r} is more than one token"
        if answer[0] not in self.ids and not self._open:
            if len(self.ids) == self.limit:
                return f"there are more labels than train.soft.prompts={self.limit}"
            self.ids.append(answer[0])
        return ""


def target_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return the (start, end) range of each target, given labels."""
    results: list[tuple[int, int]] = []
    for index, label in enumerate(labels):
        if label == IGNORED:
            continue
        if results and results[-1][1] == index:
            results[-1] = (results[-1][0], index + 1)
        else:
            results.append((index, index + 1))
    return results
