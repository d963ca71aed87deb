"""A split with nothing held out, for tests of what a baseline learns."""

from __future__ import annotations

from llmrec.data.dataset import Dataset
from llmrec.data.split import SplitDataset


def all_trained(data: Dataset) -> SplitDataset:
    """Return a split whose training rows are all interactions of a dataset."""
    none = data.interactions.clear()
    return SplitDataset(
        dataset=data,
        kind="leave_one_out",
        seed=0,
        train=data.interactions,
        valid=none,
        test=none,
        held_out=frozenset(),
    )
