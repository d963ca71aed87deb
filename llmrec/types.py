"""Records and protocols shared by all packages.

Records are frozen and have named fields. A *case* pairs a request with its held-out truth, so that predictors never get
the answer: they see `Request`, and only the metrics see `Case.truth`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from llmrec.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Role = Literal["system", "user", "assistant"]
SegmentKind = Literal["text", "item", "target", "given"]
SplitName = Literal["train", "valid", "test"]
Capability = Literal["generate", "score", "search", "rate"]

# --------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An item of the catalogue; ``fields`` holds further text such as genres or a brand."""

    item_id: str
    title: str
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A past interaction in a history; ``timestamp`` is in the unit of the source."""

    item_id: str
    rating: float | None = None
    timestamp: float | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """An observed (user, item) pair."""

    user_id: str
    item_id: str
    rating: float | None = None
    timestamp: float | None = None
    text: str | None = None


# --------------------------------------------------------------------------- text


class Code(str):
    """The code of an item. Unlike other data, it may contain item tokens: see `llmrec.guard`."""

    __slots__ = ()


class CodedId(str):
    """The id of a user or item with a ``code`` that templates show instead."""

    code: str

    def __new__(cls, text: str, code: str) -> CodedId:
        """Create an id with a code."""
        result = super().__new__(cls, text)
        result.code = code
        return result


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a prompt with one origin: template text, data (``item``), or a training target (``target``).

    A target of an earlier step that is shown without loss is ``given``: it is tokenised as when it was a target.
    """

    kind: SegmentKind
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """A chat message made of segments."""

    role: Role
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """The message as one string."""
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The input of a backend: chat messages, then the given beginning of the answer.

    Attributes:
        messages: System, user and (for few-shot) assistant messages; the last one is a user message.
        answer_prefix: Segments of the assistant's answer that precede the continuation. List templates put the history
            here, so that a new interaction extends a cached prefix.
        stop: The text that ends the answer (a line break in list templates); None means end of turn.
    """

    messages: tuple[Message, ...]
    answer_prefix: tuple[Segment, ...] = ()
    stop: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A training example.

    Attributes:
        id: Id, unique within a run.
        user_id: User of the history.
        task: Family name.
        template: ``family/name`` of the template.
        messages: The messages before the answer.
        answer: The answer's segments; loss is taken on those of kind ``target`` only. A *user example*
            has one target per position, others a single one.
        ends_turn: Whether the example closes the assistant's turn, with loss on the closing token.
        pairs: The (user_id, item_id) pairs that the example shows as interactions, for the leak audit.
        negatives: The items that it shows as not chosen by the user. They are sampled without knowledge of held-out
            items, so a held-out item may be among them.
        rejected: Texts that list and preference losses compare with its last target.
    """

    id: str
    user_id: str
    task: str
    template: str
    messages: tuple[Message, ...]
    answer: tuple[Segment, ...]
    ends_turn: bool
    pairs: tuple[tuple[str, str], ...] = ()
    negatives: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()


# --------------------------------------------------------------------------- requests and answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request to a predictor. ``history`` is oldest first and never contains the true answer.

    Attributes:
        candidates: Item ids to rank, in stored order; None for the whole catalogue.
        item: The item to rate or explain; None in cases whose answer is the item (alignment).
        context: Further text by name (profile, feature, ...).
    """

    id: str
    user_id: str
    history: tuple[Event, ...] = ()
    candidates: tuple[str, ...] | None = None
    item: str | None = None
    context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request with its held-out true answer: an item id, a rating or a text."""

    request: Request
    truth: str | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of an answer, summed over all its prompts.

    Attributes:
        prompt_tokens: Tokens of the prompts.
        completion_tokens: Tokens scored or generated after them.
        forwards: Model calls: one per scored or searched prompt, one per generated token.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    forwards: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Return the sum of two costs."""
        return Cost(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            forwards=self.forwards + other.forwards,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRecord:
    """What every answer has.

    Attributes:
        raw: The answer of the model as text, if it wrote one.
        prompt_hash: Hash of its prompt, if there is one.
        cost: The cost of all its prompts.
    """

    request_id: str
    raw: str | None = None
    prompt_hash: str | None = None
    cost: Cost = Cost()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking(AnswerRecord):
    """Items with scores, best first; equal scores are ties. Missing items count as misses.

    Attributes:
        unlisted: Number of unlisted items that tie with the last one, if these are the rest of the pool: then no item
            is left out.
    """

    items: tuple[str, ...]
    scores: tuple[float, ...]
    unlisted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating(AnswerRecord):
    """A predicted rating on the scale of the data."""

    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(AnswerRecord):
    """A generated text."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unparsed(AnswerRecord):
    """An answer that could not be parsed. It counts as a failure in every metric."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probability(AnswerRecord):
    """A predicted probability, in [0, 1], that the answer is yes."""

    value: float


Answer = Ranking | Rating | Probability | Text | Unparsed


# --------------------------------------------------------------------------- contracts


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A generated text. ``finish_reason`` is ``"stop"`` or ``"length"``."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log-probabilities of candidate continuations over the full vocabulary, in nats.

    Attributes:
        logprobs: Sum over the candidate's tokens, one per candidate, in the order of the call.
        tokens: Number of tokens of each candidate.
        prompt_tokens: Length of the shared prompt.
        engine: The route that computed them, such as ``"vllm:one-token"``.
    """

    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    prompt_tokens: int
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The top texts of a catalogue as answers to one prompt.

    Attributes:
        items: Distinct indices into the catalogue, best first.
        scores: Full-softmax log-probability of each one, in nats.
        certified: Whether provably no other text of the catalogue has a higher score than the last of these.
        width: Number of prefixes that the search kept.
        short: Why there are fewer items than requested; empty if there are enough.
        engine: The route that computed them, such as ``"hf:tree"``.
        prompt_tokens: Length of the prompt.
        tokens: Tokens read after it.
    """

    items: tuple[int, ...]
    scores: tuple[float, ...]
    certified: bool
    width: int
    short: str = ""
    engine: str = ""
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRating:
    """The rating that a rating head predicts for a prompt."""

    value: float
    prompt_tokens: int
    engine: str


@runtime_checkable
class HeadBackend(Protocol):
    """A backend with the method ``rate``."""

    def rate(self, prompts: Sequence[Prompt]) -> list[HeadRating]:
        """Predict the rating for each prompt with the model's rating head.

        Raises:
            BackendError: If the model has no rating head.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """A language model engine that generates, scores and searches; ``capabilities`` lists the supported ones."""

    name: str
    capabilities: frozenset[Capability]

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Continue each prompt greedily until its stop text, the end of turn or ``max_tokens``."""
        ...

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        """Compute the probability of each prompt's candidate continuations; ``candidates[i]`` is for ``prompts[i]``.

        With ``closed`` the end of the answer (stop text or end of turn) is part of every continuation, so that a title
        is not favoured for being a prefix of another; labels are scored open.
        """
        ...

    def search(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        *,
        k: int,
        width: int,
        excluded: Sequence[Sequence[int]] = (),
        exact: bool = False,
    ) -> list[SearchResult]:
        """Return the ``k`` catalogue texts that are the most likely answers to each prompt.

        Texts are closed, as in `score`, and distinct. The search keeps ``width`` prefixes of each request, or with
        ``exact`` as many as needed to certify the result; ``excluded`` are indices into ``texts`` that a request must
        not get.

        Raises:
            BackendError: If the backend does not search.
        """
        raise BackendError(
            f"the {self.name} backend does not support the strategy 'search'; use eval.backend=hf or vllm",
            kind="unsupported",
            column="eval.backend",
        )

    def close(self) -> None:
        """Release the engine; repeated calls have no effect."""
        ...


class ItemCodes(Protocol):
    """Provides the texts of items for ``item.code`` in templates."""

    @property
    def users(self) -> Mapping[str, str]:
        """Tokens of users by id, for ``user_id`` in templates; empty if user ids are text."""
        ...

    @property
    def writes_ids(self) -> bool:
        """Whether ``item_id`` in templates shows the code of the item."""
        ...

    def encode(self, item: str) -> str:
        """Return the code of an item, a `Code` if it consists of item tokens."""
        ...


@runtime_checkable
class Predictor(Protocol):
    """A predictor that answers requests: a baseline or a language model."""

    name: str

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request, in order; failed requests get an `Unparsed` answer."""
        ...


@runtime_checkable
class CatalogueScorer(Protocol):
    """A ranking model that scores all items of the catalogue at once."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of all items, in column order."""
        ...

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return one finite score per request and item, shape (n, items); higher is better."""
        ...
