"""Runs a function in several forked processes, in the environment that torchrun sets."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

_PATIENCE = 120.0


def together(count: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """Run a function in several processes, and return its results.

    Args:
        count: The number of processes.
        work: Its result must be JSON. For a killed process, or an error, which is printed, the result is None.
        folder: An empty folder, for results and tracebacks.
    """
    folder.mkdir(parents=True)
    # Like the launcher's, the store outlives its users.
    store = TCPStore("localhost", 0, None, True, wait_for_workers=False)
    environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    environment |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    children = [
        _forked({**environment, "RANK": str(n), "LOCAL_RANK": str(n)}, work, folder / str(n)) for n in range(count)
    ]
    end = time.monotonic() + _PATIENCE
    while children and time.monotonic() < end:
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        time.sleep(0.02)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not children, "a process hangs"
    for file in sorted(folder.glob("*.txt")):
        sys.stderr.write(file.read_text(encoding="utf-8"))
    files = [(folder / str(n)).with_suffix(".json") for n in range(count)]
    return [json.loads(file.read_text(encoding="utf-8")) if file.exists() else None for file in files]


def _forked(environment: dict[str, str], work: Callable[[], Any], path: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment)
        path.with_suffix(".json").write_text(json.dumps(work()), encoding="utf-8")
        status = 0
    except BaseException:
        path.with_suffix(".txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(status)
