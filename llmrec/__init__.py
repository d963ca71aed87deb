"""llmrec: fine-tune language models as recommender systems, and evaluate them.

Three lines do what the command line does::

    import llmrec
    recipe = llmrec.load_recipe("recipes/quickstart.yaml")
    run = llmrec.run(recipe)

Two more load the tuned model and rank items::

    rec = llmrec.load("runs/quickstart")
    rec.rank(history=["1", "50"], k=10)
"""

from __future__ import annotations

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
    from llmrec.bench.runs import compare_runs as compare
    from llmrec.cli.score import score as score
    from llmrec.errors import LlmrecError as LlmrecError
    from llmrec.exports.export import export as export
    from llmrec.pipeline.run import check as check
    from llmrec.pipeline.run import fuse as fuse
    from llmrec.pipeline.run import run as run
    from llmrec.recipe.load import load_recipe as load_recipe
    from llmrec.recipe.schema import Recipe as Recipe
    from llmrec.start.functions import auto as auto
    from llmrec.start.functions import init as init
    from llmrec.start.functions import tune as tune

# The names of extensions are in the registry.
_FUNCTIONS = {
    "LlmrecError": "llmrec.errors:LlmrecError",
    "Recipe": "llmrec.recipe.schema:Recipe",
    "check": "llmrec.pipeline.run:check",
    "export": "llmrec.exports.export:export",
    "fuse": "llmrec.pipeline.run:fuse",
    "load": "llmrec.answer.loaded:load",
    "load_recipe": "llmrec.recipe.load:load_recipe",
    "run": "llmrec.pipeline.run:run",
    "score": "llmrec.cli.score:score",
}


def __getattr__(name: str) -> _typing.Any:
    """Import a public name on first use, so that ``import llmrec`` stays fast."""
    if name not in __all__:
        raise AttributeError(f"module 'llmrec' has no attribute {name!r}")
    from llmrec.registry import FUNCTIONS, attribute

    target = _FUNCTIONS.get(name) or FUNCTIONS.get(name)
    if target is None:
        raise AttributeError(f"llmrec.{name} belongs to an extension that is not installed")
    result = attribute(target)
    if not isinstance(result, type):
        from llmrec.keywords import speaks_python

        # The command line calls the original functions, whose errors name its options.
        result = speaks_python(result)
        result.__module__, result.__name__, result.__qualname__ = __name__, name, name
    globals()[name] = result
    return result


def __dir__() -> list[str]:
    """Return the public names, including those not yet imported."""
    return sorted(__all__)
