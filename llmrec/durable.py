"""Atomic writes, JSON files with checksums, and checksum manifests of folders."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from llmrec.errors import DataError, ErrorKind, LlmrecError

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"
"""A value of JSON or YAML."""

MANIFEST = "manifest.json"
CHECKSUM = "checksum"
"""The last key of files of `write_checked_json`."""
# The last key of a file of `write_checked_json`; a file rewritten by another program lacks it and is not verified.
_CHECKSUM_END = re.compile(rb',\n "checksum": "([0-9a-f]{32})"\n\}\n\Z')
WRITING_NOTE = "while writing "
"""The start of a note of `note_written_path`."""
_CHUNK_BYTES = 2**20


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a draft path next to a file or folder, and rename it when the block succeeds.

    The draft has a fixed name, so that the draft of a killed process is overwritten; use a lock against other
    processes. An existing folder at ``path`` is removed right before the rename.

    Raises:
        LlmrecError: If ``path`` is a link to a folder, which a folder cannot replace, or a folder where the draft is a
            file.
    """
    if path.is_dir():
        check_not_link(path)
    elif path.exists() and not path.is_file():
        raise LlmrecError.at(path, "exists", " is a device or a pipe, not a file; choose another path")
    draft = path.with_name(f".{path.name}.llmrec.draft")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(draft)
    try:
        with note_written_path(path):
            yield draft
        if draft.is_dir() and path.is_dir():
            _remove(path)
        elif path.is_dir():
            raise LlmrecError.at(
                path, "exists", " is a folder, but llmrec writes a file of this name; move the folder away"
            )
        draft.replace(path)
    finally:
        _remove(draft)


@contextmanager
def note_written_path(path: Path) -> Iterator[None]:
    """Add the name of the written file or folder to errors that lack it."""
    try:
        yield
    except Exception as error:
        if not any(note.startswith(WRITING_NOTE) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{WRITING_NOTE}{path}")
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replace_atomically(path) as draft:
        draft.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from a file.

    Raises:
        ValueError: If it is invalid, nested too deeply for Python, or contains a lone surrogate, which could not be
            written again.
    """
    try:
        result = json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if (rb"\ud" if isinstance(text, bytes) else r"\ud") in (text.lower()):  # type: ignore[operator]
        json.dumps(result, ensure_ascii=False).encode()
    return result


def write_json(path: Path, value: Any) -> str:
    """Write a JSON file atomically and return its SHA-256; NaN and infinities are rejected."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_text(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def write_checked_json(path: Path, value: Mapping[str, Any]) -> str:
    """Write a JSON object atomically with a checksum as its last key, which `parse_checked_json` verifies.

    Args:
        path: The file.
        value: The object, with at least one key.

    Returns:
        The SHA-256 of the file.
    """
    head = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False).removesuffix("\n}")
    text = f'{head},\n "{CHECKSUM}": "{checksum(head.encode())}"\n}}\n'
    write_text(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


class ChecksumMismatch(ValueError):
    """Raised if a file does not match its checksum."""


def parse_checked_json(content: bytes, parse: Callable[[bytes], Any] = parse_json) -> Any:
    """Parse JSON written by `write_checked_json`, and verify and remove its checksum.

    Raises:
        ChecksumMismatch: If it does not match its checksum.
        ValueError: If ``parse`` rejects it.
    """
    end = _CHECKSUM_END.search(content)
    if end is not None and checksum(content[: end.start()]) != end[1].decode():
        raise ChecksumMismatch("the file does not match its checksum")
    result = parse(content)
    return {key: item for key, item in result.items() if key != CHECKSUM} if end is not None else result


def checksum(content: bytes) -> str:
    """Return a checksum of 32 hex digits, which detects damage but not attacks."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_json(path: Path, fix: str, parse: Callable[[bytes], Any] = parse_json) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        fix: How to fix a damaged file, for the error.
        parse: See `parse_checked_json`.

    Raises:
        DataError: If it cannot be read, does not match its checksum, or is not a JSON object.
    """
    try:
        result = parse_checked_json(path.read_bytes(), parse)
    except OSError as error:
        kind: ErrorKind = "missing-file" if isinstance(error, FileNotFoundError) else "unreadable"
        raise DataError.at(path, kind, f" cannot be read ({error.strerror}); {fix}") from None
    except ChecksumMismatch as error:
        raise DataError.at(path, "damaged", f" cannot be read ({error}); {fix}") from None
    except (ValueError, RecursionError) as error:
        raise DataError.at(path, "syntax", f" is not valid JSON ({error}); {fix}") from None
    if not isinstance(result, dict):
        raise DataError.at(path, "wrong-format", f" contains a {type(result).__name__} instead of an object; {fix}")
    return result


def sha256_of(*files: Path) -> str:
    """Return the SHA-256 of the content of files, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Write a manifest with the checksums of all files in a folder, for `matches_manifest`."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST and not file.name.endswith(".draft")
    }
    write_json(folder / MANIFEST, {"files": files})


def matches_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest and all listed files exist with the same content."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(listed) and all(
            (folder / name).stat().st_size == entry["bytes"] and sha256_of(folder / name) == entry["sha256"]
            for name, entry in listed.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def matches_manifest_cached(folder: Path) -> bool:
    """Like `matches_manifest`, but skips files that have not changed since an earlier call."""
    try:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        states = tuple((str(file), *_file_state(file)) for file in files)
    except OSError:
        return False
    return _matches_manifest_at(folder, states)


def _file_state(file: Path) -> tuple[int, int, int]:
    result = file.stat()
    return result.st_size, result.st_mtime_ns, result.st_ctime_ns


@lru_cache(maxsize=64)
def _matches_manifest_at(folder: Path, states: tuple[tuple[str, int, int, int], ...]) -> bool:
    return matches_manifest(folder)


def check_not_link(path: Path) -> None:
    """Reject a symbolic link, so that its target is not written, locked or removed.

    Raises:
        LlmrecError: If the path is a link.
    """
    if path.is_symlink():
        raise LlmrecError.at(
            path, "unsafe", " is a symbolic link, and llmrec does not write through links; remove the link"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
