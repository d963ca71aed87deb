"""A small recipe that generates texts about users and items, for the tests of all commands that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrec.recipe.load import as_recipe
from llmrec.recipe.schema import Recipe

SPLIT = {"kind": "prefix", "valid": 0.2, "test": 0.2}


def augmenting_recipe(model: Path, *, batch: int = 4, model_dtype: str = "auto", **more: Any) -> Recipe:
    """Return the recipe; ``more`` are keys of the section ``augment``."""
    return as_recipe(
        {
            "name": "toy",
            "model": {"name": str(model), "dtype": model_dtype},
            "data": {"source": "made-reviews", "noun": "products", "split": SPLIT},
            "tasks": {"ctr": {}},
            "eval": {"backend": "hf", "batch": batch},
            "augment": {"limit": 6, "max_tokens": 4, "encoder": "chance", "factors": ["taste"], **more},
        }
    )
