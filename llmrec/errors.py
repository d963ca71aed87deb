"""Errors that users can fix: messages name the cause and the fix, and are shown without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal, Self

ErrorKind = Literal[
    # files and folders
    "missing-file",  # it does not exist
    "unreadable",  # not a file, or no permission
    "exists",  # it exists and is not overwritten
    "unreachable",  # it cannot be downloaded
    "damaged",  # truncated, or not the stored content
    "wrong-format",  # another format
    "unsafe",  # a malicious archive or link, a text with control tokens, a protected file
    "too-large",  # above a limit or a model's context length
    "empty",
    "ambiguous",  # several matches
    # rows and columns
    "usage",  # an invalid command line
    "syntax",  # invalid JSON, CSV, YAML or template
    "encoding",  # bytes or characters that are not text
    "ragged-row",
    "missing-column",
    "missing-value",
    "bad-value",
    "duplicate",
    "too-few",  # rows, users or items
    # recipes and names
    "missing-key",
    "unknown-key",
    "unknown-name",
    "contradiction",  # incompatible keys
    "not-installed",
    # runs and engines
    "unsupported",  # not supported by this model, engine or template
    "mismatch",  # two runs, models or protocols that must be equal
    "failed",  # a training, engine or server that failed or refused
    "exhausted",  # not enough disk space, budget or codes
    "busy",  # locked by another process
    "closed",  # used after it was closed
    "defect",  # a component that violates its interface
    "leak",  # found by the audit
]
"""The kind of an error, for programs."""


@dataclass(frozen=True, slots=True)
class Location:
    """A location in a file, written as ``ratings.csv, row 3 (line 4)``.

    Attributes:
        file: Its name in errors: a path, also inside an archive, a URL, or the name of a template or data set.
        row: Row of data, counted from 1; 0 is the header.
        line: Line of the file, counted from 1.
    """

    file: str
    row: int | None = None
    line: int | None = None

    def __str__(self) -> str:
        """Return file and row, with the line if its number differs."""
        if self.row == 0:
            return f"{self.file}, header"
        if self.row is None:
            return self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{self.file}, row {self.row}" + (f" (line {self.line})" if self.line not in (None, self.row) else "")


class LlmrecError(Exception):
    """Base class of errors that users can fix; the command line prints the message and exits with status 2.

    The message is for people; programs and tests use the attributes, each None if unknown.

    Attributes:
        kind: The kind of error.
        file: The file at fault; see `Location`.
        row: Row of data, counted from 1; 0 is the header.
        line: Line of the file, counted from 1.
        column: The column, the dotted key of a recipe, or the option of a command.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: ErrorKind | None = None,
        at: Location | Path | str | None = None,
        column: str | None = None,
    ) -> None:
        super().__init__(message)
        location = at if isinstance(at, Location) else None
        self.kind = kind
        self.file = location.file if location else None if at is None else str(at)
        self.row, self.line = (location.row, location.line) if location else (None, None)
        self.column = column

    @property
    def location(self) -> Location | None:
        """Location of the error, for an error that wraps this one."""
        return None if self.file is None else Location(self.file, self.row, self.line)

    def reworded(self, message: str) -> Self:
        """Return the same error with another message."""
        return type(self)(message, kind=self.kind, at=self.location, column=self.column)

    @classmethod
    def at(cls, location: Location | Path | str, kind: ErrorKind, rest: str, column: str | None = None) -> Self:
        """Return an error whose message begins with a location."""
        return cls(f"{location}{rest}", kind=kind, at=location, column=column)


class RecipeError(LlmrecError):
    """Raised for an invalid recipe, override or template."""


class DataError(LlmrecError):
    """Raised for an invalid data file, row or column."""


class ModelError(LlmrecError):
    """Raised for a model or tokenizer that cannot be found or loaded."""


class BackendError(LlmrecError):
    """Raised if a backend does not support a request or has stopped."""


class EngineFailure(BackendError):
    """Raised if an engine does not start or crashes, whatever the request.

    The message has the cause and, after a semicolon, the fix.
    """

    @property
    def reason(self) -> str:
        """The cause."""
        return str(self).partition(";")[0]


class MissingExtra(LlmrecError):
    """Raised if an optional package is not installed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` with the closest known word; empty if none is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_installed(package: str) -> bool:
    """Whether an optional package is installed, checked without an import."""
    return find_spec(package) is not None


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, before any work begins.

    Args:
        module: Dotted name of the module, such as ``"peft"``.
        extra: The extra of llmrec that installs it.

    Raises:
        MissingExtra: If it is not installed; the message has the install command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"the required package {module.split('.')[0]!r} cannot be imported ({error}). "
            f"Install it with: pip install 'llmrec[{extra}]'",
            kind="not-installed",
        ) from error
