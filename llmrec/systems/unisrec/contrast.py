"""The contrastive losses that UniSRec begins with, and how a sequence is changed for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.baselines.networks.batches import Batch, batches_of
from llmrec.errors import require
from llmrec.systems.unisrec.network import Universal

if TYPE_CHECKING:
    from numpy.typing import NDArray


def contrastive(left: Any, right: Any, same: Any, temperature: float) -> Any:
    """Return the mean of ``-log(exp(l_i . r_i / t) / sum_j exp(l_i . r_j / t))`` over rows (InfoNCE).

    Args:
        left: Vectors of length 1, shape (n, d).
        right: What belongs to each, shape (n, d).
        same: Rows with equal numbers are no negatives of each other, shape (n,).
        temperature: The t.
    """
    torch = require("torch", "baselines")
    logits = left @ right.T / temperature
    alike = (same[:, None] == same[None, :]).fill_diagonal_(False)
    return torch.nn.functional.cross_entropy(logits.masked_fill(alike, -torch.inf), torch.arange(len(left)))


def contrasted(
    model: Universal, pieces: Sequence[NDArray[np.int64]], said: Any, optimiser: Any, rng: np.random.Generator
) -> None:
    """Pass once over the sequences under the two contrastive losses.

    Args:
        model: Learns.
        pieces: Sequences of numbers of items.
        said: Vectors of texts with words left out, shape (warm, d); None: words are never left out.
        optimiser: Of the network.
        rng: Draws batches and what is left out.
    """
    torch, config, warm = require("torch", "baselines"), model.config, model.warm
    model.network.train()
    for batch in batches_of(pieces, config.batch, rng):
        optimiser.zero_grad(set_to_none=True)
        items, wanted = torch.from_numpy(batch.items), torch.from_numpy(batch.targets)
        raw = model.represented(warm)
        states, rows = model.encoded(raw[items]), wanted >= 0
        following = torch.nn.functional.normalize(raw[wanted[rows]], dim=1)
        loss = contrastive(states[rows], following, wanted[rows], config.temperature)
        if config.contrast:
            both = raw if said is None else torch.cat([raw, model.represented(warm, said)])
            changed, ends = changed_sequences(batch, config.item_drop, len(raw) if said is not None else 0, rng)
            last, every = rows.sum(dim=1) - 1, torch.arange(len(items))
            other = model.encoded(both[torch.from_numpy(changed)])[every, torch.from_numpy(ends)]
            pair = contrastive(states[every, last], other, wanted[every, last], config.temperature)
            loss = loss + config.contrast * pair
        loss.backward()
        optimiser.step()


def changed_sequences(
    batch: Batch, share: float, offset: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Leave items out of sequences, or with an offset, of every other one at random, words of all its texts.

    Returns:
        Items, padded on the right, shape (b, t), those with fewer words by their number and the offset; and the place
        of the last one of each sequence, shape (b,).
    """
    items, ends = np.zeros_like(batch.items), np.zeros(len(batch.items), dtype=np.int64)
    for row, length in enumerate((batch.targets >= 0).sum(axis=1).tolist()):
        own = batch.items[row, :length]
        if offset and rng.random() < 0.5:
            own = own + offset
        else:
            kept = own[rng.random(length) >= share]
            own = kept if len(kept) else own[-1:]
        items[row, : len(own)], ends[row] = own, len(own) - 1
    return items, ends


class Fewer:
    """Leaves out each word of a text by chance, but never all of them."""

    def __init__(self, share: float, seed: int) -> None:
        self._share, self._rng = share, np.random.default_rng([seed, 2])

    def __call__(self, text: str) -> str:
        """Return a text with fewer words; as it is, where none would be left."""
        words = np.array(text.split(), dtype=object)
        kept = words[self._rng.random(len(words)) >= self._share]
        return " ".join(kept) or text
