"""Baseline recommenders without a language model, with the same interface as language models.

The classes of the registry are attributes: ``llmrec.baselines.ItemKNN(history=5).fit(interactions).recommend(["u1"])``.
"""

from __future__ import annotations

from typing import Any


def _class_paths() -> dict[str, str]:
    """Return the import path of each registered baseline, by class name."""
    from llmrec.registry import BASELINES

    return {entry.address.partition(":")[2]: entry.address for entry in BASELINES.values()}


def __getattr__(name: str) -> Any:
    """Import a baseline class."""
    if name.startswith("_") or name not in (classes := _class_paths()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmrec.registry import import_attribute

    return import_attribute(classes[name])


def __dir__() -> list[str]:
    """Return the class names."""
    return sorted(_class_paths())
