"""Ends the processes of a vLLM engine if its owner died without ending them; uses only the standard library.

vLLM's engine core runs in a separate process and does not notice that its parent was killed: it stays forever, with its
memory and its worker. So the owner starts this file as a small program, writes one line for each process of its engine
to the program's input, and ``quit`` once the engine is closed. If the owner dies instead, by any signal, all named
processes are killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from pathlib import Path

# Seconds between two checks of the owner.
_CHECK_SECONDS = 0.5


def start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if the process does not exist.

    A process id can be reused later; together with the start time it is unique.
    """
    fields = _read_process_fields(pid)
    return fields[19] if fields else None


def is_resource_tracker(pid: int) -> bool:
    """Whether a process is Python's resource tracker, which unlinks shared memory once all others are gone."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _read_process_fields(pid: int) -> list[str]:
    """Return the fields of ``/proc/<pid>/stat`` from field 3 (state) on; empty if the process does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # The name in parentheses may itself contain spaces and parentheses.
    return text.rpartition(")")[2].split()


def _add_child_processes(known: dict[int, str]) -> dict[int, str]:
    """Add child processes that the owner had no time to report."""
    live = {pid: start for pid, start in known.items() if start_time(pid) == start}
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    parents = {pid: int(fields[1]) for pid in pids if (fields := _read_process_fields(pid))}
    result = set(live)
    while more := {pid for pid, parent in parents.items() if parent in result} - result:
        result |= more
    return live | {
        pid: start for pid in result - set(live) if not is_resource_tracker(pid) and (start := start_time(pid))
    }


def watch_owner(owner: int, source: int) -> dict[int, str]:
    """Read lines ``<pid> <start time>`` until the owner ends or writes ``quit``; return the processes to kill."""
    known: dict[int, str] = {}
    rest = b""
    # The end of input is not sufficient, because a forked engine keeps the writing end open.
    while True:
        ended = os.getppid() != owner
        ready, _, _ = select.select([source], [], [], 0 if ended else _CHECK_SECONDS)
        if not ready:
            # What the owner wrote before it ended has been read.
            if ended:
                break
            continue
        data = os.read(source, 65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line == b"quit":
                return {}
            pid, _, start = line.decode("ascii").partition(" ")
            known[int(pid)] = start
    return _add_child_processes(known)


def main() -> None:
    """Watch the process whose id is the first argument."""
    for pid, start in watch_owner(int(sys.argv[1]), sys.stdin.fileno()).items():
        if start_time(pid) == start:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
