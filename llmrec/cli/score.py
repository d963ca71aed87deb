"""The command `llmrec score`, and `llmrec.score`: metrics of ranked lists of any system."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from llmrec.answer.options import About
from llmrec.cli.console import say, store_facts
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


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """One or two files of ranked lists, and what is relevant."""

    ranked: Annotated[
        tuple[Path, ...],
        About(
            argument=True,
            metavar="RANKED [OTHER]",
            help="File of ranked lists; a second file is compared with the first.",
        ),
    ] = ()
    truth: Annotated[Path, About(help="Relevant items: a table with a user and an item in each row, or TREC qrels.")]
    user: Annotated[str | None, About(metavar="COLUMN", help="Name of the user column. Default: detected.")] = None
    item: Annotated[str | None, About(metavar="COLUMN", help="Name of the item column. Default: detected.")] = None
    k: Annotated[str, About(metavar="K,K", help="Comma-separated cut-offs of the metrics.")] = ",".join(
        map(str, _EVAL.cutoffs)
    )
    graded: Annotated[bool, About(help="Compute NDCG with graded relevance and linear gain, as trec_eval does.")] = (
        False
    )
    planned: Annotated[
        str | None,
        About(
            metavar="METRIC", help="With two files: metric of the planned comparison, which gets a significance test."
        ),
    ] = None
    resamples: Annotated[int, About(least=1, help="Number of bootstrap resamples over users.")] = _EVAL.bootstrap
    seed: Annotated[int, About(help="Random seed of the bootstrap.")] = 0


def score_files(options: ScoreOptions) -> None:
    """Compute ranking metrics for lists of any system.

    Computes every ranking metric with a 95 % confidence interval. Lists are the output of llmrec rank, a table with one
    row per ranked item, or a TREC run. A second file is compared with the first, by user.

    Example:
        llmrec score lists.csv --truth held_out.csv --k 10,20
    """
    if len(options.ranked) not in (1, 2):
        raise RecipeError(
            f"{len(options.ranked)} files of ranked lists; give one, or two to compare",
            kind="missing-key",
            column="RANKED",
        )
    scores = score(
        options.ranked[0],
        options.truth,
        against=options.ranked[1] if len(options.ranked) > 1 else None,
        k=cutoffs(options.k),
        graded=options.graded,
        planned=options.planned,
        resamples=options.resamples,
        seed=options.seed,
        user=options.user,
        item=options.item,
    )
    store_facts(**scores.as_json())
    for line in lines(scores):
        say(line)


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
        ranked: A path or a frame: lists of llmrec, a table with one row per ranked item, or a TREC run; see
            docs/benchmark.md.
        truth: A path or a frame: the relevant items, one row per item, or TREC qrels.
        against: Other lists for the same truth, whose figures are subtracted from those of ``ranked``, paired by user.
        k: Cutoffs of the metrics.
        graded: Whether NDCG uses the relevance in the truth as gain; otherwise every relevant item has a gain of 1.
        planned: The metric of the planned comparison of two lists; it is tested, the others are only described.
        resamples: Number of bootstrap resamples over users.
        seed: Seed of the resamples.
        user: Column of the user, in every file that has it; by default one with a typical name, such as ``userId``.
        item: Column of the item, likewise.

    Returns:
        Figures in [0, 1] by metric, with counts of users and items.

    Raises:
        DataError: If a file or frame cannot be read; it names the file and the row.
        RecipeError: If a cutoff is less than 1, or the planned metric is not computed.
    """
    if not k or any(isinstance(entry, bool) or not isinstance(entry, int) or entry < 1 for entry in k):
        raise RecipeError("k: give cut-offs of at least 1, such as 5,10", kind="bad-value", column="--k")
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
    lists = [read_lists(entry, relevant.unit, asked) for entry in (ranked, against) if entry is not None]
    known = [*relevant.columns, *(name for entry in lists for name in entry.columns)]
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
    """Parse cutoffs such as ``5,10``.

    Raises:
        RecipeError: If an element is not an integer.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise RecipeError(f"--k {text}: give whole numbers, such as 5,10", kind="bad-value", column="--k") from None


def lines(scores: Scores) -> Iterator[str]:
    """Yield the output lines: the counts, then one line per metric."""
    units = _UNITS[scores.unit]
    yield f"{scores.relevant:,} relevant items of {scores.lists[0].judged:,} {units} in {scores.truth}"
    if scores.barren:
        yield f"  {scores.barren:,} {units} of the truth have nothing relevant and are left out"
    for entry in scores.lists:
        yield from _counted(entry, units)
    wide = max(map(len, scores.metrics))
    names = ("A", "B") if len(scores.lists) > 1 else ("value",)
    head = f"{'metric':<{wide}}" + "".join(f"  {name:<23}" for name in names)
    yield (head + ("  A - B" if scores.comparisons else "")).rstrip()
    for metric in scores.metrics:
        cells = [
            _cell(entry.metrics[metric].value, entry.metrics[metric].low, entry.metrics[metric].high)
            for entry in scores.lists
        ]
        if (pair := scores.comparisons.get(metric)) is not None:
            cells.append(_difference(pair))
        yield f"{metric:<{wide}}" + "".join(f"  {cell:<23}" for cell in cells).rstrip()


def _counted(entry: ScoredLists, units: str) -> Iterator[str]:
    yield entry.name
    yield f"  without a list, counted as 0: {entry.without_list:,} of {entry.judged:,} {units}"
    yield f"  ranked without truth, left out: {entry.without_truth:,} {units}"
    if entry.short:
        yield f"  lists shorter than the largest cut-off: {entry.short:,}"
    yield f"  relevant items in ties, expected over their orders: {100 * entry.tied:.1f} % of {units}"
    if entry.order in _ORDERS:
        yield f"  {_ORDERS[entry.order]}"


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"


def _difference(pair: Pair) -> str:
    message = f"{pair.value:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]"
    return message if pair.verdict is None else f"{message}  p {pair.p:.3g}, {pair.verdict}"
