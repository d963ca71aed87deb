"""Detects a vLLM engine that died or hangs, and ends all of its processes.

``LLM.generate`` waits forever for an engine process that was killed or stopped. Here a thread waits, and the caller
checks the state of the engine's processes once per second. `HealthCheck` distinguishes a dead or hanging engine from a
slow one, and reads no clock itself.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from multiprocessing import spawn
from pathlib import Path
from typing import Any, TypeVar

import psutil

from llmrec.backends.vllm import guard as vllm_guard

# Starts child processes that do not run the caller's script again.
#
# A process that `multiprocessing` starts by "spawn" or "forkserver" first runs the parent's ``__main__`` under
# another name, in case its arguments were defined there. A script that calls `llmrec.run` without ``if
# __name__ == "__main__":`` would then run again inside the engine that it starts, and a script from stdin
# would be a missing file. No argument of an engine is defined in ``__main__``, so its processes do not need
# it.
#
# A child gets its information about ``__main__`` from one function, `multiprocessing.spawn.get_preparation_data`,
# which is called in the thread that starts the child. Hiding ``__main__.__file__`` at that time would hide it from
# every thread, and forking instead of spawning is not safe with the threads and the CUDA context that torch has by
# then.


log = logging.getLogger(__name__)

T = TypeVar("T")

_MAIN_KEYS = ("init_main_from_name", "init_main_from_path")


class _ThreadState(threading.local):
    """Whether this thread starts processes without ``__main__``."""

    hidden = False


_thread_state = _ThreadState()
_lock = threading.Lock()


@contextlib.contextmanager
def hide_main_module() -> Iterator[None]:
    """Prevent processes started in this thread from importing ``__main__``; other threads are not affected."""
    with _lock:
        if not getattr(spawn.get_preparation_data, "hides_main", False):
            # Stays in place, because restoring could undo later patches.
            spawn.get_preparation_data = _without_main_keys(spawn.get_preparation_data)  # type: ignore[assignment]
    before, _thread_state.hidden = _thread_state.hidden, True
    try:
        yield
    finally:
        _thread_state.hidden = before


def _without_main_keys(prepare: Callable[[str], dict[str, T]]) -> Callable[[str], dict[str, T]]:
    @functools.wraps(prepare)
    def prepared(name: str) -> dict[str, T]:
        message = prepare(name)
        return (
            {key: value for key, value in message.items() if key not in _MAIN_KEYS} if _thread_state.hidden else message
        )

    prepared.hides_main = True  # type: ignore[attr-defined]
    return prepared


# A process that waits for work is active for about 1 % of the time; one that computes uses whole cores. A process
# without a core on a busy machine, or waiting for a disk, is recognised by its state.
IDLE_SHARE = 0.05
ENDED_STATES = frozenset({"gone", psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD})
_WAITING_STATES = frozenset({psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Time limits in seconds after which an engine counts as lost."""

    poll: float = 1.0
    # no processor time and no finished step
    quiet: float = 20.0
    # Busy without a finished step: a step of a large model on few cores takes minutes, an endless loop forever.
    step: float = 15 * 60.0


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """The state of a process at one check."""

    pid: int
    name: str
    state: str
    cpu: float
    vital: bool = True


@dataclass(frozen=True)
class _Sample:
    at: float
    cpu: dict[int, float]
    waiting: bool


class HealthCheck:
    """Decides from a series of checks whether an engine is lost; independent of vLLM and clocks."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._steps = 0
        self._last = self._stepped = now
        self._stopped: dict[int, float] = {}
        self._samples: deque[_Sample] = deque()

    def judge(self, now: float, seen: Sequence[ProcessState], steps: int) -> str | None:
        """Return the problem with an engine, or None if there is none.

        Args:
            now: The time in seconds.
            seen: The engine's processes; those that are not vital are removed once they ended.
            steps: Engine steps finished so far.
        """
        if now - self._last > 5 * self._limits.poll:
            # This process itself was paused (Ctrl-Z, a suspended machine), so the interval is ignored.
            self._stepped = now
            self._stopped.clear()
            self._samples.clear()
        self._last = now
        if steps != self._steps:
            self._steps, self._stepped = steps, now
            self._samples.clear()
        self._samples.append(_Sample(now, {s.pid: s.cpu for s in seen}, any(s.state in _WAITING_STATES for s in seen)))
        return (
            self._ended(seen)
            or self._stopped_problem(now, seen)
            or self._quiet(now, seen)
            or self._endless_problem(now)
        )

    def _ended(self, seen: Iterable[ProcessState]) -> str | None:
        ended = [s for s in seen if s.vital and s.state in ENDED_STATES]
        return f"died: {describe_processes(ended)} ended" if ended else None

    def _stopped_problem(self, now: float, seen: Iterable[ProcessState]) -> str | None:
        halted = [s for s in seen if s.vital and s.state == psutil.STATUS_STOPPED]
        self._stopped = {s.pid: self._stopped.get(s.pid, now) for s in halted}
        long = [s for s in halted if now - self._stopped[s.pid] >= self._limits.quiet]
        return f"hangs: {describe_processes(long)} has been stopped for {self._limits.quiet:.0f} s" if long else None

    def _quiet(self, now: float, seen: Iterable[ProcessState]) -> str | None:
        samples, limit = self._samples, self._limits.quiet
        while len(samples) > 1 and samples[1].at <= now - limit:
            samples.popleft()
        span = now - samples[0].at
        if span < limit:
            return None
        used = max((cpu - samples[0].cpu.get(pid, 0.0) for pid, cpu in samples[-1].cpu.items()), default=0.0)
        if used >= IDLE_SHARE * span or 2 * sum(sample.waiting for sample in samples) >= len(samples):
            return None
        idle = describe_processes(s for s in seen if s.vital)
        return f"hangs: {idle} is idle and has not finished a step for {limit:.0f} s"

    def _endless_problem(self, now: float) -> str | None:
        if now - self._stepped < self._limits.step:
            return None
        return f"hangs: it is busy, but has not finished a step for {self._limits.step / 60:.0f} minutes"


def describe_processes(seen: Iterable[ProcessState]) -> str:
    """Return a description of processes for an error message."""
    return ", ".join(f"{s.name} (process {s.pid})" for s in seen) or "the engine"


# A healthy engine needs about five seconds to shut down, and unlinks its shared memory at the end.
ORDERLY_SECONDS = 7.0
CLOSE_SECONDS = 8.0


class EngineLost(Exception):
    """Raised if an engine died or hangs; the message describes what was observed."""


class StepCounter:
    """Counts the steps of an engine; written by one thread and read by another."""

    steps = 0

    def step(self) -> None:
        """Count one finished step."""
        self.steps += 1


class EngineProcesses:
    """Starts, watches and ends the processes of an engine."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._guard: subprocess.Popen[bytes] | None = None
        self._members: dict[int, psutil.Process] = {}
        self._names: dict[int, str] = {}
        self._vital: set[int] = set()
        self._cores: Sequence[Any] = ()
        self._thread: threading.Thread | None = None

    def start(self, build: Callable[[], Any]) -> Any:
        """Start an engine, and record its processes.

        Raises:
            EngineLost: If one of its processes was stopped for long.
            Exception: Whatever ``build`` raises, after its processes are killed.
        """
        self._guard = _start_guard()
        before = {child.pid for child in _child_processes(psutil.Process())}
        troubles: list[str] = []
        try:
            with self._record_started(before, troubles), hide_main_module():
                engine = build()
        except BaseException as error:
            self._gather(before)
            self.kill()
            self._stop_guard()
            if troubles and isinstance(error, Exception):
                raise EngineLost(troubles[0]) from error
            raise
        self._gather(before)
        self._mark_engine_processes(engine)
        return engine

    def run(self, work: Callable[[StepCounter], T]) -> T:
        """Run a function on the engine in a thread, while this thread watches the engine.

        Raises:
            EngineLost: If the engine died or hangs, after its processes are killed.
            Exception: Whatever ``work`` raises.
        """
        progress = StepCounter()
        if not self._vital:
            return work(progress)
        # Not an executor, whose threads Python waits for at exit.
        outcome: Future[T] = Future()
        self._thread = threading.Thread(
            target=_run_work, args=(work, progress, outcome), daemon=True, name="llmrec-vllm"
        )
        self._thread.start()
        health = HealthCheck(self.limits, time.monotonic())
        try:
            while not wait([outcome], self.limits.poll).done:
                if trouble := health.judge(time.monotonic(), self.look(), progress.steps):
                    self._raise_lost(trouble)
        except BaseException:
            self.kill()
            raise
        if (error := outcome.exception()) and (trouble := health.judge(time.monotonic(), self.look(), progress.steps)):
            self._raise_lost(trouble, error)
        return outcome.result()

    def look(self) -> list[ProcessState]:
        """Return the current state of the engine processes and of the waiting thread."""
        for core in self._cores:
            if core.pid in self._members:
                self._note(_child_processes(self._members[core.pid]))
        results = [self._seen(pid) for pid in self._members]
        for seen in results:
            if not seen.vital and seen.state in ENDED_STATES:
                del self._members[seen.pid]
        return [*(seen for seen in results if seen.pid in self._members), *self._caller_state()]

    def kill(self) -> list[int]:
        """Kill all processes of the engine, wait for their end, and return the remaining ones."""
        for process in list(self._members.values()):
            self._note(_child_processes(process))
        for process in self._members.values():
            with contextlib.suppress(psutil.Error):
                # this signal also ends stopped processes
                process.kill()
        deadline = time.monotonic() + 2
        while (left := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def close(self, shut_down: Callable[[], None], release: Callable[[], None]) -> None:
        """End the engine within seconds, whatever its state.

        Args:
            shut_down: vLLM's own shutdown, which may block.
            release: Wakes a thread that still waits for an answer.
        """
        if any(seen.vital and seen.state in {*ENDED_STATES, psutil.STATUS_STOPPED} for seen in self.look()):
            self.kill()
        thread = self._thread
        if thread is not None and thread.is_alive():
            release()
            thread.join(2)
        closing = threading.Thread(target=_log_failure, args=(shut_down,), daemon=True, name="llmrec-vllm-close")
        closing.start()
        closing.join(CLOSE_SECONDS)
        self.kill()
        for core in self._cores:
            # waits for the child, which would otherwise remain a zombie
            core.join(1)
        self._members.clear()
        self._vital.clear()
        self._stop_guard()

    @contextlib.contextmanager
    def _record_started(self, before: set[int], troubles: list[str]) -> Iterator[None]:
        """Record processes while vLLM starts them, and abort if one of them is stopped."""
        over = threading.Event()

        def collect() -> None:
            since: dict[int, float] = {}
            while not over.wait(self.limits.poll / 4):
                self._gather(before)
                now = time.monotonic()
                halted = [s for s in self.look() if s.state == psutil.STATUS_STOPPED]
                since = {s.pid: since.get(s.pid, now) for s in halted}
                if long := [s for s in halted if now - since[s.pid] >= self.limits.quiet]:
                    troubles.append(f"{describe_processes(long)} was stopped for {self.limits.quiet:.0f} s")
                    self.kill()
                    return

        thread = threading.Thread(target=collect, daemon=True, name="llmrec-vllm-start")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _gather(self, before: set[int]) -> None:
        """Record every new child process."""
        guard = self._guard.pid if self._guard else 0
        self._note(p for p in _child_processes(psutil.Process()) if p.pid not in before and p.pid != guard)

    def _note(self, processes: Iterable[psutil.Process]) -> None:
        for process in processes:
            if process.pid in self._members or vllm_guard.is_resource_tracker(process.pid):
                continue
            self._members[process.pid] = process
            stream = None if self._guard is None else self._guard.stdin
            if stream is not None and (start := vllm_guard.start_time(process.pid)):
                with contextlib.suppress(OSError, ValueError):
                    stream.write(f"{process.pid} {start}\n".encode("ascii"))
                    stream.flush()

    def _mark_engine_processes(self, engine: Any) -> None:
        """Keep the processes of the engine, and mark the vital ones.

        The engine core is known from vLLM, a worker by its title. Others, such as compilers, are temporary.
        """
        core = getattr(getattr(engine, "llm_engine", None), "engine_core", None)
        manager = getattr(getattr(core, "resources", None), "engine_manager", None)
        self._cores = tuple(getattr(manager, "processes", ()))
        roots = {process.pid for process in self._cores} & set(self._members)
        if roots:
            members = roots.union(*({child.pid for child in _child_processes(self._members[pid])} for pid in roots))
            self._members = {pid: process for pid, process in self._members.items() if pid in members}
        title = os.environ.get("VLLM_PROCESS_NAME_PREFIX", "VLLM") + "::"
        titled = {pid for pid in self._members if self._seen(pid).name.startswith(title)}
        self._vital = roots | titled

    def _caller_state(self) -> list[ProcessState]:
        """Return the state of the waiting thread, which also prepares requests and reads answers."""
        if self._thread is None or self._thread.native_id is None:
            return []
        for thread in psutil.Process().threads():
            if thread.id == self._thread.native_id:
                return [ProcessState(pid=0, name="", state="", cpu=thread.user_time + thread.system_time, vital=False)]
        return []

    def _alive(self) -> list[int]:
        return [pid for pid in self._members if self._seen(pid).state not in ENDED_STATES]

    def _seen(self, pid: int) -> ProcessState:
        process, vital = self._members[pid], pid in self._vital
        try:
            with process.oneshot():
                if not process.is_running():
                    raise psutil.NoSuchProcess(pid)
                name, state, times = process.name(), process.status(), process.cpu_times()
        except psutil.Error:
            return ProcessState(pid=pid, name=self._names.get(pid, "process"), state="gone", cpu=0.0, vital=vital)
        if state not in ENDED_STATES:
            # vLLM sets process titles only when they run; of a dead process, only the first letters are left.
            self._names[pid] = name
        name = self._names.get(pid, name)
        return ProcessState(pid=pid, name=name, state=state, cpu=times.user + times.system, vital=vital)

    def _raise_lost(self, trouble: str, cause: BaseException | None = None) -> None:
        trouble += self._end_reason() if trouble.startswith("died") else ""
        if left := self.kill():
            trouble += f"; process {', '.join(map(str, left))} cannot be killed"
        raise EngineLost(trouble) from cause

    def _end_reason(self) -> str:
        """Return why a process ended, if known; the exit code is available only for children."""
        for core in self._cores:
            if self._seen(core.pid).state in ENDED_STATES:
                core.join(1)
                if core.exitcode not in (None, -9):
                    return f" with exit code {core.exitcode}"
                return ", killed by signal 9, as the kernel does when memory runs out" if core.exitcode else ""
        return ", as happens when memory runs out"

    def _stop_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is None:
            return
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            guard.communicate(b"quit\n", timeout=2)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            guard.kill()
            guard.wait(1)


def _run_work(work: Callable[[StepCounter], T], progress: StepCounter, outcome: Future[T]) -> None:
    try:
        outcome.set_result(work(progress))
    except BaseException as error:
        outcome.set_exception(error)


def _log_failure(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:
        log.debug("vLLM did not shut down cleanly: %s", error)


def _child_processes(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _start_guard() -> subprocess.Popen[bytes] | None:
    """Start a process that ends the engine if this process is killed; None if it cannot start."""
    if not Path("/proc/self/stat").is_file() or not sys.executable:
        return None
    command = [sys.executable, "-I", "-S", vllm_guard.__file__, str(os.getpid())]
    try:
        # In a new session, since Ctrl-C reaches all processes of the terminal session.
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        log.debug("the vLLM engine is not supervised: %s", error)
        return None
