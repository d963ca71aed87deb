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

import importlib as _importlib
import typing as _typing

__version__ = "0.2.0"
__all__ = [
    "LlmrecError",
    "Recipe",
    "__version__",
    "auto",
    "check",
    "compare",
    "export",
    "fuse",
    "init",
    "load",
    "load_recipe",
    "run",
    "score",
    "tune",
]

if _typing.TYPE_CHECKING:
    from llmrec.answer.loaded import load as load
    from llmrec.cli.functions import auto as auto
    from llmrec.cli.functions import compare as compare
    from llmrec.cli.functions import export as export
    from llmrec.cli.functions import fuse as fuse
    from llmrec.cli.functions import tune as tune
    from llmrec.cli.score.run import score as score
    from llmrec.errors import LlmrecError as LlmrecError
    from llmrec.pipeline.run import check as check
    from llmrec.pipeline.run import run as run
    from llmrec.recipe.load import load_recipe as load_recipe
    from llmrec.recipe.schema import Recipe as Recipe
    from llmrec.start.init.frame import init as init

_HOMES = {
    "LlmrecError": "llmrec.errors",
    "Recipe": "llmrec.recipe.schema",
    "auto": "llmrec.cli.functions",
    "check": "llmrec.pipeline.run",
    "compare": "llmrec.cli.functions",
    "export": "llmrec.cli.functions",
    "fuse": "llmrec.cli.functions",
    "init": "llmrec.start.init.frame",
    "load": "llmrec.answer.loaded",
    "load_recipe": "llmrec.recipe.load",
    "run": "llmrec.pipeline.run",
    "score": "llmrec.cli.score.run",
    "tune": "llmrec.cli.functions",
}


def __getattr__(name: str) -> _typing.Any:
    """Import the public names on first use, so that ``import llmrec`` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llmrec' has no attribute {name!r}")
    found = getattr(_importlib.import_module(_HOMES[name]), name)
    if not isinstance(found, type):
        from llmrec.keywords import speaks_python

        # The command line calls the functions themselves, whose errors name its options.
        found = speaks_python(found)
        found.__module__ = __name__
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names, those included that are not imported yet."""
    return sorted(__all__)
