"""A language model grades how well items fit a conversation; the preferences that an item meets explain the grade.

RecLLM's ranker is a language model that scores an item for a conversation and generates the reason, which explains the
item to the user (Friedman et al. 2023, arXiv 2305.07961, ranking and explanations). Here the reason comes from data:
the wishes that the item meets or does not meet. The model reads it and scores each phrase of a closed list, without
generating text. The same reason is the explanation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmrec.chat.facts import Facts, fused
from llmrec.chat.state import ITEM, State, UserPreference, alternatives
from llmrec.guard import cut
from llmrec.prompts.template import Template, load_templates
from llmrec.types import Backend, Cost, Prompt

PHRASES = ("poor fit", "weak fit", "fair fit", "good fit", "excellent fit")
"""The possible grades, worst first; equally spaced from 0 to 1."""
MOST = 10
"""Maximum number of items that are judged for a list: each needs a separate prompt."""
# Limits of a prompt: messages, preferences, fields, and characters of each.
_LINES, _WISHES, _FIELDS, _LETTERS = 3, 12, 8, 160


@dataclass(frozen=True)
class Reason:
    """The preferences that an item meets and does not meet, according to the catalogue."""

    met: tuple[UserPreference, ...]
    missed: tuple[UserPreference, ...]


@dataclass(frozen=True)
class Grade:
    """A model's grade of an item.

    Attributes:
        score: The expected position among `PHRASES`, from 0 to 1.
        phrase: The most likely phrase.
        reason: The reason shown in the prompt.
    """

    score: float
    phrase: str
    reason: Reason


def reason(facts: Facts, state: State, item: str) -> Reason:
    """Return which preferences in the profile an item meets.

    An item without the banned value meets a ban. One of several alternatives is enough.
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
    """Return the normalised probabilities of phrases, given their log-probabilities."""
    most = max(logprobs)
    weights = [math.exp(value - most) for value in logprobs]
    return [weight / sum(weights) for weight in weights]


def expected(logprobs: Sequence[float]) -> float:
    """Return the expected position among the phrases, 0 for the first and 1 for the last."""
    return sum(index * share for index, share in enumerate(shares(logprobs))) / (len(logprobs) - 1)


def joined(items: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Combine the order of items with their scores by reciprocal rank fusion; ties keep the order."""
    positions = range(len(items))
    combined = fused(positions, sorted(positions, key=lambda position: -scores[position]))
    return [items[position] for position in sorted(positions, key=lambda position: -combined[position])]


@dataclass(frozen=True)
class FitJudge:
    """A language model that grades items for a conversation.

    Attributes:
        backend: An engine that can ``score``.
        most: The number of first items of a list that are graded; later items follow in their order.
    """

    backend: Backend
    most: int = MOST
    template: Template = field(default_factory=lambda: load_templates("chat")["fit"])

    def ordered(self, facts: Facts, state: State, items: Sequence[str]) -> tuple[list[str], Cost]:
        """Rerank items by combining the order of the recommender with the grades.

        Raises:
            LlmrecError: If the engine fails.
        """
        first = list(items[: self.most])
        judged, cost = self.judge(facts, state, first)
        return [*joined(first, [item.score for item in judged]), *items[self.most :]], cost

    def judge(self, facts: Facts, state: State, items: Sequence[str]) -> tuple[list[Grade], Cost]:
        """Return the grades of items, each scored with a separate prompt.

        Raises:
            LlmrecError: If the engine fails.
        """
        if not items:
            return [], Cost()
        reasons = [reason(facts, state, name) for name in items]
        prompts = [self.prompt(facts, state, name, why) for name, why in zip(items, reasons, strict=True)]
        result = self.backend.score(prompts, [PHRASES] * len(prompts))
        judged = [
            Grade(expected(item.logprobs), PHRASES[max(range(len(PHRASES)), key=item.logprobs.__getitem__)], why)
            for item, why in zip(result, reasons, strict=True)
        ]
        cost = Cost(
            prompt_tokens=sum(item.prompt_tokens for item in result),
            completion_tokens=sum(sum(item.tokens) for item in result),
            forwards=len(result),
        )
        return judged, cost

    def prompt(self, facts: Facts, state: State, item: str, why: Reason) -> Prompt:
        """Return the prompt about an item; texts of users and catalogue are treated as data."""
        titles = facts.titles

        def described(wishes: Sequence[UserPreference]) -> list[dict[str, str]]:
            return [{"value": cut(wish.describe(titles), _LETTERS)} for wish in wishes[-_WISHES:]]

        messages = [line.text for line in state.lines if line.role == "user"][-_LINES:]
        return Prompt(
            messages=self.template.turns(
                {
                    "phrases": [{"text": phrase} for phrase in PHRASES],
                    # The part that all items share comes first, as a common prefix.
                    "lines": [{"text": cut(text, _LETTERS)} for text in messages],
                    "profile": described([wish for wish in state.profile if wish.op != "seen"]),
                    "title": cut(titles[item], _LETTERS),
                    "fields": [
                        {"name": name, "value": cut(value, _LETTERS)} for name, value in facts.fields_of(item)[:_FIELDS]
                    ],
                    "met": described(why.met),
                    "missed": described(why.missed),
                }
            )
        )
