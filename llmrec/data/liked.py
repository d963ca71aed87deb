"""When a rating is a yes: one rule for the yes/no task, its baselines and the suites."""

from __future__ import annotations

from llmrec.data.split import SplitDataset


def threshold(scale: tuple[float, float], liked: float | None) -> float:
    """Return the lowest rating that is a like; by default three quarters up the scale, 4 of 1 to 5."""
    low, high = scale
    return low + 0.75 * (high - low) if liked is None else liked


def scale_of(data: SplitDataset) -> tuple[float, float]:
    """Return the lowest and the highest rating that the data says there are, or else those of training."""
    if data.dataset.rating_scale is not None:
        return data.dataset.rating_scale
    values = data.train["rating"].drop_nulls().to_numpy()
    return float(values.min()), float(values.max())
