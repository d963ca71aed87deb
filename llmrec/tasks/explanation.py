"""Explanation: generate a text in the style of the user on why an item suits the user.

With review data, a question may also contain the feature that the text is about, or the headline of the review, as in
P5 (RecSys 2022, appendix D), which also generates a rating and a text together. The template's key ``leak`` lists the
values that a question takes from the target review.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from llmrec.data.knowledge import FACTS_FIELD, resolve_citations
from llmrec.data.split import request_of
from llmrec.errors import DataError
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.prompts.template import Template
from llmrec.recipe.schema import ExplanationSection
from llmrec.registry import BASELINES, STRATEGIES, components_for_family
from llmrec.tasks.base import (
    ABOUT_ITEM,
    ABOUT_USER,
    USER_STATS,
    DataView,
    UserHistories,
    Values,
    check_not_test,
    event_text,
    iterate_user_passes,
    requested_item,
)
from llmrec.tasks.cases import Cases, held_out_interactions
from llmrec.tasks.family import Family
from llmrec.tasks.fewshot import FewShotDraw
from llmrec.tasks.pool import with_other_texts
from llmrec.tasks.rows import chat_example, chat_shot_messages, insert_shots, merge_rejected
from llmrec.tasks.task import Task, TaskInputs, Want, check_single_answer
from llmrec.tasks.templates import check_chat_template, select_task_templates
from llmrec.types import Answer, Case, Event, Example, Interaction, Message, Prompt, Request, SplitName, Text

# A rating before the text, in answers that have both.
_RATING_PREFIX = re.compile(r"\W*\d+(?:[.,]\d+)?\s*(?:stars?)?\s*[:.,–—-]\s*(?=\S)", re.IGNORECASE)


class ExplanationTask(Task):
    """The explanation task: given a user's texts about earlier items, generate a text about another item."""

    family = "explanation"
    _column = "text"

    def __init__(self, section: ExplanationSection, inputs: TaskInputs) -> None:
        data, templates = inputs.data, inputs.templates
        self._data, self._section, self._seed = data, section, inputs.seed
        self._chosen = select_task_templates(
            self.family, section, templates, inputs.index, reviews=bool(data.dataset.reviews)
        )
        self._view = DataView(data, inputs.index)
        for template in templates.values():
            check_chat_template(template)
            variables = ABOUT_USER | ABOUT_ITEM | USER_STATS | {"history", "rating", "feature", "headline"}
            # evaluation does not ask for the rating
            shown = variables - {"rating"} if _has_rating_target(template) else variables
            template.check(turns=shown, lead=(), target=variables | {"text"})
        self._events = UserHistories(data, lambda _, events: _events_with_text(events))
        if inputs.learns and not self._events:
            raise DataError(
                f"tasks.explanation: {data.dataset.name} has no interaction texts to train on; set data.columns.text, "
                "add a table `reviews`, or remove the task",
                kind="missing-column",
                at=data.dataset.name,
                column="text",
            )
        self._listwise = inputs.listwise
        rated = [template.id for template in self._chosen.asking if _has_rating_target(template)]
        unrated = sum(event.rating is None for events in self._events.values() for event in events)
        if rated and unrated:
            raise DataError(
                f"tasks.explanation: the template {rated[0]} writes a rating before the text, but {unrated} training "
                f"texts of {data.dataset.name} have no rating; choose other templates in tasks.explanation.templates",
                kind="missing-value",
                at=data.dataset.name,
                column="tasks.explanation.templates",
            )
        self._past = inputs.past(section, self._chosen.asking)
        self._shots = inputs.shots(self.family, self._events)

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield training or validation examples; see `Task`."""
        check_not_test(split)
        if split == "valid":
            for case in self.cases("valid")[:limit]:
                request = case.request
                event = Event(item_id=requested_item(request, self.family), text=str(case.truth))
                shown = self._past.show(_events_with_text(request.history), [event.item_id])
                hints = self._hints(request.user_id, event.item_id)
                context = shown.context({**request.context, **hints})
                values = self._values(request.user_id, shown.events, event.item_id, context)
                row = f"explanation/valid/{request.id}"
                yield self._example(self._chosen.train[0], row, request.user_id, values, shown.events, event)
            return
        for row, user, rng in iterate_user_passes(self.family, list(self._events), self._seed, limit):
            template = rng.choice(self._chosen.train)
            events = self._events[user]
            at = rng.randrange(len(events))
            shown = self._past.show(events[:at], [events[at].item_id])
            values = self._solved_values(user, shown.events, events[at], shown.context({}))
            ends = [events[at]]
            if self._listwise is not None:
                ends = with_other_texts(events[at], self._events, event_text, self._listwise.size, rng)
            yield merge_rejected(self._example(template, row, user, values, shown.events, end) for end in ends)

    def cases(self, split: SplitName) -> Cases:
        """Return the held-out texts; interactions without text are left out.

        The context contains the interaction's rating, if any; the template decides whether to show it. The feature and
        the headline of a review are included only if an evaluation template shows them, since baselines use them too.
        """
        asking = [self._chosen.every[name] for name in self._chosen.evaluate]
        named = frozenset({"rating"}).union(*(template.names("system", "user") for template in asking))

        def case(held: Interaction) -> Case:
            hints = self._hints(held.user_id, held.item_id, held.rating)
            context = {name: hint for name, hint in hints.items() if name in named}
            request = request_of(self._data, held, split, item=held.item_id, context=context)
            return Case(request=request, truth=event_text(held))

        return Cases([held for held in held_out_interactions(self._data, split) if event_text(held)], case)

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        """Render a request; see `Task`."""
        check_single_answer(self.family, want)
        chosen = self._chosen.get(template)
        drawn = self.draw_shots(request, shots)
        turns: list[tuple[Message, ...]] = []
        for shot in drawn.windows:
            values = self._solved_values(shot.user_id, shot.events[:-1], shot.events[-1])
            turns.append(chat_shot_messages(chosen, values, values | {"text": event_text(shot.events[-1])}))
        context = drawn.context(request.context)
        values = self._values(request.user_id, drawn.history, requested_item(request, self.family), context)
        return Prompt(messages=insert_shots(chosen.turns(values), turns))

    def draw_shots(self, request: Request, shots: int) -> FewShotDraw:
        """Draw training interactions for few-shot examples; also return the remaining history of the question."""
        past, about = _events_with_text(request.history), [requested_item(request, self.family)]
        return self._shots.draw(request, past, shots, self._section.history, self._past.show(past, about))

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Return the generated text on one line, without citations of missing facts; None if it is empty."""
        chosen = self._chosen.every.get(template.rpartition("/")[2])
        if chosen is not None and _has_rating_target(chosen):
            rated = _RATING_PREFIX.match(completion)
            completion = completion[rated.end() :] if rated else ""
        text = clean(completion, TEXT_LIMIT)
        item = self._data.dataset.items.get(request.item or "")
        if item is not None and FACTS_FIELD in item.fields:
            text = resolve_citations(text, item.fields[FACTS_FIELD])[0]
        return Text(request_id=request.id, text=text) if text else None

    def reward(self, answer: Answer, case: Case) -> float:
        """Return the word-overlap F1 of the generated and the true text."""
        if not isinstance(answer, Text):
            return 0.0
        return word_overlap_f1(answer.text, str(case.truth))

    @property
    def strategy_options(self) -> Mapping[str, int]:
        """Maximum number of tokens of a text."""
        return {"max_tokens": self._section.max_tokens}

    # ----------------------------------------------------------------------- building blocks

    def _values(self, user: str, past: Sequence[Event], item: str, context: Mapping[str, str]) -> Values:
        hints = {name: context.get(name) for name in ("rating", "feature", "headline")}
        history = self._view.events(past, format_rating)
        return self._view.user(user, context) | self._view.pair(user, item) | {"history": history} | hints

    def _solved_values(
        self, user: str, past: Sequence[Event], event: Event, context: Mapping[str, str] | None = None
    ) -> Values:
        hints = self._hints(user, event.item_id, event.rating)
        return self._values(user, past, event.item_id, {**(context or {}), **hints})

    def _hints(self, user: str, item: str, rating: float | None = None) -> dict[str, str]:
        """Return the values of an interaction other than its text, such as the rating; missing values are left out."""
        review = self._data.dataset.reviews.get((user, item))
        message = {"feature": review.feature, "headline": review.headline} if review is not None else {}
        rated = {} if rating is None else {"rating": format_rating(rating)}
        return rated | {name: hint for name, hint in message.items() if hint}

    def _example(
        self, template: Template, row: str, user: str, values: Values, past: Sequence[Event], event: Event
    ) -> Example:
        answer = values | {"text": event_text(event)}
        return chat_example(template, row, user, values, answer, past=past, event=event)


def word_overlap_f1(generated: str, true: str) -> float:
    """Return the word-overlap F1 of two texts, in [0, 1]."""
    first, second = _count_words(generated), _count_words(true)
    shared = (first & second).total()
    return 2 * shared / (first.total() + second.total()) if shared else 0.0


def format_rating(rating: float) -> str:
    """Return a rating as written in prompts: ``4`` or ``4.5``."""
    return f"{rating:g}"


def _has_rating_target(template: Template) -> bool:
    """Whether a template asks for a rating and a text."""
    return "rating" in template.names("target")


def _events_with_text(events: Sequence[Event]) -> tuple[Event, ...]:
    return tuple(event for event in events if event_text(event))


def _count_words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.casefold()))


FAMILY = Family(
    name="explanation",
    title="Explanations",
    task=ExplanationTask,
    section=ExplanationSection,
    answer=Text,
    headline="ROUGE-L",
    strategies=components_for_family(STRATEGIES, "explanation"),
    baselines=components_for_family(BASELINES, "explanation"),
    controls=("frequent-text",),
    column="text",
    lacking="needs texts, but {data} has no texts; set {where}.columns.text, or add a second table `reviews`",
    writes="sentence",
    second_table=True,
    grounded=True,
)
