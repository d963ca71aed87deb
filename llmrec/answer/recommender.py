"""The protocol of everything that answers requests, the question that it is asked, and its answer.

Language models, classic recommenders and ensembles implement it, so that Python, a service, a conversation and the
command line ask all of them in one way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from llmrec.data.requests import RankRequest
from llmrec.errors import DataError, RecipeError
from llmrec.fingerprint import digest_of
from llmrec.types import Answer, Cost, Ranking, Unparsed

Kind = Literal["language model", "classic", "fusion"]
RANK, SIMILAR, POPULAR = "rank", "similar", "popular"
"""Verbs that are answered with a list; the others are names of families, which ask about one item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is the same for all requests that are answered together.

    Attributes:
        model: A name; None: the default. With `SIMILAR`, ``interactions`` or ``text``.
        verb: `RANK`, a family, `SIMILAR` or `POPULAR`.
        depth: Items that are wanted of a catalogue; candidates are ranked all.
        strategy: How a language model orders candidates, or ``auto``.
    """

    model: str | None = None
    verb: str = RANK
    depth: int = 0
    strategy: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The description of a model.

    Attributes:
        name: Under which it answers.
        kind: ``language model``, ``classic`` or ``fusion``.
        signature: Changes with everything that can change an answer, except the request.
        verbs: ``rank``, and families of questions about one item.
        strategies: How it may be asked to order candidates.
    """

    name: str
    kind: str
    signature: str
    verbs: tuple[str, ...]
    strategies: tuple[str, ...]


@dataclass
class Reasons:
    """Generated rationales of one ranking.

    Attributes:
        texts: One an item, from the first on; empty where nothing could be written.
        cost: Of the texts alone.
        notes: Why a text is missing.
    """

    texts: list[str] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The answer to one request.

    Attributes:
        answer: A ranking, a rating, a probability or a text, or why there is none.
        titles: One a ranked item, as the model read it.
        notes: What was left out or changed on the way.
        retrieved: How many of the candidates were retrieved: all of them or none.
        profile: The user profile that two-step generated; None without one.
        reasons: Rationales of the first items, with their own cost.
        unknown_user: The request names a user of whom nothing is stored, and has no history.
        unknown_items: Ids of its history that the model ignored, since nothing is known of them.
        cold: Nothing is known of the user, and the list is that of the most popular items.
        card: The model that answered, where a service asked.
    """

    answer: Answer
    titles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    retrieved: int = 0
    profile: str | None = None
    reasons: Reasons = field(default_factory=Reasons)
    unknown_user: bool = False
    unknown_items: tuple[str, ...] = ()
    cold: bool = False
    card: Card | None = None


class Recommender(Protocol):
    """A model that answers under a name."""

    name: str
    kind: Kind

    @property
    def verbs(self) -> tuple[str, ...]:
        """``rank`` and the families of questions about one item."""
        ...

    @property
    def strategies(self) -> tuple[str, ...]:
        """How it may be asked to order candidates; none where there is one way only."""
        ...

    @property
    def signature(self) -> str:
        """A hash of everything that can change an answer, except the request."""
        ...

    def answer(
        self, requests: Sequence[RankRequest], question: Question, listener: Callable[[str], None] | None = None
    ) -> list[Answered]:
        """Answer every request, in order.

        Args:
            requests: A ranking orders their candidates, or the whole catalogue where a request has none (``barred``
                and ``keep_seen`` are for the catalogue). A family asks about the one candidate of each.
            question: What they are asked; ``model`` is not looked at.
            listener: Called with the pieces of a text while it is generated, where the engine can.
        """
        ...

    def changed(self) -> None:
        """Take note that the catalogue was changed in place."""
        ...


def ranking_of(found: Answered) -> Ranking:
    """Return the ranking of an answer."""
    if isinstance(found.answer, Ranking):
        return found.answer
    reason = found.answer.reason if isinstance(found.answer, Unparsed) else "there is no ranking"
    raise DataError(reason, kind="failed")


def signed(**known: object) -> str:
    """Return the signature of a model from everything that decides its answers."""
    return digest_of(**known)


def check_verb(model: Recommender, verb: str) -> None:
    """Refuse a question that a model does not answer."""
    if verb not in model.verbs:
        raise RecipeError(
            f"the model {model.name!r} does not answer {verb!r}; it answers {', '.join(model.verbs)}",
            kind="unsupported",
            column="model",
        )


def check_only_auto(model: Recommender, question: Question) -> None:
    """Refuse a strategy where a model ranks in one way only."""
    if question.strategy != "auto":
        raise RecipeError(
            f"strategy: {model.name} ranks in one way only; leave it out, or ask a language model",
            kind="unsupported",
            column="strategy",
        )


def meant(name: str, known: Iterable[str]) -> str | None:
    """Return which of the known models a name means: that of this name, or the first of this method; None: none.

    A classic recommender with parameters is called by all of them, such as ``item-knn(decay=0.5, history=5)``; its
    method alone, ``item-knn``, is enough, and so are some of them, ``item-knn(history=5)``.
    """
    names = list(known)
    method, settings = _parsed(name)
    alike = (other for other in names if _parsed(other)[0] == method and settings <= _parsed(other)[1])
    return name if name in names else next(alike, None)


def _parsed(name: str) -> tuple[str, set[str]]:
    """Return the method of a name and its parameters."""
    method, _, settings = name.removesuffix(")").partition("(")
    return method, set(settings.split(", ")) - {""}
