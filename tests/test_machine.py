"""What differs between systems: locks, and a package that needs no module of one of them."""

from __future__ import annotations

import ast
import os
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
# vLLM runs on Linux alone, and setup_env makes the environment of a checkout, through make.
# The reader of spreadsheets is a process of its own that imports no llmrec; without /proc its memory is not bounded.
LINUX = ("llmrec/backends/vllm", "llmrec/setup_env.py", "llmrec/machine.py", "llmrec/data/read/sheet_process.py")
ROOT = Path(__file__).parent.parent

# Other packages come in the build of this system, so only llmrec's own imports are refused.
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


def test_what_one_system_has_is_named_in_one_place() -> None:
    found = []
    for path in sorted((ROOT / "llmrec").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(LINUX):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in ("os", "signal") and node.attr in LACKING:
                    found.append(f"{name}: {node.value.id}.{node.attr}")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                found += [f"{name}: {each}" for each in names if each in ABSENT]
            elif isinstance(node, ast.Constant) and str(node.value).startswith(("/proc/", "/sys/")):
                found.append(f"{name}: {node.value}")
    assert found == []


def test_the_machine_is_read_where_the_system_tells_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in LACKING:
        monkeypatch.delattr(os, name, raising=False)
    chip = machine.processor(tmp_path, tmp_path)
    assert chip.usable == chip.cores >= 1 and chip.quota is None and not chip.flags
    assert machine.memory(tmp_path, tmp_path).usable > 0
    assert machine.machine()["load"] is None


def ran(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *args], capture_output=True, text=True, timeout=120, check=False
    )


def test_every_module_is_imported_without_those_of_linux() -> None:
    done = ran(PROGRAM)
    assert done.stdout == "imported\n", done.stderr[-3000:]


def test_a_lock_is_held_by_one_process(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    other = f"from llmrec.machine import lock; print(lock(open({str(file)!r}, 'a')))"
    with file.open("a") as held:
        assert machine.lock(held)
        assert ran(other).stdout == "False\n"
    assert ran(other).stdout == "True\n"


def test_windows_locks_a_byte_that_no_file_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def locking(handle: int, mode: int, count: int) -> None:
        asked.append((os.lseek(handle, 0, os.SEEK_CUR), count))
        if len(asked) > 1:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with (tmp_path / "lock").open("a", encoding="utf-8") as held:
        held.write("mark")
        held.flush()
        assert machine.lock(held)
        assert not machine.lock(held)
        held.write("ed")
    assert (tmp_path / "lock").read_text(encoding="utf-8") == "marked"
    assert asked == [(1 << 30, 1)] * 2


def test_a_process_is_alive_until_it_ends() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert machine.alive(child.pid) and machine.alive(os.getpid())
    child.communicate(b"\n")
    assert not machine.alive(child.pid)


def test_what_a_system_cannot_do_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "nice")
    machine.step_back(3)

    def refused(path: object, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    machine.flush_folder(tmp_path)
    monkeypatch.setattr(os, "open", refused)
    machine.flush_folder(tmp_path)


# --------------------------------------------------------------------------- memory

GIB = 2**30


def node(devices: Path, *, total: float, free: float, cached: float = 0.0, number: int = 0) -> Path:
    """Make a NUMA node of so many GiB, to which every core belongs, as Linux describes it."""
    folder = devices / "node" / f"node{number}"
    folder.mkdir(parents=True)
    fields = {"MemTotal": total, "MemFree": free, "Active(file)": cached, "Inactive(file)": 0.0, "SReclaimable": 0.0}
    lines = [f"Node {number} {name}:  {int(value * 2**20)} kB\n" for name, value in fields.items()]
    (folder / "meminfo").write_text("".join(lines))
    for core in range(64):
        (devices / "cpu" / f"cpu{core}" / f"node{number}").mkdir(parents=True)
    return devices


@pytest.fixture
def machine_of_24(monkeypatch: pytest.MonkeyPatch) -> None:
    found = types.SimpleNamespace(total=24 * GIB, available=20 * GIB)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)


@pytest.mark.usefixtures("machine_of_24")
def test_a_node_that_is_smaller_than_the_machine_is_what_an_engine_gets(tmp_path: Path) -> None:
    devices = node(tmp_path / "sys", total=3.75, free=1.25, cached=0.5, number=1)
    found = machine.node_memory(tmp_path, tmp_path, devices)
    assert (found.name, found.total, found.free) == ("NUMA node 1", 3.75 * GIB, 1.75 * GIB)


@pytest.mark.usefixtures("machine_of_24")
def test_what_other_processes_hold_is_not_free(tmp_path: Path) -> None:
    devices = node(tmp_path / "sys", total=24, free=2)
    assert machine.node_memory(tmp_path, tmp_path, devices).free == 2 * GIB


@pytest.mark.usefixtures("machine_of_24")
def test_without_nodes_it_is_the_machine(tmp_path: Path) -> None:
    found = machine.node_memory(tmp_path, tmp_path, tmp_path)
    assert (found.name, found.total, found.free) == ("the machine", 24 * GIB, 20 * GIB)


@pytest.mark.usefixtures("machine_of_24")
@pytest.mark.parametrize(
    ("limit", "used"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_a_container_s_limit_counts_what_it_caches_as_used(limit: str, used: str, tmp_path: Path) -> None:
    """So does vLLM, which then refuses to start, although the kernel would give the cached files up."""
    devices, groups = node(tmp_path / "sys", total=24, free=20), tmp_path / "cgroup"
    (groups / limit).parent.mkdir(parents=True)
    (groups / limit).write_text(str(4 * GIB))
    (groups / used).write_text(str(3 * GIB))
    (groups / limit).with_name("memory.stat").write_text(f"inactive_file {2 * GIB}\n")
    found = machine.node_memory(tmp_path, groups, devices)
    assert (found.total, found.free) == (4 * GIB, GIB)
    # Other programs of llmrec may well have what the kernel would give up.
    assert machine.memory(tmp_path, groups).usable == 3 * GIB
