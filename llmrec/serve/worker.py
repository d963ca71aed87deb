"""The process that holds the models, and the handle on it: started, asked, lost and replaced as one thing.

Models live in a process of their own, so that the one that answers HTTP stays quick while a model computes, goes on
when the engine is killed, and can take a new engine in while the old one still answers.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from llmrec import terminal
from llmrec.answer.checks import decided
from llmrec.answer.models import RANK, AnsweringModel, LanguageModel, check_verb
from llmrec.answer.opening import Models, open_models
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.rationales import Reasons
from llmrec.answer.recommender import Answered
from llmrec.data.requests import RankRequest
from llmrec.errors import LlmrecError
from llmrec.machine import step_back
from llmrec.types import Answer, Item

log = logging.getLogger(__name__)

SIMILAR, POPULAR = "similar", "popular"
"""Verbs of models that stand beside those with names."""
# How long an engine that is to end may take before it is killed, in seconds.
_PATIENCE = 10.0
# How much the engine lets others go first, as `nice` counts it.
_NICE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What there is to say about a model.

    Attributes:
        name: Under which it answers.
        kind: ``language model``, ``classic`` or ``fusion``.
        signature: Changes with everything that can change an answer, but for the request.
        verbs: ``rank``, and families of questions about one item.
        strategies: How it may be asked to order candidates.
    """

    name: str
    kind: str
    signature: str
    verbs: tuple[str, ...]
    strategies: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is the same for all requests of a batch.

    Attributes:
        model: A name; None: the default. Of `SIMILAR`, ``interactions`` or ``text``.
        verb: ``rank``, a family, `SIMILAR` or `POPULAR`.
        depth: Items that are wanted of a catalogue.
        strategy: How candidates are ordered.
    """

    model: str | None
    verb: str
    depth: int = 0
    strategy: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What became of a request.

    Attributes:
        card: Of the model that answered.
        answer: A list, or an answer about one item.
        fault: Why the question could not be put at all; the others are empty then.
    """

    card: Card | None = None
    answer: Answered | Answer | None = None
    fault: LlmrecError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What an engine says once it is ready."""

    cards: tuple[Card, ...]
    scale: tuple[float, float] | None


class EngineLost(LlmrecError):
    """The engine ended while it was asked, or does not run."""


class Engine:
    """A running engine, seen from the process that serves; one call at a time.

    Args:
        options: Which models, and how a language model is asked.
        names: Which of them, the default first; see `llmrec.answer.opening.open_models`.
    """

    def __init__(self, options: RecommenderOptions, names: Sequence[str]) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._line, theirs = spawning.Pipe()
        given = (theirs, options, tuple(names), terminal.noted())
        self._process = spawning.Process(target=_work, args=given, name="llmrec-engine")
        self._process.start()
        # With this end closed here, a read ends as soon as the engine does.
        theirs.close()
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid or 0)

    def started(self) -> Started:
        """Wait until the models are open.

        Raises:
            LlmrecError: If they cannot be opened; it says why.
            EngineLost: If the engine ended.
        """
        with self._lock:
            found = self._receive()
        if isinstance(found, LlmrecError):
            raise found
        assert isinstance(found, Started)
        return found

    def ask(self, question: Question, requests: Sequence[RankRequest]) -> list[Reply]:
        """Put one question about several requests.

        Raises:
            EngineLost: If the engine ended; what it was asked is not answered.
        """
        found: list[Reply] = self._call(("ask", question, tuple(requests)))
        return found

    def written(self, question: Question, request: RankRequest, heard: Callable[[str], None]) -> Reply:
        """Put a question about one request, and hand out what is written while it is.

        Raises:
            EngineLost: If the engine ended.
        """
        with self._lock:
            self._send(("written", question, request))
            while isinstance(found := self._receive(), str):
                try:
                    heard(found)
                except Exception:
                    # What is left on the line would be taken for the answer to the next question.
                    log.exception("nobody hears what is written")
        if isinstance(found, LlmrecError):
            raise found
        assert isinstance(found, Reply)
        return found

    def reasons(self, model: str | None, requests: Sequence[RankRequest], found: Sequence[Answered], first: int) -> Any:
        """Have a sentence written on each of the first items of lists; an error in place of one that has none."""
        return self._call(("reasons", model, tuple(requests), tuple(found), first))

    def prompt(self, question: Question, request: RankRequest) -> str | None:
        """Return what a language model reads of a request; None of another model."""
        found: str | None = self._call(("prompt", question, request))
        return found

    def change_items(self, put: Mapping[str, Item], removed: Sequence[str]) -> tuple[Card, ...]:
        """Change the catalogue, and return what is said of the models then."""
        found: tuple[Card, ...] = self._call(("items", dict(put), tuple(removed)))
        return found

    def close(self) -> None:
        """End the engine after what it is doing now; one that does not end in time is killed."""
        if self._lock.acquire(timeout=_PATIENCE):
            try:
                with suppress(OSError):
                    self._line.send(None)
                self._line.close()
            finally:
                self._lock.release()
            self._process.join(_PATIENCE)
        self.kill()

    def wait(self) -> None:
        """Return when the engine has ended."""
        wait([self._process.sentinel])

    def kill(self) -> None:
        """End the engine now."""
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _call(self, message: tuple[Any, ...]) -> Any:
        with self._lock:
            self._send(message)
            found = self._receive()
        if isinstance(found, LlmrecError):
            raise found
        return found

    def _send(self, message: tuple[Any, ...]) -> None:
        try:
            self._line.send(message)
        except OSError as error:
            raise _lost() from error

    def _receive(self) -> Any:
        try:
            # The end of the process is enough: what it started may hold the line open.
            wait([self._line, self._process.sentinel])
            if not self._line.poll():
                raise EOFError
            return self._line.recv()
        except (EOFError, OSError) as error:
            raise _lost() from error


def _lost() -> EngineLost:
    return EngineLost("the engine ended; it is started again, so ask again in a moment", kind="failed")


# --------------------------------------------------------------------------- inside the engine's process


def _work(line: Connection, options: RecommenderOptions, names: Sequence[str], noted: terminal.Noted) -> None:
    """Open the models, and answer until there is nobody left to ask."""
    with terminal.once(noted):
        _answer(line, options, names)


def _answer(line: Connection, options: RecommenderOptions, names: Sequence[str]) -> None:
    # An interrupt at the terminal goes to all processes, as does what systemd sends at the end, and the one that serves
    # decides when this one ends. What this one starts hears the latter as ever: handlers are not inherited.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    # A model that computes leaves a refusal, and the health of the service, their moment of the processor.
    step_back(_NICE)
    try:
        models = open_models(decided(options), names)
        for model in models.opened.values():
            if isinstance(model, LanguageModel):
                model.warm()
    except LlmrecError as error:
        line.send(error)
        return
    desk = _Desk(models, line.send)
    line.send(Started(cards=desk.cards(), scale=models.scale))
    try:
        while (message := line.recv()) is not None:
            line.send(_done(desk, *message))
    except (EOFError, OSError):
        # Whoever asked is gone.
        pass
    finally:
        models.close()


def _done(desk: _Desk, what: str, *arguments: Any) -> Any:
    """Return what came of a message; a defect is an answer too, since an engine that ended takes others with it."""
    try:
        return getattr(desk, what)(*arguments)
    except LlmrecError as error:
        return error
    except Exception:
        log.exception("%s failed that should not have", what)
        return LlmrecError("this failed inside the engine; its log says where", kind="defect")


class _Desk:
    """Answers messages, by their first word."""

    def __init__(self, models: Models, say: Callable[[str], None]) -> None:
        self._models, self._say = models, say
        # A signature takes a look at the whole catalogue, so it is made once for each state of that.
        self._known: dict[str, Card] = {}

    def cards(self) -> tuple[Card, ...]:
        return tuple(self._card(model) for model in self._models.opened.values())

    def items(self, put: Mapping[str, Item], removed: Sequence[str]) -> tuple[Card, ...]:
        self._models.change_items(put, removed)
        self._known.clear()
        return self.cards()

    def ask(self, question: Question, requests: Sequence[RankRequest]) -> list[Reply]:
        """Ask all at once, and one by one where that fails, so that no request takes others with it."""
        try:
            model = self._model(question)
            found: Sequence[Answered | Answer]
            if question.verb in (RANK, SIMILAR, POPULAR):
                found = model.rank(requests, depth=question.depth, strategy=question.strategy)
            else:
                check_verb(model, question.verb)
                found = model.about(question.verb, requests)
            return [Reply(card=self._card(model), answer=answer) for answer in found]
        except LlmrecError as fault:
            error = fault
        except Exception:
            log.exception("a question failed that should not have")
            error = LlmrecError("this question failed inside the engine; its log says where", kind="defect")
        if len(requests) == 1:
            return [Reply(fault=error)]
        return [self.ask(question, [request])[0] for request in requests]

    def written(self, question: Question, request: RankRequest) -> Reply:
        """Answer a question about one item, and say the text while it is written."""
        model = self._model(question)
        check_verb(model, question.verb)
        if isinstance(model, LanguageModel):
            return Reply(card=self._card(model), answer=model.written(question.verb, request, self._say))
        return self.ask(question, [request])[0]

    def prompt(self, question: Question, request: RankRequest) -> str | None:
        """Return what a language model reads; None of other models, and of what cannot be put."""
        model = self._models.get(question.model)
        try:
            return model.prompt(request, question.verb, question.strategy) if isinstance(model, LanguageModel) else None
        except LlmrecError:
            return None

    def reasons(
        self, name: str | None, requests: Sequence[RankRequest], found: Sequence[Answered], first: int
    ) -> list[Reasons]:
        model = self._models.get(name)
        if not isinstance(model, LanguageModel):
            return [Reasons(notes=[f"{model.name} is no language model, and writes no rationales"]) for _ in requests]
        try:
            return model.reasons(requests, found, first)
        except LlmrecError as error:
            return [Reasons(notes=[str(error)]) for _ in requests]

    def _model(self, question: Question) -> AnsweringModel:
        if question.verb == SIMILAR:
            return self._models.similar(str(question.model))
        if question.verb == POPULAR and self._models.popular is not None:
            return self._models.popular
        found = self._models.get(question.model)
        if question.verb in (RANK, POPULAR):
            check_verb(found, RANK)
        return found

    def _card(self, model: AnsweringModel) -> Card:
        if model.name not in self._known:
            self._known[model.name] = Card(
                name=model.name,
                kind=model.kind,
                signature=model.signature,
                verbs=tuple(model.verbs),
                strategies=tuple(model.strategies),
            )
        return self._known[model.name]
