"""Runs a function in several forked processes, in the environment that torchrun gives its processes."""

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
    """Return what the function returned in each of so many processes.

    Args:
        count: How many.
        work: Returns what JSON can hold. What a process with SIGKILL, or an error, which is printed, leaves is None.
        folder: An empty folder, for what is returned and for tracebacks.
    """
    folder.mkdir(parents=True)
    # Like the launcher's, the store outlives whoever uses it.
    store = TCPStore("localhost", 0, None, True, wait_for_workers=False)
    told = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    told |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    children = [_forked({**told, "RANK": str(n), "LOCAL_RANK": str(n)}, work, folder / str(n)) for n in range(count)]
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


def _forked(told: dict[str, str], work: Callable[[], Any], place: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(told)
        place.with_suffix(".json").write_text(json.dumps(work()), encoding="utf-8")
        status = 0
    except BaseException:
        place.with_suffix(".txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(status)
