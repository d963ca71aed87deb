"""Runs the command line in the test's process, and returns its output and exit code."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass
from unittest import mock

from llmrec.cli import main as cli


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def llmrec(*args: str) -> Done:
    """Run a command in this process, which saves imports; unexpected exceptions are raised.

    With ``--json`` it runs in a new process, since it redirects the file descriptor of standard output.
    """
    if "--json" in args:
        done = subprocess.run([sys.executable, "-m", "llmrec", *args], capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["llmrec", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    return Done(code, out.getvalue(), err.getvalue())
