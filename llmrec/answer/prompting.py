"""Turns requests into prompts for a language model, and its answers into rankings, ratings, probabilities or texts.

`rank_requests` orders the candidates of requests, `CatalogueRanking` searches a whole catalogue, and
`answer_item_questions` answers questions about one item. All are stateless; `llmrec.answer.strategy` selects family,
template and strategy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llmrec.answer.strategy import TWO_STEP, TaskStrategy, items_only_task
from llmrec.backends.encode import Encoder, answer_pieces
from llmrec.data.hashing import hash64
from llmrec.data.requests import RankRequest
from llmrec.errors import BackendError, DataError, LlmrecError
from llmrec.index.table import ItemIndex
from llmrec.index.titles import title_key
from llmrec.pipeline.bundle import Bundle
from llmrec.pipeline.indexing import with_items_added
from llmrec.registry import strategy_eval_options
from llmrec.strategies.asking import Prompting, create_strategy
from llmrec.strategies.catalogue import CatalogueRanker
from llmrec.strategies.counting import count_prompts
from llmrec.strategies.rounds import max_list_tokens
from llmrec.tasks.task import Task, Want
from llmrec.types import (
    Answer,
    Backend,
    Cost,
    Event,
    Item,
    Probability,
    Prompt,
    Ranking,
    Rating,
    Request,
    Text,
    Unparsed,
)

NO_USER = "unknown"
"""The user name in prompts for a request without one."""
CONTEXT_KEYS = frozenset({"review", "feature", "headline", "rating"})
"""Names of context values that a question may have in addition to a history."""

# Maximum number of candidate tokens per forward pass, to limit the size of mask and logits; larger sets are split.
_SLICE_TOKENS = 1024
# Maximum number of generated tokens: for a label, and for a label or number about one item with surrounding text.
_LABEL_TOKENS, _VALUE_TOKENS = 4, 8
_QUOTED_CHARACTERS = 200
_INFINITE_SCORE = "the model returned a score that is not finite; try --dtype float32"
# Prefix of the ids of items that the index lacks; catalogue ids never contain this character.
_UNINDEXED_PREFIX = "\x1f"


# --------------------------------------------------------------------------- requests as tasks


@dataclass(frozen=True)
class TaskRequests:
    """Requests converted for a task, together with the original requests.

    Every mention of an item has a separate id, so that two requests can have different titles for an item.
    ``positions`` maps each candidate to its position in the seeded order of its request.
    """

    way: TaskStrategy
    task: Task
    originals: Sequence[RankRequest]
    requests: Sequence[Request]
    items: Mapping[str, Item]
    positions: Mapping[str, int]


def convert_requests(
    bundle: Bundle, requests: Sequence[RankRequest], way: TaskStrategy, index: ItemIndex | None = None
) -> TaskRequests:
    """Convert ranking requests to requests of a task, and assign an id to each mention of an item.

    ``index`` replaces the bundle's index, for an index with added items.
    """
    index = index or bundle.index
    items: dict[str, Item] = {}
    texts: dict[str, Item] = {}
    positions: dict[str, int] = {}

    def register(key: str, item: Item) -> str:
        items[key] = item
        texts[key] = Item(item_id=key, title=item.title, fields=item.fields)
        return key

    posed = []
    for n, request in enumerate(requests):
        past = [
            Event(
                item_id=register(f"{n}/history/{position}", event.item),
                rating=event.rating,
                timestamp=event.timestamp,
                text=event.text,
            )
            for position, event in enumerate(request.history)
        ]
        pool = []
        for position, original in enumerate(_seeded_order(request, bundle.seed)):
            pool.append(register(f"{n}/candidates/{position}", request.candidates[original]))
            positions[pool[-1]] = position
        if way.by_title:
            # Rounding depends on a title's position in the forward pass; sorting makes scores of a set reproducible.
            pool.sort(key=lambda key: (items[key].title, items[key].item_id))
        posed.append(
            Request(
                id=request.id,
                user_id=NO_USER if request.user_id is None else request.user_id,
                history=tuple(past),
                # A request without candidates ranks the whole catalogue.
                candidates=tuple(pool) or None,
                context={**request.context, **({"profile": request.profile} if request.profile else {})},
            )
        )
    codes = CodesByMention(index, items, requests) if index else None
    return TaskRequests(way, items_only_task(bundle, way.family, texts, codes), requests, posed, items, positions)


def _seeded_order(request: RankRequest, seed: int) -> list[int]:
    ids = [item.item_id for item in request.candidates]
    keys = hash64("rank candidates", seed, [request.id] * len(ids), ids)
    return sorted(range(len(ids)), key=lambda index: (int(keys[index]), ids[index]))


class CodesByMention:
    """Codes of the items in requests: from the index, or new codes for unknown items.

    An item that a request gives only by title is new, whatever the ids of the index; so is one whose title differs from
    that in an index of titles. Each request's new items are added separately, so that no request affects the codes of
    another or makes it fail.
    """

    def __init__(self, index: ItemIndex, items: Mapping[str, Item], requests: Sequence[RankRequest]) -> None:
        self._index, self._items, self._requests = index, items, requests
        self._extended: dict[int, ItemIndex] = {}

    @property
    def users(self) -> Mapping[str, str]:
        """Tokens of the training users; see `ItemCodes`."""
        return self._index.users

    @property
    def writes_ids(self) -> bool:
        """Whether templates show codes as item ids; see `ItemCodes`."""
        return self._index.writes_ids

    def encode(self, item: str) -> str:
        """Return the code of an item in a request; see `ItemCodes`.

        Raises:
            DataError: If the model has no token for an item.
        """
        n = int(item.partition("/")[0])
        name = self._name(self._items[item], self._requests[n])
        if name in self._index.codes:
            return self._index.encode(name)
        if n not in self._extended:
            self._extended[n] = self._index_with_new_items(self._requests[n])
        return self._extended[n].encode(name)

    def _name(self, item: Item, request: RankRequest) -> str:
        """Return the id of an item in the index, or an unused id if the index lacks the item."""
        if item.item_id in request.titled:
            return _UNINDEXED_PREFIX + item.item_id
        if self._index.scheme == "title" and item.item_id in self._index.codes:
            (written,) = self._index.codes[item.item_id]
            # A suffix of the title distinguishes items with the same title.
            if not title_key(written).startswith(title_key(item.title)):
                return _UNINDEXED_PREFIX + item.item_id
        return item.item_id

    def _index_with_new_items(self, request: RankRequest) -> ItemIndex:
        mentioned = (*(event.item for event in request.history), *request.candidates)
        named = {self._name(item, request): item for item in mentioned}
        return _extend_index(self._index, {name: replace(item, item_id=name) for name, item in named.items()})


def _extend_index(index: ItemIndex, items: Mapping[str, Item]) -> ItemIndex:
    """Return an index with additional items; items that need a new token are rejected."""
    extended = with_items_added(index, items)
    if extended.tokens != index.tokens:
        raise DataError(
            f"the model was tuned on one token per item (index scheme {index.scheme!r}), so new items have no token; "
            "remove the new items, or fine-tune with codes that share tokens",
            kind="unsupported",
            column="index.scheme",
        )
    return extended


# --------------------------------------------------------------------------- candidates


def rank_requests(
    bundle: Bundle,
    requests: Sequence[RankRequest],
    *,
    way: TaskStrategy,
    backend: Backend,
    encoder: Encoder,
    batch: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Ranking | Unparsed]:
    """Rank the candidates of every request, in order; a failed request does not affect the others.

    Candidates are ordered by a hash of the request's id and each item's id. Labels and ties follow this order, so the
    original order cannot affect the result.

    Args:
        bundle: The model and its training prompts.
        requests: From `llmrec.data.requests.parse_request`.
        way: From `select_ranking_strategy`.
        backend: An engine over the bundle's model.
        encoder: Its tokenizer and maximum prompt length.
        batch: Number of requests sent to the backend at a time.
        advance: Called with the number of requests just answered.

    Returns:
        Rankings of all candidates, with the ids of the request's items, or the reason of a failure.
    """
    posed = convert_requests(bundle, requests, way)
    answers: list[Ranking | Unparsed] = []
    for start in range(0, len(posed.requests), batch):
        part = range(start, min(start + batch, len(posed.requests)))
        answers += _iterate_rankings(posed, part, backend, encoder)
        advance(len(part))
    return answers


def first_prompt(bundle: Bundle, request: RankRequest, way: TaskStrategy, encoder: Encoder) -> Prompt:
    """Return the prompt of a request; the longest if there are several.

    Raises:
        LlmrecError: If it cannot be rendered.
    """
    posed = convert_requests(bundle, [request], way)
    if not request.candidates:
        return posed.task.prompt(posed.requests[0], template=way.template)
    prompt, _ = next(_longest_prompts(posed, posed.requests[0], encoder))
    return prompt


def ranking_notes(way: TaskStrategy, request: RankRequest, answer: Ranking | Unparsed) -> tuple[str, ...]:
    """Return notes about a ranking, in addition to the notes of its request."""
    if isinstance(answer, Unparsed):
        return ()
    if not way.by_title and len(request.candidates) == 1:
        return ("one candidate: ranked without the model",)
    if way.strategy == TWO_STEP and not request.history and answer.raw:
        return ("two-step: the profile was generated without a history",)
    left_out = sum(score == 0.0 for score in answer.scores) if way.strategy == "list" else 0
    return (f"the answer omits {left_out} candidates; they share the last rank",) if left_out else ()


@dataclass
class _Outcome:
    """The result of a request, combined from the answers to its parts."""

    scores: dict[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    raw: str | None = None
    prompt_hash: str | None = None
    failure: str = ""


def _iterate_rankings(
    posed: TaskRequests, part: range, backend: Backend, encoder: Encoder
) -> Iterator[Ranking | Unparsed]:
    outcomes = {n: _Outcome() for n in part}
    # Group requests by number of candidates, since a call has one maximum answer length.
    calls: dict[int, list[Request]] = defaultdict(list)
    owners: dict[int, list[int]] = defaultdict(list)
    for n in part:
        request = posed.requests[n]
        pool = request.candidates or ()
        if len(pool) == 1 and not posed.way.by_title:
            outcomes[n].scores[pool[0]] = 0.0
            continue
        try:
            slices = _split_request(posed, request, encoder)
        except LlmrecError as error:
            outcomes[n].failure = str(error)
            continue
        size = len(pool) if posed.way.strategy == "list" else 0
        calls[size] += slices
        owners[size] += [n] * len(slices)
    for size, group in calls.items():
        asker = Prompting(backend=backend, task=posed.task, template=posed.way.template, batch=len(group))
        strategy: Any = create_strategy(posed.way.strategy, asker, **posed.way.options)
        answers = (
            _answer_two_steps(strategy, group, encoder)
            if posed.way.strategy == TWO_STEP
            else _answer_in_halves(strategy, group)
        )
        for n, answer in zip(owners[size], answers, strict=True):
            _add_answer(outcomes[n], answer)
    for n in part:
        yield _outcome_to_answer(posed, n, outcomes[n])


def _answer_in_halves(strategy: Any, requests: Sequence[Request]) -> list[Ranking | Unparsed]:
    """Answer requests; if a request is too long, split the batch so that only this request fails."""
    try:
        answers: list[Ranking | Unparsed] = strategy.answer(requests)
        return answers
    except BackendError as error:
        if error.kind != "too-large":
            raise
        if len(requests) == 1:
            return [Unparsed(request_id=requests[0].id, reason=str(error))]
        half = len(requests) // 2
        return [*_answer_in_halves(strategy, requests[:half]), *_answer_in_halves(strategy, requests[half:])]


def _answer_two_steps(strategy: Any, requests: Sequence[Request], encoder: Encoder) -> list[Ranking | Unparsed]:
    """Answer requests in two steps; a profile that does not fit the second prompt fails only its own request.

    The generated profile is known only between the steps, so the second prompts are checked when one is rejected.
    """
    try:
        answers: list[Ranking | Unparsed] = strategy.answer(requests)
        return answers
    except BackendError:
        faults = {
            n: fault
            for n, request in enumerate(requests)
            if (fault := _second_prompt_error(strategy, request, encoder))
        }
        if not faults:
            raise
        rest = iter(strategy.answer([request for n, request in enumerate(requests) if n not in faults]))
        return [
            Unparsed(request_id=request.id, reason=f"two-step, second prompt: {faults[n]}")
            if n in faults
            else next(rest)
            for n, request in enumerate(requests)
        ]


def _second_prompt_error(strategy: Any, request: Request, encoder: Encoder) -> str:
    """Return an error message if the prompt with the profile is invalid; otherwise an empty text."""
    try:
        prompt = strategy.first_prompt(request)
        texts = strategy.asker.task.continuations(request, template=strategy.asker.template)
        encoder.continuations(prompt, encoder.prompt(prompt), texts, closed=True)
    except LlmrecError as error:
        return str(error)
    return ""


def _longest_prompts(posed: TaskRequests, request: Request, encoder: Encoder) -> Iterator[tuple[Prompt, list[int]]]:
    """Yield the longest prompts of a request, each with the lengths of possible answers in tokens."""
    way, task = posed.way, posed.task
    pool = request.candidates or ()
    if way.strategy == "list":
        yield task.prompt(request, template=way.template, want="ranking"), [max_list_tokens(len(pool))]
        return
    if (count := count_prompts(way.strategy, len(pool), way.asking)) is not None:
        # Chosen by characters; a question that is longer in tokens fails later, in the engine.
        longest = sorted(pool, key=lambda item: -len(posed.items[item].title))[: count.size]
        prompt = task.prompt(replace(request, candidates=tuple(longest)), template=way.template, want=count.want)
        yield prompt, [max_list_tokens(len(pool)) if count.want == "ranking" else _LABEL_TOKENS]
        return
    if way.strategy == TWO_STEP and "profile" not in request.context:
        # The second prompt contains the text generated in the first step.
        yield task.profile_prompt(request), [task.profile_tokens]
        yield task.prompt(request, template=way.template), [task.profile_tokens + _LABEL_TOKENS]
        return
    prompt = task.prompt(request, template=way.template)
    texts = task.continuations(request, template=way.template)
    yield prompt, [len(encoder.continuation(prompt, text, closed=True)) for text in texts]


def prompt_length_error(
    prompt_tokens: int, answer_tokens: int, encoder: Encoder, fix: str = "shorten its texts"
) -> str:
    """Return an error message if a prompt with its longest answer is too long; otherwise an empty text."""
    if prompt_tokens + answer_tokens <= encoder.max_length:
        return ""
    return (
        f"the prompt has {prompt_tokens} tokens and its answer up to {answer_tokens}, together more than the maximum "
        f"of {encoder.max_length}; {fix}, or raise --max-length"
    )


def _split_request(posed: TaskRequests, request: Request, encoder: Encoder) -> list[Request]:
    """Split a request into slices for one forward pass each; scores do not depend on other candidates."""
    tails: list[int] = []
    for prompt, tails in _longest_prompts(posed, request, encoder):
        prefix_length = sum(len(encoder.piece(text)) for text in answer_pieces(prompt.answer_prefix))
        length = len(encoder.chat(prompt.messages)) + prefix_length
        if error := prompt_length_error(length, max(tails), encoder, "shorten its texts, give fewer candidates"):
            raise DataError(error, kind="too-large", column="--max-length")
    if not posed.way.by_title or sum(tails) <= _SLICE_TOKENS:
        return [request]
    slices: list[list[str]] = [[]]
    size = 0
    for item, tail in zip(request.candidates or (), tails, strict=True):
        if slices[-1] and size + tail > _SLICE_TOKENS:
            slices.append([])
            size = 0
        slices[-1].append(item)
        size += tail
    return [replace(request, candidates=tuple(items)) for items in slices]


def _add_answer(outcome: _Outcome, answer: Ranking | Unparsed) -> None:
    outcome.raw, outcome.prompt_hash = answer.raw, answer.prompt_hash
    outcome.cost += answer.cost
    if isinstance(answer, Ranking):
        outcome.scores.update(zip(answer.items, answer.scores, strict=True))
    else:
        outcome.failure = (
            answer.reason if answer.raw is None else f"{answer.reason}: {answer.raw[:_QUOTED_CHARACTERS]!r}"
        )


def _outcome_to_answer(posed: TaskRequests, n: int, outcome: _Outcome) -> Ranking | Unparsed:
    request_id = posed.originals[n].id
    if not outcome.failure and not all(math.isfinite(score) for score in outcome.scores.values()):
        outcome.failure = _INFINITE_SCORE
    if outcome.failure:
        return Unparsed(request_id=request_id, reason=outcome.failure, raw=outcome.raw, cost=outcome.cost)
    # Candidates that a generated list lacks are ranked last.
    pool = sorted(
        posed.requests[n].candidates or (), key=lambda item: (-outcome.scores.get(item, 0.0), posed.positions[item])
    )
    return Ranking(
        request_id=request_id,
        items=tuple(posed.items[item].item_id for item in pool),
        scores=tuple(outcome.scores.get(item, 0.0) for item in pool),
        raw=outcome.raw,
        prompt_hash=outcome.prompt_hash,
        cost=outcome.cost,
    )


# --------------------------------------------------------------------------- the whole catalogue


class CatalogueRanking:
    """Ranks the whole catalogue by constrained search, for requests without candidates.

    Args:
        bundle: The model and its training prompts.
        items: The catalogue; items missing from the model's index are added to it once.
        way: A family and template with the strategy ``search``.
        encoder: The model's tokenizer and maximum prompt length.
        beams: The beam width, and the number of items in an answer.
        exact: Widen a search until no other item can be better.
    """

    def __init__(
        self, bundle: Bundle, items: Mapping[str, Item], way: TaskStrategy, encoder: Encoder, *, beams: int, exact: bool
    ) -> None:
        self._bundle, self._items, self._way, self._encoder = bundle, items, way, encoder
        self._beams, self._exact = beams, exact
        self._index = _extend_index(bundle.index, items) if bundle.index is not None else None

    @cached_property
    def _outputs(self) -> Any:
        """The task with the ids of the catalogue, which renders the texts of items."""
        return items_only_task(self._bundle, self._way.family, self._items, self._index)

    @cached_property
    def _longest(self) -> int:
        request = Request(id="longest", user_id="nobody")
        prompt = self._outputs.prompt(request, template=self._way.template)
        texts = set(self._outputs.continuations(request, template=self._way.template))
        return max(len(self._encoder.continuation(prompt, text, closed=True)) for text in texts)

    def rank(
        self, requests: Sequence[RankRequest], backend: Backend, *, batch: int, advance: Callable[[int], None]
    ) -> list[Ranking | Unparsed]:
        """Rank the catalogue for every request, in order; a failed request does not affect the others.

        Args:
            requests: From `llmrec.data.requests.parse_request`.
            backend: An engine over the bundle's model.
            batch: Number of requests sent to the backend at a time.
            advance: Called with the number of requests just answered.
        """
        posed = convert_requests(self._bundle, requests, self._way, self._index)
        failures = {
            n: reason for n, request in enumerate(posed.requests) if (reason := self._request_error(posed, request))
        }
        # Numbers are used instead of ids, since two requests may have the same id.
        numbered = [replace(request, id=str(n)) for n, request in enumerate(posed.requests)]
        valid = [request for n, request in enumerate(numbered) if n not in failures]
        excluded = {request.id: self._apart(posed, request, requests[int(request.id)]) for request in valid}
        ranker = CatalogueRanker(
            Prompting(
                backend=backend,
                task=_CatalogueTask(posed, self._outputs),  # type: ignore[arg-type]
                template=self._way.template,
                batch=batch,
                advance=advance,
            ),
            beams=self._beams,
            exact=self._exact,
            apart=lambda request: excluded[request.id],
        )
        outcome = iter(ranker.answer(valid))
        advance(len(failures))
        return [
            Unparsed(request_id=request.id, reason=failures[n])
            if n in failures
            else _checked_search_answer(request, next(outcome))
            for n, request in enumerate(requests)
        ]

    def _apart(self, posed: TaskRequests, request: Request, original: RankRequest) -> frozenset[str]:
        """Return the catalogue items that are excluded from the answer to a request."""
        if original.keep_seen:
            return original.barred
        return original.barred | {self._catalogue_id(posed.items[event.item_id], original) for event in request.history}

    def _catalogue_id(self, item: Item, request: RankRequest) -> str:
        """Return the catalogue id of an item in a history, found by id or by unique title."""
        if item.item_id not in request.titled:
            return item.item_id
        named = self._by_title.get(title_key(item.title), [])
        return named[0] if len(named) == 1 else item.title

    @cached_property
    def _by_title(self) -> Mapping[str, list[str]]:
        outcome: dict[str, list[str]] = {}
        for item_id, item in self._items.items():
            outcome.setdefault(title_key(item.title), []).append(item_id)
        return outcome

    def _request_error(self, posed: TaskRequests, request: Request) -> str:
        """Return an error message if a request cannot be answered; otherwise an empty text."""
        try:
            prompt = posed.task.prompt(request, template=self._way.template)
            length = len(self._encoder.prompt(prompt))
        except LlmrecError as error:
            return str(error)
        return prompt_length_error(length, self._longest, self._encoder)


class _CatalogueTask:
    """A task with the prompts of requests and the continuations of a catalogue."""

    def __init__(self, posed: TaskRequests, outputs: Any) -> None:
        self._posed, self._outputs = posed, outputs
        self.catalogue: tuple[str, ...] = outputs.catalogue

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        outcome: Prompt = self._posed.task.prompt(request, template=template, shots=shots, want=want)
        return outcome

    def writes_alike(self, template: str) -> bool:
        return bool(self._outputs.writes_alike(template))

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        ask = Request(id=request.id, user_id=request.user_id)
        outcome: tuple[str, ...] = self._outputs.continuations(ask, template=template)
        return outcome


def _checked_search_answer(request: RankRequest, answer: Answer) -> Ranking | Unparsed:
    assert isinstance(answer, Ranking)  # a search always has a result
    if not all(map(math.isfinite, answer.scores)):
        return Unparsed(request_id=request.id, reason=_INFINITE_SCORE, cost=answer.cost)
    return replace(answer, request_id=request.id)


# --------------------------------------------------------------------------- one item


def answer_item_questions(
    bundle: Bundle, requests: Sequence[RankRequest], *, way: TaskStrategy, backend: Backend, encoder: Encoder
) -> list[Answer]:
    """Answer every request about one item, in order; a failed request does not affect the others.

    Args:
        bundle: The model and its training prompts.
        requests: Requests with one candidate: the item in question.
        way: From `select_item_strategy`.
        backend: An engine over the bundle's model.
        encoder: Its tokenizer and maximum prompt length.

    Returns:
        Ratings, probabilities or texts, depending on the family; an `Unparsed` with the reason for a failure.
    """
    posed = convert_requests(bundle, requests, way)
    ready: dict[int, Request] = {}
    failures: dict[int, str] = {}
    for n, request in enumerate(posed.requests):
        if request.candidates is None or len(request.candidates) != 1:
            failures[n] = f"{way.family} needs exactly one item; give it as 'item'"
            continue
        ready[n] = _item_request(request)
        try:
            length = len(encoder.prompt(posed.task.prompt(ready[n], template=way.template)))
        except LlmrecError as error:
            failures[n] = str(error)
            continue
        if too_long := prompt_length_error(
            length, posed.task.strategy_options.get("max_tokens", _VALUE_TOKENS), encoder
        ):
            failures[n] = too_long
    valid = [n for n in ready if n not in failures]
    options = {**posed.task.strategy_options, **strategy_eval_options(way.strategy, way.asking)}
    asker = Prompting(backend=backend, task=posed.task, template=way.template)
    strategy = create_strategy(way.strategy, asker, **options)
    result = dict(zip(valid, strategy.answer([ready[n] for n in valid]), strict=True)) if valid else {}
    return [
        Unparsed(request_id=request.id, reason=failures[n])
        if n in failures
        else replace(result[n], request_id=request.id)
        for n, request in enumerate(requests)
    ]


def item_question_prompt(bundle: Bundle, request: RankRequest, way: TaskStrategy) -> Prompt:
    """Return the prompt of a request about one item."""
    posed = convert_requests(bundle, [request], way)
    return posed.task.prompt(_item_request(posed.requests[0]), template=way.template)


def _item_request(request: Request) -> Request:
    """Return a request about one item, given a request whose only candidate is this item."""
    assert request.candidates is not None
    return replace(request, item=request.candidates[0], candidates=None)


def answer_value(answer: Answer) -> float | str | None:
    """Return the rating, probability or text in an answer; None if there is none."""
    if isinstance(answer, Rating | Probability):
        return answer.value
    return answer.text if isinstance(answer, Text) else None
