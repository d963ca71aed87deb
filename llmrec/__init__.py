"""llmrec: fine-tune language models as recommender systems, and evaluate them.

A recommender from a frame of interactions, and lists for its users::

    import llmrec
    rec = llmrec.fit(interactions, items, model="auto", budget="5m")
    rec.recommend(["u1", "u2"], k=10)
    rec.evaluate(test)

A recipe trains a language model as the command line does::

    run = llmrec.run("recipes/quickstart.yaml")
    rec = llmrec.load(run.folder)
"""

from __future__ import annotations

import typing as _typing

__version__ = "0.2.0"
__all__ = [
    "LlmrecError",
    "Recipe",
    "__version__",
    "auto",
    "baselines",
    "check",
    "compare",
    "export",
    "fit",
    "fuse",
    "init",
    "load",
    "load_recipe",
    "metrics",
    "run",
    "score",
    "tune",
]

if _typing.TYPE_CHECKING:
    from llmrec import baselines as baselines
    from llmrec import metrics as metrics
    from llmrec.answer.loaded import load as load
    from llmrec.bench.runs import compare as compare
    from llmrec.errors import LlmrecError as LlmrecError
    from llmrec.evaluate.scoring import score as score
    from llmrec.exports.export import export as export
    from llmrec.pipeline.run import check as check
    from llmrec.pipeline.run import fuse as fuse
    from llmrec.pipeline.run import run as run
    from llmrec.recipe.load import load_recipe as load_recipe
    from llmrec.recipe.schema import Recipe as Recipe
    from llmrec.start.functions import auto as auto
    from llmrec.start.functions import fit as fit
    from llmrec.start.functions import init as init
    from llmrec.start.functions import tune as tune

# Modules whose attributes are public.
_MODULES = ("baselines", "metrics")
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
    "score": "llmrec.evaluate.scoring:score",
}


def __getattr__(name: str) -> _typing.Any:
    """Import a public name on first use, so that ``import llmrec`` stays fast."""
    if name not in __all__:
        raise AttributeError(f"module 'llmrec' has no attribute {name!r}")
    if name in _MODULES:
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    from llmrec.registry import FUNCTIONS, import_attribute

    target = _FUNCTIONS.get(name) or FUNCTIONS.get(name)
    if target is None:
        raise AttributeError(f"llmrec.{name} belongs to an extension that is not installed")
    result = import_attribute(target)
    if not isinstance(result, type):
        from llmrec.keywords import with_keywords_in_errors

        # The command line uses the original functions, whose errors name command options.
        result = with_keywords_in_errors(result)
        result.__module__, result.__name__, result.__qualname__ = __name__, name, name
    globals()[name] = result
    return result


def __dir__() -> list[str]:
    """Return the public names, including names not yet imported."""
    return sorted(__all__)
