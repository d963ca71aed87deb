"""Requests with candidates in, ranked lists out, from any model that `llmrec.build.bundle` opens.

`rank_requests` is the whole of it: a pure function from requests to answers. Files, parts and resuming are in
`llmrec.build.rank_files`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from llmrec.backends.encode import Encoder, pieces
from llmrec.build.bundle import Bundle
from llmrec.build.ranking_codes import CodesByMention
from llmrec.data.dataset import SCHEMA, Dataset
from llmrec.data.hashing import hash64
from llmrec.data.items import read_items
from llmrec.data.requests import RankRequest
from llmrec.data.sources import load
from llmrec.data.split import SplitDataset
from llmrec.errors import DataError, LlmrecError, RecipeError, did_you_mean
from llmrec.index.index import ItemIndex
from llmrec.rank.asking import Asker
from llmrec.recipe_file import load_recipe
from llmrec.registry import FAMILY_STRATEGIES, STRATEGIES, TASKS, lookup
from llmrec.types import Backend, Cost, Event, Item, ItemCodes, Ranking, Request, Unparsed

RANKING = ("sequential", "direct")
ITEMS = "items.parquet"
"""The catalogue that an exported folder may carry."""

# Candidate tokens of one forward: its mask and its logits grow with them, so a large set is scored in slices.
_SLICE = 1024
# Tokens that a generated list takes for each candidate, as `llmrec.rank.listwise` leaves room for them.
_LISTED = 4
_NOBODY = "unknown"
_QUOTED = 200


@dataclass(frozen=True, slots=True)
class Way:
    """How requests are put: a family of a bundle, one of its templates, and a strategy."""

    family: str
    template: str
    strategy: str


def choose_way(bundle: Bundle, *, task: str = "auto", template: str | None = None, strategy: str = "auto") -> Way:
    """Choose a family, template and strategy that fit together and that the bundle has.

    Of several families, sequential goes first; the template is the one that the family was evaluated with.

    Raises:
        RecipeError: If something asked for is unknown, or nothing fits.
    """
    here = [family for family in RANKING if family in bundle.tasks.present()]
    if not here:
        tuned = ", ".join(bundle.tasks.present())
        raise RecipeError(
            f"{bundle.folder} was tuned on {tuned}, which rank nothing; tune on tasks.sequential or tasks.direct, or "
            "name a pretrained model with --model"
        )
    strategies = [name for family in RANKING for name in FAMILY_STRATEGIES[family]]
    one_of("task", task, ("auto", *RANKING))
    one_of("strategy", strategy, ("auto", *strategies))
    templates = {family: bundle.templates[family] for family in here}
    if template is not None:
        one_of("template", template.rpartition("/")[2], [name for known in templates.values() for name in known])
    for family in here:
        fits = task in ("auto", family) and strategy in ("auto", *FAMILY_STRATEGIES[family])
        if fits and (template is None or _named(template, family, templates[family])):
            name = (
                template.rpartition("/")[2] if template else task_of(bundle, family, {}, bundle.index).eval_templates[0]
            )
            return Way(family, name, FAMILY_STRATEGIES[family][0] if strategy == "auto" else strategy)
    asked = [f"--task {task}", f"--strategy {strategy}", f"--template {template}" if template else ""]
    known = "; ".join(
        f"{family} with {' or '.join(FAMILY_STRATEGIES[family])}, templates {', '.join(templates[family])}"
        for family in here
    )
    raise RecipeError(f"{' '.join(filter(None, asked))} do not go together for {bundle.folder}, which has: {known}")


def catalogue(bundle: Bundle, items: Path | None) -> Mapping[str, Item] | None:
    """Return the items that requests may name by id: a table, the run's own data, or what the folder carries.

    Raises:
        DataError: If a table or the run's data cannot be read.
    """
    if items is not None:
        return read_items(items)
    if bundle.run is not None:
        recipe = load_recipe(str(bundle.run / "recipe.yaml"))
        try:
            return load(recipe.data, seed=recipe.seed).items
        except DataError as error:
            raise DataError(
                f"{error}. This is the data of the run {bundle.run}; or name a table with --items"
            ) from None
    carried = Path(bundle.folder) / ITEMS
    return read_items(carried) if carried.is_file() else None


def rank_requests(
    bundle: Bundle,
    requests: Sequence[RankRequest],
    *,
    way: Way,
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


def notes_of(way: Way, request: RankRequest, answer: Ranking | Unparsed) -> tuple[str, ...]:
    """Return what there is to say about a ranking besides the request's own notes."""
    if isinstance(answer, Unparsed):
        return ()
    if way.strategy != "likelihood" and len(request.candidates) == 1:
        return ("one candidate: ranked without asking the model",)
    left_out = sum(score == 0.0 for score in answer.scores) if way.strategy == "list" else 0
    return (f"the answer left out {left_out} candidates: they share the last place",) if left_out else ()


# --------------------------------------------------------------------------- from requests to a task's own terms


@dataclass(frozen=True)
class Posed:
    """Requests as a task knows them, beside what was asked.

    Every mention of an item has an id of its own, so that two requests can give one item two titles. ``places`` says
    where the seeded order of its request puts a candidate.
    """

    way: Way
    task: Any
    asked: Sequence[RankRequest]
    requests: Sequence[Request]
    items: Mapping[str, Item]
    places: Mapping[str, int]


def pose(bundle: Bundle, requests: Sequence[RankRequest], way: Way, index: ItemIndex | None = None) -> Posed:
    """Give every mention of an item an id of its own, and requests the form that a task takes.

    ``index`` stands in for the bundle's, where more items were placed in it.
    """
    index = index or bundle.index
    items: dict[str, Item] = {}
    texts: dict[str, Item] = {}
    places: dict[str, int] = {}

    def register(key: str, item: Item) -> str:
        items[key] = item
        texts[key] = Item(item_id=key, title=item.title, fields=item.fields)
        return key

    posed = []
    for n, request in enumerate(requests):
        past = [
            Event(
                item_id=register(f"{n}/history/{place}", event.item),
                rating=event.rating,
                timestamp=event.timestamp,
                text=event.text,
            )
            for place, event in enumerate(request.history)
        ]
        pool = []
        for place, given in enumerate(_seeded_order(request, bundle.seed)):
            pool.append(register(f"{n}/candidates/{place}", request.candidates[given]))
            places[pool[-1]] = place
        if way.strategy == "likelihood":
            # Rounding depends on where in a forward a title stands: the same set is to give the same scores always.
            pool.sort(key=lambda key: (items[key].title, items[key].item_id))
        posed.append(
            Request(
                id=str(n),
                user_id=_NOBODY if request.user_id is None else request.user_id,
                history=tuple(past),
                # A request without candidates is one about the whole catalogue.
                candidates=tuple(pool) or None,
                context={"profile": request.profile} if request.profile else {},
            )
        )
    codes = CodesByMention(index, items, requests) if index else None
    return Posed(way, task_of(bundle, way.family, texts, codes), requests, posed, items, places)


def _seeded_order(request: RankRequest, seed: int) -> list[int]:
    ids = [item.item_id for item in request.candidates]
    keys = hash64("rank candidates", seed, [request.id] * len(ids), ids)
    return sorted(range(len(ids)), key=lambda place: (int(keys[place]), ids[place]))


def task_of(bundle: Bundle, family: str, items: Mapping[str, Item], codes: ItemCodes | None = None) -> Any:
    """Build a family's task over these items alone: no interactions, so it can only ask."""
    nothing = pl.DataFrame(schema=dict(SCHEMA))
    dataset = Dataset(
        name="requests", noun=bundle.noun, interactions=nothing, items=items, rating_scale=bundle.rating_scale
    )
    data = SplitDataset(
        dataset=dataset,
        kind="requests",
        seed=bundle.seed,
        train=nothing,
        valid=nothing,
        test=nothing,
        held_out=frozenset(),
    )
    section = bundle.tasks.present()[family]
    return lookup(TASKS, family, "task")(data, section, bundle.templates[family], seed=bundle.seed, index=codes)


# --------------------------------------------------------------------------- from answers to rankings


@dataclass
class _Found:
    """What was learned about one request, from one answer or from those of its slices."""

    scores: dict[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    raw: str | None = None
    prompt_hash: str | None = None
    failure: str = ""


def _answers(posed: Posed, part: range, backend: Backend, encoder: Encoder) -> Iterator[Ranking | Unparsed]:
    found = {n: _Found() for n in part}
    # Lists are asked for by size: how long an answer may be is one number a call.
    calls: dict[int, list[Request]] = defaultdict(list)
    owners: dict[int, list[int]] = defaultdict(list)
    for n in part:
        request = posed.requests[n]
        pool = request.candidates or ()
        if len(pool) == 1 and posed.way.strategy != "likelihood":
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
        asker = Asker(backend=backend, task=posed.task, template=posed.way.template, batch=len(asked))
        strategy = lookup(STRATEGIES, posed.way.strategy, "strategy")(asker)
        for n, answer in zip(owners[size], strategy.answer(asked), strict=True):
            _add(found[n], answer)
    for n in part:
        yield _result(posed, n, found[n])


def _slices(posed: Posed, request: Request, encoder: Encoder) -> list[Request]:
    """Cut a request so that each part fits one forward; scores do not depend on what else is scored.

    Raises:
        LlmrecError: If the prompt cannot be rendered, forges a control token, or is too long.
    """
    way, task = posed.way, posed.task
    pool = request.candidates or ()
    if way.strategy == "list":
        prompt = task.prompt(request, template=way.template, want="ranking")
        tails = [_LISTED * len(pool)]
    else:
        prompt = task.prompt(request, template=way.template)
        closed = way.strategy == "likelihood"
        texts = task.continuations(request, template=way.template)
        tails = [len(encoder.continuation(prompt, text, closed=closed)) for text in texts]
    length = len(encoder.chat(prompt.messages)) + sum(len(encoder.piece(text)) for text in pieces(prompt.answer_prefix))
    if length + max(tails) > encoder.max_length:
        raise DataError(
            f"the prompt has {length} tokens and its longest answer {max(tails)}, together more than the "
            f"{encoder.max_length} that fit; shorten its texts, give fewer candidates, or raise --max-length"
        )
    if way.strategy != "likelihood" or sum(tails) <= _SLICE:
        return [request]
    slices: list[list[str]] = [[]]
    size = 0
    for item, tail in zip(pool, tails, strict=True):
        if slices[-1] and size + tail > _SLICE:
            slices.append([])
            size = 0
        slices[-1].append(item)
        size += tail
    return [
        Request(
            id=request.id,
            user_id=request.user_id,
            history=request.history,
            candidates=tuple(items),
            context=request.context,
        )
        for items in slices
    ]


def _add(found: _Found, answer: Ranking | Unparsed) -> None:
    found.raw, found.prompt_hash = answer.raw, answer.prompt_hash
    found.cost = Cost(
        prompt_tokens=answer.cost.prompt_tokens,
        completion_tokens=found.cost.completion_tokens + answer.cost.completion_tokens,
    )
    if isinstance(answer, Ranking):
        found.scores.update(zip(answer.items, answer.scores, strict=True))
    else:
        found.failure = f"{answer.reason}: {(answer.raw or '')[:_QUOTED]!r}"


def _result(posed: Posed, n: int, found: _Found) -> Ranking | Unparsed:
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


# --------------------------------------------------------------------------- names


def one_of(what: str, name: str, known: Sequence[str]) -> None:
    """Check an option's value.

    Raises:
        RecipeError: If it is not known; the message lists those that are.
    """
    if name not in known:
        names = ", ".join(dict.fromkeys(known))
        raise RecipeError(f"--{what}: unknown {what} {name!r}{did_you_mean(name, known)}; known: {names}")


def _named(template: str, family: str, known: Mapping[str, object]) -> bool:
    named, _, name = template.rpartition("/")
    return named in ("", family) and name in known
