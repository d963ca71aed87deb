"""Metrics with their confidence intervals and signatures, computed with numpy and scipy only.

``llmrec.metrics.ndcg(lists, truth, k=10)`` returns the mean of a ranking metric over users, and
``llmrec.metrics.ndcg.per_user(lists, truth, k=10)`` the value of each user. ``hr``, ``recall``, ``precision``, ``mrr``
and ``map`` are used in the same way; see `llmrec.metrics.functions.Metric`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmrec.metrics.functions import Metric


def _metric_names() -> dict[str, str]:
    """Return the registered name of each metric function."""
    from llmrec.registry import METRICS

    return {name.lower(): name for name, entry in METRICS.items() if entry.several}


def __getattr__(name: str) -> Metric:
    """Return a ranking metric as a function."""
    if name.startswith("_") or name not in (names := _metric_names()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmrec.metrics.functions import Metric

    return Metric(names[name])


def __dir__() -> list[str]:
    """Return the names of the functions."""
    return sorted(_metric_names())
