"""An engine that dies or hangs is detected and leaves no processes: fake observations, fake engines, real vLLM."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.vllm import guard as vllm_guard
from llmrec.backends.vllm import supervise
from llmrec.backends.vllm.supervise import EngineLost, EngineProcesses, HealthCheck, Limits, ProcessState, StepCounter
from llmrec.errors import BackendError
from tests.facts import Facts, raises

LIMITS = Limits()
NO_TROUBLE = [ProcessState(pid=1, name="core", state="sleeping", cpu=0.0)]


def core(cpu: float, state: str = "sleeping", *, vital: bool = True, pid: int = 1) -> ProcessState:
    return ProcessState(pid=pid, name="VLLM::EngineCore", state=state, cpu=cpu, vital=vital)


def judged(looks: list[tuple[list[ProcessState], int]], limits: Limits = LIMITS) -> list[str | None]:
    """Judge one observation per second."""
    health = HealthCheck(limits, 0.0)
    return [health.judge(float(second), seen, steps) for second, (seen, steps) in enumerate(looks)]


def test_dead_vital_process_is_reported_at_once() -> None:
    for state in ("gone", "zombie", "dead"):
        (trouble,) = judged([([core(1.0), core(0.0, state, pid=2)], 0)])
        assert trouble is not None
        assert trouble.startswith("died")
        assert "process 2" in trouble
    assert judged([([core(1.0), core(0.0, "gone", pid=2, vital=False)], 0)]) == [None]


def test_stopped_process_is_reported_after_the_limit() -> None:
    looks = [([core(0.0, "stopped"), core(float(second), "running", pid=2)], second) for second in range(30)]
    verdicts = judged(looks)
    assert verdicts[:20] == [None] * 20
    assert verdicts[20] is not None
    assert "stopped for 20 s" in verdicts[20]


def test_short_stops_are_no_trouble() -> None:
    states = (["stopped"] * 19 + ["running"]) * 3
    assert set(judged([([core(second * 0.5, state)], second) for second, state in enumerate(states)])) == {None}


@given(st.lists(st.floats(0, 0.04), min_size=21, max_size=60))
def test_idle_engine_is_reported_after_the_limit(used: list[float]) -> None:
    looks = [([core(sum(used[:n]))], 3) for n in range(len(used))]
    verdicts = judged(looks)
    assert verdicts[:20] == [None] * 20
    assert all(trouble is not None and "is idle" in trouble for trouble in verdicts[20:])


@given(st.lists(st.floats(0.06, 4.0), min_size=25, max_size=80), st.booleans())
def test_slow_engine_is_no_trouble(used: list[float], second_process_idle: bool) -> None:
    idle = [core(0.0, pid=2)] if second_process_idle else []
    assert set(judged([([core(sum(used[:n])), *idle], 0) for n in range(len(used))])) == {None}


@given(st.lists(st.integers(0, 1), min_size=25, max_size=120).filter(lambda s: "0" * 20 not in "".join(map(str, s))))
def test_steps_count_as_work(stepped: list[int]) -> None:
    # Every window of twenty observations contains a step.
    steps = [sum(stepped[: n + 1]) for n in range(len(stepped))]
    assert set(judged([(NO_TROUBLE, count) for count in steps])) == {None}


@pytest.mark.parametrize("state", ["running", "disk-sleep"])
def test_engine_that_waits_for_cpu_or_disk_is_no_trouble(state: str) -> None:
    # In every third observation, the engine is asleep.
    looks = [([core(0.0, "sleeping" if n % 3 == 0 else state)], 0) for n in range(200)]
    assert set(judged(looks)) == {None}


def test_busy_engine_without_steps_is_reported_after_the_long_limit() -> None:
    verdicts = judged([([core(2.0 * n, "running")], 5) for n in range(1000)])
    assert set(verdicts[:900]) == {None}
    assert verdicts[901] is not None
    assert "15 minutes" in verdicts[901]


def test_pauses_of_the_watch_are_ignored() -> None:
    health = HealthCheck(LIMITS, 0.0)
    assert health.judge(1.0, [core(0.0, "stopped")], 0) is None
    # Ctrl-Z and fg, an hour later.
    for second in range(3600, 3619):
        assert health.judge(float(second), [core(0.0, "stopped")], 0) is None
    assert health.judge(3621.0, [core(0.0, "stopped")], 0) is not None


QUICK = Limits(poll=0.1, quiet=1.5, step=3.0)
SLEEP = "import time; time.sleep(600)"
BUSY = "while True: pass"


class Child:
    """A process with the interface of those in vLLM's manager."""

    def __init__(self, code: str) -> None:
        self.popen = subprocess.Popen([sys.executable, "-I", "-S", "-c", code])
        self.pid = self.popen.pid

    @property
    def exitcode(self) -> int | None:
        return self.popen.poll()

    def join(self, timeout: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout)


def engine_of(*children: Child) -> Any:
    core = SimpleNamespace(resources=SimpleNamespace(engine_manager=SimpleNamespace(processes=children)))
    core.shutdown = lambda timeout: None
    return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))


def opened(code: str, limits: Limits = QUICK) -> tuple[EngineProcesses, Child]:
    watch = EngineProcesses(limits)
    engine = watch.start(lambda: engine_of(Child(code)))
    (child,) = engine.llm_engine.engine_core.resources.engine_manager.processes
    return watch, child


@pytest.fixture
def sleeper() -> Iterator[tuple[EngineProcesses, Child]]:
    watch, child = opened(SLEEP)
    yield watch, child
    # Otherwise closing waits for the thread that is still in the call.
    OVER.set()
    watch.close(lambda: None, lambda: None)
    OVER.clear()
    assert child.exitcode is not None


OVER = threading.Event()


def for_ever(progress: StepCounter) -> None:
    OVER.wait(600)


def test_run_returns_the_value_or_raises_the_error(sleeper: tuple[EngineProcesses, Child]) -> None:
    watch, child = sleeper
    assert watch.run(lambda progress: 7) == 7
    with pytest.raises(ValueError, match="prompt too long"):
        watch.run(lambda progress: (_ for _ in ()).throw(ValueError("prompt too long")))
    assert child.exitcode is None
    assert watch.run(lambda progress: 8) == 8


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_process_is_detected(sleeper: tuple[EngineProcesses, Child], number: int) -> None:
    watch, child = sleeper
    threading.Timer(0.2, os.kill, (child.pid, number)).start()
    with pytest.raises(EngineLost, match=f"died: .*process {child.pid}") as caught:
        watch.run(for_ever)
    assert ("memory" in str(caught.value)) == (number == signal.SIGKILL)


def test_stopped_process_is_detected_and_killed(sleeper: tuple[EngineProcesses, Child]) -> None:
    watch, child = sleeper
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(EngineLost, match=r"hangs: .* stopped"):
        watch.run(for_ever)
    assert child.exitcode == -signal.SIGKILL


def test_busy_engine_is_killed_at_the_long_limit() -> None:
    watch, child = opened(BUSY)
    begin = time.monotonic()
    with pytest.raises(EngineLost, match="busy"):
        watch.run(for_ever)
    assert time.monotonic() - begin >= QUICK.step
    assert child.exitcode == -signal.SIGKILL
    watch.close(lambda: None, lambda: None)


def test_idle_engine_with_steps_is_kept(
    sleeper: tuple[EngineProcesses, Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, child = sleeper
    judge, begin = HealthCheck.judge, time.monotonic()
    started: Future[StepCounter] = Future()
    observed = threading.Event()

    def step_after_judging(self: HealthCheck, now: float, seen: list[ProcessState], steps: int) -> str | None:
        trouble = judge(self, now, seen, steps)
        started.result().step()
        if now - begin > 2 * QUICK.quiet:
            observed.set()
        return trouble

    def work(progress: StepCounter) -> str:
        started.set_result(progress)
        observed.wait()
        return "done"

    monkeypatch.setattr(HealthCheck, "judge", step_after_judging)
    assert watch.run(work) == "done"
    assert child.exitcode is None


def test_ctrl_c_reaches_the_caller_and_kills_the_engine(sleeper: tuple[EngineProcesses, Child]) -> None:
    watch, child = sleeper
    # Processes of a background shell ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            watch.run(for_ever)
    finally:
        signal.signal(signal.SIGINT, before)
    assert child.exitcode == -signal.SIGKILL


def test_processes_of_a_failed_start_are_killed() -> None:
    children: list[Child] = []

    def build() -> Any:
        children.append(Child(SLEEP))
        raise RuntimeError("Engine core initialization failed")

    with pytest.raises(RuntimeError, match="initialization failed"):
        EngineProcesses(QUICK).start(build)
    assert children[0].exitcode == -signal.SIGKILL


def test_stopped_start_is_killed() -> None:
    child: list[Child] = []

    def build() -> Any:
        child.append(Child(SLEEP))
        os.kill(child[0].pid, signal.SIGSTOP)
        child[0].popen.wait(30)
        raise RuntimeError("Engine core initialization failed")

    with pytest.raises(EngineLost, match="was stopped"):
        EngineProcesses(QUICK).start(build)


@pytest.mark.parametrize("state", ["healthy", "stopped"])
def test_close_does_not_wait_for_vllm(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(supervise, "CLOSE_SECONDS", 0.5)
    watch, child = opened(SLEEP)
    guard = watch._guard
    assert guard is not None
    if state == "stopped":
        os.kill(child.pid, signal.SIGSTOP)
    begin = time.monotonic()
    watch.close(lambda: threading.Event().wait(600) and None, lambda: None)
    # Closing does not wait for vLLM, which would take ten minutes here.
    assert time.monotonic() - begin < 300
    assert child.exitcode == -signal.SIGKILL
    assert guard.poll() is not None


def backend_over(watch: EngineProcesses, engine: Any) -> Any:
    from llmrec.backends.vllm.backend import VLLMBackend, _SharedEngine

    backend = VLLMBackend.__new__(VLLMBackend)
    backend._process, backend._adapter = _SharedEngine(watch, engine), None
    return backend


def test_backend_reports_an_idle_engine_and_is_closed() -> None:
    watch = EngineProcesses(QUICK)
    engine = watch.start(lambda: engine_of(Child(SLEEP)))
    engine.enqueue = lambda *_, **__: for_ever(StepCounter())
    backend = backend_over(watch, engine)
    (child,) = engine.llm_engine.engine_core.resources.engine_manager.processes
    with raises(BackendError, Facts("failed", says=("is idle", "run the same command again to continue"))):
        backend._run([[1]], [None])
    assert child.exitcode == -signal.SIGKILL
    with raises(BackendError, Facts("closed")):
        backend._run([[1]], [None])
    backend.close()


def test_vllm_error_is_one_line_and_closes_the_backend() -> None:
    watch = EngineProcesses(QUICK)
    engine = watch.start(lambda: engine_of(Child(SLEEP)))

    def enqueue(*_: Any, **__: Any) -> None:
        raise KeyError("a\n  b")

    engine.enqueue = enqueue
    backend = backend_over(watch, engine)
    with raises(BackendError, Facts("failed", says="run the same command again to continue")) as caught:
        backend._run([[1]], [None])
    assert "\n" not in str(caught.value)
    assert backend._process.llm is None


OWNER = '''
import subprocess, sys, time
from types import SimpleNamespace
from llmrec.backends.vllm.supervise import EngineProcesses
sleep = "import time; time.sleep(600)"
code = f"""
import subprocess, sys, time
sys.stdin.readline()
print(subprocess.Popen([sys.executable, '-c', {sleep!r}]).pid, flush=True)
time.sleep(600)
"""
children = []
def build():
    children.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True))
    return SimpleNamespace()
watch = EngineProcesses()
watch.start(build)
print(children[0].pid, watch._guard.pid, flush=True)
# Only now does the child start a process.
print(file=children[0].stdin, flush=True)
time.sleep(600)
'''


def test_killed_owner_leaves_no_process() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    numbers = [int(word) for _ in range(2) for word in owner.stdout.readline().split()]
    assert len(numbers) == 3
    left = [psutil.Process(pid) for pid in numbers]
    left[0].suspend()
    owner.kill()
    owner.wait(10)
    _, alive = psutil.wait_procs(left, timeout=15)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_guard_reads_all_lines_ignores_reused_ids_and_ends_on_quit() -> None:
    child = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        start = vllm_guard.start_time(child.pid)
        assert start is not None
        assert start.isdigit()
        for text, expected in (
            (f"{child.pid} {start}\n", {child.pid: start}),
            (f"{child.pid} {int(start) - 1}\n", {}),
            (f"{child.pid} {start}\nquit\n", {}),
        ):
            reading, writing = os.pipe()
            os.write(writing, text.encode())
            os.close(writing)
            assert vllm_guard.watch_owner(os.getppid(), reading) == expected
            os.close(reading)
        # The owner ended before the guard read its lines, and another process keeps the writing end open.
        reading, writing = os.pipe()
        os.write(writing, f"{child.pid} {start}\n".encode())
        assert vllm_guard.watch_owner(-1, reading) == {child.pid: start}
        os.close(reading)
        os.close(writing)
        assert not vllm_guard.is_resource_tracker(child.pid)
    finally:
        child.kill()
        child.wait(10)
    assert vllm_guard.start_time(child.pid) is None


SCRIPT = """
import sys
from llmrec.backends.encode import Encoder
from llmrec.models.load import load_tokenizer
from llmrec.backends.vllm.backend import VLLMBackend
from llmrec.errors import LlmrecError
from llmrec.recipe.schema import ModelSection
from llmrec.types import Message, Prompt, Segment

def main(folder):
    encoder = Encoder(load_tokenizer(folder, ModelSection(name=folder)), max_length=2048)
    backend = VLLMBackend(folder, encoder, dtype="float32")
    prompts = [Prompt(messages=(Message("user", (Segment("text", f"film {n}"),)),), answer_prefix=(), stop=None)
               for n in range(64)]
    backend.generate(prompts[:1], max_tokens=2)
    print("busy", flush=True)
    while True:
        backend.generate(prompts, max_tokens=1800)

if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except LlmrecError as error:
        sys.stderr.write(f"error: {error}\\n")
        sys.exit(2)
"""


class Run:
    """The script in a separate process, with the processes of its engine."""

    def __init__(self, folder: Path, model: Path) -> None:
        script = folder / "script.py"
        script.write_text(SCRIPT, encoding="utf-8")
        self.errors = folder / "stderr"
        with self.errors.open("w") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, str(script), str(model)], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.all: list[psutil.Process] = []

    def wait_for(self, condition: Callable[[], bool], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.popen.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()

    def busy(self) -> bool:
        assert self.popen.stdout is not None
        ready, _, _ = select.select([self.popen.stdout], [], [], 0.5)
        return bool(ready) and "busy" in self.popen.stdout.readline()

    def gather(self) -> list[psutil.Process]:
        self.all = psutil.Process(self.popen.pid).children(recursive=True)
        return self.all

    def called(self, part: str) -> psutil.Process:
        (match,) = [process for process in self.gather() if part in process.name()]
        return match

    def nothing_left(self) -> bool:
        psutil.wait_procs(self.all, timeout=15)
        return not [p for p in self.all if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def ended(self) -> str:
        """Wait for the exit after the engine died, and return the error line."""
        assert self.popen.wait(30) == 2, self.errors.read_text()
        assert self.nothing_left()
        (line,) = [line for line in self.errors.read_text().splitlines() if line.startswith("error: ")]
        return line


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Iterator[Run]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    started = Run(tmp_path, llama_folder)
    yield started
    for process in [*started.all, *([psutil.Process(started.popen.pid)] if started.popen.poll() is None else [])]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    started.popen.communicate()


@pytest.mark.slow
@pytest.mark.vllm
def test_real_engine_killed_in_mid_generate(run: Run) -> None:
    run.wait_for(run.busy)
    time.sleep(1)
    run.called("EngineCore").kill()
    line = run.ended()
    # The kernel truncates the name of a dead process to 15 characters.
    assert "the vLLM engine died: VLLM::EngineCor" in line
    assert "run the same command again to continue" in line


@pytest.mark.slow
@pytest.mark.vllm
def test_real_engine_does_not_outlive_its_killed_owner(run: Run) -> None:
    run.wait_for(run.busy)
    assert run.called("EngineCore").is_running()
    run.popen.kill()
    assert run.nothing_left()
