"""Reads trees of tokens with transformers: the prompt once, and each token of a tree once, whoever else is in it.

All tokens that are fed together stand side by side in one row a user, under a mask that lets each see its prompt and
its own ancestors. The key-value cache only grows: nothing is copied for beams, and nothing is put in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.backends.hf.bodies import body_of
from llmrec.decode.beam import Fed, Floats, Wanted
from llmrec.errors import require
from llmrec.models.traits import chosen_logprobs

# Rows of logits at a time: what a wide vocabulary takes stays within tens of megabytes.
_ROWS = 256


class MaskedTree:
    """A `TreeEngine` over a causal language model that takes block masks, or a T5.

    Attributes:
        tokens: Tokens that were computed, padding left out; prompts included.
        forwards: Passes through the model's body.
        head_rows: Rows of logits that were computed.
    """

    def __init__(self, model: Any, pad: int, *, warm: bool = False) -> None:
        """Set up.

        Args:
            model: In evaluation mode.
            pad: Any token id.
            warm: Keep the cache of a prompt that was read alone for the next one. Sums then differ in their last bits
                from those of a prompt that is read whole. Not for an encoder-decoder, whose rows hold no prompt.
        """
        self._torch = require("torch", "train")
        self._model, self._pad, self._keep = model, pad, warm
        self._body = body_of(model)
        self._cache: Any = None
        self._warm: tuple[tuple[int, ...], Any] | None = None
        self._prompts: list[tuple[int, ...]] = []
        self.tokens = self.forwards = self.head_rows = 0

    def open(self, prompts: Sequence[Sequence[int]], wanted: Wanted) -> Floats:
        """Read prompts, padded on their left; see `TreeEngine`.

        With ``warm`` a prompt that is read alone continues from the one that was read alone before it, as far as both
        begin alike.
        """
        torch = self._torch
        with torch.inference_mode():
            begun = self._body.begin(prompts)
        if begun is not prompts:
            self.tokens += sum(map(len, prompts))
            prompts = begun
        self._prompts = [tuple(prompt) for prompt in prompts]
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        self._lengths, self._width = lengths, longest
        # Of every prompt and fed token: its place in the text, and which columns behind the prompts it sees.
        self._positions = lengths - 1
        self._sees = np.zeros((len(prompts), 0), dtype=bool)
        known = self._resume(prompts)
        ids = np.full((len(prompts), longest - known), self._pad)
        for row, prompt in enumerate(prompts):
            ids[row, longest - known - (len(prompt) - known) :] = prompt[known:]
        mask = np.arange(longest) >= (longest - lengths)[:, None]
        places = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)[:, known:]
        hidden = self._forward(ids, torch.from_numpy(mask.astype(np.int64)), places)
        self.tokens += int(lengths.sum()) - known * len(prompts)
        return self._logprobs(hidden[:, -1], wanted, wanted.after)

    def feed(self, fed: Fed, wanted: Wanted) -> Floats:
        """Read tokens behind the prompts; see `TreeEngine`."""
        torch, count = self._torch, len(fed.tokens)
        base, before = len(self._positions), self._sees.shape[1]
        slots = _ranks(fed.users)
        wide = int(slots.max()) + 1
        self._grow(fed, slots, wide)
        ids = np.full((len(self._lengths), wide), self._pad)
        places = np.zeros((len(self._lengths), wide), dtype=np.int64)
        ids[fed.users, slots] = fed.tokens
        places[fed.users, slots] = self._positions[base:]
        seen = np.zeros((len(self._lengths), wide, self._width + before + wide), dtype=bool)
        seen[:, :, : self._width] = np.arange(self._width) >= (self._width - self._lengths)[:, None, None]
        seen[fed.users, slots, self._width :] = self._sees[base:]
        dtype = self._model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~torch.from_numpy(seen), torch.finfo(dtype).min)
        hidden = self._forward(ids, mask[:, None], places)
        self.tokens += count
        rows = torch.from_numpy(fed.users * wide + slots).to(hidden.device)
        return self._logprobs(hidden.flatten(0, 1)[rows], wanted, wanted.after - base)

    def close(self) -> None:
        """Forget the tree; with ``warm``, keep the cache of a prompt that was read alone."""
        if self._keep and len(self._prompts) == 1 and self._cache is not None:
            shorten(self._cache, len(self._prompts[0]))
            self._warm = (self._prompts[0], self._cache)
        self._cache = None

    def _resume(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many tokens of a single prompt the kept cache holds already, and take that cache."""
        warm, self._warm = self._warm, None
        if warm is None or len(prompts) != 1:
            return 0
        alike = next((n for n, (a, b) in enumerate(zip(warm[0], prompts[0], strict=False)) if a != b), None)
        # The last token is read again, since the logits after it are wanted.
        known = min(len(warm[0]) if alike is None else alike, len(prompts[0]) - 1)
        if known:
            shorten(warm[1], known)
            self._cache = warm[1]
        return known

    def _grow(self, fed: Fed, slots: NDArray[np.int64], wide: int) -> None:
        """Note place, column and ancestors of fed tokens; parents come before their children."""
        base, before = len(self._positions), self._sees.shape[1]
        sees = np.zeros((base + len(fed.tokens), before + wide), dtype=bool)
        sees[:base, :before] = self._sees
        positions = np.concatenate([self._positions, np.zeros(len(fed.tokens), dtype=np.int64)])
        for n, (parent, slot) in enumerate(zip(fed.parents.tolist(), slots.tolist(), strict=True), base):
            positions[n] = positions[parent] + 1
            sees[n] = sees[parent]
            sees[n, before + slot] = True
        self._positions, self._sees = positions, sees

    def _forward(self, ids: NDArray[np.int64], mask: Any, places: NDArray[np.int64]) -> Any:
        """Run the body over new columns, and return the last hidden states, shape (users, columns, d)."""
        torch, device = self._torch, self._model.device
        with torch.inference_mode():
            hidden, self._cache = self._body.run(
                torch.from_numpy(ids).to(device), mask.to(device), torch.from_numpy(places).to(device), self._cache
            )
        self.forwards += 1
        return hidden

    def _logprobs(self, hidden: Any, wanted: Wanted, rows: NDArray[np.int64]) -> Floats:
        """Return full-softmax log-probabilities of wanted tokens; ``rows`` are the hidden states they stand after."""
        torch, head = self._torch, self._model.get_output_embeddings()
        found = np.empty(len(rows))
        used, group = np.unique(rows, return_inverse=True)
        for start in range(0, len(used), _ROWS):
            part = used[start : start + _ROWS]
            here = np.flatnonzero((group >= start) & (group < start + len(part)))
            with torch.inference_mode():
                states = hidden[torch.from_numpy(part).to(hidden.device)]
                at = torch.from_numpy(group[here] - start).to(hidden.device)
                ids = torch.from_numpy(wanted.tokens[here]).to(hidden.device)
                found[here] = chosen_logprobs(head, states, at, ids).cpu().numpy()
            self.head_rows += len(part)
        return found


def shorten(cache: Any, length: int) -> None:
    """Drop what a cache holds behind a length."""
    if (over := cache.get_seq_length() - length) > 0:
        cache.crop(-over)


def _ranks(users: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many tokens of the same user come before each, shape (n,)."""
    order = np.argsort(users, kind="stable")
    counts = np.bincount(users)
    ranks = np.empty(len(users), dtype=np.int64)
    ranks[order] = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks
