"""Classic predictors under the same contract as language models; torch and implicit are imported when one is fitted.

The classes of the registry are attributes: ``llmrec.baselines.ItemKNN(history=5).fit(interactions).recommend(["u1"])``.
"""

from __future__ import annotations

from typing import Any


def _classes() -> dict[str, str]:
    """Return the addresses of the baselines of the registry, by the names of their classes."""
    from llmrec.registry import BASELINES

    return {entry.address.partition(":")[2]: entry.address for entry in BASELINES.values()}


def __getattr__(name: str) -> Any:
    """Import the class of a baseline."""
    if name.startswith("_") or name not in (classes := _classes()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmrec.registry import attribute

    return attribute(classes[name])


def __dir__() -> list[str]:
    """Return the names of the classes."""
    return sorted(_classes())
