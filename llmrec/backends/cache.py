"""Answers that outlive the process: a SQLite table in front of a backend, keyed by everything that can change them.

The calls that reach it are the fixed chunks that evaluation cuts its requests into. Each call's new answers are
committed in one transaction, so a kill loses the chunk at hand and nothing else, and that chunk is computed again as
a whole. A backend that hands answers out one by one has each committed as it comes. The engine is started by the first
question that the table cannot answer.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from llmrec.backends.answers import AnswerStore, Stored
from llmrec.errors import BackendError, EngineFailure
from llmrec.progress import count_answers
from llmrec.types import Backend, Capability, Completion, Cost, Found, HeadBackend, Prompt, Read, Scores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["AnswerStore", "CachedBackend", "StoredLedger"]


@dataclass(frozen=True)
class StoredLedger:
    """The tokens that were spent under one name, in a store."""

    store: AnswerStore
    name: str

    def spent(self) -> Cost:
        """Return all that was ever booked."""
        return self.store.spent(self.name)

    def spend(self, cost: Cost) -> None:
        """Book some more."""
        self.store.spend(self.name, cost)


@runtime_checkable
class OneByOne(Protocol):
    """What a backend has besides its verbs if it hands answers out as they come, with the places of their questions."""

    def generate_each(self, prompts: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Completion]]:
        """Yield places and completions."""
        ...

    def score_each(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> Iterator[tuple[int, Scores]]:
        """Yield places and scores."""
        ...


@runtime_checkable
class Heard(Protocol):
    """An engine whose text can be heard while it is generated."""

    listener: Callable[[str], None] | None


# Answers that are stored together, with the places of their questions.
_Lot = list[tuple[int, dict[str, Any]]]


class Offer(NamedTuple):
    """An engine that can be started.

    Attributes:
        identity: All that can change an answer besides the question: weights, tokenizer and chat template, revision,
            dtype, engine with its versions, device, decoding, seed, longest prompt.
        kind: The backend's class, for its name and its capabilities.
        start: Starts it.
    """

    identity: Mapping[str, Any]
    kind: type[Backend]
    start: Callable[[], Backend]


class CachedBackend:
    """A backend whose answers are remembered.

    Args:
        store: Where they are; None: nothing is remembered.
        identity: See `Offer`.
        kind: See `Offer`.
        start: Starts the engine; called at most once, and not at all where every answer is known.
        instead: Returns what answers in the place of an engine that failed; None, or an answer of None: nothing does.
    """

    def __init__(
        self,
        store: AnswerStore | None,
        identity: Mapping[str, Any],
        kind: type[Backend],
        start: Callable[[], Backend],
        instead: Callable[[EngineFailure], Offer | None] | None = None,
    ) -> None:
        self._store, self._instead = store, instead
        self.replaced = 0
        """How often another engine took the place of one that failed: answers before and after are of two engines."""
        self._take(Offer(identity, kind, start))
        self.part: int | None = None
        """The part of a job that questions belong to, where its answers must not depend on what other parts asked.

        An engine that generates or searches for several prompts at once may differ in the last bits with what stands
        beside a prompt, so that those answers are remembered for one part alone. Scores stand by themselves.
        """
        self._started: Backend | None = None
        self.recalled = 0
        """Answers that came from the table."""
        self.recalled_seconds = 0.0
        """What those answers cost when they were computed."""
        self.start_seconds = 0.0
        """What starting the engine took, which falls into the first call that needs it."""

    def _take(self, offer: Offer) -> None:
        self.identity, kind, self._start = offer
        self.name = kind.name
        self.capabilities: frozenset[Capability] = kind.capabilities
        self._together = not issubclass(kind, OneByOne)

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Continue each prompt; see `Backend.generate`."""

        def keys() -> list[str]:
            return [self._key("generate", prompt, max_tokens=max_tokens) for prompt in prompts]

        def compute(missing: list[int]) -> Iterator[_Lot]:
            engine, asked = self._engine(), [prompts[i] for i in missing]
            if isinstance(engine, OneByOne):
                return _singly(missing, engine.generate_each(asked, max_tokens=max_tokens))
            return _together(missing, engine.generate(asked, max_tokens=max_tokens))

        return [Completion(**answer) for answer in self._answers(keys, compute)]

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        """Score candidate continuations; see `Backend.score`."""

        def keys() -> list[str]:
            return [
                self._key("score", prompt, candidates=list(texts), closed=closed)
                for prompt, texts in zip(prompts, candidates, strict=True)
            ]

        def compute(missing: list[int]) -> Iterator[_Lot]:
            engine, asked, texts = self._engine(), [prompts[i] for i in missing], [candidates[i] for i in missing]
            if isinstance(engine, OneByOne):
                return _singly(missing, engine.score_each(asked, texts, closed=closed))
            return _together(missing, engine.score(asked, texts, closed=closed))

        return [
            Scores(**answer | {"logprobs": tuple(answer["logprobs"]), "tokens": tuple(answer["tokens"])})
            for answer in self._answers(keys, compute)
        ]

    def search(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        *,
        k: int,
        width: int,
        excluded: Sequence[Sequence[int]] = (),
        exact: bool = False,
    ) -> list[Found]:
        """Search a catalogue; see `Backend.search`."""
        catalogue = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
        question = {"texts": catalogue, "k": k, "width": width, "exact": exact}
        out = [sorted(set(excluded[n])) if excluded else [] for n in range(len(prompts))]

        def keys() -> list[str]:
            return [
                self._key("search", prompt, **question, excluded=barred)
                for prompt, barred in zip(prompts, out, strict=True)
            ]

        def compute(missing: list[int]) -> Iterator[_Lot]:
            asked = [prompts[i] for i in missing]
            found = self._engine().search(
                asked, texts, k=k, width=width, excluded=[out[i] for i in missing], exact=exact
            )
            return _together(missing, found)

        return [
            Found(**answer | {"items": tuple(answer["items"]), "scores": tuple(answer["scores"])})
            for answer in self._answers(keys, compute)
        ]

    def rate(self, prompts: Sequence[Prompt]) -> list[Read]:
        """Read ratings with the model's head; see `HeadBackend.rate`.

        Raises:
            BackendError: If the engine reads none.
        """

        def keys() -> list[str]:
            return [self._key("rate", prompt) for prompt in prompts]

        def compute(missing: list[int]) -> Iterator[_Lot]:
            engine = self._engine()
            if not isinstance(engine, HeadBackend):
                raise BackendError(
                    f"backend {self.name!r} reads no rating head; set eval.backend=hf",
                    kind="unsupported",
                    column="eval.backend",
                )
            return _together(missing, engine.rate([prompts[i] for i in missing]))

        return [Read(**answer) for answer in self._answers(keys, compute)]

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return vectors; these are not remembered."""
        return self._engine().embed(texts)

    def close(self) -> None:
        """Close the engine, if it was started."""
        if self._started is not None:
            self._started.close()
            self._started = None

    @contextmanager
    def heard(self, listener: Callable[[str], None]) -> Iterator[None]:
        """Hand out the text of a prompt that is asked alone, as it is generated; engines that cannot say nothing."""
        engine = self._engine()
        if not isinstance(engine, Heard):
            yield
            return
        engine.listener = listener
        try:
            yield
        finally:
            engine.listener = None

    def _engine(self) -> Backend:
        if self._started is None:
            begin = time.monotonic()
            try:
                self._started = self._start()
            except EngineFailure as failure:
                if not self._replace(failure):
                    raise
                return self._engine()
            self.start_seconds += time.monotonic() - begin
            # What a server offers shows when it is asked.
            self.capabilities = self._started.capabilities
        return self._started

    def _replace(self, failure: EngineFailure) -> bool:
        """Let another engine answer from now on; False where there is none."""
        offer = self._instead(failure) if self._instead is not None else None
        if offer is None:
            return False
        self.close()
        self._take(offer)
        self.replaced += 1
        return True

    def _key(self, verb: str, prompt: Prompt, **question: Any) -> str:
        asked = {
            "verb": verb,
            "turns": [[message.role, [s.text for s in message.segments]] for message in prompt.messages],
            # Pieces are tokenised one by one, so where a text is cut can change its tokens.
            "answer": [[segment.kind == "target", segment.text] for segment in prompt.answer_prefix],
            "stop": prompt.stop,
            **question,
        }
        if self.part is not None and self._together and verb != "score":
            asked["part"] = self.part
        text = json.dumps([dict(self.identity), asked], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _answers(
        self, keys_of: Callable[[], list[str]], compute: Callable[[list[int]], Iterator[_Lot]]
    ) -> list[dict[str, Any]]:
        while True:
            keys, replaced = keys_of(), self.replaced
            known = {} if self._store is None else self._store.get(keys)
            missing = {key: i for i, key in reversed(list(enumerate(keys))) if key not in known}
            if missing:
                self._engine()  # its start is not part of what an answer costs
            if self.replaced == replaced:
                try:
                    return self._computed(keys, known, sorted(missing.values()), compute)
                except EngineFailure as failure:
                    if not self._replace(failure):
                        raise

    def _computed(
        self,
        keys: Sequence[str],
        known: dict[str, Any],
        missing: list[int],
        compute: Callable[[list[int]], Iterator[_Lot]],
    ) -> list[dict[str, Any]]:
        recalled, recalled_seconds = sum(key in known for key in keys), sum(e["seconds"] for e in known.values())
        count_answers(recalled)
        if missing:
            begin = time.monotonic()
            for lot in compute(missing):
                now = time.monotonic()
                share = (now - begin) / len(lot)
                begin = now
                fresh = {keys[i]: Stored(seconds=share, answer=answer) for i, answer in lot}
                if self._store is not None:
                    self._store.put(fresh.items())
                known |= fresh
        self.recalled += recalled
        self.recalled_seconds += recalled_seconds
        return [known[key]["answer"] for key in keys]


def _together(places: Sequence[int], found: Sequence[Any]) -> Iterator[_Lot]:
    """Yield all answers as one lot."""
    yield [(place, asdict(answer)) for place, answer in zip(places, found, strict=True)]


def _singly(places: Sequence[int], found: Iterator[tuple[int, Any]]) -> Iterator[_Lot]:
    """Yield each answer as a lot of its own; ``found`` counts places among those that are missing."""
    for n, answer in found:
        count_answers(1)
        yield [(places[n], asdict(answer))]
