"""A backend for servers with an OpenAI-compatible API, hosted or local; several servers can share the requests.

There are two routes; a first request selects one (`llmrec.backends.server.probe`):

- ``completions`` continues token ids, so that prompts, the given part of an answer and candidates are tokenised exactly
  as in training. It needs the server's tokenizer, and scores labels and whole texts if the server returns
  log-probabilities.
- ``chat`` sends turns. The given part of an answer becomes an assistant turn. Labels can be scored if the server
  returns log-probabilities of the first token.

Answers are yielded one by one as they arrive, and `llmrec.backends.cache` stores each at once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

from llmrec.backends.cache import StoredLedger
from llmrec.backends.encode import Encoder
from llmrec.backends.search import LabelTokens, single_token_labels
from llmrec.backends.server import probe
from llmrec.backends.server.client import (
    EventLoopThread,
    ServerClient,
    ServerUsage,
    chat_body,
    completion_body,
    likelihood_body,
    parse_usage,
)
from llmrec.backends.server.probe import FLOOR_MARGIN, LabelLogProbabilities, ServerCapabilities, probe_servers
from llmrec.durable import Json
from llmrec.errors import BackendError
from llmrec.guard import clean
from llmrec.recipe.schema import ServerSection
from llmrec.types import Backend, Capability, Completion, Cost, Prompt, Scores

log = logging.getLogger(__name__)

T = TypeVar("T")

# default limit of vLLM
_MAX_NAMED_TOKENS = 20
# Candidates per request.
_CANDIDATES_PER_REQUEST = 32
_SHOWN, _LONG = 60, 100_000
_TEXT_STRATEGIES_HINT = "the strategies list, parsed and text, which parse generated text, still work"


class OpenAIBackend(Backend):
    """A client of one server, or of several servers with the same model.

    Args:
        section: Address, model, key, limits.
        encoder: The tokenizer and chat template of the server's model; None uses chat.
        ledger: Records token usage, so that budgets persist across processes.

    Raises:
        BackendError: If a server does not answer, rejects the key or does not have the model, or servers differ.
        MissingExtra: If httpx is not installed.
    """

    name = "openai"
    capabilities: frozenset[Capability] = frozenset({"generate", "score"})
    """Maximum capabilities of a server; an instance has those that its server supports."""

    def __init__(
        self, section: ServerSection, encoder: Encoder | None = None, *, ledger: StoredLedger | None = None
    ) -> None:
        self._section, self._encoder = section, encoder
        self.spending = ServerUsage(section, ledger)
        self.wire = ServerClient(section, self.spending)
        self._loop = EventLoopThread()
        self._floored = False
        try:
            self.offers: ServerCapabilities = self._loop.run(probe_servers(self.wire, section, encoder))
        except BaseException:
            self.close()
            raise
        finally:
            self.spending.book()
        if not (self.offers.top or self.offers.likelihood):
            self.capabilities = frozenset({"generate"})

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Continue each prompt greedily; see `Backend.generate`."""
        return _sort_by_index(self.generate_each(prompts, max_tokens=max_tokens))

    def generate_each(self, prompts: Sequence[Prompt], *, max_tokens: int) -> Iterator[tuple[int, Completion]]:
        """Yield each prompt's index and generated text as they arrive.

        Raises:
            BackendError: If a request fails permanently, after all others were answered.
        """
        return self._iterate_results([self._generation_job(question, max_tokens) for question in _questions(prompts)])

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        """Compute candidate scores if the server returns log-probabilities; see `Backend.score`."""
        return _sort_by_index(self.score_each(prompts, candidates, closed=closed))

    def score_each(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> Iterator[tuple[int, Scores]]:
        """Yield each prompt's index and scores as they arrive.

        Raises:
            BackendError: If the server lacks the needed log-probabilities, or a request fails permanently.
        """
        if "score" not in self.capabilities:
            raise BackendError(
                f"the server {self._section.where} returns no log-probabilities of {self._section.model}, so nothing "
                f"can be scored; {_TEXT_STRATEGIES_HINT} (tasks.<family>.strategies)",
                kind="unsupported",
                at=self._section.where,
            )
        route = self._exact_score_job if self.offers.exact else self._chat_score_job
        pairs = zip(_questions(prompts), candidates, strict=True)
        return self._iterate_results([route(question, tuple(texts), closed) for question, texts in pairs])

    def close(self) -> None:
        """Close all connections; calling it twice is harmless."""
        loop, self._loop = self._loop, None  # type: ignore[assignment]
        if loop is not None:
            loop.run(self.wire.close())
            loop.close()

    # ----------------------------------------------------------------------- requests

    def _iterate_results(self, jobs: Sequence[Callable[[], Awaitable[T]]]) -> Iterator[tuple[int, T]]:
        if self._loop is None:
            raise BackendError("this client was closed; create a new client", kind="closed")
        try:
            for result in self._loop.each(jobs, self._section.concurrency):
                # Recorded before it is returned: if interrupted in between, it is requested and paid again.
                self.spending.book()
                yield result
        finally:
            self.spending.book()

    def _generation_job(self, question: _Question, most: int) -> Callable[[], Awaitable[Completion]]:
        section, encoder, prompt = self._section, self._encoder, question.prompt
        if self.offers.exact and encoder is not None:
            ids = encoder.prompt(prompt)
            room = max(1, min(most + section.thinking_tokens, encoder.max_length - len(ids)))
            keys: dict[str, Json] = {"stop": [prompt.stop]} if prompt.stop is not None else {}
            if self.offers.named:
                keys["stop_token_ids"] = sorted(encoder.stop_ids)
            path, body = "/completions", completion_body(section, ids, room=room, **keys)
        else:
            path, body = "/chat/completions", self._chat(prompt, most)

        def read(value: Any) -> Completion:
            return probe.parse_completion(value, stop=prompt.stop, chat=path != "/completions")

        return lambda: self.wire.ask(path, body, read, what=question.named)

    def _exact_score_job(
        self, query: _Question, texts: tuple[str, ...], closed: bool
    ) -> Callable[[], Awaitable[Scores]]:
        assert self._encoder is not None
        ids = self._encoder.prompt(query.prompt)
        tails = self._encoder.continuations(query.prompt, ids, texts, closed=closed)
        labels = single_token_labels(tails, closed=closed)
        if labels is not None and self.offers.named:
            return lambda: self._named(query, ids, labels)
        if labels is not None and self.offers.top:
            return lambda: self._score_top_labels(query, ids, labels)
        if self.offers.likelihood:
            return lambda: self._score_echoed_texts(query, ids, tails)
        raise BackendError(
            f"the server {self._section.where} returns log-probabilities of the first token only, but {query.named()} "
            f"needs log-probabilities of longer texts, such as {texts[0]!r}. Strategies with one-token labels (label, "
            f"expected) work, and {_TEXT_STRATEGIES_HINT} (tasks.<family>.strategies)",
            kind="unsupported",
            at=self._section.where,
        )

    async def _named(self, question: _Question, ids: list[int], labels: LabelTokens) -> Scores:
        """Score labels by the exact log-probabilities of their tokens."""
        results: list[float] = []
        for start in range(0, len(labels.distinct), _MAX_NAMED_TOKENS):
            part = labels.distinct[start : start + _MAX_NAMED_TOKENS]
            keys = {"logprobs": 1, "logprob_token_ids": list(part), "return_tokens_as_token_ids": True}
            body = completion_body(self._section, [*ids, *labels.shared], room=1, **keys)
            read = partial(probe.parse_named_labels, ids=part)
            results += await self.wire.ask("/completions", body, read, what=question.named)
        return _label_scores(results, len(ids), "openai:one-token")

    async def _score_top_labels(self, question: _Question, ids: list[int], labels: LabelTokens) -> Scores:
        """Score labels that are among the most likely tokens."""
        assert self._encoder is not None
        spellings = [_token_spellings(self._encoder, i) for i in labels.distinct]
        body = completion_body(self._section, [*ids, *labels.shared], room=1, logprobs=self.offers.top)
        read = partial(probe.parse_top_labels, spellings=spellings)
        result = await self.wire.ask("/completions", body, read, what=question.named)
        self._note(result)
        return _label_scores(result.logprobs, len(ids), f"openai:top-{self.offers.top}")

    async def _score_echoed_texts(
        self, question: _Question, ids: list[int], tails: Sequence[tuple[int, ...]]
    ) -> Scores:
        """Score whole texts by the log-probabilities of echoed prompts."""
        sums: list[float] = []
        for start in range(0, len(tails), _CANDIDATES_PER_REQUEST):
            part = tails[start : start + _CANDIDATES_PER_REQUEST]
            body = likelihood_body(self._section, [[*ids, *tail] for tail in part])
            read = partial(probe.sum_candidate_logprobs, start=len(ids), tails=part)
            sums += await self.wire.ask("/completions", body, read, what=question.named)
        lengths = tuple(len(tail) for tail in tails)
        return Scores(logprobs=tuple(sums), tokens=lengths, prompt_tokens=len(ids), engine="openai:echo")

    def _chat_score_job(
        self, query: _Question, texts: tuple[str, ...], closed: bool
    ) -> Callable[[], Awaitable[Scores]]:
        labels = [text.strip() for text in texts]
        if closed or len(set(labels)) != len(labels) or not all(label.isalnum() for label in labels):
            raise BackendError(
                f"the server {self._section.where} is used through the chat API, which returns log-probabilities of "
                f"the first token only, but {query.named()} needs log-probabilities of whole texts, such as "
                f"{texts[0]!r}; {_TEXT_STRATEGIES_HINT} (tasks.<family>.strategies). If model.name is the server's "
                "model, eval.server.chat=completions may score them",
                kind="unsupported",
                at=self._section.where,
                column="eval.server.chat",
            )
        body = self._chat(query.prompt, 1, logprobs=True, top_logprobs=self.offers.top)

        def read(value: Any) -> tuple[LabelLogProbabilities, int]:
            return probe.parse_chat_labels(value, labels), (parse_usage(value) or Cost()).prompt_tokens

        async def ask() -> Scores:
            result, length = await self.wire.ask("/chat/completions", body, read, what=query.named)
            self._note(result)
            return _label_scores(result.logprobs, length, f"openai:chat-top-{self.offers.top}")

        return ask

    def _chat(self, prompt: Prompt, room: int, **keys: Any) -> dict[str, Json]:
        control = self._encoder.control if self._encoder is not None else ()
        return chat_body(self._section, prompt, room=room, control=control, continues=self.offers.continues, **keys)

    def _note(self, labelled: LabelLogProbabilities) -> None:
        """Log once that some labels got the minimum score."""
        if labelled.floored and not self._floored:
            self._floored = True
            log.warning(
                "%s returns log-probabilities of only the %d most likely tokens; all other labels get the same "
                "score, %g nats below the least likely of these tokens",
                self._section.where,
                self.offers.top,
                FLOOR_MARGIN,
            )


@dataclass(frozen=True, slots=True)
class _Question:
    """A prompt and its number within a call, from 1."""

    number: int
    count: int
    prompt: Prompt

    def named(self) -> str:
        """Return the name of the prompt in errors."""
        last = clean(self.prompt.messages[-1].text, _LONG) if self.prompt.messages else ""
        shown = f"... {last[-_SHOWN:]}" if len(last) > _SHOWN else last
        return f"request {self.number} of {self.count} ({shown!r})"


def _questions(prompts: Sequence[Prompt]) -> list[_Question]:
    return [_Question(index, len(prompts), prompt) for index, prompt in enumerate(prompts, start=1)]


def _token_spellings(encoder: Encoder, token: int) -> tuple[str, ...]:
    """Return the ways in which servers may write a token."""
    raw = str(encoder.tokenizer.convert_ids_to_tokens(token))
    return raw, raw.replace("▁", " ").replace("Ġ", " "), str(encoder.tokenizer.decode([token]))


def _label_scores(logprobs: Sequence[float], prompt_tokens: int, engine: str) -> Scores:
    return Scores(logprobs=tuple(logprobs), tokens=(1,) * len(logprobs), prompt_tokens=prompt_tokens, engine=engine)


def _sort_by_index(answers: Iterator[tuple[int, T]]) -> list[T]:
    """Sort answers in the order of the prompts."""
    return [answer for _, answer in sorted(answers, key=itemgetter(0))]
