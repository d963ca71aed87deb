"""What an output of `rank` and `predict` may stand in the place of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmrec.durable import Json, sha256_of, write_checked, write_json
from llmrec.errors import DataError


def summary_beside(out: Path) -> Path:
    """Return the file that says how an output was made."""
    return out.with_name(out.name + ".summary.json")


def check_out(out: Path, reads: Sequence[Path | None], *, option: str, by: str, parts: Path | None = None) -> None:
    """Refuse to write over anything but what the same command wrote.

    Args:
        out: The file to write.
        reads: Files that are read.
        option: What names the output.
        by: The command.
        parts: Where parts of a killed call wait.

    Raises:
        DataError: If the output cannot be written there.
    """
    if out.is_dir():
        raise DataError(f"{option} {out} is a folder; name a file", kind="unreadable", at=out, column=option)
    for given in reads:
        if given is not None and given.exists() and given.resolve() == out.resolve():
            raise DataError(
                f"{option} {out} is one of the files that are read; name another", kind="exists", at=out, column=option
            )
    waits = parts is not None and parts.exists()
    if out.exists() and not summary_beside(out).exists() and not waits:
        raise DataError(
            f"{option} {out} exists and was not written by `llmrec {by}`; remove it, or name another file",
            kind="exists",
            at=out,
            column=option,
        )


def outdate(out: Path) -> None:
    """Have merging make an output again, which stays until then: its summary names no inputs any more."""
    if summary_beside(out).is_file():
        write_checked(summary_beside(out), {"key": ""})


def write_summary(out: Path, told: Mapping[str, Json]) -> None:
    """Say how an output was made, beside it."""
    write_json(summary_beside(out), {**told, "sha256": sha256_of(out)})
