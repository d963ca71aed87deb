"""Shards of a job: their folders, and checks before shards are merged.

    TARGET.shards/2-of-4/            next to the output of the job: a rankings file, a run folder, a feature store
    TARGET.shards/2-of-4/shard.json  written last: command, shard, key of all inputs, checksums of the files that count

A shard is a folder that can be copied anywhere; nothing in it depends on its path.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, cast, get_args

from llmrec import __version__
from llmrec.durable import read_json, sha256_of, write_checked_json
from llmrec.errors import LlmrecError
from llmrec.records import Shard

log = logging.getLogger(__name__)

SHARD_FILE = "shard.json"
"""The record in the folder of a finished shard."""

Command = Literal["rank", "eval", "augment"]

_RERUN_HINT = "run the command of this shard again"


@dataclass(frozen=True)
class FinishedShard:
    """A finished shard.

    Attributes:
        folder: Its folder.
        command: The command that wrote it.
        shard: Its index and the number of shards.
        key: Hash of every input that can change an answer; equal in all shards of a job.
        files: The sha256 of its result files, by name.
        facts: Further facts that the command stored.
    """

    folder: Path
    command: Command
    shard: Shard
    key: str
    files: Mapping[str, str]
    facts: Mapping[str, Any]

    def damaged(self) -> str | None:
        """Return the first file that was changed; None if all files are intact."""
        for name, digest in self.files.items():
            path = self.folder / name
            if not path.is_file() or sha256_of(path) != digest:
                return name
        return None

    def refuse_other(self, key: str) -> None:
        """Reject a shard that was computed from other inputs."""
        if self.key != key:
            raise LlmrecError(
                f"{self.folder} was made with another recipe, data, model, device or versions ({self.key}, here "
                f"{key}); merge on the machine where the shards were made, or run the shards again",
                kind="mismatch",
                at=self.folder,
            )


def job_folder(target: Path) -> Path:
    """Return the folder with the shards of a job."""
    folder = target if target.name not in ("", "..") else target.resolve()
    return folder.with_name(f"{folder.name}.shards")


def shard_folder(target: Path, shard: Shard) -> Path:
    """Return the folder of one shard."""
    return job_folder(target) / shard.name


def finish_shard(
    folder: Path, command: Command, shard: Shard, key: str, files: Sequence[str], facts: Mapping[str, Any]
) -> FinishedShard:
    """Mark a shard as finished by writing its record atomically."""
    result = {name: sha256_of(folder / name) for name in files}
    values = {"llmrec": __version__, "command": command, "shard": shard.index, "of": shard.count, "key": key}
    write_checked_json(folder / SHARD_FILE, {**values, "files": result, "facts": facts})
    return FinishedShard(folder, command, shard, key, result, facts)


def read_shard(folder: Path) -> FinishedShard:
    """Read the record of a finished shard."""
    path = folder / SHARD_FILE
    if not path.is_file():
        raise LlmrecError(
            f"{folder} does not contain a finished shard ({SHARD_FILE} is missing); {_RERUN_HINT}",
            kind="missing-file",
            at=folder,
        )
    result = read_json(path, _RERUN_HINT)
    try:
        command, shard = result["command"], Shard(int(result["shard"]), int(result["of"]))
        if command not in get_args(Command) or not 1 <= shard.index <= shard.count:
            raise ValueError(f"{command} {shard}")
        if any(Path(name).name != name for name in result["files"]):
            raise ValueError("a file is outside the folder of the shard")
        return FinishedShard(
            folder, cast("Command", command), shard, str(result["key"]), dict(result["files"]), dict(result["facts"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LlmrecError(
            f"{path} is not a valid record of a shard ({error!r}); {_RERUN_HINT}", kind="damaged", at=path
        ) from None


def reusable_shard(folder: Path, key: str) -> FinishedShard | None:
    """Return the finished shard if its inputs and files are unchanged; otherwise None."""
    try:
        result = read_shard(folder)
    except LlmrecError as error:
        if error.kind != "missing-file":
            log.warning("%s", error)
        return None
    if result.key != key:
        return None
    if (name := result.damaged()) is not None:
        log.warning("%s was changed after it was written, and is computed again", folder / name)
        return None
    return result


def find_shard_folders(target: Path, folders: Sequence[Path] = ()) -> Sequence[Path]:
    """Return the folders of a job's shards: the given folders, or all folders in `job_folder`."""
    shards = job_folder(target)
    if not folders and shards.is_dir():
        folders = sorted(path for path in shards.iterdir() if path.is_dir())
    if not folders:
        raise LlmrecError(
            f"there are no shards in {shards}; create shards with --shard, or list their folders after {target}",
            kind="missing-file",
            at=shards,
        )
    return folders


def verify_shards(target: Path, folders: Sequence[Path] = ()) -> list[FinishedShard]:
    """Verify all shards of a job, by default those in `job_folder`, and return them in order."""
    results = sorted(map(read_shard, find_shard_folders(target, folders)), key=attrgetter("shard.index"))
    first = results[0]
    for item in results:
        _check_same_job(first, item)
    for one, other in pairwise(results):
        if one.shard == other.shard:
            raise LlmrecError(
                f"{one.folder} and {other.folder} are both shard {one.shard}; give only one of these folders",
                kind="duplicate",
                at=other.folder,
            )
    there = {item.shard.index for item in results}
    if missing := [number for number in range(1, first.shard.count + 1) if number not in there]:
        names = ", ".join(f"{number}/{first.shard.count}" for number in missing[:8])
        raise LlmrecError(
            f"{len(missing)} of {first.shard.count} shards of {target} are missing: "
            f"{names}{' and more' if len(missing) > 8 else ''}; run these shards, or give their folders",
            kind="missing-file",
            at=job_folder(target),
        )
    for item in results:
        if (name := item.damaged()) is not None:
            raise LlmrecError(
                f"{item.folder / name} was changed after shard {item.shard} wrote it; {_RERUN_HINT}, or copy the "
                "folder again",
                kind="damaged",
                at=item.folder / name,
            )
    return results


def _check_same_job(first: FinishedShard, other: FinishedShard) -> None:
    """Reject shards of different jobs."""
    for what, one, two in (
        ("command", f"llmrec {first.command}", f"llmrec {other.command}"),
        ("number of shards", first.shard.count, other.shard.count),
        ("inputs or options", first.key, other.key),
    ):
        if one != two:
            raise LlmrecError(
                f"{first.folder} and {other.folder} are shards of different jobs: their {what} differ ({one}, {two}); "
                "move other folders away, or give only shards of one job",
                kind="mismatch",
                at=other.folder,
            )
