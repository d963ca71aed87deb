"""Fetches a published data set once, and reads single members of its archive.

Nothing is ever unpacked to disk: only members that are named in the code are read, with a cap on their size.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from llmrec.data.opening import BROKEN, Capped, archived, reason
from llmrec.errors import DataError

_TIMEOUT = 30
_MAX_ARCHIVE = 64 * 2**20
_MAX_MEMBER = 256 * 2**20
_CHUNK = 2**20


def fetch(url: str, target: Path, *, md5: str | None = None) -> None:
    """Download a file under a temporary name, check it, then move it to its place.

    Args:
        url: Where it is published.
        target: Where it goes.
        md5: Its published checksum, if there is one.

    Raises:
        DataError: If it cannot be fetched or written, is too large, or is not the published file.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    except OSError as error:
        raise DataError(
            f"the download folder {target.parent} cannot be written ({reason(error)}); set LLMREC_CACHE"
        ) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out, urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            size = 0
            while chunk := answer.read(_CHUNK):
                size += len(chunk)
                if size > _MAX_ARCHIVE:
                    raise DataError(f"{url} is larger than {_MAX_ARCHIVE} bytes, so it is not the published file")
                digest.update(chunk)
                out.write(chunk)
        if md5 is not None and digest.hexdigest() != md5:
            raise DataError(f"{url} has the MD5 {digest.hexdigest()} and not the published {md5}; try again later")
        part.replace(target)
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(f"{url} cannot be fetched ({reason(error)})") from error
    finally:
        part.unlink(missing_ok=True)


def members(archive: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Read named members of a zip file; those it lacks are left out.

    Args:
        archive: The zip file.
        names: Full names inside it, such as ``ml-100k/u.data``.

    Returns:
        The members' bytes by their last name part, such as ``u.data``.

    Raises:
        DataError: If the archive is damaged or a member is too large.
    """
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(archive) as pack:
            held = {entry.filename: entry for entry in archived(archive, pack)}
            for name in names:
                if name in held:
                    with pack.open(name) as stream:
                        capped = Capped(f"{archive}: {name}", stream, held[name].compress_size, _MAX_MEMBER)  # type: ignore[arg-type]
                        found[name.rsplit("/", 1)[-1]] = capped.read()
    except (*BROKEN, ValueError) as error:
        raise DataError(
            f"{archive} is not a readable zip archive ({reason(error)}); delete it and try again"
        ) from error
    return found
