"""Number of prompts per request that a strategy needs; docs/ranking-methods.md has the formulas."""

from __future__ import annotations

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
    n, orders, depth = candidates, section.permutations, section.depth
    match strategy:
        case "label":
            return PromptCount(orders, n)
        case "permutation":
            return PromptCount(orders * min(depth, n - 1), n, "ranking")
        case "window":
            windows = sum(1 for _ in window_bounds(n, section.window, section.window_step))
            return PromptCount(orders * windows, min(n, section.window))
        case "pairwise" if n <= section.all_pairs:
            return PromptCount(n * (n - 1), min(n, 2))
        case "pairwise":
            return PromptCount(2 * sum(n - 1 - front for front in range(min(depth, n - 1))), min(n, 2))
        case "setwise":
            return PromptCount(orders * _setwise_questions(n, section), min(n, section.set_size))
        case "pointwise-yes":
            return PromptCount(n, 1, "yes")
    return None


def _setwise_questions(n: int, section: EvalSection) -> int:
    children = section.set_size - 1
    built = sum(_heap_levels_below(node, n, children) for node in range(-(-(n - 1) // children)))
    count = sum(_heap_levels_below(0, n - position, children) for position in range(1, min(section.depth, n)))
    return built + count


def _heap_levels_below(node: int, size: int, children: int) -> int:
    """Return the number of heap levels below a node."""
    levels = 0
    while (node := node * children + 1) < size:
        levels += 1
    return levels
