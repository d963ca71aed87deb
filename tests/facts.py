"""Checks of errors by their facts, what is wrong and where, instead of their wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import pytest

from llmrec.errors import ErrorKind, LlmrecError

Error = TypeVar("Error", bound=LlmrecError)


@dataclass(frozen=True)
class Facts:
    """What an error must state; None is not checked.

    Attributes:
        kind: What is wrong.
        file: The last part of its name, or all of it.
        row: Row of data; 0 is the header.
        column: Column or key.
        line: Line of the file.
        says: What the message must contain, such as the fix or the choices.
    """

    kind: ErrorKind
    file: str | Path | None = None
    row: int | None = None
    column: str | None = None
    line: int | None = None
    says: str | tuple[str, ...] = ()

    def check(self, error: LlmrecError) -> None:
        """Assert that an error has these facts, and a message of one line."""
        assert error.kind == self.kind, error
        if self.file is not None:
            assert str(self.file) in (error.file, Path(error.file or "").name), error
        for name in ("row", "column", "line"):
            wanted = getattr(self, name)
            assert wanted is None or getattr(error, name) == wanted, (name, getattr(error, name), error)
        assert "\n" not in str(error)
        for part in (self.says,) if isinstance(self.says, str) else self.says:
            assert part in str(error)


class Caught(Generic[Error]):
    """Holds the raised error."""

    value: Error


@contextmanager
def raises(error: type[Error], facts: Facts) -> Iterator[Caught[Error]]:
    """Expect an error with these facts."""
    held: Caught[Error] = Caught()
    with pytest.raises(error) as caught:
        yield held
    held.value = caught.value
    facts.check(caught.value)
