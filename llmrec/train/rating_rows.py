"""Training rows of a rating head: those of tokens, with classes in place of target tokens.

A target's class stands where its first token stood, and the other tokens of a target bear no loss. So a row is planned,
counted, packed and resumed as before, and what is read is the state before each rating: in a chat row that of the
prompt's last token, in a list row every point at which evaluation would ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmrec.backends.encode import IGNORED, Encoder, Row
from llmrec.tasks.rating import Scale
from llmrec.tasks.reading import read_number


@dataclass(frozen=True)
class Classes:
    """Reads off a training row which value of the scale each of its targets is."""

    encoder: Encoder
    scale: Scale
    _texts: dict[tuple[int, ...], str] = field(default_factory=dict)

    def row(self, row: Row) -> Row | None:
        """Return the row with places on the scale as labels; None if no target is left.

        A target that was cut with its row, so that it might be another one, bears no loss: the 1 of a 10.
        """
        labels = [IGNORED] * len(row.ids)
        for start, end in _runs(row.labels):
            found = self._place(row.labels[start:end], last=end == len(row.ids))
            if found is not None:
                labels[start] = found
        made = Row(row.ids, tuple(labels), row.lines)
        return made if made.targets else None

    def counts(self, rows: Iterable[Row]) -> list[int]:
        """Return how often each value is a target of rows that `row` made, lowest first."""
        found = [0] * len(self.scale.values)
        for row in rows:
            for label in row.labels:
                if label != IGNORED:
                    found[label] += 1
        return found

    def _place(self, run: tuple[int, ...], *, last: bool) -> int | None:
        """Return the place of a target's tokens on the scale; None where they are no value, or may be half of one."""
        if run not in self._texts:
            self._texts[run] = self.encoder.tokenizer.decode(list(run), skip_special_tokens=True)
        text = self._texts[run]
        value = read_number(text, self.scale.low, self.scale.high)
        if value is None:
            return None
        label = self.scale.label(value)
        open_ended = last and run[-1] != self.encoder.end_id and text.endswith(label)
        if open_ended and any(other != label and other.startswith(label) for other in self.scale.labels):
            return None
        return self.scale.labels.index(label)


def _runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return where stretches of labels begin and end: one a target, since a list names an item before each."""
    found: list[tuple[int, int]] = []
    for place, label in enumerate(labels):
        if label == IGNORED:
            continue
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found
