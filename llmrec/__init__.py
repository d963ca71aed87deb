"""llmrec: tune a language model into a recommender, and measure it honestly.

Three lines do what the command line does::

    import llmrec
    recipe = llmrec.load_recipe("recipes/quickstart.yaml")
    run = llmrec.run(recipe)

And what was tuned answers in two more::

    rec = llmrec.load("runs/quickstart")
    rec.rank(history=["1", "50"], k=10)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["Recipe", "__version__", "check", "init", "load", "load_recipe", "run", "score"]

if TYPE_CHECKING:
    from llmrec.answering.loaded import load as load
    from llmrec.commands.init.frame import init as init
    from llmrec.commands.score.run import score as score
    from llmrec.pipeline import check as check
    from llmrec.pipeline import run as run
    from llmrec.recipe.load import load_recipe as load_recipe
    from llmrec.recipe.schema import Recipe as Recipe

_HOMES = {
    "Recipe": "llmrec.recipe.schema",
    "check": "llmrec.pipeline",
    "init": "llmrec.commands.init.frame",
    "load": "llmrec.answering.loaded",
    "load_recipe": "llmrec.recipe.load",
    "run": "llmrec.pipeline",
    "score": "llmrec.commands.score.run",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``import llmrec`` stays quick."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmrec' has no attribute {name!r}")
