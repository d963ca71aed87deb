"""Histories in, the best of a whole catalogue out: `llmrec rank --candidates all`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from llmrec.answer.index import refuse_new_tokens
from llmrec.answer.questions import TaskRequests, pose
from llmrec.answer.strategy import Asking
from llmrec.answer.task import task_of
from llmrec.backends.encode import Encoder
from llmrec.data.requests import RankRequest
from llmrec.errors import DataError, LlmrecError
from llmrec.index.table import ItemIndex
from llmrec.index.titles import title_key
from llmrec.pipeline.bundle import Bundle
from llmrec.pipeline.indexing import placed
from llmrec.strategies.asking import Prompting
from llmrec.strategies.catalogue import CatalogueRanker
from llmrec.tasks.task import Want
from llmrec.types import Backend, Item, Prompt, Ranking, Request, Unparsed


class CatalogueRanking:
    """Ranks a catalogue for requests that bring a history alone.

    Args:
        bundle: The model and how it was asked in training.
        items: The catalogue; items that the model's index does not hold are placed in it once.
        way: Its strategy is ``search``.
        encoder: The model's tokenizer and its longest prompt.
        beams: Prefixes that are kept of each request, and items in its answer.
        exact: Widen a search until no other item can be better.
    """

    def __init__(
        self, bundle: Bundle, items: Mapping[str, Item], way: Asking, encoder: Encoder, *, beams: int, exact: bool
    ) -> None:
        self._bundle, self._items, self._way, self._encoder = bundle, items, way, encoder
        self._beams, self._exact = beams, exact
        self._index = _placed(bundle.index, items) if bundle.index is not None else None

    @cached_property
    def _outputs(self) -> Any:
        """The task over the catalogue's own ids, which writes its texts."""
        return task_of(self._bundle, self._way.family, self._items, self._index)

    @cached_property
    def _longest(self) -> int:
        ask = Request(id="longest", user_id="nobody")
        prompt = self._outputs.prompt(ask, template=self._way.template)
        texts = set(self._outputs.continuations(ask, template=self._way.template))
        return max(len(self._encoder.continuation(prompt, text, closed=True)) for text in texts)

    def rank(
        self, requests: Sequence[RankRequest], backend: Backend, *, batch: int, advance: Callable[[int], None]
    ) -> list[Ranking | Unparsed]:
        """Rank the catalogue for every request, in order; one that cannot be asked does not touch the others.

        Args:
            requests: From `llmrec.data.requests.read_request`.
            backend: An engine over the bundle's model.
            batch: Requests handed to the backend at a time.
            advance: Called with the number of requests just answered.
        """
        posed = pose(self._bundle, requests, self._way, self._index)
        failures = {n: reason for n, request in enumerate(posed.requests) if (reason := self._fault(posed, request))}
        # Numbers stand for ids here, since two requests may share one.
        numbered = [replace(request, id=str(n)) for n, request in enumerate(posed.requests)]
        able = [request for n, request in enumerate(numbered) if n not in failures]
        apart = {request.id: self._apart(posed, request, requests[int(request.id)]) for request in able}
        ranker = CatalogueRanker(
            Prompting(
                backend=backend,
                task=_Asked(posed, self._outputs),  # type: ignore[arg-type]
                template=self._way.template,
                batch=batch,
                advance=advance,
            ),
            beams=self._beams,
            exact=self._exact,
            apart=lambda request: apart[request.id],
        )
        found = iter(ranker.answer(able))
        advance(len(failures))
        return [
            Unparsed(request_id=request.id, reason=failures[n]) if n in failures else _named(request, next(found))
            for n, request in enumerate(requests)
        ]

    def _apart(self, posed: TaskRequests, request: Request, asked: RankRequest) -> frozenset[str]:
        """Return the items of the catalogue that a request's answer must not hold."""
        if asked.keep_seen:
            return asked.barred
        return asked.barred | {self._known_as(posed.items[event.item_id], asked) for event in request.history}

    def _known_as(self, item: Item, request: RankRequest) -> str:
        """Return what the catalogue calls an item of a history: one that was given by its title, if only one has it."""
        if item.item_id not in request.titled:
            return item.item_id
        named = self._by_title.get(title_key(item.title), [])
        return named[0] if len(named) == 1 else item.title

    @cached_property
    def _by_title(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for item_id, item in self._items.items():
            found.setdefault(title_key(item.title), []).append(item_id)
        return found

    def _fault(self, posed: TaskRequests, request: Request) -> str:
        """Return why a request cannot be asked; empty if it can."""
        try:
            prompt = posed.task.prompt(request, template=self._way.template)
            length = len(self._encoder.prompt(prompt))
        except LlmrecError as error:
            return str(error)
        if length + self._longest > self._encoder.max_length:
            return (
                f"the prompt has {length} tokens and the longest answer {self._longest}, together more than the "
                f"{self._encoder.max_length} that fit; shorten its texts, or raise --max-length"
            )
        return ""


class _Asked:
    """Prompts of the requests, answers of the catalogue."""

    def __init__(self, posed: TaskRequests, outputs: Any) -> None:
        self._posed, self._outputs = posed, outputs
        self.catalogue: tuple[str, ...] = outputs.catalogue

    def prompt(self, request: Request, *, template: str, shots: int = 0, want: Want = "one") -> Prompt:
        found: Prompt = self._posed.task.prompt(request, template=template, shots=shots, want=want)
        return found

    def writes_alike(self, template: str) -> bool:
        return bool(self._outputs.writes_alike(template))

    def continuations(self, request: Request, *, template: str) -> tuple[str, ...]:
        ask = Request(id=request.id, user_id=request.user_id)
        found: tuple[str, ...] = self._outputs.continuations(ask, template=template)
        return found


def _placed(index: ItemIndex, items: Mapping[str, Item]) -> ItemIndex:
    """Return the index with every item of the catalogue in it.

    Raises:
        DataError: If the model knows no token for an item.
    """
    extended = placed(index, items)
    refuse_new_tokens(index, extended)
    return extended


def _named(request: RankRequest, answer: Any) -> Ranking | Unparsed:
    if isinstance(answer, Ranking) and not all(map(math.isfinite, answer.scores)):
        reason = "the model gave a score that is no finite number; try --dtype float32"
        return Unparsed(request_id=request.id, reason=reason, cost=answer.cost)
    if not isinstance(answer, Ranking):
        raise DataError(f"request {request.id}: the search gave {type(answer).__name__}", kind="defect")
    return Ranking(
        request_id=request.id,
        items=answer.items,
        scores=answer.scores,
        prompt_hash=answer.prompt_hash,
        cost=answer.cost,
    )
