"""Builds training examples, questions and few-shot examples: a list to continue, or a chat with one answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llmrec.prompts.template import Template
from llmrec.recipe.schema import PreferenceSection
from llmrec.tasks.base import HISTORY_VARIABLES, Values, user_item_pairs
from llmrec.types import (
    Event,
    Example,
    Message,
    Prompt,
    Segment,
)

AnswerFunction = Callable[[Values, Event], Values]
"""Adds the true answer for an interaction to the variables of a template's target."""


ListLoss = Literal["softmax", "lambda"]


@dataclass(frozen=True, slots=True)
class Listwise:
    """Settings of listwise training: loss, number of answers per list, and temperature of their scores.

    With ``preference`` the loss is that of `llmrec.train.preference`, over the chosen and the rejected answers.
    """

    loss: ListLoss
    size: int
    temperature: float = 1.0
    preference: PreferenceSection | None = None


def list_steps(values: Values, events: Sequence[Event], answered: AnswerFunction) -> list[Values]:
    """Return the template variables of each line of a list."""
    return [answered(values | {"n": n}, event) for n, event in enumerate(events, start=1)]


def list_example(
    template: Template,
    row: str,
    user_id: str,
    values: Values,
    events: Sequence[Event],
    answered: AnswerFunction,
    *,
    first_target: int = 0,
) -> Example:
    """Return an example in list form whose lines are training targets from ``first_target`` on."""
    answer = list_answer(template, list_steps(values, events, answered), lambda i: i >= first_target)
    return _build_example(template, row, user_id, values, answer, events, ends_turn=False)


def _build_example(
    template: Template,
    row: str,
    user_id: str,
    values: Values,
    answer: tuple[Segment, ...],
    events: Sequence[Event],
    *,
    ends_turn: bool,
) -> Example:
    """Return an example of a template, whose prompt and answer contain the given interactions."""
    return Example(
        id=row,
        user_id=user_id,
        task=template.family,
        template=template.id,
        messages=template.turns(values),
        answer=answer,
        ends_turn=ends_turn,
        pairs=user_item_pairs(user_id, events),
    )


def list_shot_messages(
    template: Template, values: Values, events: Sequence[Event], answered: AnswerFunction
) -> tuple[Message, ...]:
    """Return a few-shot example in list form, with every line answered."""
    return few_shot_messages(
        template, values, list_answer(template, list_steps(values, events, answered), lambda _: True)
    )


def chat_shot_messages(template: Template, values: Values, answer: Values) -> tuple[Message, ...]:
    """Return a question with its answer as a few-shot example."""
    return few_shot_messages(template, values, template.step(answer)[1])


def list_answer(template: Template, steps: Sequence[Values], learned: Callable[[int], bool]) -> tuple[Segment, ...]:
    """Render a list in which step i is a training target if ``learned(i)`` is true."""
    answer: list[Segment] = []
    for index, values in enumerate(steps):
        lead, target = template.step(values)
        answer += lead
        answer += target if learned(index) else as_context(target)
    return tuple(answer)


def as_context(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Return segments with all training targets turned into context."""
    return tuple(replace(segment, kind="given") if segment.kind == "target" else segment for segment in segments)


def few_shot_messages(template: Template, values: Values, answer: Sequence[Segment]) -> tuple[Message, ...]:
    """Return a few-shot example: a user message and the assistant's answer."""
    segments = list(as_context(answer))
    segments[-1] = replace(segments[-1], text=segments[-1].text.rstrip("\n"))
    user = template.turns(values)[-1]
    return user, Message("assistant", tuple(segment for segment in segments if segment.text))


def insert_shots(question: Sequence[Message], shots: Sequence[tuple[Message, ...]]) -> tuple[Message, ...]:
    """Insert few-shot examples between the system message and the question."""
    return (*question[:-1], *(message for shot in shots for message in shot), question[-1])


def list_prompt(
    template: Template,
    values: Values,
    steps: Sequence[Values],
    question: Values,
    shots: Sequence[tuple[Message, ...]],
) -> Prompt:
    """Return a prompt that asks for the next step of a list."""
    opening = template.opening(values | question | {"n": len(steps) + 1})
    return Prompt(
        messages=insert_shots(template.turns(values), shots),
        answer_prefix=(*list_answer(template, steps, lambda _: False), *opening),
        stop=template.tail,
    )


def chat_example(
    template: Template, row: str, user_id: str, values: Values, answer: Values, *, past: Sequence[Event], event: Event
) -> Example:
    """Return an example with one answer."""
    shown = past if HISTORY_VARIABLES & template.names("system", "user") else ()
    return _build_example(template, row, user_id, values, template.step(answer)[1], (*shown, event), ends_turn=True)


def merge_rejected(rows: Iterable[Example]) -> Example:
    """Merge examples that differ only in their last target into one preferred and several rejected answers."""
    first, *others = rows
    return replace(first, rejected=tuple(row.answer[-1].text for row in others))


def split_rejected(example: Example) -> list[Example]:
    """Split an example with rejected answers into examples with one answer each."""
    begin = example.answer[:-1]
    return [example, *(replace(example, answer=(*begin, Segment("target", text))) for text in example.rejected)]
