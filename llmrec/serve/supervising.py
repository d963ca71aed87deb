"""Keeps an engine running: starts it, starts it again when it is lost, and puts another in its place."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from llmrec.answer.options import RecommenderOptions
from llmrec.answer.rationales import Reasons
from llmrec.answer.recommender import Answered
from llmrec.data.requests import RankRequest
from llmrec.errors import LlmrecError
from llmrec.serve.worker import Card, Engine, EngineLost, Question, Reply, Started
from llmrec.types import Item

_T = TypeVar("_T")

log = logging.getLogger(__name__)

# An engine that ends again and again is started less and less often, in seconds.
_SHORTEST, _LONGEST = 0.5, 60.0


class Supervisor:
    """An engine that is there, or will be again.

    Args:
        options: Which models, and how a language model is asked.
        names: Which of them, the default first.
        changes: Returns the items put and the ids removed since; a new engine is told of them before it answers.

    Attributes:
        hopeless: Is told why no engine can be started, where the first one says so itself; then none is tried again.
    """

    def __init__(
        self,
        options: RecommenderOptions,
        names: Sequence[str],
        changes: Callable[[], tuple[Sequence[Item], Sequence[str]]],
    ) -> None:
        self.hopeless: Callable[[LlmrecError], None] | None = None
        self._options, self._names, self._changes = options, names, changes
        self._engine: Engine | None = None
        self._opening: set[Engine] = set()
        self._closed = threading.Event()
        self._starting: threading.Thread | None = None
        # The first guards which engine answers. Who holds the second changes what an engine's catalogue is.
        self._lock, self._changing = threading.Lock(), threading.Lock()
        self.cards: tuple[Card, ...] = ()
        self.scale: tuple[float, float] | None = None
        self.fault: LlmrecError | None = None
        self.starts = 0

    @property
    def ready(self) -> bool:
        """Whether questions are answered now."""
        return self._engine is not None

    @property
    def pid(self) -> int | None:
        """Of the engine's process; None while there is none."""
        engine = self._engine
        return None if engine is None else engine.pid

    def start(self) -> None:
        """Start an engine in the background."""
        with self._lock:
            if not self._closed.is_set():
                self._starting = threading.Thread(target=self._begin, name="llmrec-starting", daemon=True)
                self._starting.start()

    def replace(self) -> None:
        """Put a new engine, which reads everything anew, in the place of the one that answers until then.

        Raises:
            LlmrecError: If the new one cannot be started; the old one answers on.
        """
        old = self._put()
        if old is not None:
            old.close()

    def ask(self, question: Question, requests: Sequence[RankRequest]) -> list[Reply]:
        """Put one question about several requests; see `Engine.ask`.

        Raises:
            EngineLost: If there is no engine, or it ended; then another is started.
        """
        return self._with(lambda engine: engine.ask(question, requests))

    def reasons(
        self, model: str | None, requests: Sequence[RankRequest], found: Sequence[Answered], first: int
    ) -> list[Reasons]:
        """Have rationales written; see `Engine.reasons`."""
        written: list[Reasons] = self._with(lambda engine: engine.reasons(model, requests, found, first))
        return written

    def written(self, question: Question, request: RankRequest, heard: Callable[[str], None]) -> Reply:
        """Put a question about one request whose text is handed out as it is written; see `Engine.written`."""
        begun = threading.Event()

        def noted(piece: str) -> None:
            begun.set()
            heard(piece)

        return self._with(lambda engine: engine.written(question, request, noted), lambda: not begun.is_set())

    def prompt(self, question: Question, request: RankRequest) -> str | None:
        """Return what a model reads; see `Engine.prompt`."""
        return self._with(lambda engine: engine.prompt(question, request))

    def change_items(self, put: dict[str, Item], removed: Sequence[str]) -> None:
        """Tell the engine of a changed catalogue, which is stored already: one that starts reads it there."""
        with self._changing:
            if self._engine is not None:
                with suppress(EngineLost):
                    self.cards = self._with(lambda engine: engine.change_items(put, removed))

    def kill(self) -> None:
        """End the engine, whatever it does; another is started."""
        engine = self._engine
        if engine is not None:
            engine.kill()

    def close(self) -> None:
        """End the engine after what it does now, and one that is starting at once."""
        with self._lock:
            self._closed.set()
            engine, self._engine = self._engine, None
            opening = list(self._opening)
        for each in opening:
            each.kill()
        if self._starting is not None:
            self._starting.join()
        if engine is not None:
            engine.close()

    def _with(self, call: Callable[[Engine], _T], again: Callable[[], bool] = lambda: True) -> _T:
        while True:
            engine = self._engine
            if engine is None:
                why = f": {self.fault}" if self.fault else ""
                raise EngineLost(f"the engine is starting{why}; ask again in a moment", kind="failed")
            try:
                return call(engine)
            except EngineLost:
                # One that was replaced meanwhile is not lost, and its place is taken.
                if self._gone(engine) or not again():
                    raise

    def _follow(self, engine: Engine) -> None:
        threading.Thread(target=self._watch, args=(engine,), name="llmrec-watching", daemon=True).start()

    def _watch(self, engine: Engine) -> None:
        """Notice the end of an engine that nobody asks."""
        engine.wait()
        self._gone(engine)

    def _gone(self, engine: Engine) -> bool:
        """Start another engine in the place of one that ended; False if it did not answer any more."""
        with self._lock:
            if self._engine is not engine:
                return False
            self._engine = None
        engine.kill()
        log.error("the engine ended; another is started")
        self.start()
        return True

    def _begin(self) -> None:
        """Start until one runs."""
        wait = _SHORTEST
        while not self._closed.is_set():
            try:
                old = self._put()
            except Exception as problem:
                # Memory or processes may be short for a moment, which is no reason to give up either.
                error = problem if isinstance(problem, LlmrecError) else EngineLost(str(problem), kind="exhausted")
                self.fault = error
                if self.hopeless is not None and self.starts == 1 and not isinstance(error, EngineLost):
                    # A model, a file or an option cannot be used: waiting does not change that.
                    self.hopeless(error)
                    return
                log.error("the engine does not start: %s", error)
                self._closed.wait(wait)
                wait = min(2 * wait, _LONGEST)
                continue
            if old is not None:
                old.close()
            return

    def _put(self) -> Engine | None:
        """Start an engine, let it answer, and return the one that answered before.

        Raises:
            LlmrecError: If it cannot be started, or the service ends.
        """
        engine, started = self._opened()
        try:
            with self._changing:
                # What is stored after this is read is told to the engine that answers then: this one.
                put, removed = self._changes()
                cards = started.cards
                if put or removed:
                    cards = engine.change_items({item.item_id: item for item in put}, removed)
                with self._lock:
                    if self._closed.is_set():
                        raise EngineLost("the service is stopping", kind="failed")
                    old, self._engine = self._engine, engine
                    self.cards, self.scale, self.fault = cards, started.scale, None
        except BaseException:
            engine.kill()
            raise
        self._follow(engine)
        return old

    def _opened(self) -> tuple[Engine, Started]:
        self.starts += 1
        engine = Engine(self._options, self._names)
        with self._lock:
            self._opening.add(engine)
            closed = self._closed.is_set()
        try:
            if closed:
                raise EngineLost("the service is stopping", kind="failed")
            return engine, engine.started()
        except BaseException:
            engine.kill()
            raise
        finally:
            with self._lock:
                self._opening.discard(engine)
