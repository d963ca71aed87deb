"""A watched worker process: its responses, hangs and crashes."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 10
"""Maximum processor time of a call."""
BYTES = 2 * 2**30
"""Maximum address space of a worker, in addition to its libraries."""
_STARTING = 300  # limit in seconds for the first call, which imports libraries
_WAITED = 120  # additional wall-clock seconds for a call that uses no processor time
_TICK = os.sysconf("SC_CLK_TCK")
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "LLMREC_FITS": "off",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "POLARS_MAX_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


class Worker:
    """One process that makes calls of one surface."""

    def __init__(self, most: int = BYTES) -> None:
        self._most = most
        self._process: subprocess.Popen[bytes] | None = None
        self._first: list[dict[str, Any]] = []

    def warm(self, first: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Make valid calls, and then limit memory; also after a restart of the worker."""
        self._first = [request | {"bytes": self._most if request is first[-1] else None} for request in first]
        return [self._call(request, seconds=_STARTING) for request in self._first]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the outcome of a call."""
        if self._process is None:
            for first in self._first:
                self._call(first, seconds=_STARTING)
        return self._call(request, seconds=SECONDS)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _call(self, request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin and process.stdout
        begin, used = time.monotonic(), _used(process.pid)
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while not ready.select(timeout=0.5):
                if _used(process.pid) - used > seconds or time.monotonic() - begin > _WAITED + seconds:
                    self.close()
                    return {"how": "hang", "says": f"{time.monotonic() - begin:.0f} s"}
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self.close()
            return {"how": "death", "says": f"exit status {code}"}
        answer: dict[str, Any] = json.loads(line)
        return answer | {"seconds": _used(process.pid) - used}

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "eval.benchmarks.campaign.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_QUIET},
        )
        return self._process


def _used(pid: int) -> float:
    """Return the processor time of a process in seconds."""
    try:
        after = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after[11]) + int(after[12])) / _TICK
