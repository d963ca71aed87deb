"""A joint ranker and explainer: a language model grades how well an item fits what was said, and wishes say why.

RecLLM's ranker is a language model that scores an item for a conversation and gives the reason for it, which explains
the item to the user (Friedman et al. 2023, arXiv 2305.07961, ranking and explanations). Here the reason comes first,
from data: the wishes that the item meets or not. The model reads it and writes nothing: it is asked how likely each
phrase of a closed list is. The same reason explains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmrec.chat.facts import Facts
from llmrec.chat.state import ITEM, State, Wish, alternatives
from llmrec.guard import cut
from llmrec.prompts.template import Template, load_templates
from llmrec.types import Backend, Cost, Prompt

PHRASES = ("poor fit", "weak fit", "fair fit", "good fit", "excellent fit")
"""All that a model can say, worst first; in equal steps from 0 to 1."""
MOST = 10
"""Items that are judged for a list: each is a prompt of its own."""
# What a model reads: lines, wishes, fields, and letters of each.
_LINES, _WISHES, _FIELDS, _LETTERS = 3, 12, 8, 160
# As in `llmrec.chat.facts.Facts.search`.
_RANK = 60


@dataclass(frozen=True)
class Reason:
    """Which wishes an item meets, and which it does not, by what the catalogue says of it."""

    met: tuple[Wish, ...]
    missed: tuple[Wish, ...]


@dataclass(frozen=True)
class Judged:
    """What a model says of an item.

    Attributes:
        score: Expected place among `PHRASES`, from 0 to 1.
        phrase: The most likely one.
        reason: What it was told of the wishes.
    """

    score: float
    phrase: str
    reason: Reason


def reason(facts: Facts, state: State, item: str) -> Reason:
    """Hold an item against the wishes of the profile.

    A ban is met by an item that has not what it names. Of alternatives one is enough: the others are then no miss.
    """
    met, missed = [], []
    groups = {wish: group for group in alternatives(state.profile) for wish in group}
    for wish in state.profile:
        if wish.field == ITEM:
            continue
        if facts.matches(item, wish) != (wish.op == "not"):
            met.append(wish)
        elif not any(facts.matches(item, other) for other in groups.get(wish, ())):
            missed.append(wish)
    return Reason(tuple(met), tuple(missed))


def shares(logprobs: Sequence[float]) -> list[float]:
    """Return the probabilities of phrases among themselves, from their log-probabilities in nats."""
    most = max(logprobs)
    weights = [math.exp(value - most) for value in logprobs]
    return [weight / sum(weights) for weight in weights]


def expected(logprobs: Sequence[float]) -> float:
    """Return the expected place of the phrases, the first of them 0 and the last 1."""
    return sum(index * share for index, share in enumerate(shares(logprobs))) / (len(logprobs) - 1)


def joined(items: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Join an order of items with that of their scores by reciprocal ranks; equal ones stay in their order."""
    by = sorted(range(len(items)), key=lambda place: -scores[place])
    place_of = {place: rank for rank, place in enumerate(by)}
    worth = [1 / (_RANK + place) + 1 / (_RANK + place_of[place]) for place in range(len(items))]
    return [items[place] for place in sorted(range(len(items)), key=lambda place: -worth[place])]


@dataclass(frozen=True)
class FitJudge:
    """A language model that grades items for a conversation.

    Attributes:
        backend: An engine that can ``score``.
        most: Items that are graded for a list; those behind them stay behind them.
    """

    backend: Backend
    most: int = MOST
    template: Template = field(default_factory=lambda: load_templates("chat")["fit"])

    def ordered(self, facts: Facts, state: State, items: Sequence[str]) -> tuple[list[str], Cost]:
        """Return items in the order of the recommender, which is given, joined with that of the grades.

        Raises:
            LlmrecError: If the engine fails.
        """
        first = list(items[: self.most])
        judged, cost = self.judge(facts, state, first)
        return [*joined(first, [item.score for item in judged]), *items[self.most :]], cost

    def judge(self, facts: Facts, state: State, items: Sequence[str]) -> tuple[list[Judged], Cost]:
        """Grade items, one by one: none is seen beside another.

        Raises:
            LlmrecError: If the engine fails.
        """
        if not items:
            return [], Cost()
        reasons = [reason(facts, state, name) for name in items]
        prompts = [self.prompt(facts, state, name, why) for name, why in zip(items, reasons, strict=True)]
        result = self.backend.score(prompts, [PHRASES] * len(prompts))
        judged = [
            Judged(expected(item.logprobs), PHRASES[max(range(len(PHRASES)), key=item.logprobs.__getitem__)], why)
            for item, why in zip(result, reasons, strict=True)
        ]
        cost = Cost(
            prompt_tokens=sum(item.prompt_tokens for item in result),
            completion_tokens=sum(sum(item.tokens) for item in result),
            forwards=len(result),
        )
        return judged, cost

    def prompt(self, facts: Facts, state: State, item: str, why: Reason) -> Prompt:
        """Return what the model reads of an item; what users said and what the catalogue says is data in it."""
        titles = facts.titles

        def told(wishes: Sequence[Wish]) -> list[dict[str, str]]:
            return [{"value": cut(wish.told(titles), _LETTERS)} for wish in wishes[-_WISHES:]]

        message = [line.text for line in state.lines if line.role == "user"][-_LINES:]
        return Prompt(
            messages=self.template.turns(
                {
                    "phrases": [{"text": phrase} for phrase in PHRASES],
                    # What all items share stands first, so that it is read once.
                    "lines": [{"text": cut(text, _LETTERS)} for text in message],
                    "profile": told([wish for wish in state.profile if wish.op != "seen"]),
                    "title": cut(titles[item], _LETTERS),
                    "fields": [
                        {"name": name, "value": cut(value, _LETTERS)} for name, value in facts.told(item)[:_FIELDS]
                    ],
                    "met": told(why.met),
                    "missed": told(why.missed),
                }
            )
        )
