"""The protocol of models that answer requests, with the records of a question and an answer.

Language models, classic recommenders and ensembles implement it, so that Python, a service, a conversation and the
command line use all of them alike.
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
"""Verbs that return a list; the others are names of families, which ask about one item."""
EXPLAIN = "explanation"
"""The family whose answer is a reason: a language model writes one, an ensemble names its members' contributions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question that is the same for all requests of a batch.

    Attributes:
        model: The name of a model; None: the default. With `SIMILAR`, ``interactions`` or ``text``.
        verb: `RANK`, a family, `SIMILAR` or `POPULAR`.
        depth: The number of items wanted from a catalogue; given candidates are all ranked.
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
        name: Its name in questions.
        kind: ``language model``, ``classic`` or ``fusion`` (an ensemble).
        signature: A hash of everything that can change an answer except the request.
        verbs: ``rank``, and families of questions about one item.
        strategies: Its strategies for ordering candidates.
    """

    name: str
    kind: str
    signature: str
    verbs: tuple[str, ...]
    strategies: tuple[str, ...]


@dataclass
class Reasons:
    """Rationales of one ranking: generated sentences, or the contributions of an ensemble's members.

    Attributes:
        texts: One text per item, from the first; empty for a failure.
        cost: The cost of the texts only.
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
        titles: One title per ranked item, as the model read it.
        notes: Notes on dropped or changed parts of the request.
        retrieved: The number of retrieved candidates: all of them or none.
        profile: The user profile that two-step generated; None without one.
        reasons: Rationales of the first items, with a separate cost.
        unknown_user: Whether the request has no history and names a user without stored data.
        unknown_items: Ids of its history that the model ignored as unknown.
        cold: Whether the user is a cold-start user, and the list has the most popular items.
        card: The model that answered, for a service.
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
    """A named model that answers requests."""

    name: str
    kind: Kind

    @property
    def verbs(self) -> tuple[str, ...]:
        """The verbs that it answers: ``rank`` and the families of questions about one item."""
        ...

    @property
    def strategies(self) -> tuple[str, ...]:
        """Its strategies for ordering candidates; empty if there is only one way."""
        ...

    @property
    def signature(self) -> str:
        """A hash of everything that can change an answer except the request."""
        ...

    def answer(
        self, requests: Sequence[RankRequest], question: Question, listener: Callable[[str], None] | None = None
    ) -> list[Answered]:
        """Answer every request, in order.

        Args:
            requests: A ranking orders the candidates of each, or the whole catalogue if there are none (``barred`` and
                ``keep_seen`` apply to the catalogue). A family asks about the one candidate of each.
            question: The question; its ``model`` is ignored.
            listener: Called with the pieces of a text while it is generated, if the engine can stream.
        """
        ...

    def changed(self) -> None:
        """Invalidate state derived from the catalogue, which was changed in place."""
        ...


def ranking_of(found: Answered) -> Ranking:
    """Return the ranking of an answer."""
    if isinstance(found.answer, Ranking):
        return found.answer
    reason = found.answer.reason if isinstance(found.answer, Unparsed) else "there is no ranking"
    raise DataError(reason, kind="failed")


def signed(**known: object) -> str:
    """Return the signature of a model: a hash of everything that determines its answers."""
    return digest_of(**known)


def check_verb(model: Recommender, verb: str) -> None:
    """Reject a question that a model does not answer."""
    if verb not in model.verbs:
        raise RecipeError(
            f"the model {model.name!r} does not answer {verb!r}; it answers {', '.join(model.verbs)}",
            kind="unsupported",
            column="model",
        )


def check_only_auto(model: Recommender, question: Question) -> None:
    """Reject a strategy if a model ranks in only one way."""
    if question.strategy != "auto":
        raise RecipeError(
            f"strategy: {model.name} ranks in one way only; leave it out, or ask a language model",
            kind="unsupported",
            column="strategy",
        )


def meant(name: str, known: Iterable[str]) -> str | None:
    """Return the known model that a name matches: the one with this name, or the first of this method; None: none.

    The name of a classic recommender has all its parameters, such as ``item-knn(decay=0.5, history=5)``; the method
    alone, ``item-knn``, or some of the parameters, ``item-knn(history=5)``, match too.
    """
    names = list(known)
    method, settings = _parsed(name)
    alike = (other for other in names if _parsed(other)[0] == method and settings <= _parsed(other)[1])
    return name if name in names else next(alike, None)


def _parsed(name: str) -> tuple[str, set[str]]:
    """Return the method of a name and its parameters."""
    method, _, settings = name.removesuffix(")").partition("(")
    return method, set(settings.split(", ")) - {""}
