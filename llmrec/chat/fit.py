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

from llmrec.chat.facts import Facts, reciprocal_rank_fusion
from llmrec.chat.state import ITEM, State, UserPreference, alternative_groups
from llmrec.guard import shorten_at_grapheme
from llmrec.prompts.template import Template, load_templates
from llmrec.types import Backend, Cost, Prompt

GRADE_PHRASES = ("poor fit", "weak fit", "fair fit", "good fit", "excellent fit")
"""The possible grades, worst first; equally spaced from 0 to 1."""
MAX_GRADED_ITEMS = 10
"""Maximum number of items that are judged for a list: each needs a separate prompt."""
# Limits of a prompt: messages, preferences, fields, and characters of each.
_MAX_MESSAGES, _MAX_WISHES, _MAX_FIELDS, _MAX_CHARACTERS = 3, 12, 8, 160


@dataclass(frozen=True)
class Reason:
    """The preferences that an item meets and does not meet, according to the catalogue."""

    met: tuple[UserPreference, ...]
    missed: tuple[UserPreference, ...]


@dataclass(frozen=True)
class Grade:
    """A model's grade of an item.

    Attributes:
        score: The expected position among `GRADE_PHRASES`, from 0 to 1.
        phrase: The most likely phrase.
        reason: The reason shown in the prompt.
    """

    score: float
    phrase: str
    reason: Reason


def match_preferences(facts: Facts, state: State, item: str) -> Reason:
    """Return which preferences in the profile an item meets.

    An item without the banned value meets a ban. One of several alternatives is enough.
    """
    met, missed = [], []
    groups = {wish: group for group in alternative_groups(state.profile) for wish in group}
    for wish in state.profile:
        if wish.field == ITEM:
            continue
        if facts.matches(item, wish) != (wish.op == "not"):
            met.append(wish)
        elif not any(facts.matches(item, other) for other in groups.get(wish, ())):
            missed.append(wish)
    return Reason(tuple(met), tuple(missed))


def phrase_probabilities(logprobs: Sequence[float]) -> list[float]:
    """Return the normalised probabilities of phrases, given their log-probabilities."""
    most = max(logprobs)
    weights = [math.exp(value - most) for value in logprobs]
    return [weight / sum(weights) for weight in weights]


def expected_position(logprobs: Sequence[float]) -> float:
    """Return the expected position among the phrases, 0 for the first and 1 for the last."""
    return sum(index * share for index, share in enumerate(phrase_probabilities(logprobs))) / (len(logprobs) - 1)


def fuse_order_and_scores(items: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Combine the order of items with their scores by reciprocal rank fusion; ties keep the order."""
    positions = range(len(items))
    combined = reciprocal_rank_fusion(positions, sorted(positions, key=lambda position: -scores[position]))
    return [items[position] for position in sorted(positions, key=lambda position: -combined[position])]


@dataclass(frozen=True)
class FitJudge:
    """A language model that grades items for a conversation.

    Attributes:
        backend: An engine that can ``score``.
        most: The number of first items of a list that are graded; later items follow in their order.
    """

    backend: Backend
    most: int = MAX_GRADED_ITEMS
    template: Template = field(default_factory=lambda: load_templates("chat")["fit"])

    def ordered(self, facts: Facts, state: State, items: Sequence[str]) -> tuple[list[str], Cost]:
        """Rerank items by combining the order of the recommender with the grades.

        Raises:
            LlmrecError: If the engine fails.
        """
        first = list(items[: self.most])
        judged, cost = self.judge(facts, state, first)
        return [*fuse_order_and_scores(first, [item.score for item in judged]), *items[self.most :]], cost

    def judge(self, facts: Facts, state: State, items: Sequence[str]) -> tuple[list[Grade], Cost]:
        """Return the grades of items, each scored with a separate prompt.

        Raises:
            LlmrecError: If the engine fails.
        """
        if not items:
            return [], Cost()
        reasons = [match_preferences(facts, state, name) for name in items]
        prompts = [self.prompt(facts, state, name, why) for name, why in zip(items, reasons, strict=True)]
        result = self.backend.score(prompts, [GRADE_PHRASES] * len(prompts))
        judged = [
            Grade(
                expected_position(item.logprobs),
                GRADE_PHRASES[max(range(len(GRADE_PHRASES)), key=item.logprobs.__getitem__)],
                why,
            )
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
            return [
                {"value": shorten_at_grapheme(wish.describe(titles), _MAX_CHARACTERS)} for wish in wishes[-_MAX_WISHES:]
            ]

        messages = [line.text for line in state.lines if line.role == "user"][-_MAX_MESSAGES:]
        return Prompt(
            messages=self.template.turns(
                {
                    "phrases": [{"text": phrase} for phrase in GRADE_PHRASES],
                    # The part that all items share comes first, as a common prefix.
                    "lines": [{"text": shorten_at_grapheme(text, _MAX_CHARACTERS)} for text in messages],
                    "profile": described([wish for wish in state.profile if wish.op != "seen"]),
                    "title": shorten_at_grapheme(titles[item], _MAX_CHARACTERS),
                    "fields": [
                        {"name": name, "value": shorten_at_grapheme(value, _MAX_CHARACTERS)}
                        for name, value in facts.fields_of(item)[:_MAX_FIELDS]
                    ],
                    "met": described(why.met),
                    "missed": described(why.missed),
                }
            )
        )
