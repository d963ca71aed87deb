"""Planned differences of means with clustered cases, by users or dialogues: one family, intervals over clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.metrics.significance import decide, enough
from llmrec.metrics.stats import by_user, paired_of


def differences(
    metric: str, gains: Sequence[tuple[str, str, NDArray[np.float64], Sequence[str]]]
) -> list[dict[str, Any]]:
    """Return planned differences, corrected together.

    Args:
        metric: Name of the metric.
        gains: Names of two models, their difference (first − second) for every case, and the cluster of every case.
    """
    sampled = []
    for _, _, values, clusters in gains:
        sums, sizes = by_user(values, clusters)
        sampled.append(
            paired_of(
                lambda rows, sums=sums, sizes=sizes: sums[rows].sum(axis=1) / sizes[rows].sum(axis=1),  # type: ignore[misc]
                len(sums),
                resamples=enough(2000, len(gains)),
                seed=0,
            )
        )
    return [
        {"metric": metric, "a": one, "b": other, **{key: round(value, 5) for key, value in asdict(each).items()}}
        for (one, other, _, _), each in zip(gains, decide(sampled), strict=True)
    ]
