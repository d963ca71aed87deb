"""What a run left behind: results.json as frozen records, predictions.parquet as failure counts.

Everything in these two files is untrusted text or a number. Reading checks the shape, and `check` refuses what
must never stand in one table: rows of different protocols, and a task without a baseline.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from llmrec.errors import DataError, LlmrecError

Arm = Literal["zero-shot", "few-shot", "tuned", "baseline"]
Verdict = Literal["shown", "not shown", "contradicted"]

# Signature fields that may differ between the metrics of one row.
_OF_A_METRIC = frozenset({"gain", "ties", "text"})
AUDIT = "audit.json"
LOWER_IS_BETTER = frozenset({"RMSE", "MAE"})


def _finite(value: object) -> object:
    """Turn NaN and the infinities, which JSON cannot hold, into None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Record(BaseModel):
    """Frozen base; keys that the report does not show are ignored, so that results may grow."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Metric(Record):
    """One number with its 95 % interval and the protocol it was measured under."""

    value: Number
    low: Number = None
    high: Number = None
    signature: str


class Cost(Record):
    """Work of one row: wall-clock seconds and tokens."""

    seconds: Number = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens read and written a second; None for a predictor that uses no tokens."""
        tokens = self.prompt_tokens + self.completion_tokens
        return tokens / self.seconds if tokens and self.seconds else None


class Failure(Record):
    """One answer that could not be read."""

    request_id: str
    reason: str
    raw: str | None = None


class Row(Record):
    """One predictor on one task."""

    id: str
    task: str
    arm: Arm
    predictor: str
    template: str | None = None
    template_use: str | None = None
    shots: int = 0
    engine: str
    n: int
    parse_rate: Number = None
    tie_rate: Number = None
    metrics: dict[str, Metric]
    cost: Cost = Cost()
    inputs: str = ""
    failures: tuple[Failure, ...] = ()


class Comparison(Record):
    """A paired difference a - b on one metric."""

    task: str
    metric: str
    a: str
    b: str
    value: Number
    low: Number
    high: Number
    p: Number
    verdict: Verdict


class LogLine(Record):
    """One logged optimiser step; losses are nats a target token."""

    step: int
    loss: Number = None
    learning_rate: Number = None
    tokens_per_second: Number = None
    valid_loss: dict[str, Number] | None = None


class Training(Record):
    """What was tuned, and how it went."""

    method: str
    steps: int
    tokens: int
    target_tokens: int
    seconds: Number
    tokens_per_second: Number
    rows: dict[str, int] = {}
    log: tuple[LogLine, ...] = ()
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    adapter_sha256: str | None = None


class DataInfo(Record):
    """One data set as it was used."""

    name: str
    users: int
    items: int
    interactions: int
    density: Number = None
    train: int
    valid: int
    test: int
    fingerprint: str
    split_fingerprint: str
    split: str
    noun: str = "items"
    made: bool = False


class Candidates(Record):
    """Stored candidate sets, told apart by their digest."""

    digest: str
    count: int
    kind: str


class Stage(Record):
    """Wall-clock seconds of one stage."""

    stage: str
    seconds: float


class Shown(Record):
    """One prompt with its answer, kept for reading."""

    task: str
    arm: str
    predictor: str
    template: str | None = None
    prompt: str
    raw: str | None = None
    parsed: Any = None
    truth: Any = None


class Results(Record):
    """The whole of results.json."""

    llmrec: str
    created: str
    recipe: dict[str, Any]
    recipe_hash: str
    command: str = ""
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    seed: int = 0
    data: dict[str, DataInfo | None]
    candidates: dict[str, Candidates | None] = {}
    training: Training | None = None
    rows: tuple[Row, ...]
    headline: dict[str, str]
    comparisons: tuple[Comparison, ...] = ()
    budget: tuple[Stage, ...] = ()
    seconds: Number = None
    examples: tuple[Shown, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order in which they first appear."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    def row(self, row_id: str) -> Row:
        """Return one row; `check` has made sure that every comparison names existing ones."""
        return next(row for row in self.rows if row.id == row_id)

    def standings(self, task: str) -> tuple[Row, ...]:
        """Return a task's rows, best headline value first and rows without one last."""
        metric = self.headline[task]

        def key(row: Row) -> tuple[bool, float, str]:
            value = row.metrics[metric].value if metric in row.metrics else None
            if value is None:
                return (True, 0.0, row.id)
            return (False, value if metric in LOWER_IS_BETTER else -value, row.id)

        return tuple(sorted((row for row in self.rows if row.task == task), key=key))

    def metrics(self, task: str) -> tuple[str, ...]:
        """Return a task's metric names, the headline one first."""
        names = dict.fromkeys(name for row in self.rows if row.task == task for name in row.metrics)
        return (self.headline[task], *(name for name in names if name != self.headline[task]))

    def best(self, task: str, metric: str) -> float | None:
        """Return the best value of a metric among a task's rows."""
        found = [row.metrics[metric].value for row in self.rows if row.task == task and metric in row.metrics]
        values = [value for value in found if value is not None]
        if not values:
            return None
        return min(values) if metric in LOWER_IS_BETTER else max(values)

    def data_of(self, task: str) -> DataInfo | None:
        """Return the data that a task was measured on: reviews, where given, for explanations."""
        reviews = self.data.get("reviews") if task == "explanation" else None
        return reviews or self.data.get("main")


def _mended(value: Any) -> Any:
    """Replace lone surrogates, which no file can hold, in every string of a JSON value."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, dict):
        return {_mended(key): _mended(entry) for key, entry in value.items()}
    return [_mended(entry) for entry in value] if isinstance(value, list) else value


def results_of(content: Results | Mapping[str, Any], *, source: str = "results.json", mend: str = "") -> Results:
    """Turn the content of results.json into checked records.

    Args:
        content: The parsed JSON, or records, which are checked again.
        source: What to call it in an error.
        mend: A sentence for the end of an error that says what to do.

    Raises:
        DataError: If a key is missing or has the wrong type.
        LlmrecError: If the rows must not be reported together.
    """
    if not isinstance(content, Results):
        try:
            content = Results.model_validate(_mended(dict(content)))
        except (ValidationError, RecursionError) as error:
            raise DataError(f"{source}: {_first_problem(error)}. {mend}".strip()) from error
    check(content, source=source)
    return content


def _first_problem(error: ValidationError | RecursionError) -> str:
    """Name the first key that is wrong, and what is wrong with it."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply to be a results file"
    problem = error.errors(include_url=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = str(problem["msg"])
    return f"key {place!r}: {message[:1].lower()}{message[1:]}{more}"


# --------------------------------------------------------------------------- what may stand in one table


def check(results: Results, *, source: str = "results.json") -> None:
    """Refuse results that no honest table can hold.

    Raises:
        LlmrecError: If rows of a task were measured under different protocols, if a task has no baseline row, or
            if rows, headline metrics and comparisons do not fit together.
    """
    if not results.rows:
        raise LlmrecError(f"{source}: 'rows' is empty, so there is nothing to report; evaluate at least one task")
    doubled = [row_id for row_id, count in Counter(row.id for row in results.rows).items() if count > 1]
    if doubled:
        raise LlmrecError(f"{source}: row id {doubled[0]!r} appears more than once; give every row its own id")
    for task in results.tasks:
        rows = [row for row in results.rows if row.task == task]
        metric = results.headline.get(task)
        if metric is None or not any(metric in row.metrics for row in rows):
            raise LlmrecError(
                f"{source}: key 'headline' must name, for task {task!r}, a metric that its rows carry; "
                f"it holds {metric!r}"
            )
        if not any(row.arm == "baseline" for row in rows):
            raise LlmrecError(
                f"{source}: task {task!r} has no row with arm 'baseline', and a result without its controls means "
                f"nothing; list some under tasks.{task}.baselines in the recipe and evaluate again"
            )
        _check_protocol(task, rows, source)
    _check_comparisons(results, source)


def _check_protocol(task: str, rows: list[Row], source: str) -> None:
    """Refuse rows whose signatures differ for a metric, or that share none and differ in a field.

    A signature is ``metric|field:value|...``.
    """
    seen: dict[str, tuple[str, str]] = {}
    fields: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        for name, metric in row.metrics.items():
            other, signature = seen.setdefault(name, (row.id, metric.signature))
            if signature != metric.signature:
                raise LlmrecError(_mixed(task, f"{other!r} ({signature})", f"{row.id!r} ({metric.signature})", source))
            for part in metric.signature.split("|")[1:]:
                key, _, value = part.partition(":")
                if key in _OF_A_METRIC:
                    continue
                fields.setdefault(key, {}).setdefault(row.id, set()).add(value)
    for key, values in fields.items():
        (first, known), *others = values.items()
        for row_id, found in others:
            if not (found <= known or known <= found):
                one = f"{first!r} ({key}:{','.join(sorted(known))})"
                raise LlmrecError(_mixed(task, one, f"{row_id!r} ({key}:{','.join(sorted(found))})", source))
            known = known | found


def _mixed(task: str, one: str, two: str, source: str) -> str:
    return (
        f"{source}: rows of task {task!r} were measured under different protocols, {one} and {two}, so they cannot "
        f"share a table; evaluate both on the same split and candidate file, or report them as separate runs"
    )


def _check_comparisons(results: Results, source: str) -> None:
    """Refuse a comparison whose rows are not there, or are rows of another task."""
    task_of = {row.id: row.task for row in results.rows}
    for position, comparison in enumerate(results.comparisons):
        for side in (comparison.a, comparison.b):
            if task_of.get(side) != comparison.task:
                raise LlmrecError(
                    f"{source}: comparisons[{position}] names row {side!r}, which task {comparison.task!r} does not "
                    f"have; drop the comparison or evaluate again"
                )


# --------------------------------------------------------------------------- files


def mend_for(run_dir: Path) -> str:
    """Return the sentence that says how to write a run's files anew."""
    return f"Write it again with: llmrec eval RECIPE --out {shlex.quote(str(run_dir))}"


def read(run_dir: Path) -> Results:
    """Read and check ``run_dir/results.json``.

    Raises:
        DataError: If the file is missing, is not JSON or lacks a key.
        LlmrecError: If its rows must not be reported together.
    """
    path, mend = run_dir / "results.json", mend_for(run_dir)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {mend}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error}). {mend}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__} where an object is expected. {mend}")
    _refuse_leaks(run_dir / AUDIT)
    return results_of(content, source=str(path), mend=mend)


class AuditLine(Record):
    """One check of ``audit.json``: what was looked at and what came out."""

    name: str
    found: str
    verdict: Literal["clean", "leak", "notice"]
    examples: tuple[str, ...] = ()


def audit_lines(run_dir: Path) -> tuple[AuditLine, ...]:
    """Return the lines of a run's audit; none where it was not audited.

    Raises:
        DataError: If ``audit.json`` is there and cannot be read.
    """
    path = run_dir / AUDIT
    if not path.is_file():
        return ()
    try:
        return tuple(AuditLine(**line) for line in json.loads(path.read_bytes())["checks"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write it again with `llmrec audit {run_dir}`") from error


def _refuse_leaks(path: Path) -> None:
    leaks = [line for line in audit_lines(path.parent) if line.verdict == "leak"]
    if leaks:
        first = f"{leaks[0].name}: {leaks[0].found}"
        where = f" (such as {leaks[0].examples[0]})" if leaks[0].examples else ""
        raise LlmrecError(
            f"{path}: this run leaks, so it gets no table. {first}{where}"
            f"{f', and {len(leaks) - 1} more' if len(leaks) > 1 else ''}; mend the data or the recipe and run it again"
        )


def failure_reasons(run_dir: Path, results: Results) -> dict[str, dict[str, int]]:
    """Count, from ``run_dir/predictions.parquet``, each row's failed answers by reason, most frequent first.

    Returns:
        Row id to reason to number of requests.

    Raises:
        DataError: If the file is missing, unreadable, or holds other rows or row counts than results.json.
    """
    path, mend = run_dir / "predictions.parquet", mend_for(run_dir)
    if not path.is_file():
        raise DataError(f"{path}: no such file. {mend}")
    try:
        counts = pl.read_parquet(path, columns=["row_id", "error"]).group_by("row_id", "error").len()
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DataError(f"{path}: is not a readable predictions file ({reason}). {mend}") from error
    total: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    for row_id, reason, count in counts.iter_rows():
        total[str(row_id)] += count
        if reason is not None:
            reasons.setdefault(str(row_id), Counter())[str(reason)] += count
    for row in results.rows:
        if total[row.id] != row.n:
            raise DataError(
                f"{path}: holds {total[row.id]} predictions of row {row.id!r}, results.json says n = {row.n}; the two "
                f"files are not of one run. {mend}"
            )
    return {
        row_id: dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))) for row_id, found in reasons.items()
    }
