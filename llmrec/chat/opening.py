"""Opens dialogue managers by name: rules and baselines, which need no model, and language models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from llmrec.answer.checks import with_resolved_engine
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.options import RecommenderOptions
from llmrec.chat.fit import FitJudge
from llmrec.chat.managers import HistoryManager, Manager, ModelManager, RandomManager, RuleManager
from llmrec.chat.tuning import manager_weights
from llmrec.recipe.shared import DTYPE
from llmrec.types import Backend

MANAGERS: Mapping[str, Callable[[int, int], Manager]] = {
    "rules": lambda k, seed: RuleManager(k=k),
    "history": lambda k, seed: HistoryManager(k=k),
    "random": lambda k, seed: RandomManager(seed),
}
"""Managers that need no model, as functions of the list length and a seed."""
BASELINE_MANAGERS = frozenset({"history", "random"})
"""Managers that ignore messages; they are baselines."""


@contextmanager
def open_manager_factory(name: str, *, k: int, dtype: str = DTYPE) -> Iterator[Callable[[int], Manager]]:
    """Yield a function that returns a manager for a seed.

    The name is one of `MANAGERS`, or a language model: a folder, a run of ``--tune`` or a name. ``k`` is the number of
    items of a list.

    Raises:
        LlmrecError: If the model cannot be opened.
    """
    if name in MANAGERS:
        yield lambda seed: MANAGERS[name](k, seed)
        return
    weights, learned = manager_weights(name)
    with _open_backend(weights, dtype, "search") as backend:
        yield lambda seed: ModelManager(backend, tuned=learned)


@contextmanager
def open_grader(name: str | None, *, dtype: str = DTYPE) -> Iterator[FitJudge | None]:
    """Yield the language model that grades items; None if no name is given."""
    if name is None:
        yield None
        return
    with _open_backend(name, dtype, "likelihood") as backend:
        yield FitJudge(backend)


@contextmanager
def _open_backend(name: str, dtype: str, strategy: str) -> Iterator[Backend]:
    options = RecommenderOptions(model=name, backend="hf", dtype=dtype)
    with LanguageModel.open(with_resolved_engine(options), ranks=False) as model, model.backend(strategy) as backend:
        yield backend
