"""Differences between systems: locks, memory, and imports without the modules that only Linux has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from llmrec import machine

# What Windows or macOS lack: modules, and names of os and signal.
ABSENT = ("fcntl", "resource", "pwd", "grp", "termios")
LACKING = frozenset(
    {"sched_getaffinity", "sched_setaffinity", "getloadavg", "nice", "fork", "killpg", "getuid", "geteuid", "setsid"}
    | {"O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY", "SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1"}
)
# vLLM only runs on Linux, and make calls setup_env to create the environment of a checkout.
# The reader of spreadsheets is a separate process that imports no llmrec; without /proc its memory is not bounded.
LINUX = ("llmrec/backends/vllm", "llmrec/setup_env.py", "llmrec/machine.py", "llmrec/data/read/sheet_process.py")
ROOT = Path(__file__).parent.parent

# Only imports of llmrec are refused: other packages are builds for this system.
PROGRAM = f"""
import builtins, importlib, pkgutil
real = builtins.__import__
def without(name, globals=None, *rest, **more):
    if name in {ABSENT} and (globals or {{}}).get("__name__", "").startswith("llmrec"):
        raise ImportError(name)
    return real(name, globals, *rest, **more)
builtins.__import__ = without
import llmrec
for found in pkgutil.walk_packages(llmrec.__path__, "llmrec."):
    # Those of training load torch, which takes seconds, and what they import is looked at above.
    if not found.name.startswith(("llmrec.backends.vllm", "llmrec.train.", "llmrec._shipped", "llmrec.__main__")):
        importlib.import_module(found.name)
print("imported")
"""


def test_names_of_one_system_are_in_few_modules() -> None:
    modules, names = "|".join(ABSENT), "|".join(LACKING)
    pattern = re.compile(rf"^ *(?:import|from) (?:{modules})\b|\b(?:os|signal)\.(?:{names})\b|\"/(?:proc|sys)/", re.M)
    result = [
        f"{name}: {match}"
        for path in sorted((ROOT / "llmrec").rglob("*.py"))
        if not (name := path.relative_to(ROOT).as_posix()).startswith(LINUX)
        for match in pattern.findall(path.read_text(encoding="utf-8"))
    ]
    assert result == []


def test_reads_the_machine_on_other_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in LACKING:
        monkeypatch.delattr(os, name, raising=False)
    chip = machine.read_processor(tmp_path, tmp_path)
    assert chip.usable == chip.cores >= 1 and chip.quota is None and not chip.flags
    assert machine.read_memory(tmp_path, tmp_path).usable > 0
    assert machine.machine_facts()["load"] is None


def ran(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *args], capture_output=True, text=True, timeout=120, check=False
    )


def test_imports_without_linux_modules() -> None:
    done = ran(PROGRAM)
    assert done.stdout == "imported\n", done.stderr[-3000:]


def test_one_process_holds_a_lock_until_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    code = f"from llmrec.machine import try_lock; file = open({str(file)!r}, 'a'); print(try_lock(file), flush=True)"
    with file.open("a") as held:
        assert machine.try_lock(held)
        assert ran(code).stdout == "False\n"
    child = subprocess.Popen([sys.executable, "-c", f"{code}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"True\n"
    assert machine.is_process_alive(child.pid) and machine.is_process_alive(os.getpid())
    with file.open("a") as held:
        assert not machine.try_lock(held)
    child.communicate(b"\n")
    assert not machine.is_process_alive(child.pid)


def test_windows_locks_a_byte_beyond_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def locking(handle: int, mode: int, count: int) -> None:
        calls.append((os.lseek(handle, 0, os.SEEK_CUR), count))
        if len(calls) > 1:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with (tmp_path / "lock").open("a", encoding="utf-8") as held:
        held.write("mark")
        held.flush()
        assert machine.try_lock(held)
        assert not machine.try_lock(held)
        held.write("ed")
    assert (tmp_path / "lock").read_text(encoding="utf-8") == "marked"
    assert calls == [(1 << 30, 1)] * 2


def test_unsupported_calls_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "nice")
    machine.lower_priority(3)

    def refused(path: object, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    machine.flush_folder(tmp_path)
    monkeypatch.setattr(os, "open", refused)
    machine.flush_folder(tmp_path)


GIB = 2**30


def node(devices: Path, *, total: float, free: float, cached: float = 0.0, number: int = 0) -> Path:
    """Write the files with which Linux describes a NUMA node with all cores; sizes are in GiB."""
    folder = devices / "node" / f"node{number}"
    folder.mkdir(parents=True)
    fields = {"MemTotal": total, "MemFree": free, "Active(file)": cached, "Inactive(file)": 0.0, "SReclaimable": 0.0}
    lines = [f"Node {number} {name}:  {int(value * 2**20)} kB\n" for name, value in fields.items()]
    (folder / "meminfo").write_text("".join(lines))
    for core in range(64):
        (devices / "cpu" / f"cpu{core}" / f"node{number}").mkdir(parents=True)
    return devices


@pytest.fixture
def _machine_of_24(monkeypatch: pytest.MonkeyPatch) -> None:
    result = types.SimpleNamespace(total=24 * GIB, available=20 * GIB)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: result)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)


@pytest.mark.usefixtures("_machine_of_24")
def test_memory_of_a_node(tmp_path: Path) -> None:
    devices = node(tmp_path / "sys", total=3.75, free=1.25, cached=0.5, number=1)
    result = machine.read_node_memory(tmp_path, tmp_path, devices)
    assert (result.name, result.total, result.free) == ("NUMA node 1", 3.75 * GIB, 1.75 * GIB)
    result = machine.read_node_memory(tmp_path, tmp_path, tmp_path)
    assert (result.name, result.total, result.free) == ("the machine", 24 * GIB, 20 * GIB)


@pytest.mark.usefixtures("_machine_of_24")
@pytest.mark.parametrize(
    ("limit", "used"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_container_limit_counts_cache_as_used(limit: str, used: str, tmp_path: Path) -> None:
    """vLLM counts it too, and then refuses to start, although the kernel would free the cache."""
    devices, groups = node(tmp_path / "sys", total=24, free=20), tmp_path / "cgroup"
    (groups / limit).parent.mkdir(parents=True)
    (groups / limit).write_text(str(4 * GIB))
    (groups / used).write_text(str(3 * GIB))
    (groups / limit).with_name("memory.stat").write_text(f"inactive_file {2 * GIB}\n")
    result = machine.read_node_memory(tmp_path, groups, devices)
    assert (result.total, result.free) == (4 * GIB, GIB)
    # Other parts of llmrec can use memory that the kernel would free.
    assert machine.read_memory(tmp_path, groups).usable == 3 * GIB
