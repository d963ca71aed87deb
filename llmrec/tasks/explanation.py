"""Explanation: in this user's words, why does this item suit them?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from llmrec.data.candidates import CandidateSets
from llmrec.data.split import SplitDataset, request_id
from llmrec.errors import DataError, RecipeError
from llmrec.guard import TEXT_LIMIT
from llmrec.prompts import Template, clean
from llmrec.recipe import ExplanationSection
from llmrec.tasks.common import (
    ABOUT_ITEM,
    ABOUT_USER,
    Values,
    View,
    asked_item,
    chat_example,
    choose,
    held_out,
    passes,
    refuse_test,
    solved,
    with_shots,
)
from llmrec.tasks.fewshot import Drawn, ShotPool
from llmrec.types import Answer, Case, Event, Example, Family, ItemCodes, Message, Prompt, Request, SplitName, Text


class ExplanationTask:
    """The explanation family: what the user wrote about earlier items, an item, and the text to be written."""

    family: Family = "explanation"

    def __init__(
        self,
        data: SplitDataset,
        section: ExplanationSection,
        templates: Mapping[str, Template],
        *,
        seed: int,
        candidates: CandidateSets | None = None,
        shot_choice: str = "random",
        index: ItemCodes | None = None,
    ) -> None:
        self._data, self._section, self._seed = data, section, seed
        self._chosen = choose(self.family, section, templates, index)
        self._view = View(data, index)
        for template in templates.values():
            if template.shape == "list":
                raise RecipeError(f"template {template.id}: explanation templates ask for one text; use shape: chat")
            asked = ABOUT_USER | ABOUT_ITEM | {"history", "rating", "feature"}
            template.check(turns=asked, lead=(), target=asked | {"text"})
        self._events = {user: told for user in data.users() if (told := _told(data.train_events(user)))}
        if not self._events:
            raise DataError(
                f"tasks.explanation: {data.dataset.name} has no interaction texts to train on; name data.columns.text, "
                "give a reviews table, or drop the task"
            )
        self._shots = ShotPool(self.family, self._events, seed=seed, choice=shot_choice, least=1)

    @property
    def eval_templates(self) -> tuple[str, ...]:
        """Names of the templates that evaluation asks with."""
        return self._chosen.evaluate

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield rows with targets; see `Task`."""
        refuse_test(split)
        if split == "valid":
            for case in self.cases("valid")[:limit]:
                request = case.request
                past = _told(request.history)[-self._section.history :]
                event = Event(item_id=asked_item(request, self.family), text=str(case.truth))
                values = self._values(request.user_id, past, event.item_id, request.context)
                row = f"explanation/valid/{request.id}"
                yield self._example(self._chosen.train[0], row, request.user_id, values, past, event)
            return
        for row, user, rng in passes(self.family, list(self._events), self._seed, limit):
            template = rng.choice(self._chosen.train)
            events = self._events[user]
            at = rng.randrange(len(events))
            past = events[max(0, at - self._section.history) : at]
            yield self._example(template, row, user, self._solved_values(user, past, events[at]), past, events[at])

    def cases(self, split: SplitName) -> list[Case]:
        """Return the held-out texts; an interaction without one is no case.

        The context holds the interaction's rating where there is one: whether it is shown is the template's choice.
        """
        return [
            Case(
                request=Request(
                    id=request_id(held.user_id, held.item_id),
                    user_id=held.user_id,
                    history=self._data.history(held.user_id, split),
                    item=held.item_id,
                    context={} if held.rating is None else {"rating": rating_text(held.rating)},
                ),
                truth=text,
            )
            for held in held_out(self._data, split)
            if (text := clean(held.text or "", TEXT_LIMIT))
        ]

    def prompt(self, request: Request, *, template: str, shots: int = 0) -> Prompt:
        """Render a request; see `Task`."""
        chosen = self._chosen.get(template)
        drawn = self.draw_shots(request, shots)
        turns: list[tuple[Message, ...]] = []
        for shot in drawn.windows:
            values = self._solved_values(shot.user_id, shot.events[:-1], shot.events[-1])
            turns.append(solved(chosen, values, chosen.step(values | {"text": _text(shot.events[-1])})[1]))
        values = self._values(request.user_id, drawn.history, asked_item(request, self.family), request.context)
        return Prompt(messages=with_shots(chosen.turns(values), turns))

    def draw_shots(self, request: Request, shots: int) -> Drawn:
        """Return the training events that few-shot examples show, and the history that the question keeps."""
        return self._shots.draw(request, _told(request.history), shots, self._section.history)

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        """Return nothing: a text is generated, not chosen."""
        return ()

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Return the completion as one clean line; None if nothing is left."""
        text = clean(completion, TEXT_LIMIT)
        return Text(request_id=request.id, text=text) if text else None

    def reward(self, answer: Answer, case: Case) -> float:
        """Return the F1 of the words that the text and the true one share."""
        if not isinstance(answer, Text):
            return 0.0
        written, true = _bag(answer.text), _bag(str(case.truth))
        shared = (written & true).total()
        return 2 * shared / (written.total() + true.total()) if shared else 0.0

    # ----------------------------------------------------------------------- building blocks

    def _values(self, user: str, past: Sequence[Event], item: str, context: Mapping[str, str]) -> Values:
        hints = {"rating": context.get("rating"), "feature": context.get("feature")}
        history = self._view.events(past, rating_text)
        return self._view.user(user, context) | self._view.about(item) | {"history": history} | hints

    def _solved_values(self, user: str, past: Sequence[Event], event: Event) -> Values:
        context = {} if event.rating is None else {"rating": rating_text(event.rating)}
        return self._values(user, past, event.item_id, context)

    def _example(
        self, template: Template, row: str, user: str, values: Values, past: Sequence[Event], event: Event
    ) -> Example:
        answer = values | {"text": _text(event)}
        return chat_example(template, row, user, values, answer, past=past, event=event)


def rating_text(rating: float) -> str:
    """Return a rating as a hint shows it: ``4`` or ``4.5``."""
    return f"{rating:g}"


def _text(event: Event) -> str:
    return clean(event.text or "", TEXT_LIMIT)


def _told(events: Sequence[Event]) -> tuple[Event, ...]:
    return tuple(event for event in events if _text(event))


def _bag(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.casefold()))
