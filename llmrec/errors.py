"""Expected failures: one paragraph that names the thing and the fix, never a traceback."""

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
    "missing-file",  # it is not there
    "unreadable",  # it is no file, or may not be read or written
    "exists",  # it is there and is not written over
    "unreachable",  # it cannot be fetched
    "damaged",  # it breaks off, or is not what was stored
    "wrong-format",  # it is something else
    "unsafe",  # an archive or a link that plays tricks, a text that forges tokens, what must not be handed out
    "too-large",  # for a limit, or for what a model reads at once
    "empty",
    "ambiguous",  # several could be meant
    # rows and columns
    "usage",  # a command line that cannot be read
    "syntax",  # no JSON, CSV, YAML or template
    "encoding",  # bytes or characters that are no text
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
    "contradiction",  # keys that do not go together
    "not-installed",
    # runs and engines
    "unsupported",  # this model, engine or template cannot do it
    "mismatch",  # of two runs, models or protocols that must be one
    "failed",  # a training, an engine or an address that broke down, or refused
    "exhausted",  # disk, budget or codes that do not suffice
    "busy",  # another process holds it
    "closed",  # it was closed and is used again
    "defect",  # a component that broke its contract
    "leak",  # the audit found one
]
"""What is wrong, for programs."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands; as text it is ``ratings.csv, row 3 (line 4)``.

    Attributes:
        file: What errors call it: a path, one inside an archive, an address, or the name of a template or data set.
        row: Row of data, counted from 1; 0 is the header.
        line: Line of the file, counted from 1.
    """

    file: str
    row: int | None = None
    line: int | None = None

    def __str__(self) -> str:
        """Name the row, and the line where it is another number."""
        if self.row == 0:
            return f"{self.file}, header"
        if self.row is None:
            return self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{self.file}, row {self.row}" + (f" (line {self.line})" if self.line not in (None, self.row) else "")


class LlmrecError(Exception):
    """Base of every failure that a user can fix; the command line prints it and exits with 2.

    The message is for people; programs and tests look at the facts, each None where there is none to tell.

    Attributes:
        kind: What is wrong.
        file: What stands at fault; see `Place`.
        row: Row of data, counted from 1; 0 is the header.
        line: Line of the file, counted from 1.
        column: The column, the dotted key of a recipe, or the option of a command.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: ErrorKind | None = None,
        at: Place | Path | str | None = None,
        column: str | None = None,
    ) -> None:
        super().__init__(message)
        place = at if isinstance(at, Place) else None
        self.kind = kind
        self.file = place.file if place else None if at is None else str(at)
        self.row, self.line = (place.row, place.line) if place else (None, None)
        self.column = column

    @property
    def place(self) -> Place | None:
        """Where it stands, for an error that carries this one further."""
        return None if self.file is None else Place(self.file, self.row, self.line)

    @classmethod
    def at(cls, place: Place | Path | str, kind: ErrorKind, rest: str, column: str | None = None) -> Self:
        """Return an error whose message is the place and the rest of the sentence behind it."""
        return cls(f"{place}{rest}", kind=kind, at=place, column=column)


class RecipeError(LlmrecError):
    """A recipe, an override or a template that cannot be used as written."""


class DataError(LlmrecError):
    """A data file, row or column that cannot be used as it stands."""


class ModelError(LlmrecError):
    """A model or tokenizer that cannot be found or loaded."""


class BackendError(LlmrecError):
    """A backend that cannot do what was asked of it, or that died."""


class EngineFailure(BackendError):
    """An engine that did not start, or that broke down: nothing is wrong with the question that it was asked.

    The message says what happened and, after a semicolon, what to do.
    """

    @property
    def reason(self) -> str:
        """What happened."""
        return str(self).partition(";")[0]


class MissingExtra(LlmrecError):
    """An optional package that is not installed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def installed(package: str) -> bool:
    """Whether an optional package is installed; it is not imported."""
    return find_spec(package) is not None


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module at the door.

    Args:
        module: Dotted name of the module, such as ``"peft"``.
        extra: The extra of llmrec that installs it.

    Raises:
        MissingExtra: If it is not installed; the message holds the install command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"this needs the package {module.split('.')[0]!r}, which cannot be imported ({error}). "
            f"Install it with: pip install 'llmrec[{extra}]'",
            kind="not-installed",
        ) from error
