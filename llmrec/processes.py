"""Commands in several processes: number of processes, rank, reporting of failures, and starting of local processes.

`--launch N` starts processes by `start_programs`. Like torchrun and accelerate launch it sets the rank of processes
that train together in environment variables, which are read without importing torch. Training uses them in
`llmrec.train.world`.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple, TextIO

from llmrec.errors import LlmrecError, RecipeError, require

# Variables with the number of processes of other launchers, which accelerate also reads.
_COUNT_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_STORE_TIMEOUT = timedelta(seconds=10)
# Seconds between checks of processes that print nothing, and seconds to wait for a process to end.
_POLL_SECONDS, _STOP_SECONDS = 0.2, 30.0
# not available on every system
_KILL_GROUP = getattr(os, "killpg", None)
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def process_count() -> int:
    """Return the number of processes of this command; 1 without a launcher."""
    return max(map(_environment_number, _COUNT_VARIABLES))


def rank() -> int:
    """Return the rank of this process, from 0; 0 without a launcher."""
    return max(0, _environment_number("RANK", 0)) if process_count() > 1 else 0


def local_process_count() -> int:
    """Return the number of processes of this command on this machine."""
    return min(process_count(), _environment_number("LOCAL_WORLD_SIZE", process_count()))


def check_single_process(command: str) -> None:
    """Reject a launch in several processes.

    Args:
        command: The command that requires a single process, such as ``llmrec run``.

    Raises:
        RecipeError: If a launcher started several: each would write the same files.
    """
    if process_count() > 1:
        raise RecipeError(
            f"{command} requires a single process, but a launcher started {process_count()} (WORLD_SIZE); train with "
            "`llmrec train RECIPE --launch N`, and run all other commands without torchrun or accelerate launch",
            kind="unsupported",
        )


def is_first_to_fail() -> bool:
    """Whether this process is the first to fail; it reports the error, and the others end silently.

    The launcher stores the note, so that it outlives the process. If the launcher is gone, every process reports.
    """
    if process_count() == 1:
        return True
    with suppress(Exception):  # a lost connection must not hide the error
        store = require("torch.distributed", "train").TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, _STORE_TIMEOUT, False
        )
        return int(store.add(f"llmrec/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)) == 1
    return True


def lost_process_error(count: int) -> LlmrecError:
    """Return the error to raise if another process has ended."""
    return LlmrecError(
        f"training: another of the {count} processes ended, so this process stops too; run the same command again to "
        "resume at the last checkpoint, with any number of processes",
        kind="failed",
    )


def _environment_number(name: str, default: int = 1) -> int:
    text = os.environ.get(name, "").strip()
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else default


# --------------------------------------------------------------------------- local processes


@dataclass(frozen=True)
class Program:
    """A Python program to start.

    Attributes:
        words: Arguments of the interpreter, such as ``("-m", "llmrec", "train")``.
        environment: Variables that differ from those of this process.
        messages: The file for its error stream.
    """

    words: Sequence[str]
    environment: Mapping[str, str]
    messages: Path | TextIO


def thread_variables(count: int, cores: int) -> dict[str, str]:
    """Return the environment variables of processes that share cores, such as the number of threads."""
    # otherwise torch starts a thread per core in every process
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))}


class FailedProcess(NamedTuple):
    """A failed process: its index, from 0, and its exit status, which is negative for a signal."""

    process: int
    status: int

    @property
    def why(self) -> str:
        """How the process ended, as text."""
        if self.status >= 0:
            return f"ended with exit status {self.status}"
        name = signal.Signals(-self.status).name
        return f"was stopped by {name}{', probably because memory ran out' if name == 'SIGKILL' else ''}"


class ProcessEnded(Exception):
    """Raised if at least one of several processes failed."""

    def __init__(self, failed: Sequence[FailedProcess]) -> None:
        super().__init__(str(failed))
        self.failed = failed

    @property
    def first(self) -> FailedProcess:
        """The failure that caused the others: of a killed process, or else of the process with the lowest rank."""
        killed = [item for item in self.failed if item.status < 0 and item.status != -signal.SIGTERM]
        return (killed or list(self.failed))[0]


@contextmanager
def start_programs(programs: Sequence[Program], *, report_signals: bool = False) -> Iterator[Iterator[str]]:
    """Start programs, and yield the lines that they print until all have ended successfully.

    All are stopped when one fails, at the end of the block and at a signal. The standard input of a program ends with
    this process.

    Args:
        programs: What to start.
        report_signals: The programs report signals themselves, so this process ends without a message.

    Raises:
        ProcessEnded: If some fail, from the iterator.
    """
    with _raise_at_signals(report_signals), ExitStack() as files:
        children: list[subprocess.Popen[str]] = []
        files.callback(_stop_processes, children)
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for program in programs:
            messages = program.messages
            if isinstance(messages, Path):
                messages = files.enter_context(messages.open("w", encoding="utf-8"))
            child = subprocess.Popen(
                [sys.executable, *program.words],
                env={**os.environ, **program.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                encoding="utf-8",
                errors="replace",
                # Ctrl-C reaches only this process, which must stop the others and their children.
                start_new_session=True,
            )
            children.append(child)
            assert child.stdout is not None
            threading.Thread(target=_queue_lines, args=(child.stdout, lines), daemon=True).start()
        yield _iterate_lines(children, lines)


def _queue_lines(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _iterate_lines(children: Sequence[subprocess.Popen[str]], lines: queue.SimpleQueue[str | None]) -> Iterator[str]:
    reading = len(children)
    while True:
        statuses = [child.poll() for child in children]
        if failed := [FailedProcess(index, status) for index, status in enumerate(statuses) if status]:
            raise ProcessEnded(failed)
        if not reading and None not in statuses:
            return
        try:
            line = lines.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
        if line is None:
            reading -= 1
        else:
            yield line


def _stop_processes(children: Sequence[subprocess.Popen[str]]) -> None:
    """End processes; kill those that do not end, and their children."""
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.terminate()
    end = time.monotonic() + _STOP_SECONDS
    for child in running:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))
    for child in children:
        if child.poll() != 0:
            with suppress(OSError):
                # the children of a killed process keep running
                child.kill() if _KILL_GROUP is None else _KILL_GROUP(child.pid, signal.Signals["SIGKILL"])
            child.wait()
        assert child.stdin is not None
        with suppress(OSError):
            child.stdin.close()


class _Signalled(BaseException):
    """Raised when a signal ends this process."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _raise_at_signals(ends: bool) -> Iterator[None]:
    """Raise an exception in the block at a terminating signal, and then handle the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Signals that a shell ignores for background jobs stay ignored.
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}

    def leave(number: int, _: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise _Signalled(number)

    for number in before:
        signal.signal(number, leave)
    received: _Signalled | None = None
    try:
        yield
    except _Signalled as error:
        received = error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received is not None:
        if not ends:
            signal.raise_signal(received.number)
        sys.exit(128 + received.number)


def end_with_parent() -> None:
    """End this child process by SIGTERM when its parent has ended.

    Engines are closed then. Otherwise a process whose parent was killed would hold its GPU.
    """

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_STOP_SECONDS)
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True).start()
