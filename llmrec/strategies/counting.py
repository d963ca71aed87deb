"""Number of prompts per request that a strategy needs; docs/ranking-methods.md has the formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmrec.recipe.schema import EvalSection
from llmrec.strategies.rounds import window_bounds
from llmrec.tasks.task import Want


@dataclass(frozen=True, slots=True)
class PromptCount:
    """The number of prompts for one request.

    Attributes:
        prompts: The number of questions; for `setwise` the maximum.
        size: Candidates in the largest question.
        want: The answer that the prompts request.
    """

    prompts: int
    size: int
    want: Want = "one"


def count_prompts(strategy: str, candidates: int, section: EvalSection) -> PromptCount | None:
    """Return the number of scored prompts for one request.

    Args:
        strategy: Name of a strategy of the direct family.
        candidates: Number of candidates of the request.
        section: The recipe's eval section.

    Returns:
        The count; None for strategies that score no labels or that ask a single question in a different form.
    """
    result = _COUNTS.get(strategy)
    return result(candidates, section) if result is not None else None


def _label(n: int, section: EvalSection) -> PromptCount:
    return PromptCount(section.permutations, n)


def _permutation(n: int, section: EvalSection) -> PromptCount:
    return PromptCount(section.permutations * min(section.depth, n - 1), n, "ranking")


def _window(n: int, section: EvalSection) -> PromptCount:
    windows = sum(1 for _ in window_bounds(n, section.window, section.window_step))
    return PromptCount(section.permutations * windows, min(n, section.window))


def _pairwise(n: int, section: EvalSection) -> PromptCount:
    if n <= section.all_pairs:
        return PromptCount(n * (n - 1), min(n, 2))
    return PromptCount(2 * sum(n - 1 - front for front in range(min(section.depth, n - 1))), min(n, 2))


def _setwise(n: int, section: EvalSection) -> PromptCount:
    children = section.set_size - 1
    built = sum(_heap_levels_below(node, n, children) for node in range(-(-(n - 1) // children)))
    count = sum(_heap_levels_below(0, n - position, children) for position in range(1, min(section.depth, n)))
    return PromptCount(section.permutations * (built + count), min(n, section.set_size))


def _heap_levels_below(node: int, size: int, children: int) -> int:
    """Return the number of heap levels below a node."""
    levels = 0
    while (node := node * children + 1) < size:
        levels += 1
    return levels


def _yes(n: int, section: EvalSection) -> PromptCount:
    return PromptCount(n, 1, "yes")


_COUNTS: Mapping[str, Callable[[int, EvalSection], PromptCount]] = {
    "label": _label,
    "permutation": _permutation,
    "window": _window,
    "pairwise": _pairwise,
    "setwise": _setwise,
    "pointwise-yes": _yes,
}
