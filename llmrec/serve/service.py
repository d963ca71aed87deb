"""The service without HTTP: an engine process, a catalogue, and a database of received data.

`llmrec.serve.verbs` defines its questions.
"""

from __future__ import annotations

import asyncio
import time
from collections import ChainMap
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmrec.answer.known import (
    Catalogue,
    KnownEntities,
    Profile,
    merge_histories,
    read_known_entities,
    unknown_name_error,
    with_history_note,
    with_stored_data,
)
from llmrec.answer.listing import ListSpec, recommendation_steps
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.recommender import RANK, SIMILAR, AnnotatedAnswer, Question, match_model_name
from llmrec.answer.rules import Rules
from llmrec.augment.stores import forget_user
from llmrec.chat.calls import Call
from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.managers import RuleManager
from llmrec.chat.reading import Reader
from llmrec.chat.tools import ModelListRecommender, Tools
from llmrec.data.read.limits import format_value
from llmrec.data.requests import RankRequest, parse_request
from llmrec.errors import DataError, LlmrecError, did_you_mean
from llmrec.serve import schema
from llmrec.serve.batching import AnswerTimeout, Batcher, QueueFull
from llmrec.serve.databases import StoreError
from llmrec.serve.engine import EngineLost, Supervisor, stopping_error
from llmrec.serve.images import common_image_origins
from llmrec.serve.store import ServiceStore, StoredEvent
from llmrec.types import Event, Item

_T = TypeVar("_T")

_READER_THREADS = 4
_CHAT_THREADS = 8
"""Number of threads in which turns of conversations wait for the engine."""
# Seconds in addition to the timeout of a question, which the event loop normally enforces.
_GRACE_SECONDS = 5.0
_ERASURE_RETRY_SECONDS = 10.0
"""Seconds after which an unfinished erasure is tried again."""
STORE_WAIT_FRACTION = 0.4
"""Fraction of a request's timeout that a store may wait for a lock of another process."""
_WRITE_WAIT_FRACTION = 0.5
"""Fraction of a request's timeout that a write waits for its turn; both leave time for the write itself."""
_MAX_LISTED_IDS = 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a service.

    Attributes:
        options: The options of the models.
        models: The names of the models, the default first; empty: see `llmrec.answer.opening.open_models`.
        rules: Rules that apply to every list.
        window: Seconds that a question waits for others of its batch.
        batch: The maximum batch size.
        room: The maximum length of the queue.
        patience: The timeout of a question in seconds.
    """

    options: RecommenderOptions
    models: tuple[str, ...] = ()
    rules: Rules = field(default_factory=Rules)
    window: float = 0.005
    batch: int = 32
    room: int = 256
    patience: float = 60.0


class Service:
    """A running service; call `start` and `close` in the same event loop.

    Args:
        settings: The settings of the service.
        known: The catalogue and the users.
        store: The store of received data.
    """

    def __init__(self, settings: Settings, known: KnownEntities, store: ServiceStore) -> None:
        self.settings, self.store, self._known = settings, store, known
        # Changes must reach the catalogue in the order in which they are stored.
        self._changing = asyncio.Lock()
        self._reloading = asyncio.Lock()
        # Writes are serialised anyway. Reads have their own threads, so they never wait for a write.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="llmrec-writer")
        self._readers = ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="llmrec-reader")
        self._finishing: asyncio.Task[None] | None = None
        self.catalogue = Catalogue(known.items)
        self.catalogue.change(*_read_item_changes(store))
        self.engine = Supervisor(settings.options, settings.models, lambda: _read_item_changes(store))
        self.batcher = Batcher(
            partial(self.engine.call, "answer"),
            window=settings.window,
            most=settings.batch,
            room=settings.room,
            patience=settings.patience,
            hangs=self.engine.kill,
        )
        self.conversations = Conversations(self)
        self._images: tuple[Mapping[str, Item], tuple[str, ...]] | None = None

    def start(self) -> None:
        """Start the engine in the background."""
        self.batcher.start()
        self.engine.start()
        self._finishing = asyncio.create_task(self._finish_erasures())

    async def close(self) -> None:
        """Answer the pending questions, and stop the engine."""
        self.conversations.close()
        await self.batcher.close()
        if self._finishing is not None:
            self._finishing.cancel()
        await asyncio.to_thread(self.engine.close)
        for threads in (self._writer, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.store.close)

    # ------------------------------------------------------------------- stored data

    async def user(self, user_id: str) -> list[Event]:
        """Return the latest interactions of a user, oldest first.

        Raises:
            DataError: If the user is unknown.
        """
        result = await self._read(lambda: self._events(user_id))
        if not result:
            raise unknown_name_error("user", user_id, ())
        return result[-schema.MAX_ITEMS :]

    async def add_events(self, body: schema.EventsBody) -> int:
        """Store interactions of users; they are on disk when this returns.

        Raises:
            DataError: If an item is unknown; then none is stored.
        """
        for event in body.events:
            self.catalogue.get(event.item_id)
        per_second = self._known.histories.per_second
        now = time.time() * per_second
        events = [
            StoredEvent(
                user_id=event.user_id,
                item_id=event.item_id,
                rating=event.rating,
                timestamp=now if event.timestamp is None else schema.time_as_number(event.timestamp, per_second),
            )
            for event in body.events
        ]
        return await self._write(lambda: self.store.add_events(events))

    async def erase(self, user_id: str) -> schema.Erased:
        """Delete a user's data from the database and the feature stores."""
        known = bool(self._known.histories.of_user(user_id))
        events = await self._write(lambda: self.store.erase(user_id))
        remains = list(self.store.remains)
        folders = self._known.features
        features = (
            await self._write(lambda: sum(_erase_features(folder, user_id) for folder in folders)) if folders else 0
        )
        remains += [schema.IN_MEMORY_NOTE] if features else []
        if known:
            remains.append(
                "the training data of the run still contain interactions of this user, which answers no longer use; "
                "to remove these from the model, remove them from the table and train again"
            )
        return schema.Erased(user_id=user_id, events=events, features=features, remains=remains)

    async def put_items(self, items: Sequence[Item]) -> int:
        """Add or replace items; they can be used when this returns."""
        return await self._change_catalogue(lambda: self.store.put_items(items), items, ())

    async def remove_item(self, item_id: str) -> None:
        """Remove an item; lists no longer contain it when this returns.

        Raises:
            DataError: If the id is unknown.
        """
        self.catalogue.get(item_id)
        await self._change_catalogue(lambda: self.store.remove_items([item_id]), (), [item_id])

    async def reload(self) -> None:
        """Replace the engine by a new one that reads all files again."""
        if self._reloading.locked():
            raise LlmrecError("the models are already being reloaded; wait until this has finished", kind="busy")
        async with self._reloading:
            options = self.settings.options
            try:
                known = await asyncio.to_thread(read_known_entities, options.model, options.items)
                await asyncio.to_thread(self.engine.replace)
            except LlmrecError as error:
                state = (
                    "the previous models stay active"
                    if self.engine.ready
                    else "the previous models were closed, because the GPU has no room for two engines; the engine is "
                    "restarted until it runs"
                )
                raise EngineLost(f"{state}: {error}", kind=error.kind) from error
            catalogue = Catalogue(known.items)
            async with self._changing:
                catalogue.change(*await self._read(lambda: _read_item_changes(self.store)))
                self._known, self.catalogue = known, catalogue

    async def _change_catalogue(self, store: Callable[[], int], put: Sequence[Item], removed: Sequence[str]) -> int:
        """Store a change of the catalogue, and pass it to the engine."""
        ends = time.monotonic() + self.settings.patience
        async with _acquire_in_time(self._changing, _WRITE_WAIT_FRACTION * self.settings.patience):
            stored = await self._write(store, ends)
            self.catalogue.change(put, removed)
            changed = {item.item_id: item for item in put}
            telling = asyncio.ensure_future(self.batcher.tell(lambda: self.engine.change_items(changed, removed)))
            await asyncio.wait({telling}, timeout=max(0.0, ends - time.monotonic()))
        if not telling.done():
            raise AnswerTimeout("the change is stored; the models use it after the current batch", kind="exhausted")
        await telling
        return stored

    def image_origins(self) -> tuple[str, ...]:
        """Return the origins of the images of the catalogue."""
        items = self.catalogue.items
        if self._images is None or self._images[0] is not items:
            # A change of the catalogue makes a new mapping.
            self._images = items, common_image_origins(items.values())
        return self._images[1]

    # ------------------------------------------------------------------- the database

    async def _read(self, call: Callable[[], _T]) -> _T:
        """Run a read of the database in a thread."""
        running = asyncio.get_running_loop().run_in_executor(self._readers, call)
        try:
            return await asyncio.wait_for(running, self.settings.patience)
        except TimeoutError:
            raise StoreError("timed out while reading the store", kind="busy") from None

    async def _write(self, call: Callable[[], _T], ends: float | None = None) -> _T:
        """Run a write of the database after earlier writes, if it can start in time.

        Args:
            call: The write; it waits for other processes, for the fraction `STORE_WAIT_FRACTION` of a request's
                timeout.
            ends: The deadline of the request.
        """
        patience = self.settings.patience
        ends = time.monotonic() + patience if ends is None else ends
        running = self._writer.submit(call)
        done = asyncio.wrap_future(running)
        await asyncio.wait({done}, timeout=max(0.0, ends - time.monotonic() - (1 - _WRITE_WAIT_FRACTION) * patience))
        if running.cancel():
            raise StoreError("timed out while waiting for other writes to the store", kind="busy")
        await asyncio.wait({done}, timeout=max(0.0, ends - time.monotonic()))
        if not done.done():
            raise AnswerTimeout(
                "the store is slow; check whether the change was stored before you send it again", kind="failed"
            )
        return await done

    async def _finish_erasures(self) -> None:
        """Retry to remove deleted interactions from the database log, until it succeeds."""
        while True:
            await asyncio.sleep(_ERASURE_RETRY_SECONDS)
            if self.store.unfinished:
                with suppress(LlmrecError):
                    await self._write(self.store.finish_erasures)

    # ------------------------------------------------------------------- questions

    def admit(self) -> None:
        """Check that the engine runs and its queue has room, before a question is read.

        Raises:
            QueueFull: If the queue is full, or too long to answer in time.
            EngineLost: If the engine does not run, or the service is stopping.
        """
        self.engine.current()
        self.batcher.admit()

    def rules_with(self, requested: schema.Rules) -> Rules:
        """Return the combined rules of the service and of a request."""
        rules = self.settings.rules
        return rules.joined(Rules.read(requested.model_dump())) if requested.model_fields_set else rules

    async def request_of(self, body: Any, *, candidates: Sequence[str | schema.ItemText] | None) -> RankRequest:
        """Convert a request body to a request, with the history and the texts of items."""
        self.check_model(body.model)
        user, per_second, items = body.user_id, self._known.histories.per_second, self.catalogue.items
        record: Mapping[str, object] = {
            "id": body.id,
            "user_id": user,
            "profile": body.profile,
            "history": None if body.history is None else [_request_entry(event, per_second) for event in body.history],
        }
        stored = True
        if user is not None and (body.history is None or (not body.profile and self._known.profiles is not None)):
            lookup = partial(with_stored_data, record, self._events, items, self._profile)
            record, stored = await self._read(lookup)
        if candidates is not None:
            record = {**record, "candidates": [_request_entry(candidate) for candidate in candidates]}
        request = parse_request(record, 1, items, whole=candidates is None)
        missing = body.history is None and not stored and not body.profile
        return with_history_note(request, known=False) if missing else request

    def _profile(self, user_id: str) -> Profile | None:
        return self._known.profile(user_id, self.store.erased)

    def unknown_note(self, names: Iterable[str]) -> list[str]:
        """Return a note on items that are not in the catalogue, if any."""
        missing = [name for name in names if name not in self.catalogue.items]
        some = ", ".join(format_value(name) for name in missing[:_MAX_LISTED_IDS]) + (
            " and others" if len(missing) > _MAX_LISTED_IDS else ""
        )
        return [f"rules.block: not in the catalogue: {some}"] if missing else []

    def _events(self, user_id: str) -> list[Event]:
        """Return the interactions of a user, oldest first: from the data of the run, then the received ones."""
        since = [
            Event(item_id=event.item_id, rating=event.rating, timestamp=event.timestamp)
            for event in self.store.events_of(user_id, schema.MAX_EVENTS)
        ]
        return since if self.store.erased(user_id) else merge_histories(self._known.histories.of_user(user_id), since)

    def check_model(self, name: str | None) -> None:
        """Reject an unknown model name, if the models are loaded.

        Raises:
            DataError: If the model is unknown.
        """
        names = [card.name for card in self.engine.cards]
        if name is not None and names and match_model_name(name, names) is None:
            raise unknown_name_error("model", name, names)

    def check_strategy(self, model: str | None, strategy: str) -> None:
        """Reject an unknown strategy before it costs time."""
        cards = {card.name: card for card in self.engine.cards}
        name = next(iter(cards), None) if model is None else match_model_name(model, cards)
        known = () if name is None else cards[name].strategies
        if known and strategy not in ("auto", "search", *known):
            raise DataError(
                f"unknown strategy {strategy[:60]!r}{did_you_mean(strategy, known)}; known are auto, "
                f"{', '.join(known)}",
                kind="unknown-name",
                column="strategy",
            )

    async def listed(
        self, request: RankRequest, wanted: ListSpec, verb: str = RANK
    ) -> tuple[tuple[Question, RankRequest], AnnotatedAnswer]:
        """Return a recommendation list, and the last question that was sent to a model."""
        steps = recommendation_steps(request, wanted, self.catalogue, verb)
        step = next(steps)
        while True:
            answer = await self.batcher.ask(*step)
            try:
                step = steps.send(answer)
            except StopIteration as done:
                return step, done.value

    async def between(self, name: str, *arguments: Any, listener: Callable[[str], None] | None = None) -> Any:
        """Call a method of the engine's models between two batches."""
        return await self.batcher.between(partial(self.engine.call, name, *arguments, listener=listener))


def _request_entry(received: str | schema.ItemText, per_second: float = 1.0) -> str | Mapping[str, object]:
    """Convert an item of a history or of candidates to the format of request files.

    Args:
        received: The received entry.
        per_second: The data's units of time per second.
    """
    if isinstance(received, str):
        return received
    entry = received.model_dump(exclude={"fields"}, exclude_none=True)
    if "timestamp" in entry:
        entry["timestamp"] = schema.time_as_number(entry["timestamp"], per_second)
    return {**received.fields, **entry}


class Conversations:
    """The conversations of a service: rules choose the tools, and the engine's models rank.

    The client stores the state: the service keeps no personal data. A turn waits for the engine in one of a few
    threads, separate from those that call the engine. The limit of open turns is that of the queue; further turns are
    rejected.

    Args:
        service: The service with the catalogue and models.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = ThreadPoolExecutor(_CHAT_THREADS, thread_name_prefix="chat")
        self._turns: set[Future[schema.ChatAnswer]] = set()
        self._closed = False
        self._known: tuple[Catalogue, int, Facts, Reader] | None = None

    def close(self) -> None:
        """Reject further messages, and cancel messages that have not started."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def answer(
        self, body: schema.ChatBody, called: Callable[[Call], None] = lambda call: None
    ) -> schema.ChatAnswer:
        """Reply to a message.

        Args:
            body: The message and the state.
            called: Called with every call, in another thread.

        Raises:
            DataError: If the model is unknown, or the catalogue is empty.
            QueueFull: If the limit of open turns is reached.
            LlmrecError: If the engine cannot answer.
        """
        begun, loop = time.monotonic(), asyncio.get_running_loop()
        self._service.check_model(body.model)

        def turn() -> schema.ChatAnswer:
            talk = self._make_conversation(body, loop)
            reply = talk.answer(body.state, body.text, called)
            # Items may have been added or removed since the conversation started.
            known = ChainMap(talk.tools.facts.items, self._service.catalogue.items)
            shown = [known[name] for name in reply.items if name in known]
            return schema.ChatAnswer(
                text=reply.text,
                items=[schema.CatalogueItem.model_validate(item) for item in shown],
                calls=list(reply.calls),
                profile=list(talk.tools.profile(reply.state)),
                state=reply.state,
                milliseconds=schema.milliseconds_since(begun),
            )

        if self._closed:
            raise stopping_error()
        # A reply ends when its thread is free again, not when its client disconnects.
        self._turns = {entry for entry in self._turns if not entry.done()}
        if len(self._turns) >= self._service.settings.room:
            self._service.batcher.load.refused += 1
            raise QueueFull.for_now(1.0)
        running = self._threads.submit(turn)
        self._turns.add(running)
        return await asyncio.wrap_future(running)

    def _make_conversation(self, body: schema.ChatBody, loop: asyncio.AbstractEventLoop) -> Conversation:
        service, facts, reader = self._service, *self._facts()

        def ask(question: Question, request: RankRequest) -> AnnotatedAnswer:
            if question.verb != SIMILAR:
                return self._answer(replace(question, model=body.model), request, loop)
            try:
                return self._answer(replace(question, model="interactions"), request, loop)
            except DataError as error:
                if error.kind != "unsupported":
                    raise
                # Without interactions, use text similarity, as in the terminal.
                return self._answer(replace(question, model="text"), request, loop)

        lists = ModelListRecommender(service.catalogue, ask, service.settings.rules)
        return Conversation(Tools(facts, lists), RuleManager(k=body.k), reader)

    def _answer(self, question: Question, request: RankRequest, loop: asyncio.AbstractEventLoop) -> AnnotatedAnswer:
        """Return an answer of the engine, waiting in the current thread."""
        waiting = asyncio.run_coroutine_threadsafe(self._service.batcher.ask(question, request), loop)
        try:
            return waiting.result(self._service.settings.patience + _GRACE_SECONDS)
        except (TimeoutError, CancelledError) as error:
            waiting.cancel()
            raise AnswerTimeout("the service did not answer in time; try again", kind="exhausted") from error

    def _facts(self) -> tuple[Facts, Reader]:
        """Return the item data and the message parser for the current catalogue."""
        catalogue = self._service.catalogue
        if not catalogue.items:
            raise DataError("the catalogue is empty; add items with PUT /v1/items", kind="empty")
        known, changes = self._known, catalogue.changes
        if known is None or known[0] is not catalogue or known[1] != changes:
            facts = Facts(catalogue.items)
            known = self._known = catalogue, changes, facts, Reader(facts)
        return known[2], known[3]


@asynccontextmanager
async def _acquire_in_time(lock: asyncio.Lock, seconds: float) -> AsyncIterator[None]:
    """Acquire a lock within a number of seconds, and hold it in the block."""
    try:
        await asyncio.wait_for(lock.acquire(), seconds)
    except TimeoutError:
        raise StoreError("timed out while waiting for other changes of the catalogue", kind="busy") from None
    try:
        yield
    finally:
        lock.release()


def _read_item_changes(store: ServiceStore) -> tuple[list[Item], list[str]]:
    put, removed = store.item_changes()
    return list(put.values()), sorted(removed)


def _erase_features(folder: Path, user_id: str) -> int:
    """Delete a user from a feature store; return the number of deleted texts."""
    try:
        return int(forget_user(folder, user_id).text)
    except LlmrecError as error:
        if error.kind != "unknown-name":
            raise
        return 0
