"""Looks for held-out items of the alignment task in its training rows, examples and candidate sets.

Here no user's interaction is held out, but an item's pair of code and text: no row may show the one or the other, and a
question must not be answered by the look of its candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice

from llmrec.guard import clean, without_item_tokens
from llmrec.index.titles import shown
from llmrec.pipeline.leaks.checks import Check, verdict
from llmrec.pipeline.row_specs import asks
from llmrec.pipeline.study import Study
from llmrec.types import Case, Example

FAMILY = "alignment"


def checks(study: Study, count: int) -> Iterator[Check]:
    """Yield the checks of the alignment task, none where a study does not have it.

    Args:
        study: What was run.
        count: How many training rows were drawn.
    """
    if study.held is None:
        return
    task = study.tasks[FAMILY]
    held = study.held.items
    secrets = _Pairs(study, held)
    if FAMILY in study.shares:
        rows = islice(study.training_examples(FAMILY), count)
        places = [f"row {row.id}: {what}" for row in rows for what in secrets.shown(row)]
        yield verdict("held-out items in training rows of alignment", f"{count:,} rows", places)
    cases = study.cases(FAMILY)
    if asks(study.recipe, FAMILY, "few-shot"):
        shots = study.recipe.eval.shots.k
        drawn = (
            (case, event) for case in cases for w in task.draw_shots(case.request, shots).windows for event in w.events
        )
        places = [f"request {case.request.id}: item {event.item_id}" for case, event in drawn if event.item_id in held]
        yield verdict("held-out items in few-shot examples of alignment", f"{len(cases):,} requests", places)
    part = set(study.held.part(study.recipe.eval.split))
    yield verdict("alignment candidates", f"{len(cases):,} sets", [w for case in cases for w in _wrong(case, part)])


class _Pairs:
    """Titles and codes of held-out items."""

    def __init__(self, study: Study, held: frozenset[str]) -> None:
        self._held = held
        items, index = study.data.dataset.items, study.index
        self._titles = {item: shown(item, items[item]) for item in held}
        self._items = {_line(index.encode(item)): item for item in held} if index is not None else {}

    def shown(self, row: Example) -> Iterator[str]:
        """Yield the held-out items that a row declares, or shows by code and title."""
        yield from (f"item {item}" for _, item in row.pairs if item in self._held)
        segments = chain(*(message.segments for message in row.messages), row.answer)
        said = {_line(segment.text) for segment in segments if segment.kind != "text"}
        # A code of digits may equal a year by chance, so that it alone means nothing.
        for item in sorted(self._items[text] for text in said & self._items.keys()):
            if self._titles[item] in said:
                yield f"code and title of item {item}"


def _line(text: str) -> str:
    return without_item_tokens(clean(text)).strip()


def _wrong(case: Case, part: set[str]) -> Iterator[str]:
    """Yield what is wrong with a set of candidates: each holds the answer, and nothing but items that can be one."""
    candidates, name = case.request.candidates or (), case.request.id
    if case.truth not in candidates:
        yield f"request {name}: the answer is missing"
    yield from (f"request {name}: {item} stands twice" for item, n in Counter(candidates).items() if n > 1)
    yield from (f"request {name}: {item} is never an answer" for item in candidates if item not in part)
    if case.request.item is not None:
        yield f"request {name}: it names the answer"
