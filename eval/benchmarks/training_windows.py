"""Measures how much targets of a long sequence gain from context beyond the evaluation window.

Dynamic Target Isolation (arXiv 2503.01001) names two differences between sequences with many targets and examples with
one: late targets attend beyond the evaluation window, directly or through hidden states (hidden-state leakage), and a
target's position reveals the length of its prefix (positional overfitting). Here the loss of every target is computed
in four ways with the same pretrained weights, in float32:

- evaluation: one example per target, with the last lines of the window only;
- same places: the same tokens at their positions in the user's sequence, so that only states differ;
- user row: with all lines before a target;
- band: each layer attends to the window only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmrec.backends.encode import IGNORED, TokenRow
from llmrec.train.loss import block_mask
from llmrec.train.packing import stack, tree

Losses = NDArray[np.float64]


def packed_losses(model: Any, row: TokenRow, band: int | None) -> Losses:
    """Return the loss of every target token of a user sequence, in nats."""
    packed = stack([tree([row], band)], 0)
    ids, places, ends = (torch.from_numpy(each) for each in (packed.ids, packed.places, packed.ends))
    return _losses(model, ids, places, block_mask(model, ends), packed.after, packed.wanted)


def window_losses(model: Any, row: TokenRow, window: int, *, moved: bool) -> Losses:
    """Return the same from one example per line: the question, the window of lines, and the line.

    Args:
        model: A causal language model.
        row: A user sequence with its line boundaries.
        window: Number of lines before the target.
        moved: Whether positions are contiguous, as in evaluation, or those of the user sequence.
    """
    ends, found = [*row.lines[1:], len(row.ids)], []
    for line, end in enumerate(ends):
        if row.labels[row.lines[line]] == IGNORED:
            continue
        kept = np.r_[: row.lines[0], row.lines[max(0, line - window)] : end]
        ids, places = torch.from_numpy(np.array(row.ids)[kept])[None], np.arange(len(kept)) if moved else kept
        mask = torch.ones(1, 1, len(kept), len(kept)).tril().bool()
        own = np.arange(len(kept) - (end - row.lines[line]), len(kept))
        found.append(_losses(model, ids, torch.from_numpy(places)[None], mask, own - 1, ids[0].numpy()[own]))
    return np.concatenate(found)


def _losses(model: Any, ids: Any, places: Any, mask: Any, after: Any, wanted: Any) -> Losses:
    with torch.no_grad():
        states = model.get_decoder()(input_ids=ids, position_ids=places, attention_mask=mask, use_cache=False)
        picked = states.last_hidden_state.flatten(0, 1)[torch.from_numpy(after)]
        logits = model.get_output_embeddings()(picked).float()
        losses: Losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(wanted), reduction="none").numpy()
    return losses.astype(np.float64)


def compare(model: Any, rows: list[TokenRow], window: int) -> dict[str, dict[str, float]]:
    """Return the mean losses of targets with more lines before them than the window, and their differences."""
    parts: dict[str, list[Losses]] = {"evaluation": [], "same places": [], "user row": [], "band": []}
    for row in rows:
        late = np.array([n for n, label in enumerate(row.labels) if label != IGNORED]) >= row.lines[window + 1]
        parts["evaluation"].append(window_losses(model, row, window, moved=True)[late])
        parts["same places"].append(window_losses(model, row, window, moved=False)[late])
        parts["user row"].append(packed_losses(model, row, None)[late])
        parts["band"].append(packed_losses(model, row, window)[late])
    joined = {name: np.concatenate(each) for name, each in parts.items()}
    return {
        name: {
            "mean_loss": float(each.mean()),
            "from_evaluation": float((each - joined["evaluation"]).mean()),
            "apart_from_evaluation": float(np.abs(each - joined["evaluation"]).mean()),
            "apart_from_same_places": float(np.abs(each - joined["same places"]).mean()),
        }
        for name, each in joined.items()
    } | {"targets": {"late": float(len(joined["band"]))}}
