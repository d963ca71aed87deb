"""Implements `llmrec compare` and `llmrec.compare`: compares two runs or two recommenders, paired by user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from llmrec.answer.loaded import Loaded
from llmrec.answer.rank.outputs import check_output_file, write_summary
from llmrec.data.ranked import write_records
from llmrec.display import Displayed, Summary
from llmrec.errors import DataError
from llmrec.evaluate.compare import Contrast, ModelValues, compare_exploratory
from llmrec.evaluate.scoring import Scores
from llmrec.metrics.signature import parse_signature
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.runs import read_finished_results, read_stored_row
from llmrec.recipe.shared import RESAMPLES
from llmrec.records import Record
from llmrec.registry import is_lower_better
from llmrec.report.summary import headline
from llmrec.report.wording import difference, format_number, join_words, title
from llmrec.results import ComparedMetric, Pair, Results, Row

if TYPE_CHECKING:
    from rich.table import Table

INTERVAL_NOTE = "95 % intervals of A − B, paired by user and not corrected for the number of comparisons"


class RunPair(Pair, ComparedMetric):
    """The difference between a model of run A and one of run B in a metric; ``a`` and ``b`` are row ids.

    Attributes:
        a_value: The figure of the row of A.
        b_value: The figure of the row of B.
        users: Number of users.
        best: Whether these are the main rows of the two runs: the best row of the model alone, or without a language
            model the best one.
    """

    a_value: float
    b_value: float
    users: int
    best: bool


class ComparedRuns(Displayed, Record):
    """The result of `llmrec.compare`.

    Attributes:
        a: The folder of run A.
        b: The folder of run B.
        headline: The headline metric of each task that both runs have.
        differences: For each task the best rows of both runs, then each common row, on every common metric.
        only_a: Ids of the rows of these tasks that only A has.
        only_b: Ids of those that only B has.
    """

    a: str
    b: str
    headline: dict[str, str]
    differences: tuple[RunPair, ...]
    only_a: tuple[str, ...] = Field(())
    only_b: tuple[str, ...] = Field(())

    def _summary(self) -> Summary:
        rows = [
            (title(pair.task), *_pair_cells(pair))
            for task, metric in self.headline.items()
            for pair in self.differences
            if (pair.task, pair.metric) == (task, metric)
        ]
        facts = {"A": self.a, "B": self.b, **{title(task): metric for task, metric in self.headline.items()}}
        return Summary("Two runs compared", facts, ("task", "model", "A", "B", "A − B [95 %]"), rows)


def compare(
    a: Any, b: Any, test: Any = None, *, resamples: int = RESAMPLES, seed: int = 0, **options: Any
) -> Scores | ComparedRuns:
    """Compare two recommenders on test interactions, or two finished runs: A − B, paired by user.

    Args:
        a: A recommender of `llmrec.fit` or `llmrec.load`; without ``test``, a run folder or the result of `llmrec.run`.
        b: Another one.
        test: Test interactions; see `Loaded.evaluate`. The planned comparison, on NDCG at the largest cutoff, has a p.
        resamples: Number of resamples of the users, for the intervals.
        seed: Seed of the resamples.
        options: Further options of `Loaded.evaluate`, such as ``k=(10,)``.

    Raises:
        LlmrecError: If the test interactions cannot be read, or as `compare_runs`.
    """
    opened = [isinstance(one, Loaded) for one in (a, b)]
    if test is None and not any(opened):
        return compare_runs(a, b, resamples=resamples, seed=seed)
    if test is None or not all(opened):
        wrong = "recommenders are compared on test interactions" if any(opened) else "runs already have test users"
        raise DataError(
            f"test: {wrong}; pass two recommenders and test, or two runs", kind="contradiction", column="test"
        )
    scores: Scores = a.evaluate(test, against=b, resamples=resamples, seed=seed, **options)
    return scores


def compare_runs(a: Any, b: Any, *, resamples: int = RESAMPLES, seed: int = 0) -> ComparedRuns:
    """Compare two finished runs on the same users, items, candidates and split: A − B, paired by user.

    No model is run and no data are read: the values of every request are in the run folders. The comparisons are not
    planned, so each has an unadjusted 95 % interval and no verdict.

    Args:
        a: A run folder, or the result of `llmrec.run`.
        b: Another run.
        resamples: Number of resamples of the users, for the intervals.
        seed: Seed of the resamples.

    Returns:
        The differences by task, row and metric.

    Raises:
        DataError: If a run is not finished, they have no task in common, or a task was measured on another split, on
            other users or candidates, or under another protocol.
    """
    runs = tuple(Path(getattr(run, "folder", run)).expanduser() for run in (a, b))
    one, other = (read_finished_results(run) for run in runs)
    tasks = [task for task in one.tasks if task in other.tasks]
    if not tasks:
        raise DataError(
            f"{runs[0]} has {join_words(one.tasks)} and {runs[1]} has {join_words(other.tasks)}, so the runs have no "
            "task in common",
            kind="mismatch",
            at=runs[1],
            column="tasks",
        )
    matches: list[RunPair] = []
    for task in tasks:
        _check_same_data(task, runs, (one, other))
        for first, second, best in _model_pairs(task, one, other):
            rows = read_stored_row(runs[0], first), read_stored_row(runs[1], second)
            _check_same_cases(runs, rows)
            matches += _metric_differences(one.headline[task], rows, best=best, resamples=resamples, seed=seed)
    ids = [{row.id for row in results.rows if row.task in tasks} for results in (one, other)]
    return ComparedRuns(
        a=str(runs[0]),
        b=str(runs[1]),
        headline={task: one.headline[task] for task in tasks},
        differences=tuple(matches),
        only_a=tuple(sorted(ids[0] - ids[1])),
        only_b=tuple(sorted(ids[1] - ids[0])),
    )


def _model_pairs(task: str, one: Results, other: Results) -> Iterator[tuple[Row, Row, bool]]:
    """Yield the best models of both runs as a pair, and then pairs of the same model."""
    best, rival = (headline(results, task).model or results.standings(task)[0] for results in (one, other))
    yield best, rival, True
    known = {row.id: row for row in other.rows if row.task == task}
    for row in one.standings(task):
        if row.id in known and (row.id, row.id) != (best.id, rival.id):
            yield row, known[row.id], False


def _metric_differences(
    first: str, rows: tuple[ResultRow, ResultRow], *, best: bool, resamples: int, seed: int
) -> Iterator[RunPair]:
    one, other = rows
    users = [record.user_id for record in one.records]
    # the main metric first
    for name in sorted(set(one.values) & set(other.values), key=lambda name: (name != first, name)):
        a, b = (ModelValues(row.figures.id, _metric_value(row, name), np.asarray(row.values[name])) for row in rows)
        if a.value is None or b.value is None:
            continue
        (pair,) = compare_exploratory([Contrast(name, a, b, users)], resamples=resamples, seed=seed)
        yield RunPair(
            task=one.figures.task,
            metric=name,
            **pair.as_json(),
            a_value=a.value,
            b_value=b.value,
            users=len(set(users)),
            best=best,
        )


def _metric_value(row: ResultRow, metric: str) -> float | None:
    return row.figures.metrics[metric].value if metric in row.figures.metrics else None


# --------------------------------------------------------------------------- checking that cases are equal


def _check_same_data(task: str, runs: Sequence[Path], results: tuple[Results, Results]) -> None:
    data = [entry.data_of(task) for entry in results]
    if data[0] is None or data[1] is None or data[0].split_fingerprint != data[1].split_fingerprint:
        raise _mismatch_error(
            runs, task, "on other data or another split", "run both with the same data, data.split and seed", "data"
        )


def _check_same_cases(runs: Sequence[Path], rows: tuple[ResultRow, ResultRow]) -> None:
    one, other = rows
    task = one.figures.task
    if [record.request_id for record in one.records] != [record.request_id for record in other.records]:
        users = [len({record.user_id for record in row.records}) for row in rows]
        raise _mismatch_error(
            runs, task, f"on other users ({users[0]:,} and {users[1]:,})", "run both with the same eval.users and seed",
            "eval.users",
        )  # fmt: skip
    if one.figures.candidates != other.figures.candidates:
        raise _mismatch_error(
            runs, task, "on other candidates", "run both with the same eval.candidates and seed", "eval.candidates"
        )
    for name in set(one.figures.metrics) & set(other.figures.metrics):
        signed = [_signature_without_version(row.figures.metrics[name].signature) for row in rows]
        if signed[0] != signed[1]:
            raise _mismatch_error(
                runs, task, f"under another protocol ({signed[0]}, and {signed[1]})", "run both with the same eval",
                "eval",
            )  # fmt: skip


def _signature_without_version(signature: str) -> str:
    """Return a metric signature without the version of llmrec."""
    try:
        version = parse_signature(signature).version
    except ValueError:
        return signature
    return signature.removesuffix(f"|llmrec:{version}")


def _mismatch_error(runs: Sequence[Path], task: str, what: str, fix: str, column: str) -> DataError:
    return DataError(
        f"{runs[1]} measured {title(task)} {what} than {runs[0]}, so the runs cannot be compared; {fix}",
        kind="mismatch",
        at=runs[1],
        column=column,
    )


# --------------------------------------------------------------------------- output


def comparison_tables(compared: ComparedRuns) -> Iterator[Table]:
    """Yield a table per task: the main metric for the best models and for all models in both runs."""
    from rich.text import Text

    from llmrec.report.table import console_table, plain_text

    for task, metric in compared.headline.items():
        pairs = [pair for pair in compared.differences if (pair.task, pair.metric) == (task, metric)]
        same = [pair for pair in pairs if not pair.best and pair.low == pair.high == 0]
        notes = (
            [f"{len(same)} models are the same in both: {join_words([_name_without_task(pair.a) for pair in same])}."]
            if same
            else []
        )
        users = f", {pairs[0].users:,} users" if pairs else ""
        turned = " (lower is better)" if is_lower_better(metric) else ""
        table = console_table(f"{title(task)}: {metric}{turned}{users}", notes)
        table.add_column("Model", overflow="fold")
        for head in ("A", "B", "A − B"):
            table.add_column(head, justify="right", no_wrap=True)
        for pair in pairs:
            if pair in same:
                continue
            name, *cells = _pair_cells(pair)
            table.add_row(plain_text(name, "bold" if pair.best else ""), *map(Text, cells))
        yield table


def _pair_cells(pair: RunPair) -> tuple[str, str, str, str]:
    name = (
        _name_without_task(pair.a)
        if pair.a == pair.b
        else f"A: {_name_without_task(pair.a)}; B: {_name_without_task(pair.b)}"
    )
    return name, format_number(pair.a_value), format_number(pair.b_value), difference(pair.value, pair.low, pair.high)


def _name_without_task(row_id: str) -> str:
    """Return the id of a model without its task."""
    return row_id.partition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferenceLine:
    """A row in the file of differences."""

    task: str
    metric: str
    best: bool
    row_a: str
    row_b: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    users: int


def write_differences(compared: ComparedRuns, path: Path) -> None:
    """Write all differences as rows of a table file.

    Raises:
        DataError: If the file extension is unknown, or the existing file is not one of `llmrec compare`.
    """
    check_output_file(path, (), option="--to", by="compare")
    lines = [
        DifferenceLine(
            task=pair.task,
            metric=pair.metric,
            best=pair.best,
            row_a=pair.a,
            row_b=pair.b,
            a=pair.a_value,
            b=pair.b_value,
            difference=pair.value,
            low=pair.low,
            high=pair.high,
            users=pair.users,
        )
        for pair in compared.differences
    ]
    write_records(path, lines, DifferenceLine)
    write_summary(path, {"a": compared.a, "b": compared.b})
