"""How large the KV cache of an engine on the CPU is: as large as the workload, and no larger than what is free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmrec.machine import Node

BLOCK = 32
"""Tokens of a block of the cache on the CPU: vLLM's default of 128 caches less, since only full blocks are kept."""
GIB = 2.0**30
# The largest cache of a small model; that of a larger one is as large as its weights at most.
_MOST = 2**30
# What the engine's processes take besides weights and cache.
_PROCESSES = 2**29


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What an engine is asked, as far as it decides how much memory it takes.

    Attributes:
        tokens: Prompts and answers of the largest batch.
        token_bytes: Keys and values of one token; see `llmrec.models.traits.cache_bytes`.
        weights: Bytes of the weights.
    """

    tokens: int
    token_bytes: int
    weights: int

    def least(self, longest: int) -> int:
        """Return the smallest cache that vLLM accepts: one request of ``longest`` tokens, and a block it keeps back."""
        return self.token_bytes * BLOCK * (-(-longest // BLOCK) + 2)

    def wanted(self, longest: int) -> int:
        """Return the bytes that hold the largest batch, as far as the upper limit.

        A strategy that asks again about the prompts of a batch finds them cached only if all of them fit.
        """
        return max(self.least(longest), min(self.tokens * self.token_bytes, max(_MOST, self.weights)))

    def sizes(self, longest: int, free: int) -> Iterator[int]:
        """Yield the caches to try: the one that is wanted or fits into ``free``, then half of it, down to the least."""
        least = self.least(longest)
        size = max(least, min(self.wanted(longest), free - self.weights - _PROCESSES))
        while size > least:
            yield size
            size = max(least, size // 2)
        yield least

    def is_short(self, size: int, node: Node) -> bool:
        """Whether a start with a cache of ``size`` bytes may have failed for lack of memory."""
        return node.free < 2 * (size + self.weights + _PROCESSES)
