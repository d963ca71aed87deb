"""The command line in the process of a test: what it prints, and how it ends."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO
from unittest import mock

from llmrec.cli import main as cli


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def llmrec(*args: str) -> Done:
    """Run a command as a process of its own would, without importing everything again; a defect is raised."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        _descriptor() as written,
        mock.patch.object(sys, "argv", ["llmrec", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        written.seek(0)
        answer, words = written.read().decode(), out.getvalue()
    # With --json all but the object goes to the error stream, by the descriptor, which words of Python pass by here.
    asks_for_json = "--json" in args
    return Done(code, answer if asks_for_json else words + answer, err.getvalue() + (words if asks_for_json else ""))


@contextlib.contextmanager
def _descriptor() -> Iterator[BinaryIO]:
    """Collect what is written to the descriptor of the standard output, as ``--json`` does, and put it back."""
    with tempfile.TemporaryFile() as written:
        kept = os.dup(1)
        os.dup2(written.fileno(), 1)
        try:
            yield written
        finally:
            os.dup2(kept, 1)
            os.close(kept)
