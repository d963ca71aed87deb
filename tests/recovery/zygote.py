"""Forks commands from a process that has imported the heavy libraries, and kills them at given times.

Forking takes tenths of a second, a cold start half a minute. The zygote computes nothing itself, so that no thread pool
is forked. Each order is a line of JSON with children that run in parallel.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_TICK = 0.01


@dataclass(frozen=True, kw_only=True)
class Child:
    """A command to run.

    Attributes:
        words: Arguments of ``llmrec``.
        log: The file to which its output is appended.
        delay: Seconds until it starts.
        after: Processor time in seconds until its SIGKILL; None: no kill.
        point: A named point of ``tests.recovery.points`` at which it kills itself.
        fsize: Maximum file size in bytes; None: unlimited.
        env: Additional environment variables.
        keeps: Whether all fits are stored, even fast ones.
    """

    words: Sequence[str]
    log: str
    delay: float = 0.0
    after: float | None = None
    point: str | None = None
    fsize: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    keeps: bool = False


@dataclass(frozen=True)
class Ended:
    """The exit status of a command (-9 for a kill), its wall-clock time and its processor time."""

    status: int
    seconds: float
    used: float

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL


class Zygote:
    """A process that forks children; see the module."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.recovery.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def do(self, *children: Child) -> list[Ended]:
        """Run children in parallel and return how each ended."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([asdict(each) for each in children]) + "\n")
        self._process.stdin.flush()
        return [Ended(**each) for each in json.loads(self._process.stdout.readline())]

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
    import llmrec.bench.suite
    import llmrec.exports.export
    import llmrec.pipeline.augmenting
    import llmrec.pipeline.run
    import llmrec.train.sft  # noqa: F401

    # Freeze: otherwise garbage collection in a child visits, and thus copies, the libraries' objects.
    gc.freeze()
    for line in sys.stdin:
        found = _together([Child(**each) for each in json.loads(line)])
        sys.stdout.write(json.dumps([asdict(each) for each in found]) + "\n")
        sys.stdout.flush()


def _together(children: Sequence[Child]) -> list[Ended]:
    """Fork children at their start times, kill them at their limits, and wait for all."""
    start = time.monotonic()
    begun: dict[int, tuple[int, float]] = {}
    ended: dict[int, Ended] = {}
    while len(ended) < len(children):
        now = time.monotonic()
        for place, child in enumerate(children):
            if place not in begun and now - start >= child.delay:
                begun[place] = _fork(child), time.monotonic()
        for place, (process, begin) in begun.items():
            if place in ended:
                continue
            found, status, spent = os.wait4(process, os.WNOHANG)
            after = children[place].after
            if not found and after is not None and _used(process) >= after:
                os.kill(process, signal.SIGKILL)
                found, status, spent = os.wait4(process, 0)
            if found:
                used = spent.ru_utime + spent.ru_stime
                ended[place] = Ended(os.waitstatus_to_exitcode(status), time.monotonic() - begin, used)
        time.sleep(_TICK)
    return [ended[place] for place in range(len(children))]


def _used(process: int) -> float:
    """Return the processor time of a process in seconds."""
    after = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(after[11]) + int(after[12])) / os.sysconf("SC_CLK_TCK")


def _fork(child: Child) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(child.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _command(child)
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


def _command(child: Child) -> None:
    import resource

    import torch

    from llmrec.baselines import fits as store
    from llmrec.cli import main as cli

    torch.set_num_threads(1)
    os.environ.update(child.env)
    if child.point:
        from tests.recovery import points

        points.arm(child.point)
    if child.keeps:
        _set(store, "LEAST", 0.0)
    if child.fsize is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (child.fsize, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.argv = ["llmrec", *child.words]
    cli.main()


def _set(module: Any, name: str, value: object) -> None:
    setattr(module, name, value)


if __name__ == "__main__":
    _serve()
