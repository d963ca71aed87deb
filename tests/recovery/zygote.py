"""Forks commands from a process that has imported the large libraries, which is much faster than a cold start.

The zygote computes nothing, so it has no threads. Each command is a line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


class Zygote:
    """A process that forks children."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.recovery.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def do(self, args: Sequence[str], log: Path, point: str | None = None) -> int:
        """Run a command with its output in a log, and return its exit status, -9 for a kill at a named point."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"args": list(args), "log": str(log), "point": point}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the zygote."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def zygote() -> Iterator[Zygote]:
    """Run a zygote for a block."""
    started = Zygote()
    try:
        yield started
    finally:
        started.close()


# --------------------------------------------------------------------------- in the zygote


def _serve() -> None:
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401
    import trl  # noqa: F401

    import llmrec.answer.rank.run
    import llmrec.exports.export
    import llmrec.pipeline.run
    import llmrec.train.sft  # noqa: F401

    # Otherwise garbage collection in a child copies the objects of the libraries.
    gc.freeze()
    for line in sys.stdin:
        _, status = os.waitpid(_fork(**json.loads(line)), 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _fork(args: Sequence[str], log: str, point: str | None) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _command(args, point)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _command(args: Sequence[str], point: str | None) -> None:
    import torch

    from llmrec.cli import main as cli

    torch.set_num_threads(1)
    if point:
        from tests.recovery import points

        points.arm(point)
    sys.argv = ["llmrec", *args]
    cli.main()


if __name__ == "__main__":
    _serve()
