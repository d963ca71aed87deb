"""Files that a kill cannot tear: written beside their place and moved there, and folders with a checksum manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from llmrec.errors import ErrorKind, LlmrecError

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"
"""What a JSON file, a request or a page of YAML can hold."""

MANIFEST = "manifest.json"
_CHUNK = 2**20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a draft path beside a file or folder, and move it into place when the block ends well.

    The draft has one fixed name that nobody else uses, so that what a killed process left is overwritten and never
    piles up; two processes must be kept apart by a lock. An existing folder at ``path`` is removed right before the
    move.

    Raises:
        LlmrecError: If ``path`` is a link to a folder, which a folder cannot replace, or a folder where the draft is a
            file.
    """
    if path.is_dir():
        refuse_link(path)
    draft = path.with_name(f".{path.name}.llmrec.draft")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(draft)
    try:
        yield draft
        if draft.is_dir() and path.is_dir():
            _remove(path)
        elif path.is_dir():
            raise LlmrecError(
                f"{path} is a folder, and a file is to be written there; move it away", kind="exists", at=path
            )
        draft.replace(path)
    finally:
        _remove(draft)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def loads(text: str | bytes) -> Any:
    """Parse JSON from a file.

    Raises:
        ValueError: If it is none; also if it nests deeper than Python reads, or holds half a character, which could not
            be written again.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if (rb"\ud" if isinstance(text, bytes) else r"\ud") in (text.lower()):  # type: ignore[operator]
        json.dumps(found, ensure_ascii=False).encode()
    return found


def write_json(path: Path, value: Any) -> str:
    """Write a JSON file in one step and return its sha256; NaN and infinities are refused."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_text(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        mend: What to do where it is damaged, for the error.

    Raises:
        LlmrecError: If it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        kind: ErrorKind = "missing-file" if isinstance(error, FileNotFoundError) else "unreadable"
        raise LlmrecError(f"{path} cannot be read ({error.strerror}); {mend}", kind=kind, at=path) from None
    except (ValueError, RecursionError) as error:
        raise LlmrecError(f"{path} is no JSON ({error}); {mend}", kind="damaged", at=path) from None
    if not isinstance(found, dict):
        raise LlmrecError(
            f"{path} holds a {type(found).__name__} where an object is expected; {mend}", kind="damaged", at=path
        )
    return found


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write a manifest of every file in a folder: what has one and verifies was written in full."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST and not file.name.endswith(".draft")
    }
    write_json(folder / MANIFEST, {"files": files})


def verifies(folder: Path) -> bool:
    """Whether a folder has a manifest, and every file that it lists is there with the same content."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(listed) and all(
            (folder / name).stat().st_size == entry["bytes"] and sha256_of(folder / name) == entry["sha256"]
            for name, entry in listed.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def refuse_link(path: Path) -> None:
    """Refuse a link where llmrec would write into, lock or remove what it leads to.

    Raises:
        LlmrecError: If the path is one.
    """
    if path.is_symlink():
        raise LlmrecError(
            f"{path} is a link, and llmrec writes to no other place through it; remove the link", kind="unsafe", at=path
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
