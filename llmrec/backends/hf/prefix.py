"""Reads prompts up to their last token; what a prompt shares with one that was read lately is not read again.

Strategies that ask many questions about one request repeat its history in each of them. A prompt is read in blocks of
fixed size and the cache is cut at their ends, so that a block has the same shape and the same cache behind it whether
or not it was read before: a score does not depend on which prompts were read before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.backends.hf.tree import shorten
from llmrec.errors import require

BLOCK = 64
"""Tokens of a block. Smaller ones share more and make more, smaller matrix products."""
# Bytes of keys and values that are kept: all requests of a batch of a small model, a few of a large one.
_KEPT = 768 << 20


@dataclass(slots=True)
class _Read:
    """A prompt that was read, with its keys and values."""

    ids: list[int]
    cache: Any


class PrefixReader:
    """Reads prompts with the decoder of a causal model whose cache can be cut.

    Attributes:
        read: Tokens that were read, shared ones not counted.
    """

    def __init__(self, model: Any) -> None:
        self._torch, self._model = require("torch", "train"), model
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
        self._room = max(1, _KEPT // token)
        self._known: list[_Read] = []
        self.read = 0

    def last(self, ids: Sequence[int]) -> Any:
        """Return the last hidden state of a prompt, shape (1, d)."""
        return self._states(list(ids))[-1:]

    def tree(
        self, ids: Sequence[int], tokens: Sequence[int], sees: NDArray[np.bool_], depths: NDArray[np.int64]
    ) -> Any:
        """Return the last hidden states of a prompt's last token and of a tree of tokens behind it, shape (1 + t, d).

        Args:
            ids: The prompt.
            tokens: The tree, t of them, parents before children.
            sees: Which of them each sees, shape (t, t); all see the prompt.
            depths: How many of them stand before each in its text, shape (t,).
        """
        torch, device = self._torch, self._model.device
        first = self._states(list(ids))[-1:]
        if not tokens:
            return first
        cache, dtype = self._known[-1].cache, self._model.dtype
        mask = torch.zeros((len(tokens), len(ids) + len(tokens)), dtype=dtype, device=device)
        mask[:, len(ids) :].masked_fill_(torch.from_numpy(~sees).to(device), torch.finfo(dtype).min)
        with torch.inference_mode():
            out = self._model.get_decoder()(
                input_ids=torch.tensor([list(tokens)], device=device),
                attention_mask=mask[None, None],
                position_ids=torch.from_numpy(len(ids) + depths)[None].to(device),
                past_key_values=cache,
                use_cache=True,
            )
        shorten(out.past_key_values, len(ids))
        self._known[-1].cache = out.past_key_values
        self.read += len(tokens)
        return torch.cat([first, out.last_hidden_state[0]])

    def drop(self) -> None:
        """Forget what was read."""
        self._known.clear()

    def _states(self, ids: list[int]) -> Any:
        """Return the hidden states of a prompt's last block; the prompt is the newest of those known."""
        torch = self._torch
        known, kept = self._like(ids)
        if kept:
            shorten(known.cache, kept)
        states: Any = None
        with torch.inference_mode():
            for start in range(kept, len(ids), BLOCK):
                row = torch.tensor([ids[start : start + BLOCK]], device=self._model.device)
                out = self._model.get_decoder()(input_ids=row, past_key_values=known.cache, use_cache=True)
                states, known.cache = out.last_hidden_state, out.past_key_values
        known.ids = ids
        self.read += len(ids) - kept
        self._known.append(known)
        while len(self._known) > 1 and sum(len(each.ids) for each in self._known) > self._room:
            self._known.pop(0)
        return states[0]

    def _like(self, ids: list[int]) -> tuple[_Read, int]:
        """Take out what is known of a prompt, and say how many of its tokens need not be read.

        A known prompt is used up by the one that continues from it. One of which it would use less than half stays:
        that is another user's, and only the frame of the question is the same.
        """
        # The last token is read in any case: its state is what is asked for.
        most = (len(ids) - 1) // BLOCK
        shared = [min(most, _same(ids, each.ids) // BLOCK) for each in self._known]
        best = max(range(len(shared)), key=lambda i: (shared[i], i), default=None)
        if best is None or 2 * shared[best] * BLOCK < len(ids):
            return _Read([], None), 0
        return self._known.pop(best), shared[best] * BLOCK


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two prompts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
