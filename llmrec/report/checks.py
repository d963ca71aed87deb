"""Refuses results that no honest table can hold: mixed protocols, missing controls, parts that do not fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from llmrec.errors import LlmrecError
from llmrec.registry import is_family
from llmrec.results import Results, Row
from llmrec.tasks.family import missing_controls

# Signature fields that may differ between the metrics of one row.
_OF_A_METRIC = frozenset({"gain", "ties", "text", "how"})
_UNSAID = "(unsaid)"


def check(results: Results, *, source: str = "results.json") -> None:
    """Refuse results that no honest table can hold.

    Raises:
        LlmrecError: If rows of a task were measured under different protocols or on different candidates, if a task has
            no baseline measured by its headline metric, or if rows, headline metrics and comparisons do not fit
            together.
    """
    if not results.rows:
        raise LlmrecError(
            f"{source}: 'rows' is empty, so there is nothing to report; evaluate at least one task",
            kind="empty",
            at=source,
            column="rows",
        )
    doubled = [row_id for row_id, count in Counter(row.id for row in results.rows).items() if count > 1]
    if doubled:
        raise LlmrecError(
            f"{source}: row id {doubled[0]!r} appears more than once; give every row its own id",
            kind="duplicate",
            at=source,
            column="rows",
        )
    for task in results.tasks:
        rows = [row for row in results.rows if row.task == task]
        metric = results.headline.get(task)
        if metric is None or not any(metric in row.metrics for row in rows):
            raise LlmrecError(
                f"{source}: key 'headline' must name, for task {task!r}, a metric that its rows carry; "
                f"it holds {metric!r}",
                kind="bad-value",
                at=source,
                column="headline",
            )
        if not any(row.arm == "baseline" for row in rows):
            raise LlmrecError(
                f"{source}: task {task!r} has no row with setting 'baseline', and a result without its controls means "
                f"nothing; list some under tasks.{task}.baselines in the recipe and evaluate again",
                kind="missing-value",
                at=source,
                column=f"tasks.{task}.baselines",
            )
        _check_controls(task, metric, rows, source)
        _check_protocol(task, rows, source)
    _check_candidates(results, source)
    _check_comparisons(results, source)


def _check_controls(task: str, metric: str, rows: Sequence[Row], source: str) -> None:
    """Refuse a table without the family's compulsory controls, measured by its headline metric."""
    there = [row.method for row in rows if row.arm == "baseline" and metric in row.metrics]
    lacking = missing_controls(task, there) if is_family(task) else []
    if lacking or not there:
        raise LlmrecError(
            f"{source}: task {task!r} lacks the controls {', '.join(lacking) or 'of any kind'}, measured by its "
            f"headline metric {metric!r}, so there is nothing to hold the other rows against; name them under "
            f"tasks.{task}.baselines in the recipe and evaluate again",
            kind="missing-value",
            at=source,
            column=f"tasks.{task}.baselines",
        )


def _check_protocol(task: str, rows: Sequence[Row], source: str) -> None:
    """Refuse rows that were measured on different candidates, or whose signatures do not fit together."""
    _same_candidates(task, rows, source)
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for row in rows:
        for name, signature in _signatures(row):
            other, first = seen.setdefault(name, (row.id, signature))
            if signature != first:
                raise LlmrecError(
                    _mixed(task, f"{other!r} ({first})", f"{row.id!r} ({signature})", source),
                    kind="mismatch",
                    at=source,
                )
    _same_fields(task, rows, source)
    _same_slices(task, rows, source)


def _signatures(row: Row) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the signature of every figure of a row under its slice and metric."""
    for name, metric in row.metrics.items():
        yield ("", name), metric.signature
    for part in row.slices:
        for name, metric in part.metrics.items():
            yield (part.name, name), metric.signature


def _same_candidates(task: str, rows: Sequence[Row], source: str) -> None:
    """Refuse rows that ranked different candidate sets, or of which only some say which they ranked."""
    digests: dict[str | None, str] = {}
    for row in rows:
        digests.setdefault(row.candidates, row.id)
    if len(digests) > 1:
        one, two = (f"{row_id!r} ({_digest(digest)})" for digest, row_id in list(digests.items())[:2])
        raise LlmrecError(
            f"{source}: rows of task {task!r} ranked different candidate sets, {one} and {two}, so they cannot share a "
            "table; evaluate both again in one run",
            kind="mismatch",
            at=source,
            column="candidates",
        )


def _check_candidates(results: Results, source: str) -> None:
    """Refuse rows that ranked other candidate sets than those that the run describes."""
    known = {drawn.digest for drawn in results.candidates.values() if drawn is not None}
    for row in results.rows:
        if known and row.candidates is not None and row.candidates not in known:
            raise LlmrecError(
                f"{source}: row {row.id!r} ranked candidate sets ({_digest(row.candidates)}) that key 'candidates' "
                "does not list; evaluate it again in this run",
                kind="mismatch",
                at=source,
                column="candidates",
            )


def _digest(digest: str | None) -> str:
    return "no digest" if digest is None else f"digest {digest[:12]}"


def _same_fields(task: str, rows: Sequence[Row], source: str) -> None:
    """Refuse rows of which neither was measured under all protocols of the other.

    Rows may carry a metric under several protocols, such as seen items filtered and not filtered; then one row
    may lack one of them. A field that a signature leaves out, such as ``users`` or ``slice``, counts as one value.
    """
    parts = {row.id: [_fields(metric.signature) for metric in row.metrics.values()] for row in rows if row.metrics}
    names = sorted({key for fields in parts.values() for each in fields for key in each})
    for key in names:
        values = {row_id: {each.get(key, _UNSAID) for each in fields} for row_id, fields in parts.items()}
        kinds: dict[frozenset[str], str] = {}
        for row_id, own in values.items():
            for other, first in kinds.items():
                if not (own <= other or other <= own):
                    one = f"{first!r} ({key}:{','.join(sorted(other))})"
                    raise LlmrecError(
                        _mixed(task, one, f"{row_id!r} ({key}:{','.join(sorted(own))})", source),
                        kind="mismatch",
                        at=source,
                    )
            kinds.setdefault(frozenset(own), row_id)


def _fields(signature: str) -> dict[str, str]:
    """Return the fields of a signature, ``metric|field:value|...``, that bear on every metric of a table."""
    parts = (part.partition(":") for part in signature.split("|")[1:])
    return {key: value for key, _, value in parts if key not in _OF_A_METRIC}


def _same_slices(task: str, rows: Sequence[Row], source: str) -> None:
    """Refuse rows whose slices of one name hold different numbers of cases."""
    sizes: dict[str, tuple[str, int]] = {}
    for row in rows:
        for part in row.slices:
            other, n = sizes.setdefault(part.name, (row.id, part.n))
            if n != part.n:
                one, two = f"{other!r} (slice {part.name!r}, n = {n})", f"{row.id!r} (n = {part.n})"
                raise LlmrecError(_mixed(task, one, two, source), kind="mismatch", at=source)


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
                    f"have; drop the comparison or evaluate again",
                    kind="unknown-name",
                    at=source,
                    column="comparisons",
                )
