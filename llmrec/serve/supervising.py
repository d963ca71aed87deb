"""Keeps an engine running: starts it, starts it again when it is lost, and puts another in its place."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from llmrec.answering.options import RecommenderOptions
from llmrec.answering.recommender import Answered
from llmrec.data.requests import RankRequest
from llmrec.errors import LlmrecError
from llmrec.serve.worker import Card, Engine, EngineLost, Question, Reply
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
    """

    def __init__(
        self,
        options: RecommenderOptions,
        names: Sequence[str],
        changes: Callable[[], tuple[Sequence[Item], Sequence[str]]],
    ) -> None:
        self._options, self._names, self._changes = options, names, changes
        self._engine: Engine | None = None
        self._closed = False
        self._starting: threading.Thread | None = None
        self._lock = threading.Lock()
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
        if not self._closed:
            self._starting = threading.Thread(target=self._begin, name="llmrec-starting", daemon=True)
            self._starting.start()

    def replace(self) -> None:
        """Put a new engine, which reads everything anew, in the place of the one that answers until then.

        Raises:
            LlmrecError: If the new one cannot be started; the old one answers on.
        """
        new = self._made()
        with self._lock:
            old, self._engine = self._engine, new
        self._follow(new)
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
    ) -> object:
        """Have rationales written; see `Engine.reasons`."""
        return self._with(lambda engine: engine.reasons(model, requests, found, first))

    def prompt(self, question: Question, request: RankRequest) -> str | None:
        """Return what a model reads; see `Engine.prompt`."""
        return self._with(lambda engine: engine.prompt(question, request))

    def change_items(self, put: dict[str, Item], removed: Sequence[str]) -> None:
        """Tell the engine of a changed catalogue; see `Engine.change_items`."""
        self.cards = self._with(lambda engine: engine.change_items(put, removed))

    def close(self) -> None:
        """End the engine, after it has started where it is starting."""
        self._closed = True
        if self._starting is not None:
            self._starting.join()
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _with(self, call: Callable[[Engine], _T]) -> _T:
        engine = self._engine
        if engine is None:
            why = f": {self.fault}" if self.fault else ""
            raise EngineLost(f"the engine is starting{why}; ask again in a moment", kind="failed")
        try:
            return call(engine)
        except EngineLost:
            self._gone(engine)
            raise

    def _follow(self, engine: Engine) -> None:
        threading.Thread(target=self._watch, args=(engine,), name="llmrec-watching", daemon=True).start()

    def _watch(self, engine: Engine) -> None:
        """Notice the end of an engine that nobody asks."""
        engine.wait()
        self._gone(engine)

    def _gone(self, engine: Engine) -> None:
        """Start another engine in the place of one that ended, unless that was seen to already."""
        with self._lock:
            if self._engine is not engine:
                return
            self._engine = None
        engine.kill()
        log.error("the engine ended; another is started")
        self.start()

    def _begin(self) -> None:
        """Start until one runs."""
        wait = _SHORTEST
        while not self._closed:
            try:
                engine = self._made()
            except LlmrecError as error:
                self.fault = error
                log.error("the engine does not start: %s", error)
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST)
                continue
            with self._lock:
                self._engine, self.fault = engine, None
            self._follow(engine)
            return

    def _made(self) -> Engine:
        self.starts += 1
        engine = Engine(self._options, self._names)
        try:
            started = engine.started()
            self.cards, self.scale = started.cards, started.scale
            put, removed = self._changes()
            if put or removed:
                self.cards = engine.change_items({item.item_id: item for item in put}, removed)
        except LlmrecError:
            engine.kill()
            raise
        return engine
