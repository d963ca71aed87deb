"""llmrec: tune a language model into a recommender, and measure it honestly.

Three lines do what the command line does::

    import llmrec
    recipe = llmrec.load_recipe("recipes/quickstart.yaml")
    run = llmrec.run(recipe)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["__version__", "load_recipe", "run"]

if TYPE_CHECKING:
    from llmrec.pipeline import run as run
    from llmrec.recipe.load import load_recipe as load_recipe


def __getattr__(name: str) -> Any:
    """Import the two public functions on first use, so that ``import llmrec`` stays quick."""
    if name == "load_recipe":
        from llmrec.recipe.load import load_recipe

        return load_recipe
    if name == "run":
        from llmrec.pipeline import run

        return run
    raise AttributeError(f"module 'llmrec' has no attribute {name!r}")
