"""The command `llmrec score`: computes metrics of ranked lists of any system."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import say, store_facts
from llmrec.errors import RecipeError
from llmrec.evaluate.scoring import ScoredLists, Scores, score
from llmrec.recipe.shared import CUTOFFS, RESAMPLES
from llmrec.results import Pair

_UNITS = {"user": "users", "request": "requests"}
_ORDERS = {
    "rank": "there is no score column, so lists are ordered by rank",
    "order": "there is neither a score nor a rank column, so lists are in row order",
}


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options of `llmrec score`."""

    ranked: Annotated[
        tuple[Path, ...],
        OptionHelp(
            argument=True,
            metavar="RANKED [OTHER]",
            help="File of ranked lists. A second file is compared with the first file.",
        ),
    ] = ()
    truth: Annotated[
        Path, OptionHelp(help="Relevant items: a table with a user and an item in each row, or TREC qrels.")
    ]
    user: Annotated[str | None, OptionHelp(metavar="COLUMN", help="Name of the user column. Default: detected.")] = None
    item: Annotated[str | None, OptionHelp(metavar="COLUMN", help="Name of the item column. Default: detected.")] = None
    k: Annotated[str, OptionHelp(metavar="K,K", help="Comma-separated cut-offs of the metrics.")] = ",".join(
        map(str, CUTOFFS)
    )
    graded: Annotated[
        bool, OptionHelp(help="Compute NDCG with graded relevance and linear gain, as trec_eval does.")
    ] = False
    planned: Annotated[
        str | None,
        OptionHelp(metavar="METRIC", help="With two files: metric for the comparison with a significance test."),
    ] = None
    resamples: Annotated[int, OptionHelp(least=1, help="Number of bootstrap resamples over users.")] = RESAMPLES
    seed: Annotated[int, OptionHelp(help="Random seed of the bootstrap.")] = 0


def score_files(options: ScoreOptions) -> None:
    """Compute ranking metrics for lists of any system.

    Computes every ranking metric with a 95 % confidence interval. Lists are the output of llmrec rank, a table with one
    row per ranked item, or a TREC run. A second file is compared with the first, by user.

    Example:
        llmrec score lists.csv --truth held_out.csv --k 10,20
    """
    if len(options.ranked) not in (1, 2):
        raise RecipeError(
            f"{len(options.ranked)} files of ranked lists were given; give one or two",
            kind="missing-key",
            column="RANKED",
        )
    scores = score(
        options.ranked[0],
        options.truth,
        against=options.ranked[1] if len(options.ranked) > 1 else None,
        k=parse_cutoffs(options.k),
        graded=options.graded,
        planned=options.planned,
        resamples=options.resamples,
        seed=options.seed,
        user=options.user,
        item=options.item,
    )
    store_facts(**scores.as_json())
    for line in score_lines(scores):
        say(line)


def parse_cutoffs(text: str) -> tuple[int, ...]:
    """Parse cutoffs such as ``5,10``.

    Raises:
        RecipeError: If an element is not an integer.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise RecipeError(f"--k {text}: give whole numbers, such as 5,10", kind="bad-value", column="--k") from None


def score_lines(scores: Scores) -> Iterator[str]:
    """Yield the lines to print: the counts, then one line per metric."""
    units = _UNITS[scores.unit]
    yield f"{scores.relevant:,} relevant items of {scores.lists[0].judged:,} {units} in {scores.truth}"
    if scores.barren:
        yield f"  {scores.barren:,} {units} have no relevant item and are excluded"
    for entry in scores.lists:
        yield from _list_count_lines(entry, units)
    wide = max(map(len, scores.metrics))
    names = ("A", "B") if len(scores.lists) > 1 else ("value",)
    head = f"{'metric':<{wide}}" + "".join(f"  {name:<23}" for name in names)
    yield (head + ("  A - B" if scores.comparisons else "")).rstrip()
    for metric in scores.metrics:
        figures = [entry.metrics[metric] for entry in scores.lists]
        cells = [f"{figure.value:.4f} [{figure.low:.4f}, {figure.high:.4f}]" for figure in figures]
        if (pair := scores.comparisons.get(metric)) is not None:
            cells.append(_format_difference(pair))
        yield f"{metric:<{wide}}" + "".join(f"  {cell:<23}" for cell in cells).rstrip()


def _list_count_lines(entry: ScoredLists, units: str) -> Iterator[str]:
    yield entry.name
    yield f"  without a list, scored as 0: {entry.without_list:,} of {entry.judged:,} {units}"
    yield f"  with a list but no relevant items, excluded: {entry.without_truth:,} {units}"
    if entry.short:
        yield f"  lists shorter than the largest cut-off: {entry.short:,}"
    yield f"  relevant items tied with others, averaged over their orders: {100 * entry.tied:.1f} % of {units}"
    if entry.order in _ORDERS:
        yield f"  {_ORDERS[entry.order]}"


def _format_difference(pair: Pair) -> str:
    message = f"{pair.value:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]"
    return message if pair.verdict is None else f"{message}  p {pair.p:.3g}, {pair.verdict}"
