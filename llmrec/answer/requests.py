"""Requests with candidates in, ranked lists out, from any model that `llmrec.pipeline.bundle` opens.

`rank_requests` is the whole of it: a pure function from requests to answers. How requests are put is in
`llmrec.answer.strategy`; files, parts and resuming are in `llmrec.answer.rank.run`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrec.answer.questions import TaskRequests, pose
from llmrec.answer.strategy import TWO_STEP, Asking, choose_way
from llmrec.backends.encode import Encoder, pieces
from llmrec.data.assemble import read_items
from llmrec.data.dataset import Dataset
from llmrec.data.described import described_items
from llmrec.data.requests import RankRequest
from llmrec.data.sets.table import load
from llmrec.errors import BackendError, DataError, LlmrecError
from llmrec.pipeline.bundle import Bundle
from llmrec.recipe.load import load_stored
from llmrec.recipe.schema import Recipe
from llmrec.strategies.asking import Prompting, strategy_of
from llmrec.strategies.counting import questions_of
from llmrec.strategies.listwise import list_room
from llmrec.types import Backend, Cost, Item, Prompt, Ranking, Request, Unparsed

__all__ = ["ITEMS", "Asking", "catalogue", "catalogue_of", "choose_way", "first_prompt", "notes_of", "rank_requests"]

ITEMS = "items.parquet"
"""The catalogue that an exported folder may carry."""

# Candidate tokens of one forward: its mask and its logits grow with them, so a large set is scored in slices.
_SLICE = 1024
# Tokens of one label that is written, with what stands around it.
_LABEL = 4
_QUOTED = 200


def catalogue(bundle: Bundle, items: Path | None) -> Mapping[str, Item] | None:
    """Return the items that requests may name by id; see `catalogue_of`."""
    return catalogue_of(bundle, items)[0]


def catalogue_of(bundle: Bundle, items: Path | None) -> tuple[Mapping[str, Item] | None, Dataset | None]:
    """Return the items that requests may name by id, and the data of a run where they were read for that.

    The items are those of a table, of the run's own data, or what the folder carries. Of a tuned model that carries
    none no id is known: the items that it was tuned on have titles, and an id is none. A plain pretrained model has no
    items, and None says that what requests name are titles.

    Raises:
        DataError: If a table or the run's data cannot be read.
    """
    if items is not None:
        return read_items(items), None
    if bundle.run is not None:
        recipe = load_stored(bundle.run)
        data = data_of_run(bundle, recipe)
        return described_items(data.items, recipe.data.texts), data
    carried = Path(bundle.folder) / ITEMS
    if carried.is_file():
        return read_items(carried), None
    return ({} if bundle.tuned else None), None


def data_of_run(bundle: Bundle, recipe: Recipe) -> Dataset:
    """Read the data of a run.

    Raises:
        DataError: If they cannot be read.
    """
    try:
        return load(recipe.data, seed=recipe.seed)
    except DataError as error:
        raise DataError(
            f"{error}. This is the data of the run {bundle.run}; or name a table with --items",
            kind=error.kind,
            at=error.place,
            column=error.column,
        ) from None


def rank_requests(
    bundle: Bundle,
    requests: Sequence[RankRequest],
    *,
    way: Asking,
    backend: Backend,
    encoder: Encoder,
    batch: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Ranking | Unparsed]:
    """Rank every request's candidates, in order; a request that cannot be ranked does not touch the others.

    A hash of the request's id and of each item's id decides an order of the candidates. Labels follow it and ties keep
    it, so the order in which they were given cannot show in the result.

    Args:
        bundle: The model and how it was asked in training.
        requests: From `llmrec.data.requests.read_request`.
        way: From `choose_way`.
        backend: An engine over the bundle's model.
        encoder: Its tokenizer and its longest prompt.
        batch: Requests handed to the backend at a time.
        advance: Called with the number of requests just answered.

    Returns:
        Rankings of all candidates, with the ids of the request's items, or the reason why there is none.
    """
    posed = pose(bundle, requests, way)
    answers: list[Ranking | Unparsed] = []
    for start in range(0, len(posed.requests), batch):
        part = range(start, min(start + batch, len(posed.requests)))
        answers += _answers(posed, part, backend, encoder)
        advance(len(part))
    return answers


def first_prompt(bundle: Bundle, request: RankRequest, way: Asking, encoder: Encoder) -> Prompt:
    """Return a prompt of a request; where one takes several questions, the longest of them.

    Raises:
        LlmrecError: If it cannot be rendered.
    """
    posed = pose(bundle, [request], way)
    if not request.candidates:
        return posed.task.prompt(posed.requests[0], template=way.template)
    prompt, _ = next(_longest(posed, posed.requests[0], encoder))
    return prompt


def notes_of(way: Asking, request: RankRequest, answer: Ranking | Unparsed) -> tuple[str, ...]:
    """Return what there is to say about a ranking besides the request's own notes."""
    if isinstance(answer, Unparsed):
        return ()
    if not way.by_title and len(request.candidates) == 1:
        return ("one candidate: ranked without asking the model",)
    if way.strategy == TWO_STEP and not request.history and answer.raw:
        return ("two-step: the profile was written without a history to go by",)
    left_out = sum(score == 0.0 for score in answer.scores) if way.strategy == "list" else 0
    return (f"the answer left out {left_out} candidates: they share the last place",) if left_out else ()


# --------------------------------------------------------------------------- from answers to rankings


@dataclass
class _Found:
    """What was learned about one request, from one answer or from those of its slices."""

    scores: dict[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    raw: str | None = None
    prompt_hash: str | None = None
    failure: str = ""


def _answers(posed: TaskRequests, part: range, backend: Backend, encoder: Encoder) -> Iterator[Ranking | Unparsed]:
    found = {n: _Found() for n in part}
    # Lists are asked for by size: how long an answer may be is one number a call.
    calls: dict[int, list[Request]] = defaultdict(list)
    owners: dict[int, list[int]] = defaultdict(list)
    for n in part:
        request = posed.requests[n]
        pool = request.candidates or ()
        if len(pool) == 1 and not posed.way.by_title:
            found[n].scores[pool[0]] = 0.0
            continue
        try:
            slices = _slices(posed, request, encoder)
        except LlmrecError as error:
            found[n].failure = str(error)
            continue
        size = len(pool) if posed.way.strategy == "list" else 0
        calls[size] += slices
        owners[size] += [n] * len(slices)
    for size, asked in calls.items():
        asker = Prompting(backend=backend, task=posed.task, template=posed.way.template, batch=len(asked))
        strategy: Any = strategy_of(posed.way.strategy, asker, **posed.way.options)
        answers = _two_steps(strategy, asked, encoder) if posed.way.strategy == TWO_STEP else _each(strategy, asked)
        for n, answer in zip(owners[size], answers, strict=True):
            _add(found[n], answer)
    for n in part:
        yield _result(posed, n, found[n])


def _each(strategy: Any, asked: Sequence[Request]) -> list[Ranking | Unparsed]:
    """Ask; a question that is too long all the same, see `_longest`, fails its own request alone."""
    try:
        answers: list[Ranking | Unparsed] = strategy.answer(asked)
        return answers
    except BackendError as error:
        if error.kind != "too-large":
            raise
        if len(asked) == 1:
            return [Unparsed(request_id=asked[0].id, reason=str(error))]
        half = len(asked) // 2
        return [*_each(strategy, asked[:half]), *_each(strategy, asked[half:])]


def _two_steps(strategy: Any, asked: Sequence[Request], encoder: Encoder) -> list[Ranking | Unparsed]:
    """Ask in two steps; a profile that cannot be put into the second prompt fails its own request alone.

    What a model writes is known only between the steps, so the second prompts are looked at where they are refused.
    """
    try:
        answers: list[Ranking | Unparsed] = strategy.answer(asked)
        return answers
    except BackendError:
        faults = {n: fault for n, request in enumerate(asked) if (fault := _fault(strategy, request, encoder))}
        if not faults:
            raise
        rest = iter(strategy.answer([request for n, request in enumerate(asked) if n not in faults]))
        return [
            Unparsed(request_id=request.id, reason=f"two-step, second prompt: {faults[n]}")
            if n in faults
            else next(rest)
            for n, request in enumerate(asked)
        ]


def _fault(strategy: Any, request: Request, encoder: Encoder) -> str:
    """Return why the prompt that holds the profile cannot be asked; empty if it can."""
    try:
        prompt = strategy.first_prompt(request)
        texts = strategy.asker.task.continuations(request, template=strategy.asker.template)
        encoder.continuations(prompt, encoder.prompt(prompt), texts, closed=True)
    except LlmrecError as error:
        return str(error)
    return ""


def _longest(posed: TaskRequests, request: Request, encoder: Encoder) -> Iterator[tuple[Prompt, list[int]]]:
    """Yield the longest prompts of a request, each with the tokens of what can follow it.

    Raises:
        LlmrecError: If a prompt cannot be rendered.
    """
    way, task = posed.way, posed.task
    pool = request.candidates or ()
    if way.strategy == "list":
        yield task.prompt(request, template=way.template, want="ranking"), [list_room(len(pool))]
        return
    if (count := questions_of(way.strategy, len(pool), way.asking)) is not None:
        # The longest titles in one question. By letters: what takes more tokens all the same is found when it is asked.
        longest = sorted(pool, key=lambda item: -len(posed.items[item].title))[: count.size]
        prompt = task.prompt(replace(request, candidates=tuple(longest)), template=way.template, want=count.want)
        yield prompt, [list_room(len(pool)) if count.want == "ranking" else _LABEL]
        return
    if way.strategy == TWO_STEP and "profile" not in request.context:
        # The second prompt holds what the first one wrote.
        yield task.profile_prompt(request), [task.profile_tokens]
        yield task.prompt(request, template=way.template), [task.profile_tokens + _LABEL]
        return
    prompt = task.prompt(request, template=way.template)
    texts = task.continuations(request, template=way.template)
    yield prompt, [len(encoder.continuation(prompt, text, closed=True)) for text in texts]


def _slices(posed: TaskRequests, request: Request, encoder: Encoder) -> list[Request]:
    """Cut a request so that each part fits one forward; scores do not depend on what else is scored.

    Raises:
        LlmrecError: If the prompt cannot be rendered, forges a control token, or is too long.
    """
    tails: list[int] = []
    for prompt, tails in _longest(posed, request, encoder):
        given = sum(len(encoder.piece(text)) for text in pieces(prompt.answer_prefix))
        length = len(encoder.chat(prompt.messages)) + given
        if length + max(tails) > encoder.max_length:
            raise DataError(
                f"the prompt has {length} tokens and its longest answer {max(tails)}, together more than the "
                f"{encoder.max_length} that fit; shorten its texts, give fewer candidates, or raise --max-length",
                kind="too-large",
                column="--max-length",
            )
    if not posed.way.by_title or sum(tails) <= _SLICE:
        return [request]
    slices: list[list[str]] = [[]]
    size = 0
    for item, tail in zip(request.candidates or (), tails, strict=True):
        if slices[-1] and size + tail > _SLICE:
            slices.append([])
            size = 0
        slices[-1].append(item)
        size += tail
    return [replace(request, candidates=tuple(items)) for items in slices]


def _add(found: _Found, answer: Ranking | Unparsed) -> None:
    found.raw, found.prompt_hash = answer.raw, answer.prompt_hash
    found.cost += answer.cost
    if isinstance(answer, Ranking):
        found.scores.update(zip(answer.items, answer.scores, strict=True))
    else:
        found.failure = answer.reason if answer.raw is None else f"{answer.reason}: {answer.raw[:_QUOTED]!r}"


def _result(posed: TaskRequests, n: int, found: _Found) -> Ranking | Unparsed:
    request_id = posed.asked[n].id
    if not found.failure and not all(math.isfinite(score) for score in found.scores.values()):
        found.failure = "the model gave a score that is no finite number; try --dtype float32"
    if found.failure:
        return Unparsed(request_id=request_id, reason=found.failure, raw=found.raw, cost=found.cost)
    # What a generated list leaves out comes last.
    pool = sorted(
        posed.requests[n].candidates or (), key=lambda item: (-found.scores.get(item, 0.0), posed.places[item])
    )
    return Ranking(
        request_id=request_id,
        items=tuple(posed.items[item].item_id for item in pool),
        scores=tuple(found.scores.get(item, 0.0) for item in pool),
        raw=found.raw,
        prompt_hash=found.prompt_hash,
        cost=found.cost,
    )
