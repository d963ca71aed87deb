"""Checks and summaries of the output files of `rank` and `predict`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from llmrec.data.database_output import DATABASE_ADDRESS_FORMS, SQLITE_ENDINGS, Database, without_password
from llmrec.durable import Json, parse_checked_json, sha256_of, write_checked_json, write_json
from llmrec.errors import DataError, RecipeError
from llmrec.fingerprint import digest_of


def summary_path(out: Path) -> Path:
    """Return the path of the summary next to an output file, which records how the file was created."""
    return out.with_name(out.name + ".summary.json")


def check_output_file(
    out: Path,
    reads: Sequence[Path | None],
    *,
    option: str,
    by: str,
    parts: Path | None = None,
    restart: bool = False,
) -> None:
    """Raise an error if an output would overwrite a file that the same command did not write.

    Args:
        out: The file to write.
        reads: The input files.
        option: The option of the output, for messages.
        by: The command.
        parts: The folder of parts of a killed call.
        restart: Overwrite an output that was changed.
    """
    if out.is_dir():
        raise DataError(f"{option} {out} is a folder; give a file", kind="unreadable", at=out, column=option)
    for given in reads:
        if given is not None and given.exists() and given.resolve() == out.resolve():
            raise DataError(
                f"{option} {out} is an input file; choose another file", kind="exists", at=out, column=option
            )
    waits = parts is not None and parts.exists()
    if waits or not out.exists():
        return
    if not summary_path(out).exists():
        raise DataError(
            f"{option} {out} exists and was not written by `llmrec {by}`; remove it, or choose another file",
            kind="exists",
            at=out,
            column=option,
        )
    if not restart and _recorded_hash(out) != sha256_of(out):
        raise DataError(
            f"{option} {out} was changed since `llmrec {by}` wrote it; remove it, or choose another file",
            kind="exists",
            at=out,
            column=option,
        )


@contextmanager
def open_output_table(
    to: str, name: str, schema: pa.Schema, *, replace: bool, out: Path | None
) -> Iterator[tuple[Database, Path]]:
    """Yield the database of ``--to``, and a file in the working folder for rows that are not yet in its table.

    The file is removed at the end, and kept after an error, so that the same command can resume.

    Args:
        to: The address or path of the database.
        name: The name of the table.
        schema: Its columns.
        replace: Whether to overwrite an existing table.
        out: The value of ``--out``, which must be missing.

    Raises:
        RecipeError: If both options are given.
        DataError: If ``to`` names no supported database, or the table cannot be written.
    """
    if out is not None:
        raise RecipeError(
            "--out and --to name two outputs; give a file with --out, or a database with --to",
            kind="contradiction",
            column="--to",
        )
    database = Database.of(to, "--to")
    if database is None:
        shown = without_password(to) if "://" in to else to
        raise DataError(
            f"--to {shown}: supported databases are {', '.join(SQLITE_ENDINGS)}, {DATABASE_ADDRESS_FORMS}; give a "
            "file with --out",
            kind="wrong-format",
            column="--to",
        )
    database.check(name, schema, replace=replace)
    rows = Path(f"{name}-{digest_of(to=to)[:8]}.jsonl")
    yield database, rows
    for path in (rows, summary_path(rows)):
        path.unlink(missing_ok=True)


def mark_outdated(out: Path) -> None:
    """Mark an output as outdated, so that it is merged again."""
    if summary_path(out).is_file():
        write_checked_json(summary_path(out), {"key": "", "sha256": _recorded_hash(out)})


def _recorded_hash(out: Path) -> str | None:
    """Return the hash of an output from its summary; None if the summary has none."""
    try:
        return str(parse_checked_json(summary_path(out).read_bytes())["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_summary(out: Path, summary: Mapping[str, Json]) -> None:
    """Write the summary of an output to the file next to it."""
    write_json(summary_path(out), {**summary, "sha256": sha256_of(out)})
