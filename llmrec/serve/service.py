"""A service apart from HTTP: one engine process, a catalogue, and a store of what was sent to it.

`llmrec.serve.verbs` has the questions that it answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmrec.answer.known import Catalogue, Known, Profile, known_of, merged, of_user, unknown, with_history
from llmrec.answer.listing import Wanted, listing
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.recommender import RANK, SIMILAR, Answered, Question, meant
from llmrec.answer.rules import Rules
from llmrec.augment.stores import forget
from llmrec.chat.calls import Call
from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts
from llmrec.chat.managers import RuleManager
from llmrec.chat.reading import Reader
from llmrec.chat.tools import ModelLists, Tools
from llmrec.data.read.limits import shown
from llmrec.data.requests import RankRequest, read_request
from llmrec.errors import DataError, LlmrecError, did_you_mean
from llmrec.serve import schema
from llmrec.serve.batching import Batcher, Full, TooLate
from llmrec.serve.databases import StoreError
from llmrec.serve.engine import EngineLost, Supervisor
from llmrec.serve.store import ServiceStore, StoredEvent
from llmrec.types import Event, Item

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_READERS = 4
_THREADS = 8
"""Threads in which turns of conversations wait for the engine."""
# Seconds beyond the patience of a question, which ends by itself as long as its event loop runs.
_GRACE = 5.0
_AGAIN = 10.0
"""Seconds after which an erasure that could not be finished is tried again."""
WAITS = 0.4
"""Share of the time of a request that a store may wait for another process which holds it."""
_TURN = 0.5
"""Share of the time of a request that a write waits for its turn; both leave some for the write itself."""
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a service runs.

    Attributes:
        options: Which model, and how it is asked.
        models: Names, the default first; none: see `llmrec.answer.opening.open_models`.
        rules: Rules that apply to every list.
        window: Seconds that a question waits for others.
        batch: Questions of one batch.
        room: Questions that may wait.
        patience: Seconds that a question may take.
    """

    options: RecommenderOptions
    models: tuple[str, ...] = ()
    rules: Rules = field(default_factory=Rules)
    window: float = 0.005
    batch: int = 32
    room: int = 256
    patience: float = 60.0


class Service:
    """A running service; `start` it inside an event loop, and `close` it there.

    Args:
        settings: How it runs.
        known: What is known without a model.
        store: What was sent to it, and will be.
    """

    def __init__(self, settings: Settings, known: Known, store: ServiceStore) -> None:
        self.settings, self.store, self._known = settings, store, known
        # What is stored last has to be what is known last.
        self._changing = asyncio.Lock()
        self._reloading = asyncio.Lock()
        # Of writes one waits for the other anyway. Reads have threads of their own: they never wait for a write.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="llmrec-writer")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="llmrec-reader")
        self._finishing: asyncio.Task[None] | None = None
        self.catalogue = Catalogue(known.items)
        self.catalogue.change(*_changes(store))
        self.engine = Supervisor(settings.options, settings.models, lambda: _changes(store))
        self.batcher = Batcher(
            partial(self.engine.call, "answer"),
            window=settings.window,
            most=settings.batch,
            room=settings.room,
            patience=settings.patience,
            hangs=self.engine.kill,
        )
        self.conversations = Conversations(self)

    def start(self) -> None:
        """Start the engine, which is ready a while later."""
        self.batcher.start()
        self.engine.start()
        self._finishing = asyncio.create_task(self._finish_erasures())

    async def close(self) -> None:
        """Answer what was asked, and stop."""
        self.conversations.close()
        await self.batcher.close()
        if self._finishing is not None:
            self._finishing.cancel()
        await asyncio.to_thread(self.engine.close)
        for threads in (self._writer, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.store.close)

    # ------------------------------------------------------------------- what is known

    async def user(self, user_id: str, *, most: int = 1000) -> list[Event]:
        """Return what a user did, oldest first.

        Raises:
            DataError: If nothing is known of the user.
        """
        result = await self._read(lambda: self._events(user_id))
        if not result:
            raise unknown("user", user_id, ())
        return result[-most:]

    async def add_events(self, body: schema.EventsBody) -> int:
        """Store what users did; it is safe once this returns.

        Raises:
            DataError: If an event names an item that is not there; then none is stored.
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
                timestamp=now if event.timestamp is None else schema.number_of(event.timestamp, per_second),
            )
            for event in body.events
        ]
        return await self._write(lambda: self.store.add_events(events))

    async def erase(self, user_id: str) -> schema.Erased:
        """Erase a person from the event store and from stores of features."""
        known = bool(self._known.histories.of_user(user_id))
        events = await self._write(lambda: self.store.erase(user_id))
        remains = list(self.store.remains)
        folders = self._known.features
        features = await self._write(lambda: sum(_forget(folder, user_id) for folder in folders)) if folders else 0
        remains += [schema.IN_MEMORY] if features else []
        if known:
            remains.append(
                "the run's own data still holds interactions of this user, which no answer shows any more; take them "
                "out of the table, and tune again, so that the model forgets them too"
            )
        return schema.Erased(user_id=user_id, events=events, features=features, remains=remains)

    async def put_items(self, items: Sequence[Item]) -> int:
        """Add or replace items; questions that come after this returns know them."""
        return await self._change(lambda: self.store.put_items(items), items, ())

    async def remove_item(self, item_id: str) -> None:
        """Remove an item; no list holds it after this returns.

        Raises:
            DataError: If there is none of this id.
        """
        self.catalogue.get(item_id)
        await self._change(lambda: self.store.remove_items([item_id]), (), [item_id])

    async def reload(self) -> None:
        """Replace the engine by one that reads everything again."""
        if self._reloading.locked():
            raise LlmrecError("the models are being read anew already; wait for that", kind="busy")
        async with self._reloading:
            asked = self.settings.options
            try:
                known = await asyncio.to_thread(known_of, asked.model, asked.items)
                await asyncio.to_thread(self.engine.replace)
            except LlmrecError as error:
                raise EngineLost(f"what answered before answers on: {error}", kind=error.kind) from error
            catalogue = Catalogue(known.items)
            async with self._changing:
                catalogue.change(*await self._read(lambda: _changes(self.store)))
                self._known, self.catalogue = known, catalogue

    async def _change(self, store: Callable[[], int], put: Sequence[Item], removed: Sequence[str]) -> int:
        """Store a change of the catalogue, and let the engine know of it."""
        ends = time.monotonic() + self.settings.patience
        async with _in_time(self._changing, _TURN * self.settings.patience):
            stored = await self._write(store, ends)
            self.catalogue.change(put, removed)
            changed = {item.item_id: item for item in put}
            telling = asyncio.ensure_future(self.batcher.tell(lambda: self.engine.change_items(changed, removed)))
            await asyncio.wait({telling}, timeout=max(0.0, ends - time.monotonic()))
        if not telling.done():
            raise TooLate("this is stored; the models know of it after what they do now", kind="exhausted")
        await telling
        return stored

    # ------------------------------------------------------------------- the store

    async def _read(self, call: Callable[[], _T]) -> _T:
        """Run a read of the store."""
        running = asyncio.get_running_loop().run_in_executor(self._readers, call)
        try:
            return await asyncio.wait_for(running, self.settings.patience)
        except TimeoutError:
            raise StoreError("the store does not answer", kind="busy") from None

    async def _write(self, call: Callable[[], _T], ends: float | None = None) -> _T:
        """Run a write of the store, after those that came before; one whose turn does not come is not run.

        Args:
            call: The write. It waits for other processes by itself, for the share `WAITS` of a request's time.
            ends: When the request has to be answered.
        """
        patience = self.settings.patience
        ends = time.monotonic() + patience if ends is None else ends
        running = self._writer.submit(call)
        done = asyncio.wrap_future(running)
        await asyncio.wait({done}, timeout=max(0.0, ends - time.monotonic() - (1 - _TURN) * patience))
        if running.cancel():
            raise StoreError("others write to the store, and the turn of this request did not come", kind="busy")
        await asyncio.wait({done}, timeout=max(0.0, ends - time.monotonic()))
        if not done.done():
            raise TooLate(
                "the store is slow; this may be stored or not, so look before you send it again", kind="failed"
            )
        return await done

    async def _finish_erasures(self) -> None:
        """Try again what keeps erased events in the log of the store, until it succeeds."""
        while True:
            await asyncio.sleep(_AGAIN)
            if self.store.unfinished:
                with suppress(LlmrecError):
                    await self._write(self.store.finish_erasures)

    # ------------------------------------------------------------------- questions

    async def request_of(self, body: Any, *, candidates: Sequence[str | schema.ItemText] | None) -> RankRequest:
        """Give a question its history, and every item its text."""
        self.check_model(body.model)
        user, per_second, items = body.user_id, self._known.histories.per_second, self.catalogue.items
        record: Mapping[str, object] = {
            "id": body.id,
            "user_id": user,
            "profile": body.profile,
            "history": None if body.history is None else [_entry_of(event, per_second) for event in body.history],
        }
        stored = True
        if user is not None and (body.history is None or (not body.profile and self._known.profiles is not None)):
            lookup = partial(with_history, record, self._events, items, self._profile)
            record, stored = await self._read(lookup)
        if candidates is not None:
            record = {**record, "candidates": [_entry_of(candidate) for candidate in candidates]}
        request = read_request(record, 1, items, whole=candidates is None)
        missing = body.history is None and not stored and not body.profile
        return of_user(request, known=False) if missing else request

    def _profile(self, user_id: str) -> Profile | None:
        return self._known.profile(user_id, self.store.erased)

    def unknown_note(self, names: Iterable[str]) -> list[str]:
        """Return a note on items that are not in the catalogue, if there are any."""
        missing = [name for name in names if name not in self.catalogue.items]
        some = ", ".join(shown(name) for name in missing[:_NAMED]) + (" and others" if len(missing) > _NAMED else "")
        return [f"rules.block: not in the catalogue: {some}"] if missing else []

    def _events(self, user_id: str) -> list[Event]:
        """Return what a user did, oldest first: of the run's data, and the last that were sent since."""
        since = [
            Event(item_id=event.item_id, rating=event.rating, timestamp=event.timestamp)
            for event in self.store.events_of(user_id, schema.MOST_EVENTS)
        ]
        return since if self.store.erased(user_id) else merged(self._known.histories.of_user(user_id), since)

    def check_model(self, name: str | None) -> None:
        """Refuse a name that no model has, as far as they are known already.

        Raises:
            DataError: If it has.
        """
        names = [card.name for card in self.engine.cards]
        if name is not None and names and meant(name, names) is None:
            raise unknown("model", name, names)

    def check_strategy(self, model: str | None, strategy: str) -> None:
        """Refuse an unknown strategy before it is tried, which is expensive."""
        cards = {card.name: card for card in self.engine.cards}
        name = next(iter(cards), None) if model is None else meant(model, cards)
        known = () if name is None else cards[name].strategies
        if known and strategy not in ("auto", "search", *known):
            raise DataError(
                f"there is no strategy {strategy[:60]!r}{did_you_mean(strategy, known)}; there are auto, "
                f"{', '.join(known)}",
                kind="unknown-name",
                column="strategy",
            )

    async def listed(
        self, request: RankRequest, wanted: Wanted, verb: str = RANK
    ) -> tuple[tuple[Question, RankRequest], Answered]:
        """Return a list, as deep as its rules need, with the last question that was asked for it."""
        steps = listing(request, wanted, self.catalogue, verb)
        asked = next(steps)
        while True:
            answer = await self.batcher.ask(*asked)
            try:
                asked = steps.send(answer)
            except StopIteration as done:
                return asked, done.value

    async def between(self, name: str, *arguments: Any, listener: Callable[[str], None] | None = None) -> Any:
        """Call a method of the engine's models between batches."""
        return await self.batcher.between(partial(self.engine.call, name, *arguments, listener=listener))


def _entry_of(given: str | schema.ItemText, per_second: float = 1.0) -> str | Mapping[str, object]:
    """Return an entry of a history or of candidates as requests have it.

    Args:
        given: As it was sent.
        per_second: Units of time of the data in a second.
    """
    if isinstance(given, str):
        return given
    entry = given.model_dump(exclude={"fields"}, exclude_none=True)
    if "timestamp" in entry:
        entry["timestamp"] = schema.number_of(entry["timestamp"], per_second)
    return {**given.fields, **entry}


class Conversations:
    """The conversations over a service: rules choose the tools, and the engine's models rank.

    The client holds the state: nothing is kept of a person. A turn waits for the engine in one of a few threads, which
    are not those in which the engine is asked. As many turns as questions may wait are accepted; more are refused.

    Args:
        service: Whose catalogue and models they are about.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="chat")
        self._turns: set[Future[schema.ChatAnswer]] = set()
        self._closed = False
        self._known: tuple[Catalogue, int, Facts, Reader] | None = None

    def close(self) -> None:
        """Take no more turns; those that have not begun are given up."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def answer(
        self, body: schema.ChatBody, called: Callable[[Call], None] = lambda call: None
    ) -> schema.ChatAnswer:
        """Answer one line.

        Args:
            body: The line, and the state so far.
            called: Told of every call, in another thread.

        Raises:
            DataError: If there is no such model, or no item to talk about.
            Full: If as many turns are open as questions may wait.
            LlmrecError: If the engine cannot answer.
        """
        begun, loop = time.monotonic(), asyncio.get_running_loop()
        self._service.check_model(body.model)

        def turn() -> schema.ChatAnswer:
            talk = self._conversation(body, loop)
            reply = talk.answer(body.state, body.text, called)
            # Items may have come or gone since the conversation read them.
            known = {**self._service.catalogue.items, **talk.tools.facts.items}
            shown = [known[name] for name in reply.items if name in known]
            return schema.ChatAnswer(
                text=reply.text,
                items=[
                    schema.CatalogueItem(item_id=item.item_id, title=item.title, fields=dict(item.fields))
                    for item in shown
                ],
                calls=list(reply.calls),
                profile=list(talk.tools.profile(reply.state)),
                state=reply.state,
                milliseconds=schema.since(begun),
            )

        if self._closed:
            raise EngineLost("the service is stopping; ask again in a moment", kind="failed")
        # A turn is over not when its client leaves, but when its thread is free again.
        self._turns = {entry for entry in self._turns if not entry.done()}
        if len(self._turns) >= self._service.settings.room:
            self._service.batcher.load.refused += 1
            raise Full.for_now(1.0)
        running = self._threads.submit(turn)
        self._turns.add(running)
        return await asyncio.wrap_future(running)

    def _conversation(self, body: schema.ChatBody, loop: asyncio.AbstractEventLoop) -> Conversation:
        service, facts, reader = self._service, *self._facts()

        def ask(question: Question, request: RankRequest) -> Answered:
            if question.verb != SIMILAR:
                return self._asked(replace(question, model=body.model), request, loop)
            try:
                return self._asked(replace(question, model="interactions"), request, loop)
            except DataError as error:
                if error.kind != "unsupported":
                    raise
                # A model without its interactions compares texts, as in a terminal.
                return self._asked(replace(question, model="text"), request, loop)

        lists = ModelLists(service.catalogue, ask, service.settings.rules)
        return Conversation(Tools(facts, lists), RuleManager(k=body.k), reader)

    def _asked(self, question: Question, request: RankRequest, loop: asyncio.AbstractEventLoop) -> Answered:
        """Wait in a turn's thread for the engine."""
        waiting = asyncio.run_coroutine_threadsafe(self._service.batcher.ask(question, request), loop)
        try:
            return waiting.result(self._service.settings.patience + _GRACE)
        except (TimeoutError, CancelledError) as error:
            waiting.cancel()
            raise TooLate("the service did not answer in time; ask again", kind="exhausted") from error

    def _facts(self) -> tuple[Facts, Reader]:
        """Return facts of the catalogue as it is now."""
        catalogue = self._service.catalogue
        if not catalogue.items:
            raise DataError("there is no item to talk about; put some with PUT /v1/items", kind="empty")
        known, changes = self._known, catalogue.changes
        if known is None or known[0] is not catalogue or known[1] != changes:
            facts = Facts(catalogue.items)
            known = self._known = catalogue, changes, facts, Reader(facts)
        return known[2], known[3]


@asynccontextmanager
async def _in_time(lock: asyncio.Lock, seconds: float) -> AsyncIterator[None]:
    """Hold a lock, for which a request waits this long."""
    try:
        await asyncio.wait_for(lock.acquire(), seconds)
    except TimeoutError:
        raise StoreError(
            "others change the catalogue, and the turn of this request did not come", kind="busy"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _changes(store: ServiceStore) -> tuple[list[Item], list[str]]:
    put, removed = store.item_changes()
    return list(put.values()), sorted(removed)


def _forget(folder: Path, user_id: str) -> int:
    """Erase a user from a store of features; returns how many texts that took."""
    try:
        return int(forget(folder, user_id).text)
    except LlmrecError as error:
        if error.kind != "unknown-name":
            raise
        return 0
