"""List rows from lines that are tokenised once: a table of token ids, and a gather for thousands of rows at a time.

A row of a list template is a question and a line an event. Where a line depends on its item alone, its ids are kept
in one flat array, and rows are gathered from it. `Encoder.row` cuts answers after each line and at targets, and the
tail of a line ends with a line break, so no piece spans two lines and the ids are the same by construction. A seeded
sample of every chunk is still encoded from its words and compared; at the first difference the template's rows are
encoded from their words for good.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llmrec.backends.encode import IGNORED, Encoder, TokenRow, marked_pieces
from llmrec.errors import BackendError
from llmrec.prompts.template import Template
from llmrec.tasks.base import Draw, keyed
from llmrec.tasks.rows import as_context
from llmrec.train.batches import fit_row
from llmrec.types import Event, Example

log = logging.getLogger(__name__)

# Rows read ahead: few at first, since a short run takes few, then as many as make numpy worth its calls.
_FIRST_CHUNK, _LARGEST_CHUNK = 64, 4096
# Of every chunk, one row in so many is also encoded from its words, and at least so many.
_ONE_IN, _LEAST_CHECKED = 128, 8


@runtime_checkable
class Drawing(Protocol):
    """A task whose training rows can be had before they are put into words."""

    def draws(self, limit: int | None = None) -> Iterator[Draw]:
        """Yield drawn rows in the order of ``examples("train")``."""
        ...

    def example(self, draw: Draw) -> Example:
        """Put a drawn row into words."""
        ...


def takes_pieces(template: Template) -> bool:
    """Whether every line of a template depends on its item alone, and none runs into the next."""
    closed = template.tail.endswith("\n") or template.bare
    return template.shape == "list" and closed and template.names("lead", "target") <= {"item", "noun"}


@dataclass(frozen=True, slots=True)
class Gathered:
    """Rows one after the other.

    Attributes:
        ids: Token ids, shape (tokens,).
        labels: The same where there is loss, and -100 elsewhere; shape (tokens,).
        ends: Where each row ends, and before them 0; shape (rows + 1,).
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    ends: NDArray[np.int64]

    def rows(self, limit: int) -> list[TokenRow | None]:
        """Cut rows to ``limit`` tokens at their end, as `fit_row` does; None where no target is left."""
        starts, stops = self.ends[:-1], np.minimum(self.ends[1:], self.ends[:-1] + limit)
        seen = np.concatenate([[0], np.cumsum(self.labels != IGNORED)])
        kept = (seen[stops] > seen[starts]).tolist()
        # One tuple of all rows, whose slices are tuples again: no Python number is made twice.
        ids, labels = tuple(self.ids.tolist()), tuple(self.labels.tolist())
        spans = zip(starts.tolist(), stops.tolist(), kept, strict=True)
        return [TokenRow(ids[start:stop], labels[start:stop]) if keep else None for start, stop, keep in spans]


class LineTable:
    """The questions and lines of one template as token ids.

    An entry is a stretch of two flat arrays, of ids and of labels. Every item has two, one after the other: its line as
    context, and as something to learn.
    """

    def __init__(self, task: Drawing, template: Template, encoder: Encoder) -> None:
        self._task, self._template, self._encoder = task, template, encoder
        self._ids, self._labels = array("i"), array("i")
        self._ends = array("q", [0])
        self._lines: dict[str, int] = {}
        self._questions: dict[str | None, int] = {}
        self._one_question = template.names("system", "user") <= {"noun"}
        self._arrays: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]] | None = None

    def gather(self, draws: Sequence[Draw]) -> Gathered:
        """Put rows together.

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
        # The question stands at 0, the first event at 1; a learned line is the entry after the line as context.
        place = np.arange(len(entries)) - np.repeat(bounds[:-1], counts)
        entries += place > np.repeat(first, counts)
        ids, labels, bounds_of = self._tables()
        starts = bounds_of[entries]
        lengths = bounds_of[entries + 1] - starts
        ends = np.cumsum(lengths)
        # Where every token of the rows lies in the table.
        source = np.arange(int(ends[-1]))
        source += np.repeat(starts - ends + lengths, lengths)
        return Gathered(ids.take(source), labels.take(source), np.concatenate([[0], ends[bounds[1:] - 1]]))

    def _numbers(self, draws: Sequence[Draw]) -> Iterator[int]:
        """Return the entries of all rows, lines as context.

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

    def _learn(self, draws: Sequence[Draw]) -> None:
        """Tokenise the questions and lines that are new; the task puts each into words, in a row of its own."""
        for draw in draws:
            asked = None if self._one_question else draw.user_id
            if asked not in self._questions:
                ids = self._encoder.chat(self._words(draw.user_id).messages)
                self._questions[asked] = self._add(ids, [IGNORED] * len(ids))
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
        return self._task.example(Draw("", user, self._template, events, 0))

    def _add(self, ids: Sequence[int], labels: Sequence[int]) -> int:
        self._ids.extend(ids)
        self._labels.extend(labels)
        self._ends.append(len(self._ids))
        self._arrays = None
        return len(self._ends) - 2

    def _tables(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """Return ids, labels, and where entries begin and the last one ends."""
        if self._arrays is None:
            ids, labels = (np.array(each, dtype=np.int32) for each in (self._ids, self._labels))
            self._arrays = ids, labels, np.array(self._ends, dtype=np.int64)
        return self._arrays


class RowStream:
    """The training rows of a task that can be drawn before they are put into words.

    Iterating gives what ``fit_row(example, encoder, limit)`` gives for each of the task's examples, in order: what a
    row shows is drawn by the task either way, and reading ahead changes no draw.

    Attributes:
        gathered: Rows that were put together from lines.
        encoded: Rows that were encoded from their words, those for comparison left out.
    """

    def __init__(self, task: Drawing, encoder: Encoder, *, limit: int, seed: int) -> None:
        self._task, self._encoder, self._limit, self._seed = task, encoder, limit, seed
        self._tables: dict[str, LineTable | None] = {}
        self.gathered = self.encoded = 0

    def __iter__(self) -> Iterator[TokenRow | None]:
        draws, size, number = self._task.draws(), _FIRST_CHUNK, 0
        while chunk := list(islice(draws, size)):
            yield from self.encode(chunk, number)
            size, number = min(2 * size, _LARGEST_CHUNK), number + 1

    def encode(self, draws: Sequence[Draw], number: int = 0) -> Iterator[TokenRow | None]:
        """Yield the rows of drawn ones; ``number`` seeds which of them are compared."""
        found: dict[int, TokenRow | None] = {}
        for template in {draw.template.id: draw.template for draw in draws}.values():
            places = [n for n, draw in enumerate(draws) if draw.template.id == template.id]
            rows = self._gather(template, [draws[n] for n in places], number)
            if rows is not None:
                found.update(zip(places, rows, strict=True))
        self.gathered += len(found)
        self.encoded += len(draws) - len(found)
        for n, draw in enumerate(draws):
            yield found[n] if n in found else self._plain(draw)

    def _plain(self, draw: Draw) -> TokenRow | None:
        return fit_row(self._task.example(draw), self._encoder, self._limit)

    def _gather(self, template: Template, draws: Sequence[Draw], number: int) -> list[TokenRow | None] | None:
        """Return gathered rows that a sample proves, or None: then they are to be encoded from their words."""
        if template.id not in self._tables:
            fits = takes_pieces(template)
            self._tables[template.id] = LineTable(self._task, template, self._encoder) if fits else None
        table = self._tables[template.id]
        if table is None:
            return None
        try:
            rows = table.gather(draws).rows(self._limit)
        except BackendError:
            # A text cannot be tokenised. Its own row says so, if it is ever reached.
            self._tables[template.id] = None
            return None
        count = min(len(draws), max(_LEAST_CHECKED, len(draws) // _ONE_IN))
        sample = keyed("pieces", self._seed, template.id, str(number)).sample(range(len(draws)), count)
        if all(rows[n] == self._plain(draws[n]) for n in sample):
            return rows
        log.warning("%s: lines tokenised alone differ from whole rows, so rows are encoded one by one", template.id)
        self._tables[template.id] = None
        return None
