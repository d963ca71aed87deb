"""Finds the page of a data set: a published one by its name, another by the path of its page.

A page has the keys of `llmrec.data.sets.spec.Known`, but for ``name``, and may have a ``base``: the name of a
published set, or another page beside it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from llmrec.data.sets.spec import Known
from llmrec.recipe.load import load_page
from llmrec.registry import SETS

PAGE = (".yaml", ".yml")
"""What the path of a page ends with."""


def is_page(source: str) -> bool:
    """Whether a source is the path of a page."""
    return source.lower().endswith(PAGE)


def published() -> list[Known]:
    """Return all published sets, by name."""
    return [known(name) for name in sorted(SETS)]


def known(source: str) -> Known:
    """Return what a page says.

    Args:
        source: The name of a published set, or the path of a page.

    Raises:
        RecipeError: If there is no such page, or a key or a value is wrong; the message names file, line and key.
    """
    return load_page(Known, Path(source), {"name": source}, SETS) if is_page(source) else _published(source)


@cache
def _published(name: str) -> Known:
    return load_page(Known, SETS[name], {"name": name}, SETS)
