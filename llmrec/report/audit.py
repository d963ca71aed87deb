"""Shows the audit of a run in its report; a run with a leak gets no result tables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from llmrec.display import single_line
from llmrec.durable import parse_checked_json, sha256_of
from llmrec.errors import DataError, LlmrecError
from llmrec.records import Record
from llmrec.report.escape import without_surrogates

AUDIT_FILE = "audit.json"
LEAK_VERDICT = "This run leaks held-out data, so its report has no results."
# the most serious findings first
_VERDICT_ORDER = ("leak", "notice", "clean")


class LeakError(LlmrecError):
    """Raised for a run in which held-out data leaked into training data or prompts."""


class AuditLine(Record):
    """A check in ``audit.json``: its name, finding and verdict."""

    name: str
    found: str
    verdict: Literal["clean", "leak", "notice"]
    examples: tuple[str, ...] = ()


def read_audit_lines(run_dir: Path) -> tuple[AuditLine, ...] | None:
    """Return the checks of a run: leaks first, then notices, then the rest; None if the run was not audited.

    A stale audit of earlier results, left by a run that was killed between results and audit, counts as no audit.

    Raises:
        DataError: If ``audit.json`` exists and cannot be read.
    """
    path = run_dir / AUDIT_FILE
    if not path.is_file():
        return None
    try:
        content = parse_checked_json(path.read_bytes(), json.loads)
        checks = [AuditLine(**check) for check in without_surrogates(content["checks"])]
        of = str(content["results_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise DataError.at(
            path,
            "damaged",
            f": cannot be read ({single_line(str(error))}); write it again with: {audit_command(run_dir)}",
        ) from error
    if of != sha256_of(run_dir / "results.json"):
        return None
    return tuple(sorted(checks, key=lambda line: _VERDICT_ORDER.index(line.verdict)))


def audit_command(run_dir: Path) -> str:
    """Return the command that audits a run."""
    return f"llmrec audit {shlex.quote(str(run_dir))}"


def audit_sentence(lines: Sequence[AuditLine]) -> str:
    """Return a sentence with the number of checks, leaks and notices."""

    def many(count: int, what: str) -> str:
        return f"no {what}" if not count else f"1 {what}" if count == 1 else f"{count} {what}s"

    leaks, notices = (sum(line.verdict == verdict for line in lines) for verdict in ("leak", "notice"))
    counts = f"{many(len(lines), 'check')}, {many(leaks, 'leak')}, {many(notices, 'notice')}"
    return f"{counts}. The audit searches training data and prompts for held-out data."


def check_leaks(run_dir: Path, lines: Sequence[AuditLine]) -> None:
    """Reject a run whose audit found a leak.

    Raises:
        LeakError: If there is a leak.
    """
    if reason := describe_leaks(lines):
        raise LeakError.at(run_dir / AUDIT_FILE, "leak", f": {LEAK_VERDICT[0].lower()}{LEAK_VERDICT[1:]} {reason}")


def describe_leaks(lines: Sequence[AuditLine]) -> str:
    """Return what leaks and how to fix it; empty if nothing leaks."""
    leaks = [line for line in lines if line.verdict == "leak"]
    if not leaks:
        return ""
    first = f"{leaks[0].name}: {leaks[0].found}"
    where = f" (such as {leaks[0].examples[0]})" if leaks[0].examples else ""
    more = f", and {len(leaks) - 1} more" if len(leaks) > 1 else ""
    return f"{single_line(first + where + more)}; fix the data or the recipe, and run the recipe again"
