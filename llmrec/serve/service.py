"""What each endpoint does, apart from HTTP: questions resolved, asked in batches, arranged by rules, and answered.

One `Service` stands over one engine process, a catalogue, and a store of what was sent to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from llmrec.answer.about import CONTEXT
from llmrec.answer.known import Catalogue, Known, history_of, known_of, merged, of_user, unknown
from llmrec.answer.listing import COLD, is_cold, listing, ranking_of, ruled
from llmrec.answer.models import RANK, meant
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.recommender import Answered
from llmrec.answer.rules import Rules
from llmrec.augment.stores import forget
from llmrec.data.read.limits import shown
from llmrec.data.requests import RankRequest, read_request
from llmrec.errors import DataError, LlmrecError, did_you_mean
from llmrec.guard import clean
from llmrec.serve import schema
from llmrec.serve.batching import Batcher, TooLate
from llmrec.serve.databases import StoreError
from llmrec.serve.forms import card_of, document_text, entry_of, ranked, shares, since, usage_of
from llmrec.serve.schema_rerank import RerankBody
from llmrec.serve.store import ServiceStore, StoredEvent
from llmrec.serve.supervising import Supervisor
from llmrec.serve.worker import POPULAR, SIMILAR, Card, EngineLost, Question, Reply
from llmrec.types import Answer, Event, Item, Probability, Rating, Text, Unparsed

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_READERS = 4
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
        rules: Rules that always stand.
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
    """Answers questions; `start` it inside an event loop, and `close` it there.

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
            self.engine.ask,
            window=settings.window,
            most=settings.batch,
            room=settings.room,
            patience=settings.patience,
            hangs=self.engine.kill,
        )

    def start(self) -> None:
        """Start the engine, which is ready a while later."""
        self.batcher.start()
        self.engine.start()
        self._finishing = asyncio.create_task(self._finish_erasures())

    async def close(self) -> None:
        """Answer what was asked, and stop."""
        await self.batcher.close()
        if self._finishing is not None:
            self._finishing.cancel()
        await asyncio.to_thread(self.engine.close)
        for threads in (self._writer, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.store.close)

    # ------------------------------------------------------------------- questions

    async def rank(self, body: schema.RankBody) -> schema.RankAnswer:
        """Rank candidates, or the catalogue.

        Raises:
            LlmrecError: If it cannot be answered; see `llmrec.serve.app` for the status of each.
        """
        begun = time.monotonic()
        rules = self.settings.rules.joined(Rules.read(body.rules.model_dump()))
        self._check_strategy(body)
        request = await self._request(body, candidates=body.candidates)
        request = replace(request, notes=(*request.notes, *self._unknown(body.rules.block)))
        request = self._ruled(request, rules, exclude_seen=body.exclude_seen)
        cold = is_cold(request)
        question = Question(model=body.model, verb=POPULAR if cold else RANK, strategy=body.strategy)
        if cold:
            question = replace(question, strategy="auto")
        card, found = await self._listed(question, request, rules, body.k)
        # A model without data has no popular items, and answers by itself.
        cold = cold and card.kind != "language model"
        reasons = None
        if body.rationale:
            first = min(body.rationale, body.k)
            written = await self.batcher.between(lambda: self.engine.reasons(body.model, [request], [found], first))
            reasons = written[0]
        texts = list(reasons.texts) if reasons else []
        notes = [*found.notes, *(reasons.notes if reasons else [])]
        if cold:
            notes.append(COLD)
        took = since(begun)
        cost = ranking_of(found).cost + reasons.cost if reasons else ranking_of(found).cost
        return schema.RankAnswer(
            model=card_of(card),
            items=ranked(found, self.catalogue.items, texts),
            notes=notes,
            prompt=await self._prompt(question, request) if body.show_prompt and not cold else None,
            usage=usage_of(cost),
            cold=cold,
            milliseconds=took,
        )

    async def similar(self, body: schema.SimilarBody) -> schema.SimilarAnswer:
        """Find items that are like others."""
        begun = time.monotonic()
        rules = self.settings.rules.joined(Rules.read(body.rules.model_dump()))
        for item in body.item_ids:
            self.catalogue.get(item)
        request = read_request({"history": list(body.item_ids)}, 1, self.catalogue.items, whole=True)
        question = Question(model=body.by, verb=SIMILAR)
        card, found = await self._listed(question, self._ruled(request, rules, exclude_seen=True), rules, body.k)
        return schema.SimilarAnswer(
            model=card_of(card),
            items=ranked(found, self.catalogue.items),
            notes=[*found.notes, *self._unknown(body.rules.block)],
            milliseconds=since(begun),
        )

    async def rate(self, body: schema.ItemBody) -> schema.RateAnswer:
        """Predict a rating."""
        answer, common = await self._about("rating", body)
        assert isinstance(answer, Rating)
        return schema.RateAnswer(**common, rating=answer.value, scale=self.engine.scale)

    async def predict(self, body: schema.ItemBody) -> schema.PredictAnswer:
        """Predict whether a user likes or chooses an item."""
        answer, common = await self._about("ctr", body)
        assert isinstance(answer, Probability)
        return schema.PredictAnswer(**common, probability=answer.value)

    async def explain(self, body: schema.ItemBody) -> schema.ExplainAnswer:
        """Explain an item to a user."""
        answer, common = await self._about("explanation", body)
        assert isinstance(answer, Text)
        return schema.ExplainAnswer(**common, text=answer.text)

    async def ask(self, body: schema.AskBody) -> schema.AskAnswer:
        """Answer a question of any family about an item."""
        answer, common = await self._about(body.family, body)
        return schema.AskAnswer(
            **common,
            family=body.family,
            rating=answer.value if isinstance(answer, Rating) else None,
            probability=answer.value if isinstance(answer, Probability) else None,
            text=answer.text if isinstance(answer, Text) else None,
        )

    async def streamed(self, body: schema.ItemBody) -> AsyncIterator[tuple[str, Any]]:
        """Explain an item in events: ``text`` as it is written, then ``done`` with the whole answer."""
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def heard(piece: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        asking = asyncio.ensure_future(self._about("explanation", body, heard))
        asking.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield "text", {"text": piece}
            answer, common = await asking
            assert isinstance(answer, Text)
            yield "done", schema.ExplainAnswer(**common, text=answer.text).model_dump(mode="json")
        finally:
            asking.cancel()

    async def rerank(self, body: RerankBody) -> tuple[str, list[tuple[int, float]], schema.Usage, Sequence[str]]:
        """Order texts by what a model expects after a query: its lines are the titles of a history.

        Returns:
            The model's name; places and relevances, best first; the work of it; notes.

        Raises:
            DataError: If a document is too long, or the query has too many lines.
        """
        texts = [document_text(document) for document in body.documents]
        history = [{"title": line} for line in body.query.splitlines() if line.strip()]
        if len(history) > schema.MOST_EVENTS:
            said = f"the query has {len(history)} lines, more than {schema.MOST_EVENTS}; send the last of them"
            raise DataError(said, kind="too-large", column="query")
        # Texts are no items of the catalogue, whatever it calls its own: they go by their titles, and equal ones once.
        candidates = [{"title": text} for text in dict.fromkeys(texts)]
        request = read_request({"history": history, "candidates": candidates}, 1, None)
        model = meant(body.model or "", [card.name for card in self.engine.cards])
        reply = await self._ask(Question(model=model, verb=RANK), request)
        assert reply.card is not None and isinstance(reply.answer, Answered)
        ranking = ranking_of(reply.answer)
        share = dict(zip(ranking.items, shares(ranking.scores, reply.card), strict=True))
        order = sorted(range(len(texts)), key=lambda place: (-share[clean(texts[place])], place))
        scores = [(place, share[clean(texts[place])]) for place in order]
        total = sum(score for _, score in scores) or 1.0
        relevances = [(place, score / total) for place, score in scores]
        return reply.card.name, relevances, usage_of(ranking.cost), reply.answer.notes

    async def each(self, ask: Callable[[Any], Any], bodies: Sequence[Any]) -> list[Any]:
        """Answer several questions at once; one that fails is an error in its place."""
        return await asyncio.gather(*(ask(body) for body in bodies), return_exceptions=True)

    # ------------------------------------------------------------------- what is known

    async def user(self, user_id: str, *, most: int = 1000) -> list[Event]:
        """Return what a user did, oldest first.

        Raises:
            DataError: If nothing is known of the user.
        """
        found = await self._read(lambda: self._events(user_id))
        if not found:
            raise unknown("user", user_id, ())
        return found[-most:]

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
        """Start an engine that reads everything anew, and let it answer in the place of the one before.

        Raises:
            LlmrecError: If that is under way already.
            EngineLost: If it cannot be started; the one before answers on.
        """
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
        """Store a change of the catalogue, and let the engine know of it.

        Raises:
            StoreError: If it could not be stored.
            TooLate: If it was stored, and the engine has not learned of it in time.
        """
        ends = time.monotonic() + self.settings.patience
        async with _in_time(self._changing, _TURN * self.settings.patience):
            stored = await self._write(store, ends)
            self.catalogue.change(put, removed)
            changed = {item.item_id: item for item in put}
            told = asyncio.ensure_future(self.batcher.tell(lambda: self.engine.change_items(changed, removed)))
            await asyncio.wait({told}, timeout=max(0.0, ends - time.monotonic()))
        if not told.done():
            raise TooLate("this is stored; the models know of it after what they do now", kind="exhausted")
        await told
        return stored

    # ------------------------------------------------------------------- the store

    async def _read(self, call: Callable[[], _T]) -> _T:
        """Run a read of the store.

        Raises:
            StoreError: If it fails, or takes longer than a request may.
        """
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

        Raises:
            StoreError: If it fails, or its turn does not come; then nothing is stored.
            TooLate: If it takes longer than it should; then it may be stored or not.
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

    def cards(self) -> list[schema.ModelCard]:
        """Return what is said of the models, the default first."""
        return [card_of(card) for card in self.engine.cards]

    def next_id(self) -> str:
        """Return an id for an answer that has to have one."""
        return str(uuid4())

    # ------------------------------------------------------------------- from bodies to requests and back

    async def _request(self, body: Any, *, candidates: Sequence[str | schema.ItemText] | None) -> RankRequest:
        """Give a question its history, and every item its text."""
        self.check_model(body.model)
        user, per_second = body.user_id, self._known.histories.per_second
        record: dict[str, object] = {"id": body.id, "user_id": user, "profile": body.profile}
        record["history"] = [entry_of(each, per_second) for each in body.history or ()]
        missing = False
        if user is not None and body.history is None:
            events = await self._read(lambda: self._events(user))
            record["history"], missing = history_of(events, self.catalogue.items), not events
        if user is not None and not body.profile and self._known.profiles is not None:
            record["profile"] = await self._read(lambda: self._known.profile(user, self.store.erased))
        if candidates is not None:
            record["candidates"] = [entry_of(each) for each in candidates]
        request = read_request(record, 1, self.catalogue.items, whole=candidates is None)
        return of_user(request, known=False) if missing and not record["profile"] else request

    def _unknown(self, names: Iterable[str]) -> list[str]:
        """Return a note on items that are not in the catalogue, if there are any."""
        found = [name for name in names if name not in self.catalogue.items]
        some = ", ".join(shown(name) for name in found[:_NAMED]) + (" and others" if len(found) > _NAMED else "")
        return [f"rules.block: not in the catalogue: {some}"] if found else []

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

    def _check_strategy(self, body: schema.RankBody) -> None:
        """Refuse a way of asking that there is not; what it costs to try is not little."""
        cards = {card.name: card for card in self.engine.cards}
        name = next(iter(cards), None) if body.model is None else meant(body.model, cards)
        known = () if name is None else cards[name].strategies
        if known and body.strategy not in ("auto", "search", *known):
            raise DataError(
                f"there is no strategy {body.strategy[:60]!r}{did_you_mean(body.strategy, known)}; there are auto, "
                f"{', '.join(known)}",
                kind="unknown-name",
                column="strategy",
            )

    def _ruled(self, request: RankRequest, rules: Rules, *, exclude_seen: bool) -> RankRequest:
        items, allowed = self.catalogue.items, self.catalogue.allowed
        return ruled(request, rules, items, allowed, exclude_seen=exclude_seen)

    async def _listed(self, question: Question, request: RankRequest, rules: Rules, k: int) -> tuple[Card, Answered]:
        """Ask for a list, as deep as its rules need."""
        steps = listing(request, rules, self.catalogue.items, k)
        depth = next(steps)
        while True:
            reply = await self._ask(replace(question, depth=depth), request)
            assert reply.card is not None and isinstance(reply.answer, Answered)
            try:
                depth = steps.send(reply.answer)
            except StopIteration as done:
                return reply.card, done.value

    async def _about(
        self, family: str, body: schema.ItemBody, heard: Callable[[str], None] | None = None
    ) -> tuple[Answer, Mapping[str, Any]]:
        begun = time.monotonic()
        item = body.asked
        if isinstance(item, str) and self.catalogue.items:
            self.catalogue.get(item)
        if strange := sorted(body.context.keys() - CONTEXT):
            raise DataError(
                f"context: {strange[0]!r} is nothing that a family is told; it may have {', '.join(sorted(CONTEXT))}",
                kind="unknown-key",
                column="context",
            )
        request = await self._request(body, candidates=[item])
        request = replace(request, context={**request.context, **body.context})
        question = Question(model=body.model, verb=family)
        if heard is None:
            reply = await self._ask(question, request)
        else:
            reply = await self.batcher.between(lambda: self.engine.written(question, request, heard))
            if reply.fault is not None:
                raise reply.fault
        answer = reply.answer
        assert reply.card is not None and answer is not None and not isinstance(answer, Answered)
        if isinstance(answer, Unparsed):
            raise DataError(f"{family}: {answer.reason}", kind="failed")
        return answer, {
            "model": card_of(reply.card),
            "item_id": request.candidates[0].item_id,
            "notes": list(request.notes),
            "prompt": await self._prompt(question, request) if body.show_prompt else None,
            "usage": usage_of(answer.cost),
            "milliseconds": since(begun),
        }

    async def _ask(self, question: Question, request: RankRequest) -> Reply:
        reply = await self.batcher.ask(question, request)
        if reply.fault is not None:
            raise reply.fault
        return reply

    async def _prompt(self, question: Question, request: RankRequest) -> str | None:
        return await self.batcher.between(lambda: self.engine.prompt(question, request))


@asynccontextmanager
async def _in_time(lock: asyncio.Lock, seconds: float) -> AsyncIterator[None]:
    """Hold a lock, for which a request waits this long.

    Raises:
        StoreError: If others hold it for longer.
    """
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
