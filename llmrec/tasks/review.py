"""Reviews: predict the headline or the rating of a review (P5, RecSys 2022, appendix D).

The question shows the review and no history. One task serves two families, whose templates write ``{{ headline }}``
(family ``review``) or ``{{ rating }}`` (family ``stars``). A headline replaces an interaction's text: see
`llmrec.data.split`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

import polars as pl

from llmrec.data.split import request_id, request_of
from llmrec.errors import DataError, RecipeError
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.prompts.template import Template
from llmrec.recipe.schema import ReviewSection, StarsSection
from llmrec.registry import BASELINES, STRATEGIES, components_for_family
from llmrec.tasks.base import (
    ABOUT_ITEM,
    ABOUT_USER,
    USER_STATS,
    DataView,
    UserHistories,
    Values,
    check_not_test,
    count_training_rows,
    describe_shots,
    event_text,
    iterate_user_passes,
    requested_item,
)
from llmrec.tasks.cases import Cases, held_out_interactions
from llmrec.tasks.explanation import word_overlap_f1
from llmrec.tasks.family import NO_RATINGS, RATING_CONTROLS, Family
from llmrec.tasks.fewshot import FewShotDraw
from llmrec.tasks.parsing import parse_number
from llmrec.tasks.pool import with_other_texts
from llmrec.tasks.rating import RatingScale, find_scale
from llmrec.tasks.rows import chat_example, chat_shot_messages, insert_shots, merge_rejected
from llmrec.tasks.task import Task, TaskInputs, Want, check_single_answer
from llmrec.tasks.templates import check_chat_template, select_task_templates
from llmrec.types import (
    Answer,
    Case,
    Event,
    Example,
    Interaction,
    Message,
    Prompt,
    Rating,
    Request,
    SplitName,
    Text,
)

Target = Literal["headline", "rating"]


class ReviewTask(Task):
    """The tasks ``review`` and ``stars``: predict the headline or the rating of a review from its text."""

    family: str

    def __init__(self, section: ReviewSection | StarsSection, inputs: TaskInputs) -> None:
        data, templates = inputs.data, inputs.templates
        self._data, self._section, self._seed = data, section, inputs.seed
        self.family, self.target = _family_and_target(templates)
        if inputs.learns and not data.dataset.reviews:
            raise DataError(
                f"tasks.{self.family}: {data.dataset.name} has no reviews; use a source with reviews, such as "
                "amazon-reviews, or remove the task",
                kind="unsupported",
                at=data.dataset.name,
                column=f"tasks.{self.family}",
            )
        self._chosen = select_task_templates(self.family, section, templates, inputs.index, reviews=True)
        self._view = DataView(data, inputs.index)
        scale = find_scale(data, learns=inputs.learns) if self.target == "rating" else None
        self._scale = scale
        variables = ABOUT_USER | ABOUT_ITEM | USER_STATS | {"review", "scale_low", "scale_high"}
        for template in templates.values():
            template.check(turns=variables, lead=(), target=variables | {self.target})
        self._listwise = inputs.listwise
        self._events = UserHistories(data, self._usable_events)
        if inputs.learns and not self._events:
            raise DataError(
                f"tasks.{self.family}: no training interaction of {data.dataset.name} has a review and a "
                f"{self.target}; remove the task",
                kind="missing-value",
                at=data.dataset.name,
                column=f"tasks.{self.family}",
            )
        self._shots = inputs.shots(
            self.family, self._events, label=None if scale is None else lambda event: scale.label(event.rating or 0.0)
        )

    @property
    def scale(self) -> RatingScale:
        """The rating scale of the data.

        Raises:
            RecipeError: For headlines.
        """
        if self._scale is None:
            raise RecipeError(
                f"tasks.{self.family}: the answers are headlines, which have no scale",
                kind="unsupported",
                column=f"tasks.{self.family}",
            )
        return self._scale

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield training or validation examples; see `Task`."""
        check_not_test(split)
        if split == "valid":
            for held in self._held("valid")[:limit]:
                event = Event(item_id=held.item_id, rating=held.rating, text=held.text)
                row = f"{self.family}/valid/{request_id(held.user_id, held.item_id)}"
                yield self._example(self._chosen.train[0], row, held.user_id, event)
            return
        for row, user, rng in iterate_user_passes(self.family, list(self._events), self._seed, limit):
            template, event = rng.choice(self._chosen.train), rng.choice(self._events[user])
            ends = [event]
            if self._listwise is not None and self._scale is not None:
                ends = self._scale.misrated(event, self._listwise.size, rng)
            elif self._listwise is not None:
                ends = with_other_texts(event, self._events, event_text, self._listwise.size, rng)
            yield merge_rejected(self._example(template, row, user, end) for end in ends)

    def cases(self, split: SplitName) -> Cases:
        """Return the held-out reviews that have a headline or rating to predict."""

        def case(held: Interaction) -> Case:
            context = {"review": self._review_text(held.user_id, held.item_id)}
            request = request_of(self._data, held, split, item=held.item_id, context=context)
            truth = event_text(held) if self.target == "headline" else cast(float, held.rating)
            return Case(request=request, truth=truth)

        return Cases(self._held(split), case)

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        """Render a request; see `Task`.

        Raises:
            DataError: If its context has no review.
        """
        check_single_answer(self.family, want)
        chosen, item = self._chosen.get(template), requested_item(request, self.family)
        if not request.context.get("review"):
            raise DataError(
                f"request {request.id!r}: the {self.family} task needs a review; set context['review']",
                kind="missing-value",
                column="review",
            )
        turns: list[tuple[Message, ...]] = []
        for shot in self.draw_shots(request, shots).windows:
            event = shot.events[-1]
            values = self._values(shot.user_id, event.item_id, self._review_text(shot.user_id, event.item_id))
            turns.append(chat_shot_messages(chosen, values, self._answered(values, event)))
        values = self._values(request.user_id, item, request.context["review"], request.context)
        return Prompt(messages=insert_shots(chosen.turns(values), turns))

    def draw_shots(self, request: Request, shots: int) -> FewShotDraw:
        """Draw training interactions for few-shot examples."""
        past = self._usable_events(request.user_id, request.history)
        return self._shots.draw(request, past, shots, self._section.history)

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        """Return the labels of the rating scale, lowest first; empty for headlines."""
        return () if self._scale is None else self._scale.labels

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Return the headline, or the first number on the rating scale; None if there is none."""
        if self._scale is None:
            text = clean(completion, TEXT_LIMIT)
            return Text(request_id=request.id, text=text) if text else None
        value = parse_number(completion, self._scale.low, self._scale.high, self._chosen.words(template))
        return None if value is None else Rating(request_id=request.id, value=value)

    def reward(self, answer: Answer, case: Case) -> float:
        """Return the word-overlap F1 of headlines, or 1 minus the rating error relative to the scale."""
        if isinstance(answer, Text) and self._scale is None:
            return word_overlap_f1(answer.text, str(case.truth))
        if isinstance(answer, Rating) and self._scale is not None:
            return self._scale.nearness(answer.value, float(case.truth))
        return 0.0

    def shows(self, template: Template, shots: int) -> str:
        """Describe what a prompt contains; see `Task`."""
        return f"text of the review{describe_shots(shots)}"

    def training_size(self) -> int:
        """Return the number of training examples for reviews."""
        if self.target == "headline":
            return count_training_rows(self._data, "text")
        rated = self._data.train.filter(pl.col("rating").is_not_null())
        reviews = self._data.dataset.reviews
        return sum(pair in reviews for pair in rated.select("user_id", "item_id").iter_rows())

    def scored_by(self, template: Template) -> str | None:
        """Return the strategy that predicts the mean over rating labels; None for headlines."""
        return "expected" if self.target == "rating" else None

    @property
    def strategy_options(self) -> Mapping[str, int]:
        """Maximum number of tokens of a headline."""
        return {"max_tokens": self._section.max_tokens} if isinstance(self._section, ReviewSection) else {}

    # ----------------------------------------------------------------------- building blocks

    def _held(self, split: SplitName) -> list[Interaction]:
        return [held for held in held_out_interactions(self._data, split) if self._is_usable(held.user_id, held)]

    def _usable_events(self, user: str, events: Sequence[Event]) -> tuple[Event, ...]:
        return tuple(event for event in events if self._is_usable(user, event))

    def _is_usable(self, user: str, event: Event | Interaction) -> bool:
        """Whether an interaction has a review and the headline or rating to predict."""
        has = event.rating is not None if self.target == "rating" else bool(event_text(event))
        return has and bool(self._review_text(user, event.item_id))

    def _review_text(self, user: str, item: str) -> str:
        """Return the beginning of a review; empty if there is none."""
        review = self._data.dataset.reviews.get((user, item))
        return "" if review is None else clean(review.text, self._section.shown)

    def _values(self, user: str, item: str, review: str, context: Mapping[str, str] | None = None) -> Values:
        marks: Values = {"scale_low": None, "scale_high": None}
        if self._scale is not None:
            marks = {"scale_low": self._scale.labels[0], "scale_high": self._scale.labels[-1]}
        return self._view.user(user, context) | self._view.pair(user, item) | marks | {"review": review}

    def _answered(self, values: Values, event: Event) -> Values:
        if self._scale is None:
            return values | {"headline": event_text(event)}
        assert event.rating is not None
        return values | {"rating": self._scale.label(event.rating)}

    def _example(self, template: Template, row: str, user: str, event: Event) -> Example:
        values = self._values(user, event.item_id, self._review_text(user, event.item_id))
        return chat_example(template, row, user, values, self._answered(values, event), past=(), event=event)


def _family_and_target(templates: Mapping[str, Template]) -> tuple[str, Target]:
    """Return the task to which templates belong, and what they predict."""
    targets: dict[Target, str] = {}
    for template in templates.values():
        check_chat_template(template)
        named = template.names("target")
        target: Target = "rating" if "rating" in named and "headline" not in named else "headline"
        targets[target] = template.id
    family = next(iter(templates.values())).family
    if len(targets) > 1:
        raise RecipeError(
            f"templates {' and '.join(sorted(targets.values()))}: one template answers with a headline, the other "
            "with a rating; move headlines to prompts/review and ratings to prompts/stars",
            kind="contradiction",
            column="target",
        )
    return family, next(iter(targets))


REVIEW = Family(
    name="review",
    title="Headline of a review",
    task=ReviewTask,
    section=ReviewSection,
    answer=Text,
    headline="ROUGE-L",
    strategies=components_for_family(STRATEGIES, "review"),
    baselines=components_for_family(BASELINES, "review"),
    controls=("frequent-text",),
    column="text",
    writes="headline",
    quotes=True,
)
STARS = Family(
    name="stars",
    title="Rating from a review",
    task=ReviewTask,
    section=StarsSection,
    answer=Rating,
    headline="RMSE",
    strategies=components_for_family(STRATEGIES, "stars"),
    baselines=components_for_family(BASELINES, "stars"),
    controls=RATING_CONTROLS,
    column="rating",
    lacking=NO_RATINGS,
    quotes=True,
)
