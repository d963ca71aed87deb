"""Tokenises the training examples of the tasks.

An encoder-decoder has one row per target. Packed families whose question follows the history share one history. Tasks
that can draw examples before rendering them are assembled from lines that are tokenised once. All other examples are
encoded from their text.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llmrec.backends.encode import IGNORED, Encoder, TokenRow, marked_pieces
from llmrec.errors import BackendError, DataError, RecipeError
from llmrec.prompts.template import Template
from llmrec.recipe.schema import TrainSection
from llmrec.tasks.base import ExampleDraw, seeded_random
from llmrec.tasks.rows import Listwise, as_context, split_rejected
from llmrec.tasks.task import BranchingTask, Task
from llmrec.train.batches import target_rows, truncated_row
from llmrec.types import Event, Example


@dataclass(frozen=True, slots=True)
class TextRow(TokenRow):
    """A tokenised training example with its text."""

    example: Example | None = None


def _example_row(example: Example, encoder: Encoder, limit: int, *, texts: bool) -> TokenRow | None:
    row = truncated_row(example, encoder, limit)
    return row if row is None or not texts else TextRow(row.ids, row.labels, example=example)


# Draws the examples of a user together, so that tasks whose question follows the history can share the history.


def branching_rows(
    tasks: Mapping[str, BranchingTask],
    weights: Mapping[str, float],
    users: Sequence[str],
    encoder: Encoder,
    *,
    limit: int,
    seed: int,
    texts: bool = False,
) -> Iterator[tuple[str, TokenRow | None]]:
    """Yield tasks and tokenised examples endlessly, with all examples of a user together.

    For each user, the family furthest below its share of tokens yields a row, and so does every other family unless it
    would exceed its share. So after any number of users each family is within two rows of its share. Longer rows than
    ``limit`` are truncated, or None if no target is left.

    Raises:
        DataError: If a pass over all users gives no row.
    """
    served = dict.fromkeys(sorted(tasks), 0.0)
    number = 0
    while True:
        order = sorted(users)
        seeded_random("branch order", seed, str(number)).shuffle(order)
        before = sum(served.values())
        for user in order:
            bar = math.inf
            for family in sorted(served, key=lambda name: served[name] / weights[name]):
                if served[family] / weights[family] > bar:
                    break
                example = tasks[family].branch(number, user)
                if example is None:
                    continue
                row = _example_row(example, encoder, limit, texts=texts)
                served[family] += max(1, len(row.ids)) if row else 1
                bar = min(bar, served[family] / weights[family])
                yield family, row
        if sum(served.values()) == before:
            names = ", ".join(served)
            raise DataError(
                f"tasks {names}: no user has enough training interactions; use more data or remove a task",
                kind="too-few",
            )
        number += 1


# All answers to one question, for a loss over answers scored by the likelihoods of their texts.
#
# Training learns the order that `llmrec.strategies.pointwise.LikelihoodRanker` uses: the score of an answer is log
# P(text | prompt), summed over its tokens. All answers to a question are in one packed sequence, so that the prompt
# is read once and every score is exact. With one chosen candidate per list, ListNet's top-one loss (Cao et al., ICML
# 2007), and ListMLE and PListMLE (Xia et al., ICML 2008; Lan et al., UAI 2014) truncated after the first rank, are
# `softmax`; `lambda` weights pairs by the change in NDCG when they are swapped. Preference losses, which
# compare a model with its initial state, read the same rows: `llmrec.train.preference`.


def common_listwise_settings(tasks: Mapping[str, Task], *, preference: bool, paired: str | None) -> Listwise | None:
    """Return the listwise settings shared by all tasks; None if examples are trained token by token.

    ``paired`` names the model if it is an encoder-decoder.

    Raises:
        RecipeError: If listwise families are trained together with others, a family does not support preference
            training, or the model is an encoder-decoder.
    """
    result = {family: task.listwise for family, task in tasks.items() if task.listwise is not None}
    if not (result or preference):
        return None
    family = next(iter(result or tasks))
    others = [name for name in tasks if name != family]
    key, instead = ("train.preference", "null") if preference else (f"tasks.{family}.loss", "answer")
    if family not in result:
        reason = f"examples of tasks.{family} have no rejected answers; train another task (train.only)"
    elif paired is not None:
        reason = f"{paired} is an encoder-decoder, which does not support packing; choose another model"
    elif others:
        reason = (
            f"lists of tasks.{family} cannot be trained together with tasks.{others[0]}; train only one of these "
            "tasks (train.only)"
        )
    else:
        return result[family]
    raise RecipeError(f"{key}: {reason}, or set it to {instead}", kind="contradiction", column=key)


def candidate_list_rows(
    listwise: Listwise, examples: Iterable[Example], encoder: Encoder, limit: int
) -> Iterator[TokenRow | None]:
    """Yield the tokenised answers to each question, the chosen answer first; None if one is longer than ``limit``.

    A truncated text would have a different likelihood.

    Raises:
        RecipeError: If an example has fewer answers.
    """
    for example in examples:
        rows = [encoder.row(item) for item in split_rejected(example)]
        if len(rows) != listwise.size:
            raise RecipeError(
                f"train.preference.negatives: example {example.id} has {len(rows) - 1} other answers, but "
                f"{listwise.size - 1} are requested; set train.preference.negatives={max(1, len(rows) - 1)}, or choose "
                "other templates",
                kind="too-large",
                column="train.preference.negatives",
            )
        if any(len(row.ids) > limit for row in rows):
            yield None
        else:
            yield from rows


# Examples in list form from lines that are tokenised once: a table of token ids, from which thousands of examples are
# assembled at a time.
#
# A row of a list template is a question and one line per interaction. If a line depends only on its item, its ids are
# kept in one flat array, and rows are gathered from it. `Encoder.row` splits answers after each line and at
# targets, and the tail of a line ends with a line break, so no piece spans two lines and the ids are the same by
# construction. A seeded sample of every chunk is also encoded from its text and compared; after the first
# difference all rows of the template are encoded from their texts.


log = logging.getLogger(__name__)

# Examples to read ahead: few at first, since a short run needs few, then enough for numpy to be efficient.
_FIRST_CHUNK, _LARGEST_CHUNK = 64, 4096
# In each chunk, every `_CHECK_INTERVAL`-th example is also tokenised from its text, and at least `_LEAST_CHECKED`.
_CHECK_INTERVAL, _LEAST_CHECKED = 128, 8


@runtime_checkable
class DrawableTask(Protocol):
    """A task whose training examples can be drawn before they are rendered as text."""

    def draws(self, limit: int | None = None) -> Iterator[ExampleDraw]:
        """Yield drawn examples in the order of ``examples("train")``."""
        ...

    def example(self, draw: ExampleDraw) -> Example:
        """Render a drawn example."""
        ...


def has_independent_lines(template: Template) -> bool:
    """Whether every line of a template depends only on its item and can be tokenised independently of other lines."""
    closed = template.tail.endswith("\n") or template.bare
    return template.shape == "list" and closed and template.names("lead", "target") <= {"item", "noun"}


@dataclass(frozen=True, slots=True)
class ConcatenatedExamples:
    """Concatenated tokenised examples.

    Attributes:
        ids: Token ids, shape (tokens,).
        labels: Token ids where there is loss, -100 elsewhere; shape (tokens,).
        ends: 0, followed by the end of each row; shape (rows + 1,).
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    ends: NDArray[np.int64]

    def rows(self, limit: int) -> list[TokenRow | None]:
        """Truncate examples to ``limit`` tokens, as `truncated_row` does; None if no target is left."""
        starts, stops = self.ends[:-1], np.minimum(self.ends[1:], self.ends[:-1] + limit)
        seen = np.concatenate([[0], np.cumsum(self.labels != IGNORED)])
        kept = (seen[stops] > seen[starts]).tolist()
        # slices of one tuple share its integer objects
        ids, labels = tuple(self.ids.tolist()), tuple(self.labels.tolist())
        spans = zip(starts.tolist(), stops.tolist(), kept, strict=True)
        return [TokenRow(ids[start:stop], labels[start:stop]) if keep else None for start, stop, keep in spans]


class LineTable:
    """The questions and lines of a template as token ids.

    An entry is a span of two flat arrays, of ids and of labels. Every item has two consecutive entries: its line as
    context and as a target.
    """

    def __init__(self, task: DrawableTask, template: Template, encoder: Encoder) -> None:
        self._task, self._template, self._encoder = task, template, encoder
        self._ids, self._labels = array("i"), array("i")
        self._ends = array("q", [0])
        self._lines: dict[str, int] = {}
        self._questions: dict[str | None, int] = {}
        self._one_question = template.names("system", "user") <= {"noun"}
        self._arrays: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]] | None = None

    def gather(self, draws: Sequence[ExampleDraw]) -> ConcatenatedExamples:
        """Assemble tokenised examples from the table.

        Raises:
            BackendError: If a text would become a control token.
        """
        try:
            numbers = self._numbers(draws)
        except KeyError:
            self._learn(draws)
            numbers = self._numbers(draws)
        entries = np.fromiter(numbers, dtype=np.int64)
        counts = np.array([1 + len(draw.events) for draw in draws])
        first = np.array([draw.first_target for draw in draws])
        bounds = np.concatenate([[0], np.cumsum(counts)])
        # The question has index 0 and the first interaction 1; a target line follows the same line as context.
        position = np.arange(len(entries)) - np.repeat(bounds[:-1], counts)
        entries += position > np.repeat(first, counts)
        ids, labels, bounds_of = self._tables()
        starts = bounds_of[entries]
        lengths = bounds_of[entries + 1] - starts
        ends = np.cumsum(lengths)
        # The table index of every token of the examples.
        source = np.arange(int(ends[-1]))
        source += np.repeat(starts - ends + lengths, lengths)
        return ConcatenatedExamples(ids.take(source), labels.take(source), np.concatenate([[0], ends[bounds[1:] - 1]]))

    def _numbers(self, draws: Sequence[ExampleDraw]) -> Iterator[int]:
        """Return the table entries of all examples.

        Raises:
            KeyError: If a question or line is not in the table yet.
        """
        lines, questions, one = self._lines, self._questions, self._one_question
        return chain.from_iterable(
            [
                [questions[None if one else draw.user_id], *[lines[event.item_id] for event in draw.events]]
                for draw in draws
            ]
        )

    def _learn(self, draws: Sequence[ExampleDraw]) -> None:
        """Tokenise new questions and lines, after rendering each as an example of the task."""
        for draw in draws:
            user = None if self._one_question else draw.user_id
            if user not in self._questions:
                ids = self._encoder.chat(self._words(draw.user_id).messages)
                self._questions[user] = self._add(ids, [IGNORED] * len(ids))
            for event in draw.events:
                if event.item_id not in self._lines:
                    self._lines[event.item_id] = self._line(draw.user_id, event)

    def _line(self, user: str, event: Event) -> int:
        answer = self._words(user, Event(item_id=event.item_id)).answer
        context = [i for text, _ in marked_pieces(as_context(answer)) for i in self._encoder.piece(text)]
        number = self._add(context, [IGNORED] * len(context))
        learned = [(i, is_target) for text, is_target in marked_pieces(answer) for i in self._encoder.piece(text)]
        self._add([i for i, _ in learned], [i if is_target else IGNORED for i, is_target in learned])
        return number

    def _words(self, user: str, *events: Event) -> Example:
        return self._task.example(ExampleDraw("", user, self._template, events, 0))

    def _add(self, ids: Sequence[int], labels: Sequence[int]) -> int:
        self._ids.extend(ids)
        self._labels.extend(labels)
        self._ends.append(len(self._ids))
        self._arrays = None
        return len(self._ends) - 2

    def _tables(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """Return the token ids and labels of all entries, and the offsets of the entries."""
        if self._arrays is None:
            ids, labels = (np.array(item, dtype=np.int32) for item in (self._ids, self._labels))
            self._arrays = ids, labels, np.array(self._ends, dtype=np.int64)
        return self._arrays


class RowStream:
    """The tokenised training examples of a task that can draw examples before rendering them.

    Iterating gives the same as ``fit_row(example, encoder, limit)`` for each of the task's examples, in order.

    Attributes:
        gathered: The number of rows assembled from lines.
        encoded: The number of rows encoded from their text, without those encoded for comparison.
    """

    def __init__(self, task: DrawableTask, encoder: Encoder, *, limit: int, seed: int) -> None:
        self._task, self._encoder, self._limit, self._seed = task, encoder, limit, seed
        self._tables: dict[str, LineTable | None] = {}
        self.gathered = self.encoded = 0

    def __iter__(self) -> Iterator[TokenRow | None]:
        draws, size, number = self._task.draws(), _FIRST_CHUNK, 0
        while chunk := list(islice(draws, size)):
            yield from self.encode(chunk, number)
            size, number = min(2 * size, _LARGEST_CHUNK), number + 1

    def encode(self, draws: Sequence[ExampleDraw], number: int = 0) -> Iterator[TokenRow | None]:
        """Yield the tokenised examples of a chunk; ``number`` seeds the choice of examples to verify."""
        result: dict[int, TokenRow | None] = {}
        for template in {draw.template.id: draw.template for draw in draws}.values():
            indices = [n for n, draw in enumerate(draws) if draw.template.id == template.id]
            rows = self._gather(template, [draws[n] for n in indices], number)
            if rows is not None:
                result.update(zip(indices, rows, strict=True))
        self.gathered += len(result)
        self.encoded += len(draws) - len(result)
        for n, draw in enumerate(draws):
            yield result[n] if n in result else self._plain(draw)

    def _plain(self, draw: ExampleDraw) -> TokenRow | None:
        return truncated_row(self._task.example(draw), self._encoder, self._limit)

    def _gather(self, template: Template, draws: Sequence[ExampleDraw], number: int) -> list[TokenRow | None] | None:
        """Return assembled examples if a sample matches the tokenised text; None otherwise."""
        if template.id not in self._tables:
            fits = has_independent_lines(template)
            self._tables[template.id] = LineTable(self._task, template, self._encoder) if fits else None
        table = self._tables[template.id]
        if table is None:
            return None
        try:
            rows = table.gather(draws).rows(self._limit)
        except BackendError:
            # A text cannot be tokenised; the error is raised when its example is used.
            self._tables[template.id] = None
            return None
        count = min(len(draws), max(_LEAST_CHECKED, len(draws) // _CHECK_INTERVAL))
        sample = seeded_random("pieces", self._seed, template.id, str(number)).sample(range(len(draws)), count)
        if all(rows[n] == self._plain(draws[n]) for n in sample):
            return rows
        log.warning(
            "%s: the tokens of a line depend on the text around it, so texts are tokenised one by one",
            template.id,
        )
        self._tables[template.id] = None
        return None


@dataclass(frozen=True)
class ExampleSources:
    """The sources of training examples.

    Attributes:
        tasks: The trained families by name.
        examples: Yields the rows of a family as text, endlessly.
        users: All users.
        section: The recipe's ``train`` section.
        seed: The training seed.
        paired: Whether the model is an encoder-decoder.
    """

    tasks: Mapping[str, Task]
    examples: Callable[[str], Iterator[Example]]
    users: Sequence[str]
    section: TrainSection
    seed: int
    paired: bool


def row_streams(
    sources: ExampleSources, shares: Mapping[str, float], encoder: Encoder, *, texts: bool = False
) -> tuple[dict[str, Iterator[tuple[str, TokenRow | None]]], dict[str, float]]:
    """Return weighted streams of tokenised examples, by task or for several packed tasks.

    A row is None if none of its targets fits ``train.max_row_tokens``. With ``texts``, rows of a decoder are `TextRow`.

    Raises:
        RecipeError: If packing is requested for an encoder-decoder.
    """
    section, seed = sources.section, sources.seed
    packing = section.packing == "tree"
    if packing and sources.paired:
        raise RecipeError(
            "train.packing: an encoder-decoder does not support packing; set train.packing=none",
            kind="contradiction",
            column="train.packing",
        )
    tasks = {family: task for family in shares if isinstance(task := sources.tasks[family], BranchingTask)}
    tasks = {family: task for family, task in tasks.items() if packing and task.branches}
    # The fixed examples are selected per task, before it is known which of them could share a history.
    together = len(tasks) > 1 and section.examples is None
    alone = [family for family in shares if not together or family not in tasks]
    result: dict[str, Iterator[tuple[str, TokenRow | None]]]
    result = {family: zip(repeat(family), _task_rows(sources, family, encoder, texts)) for family in alone}
    weights = {family: shares[family] for family in alone}
    if together:
        name = " and ".join(sorted(tasks))
        result[name] = branching_rows(
            tasks, shares, sources.users, encoder, limit=section.max_row_tokens, seed=seed, texts=texts
        )
        weights[name] = sum(shares[family] for family in tasks)
    return result, weights


def _task_rows(sources: ExampleSources, family: str, encoder: Encoder, texts: bool) -> Iterator[TokenRow | None]:
    """Yield the tokenised training examples of a task endlessly."""
    task, section = sources.tasks[family], sources.section
    limit = section.max_row_tokens
    if task.listwise is not None:
        return candidate_list_rows(task.listwise, sources.examples(family), encoder, limit)
    if sources.paired:
        groups = (target_rows(example, encoder, limit) for example in sources.examples(family))
        return (row for rows in groups for row in (*rows, *([] if rows else [None])))
    # Fixed examples contain only text.
    if isinstance(task, DrawableTask) and section.examples is None and not texts:
        return iter(RowStream(task, encoder, limit=limit, seed=sources.seed))
    return (_example_row(example, encoder, limit, texts=texts) for example in sources.examples(family))


def tokenise_validation_rows(
    examples: Iterable[Example], encoder: Encoder, limit: int, *, paired: bool
) -> list[TokenRow]:
    """Tokenise held-out examples for the validation loss, and leave out examples with no target within ``limit``."""
    if paired:
        return [row for example in examples for row in target_rows(example, encoder, limit)]
    return [row for example in examples if (row := truncated_row(example, encoder, limit)) is not None]
