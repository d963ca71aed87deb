"""Reads trees of tokens with vLLM: requests over whole texts, whose beginnings the prefix cache has already computed.

vLLM caches full blocks only. A request therefore computes what stands behind the last full block of its text that was
computed before: of a prompt of P tokens and blocks of B, at most (P mod B) + depth tokens. Requests of one batch share
uncached blocks too, since the scheduler notes a block when it is allocated and keys and values are written before
they are read; so nothing is warmed first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmrec.decode.beam import Fed, Floats, Wanted
from llmrec.errors import BackendError


class Ask(NamedTuple):
    """One request.

    Attributes:
        text: Token ids that are read.
        forced: Tokens that follow, whose log-probabilities are wanted.
        ids: Tokens whose log-probabilities are wanted after those.
    """

    text: tuple[int, ...]
    forced: tuple[int, ...]
    ids: tuple[int, ...]


class Answers(NamedTuple):
    """What an engine says: of each request the values of ``forced``, then of ``ids``; and the tokens it computed."""

    values: Sequence[Sequence[float]]
    tokens: int


Reader = Callable[[Sequence[Ask]], Answers]


class VLLMTree:
    """A `TreeEngine` over an engine with a prefix cache.

    Attributes:
        tokens: Tokens that the engine computed, as it reports them: those of every text that were not found cached, and
            those that it went on with.
        requests: Requests that it was sent.
        forwards: Batches of requests; each takes one or more steps of the engine.
    """

    def __init__(self, read: Reader, *, chains: bool, limit: int) -> None:
        """Set up.

        Args:
            read: Answers requests.
            chains: Whether requests may force tokens. A chain of tokens that leave no choice is then one request, which
                decodes it token by token; otherwise it is a request for each of its tokens, all in one step.
            limit: Most ids in one request.
        """
        self._read, self._chains, self._limit = read, chains, limit
        self._texts: list[tuple[int, ...]] = []
        self.tokens = self.requests = self.forwards = 0

    def open(self, prompts: Sequence[Sequence[int]], wanted: Wanted) -> Floats:
        """Note prompts, and ask after them; see `TreeEngine`."""
        self._texts = [tuple(prompt) for prompt in prompts]
        return self._answers(wanted)

    def feed(self, fed: Fed, wanted: Wanted) -> Floats:
        """Note tokens, and ask after those that something is wanted after; see `TreeEngine`."""
        for parent, token in zip(fed.parents.tolist(), fed.tokens.tolist(), strict=True):
            self._texts.append((*self._texts[parent], token))
        return self._answers(wanted)

    def close(self) -> None:
        """Forget the texts; what the engine has cached stays until it needs the room."""
        self._texts = []

    def _answers(self, wanted: Wanted) -> Floats:
        """Ask once for each distinct text and token."""
        if not len(wanted.tokens):
            return np.empty(0)
        numbers: dict[tuple[int, ...], int] = {}
        used, group = np.unique(wanted.after, return_inverse=True)
        rows = np.array([numbers.setdefault(self._texts[n], len(numbers)) for n in used.tolist()], dtype=np.int64)
        owners = rows[group]
        base = int(wanted.tokens.max()) + 1
        keys, place = np.unique(owners * base + wanted.tokens, return_inverse=True)
        asked, entries = self._asked(list(numbers), keys // base, keys % base)
        answers = self._read(asked)
        self.tokens += answers.tokens
        self.requests += len(asked)
        self.forwards += 1
        found = np.empty(len(keys))
        found[entries] = [value for values in answers.values for value in values]
        return found[place]

    def _asked(
        self, texts: Sequence[tuple[int, ...]], owners: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> tuple[list[Ask], NDArray[np.int64]]:
        """Return requests, and which entry each of the values that they ask for is.

        Args:
            texts: All different.
            owners: The text of each entry, ascending.
            tokens: The token that is wanted after it.
        """
        starts = np.searchsorted(owners, np.arange(len(texts) + 1)).tolist()
        ids = tokens.tolist()
        follow = self._links(texts, starts, ids)
        asked: list[Ask] = []
        entries: list[int] = []
        for first in sorted(set(range(len(texts))) - set(follow.values())):
            forced: list[int] = []
            at = first
            while True:
                start, end = starts[at], starts[at + 1]
                onward = follow.get(at)
                # A single last token is forced like those before it, and saves the step in which it would be asked.
                if onward is None and not (self._chains and forced and end - start == 1):
                    break
                forced.append(ids[start])
                entries.append(start)
                start = end
                if onward is None:
                    break
                at = onward
            group = range(start, end)
            asked.append(Ask(texts[first], tuple(forced), tuple(ids[n] for n in group[: self._limit])))
            entries.extend(group[: self._limit])
            for more in range(self._limit, len(group), self._limit):
                asked.append(Ask(texts[at], (), tuple(ids[n] for n in group[more : more + self._limit])))
                entries.extend(group[more : more + self._limit])
        return asked, np.array(entries, dtype=np.int64)

    def _links(self, texts: Sequence[tuple[int, ...]], starts: Sequence[int], ids: Sequence[int]) -> dict[int, int]:
        """Return the texts after which a single token is wanted and that go on, with that token, as another text."""
        if not self._chains:
            return {}
        numbers = {text: n for n, text in enumerate(texts)}
        single = [n for n in range(len(texts)) if starts[n + 1] - starts[n] == 1]
        onward = {n: numbers.get((*texts[n], ids[starts[n]])) for n in single}
        return {n: after for n, after in onward.items() if after is not None}


def parameters(vllm: Any, ask: Ask) -> Any:
    """Return a request's sampling parameters."""
    return vllm.SamplingParams(
        temperature=0,
        max_tokens=len(ask.forced) + bool(ask.ids),
        ignore_eos=True,
        # Requests with and without such ids do not mix in one step: all have some.
        logprob_token_ids=list(ask.ids or ask.forced[-1:]),
        detokenize=False,
        extra_args={"llmrec_forced": list(ask.forced)} if ask.forced else None,
        # Made for one request, so vLLM need not copy it.
        skip_clone=True,
    )


def answered(outputs: Sequence[Any], asked: Sequence[Ask]) -> Answers:
    """Read an engine's outputs.

    Raises:
        BackendError: If the engine did not follow forced tokens.
    """
    values: list[list[float]] = []
    tokens = 0
    for output, ask in zip(outputs, asked, strict=True):
        said = output.outputs[0]
        if tuple(said.token_ids[: len(ask.forced)]) != ask.forced:
            raise BackendError(
                "vLLM did not follow the forced tokens, so the scores would be wrong; set eval.scorer=hf and report "
                "the vLLM version",
                kind="defect",
                column="eval.scorer",
            )
        forced = [float(step[token].logprob) for step, token in zip(said.logprobs, ask.forced, strict=False)]
        values.append(forced + [float(said.logprobs[-1][token].logprob) for token in ask.ids])
        # The last token that is said is not read any more.
        tokens += len(ask.text) - (output.num_cached_tokens or 0) + len(said.token_ids) - 1
    return Answers(values, tokens)
