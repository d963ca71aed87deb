"""API keys of a service, and rate limits.

A key has 256 random bits and is not stored: the file has SHA-256 digests. A slow hash, as for passwords, is not
needed: 256 random bits cannot be guessed, however fast the hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from llmrec.data.read.limits import check_regular_file, format_error, format_value
from llmrec.durable import check_not_link, replace_atomically
from llmrec.errors import DataError, LlmrecError, did_you_mean
from llmrec.machine import NO_LINK_FLAGS, try_lock

KEY_PREFIX = "llmrec_"
"""Prefix of every key, which helps to detect leaked keys in logs and repositories."""
FORMAT_VERSION = 1

_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
_MAX_FILE_BYTES = 16 * 2**20
"""Maximum size of a key file in bytes."""
_RELOAD_SECONDS = 1.0
"""Seconds after which the file is checked again for changes."""
_MAX_BUCKETS = 65_536
"""Maximum number of names whose requests are counted at a time."""
_TOKEN_TOLERANCE = 1e-6
"""Rounding tolerance in tokens, so that a client that waits as requested is admitted."""


class Key(BaseModel):
    """An API key.

    Attributes:
        name: Its owner, shown in logs.
        sha256: The digest of the key, in hexadecimal.
        admin: Whether it may change the data of the service.
        created: The time of creation, UTC, in ISO 8601.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Annotated[str, StringConstraints(pattern=_NAME_PATTERN)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    admin: bool
    created: str


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    keys: Annotated[list[Key], Field(max_length=100_000)]


# Properties that change with a file: time, size, inode and permissions.
_FileStamp: TypeAlias = tuple[int, int, int, int]


# --------------------------------------------------------------------------- the file


def create_key(file: Path, name: str, *, admin: bool = False) -> str:
    """Create an API key and add it to a key file, which is created if missing.

    Args:
        file: The key file; only its owner may read it.
        name: The owner: up to 64 letters, digits and ``. _ @ -``.
        admin: Whether it may change the data of the service.

    Returns:
        The key. It is not stored, and cannot be shown again.
    """
    if not re.fullmatch(_NAME_PATTERN, name):
        raise DataError(
            f"{format_value(name)} is not a valid name for a key; use 1 to 64 letters, digits and . _ @ -, starting "
            "with a letter or digit",
            kind="bad-value",
            column="name",
        )
    with _lock_key_file(file, make=True) as known:
        if any(key.name == name for key in known):
            raise LlmrecError(
                f"{file} already contains a key named {name!r}; revoke it first, or choose another name",
                kind="duplicate",
                at=file,
                column="name",
            )
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        _write_keys(file, [*known, Key(name=name, sha256=_key_digest(secret), admin=admin, created=created)])
    return secret


def revoke_key(file: Path, name: str) -> None:
    """Remove an API key from a file; a running service rejects it within a second."""
    with _lock_key_file(file, make=False) as known:
        kept = [key for key in known if key.name != name]
        if len(kept) == len(known):
            guess = did_you_mean(name, [key.name for key in known])
            raise LlmrecError(
                f"{file} contains no key named {format_value(name)}{guess}",
                kind="unknown-name",
                at=file,
                column="name",
            )
        _write_keys(file, kept)


@contextmanager
def _lock_key_file(file: Path, *, make: bool) -> Iterator[tuple[Key, ...]]:
    """Lock a key file, and yield its keys; with ``make``, a missing file has no keys."""
    check_not_link(file)
    if not make:
        _read_keys(file)
    guard = file.with_name(f".{file.name}.lock")
    check_not_link(guard)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(guard, os.O_RDWR | os.O_CREAT | NO_LINK_FLAGS, 0o600)
        try:
            if not try_lock(handle):
                raise LlmrecError(
                    f"another process is writing to {file}; wait until it has finished", kind="busy", at=file
                )
            yield _read_keys(file)[1] if file.exists() else ()
        finally:
            os.close(handle)
    except OSError as error:
        raise LlmrecError(
            f"cannot write the key file {file} ({format_error(error)}); make it writable, or choose another file",
            kind="unreadable",
            at=file,
        ) from error


def _write_keys(file: Path, keys: Sequence[Key]) -> None:
    text = json.dumps({"format": FORMAT_VERSION, "keys": [key.model_dump() for key in keys]}, indent=1) + "\n"
    with replace_atomically(file) as draft:
        # Other users must not be able to read the file at any time.
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


def _read_keys(file: Path) -> tuple[_FileStamp, tuple[Key, ...]]:
    """Read a key file, and return its properties and keys."""
    check_regular_file(file, "create it with llmrec serve-key, or choose another file", "the key file")
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            raw = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise LlmrecError(
            f"cannot read the key file {file} ({format_error(error)}); make it readable for the service, such as with "
            "chmod u+r",
            kind="unreadable",
            at=file,
        ) from error
    if status.st_mode & 0o077:
        raise LlmrecError(
            f"the key file {file} is accessible to other users; run: chmod 600 {file}",
            kind="unsafe",
            at=file,
        )
    return _file_stamp(status), _parse_keys(file, raw)


def _parse_keys(file: Path, raw: bytes) -> tuple[Key, ...]:
    if len(raw) > _MAX_FILE_BYTES:
        raise LlmrecError(f"{file} is too large for a key file; use another file", kind="too-large", at=file)
    fix = "restore a copy, or move it away and create new keys"
    try:
        result = json.loads(raw)
        if isinstance(result, dict) and type(result.get("format")) is int and result["format"] > FORMAT_VERSION:
            raise LlmrecError(
                f"{file} was written by a newer llmrec (format {result['format']}, this version supports "
                f"{FORMAT_VERSION}); upgrade: pip install -U llmrec",
                kind="unsupported",
                at=file,
            )
        keys = tuple(_KeyFile.model_validate(result).keys)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise LlmrecError(
            f"{file} is not a key file, or is damaged ({where or 'file'}: {first['msg']}); {fix}",
            kind="damaged",
            at=file,
            column=where or None,
        ) from None
    except (ValueError, RecursionError) as error:
        raise LlmrecError(f"{file} is not JSON ({format_error(error)}); {fix}", kind="damaged", at=file) from None
    duplicate = len({key.name for key in keys}) < len(keys)
    if duplicate:
        raise LlmrecError(
            f"{file} contains two keys of the same name; rename one of them", kind="duplicate", at=file, column="name"
        )
    return keys


def _file_stamp(status: os.stat_result) -> _FileStamp:
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode


def _key_digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


# --------------------------------------------------------------------------- authentication


class Keys:
    """The keys of a file, which is reloaded after changes; thread-safe."""

    def __init__(self, file: Path, stamp: _FileStamp, keys: tuple[Key, ...]) -> None:
        self._file, self._stamp, self._keys = file, stamp, keys
        self._lock = Lock()
        self._looked = time.monotonic()

    @classmethod
    def read(cls, file: Path) -> Keys:
        """Read the keys of a file.

        Raises:
            LlmrecError: If the file is invalid, or others than its owner may read or write it.
        """
        return cls(file, *_read_keys(file))

    def __len__(self) -> int:
        """The number of keys at the last read."""
        return len(self._keys)

    def find(self, presented: str, now: float | None = None) -> Key | None:
        """Return the key with a given secret; None if it is unknown.

        Args:
            presented: The secret in a request.
            now: Seconds of a monotonic clock; by default the machine's.

        Raises:
            LlmrecError: If the file has changed and is invalid now. Revoked keys must not be accepted, so all keys are
                rejected until it is fixed.
        """
        digest = _key_digest(presented)
        result = None
        # All keys are compared in constant time, to prevent timing attacks.
        for key in self._current_keys(time.monotonic() if now is None else now):
            if hmac.compare_digest(key.sha256, digest):
                result = key
        return result

    def _current_keys(self, now: float) -> tuple[Key, ...]:
        with self._lock:
            if now - self._looked >= _RELOAD_SECONDS:
                try:
                    seen = _file_stamp(self._file.stat())
                except OSError:
                    seen = None  # reading the file reports the reason
                if seen != self._stamp:
                    self._stamp, self._keys = _read_keys(self._file)
                # Set only after success, so that each request checks an invalid file again.
                self._looked = now
            return self._keys


# --------------------------------------------------------------------------- rate limits


class RateLimit:
    """A token bucket per name; thread-safe.

    A bucket fills steadily, and each request takes a token. The buckets of the 65,536 most recent names are kept; a
    new bucket is full.

    Args:
        per_minute: Tokens added per minute.
        burst: The capacity of a bucket.
    """

    def __init__(self, per_minute: int, burst: int) -> None:
        self._rate, self._burst = per_minute / 60, float(burst)
        self._lock = Lock()
        # The remaining tokens and their time by name, most recent last.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, now: float | None = None) -> float:
        """Take the token for a request, or return the time to wait.

        Args:
            name: The name of the bucket.
            now: Seconds of a monotonic clock; by default the machine's.

        Returns:
            0.0 if the request is accepted; else the seconds to wait, without taking a token.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            left, since = self._left.get(name, (self._burst, now))
            left = min(self._burst, left + max(0.0, now - since) * self._rate)
            lacking = 1.0 - left
            allowed = lacking <= _TOKEN_TOLERANCE
            # A clock that was set back must not add tokens twice.
            self._left[name] = (left - 1.0 if allowed else left, max(now, since))
            self._left.move_to_end(name)
            if len(self._left) > _MAX_BUCKETS:
                self._left.popitem(last=False)
            return 0.0 if allowed else lacking / self._rate
