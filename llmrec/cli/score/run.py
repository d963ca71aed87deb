"""`llmrec score` and `llmrec.score`: ranked lists of any system against what is relevant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llmrec.data.lists import Entities, read_lists, read_truth
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.evaluate.scoring import Judging, ScoredLists, Scores, score_lists
from llmrec.recipe.schema import EvalSection
from llmrec.results import Pair

_EVAL = EvalSection()
_UNITS = {"user": "users", "request": "requests"}
_ORDERS = {
    "rank": "there is no score, so the column of ranks orders the lists",
    "order": "there is neither a score nor a rank, so the order of the rows is that of the lists",
}


def score(
    ranked: Any,
    truth: Any,
    *,
    against: Any = None,
    k: Sequence[int] = _EVAL.cutoffs,
    graded: bool = False,
    planned: str | None = None,
    resamples: int = _EVAL.bootstrap,
    seed: int = 0,
    user: str | None = None,
    item: str | None = None,
) -> Scores:
    """Measure ranked lists of any system, with a 95 % interval for every metric.

    Args:
        ranked: A path or a frame: llmrec's own lists, a row a ranked item, or a TREC run; see docs/score.md.
        truth: A path or a frame: what is relevant, one row per item, or TREC qrels.
        against: Other lists over the same truth, whose figures are taken from those of ``ranked``, paired by user.
        k: Ranks at which metrics are cut.
        graded: NDCG takes the truth's relevance for its gain; else every relevant item has a gain of 1.
        planned: The metric that two lists were to be compared on; it is tested, and the others are described.
        resamples: Of the bootstrap over users.
        seed: Of the resamples.
        user: Column of the user, in every file that has it; by default what is called like one, as ``userId``.
        item: Column of the item, in the same way.

    Returns:
        Figures in [0, 1], by metric, with what was counted.

    Raises:
        DataError: If a file or frame cannot be read; it names the file and the row.
        RecipeError: If a cut-off is less than 1, or the planned metric is none of those that are taken.
    """
    if not k or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in k):
        raise RecipeError("k: give ranks of at least 1, such as 5,10", kind="bad-value", column="--k")
    how = Judging(tuple(dict.fromkeys(k)), resamples, seed, graded, planned)
    if planned is not None and (against is None or planned not in how.names):
        what = "it is tested on two lists; give another" if against is None else f"choose from {', '.join(how.names)}"
        raise RecipeError(
            f"planned: {planned!r} cannot be tested{did_you_mean(planned, how.names) if against is not None else ''}; "
            f"{what}",
            kind="contradiction" if against is None else "unknown-name",
            column="--planned",
        )
    asked = Entities(user, item)
    relevant = read_truth(truth, asked)
    lists = [read_lists(each, relevant.unit, asked) for each in (ranked, against) if each is not None]
    known = [*relevant.columns, *(name for each in lists for name in each.columns)]
    for option, column in (("--user", user), ("--item", item)):
        if column is not None and column not in known:
            raise DataError(
                f"{option} {column}: no file has this column{did_you_mean(column, known)}; their columns are: "
                f"{', '.join(dict.fromkeys(known))}",
                kind="missing-column",
                column=option,
            )
    return score_lists(lists, relevant, how)


def cutoffs(text: str) -> tuple[int, ...]:
    """Read ``5,10``.

    Raises:
        RecipeError: If a part is no whole number.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise RecipeError(f"--k {text}: give whole numbers, such as 5,10", kind="bad-value", column="--k") from None


def lines(found: Scores) -> Iterator[str]:
    """Yield what the console says: what was counted, and a line a metric."""
    units = _UNITS[found.unit]
    yield f"{found.relevant:,} relevant items of {found.lists[0].judged:,} {units} in {found.truth}"
    if found.barren:
        yield f"  {found.barren:,} {units} of the truth have nothing relevant and are left out"
    for each in found.lists:
        yield from _counted(each, units)
    wide = max(map(len, found.metrics))
    names = ("A", "B") if len(found.lists) > 1 else ("value",)
    head = f"{'metric':<{wide}}" + "".join(f"  {name:<23}" for name in names)
    yield (head + ("  A - B" if found.comparisons else "")).rstrip()
    for metric in found.metrics:
        cells = [
            _cell(each.metrics[metric].value, each.metrics[metric].low, each.metrics[metric].high)
            for each in found.lists
        ]
        if (pair := found.comparisons.get(metric)) is not None:
            cells.append(_difference(pair))
        yield f"{metric:<{wide}}" + "".join(f"  {cell:<23}" for cell in cells).rstrip()


def _counted(each: ScoredLists, units: str) -> Iterator[str]:
    yield each.name
    yield f"  without a list, counted as 0: {each.without_list:,} of {each.judged:,} {units}"
    yield f"  ranked without truth, left out: {each.without_truth:,} {units}"
    if each.short:
        yield f"  lists shorter than the largest cut-off: {each.short:,}"
    yield f"  relevant items in ties, expected over their orders: {100 * each.tied:.1f} % of {units}"
    if each.order in _ORDERS:
        yield f"  {_ORDERS[each.order]}"


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"


def _difference(pair: Pair) -> str:
    told = f"{pair.value:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]"
    return told if pair.verdict is None else f"{told}  p {pair.p:.3g}, {pair.verdict}"
