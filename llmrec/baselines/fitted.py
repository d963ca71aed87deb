"""The guard against asking a baseline that has learned nothing."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def fitted(model: T | None, name: str) -> T:
    """Return what ``fit`` stored.

    Raises:
        RuntimeError: If ``fit`` was not called.
    """
    if model is None:
        raise RuntimeError(f"the baseline {name!r} was asked before fit() was called")
    return model
