"""Requests and scripted backends for the tests of ranking strategies."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llmrec.backends.fake import FakeBackend
from llmrec.recipe.schema import EvalSection
from llmrec.registry import STRATEGIES, import_component, strategy_eval_options
from llmrec.strategies.asking import Prompting
from llmrec.types import Case, Event, Prompt, Request, Scores
from tests.tasks.task_data import make_dataset, make_split, make_task

DIRECT = ("label", "list", "permutation", "window", "pairwise", "setwise", "pointwise-yes")
SCORED = tuple(name for name in DIRECT if name != "list")
TITLED = ("likelihood", "likelihood-prior")
_LINE = re.compile(r"^([A-Z]|\d\d)\. (.*)$", re.MULTILINE)


@cache
def data() -> Any:
    return make_split(make_dataset(hostile=False))


@cache
def task(family: str) -> Any:
    return make_task(family, data())


def title(item: str) -> str:
    return f"Film #{item[1:]}!"


def cases(count: int, size: int = 20, seed: int = 0) -> list[Case]:
    """Requests of unknown users, with the true item at a random position."""
    rng = random.Random(seed)
    results = []
    for number in range(count):
        items = rng.sample(range(60), size + 3)
        pool = tuple(f"i{item:02d}" for item in items[3:])
        past = tuple(Event(item_id=f"i{item:02d}", rating=4.0) for item in items[:3])
        request = Request(id=f"r{number}", user_id=f"s{number}", history=past, candidates=pool)
        results.append(Case(request=request, truth=rng.choice(pool)))
    return results


def strategy(name: str, backend: Any, *, batch: int = 16, shots: int = 0, **options: Any) -> Any:
    """Build a strategy as evaluation does, with the recipe's defaults."""
    family = "sequential" if name in TITLED else "direct"
    template = "continue-list" if family == "sequential" else "after-history"
    asker = Prompting(backend=backend, task=task(family), template=template, batch=batch, shots=shots)
    chosen = strategy_eval_options(name, EvalSection())
    return import_component(STRATEGIES, name, "strategy")(asker, **chosen | options)


def listed(text: str) -> dict[str, str]:
    """Return label -> title of the last list in a prompt."""
    return dict(_LINE.findall(text.rpartition("Candidates:")[2]))


def pick_first() -> FakeBackend:
    """Prefers the first label, whatever it stands for, and answers yes to every yes/no question."""

    def prefer(text: str, candidate: str) -> float:
        word = candidate.strip()
        if word.lower() in ("yes", "no"):
            return -1.0 if word.lower() == "yes" else -3.0
        return -2.0 * sorted(listed(text)).index(word) - 0.1

    return FakeBackend(prefer=prefer, complete=lambda text: ", ".join(sorted(listed(text))))


def knowing(worth: Callable[[str], float]) -> FakeBackend:
    """Prefers labels, yes or titles by the worth of their items."""

    def prefer(text: str, candidate: str) -> float:
        word, shown = candidate.strip(), listed(text)
        if word.lower() in ("yes", "no"):
            return (1 if word.lower() == "yes" else -1) * worth(next(iter(shown.values())))
        return worth(shown.get(word, word))

    def complete(text: str) -> str:
        shown = listed(text)
        return ", ".join(sorted(shown, key=lambda label: -worth(shown[label])))

    return FakeBackend(prefer=prefer, complete=complete)


class Counting(FakeBackend):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.read = self.scored = 0

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        results = super().score(prompts, candidates, closed=closed)
        self.calls.append(len(prompts))
        self.read += sum(scores.prompt_tokens for scores in results)
        self.scored += sum(sum(scores.tokens) for scores in results)
        return results
