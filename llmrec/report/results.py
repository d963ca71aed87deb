"""Reads the results of a run and checks that they are consistent.

Results that make no valid table are rejected: mixed protocols, missing controls, inconsistent rows.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from pydantic import ValidationError

from llmrec.durable import read_json, sha256_of
from llmrec.errors import DataError, ErrorKind, LlmrecError
from llmrec.guard import shorten_at_grapheme
from llmrec.registry import is_family
from llmrec.report.audit import check_leaks, read_audit_lines
from llmrec.report.escape import without_surrogates
from llmrec.report.wording import format_count
from llmrec.results import Results, Row
from llmrec.tasks.family import missing_controls

# --------------------------------------------------------------------------- checks


# Signature fields that may differ between the metrics of one model.
_METRIC_FIELDS = frozenset({"gain", "ties", "text", "how"})
_MISSING = "(missing)"


def _check_results(results: Results, source: str) -> None:
    """Reject results from which no valid table can be made.

    Raises:
        LlmrecError: If rows of a task were measured under different protocols or on different candidates, if a task has
            no baseline measured by its headline metric, or if rows, headline metrics and comparisons are inconsistent.
    """
    if not results.rows:
        raise LlmrecError.at(
            source,
            "empty",
            ": the key 'rows' is empty, so there is nothing to report; evaluate at least one task",
            "rows",
        )
    doubled = [row_id for row_id, count in Counter(row.id for row in results.rows).items() if count > 1]
    if doubled:
        raise LlmrecError.at(
            source, "duplicate", f": row id {doubled[0]!r} is repeated; give every row a unique id", "rows"
        )
    for task in results.tasks:
        rows = [row for row in results.rows if row.task == task]
        metric = results.headline.get(task)
        if metric is None or not any(metric in row.metrics for row in rows):
            raise LlmrecError.at(
                source,
                "bad-value",
                f": the metric {metric!r} of key 'headline' is missing for models of task {task!r}; set another metric",
                "headline",
            )
        _check_controls(task, metric, rows, source)
        _check_protocol(task, rows, source)
    _check_candidates(results, source)
    _check_comparisons(results, source)


def _check_controls(task: str, metric: str, rows: Sequence[Row], source: str) -> None:
    """Reject a table without the required baselines, measured by its main metric."""
    there = [row.method for row in rows if row.arm == "baseline" and metric in row.metrics]
    lacking = missing_controls(task, there) if is_family(task) else []
    if lacking or not there:
        raise LlmrecError.at(
            source,
            "missing-value",
            f": task {task!r} has no baseline {', '.join(lacking) or '(any)'} with the metric {metric!r}, so "
            f"other models cannot be compared with a baseline; add it to tasks.{task}.baselines in the recipe and "
            "evaluate again",
            f"tasks.{task}.baselines",
        )


def _check_protocol(task: str, rows: Sequence[Row], source: str) -> None:
    """Reject models that were measured on different candidates or under incompatible protocols."""
    _check_same_candidates(task, rows, source)
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for row in rows:
        for name, signature in _row_signatures(row):
            other, first = seen.setdefault(name, (row.id, signature))
            if signature != first:
                raise _mixed_protocols_error(task, f"{other!r} ({first})", f"{row.id!r} ({signature})", source)
    _check_same_fields(task, rows, source)
    _check_same_slices(task, rows, source)


def _row_signatures(row: Row) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the signatures of all values of a model, each with its subset and metric."""
    for part, metrics in (("", row.metrics), *((part.name, part.metrics) for part in row.slices)):
        for name, metric in metrics.items():
            yield (part, name), metric.signature


def _check_same_candidates(task: str, rows: Sequence[Row], source: str) -> None:
    """Reject models with different or missing candidate sets."""
    digests: dict[str | None, str] = {}
    for row in rows:
        digests.setdefault(row.candidates, row.id)
    if len(digests) > 1:
        one, two = (f"{row_id!r} ({_format_digest(digest)})" for digest, row_id in list(digests.items())[:2])
        raise LlmrecError.at(
            source,
            "mismatch",
            f": models of task {task!r} ranked different candidate sets, {one} and {two}, so they cannot "
            "share a table; evaluate both again in one run",
            "candidates",
        )


def _check_candidates(results: Results, source: str) -> None:
    """Reject models whose candidate sets differ from the description in the results."""
    known = {drawn.digest for drawn in results.candidates.values() if drawn is not None}
    for row in results.rows:
        if known and row.candidates is not None and row.candidates not in known:
            raise LlmrecError.at(
                source,
                "mismatch",
                f": model {row.id!r} ranked candidate sets ({_format_digest(row.candidates)}) that are missing "
                "in the key 'candidates'; evaluate this model again in this run",
                "candidates",
            )


def _format_digest(digest: str | None) -> str:
    return "no digest" if digest is None else f"digest {digest[:12]}"


def _check_same_fields(task: str, rows: Sequence[Row], source: str) -> None:
    """Reject pairs of models that were not measured under the same protocols.

    Rows may have a metric under several protocols, such as seen items filtered and not filtered; then one row
    may lack one of them. A field missing in a signature, such as ``users`` or ``slice``, counts as one value.
    """
    parts = {
        row.id: [_signature_fields(metric.signature) for metric in row.metrics.values()] for row in rows if row.metrics
    }
    names = sorted({key for fields in parts.values() for entry in fields for key in entry})
    for key in names:
        values = {row_id: {entry.get(key, _MISSING) for entry in fields} for row_id, fields in parts.items()}
        kinds: dict[frozenset[str], str] = {}
        for row_id, protocols in values.items():
            for other, first in kinds.items():
                if not (protocols <= other or other <= protocols):
                    pairs = ((first, other), (row_id, protocols))
                    one, two = (f"{name!r} ({key}:{','.join(sorted(used))})" for name, used in pairs)
                    raise _mixed_protocols_error(task, one, two, source)
            kinds.setdefault(frozenset(protocols), row_id)


def _signature_fields(signature: str) -> dict[str, str]:
    """Return the fields of a signature ``metric|field:value|...`` that apply to all metrics of a table."""
    parts = (part.partition(":") for part in signature.split("|")[1:])
    return {key: value for key, _, value in parts if key not in _METRIC_FIELDS}


def _check_same_slices(task: str, rows: Sequence[Row], source: str) -> None:
    """Reject models whose equally named subsets have different numbers of cases."""
    sizes: dict[str, tuple[str, int]] = {}
    for row in rows:
        for part in row.slices:
            other, n = sizes.setdefault(part.name, (row.id, part.n))
            if n != part.n:
                one, two = f"{other!r} (slice {part.name!r}, n = {n})", f"{row.id!r} (n = {part.n})"
                raise _mixed_protocols_error(task, one, two, source)


def _mixed_protocols_error(task: str, one: str, two: str, source: str) -> LlmrecError:
    return LlmrecError.at(
        source,
        "mismatch",
        f": models of task {task!r} were measured under different protocols, {one} and {two}, so they cannot "
        "share a table; evaluate both on the same split and candidate file, or report them as separate runs",
    )


def _check_comparisons(results: Results, source: str) -> None:
    """Reject a comparison of models that are missing or belong to another task."""
    task_of = {row.id: row.task for row in results.rows}
    for position, comparison in enumerate(results.comparisons):
        for side in (comparison.a, comparison.b):
            if task_of.get(side) != comparison.task:
                raise LlmrecError.at(
                    source,
                    "unknown-name",
                    f": comparisons[{position}] names model {side!r}, which task {comparison.task!r} does "
                    "not have; drop the comparison or evaluate again",
                    "comparisons",
                )


def parse_results(content: Mapping[str, Any], *, source: str = "results.json", fix: str = "") -> Results:
    """Parse and validate the content of results.json.

    Args:
        content: The parsed JSON.
        source: Its name in errors.
        fix: A sentence on what to do, appended to errors.

    Raises:
        DataError: If a key is missing or has the wrong type.
        LlmrecError: If the rows must not be reported together.
    """
    try:
        results = Results.model_validate(without_surrogates(dict(content)))
    except (ValidationError, RecursionError) as error:
        raise _invalid_key_error(error, source, fix) from error
    _check_results(results, source)
    return results


def _invalid_key_error(error: ValidationError | RecursionError, source: str, fix: str) -> DataError:
    """Return an error that names the first invalid key."""
    if isinstance(error, RecursionError):
        deep = "it is nested too deeply for a results file"
        return DataError(f"{source}: {deep}. {fix}".strip(), kind="wrong-format", at=source)
    problem = error.errors(include_url=False, include_context=False)[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = str(problem["msg"])
    return DataError(
        f"{source}: key {key!r}: {message[:1].lower()}{message[1:]}{more}. {fix}".strip(),
        kind="missing-key" if problem["type"] == "missing" else "bad-value",
        at=source,
        column=key,
    )


# --------------------------------------------------------------------------- files


def rewrite_advice(run_dir: Path) -> str:
    """Return a sentence on how to write the files of a run again."""
    return f"Write it again with: llmrec eval RECIPE --out {shlex.quote(str(run_dir))}"


def read_results(run_dir: Path) -> Results:
    """Read and validate ``run_dir/results.json``.

    Raises:
        DataError: If the file is missing, is not JSON or lacks a key.
        LeakError: If the run's audit found a leak.
        LlmrecError: If its rows must not be reported together.
    """
    content = read_results_json(run_dir)
    check_leaks(run_dir, read_audit_lines(run_dir) or ())
    return parse_results(content, source=str(run_dir / "results.json"), fix=rewrite_advice(run_dir))


def read_results_json(run_dir: Path) -> Mapping[str, Any]:
    """Read ``run_dir/results.json`` without validation.

    Raises:
        DataError: If the file is missing, does not match its checksum, or is not a JSON object.
    """
    fix = rewrite_advice(run_dir)
    # A lone surrogate in a server's answer must not prevent a report; it is escaped when it is shown.
    return read_json(run_dir / "results.json", fix[0].lower() + fix[1:], json.loads)


def check_predictions_file(run_dir: Path, files: Mapping[str, str]) -> None:
    """Reject a file of answers that does not belong to the results.

    Args:
        run_dir: The run folder.
        files: SHA-256 by name, from ``results.json``; empty in results of earlier versions.

    Raises:
        DataError: If the file is missing, cannot be read or was changed.
    """
    path, fix = run_dir / "predictions.parquet", rewrite_advice(run_dir)
    try:
        result = sha256_of(path)
    except OSError as error:
        kind: ErrorKind = "missing-file" if isinstance(error, FileNotFoundError) else "unreadable"
        raise DataError.at(path, kind, f": cannot be read ({error.strerror}). {fix}") from None
    if path.name in files and result != files[path.name]:
        raise DataError.at(path, "damaged", f" was changed after results.json was written. {fix}")


def failure_reasons(run_dir: Path, results: Results) -> dict[str, dict[str, int]]:
    """Count the failed answers of each model by reason, most frequent first.

    Args:
        run_dir: The run folder.
        results: The results of the run.

    Returns:
        Row id to reason to number of requests.

    Raises:
        DataError: If the file is missing, unreadable, or differs from results.json in rows or row counts.
    """
    path, fix = run_dir / "predictions.parquet", rewrite_advice(run_dir)
    check_predictions_file(run_dir, results.files)
    try:
        predictions = pl.read_parquet(path, columns=["row_id", "error"])
        # Sorted so that the page is reproducible: its nonce is a hash that includes these counts.
        counts = predictions.group_by("row_id", "error", maintain_order=True).len()
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DataError.at(path, "damaged", f" cannot be read as a predictions file ({reason}). {fix}") from error
    total: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    for row_id, reason, many in counts.iter_rows():
        total[str(row_id)] += many
        if reason is not None:
            reasons.setdefault(str(row_id), Counter())[str(reason)] += many
    for row in results.rows:
        if total[row.id] != row.n:
            raise DataError.at(
                path,
                "mismatch",
                f" contains {total[row.id]} predictions of model {row.id!r}, but results.json has n = {row.n}, "
                f"so the two files are from different runs. {fix}",
            )
    return {
        row_id: dict(sorted(result.items(), key=lambda pair: (-pair[1], pair[0]))) for row_id, result in reasons.items()
    }


_MAX_TEXT_LENGTH = 20_000  # maximum number of characters of a prompt or raw answer on the page


def protocols_by_task(results: Results) -> dict[str, dict[str, list[str]]]:
    """Return the evaluation protocols of each task, with the metrics measured under each."""
    result: dict[str, dict[str, list[str]]] = {}
    for task in results.tasks:
        for row in results.rows:
            for name, metric in row.metrics.items() if row.task == task else ():
                protocol = metric.signature.removeprefix(f"{name}|")
                names = result.setdefault(task, {}).setdefault(protocol, [])
                if name not in names:
                    names.append(name)
    return result


def synthetic_data_names(results: Results) -> list[str]:
    """Return the names of synthetic data sets."""
    return list(dict.fromkeys(data.name for data in results.data.values() if data and data.made))


def truncate_long_text(text: str) -> str:
    """Return text, truncated with a note if it is too long for the page."""
    kept = shorten_at_grapheme(text, _MAX_TEXT_LENGTH)
    return text if kept == text else f"{kept}\n[… {format_count(len(text) - len(kept))} more characters]"


def format_answer(value: object) -> str:
    """Return a parsed or true answer as text: strings unchanged, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def format_yaml(value: object) -> str:
    """Return a recipe as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=88)
