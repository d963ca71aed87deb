"""Rating prediction: which rating will a user give to an item?"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from llmrec.data.split import MAX_RATING_STEPS, SplitDataset, liked_threshold, rating_steps, request_of, scale_of
from llmrec.errors import DataError, RecipeError
from llmrec.prompts.template import Template
from llmrec.prompts.words import Words
from llmrec.recipe.schema import RatingSection
from llmrec.registry import BASELINES, STRATEGIES, components_for_family
from llmrec.tasks.base import (
    ABOUT_ITEM,
    ABOUT_USER,
    USER_STATS,
    DataView,
    UserHistories,
    Values,
    check_not_test,
    iterate_user_passes,
    rated_events,
    requested_item,
    sample_window,
    seeded_random,
)
from llmrec.tasks.cases import Cases, held_out_interactions, limit_per_user
from llmrec.tasks.family import NO_RATINGS, RATING_CONTROLS, Family
from llmrec.tasks.fewshot import FewShotDraw
from llmrec.tasks.parsing import parse_number
from llmrec.tasks.rows import (
    chat_example,
    chat_shot_messages,
    insert_shots,
    list_example,
    list_prompt,
    list_shot_messages,
    list_steps,
    merge_rejected,
)
from llmrec.tasks.task import BranchingTask, TaskInputs, Want, check_single_answer
from llmrec.tasks.templates import select_task_templates
from llmrec.types import Answer, Case, Event, Example, Interaction, Message, Prompt, Rating, Request, SplitName


class RatingTask(BranchingTask):
    """The rating prediction task.

    A list template has one user's ratings in order; the history is part of the answer, so that one training example
    teaches a rating at every position. A chat template shows the history and asks for the rating of one item.
    """

    family = "rating"
    _column = "rating"
    _section: RatingSection

    def __init__(self, section: RatingSection, inputs: TaskInputs) -> None:
        data, templates = inputs.data, inputs.templates
        self._data, self._section, self._seed = data, section, inputs.seed
        self.scale = find_scale(data, learns=inputs.learns)
        self._chosen = select_task_templates(self.family, section, templates, inputs.index)
        self._view = DataView(data, inputs.index)
        turns = ABOUT_USER | {"scale_low", "scale_high"}
        for template in templates.values():
            if template.shape == "list":
                lead = turns | ABOUT_ITEM | {"n"}
                template.check(turns=turns, lead=lead, target=lead | {"rating"})
            else:
                variables = turns | ABOUT_ITEM | USER_STATS | {"history"}
                if is_training_only(template):
                    template.check(turns=variables | {"stars"}, lead=(), target={"answer"})
                else:
                    template.check(turns=variables, lead=(), target=variables | {"rating"})
        for name in self._chosen.evaluate:
            _check_evaluable(templates[name])
        self._listwise = inputs.listwise
        if (
            other := next(filter(is_training_only, self._chosen.train), None)
        ) is not None and self._listwise is not None:
            raise RecipeError(
                f"train.preference: {other.id} has yes/no answers, but preference training compares ratings; remove "
                "this template from tasks.rating.templates",
                kind="contradiction",
                column="tasks.rating.templates",
            )
        self._events = UserHistories(data, rated=True)
        self._past = inputs.past(section, self._chosen.asking)
        self._shots = inputs.shots(self.family, self._events, label=lambda event: self.scale.label(event.rating or 0.0))

    @property
    def training_templates(self) -> tuple[Template, ...]:
        """The templates used in training."""
        return tuple(self._chosen.train)

    def examples(self, split: SplitName, limit: int | None = None) -> Iterator[Example]:
        """Yield training or validation examples; see `Task`."""
        check_not_test(split)
        if split == "valid":
            for case in self.cases("valid")[:limit]:
                event = Event(item_id=requested_item(case.request, self.family), rating=float(case.truth))
                shown = self._past.show(rated_events(case.request.history), [event.item_id])
                row, events = f"rating/valid/{case.request.id}", (*shown.events, event)
                context, template, last = shown.context({}), self._chosen.train[0], len(events) - 1
                yield self._example(template, row, case.request.user_id, events, first_target=last, context=context)
            return
        for row, user, rng in iterate_user_passes(self.family, list(self._events), self._seed, limit):
            template = rng.choice(self._chosen.train)
            events, context = self._train_events(template, user, rng)
            past, ends, first = events[:-1], [events[-1]], 0
            if self._listwise is not None:
                ends, first = self.scale.misrated(events[-1], self._listwise.size, rng), len(past)
            yield merge_rejected(
                self._example(template, row, user, (*past, end), first_target=first, context=context) for end in ends
            )

    def cases(self, split: SplitName) -> Cases:
        """Return the held-out ratings, at most ``per_user`` per user."""
        known = [held for held in held_out_interactions(self._data, split) if held.rating is not None]

        def case(held: Interaction) -> Case:
            assert held.rating is not None
            return Case(request=request_of(self._data, held, split, item=held.item_id), truth=held.rating)

        return Cases(limit_per_user(known, self._section.per_user), case)

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        """Render a request; see `Task`."""
        check_single_answer(self.family, want)
        chosen = self._chosen.get(template)
        _check_evaluable(chosen)
        drawn = self.draw_shots(request, shots)
        context = drawn.context(request.context)
        item = self._view.pair(request.user_id, requested_item(request, self.family))
        turns = [self._solved(chosen, shot.user_id, shot.events) for shot in drawn.windows]
        if chosen.shape == "chat":
            values = self._question(request.user_id, drawn.history, context) | item
            return Prompt(messages=insert_shots(chosen.turns(values), turns))
        values = self._about(request.user_id, context)
        return list_prompt(chosen, values, list_steps(values, drawn.history, self._answered), item, turns)

    def draw_shots(self, request: Request, shots: int) -> FewShotDraw:
        """Draw training interactions for few-shot examples; also return the remaining history of the question."""
        past, about = rated_events(request.history), [requested_item(request, self.family)]
        return self._shots.draw(request, past, shots, self._section.history, self._past.show(past, about))

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        """Return the labels of the rating scale, lowest first."""
        return self.scale.labels

    def parse(self, completion: str, request: Request, *, template: str) -> Answer | None:
        """Parse the first number; None if there is none on the scale."""
        value = parse_number(completion, self.scale.low, self.scale.high, self._chosen.words(template))
        return None if value is None else Rating(request_id=request.id, value=value)

    def reward(self, answer: Answer, case: Case) -> float:
        """Return 1 for the true rating, decreasing linearly to 0 at a difference of the whole scale."""
        if not isinstance(answer, Rating):
            return 0.0
        return self.scale.nearness(answer.value, float(case.truth))

    def asked_by(self, template: Template, strategies: Sequence[str], *, tuned: bool) -> tuple[str, ...]:
        """Return the strategies for the fine-tuned or the base model.

        A rating head replaces the label tokens of the fine-tuned model, which is therefore evaluated by its head only,
        and the base model, which has none, by the other strategies.
        """
        if self._section.head is None:
            return tuple(strategies)
        return tuple(name for name in strategies if (name == "head") == tuned)

    def scored_by(self, template: Template) -> str:
        """Return the strategy that predicts the mean over the rating labels."""
        return "expected"

    @property
    def liked_from(self) -> float:
        """The lowest rating that counts as liked."""
        return liked_threshold(scale_of(self._data), self._section.liked)

    # ----------------------------------------------------------------------- building blocks

    def _train_events(
        self, template: Template, user: str, rng: random.Random
    ) -> tuple[tuple[Event, ...], Mapping[str, str]]:
        """Return the interactions of an example, the target last, and a summary of earlier interactions."""
        events = self._events[user]
        if template.shape == "list":
            return sample_window(events, self._section.window, rng), {}
        at = rng.randrange(len(events))
        shown = self._past.show(events[:at], [events[at].item_id])
        return (*shown.events, events[at]), shown.context({})

    def _example(
        self,
        template: Template,
        row: str,
        user: str,
        events: tuple[Event, ...],
        *,
        first_target: int = 0,
        context: Mapping[str, str] | None = None,
    ) -> Example:
        if template.shape == "chat":
            values = self._one(user, events, context)
            target = self._with_rating(values, events[-1])
            if is_training_only(template):
                values, target = self._with_stars(row, values, events[-1], template.words)
            return chat_example(template, row, user, values, target, past=events[:-1], event=events[-1])
        values = self._about(user, context)
        return list_example(template, row, user, values, events, self._answered, first_target=first_target)

    def _solved(self, template: Template, user: str, events: tuple[Event, ...]) -> tuple[Message, ...]:
        if template.shape == "chat":
            values = self._one(user, events)
            return chat_shot_messages(template, values, self._with_rating(values, events[-1]))
        return list_shot_messages(template, self._about(user), events, self._answered)

    def _about(self, user: str, context: Mapping[str, str] | None = None) -> Values:
        scale = {"scale_low": self.scale.label(self.scale.low), "scale_high": self.scale.label(self.scale.high)}
        return self._view.user(user, context) | scale

    def _question(self, user: str, past: Sequence[Event], context: Mapping[str, str] | None = None) -> Values:
        return self._about(user, context) | {"history": self._view.events(past, self.scale.label)}

    def _one(self, user: str, events: tuple[Event, ...], context: Mapping[str, str] | None = None) -> Values:
        return self._question(user, events[:-1], context) | self._view.pair(user, events[-1].item_id)

    def _answered(self, values: Values, event: Event) -> Values:
        return self._with_rating(values | self._view.pair(str(values["user_id"]), event.item_id), event)

    def _with_rating(self, values: Values, event: Event) -> Values:
        assert event.rating is not None
        return values | {"rating": self.scale.label(event.rating)}

    def _with_stars(self, row: str, values: Values, event: Event, words: Words) -> tuple[Values, Values]:
        """Return question and answer of a yes/no example about the true rating or, equally often, a wrong rating."""
        assert event.rating is not None
        rng, true = seeded_random("rating stars", self._seed, row), self.scale.label(event.rating)
        others = [label for label in self.scale.labels if label != true]
        yes = rng.random() < 0.5 or not others
        stars = true if yes else rng.choice(others)
        return values | {"stars": stars}, {"answer": words.answer_word(yes=yes)}


def is_training_only(template: Template) -> bool:
    """Whether a template is a yes/no question about a rating, which is trained but not evaluated."""
    return "answer" in template.names("target")


def _check_evaluable(template: Template) -> None:
    if is_training_only(template):
        raise RecipeError(
            f"tasks.rating.eval_templates: {template.id} asks a yes/no question about a rating, which is only for "
            "training; choose templates that ask for the rating, such as name-item",
            kind="contradiction",
            at=template.id,
            column="tasks.rating.eval_templates",
        )


# --------------------------------------------------------------------------- rating scale


@dataclass(frozen=True)
class RatingScale:
    """A rating scale: its values and labels, lowest first."""

    values: tuple[float, ...]
    labels: tuple[str, ...]

    @property
    def low(self) -> float:
        """The lowest rating of the scale."""
        return self.values[0]

    @property
    def high(self) -> float:
        """The highest rating of the scale."""
        return self.values[-1]

    def nearness(self, rating: float, truth: float) -> float:
        """Return 1 for the true rating, decreasing linearly to 0 at a difference of the whole scale."""
        return max(0.0, 1.0 - abs(rating - truth) / ((self.high - self.low) or 1.0))

    def misrated(self, event: Event, size: int, rng: random.Random) -> list[Event]:
        """Return a rated interaction, followed by copies with other ratings in random order."""
        true = self.label(event.rating or 0.0)
        others = [value for value, label in zip(self.values, self.labels, strict=True) if label != true]
        return [event, *(replace(event, rating=value) for value in rng.sample(others, min(size - 1, len(others))))]

    def label(self, rating: float) -> str:
        """Return the label nearest to a rating; the lower one of two."""
        index = min(range(len(self.values)), key=lambda i: (abs(self.values[i] - rating), i))
        return self.labels[index]


def find_scale(data: SplitDataset, *, learns: bool = True) -> RatingScale:
    """Derive the rating scale from the data, in whole or half points.

    Half points are written ``4.0`` and ``4.5``, so that no label is a prefix of another.

    Args:
        data: The split.
        learns: Whether training ratings are required; otherwise the declared scale of the data is sufficient.

    Raises:
        DataError: If there are no ratings, or more than 101 steps.
    """
    ratings = data.train["rating"].drop_nulls().unique().to_list()
    if not ratings and (learns or data.dataset.rating_scale is None):
        raise DataError(
            f"tasks.rating: {data.dataset.name} has no ratings; remove the task or set data.columns.rating",
            kind="missing-column",
            at=data.dataset.name,
            column="rating",
        )
    low, high = scale_of(data)
    step, first, last = rating_steps(low, high, ratings)
    if last - first >= MAX_RATING_STEPS:
        raise DataError(
            f"tasks.rating: the scale from {low:g} to {high:g} has {last - first + 1} steps, more than "
            f"{MAX_RATING_STEPS}; rescale the ratings",
            kind="too-large",
            column="rating",
        )
    values = tuple(step * number for number in range(first, last + 1))
    return RatingScale(values, tuple(f"{value:.0f}" if step == 1.0 else f"{value:.1f}" for value in values))


def expected_rating(values: Sequence[float], logprobs: Sequence[float]) -> float:
    """Return the mean of ``values`` weighted by softmax(``logprobs``).

    Raises:
        ValueError: If the lengths differ or there are none.
    """
    peak = max(logprobs)
    weights = [math.exp(logprob - peak) for logprob in logprobs]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


FAMILY = Family(
    name="rating",
    title="Rating prediction",
    task=RatingTask,
    section=RatingSection,
    answer=Rating,
    headline="RMSE",
    strategies=components_for_family(STRATEGIES, "rating"),
    baselines=components_for_family(BASELINES, "rating"),
    controls=RATING_CONTROLS,
    column="rating",
    lacking=NO_RATINGS,
    quotes=True,
)
