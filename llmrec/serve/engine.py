"""The process with the models (engine), and a supervisor that starts, calls, restarts and replaces it.

Models are in a separate process, so that the HTTP process stays responsive while a model computes, survives a killed
engine, and can start a new engine while the old one still answers.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from llmrec import terminal
from llmrec.answer.checks import with_resolved_engine
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.opening import Models, open_models
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.recommender import AnnotatedAnswer, Card, Question
from llmrec.data.requests import RankRequest
from llmrec.errors import LlmrecError
from llmrec.machine import lower_priority
from llmrec.models.memory import free_gpu_bytes
from llmrec.types import Item

log = logging.getLogger(__name__)

# Seconds that an engine may take to stop before it is killed.
_STOP_TIMEOUT = 10.0
# Minimum and maximum seconds between restarts of a failing engine.
_MIN_RESTART_DELAY, _MAX_RESTART_DELAY = 0.5, 60.0
# Niceness (scheduling priority) of the engine.
_NICENESS = 5

Reply = AnnotatedAnswer | LlmrecError
"""The answer to one request with the model that gave it, or the error if the model could not be queried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReady:
    """The message that an engine sends when it is ready.

    Attributes:
        cards: The descriptions of its models.
        scale: The lowest and highest rating, if ratings are predicted.
        alone: Whether the GPU has no memory for a second engine.
    """

    cards: tuple[Card, ...]
    scale: tuple[float, float] | None
    alone: bool = False


class EngineLost(LlmrecError):
    """Raised if the engine ended during a call, or is not running."""


class Engine:
    """Controls a running engine from the serving process; it handles one call at a time.

    Args:
        options: The options of the models.
        names: The models, the default first; see `llmrec.answer.opening.open_models`.
    """

    def __init__(self, options: RecommenderOptions, names: Sequence[str]) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._line, child_end = spawning.Pipe()
        arguments = (child_end, options, tuple(names), terminal.logged_warnings())
        self._process = spawning.Process(target=_run_engine, args=arguments, name="llmrec-engine")
        self._process.start()
        # After closing this end, a read ends as soon as the engine ends.
        child_end.close()
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return int(self._process.pid or 0)

    def opened(self) -> None:
        """Wait until all files except the weights of language models are read.

        Raises:
            LlmrecError: If the models cannot be opened.
            EngineLost: If the engine ended.
        """
        with self._lock:
            self._receive()

    def started(self) -> EngineReady:
        """Let the engine load its weights, and wait until it is ready; raises the errors of `opened`."""
        with self._lock:
            self._send(None)
            result = self._receive()
        assert isinstance(result, EngineReady)
        return result

    def call(self, name: str, *arguments: Any, listener: Callable[[str], None] | None = None) -> Any:
        """Call a method of the engine's models, and return its result.

        Args:
            name: ``answer`` (which returns a `Reply` for each request), ``prompt``, ``reasons`` or ``change_items``;
                see `llmrec.answer.opening.Models`.
            arguments: The arguments of the method.
            listener: Called with the pieces of a text while it is generated.

        Raises:
            LlmrecError: If the method raises one.
            EngineLost: If the engine ended without an answer.
        """
        with self._lock:
            self._send((name, arguments, listener is not None))
            while (message := self._receive())[0] == "piece":
                try:
                    if listener is not None:
                        listener(message[1])
                except Exception:
                    # Unread messages would be mistaken for the answer to the next call.
                    log.exception("the listener of a generated text failed")
        if isinstance(message[1], LlmrecError):
            raise message[1]
        return message[1]

    def close(self) -> None:
        """Stop the engine after its current call; kill it if it does not stop in time."""
        if self._lock.acquire(timeout=_STOP_TIMEOUT):
            try:
                with suppress(OSError):
                    self._line.send(None)
                self._line.close()
            finally:
                self._lock.release()
            self._process.join(_STOP_TIMEOUT)
        self.kill()

    def wait(self) -> None:
        """Wait until the engine has ended."""
        wait([self._process.sentinel])

    def kill(self) -> None:
        """Kill the engine."""
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _send(self, message: object) -> None:
        try:
            self._line.send(message)
        except OSError as error:
            raise _engine_lost_error() from error

    def _receive(self) -> Any:
        """Return the next message, or raise it if it is an error."""
        try:
            # Killing only this process is enough; its child processes may keep the connection open.
            wait([self._line, self._process.sentinel])
            if not self._line.poll():
                raise EOFError
            message = self._line.recv()
        except (EOFError, OSError) as error:
            raise _engine_lost_error() from error
        if isinstance(message, LlmrecError):
            raise message
        return message


def _engine_lost_error() -> EngineLost:
    return EngineLost("the engine ended and is being restarted; try again in a moment", kind="failed")


def stopping_error() -> EngineLost:
    """Return the error of a service that does not accept requests any more."""
    return EngineLost("the service is stopping; try again in a moment", kind="failed")


# --------------------------------------------------------------------------- supervision


class Supervisor:
    """Starts, restarts and replaces the engine.

    Args:
        options: The options of the models.
        names: The models, the default first.
        changes: A function that returns the added items and removed ids, which a new engine receives at its start.

    Attributes:
        hopeless: Called with the error if the first engine reports that it cannot start; there is no further attempt.
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
        # Whether the last engine left too little GPU memory for a second engine.
        self._alone = False
        self._closed = threading.Event()
        self._starting: threading.Thread | None = None
        # The first lock protects the current engine, the second its catalogue.
        self._lock, self._changing = threading.Lock(), threading.Lock()
        self.cards: tuple[Card, ...] = ()
        self.scale: tuple[float, float] | None = None
        self.fault: LlmrecError | None = None
        self.starts = 0

    @property
    def ready(self) -> bool:
        """Whether the engine can answer questions."""
        return self._engine is not None

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None if there is none."""
        engine = self._engine
        return None if engine is None else engine.pid

    def start(self) -> None:
        """Start an engine in the background."""
        with self._lock:
            if not self._closed.is_set():
                self._starting = threading.Thread(target=self._begin, name="llmrec-starting", daemon=True)
                self._starting.start()

    def replace(self) -> None:
        """Replace the engine by a new one that reads all files again.

        The old one answers until then. If the GPU has no memory for both, it is closed once the new one has read
        all files but its weights, and requests wait until these are loaded.

        Raises:
            LlmrecError: If the new one cannot be started. The old one remains, or if it was closed, engines are started
                in the background until one runs.
        """
        try:
            old = self._put()
        except BaseException:
            if not self.ready and not (self._starting and self._starting.is_alive()):
                self.start()
            raise
        if old is not None:
            old.close()

    def call(self, name: str, *arguments: Any, listener: Callable[[str], None] | None = None) -> Any:
        """Call a method of the engine's models; see `Engine.call`."""
        begun = threading.Event()

        def noted(piece: str) -> None:
            begun.set()
            if listener is not None:
                listener(piece)

        while True:
            engine = self.current()
            try:
                return engine.call(name, *arguments, listener=None if listener is None else noted)
            except EngineLost:
                # A replaced engine is not lost: the new engine answers.
                if self._restart(engine) or begun.is_set():
                    raise

    def current(self) -> Engine:
        """Return the engine that answers questions.

        Raises:
            EngineLost: If it is starting.
        """
        engine = self._engine
        if engine is None:
            why = f": {self.fault}" if self.fault else ""
            raise EngineLost(f"the engine is starting{why}; try again in a moment", kind="failed")
        return engine

    def change_items(self, put: dict[str, Item], removed: Sequence[str]) -> None:
        """Pass stored changes of the catalogue to the engine."""
        with self._changing:
            if self._engine is not None:
                with suppress(EngineLost):
                    self.cards = self.call("change_items", put, removed)

    def kill(self) -> None:
        """Kill the engine; a new one is started."""
        engine = self._engine
        if engine is not None:
            engine.kill()

    def close(self) -> None:
        """Stop the engine after its current call, or at once if it is still starting."""
        with self._lock:
            self._closed.set()
            engine, self._engine = self._engine, None
            opening = list(self._opening)
        for item in opening:
            item.kill()
        if self._starting is not None:
            self._starting.join()
        if engine is not None:
            engine.close()

    def _start_watching(self, engine: Engine) -> None:
        threading.Thread(target=self._watch, args=(engine,), name="llmrec-watching", daemon=True).start()

    def _watch(self, engine: Engine) -> None:
        """Wait for the end of an idle engine."""
        engine.wait()
        self._restart(engine)

    def _restart(self, engine: Engine) -> bool:
        """Start a new engine after one ended; return False if that was not the current engine."""
        with self._lock:
            if self._engine is not engine:
                return False
            self._engine = None
        engine.kill()
        log.error("the engine stopped; starting another")
        self.start()
        return True

    def _begin(self) -> None:
        """Start engines until one runs."""
        wait = _MIN_RESTART_DELAY
        while not self._closed.is_set():
            try:
                old = self._put()
            except Exception as problem:
                # Insufficient memory or processes may be temporary, so retry.
                error = problem if isinstance(problem, LlmrecError) else EngineLost(str(problem), kind="exhausted")
                self.fault = error
                if self.hopeless is not None and self.starts == 1 and not isinstance(error, EngineLost):
                    # A model, file or option is invalid, so retries do not help.
                    self.hopeless(error)
                    return
                log.error("the engine does not start: %s", error)
                self._closed.wait(wait)
                wait = min(2 * wait, _MAX_RESTART_DELAY)
                continue
            if old is not None:
                old.close()
            return

    def _put(self) -> Engine | None:
        """Start an engine, make it the current one, and return the previous one."""
        engine, started = self._open_engine()
        try:
            with self._changing:
                # Changes stored after this read are sent to this engine, which is current by then.
                put, removed = self._changes()
                cards = started.cards
                if put or removed:
                    cards = engine.call("change_items", {item.item_id: item for item in put}, removed)
                with self._lock:
                    if self._closed.is_set():
                        raise stopping_error()
                    old, self._engine = self._engine, engine
                    self.cards, self.scale, self.fault = cards, started.scale, None
                    self._alone = started.alone
        except BaseException:
            engine.kill()
            raise
        self._start_watching(engine)
        return old

    def _open_engine(self) -> tuple[Engine, EngineReady]:
        self.starts += 1
        engine = Engine(self._options, self._names)
        with self._lock:
            self._opening.add(engine)
            closed = self._closed.is_set()
        try:
            if closed:
                raise stopping_error()
            engine.opened()
            if self._alone:
                self._close_current_engine()
            return engine, engine.started()
        except BaseException:
            engine.kill()
            raise
        finally:
            with self._lock:
                self._opening.discard(engine)

    def _close_current_engine(self) -> None:
        """Close the engine after its current call."""
        with self._lock:
            old, self._engine = self._engine, None
        if old is not None:
            log.warning("not enough GPU memory for a second engine: requests wait until the new one is loaded")
            old.close()


# --------------------------------------------------------------------------- inside the engine process


def _run_engine(
    line: Connection, options: RecommenderOptions, names: Sequence[str], noted: terminal.WarningKeys
) -> None:
    """Open the models, and answer calls until the serving process ends."""
    with terminal.log_warnings_once(noted):
        _serve_calls(line, options, names)


def _serve_calls(line: Connection, options: RecommenderOptions, names: Sequence[str]) -> None:
    # Interrupts in a terminal and the final signal of systemd reach all processes, but the serving process decides
    # when this one ends. Child processes still get the latter, because handlers are not inherited.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    # A lower priority leaves CPU time for rejections and health checks while a model computes.
    lower_priority(_NICENESS)
    try:
        models = open_models(with_resolved_engine(options), names)
        line.send(None)
        line.recv()
        alone = load_language_models(models)
    except LlmrecError as error:
        line.send(error)
        return
    except (EOFError, OSError):
        return
    line.send(EngineReady(cards=models.cards(), scale=models.scale, alone=alone))
    try:
        while (message := line.recv()) is not None:
            name, arguments, streams = message
            listener = (lambda piece: line.send(("piece", piece))) if streams else None
            line.send(("result", _call_models(models, name, arguments, listener)))
    except (EOFError, OSError):
        # the serving process has ended
        pass
    finally:
        models.close()


def load_language_models(models: Models) -> bool:
    """Load the weights of language models, and return whether the GPU lacks memory for a second copy."""
    languages = [model for model in models.opened.values() if isinstance(model, LanguageModel)]
    on_gpu = any(model.on_gpu for model in languages)
    before = free_gpu_bytes() if on_gpu else 0
    for model in languages:
        model.warm()
    after = free_gpu_bytes() if on_gpu else 0
    return before - after > after


def _call_models(models: Models, name: str, arguments: tuple[Any, ...], listener: Callable[[str], None] | None) -> Any:
    """Return the result of a call; unexpected errors are returned too, since a crash would lose other calls."""
    try:
        if name == "answer":
            question, requests = arguments
            return _answer_requests(models, question, requests, listener)
        return getattr(models, name)(*arguments)
    except LlmrecError as error:
        return error
    except Exception:
        log.exception("unexpected error in %s", name)
        return LlmrecError("internal error in the engine; see its log", kind="defect")


def _answer_requests(
    models: Models, question: Question, requests: Sequence[RankRequest], listener: Callable[[str], None] | None
) -> list[Reply]:
    """Answer all requests in one batch or, if that fails, one at a time."""
    try:
        card = models.card(models.model_for(question))
        return [replace(answer, card=card) for answer in models.answer(question, requests, listener)]
    except LlmrecError as fault:
        error = fault
    except Exception:
        log.exception("unexpected error in a request")
        error = LlmrecError("internal error in the engine; see its log", kind="defect")
    if len(requests) == 1:
        return [error]
    return [_answer_requests(models, question, [request], listener)[0] for request in requests]
