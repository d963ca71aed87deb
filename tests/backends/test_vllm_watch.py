"""An engine that dies or hangs is noticed, and nothing of it stays: made-up looks, stand-in processes, real vLLM."""

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.backends.vllm import guard as vllm_guard
from llmrec.backends.vllm import supervise
from llmrec.backends.vllm.supervise import EngineLost, Limits, Progress, Seen, Vigil, Watch
from llmrec.errors import BackendError
from tests.facts import Facts, raises

LIMITS = Limits()
NO_TROUBLE = [Seen(pid=1, name="core", state="sleeping", cpu=0.0)]


def core(cpu: float, state: str = "sleeping", *, vital: bool = True, pid: int = 1) -> Seen:
    return Seen(pid=pid, name="VLLM::EngineCore", state=state, cpu=cpu, vital=vital)


def judged(looks: list[tuple[list[Seen], int]], limits: Limits = LIMITS) -> list[str | None]:
    """Judge one look a second."""
    vigil = Vigil(limits, 0.0)
    return [vigil.judge(float(second), seen, steps) for second, (seen, steps) in enumerate(looks)]


# --------------------------------------------------------------------------- what is judged


def test_a_vital_process_that_ended_is_told_at_the_first_look() -> None:
    for state in ("gone", "zombie", "dead"):
        (trouble,) = judged([([core(1.0), core(0.0, state, pid=2)], 0)])
        assert trouble is not None
        assert trouble.startswith("died")
        assert "process 2" in trouble
    assert judged([([core(1.0), core(0.0, "gone", pid=2, vital=False)], 0)]) == [None]


def test_a_stopped_process_is_told_after_the_limit_though_others_work() -> None:
    looks = [([core(0.0, "stopped"), core(float(second), "running", pid=2)], second) for second in range(30)]
    found = judged(looks)
    assert found[:20] == [None] * 20
    assert found[20] is not None
    assert "stopped for 20 s" in found[20]


def test_a_stop_that_ends_in_time_starts_afresh() -> None:
    states = (["stopped"] * 19 + ["running"]) * 3
    assert set(judged([([core(second * 0.5, state)], second) for second, state in enumerate(states)])) == {None}


@given(st.lists(st.floats(0, 0.04), min_size=21, max_size=60))
def test_no_work_and_no_step_is_told_when_the_limit_is_over(used: list[float]) -> None:
    looks = [([core(sum(used[:n]))], 3) for n in range(len(used))]
    found = judged(looks)
    assert found[:20] == [None] * 20
    assert all(trouble is not None and "is idle" in trouble for trouble in found[20:])


@given(st.lists(st.floats(0.06, 4.0), min_size=25, max_size=80), st.booleans())
def test_a_slow_engine_that_works_is_left_alone(used: list[float], second_process_idle: bool) -> None:
    idle = [core(0.0, pid=2)] if second_process_idle else []
    assert set(judged([([core(sum(used[:n])), *idle], 0) for n in range(len(used))])) == {None}


@given(st.lists(st.integers(0, 1), min_size=25, max_size=120).filter(lambda s: "0" * 20 not in "".join(map(str, s))))
def test_steps_are_work_whatever_the_processor_time(stepped: list[int]) -> None:
    # As long as no twenty looks pass without a step.
    steps = [sum(stepped[: n + 1]) for n in range(len(stepped))]
    assert set(judged([(NO_TROUBLE, count) for count in steps])) == {None}


@pytest.mark.parametrize("state", ["running", "disk-sleep"])
def test_an_engine_that_gets_no_core_or_waits_for_its_disk_is_left_alone(state: str) -> None:
    # Every third look may catch it asleep.
    looks = [([core(0.0, "sleeping" if n % 3 == 0 else state)], 0) for n in range(200)]
    assert set(judged(looks)) == {None}


def test_busy_without_a_step_is_told_after_the_long_limit() -> None:
    found = judged([([core(2.0 * n, "running")], 5) for n in range(1000)])
    assert set(found[:900]) == {None}
    assert found[901] is not None
    assert "15 minutes" in found[901]


def test_what_was_missed_while_the_watch_itself_did_not_run_is_not_judged() -> None:
    vigil = Vigil(LIMITS, 0.0)
    assert vigil.judge(1.0, [core(0.0, "stopped")], 0) is None
    # Ctrl-Z and fg, an hour later.
    for second in range(3600, 3619):
        assert vigil.judge(float(second), [core(0.0, "stopped")], 0) is None
    assert vigil.judge(3621.0, [core(0.0, "stopped")], 0) is not None


# --------------------------------------------------------------------------- stand-in engines: real processes

QUICK = Limits(poll=0.1, quiet=1.5, step=3.0)
SLEEP = "import time; time.sleep(600)"
BUSY = "while True: pass"


class Child:
    """A process as vLLM's manager holds them."""

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


def opened(code: str, limits: Limits = QUICK) -> tuple[Watch, Child]:
    watch = Watch(limits)
    engine = watch.start(lambda: engine_of(Child(code)))
    (child,) = engine.llm_engine.engine_core.resources.engine_manager.processes
    return watch, child


@pytest.fixture
def sleeper() -> Iterator[tuple[Watch, Child]]:
    watch, child = opened(SLEEP)
    yield watch, child
    # Else closing waits for the thread that is still in the call.
    OVER.set()
    watch.close(lambda: None, lambda: None)
    OVER.clear()
    assert child.exitcode is not None


OVER = threading.Event()


def for_ever(progress: Progress) -> None:
    OVER.wait(600)


def test_work_comes_back_with_its_value_or_its_error(sleeper: tuple[Watch, Child]) -> None:
    watch, child = sleeper
    assert watch.run(lambda progress: 7) == 7
    with pytest.raises(ValueError, match="prompt too long"):
        watch.run(lambda progress: (_ for _ in ()).throw(ValueError("prompt too long")))
    assert child.exitcode is None
    assert watch.run(lambda progress: 8) == 8


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_is_noticed_at_once(sleeper: tuple[Watch, Child], sent: int) -> None:
    watch, child = sleeper
    threading.Timer(0.2, os.kill, (child.pid, sent)).start()
    with pytest.raises(EngineLost, match=f"died: .*process {child.pid}") as caught:
        watch.run(for_ever)
    assert ("memory" in str(caught.value)) == (sent == signal.SIGKILL)


def test_a_stopped_process_is_noticed_and_killed(sleeper: tuple[Watch, Child]) -> None:
    watch, child = sleeper
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(EngineLost, match=r"hangs: .* stopped"):
        watch.run(for_ever)
    assert child.exitcode == -signal.SIGKILL


def test_a_process_that_waits_for_nothing_is_noticed_and_killed(sleeper: tuple[Watch, Child]) -> None:
    watch, child = sleeper
    with pytest.raises(EngineLost, match="is idle and has not finished a step"):
        watch.run(for_ever)
    assert child.exitcode == -signal.SIGKILL


def test_a_busy_engine_is_waited_for_and_given_up_at_the_long_limit() -> None:
    watch, child = opened(BUSY)
    begin = time.monotonic()
    with pytest.raises(EngineLost, match="busy"):
        watch.run(for_ever)
    assert time.monotonic() - begin >= QUICK.step
    assert child.exitcode == -signal.SIGKILL
    watch.close(lambda: None, lambda: None)


def test_steps_keep_an_idle_engine(sleeper: tuple[Watch, Child]) -> None:
    watch, child = sleeper

    def slowly(progress: Progress) -> str:
        for _ in range(8):
            time.sleep(0.3)
            progress.step()
        return "done"

    assert watch.run(slowly) == "done"
    assert child.exitcode is None


def test_ctrl_c_reaches_the_caller_and_ends_the_engine(sleeper: tuple[Watch, Child]) -> None:
    watch, child = sleeper
    # A shell that starts tests in the background has them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            watch.run(for_ever)
    finally:
        signal.signal(signal.SIGINT, before)
    assert child.exitcode == -signal.SIGKILL


def test_what_a_failed_start_left_is_killed() -> None:
    made: list[Child] = []

    def build() -> Any:
        made.append(Child(SLEEP))
        raise RuntimeError("Engine core initialization failed")

    with pytest.raises(RuntimeError, match="initialization failed"):
        Watch(QUICK).start(build)
    assert made[0].exitcode == -signal.SIGKILL


def test_a_start_that_was_stopped_is_ended() -> None:
    child: list[Child] = []

    def build() -> Any:
        child.append(Child(SLEEP))
        os.kill(child[0].pid, signal.SIGSTOP)
        child[0].popen.wait(30)
        raise RuntimeError("Engine core initialization failed")

    with pytest.raises(EngineLost, match="was stopped"):
        Watch(QUICK).start(build)


@pytest.mark.parametrize("state", ["healthy", "stopped", "dead"])
def test_close_takes_seconds_whatever_vllm_does(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(supervise, "CLOSE_SECONDS", 0.5)
    watch, child = opened(SLEEP)
    guard = watch._guard
    assert guard is not None
    if state != "healthy":
        os.kill(child.pid, signal.SIGSTOP if state == "stopped" else signal.SIGKILL)
    begin = time.monotonic()
    watch.close(lambda: threading.Event().wait(600) and None, lambda: None)
    # It waits for nothing that vLLM does, which here would take ten minutes.
    assert time.monotonic() - begin < 300
    assert child.exitcode == -signal.SIGKILL
    assert guard.poll() is not None


def backend_over(watch: Watch, engine: Any) -> Any:
    from llmrec.backends.vllm.backend import VLLMBackend, _Process

    backend = VLLMBackend.__new__(VLLMBackend)
    backend._process, backend._adapter = _Process(watch, engine), None
    return backend


def test_the_backend_says_what_was_seen_and_how_to_go_on_and_is_closed() -> None:
    watch = Watch(QUICK)
    engine = watch.start(lambda: engine_of(Child(SLEEP)))
    engine.enqueue = lambda *_, **__: for_ever(Progress())
    backend = backend_over(watch, engine)
    with raises(BackendError, Facts("failed", says="run the same command again to continue")):
        backend._run([[1]], [None])
    with raises(BackendError, Facts("closed")):
        backend._run([[1]], [None])
    backend.close()


def test_an_error_of_vllm_is_one_line_and_closes_the_backend() -> None:
    watch = Watch(QUICK)
    engine = watch.start(lambda: engine_of(Child(SLEEP)))

    def enqueue(*_: Any, **__: Any) -> None:
        raise KeyError("a\n  b")

    engine.enqueue = enqueue
    backend = backend_over(watch, engine)
    with raises(BackendError, Facts("failed", says="run the same command again to continue")) as caught:
        backend._run([[1]], [None])
    assert "\n" not in str(caught.value)
    assert backend._process.llm is None


# --------------------------------------------------------------------------- the guard

OWNER = '''
import subprocess, sys, time
from types import SimpleNamespace
from llmrec.backends.vllm.supervise import Watch
sleep = "import time; time.sleep(600)"
code = f"""
import subprocess, sys, time
time.sleep(DELAY)
print(subprocess.Popen([sys.executable, '-c', {sleep!r}]).pid, flush=True)
time.sleep(600)
"""
made = []
def build():
    made.append(subprocess.Popen([sys.executable, "-c", code]))
    time.sleep(0.4)
    return SimpleNamespace()
watch = Watch()
watch.start(build)
print(made[0].pid, watch._guard.pid, flush=True)
time.sleep(600)
'''


@pytest.mark.parametrize(("sent", "stopped"), [(signal.SIGKILL, True), (signal.SIGTERM, False)])
def test_an_owner_that_is_killed_leaves_no_process(sent: int, stopped: bool) -> None:
    code = OWNER.replace("DELAY", "0.8")
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    numbers = [int(word) for _ in range(2) for word in owner.stdout.readline().split()]
    assert len(numbers) == 3
    left = [psutil.Process(pid) for pid in numbers]
    if stopped:
        left[0].suspend()
    owner.send_signal(sent)
    owner.wait(10)
    _, alive = psutil.wait_procs(left, timeout=15)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_the_guard_forgets_all_on_quit_and_believes_no_reused_number() -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as child:
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
            assert vllm_guard.watch(os.getppid(), reading) == expected
            os.close(reading)
        assert not vllm_guard.is_tracker(child.pid)
        child.kill()
    assert vllm_guard.start_time(child.pid) is None


# --------------------------------------------------------------------------- the real engine: four starts, no more

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
    """The script in a process of its own, with its engine's processes."""

    def __init__(self, folder: Path, model: Path) -> None:
        script = folder / "script.py"
        script.write_text(SCRIPT, encoding="utf-8")
        self.errors = folder / "stderr"
        with self.errors.open("w") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, str(script), str(model)], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.all: list[psutil.Process] = []

    def wait_for(self, found: Callable[[], bool], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not found():
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
        (found,) = [process for process in self.gather() if part in process.name()]
        return found

    def nothing_left(self) -> bool:
        psutil.wait_procs(self.all, timeout=15)
        return not [p for p in self.all if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def ended(self) -> str:
        """Wait for the end that a dead or hung engine must bring, and return the error's line."""
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
    # The kernel keeps 15 letters of a name, and once a process is dead nothing tells the rest.
    assert "the vLLM engine died: VLLM::EngineCor" in line
    assert "run the same command again to continue" in line


@pytest.mark.slow
@pytest.mark.vllm
def test_real_engine_stopped_in_mid_generate(run: Run) -> None:
    run.wait_for(run.busy)
    time.sleep(1)
    run.called("Worker").suspend()
    line = run.ended()
    assert "the vLLM engine hangs: VLLM::Worker" in line
    assert "stopped" in line
    assert "run the same command again to continue" in line


@pytest.mark.slow
@pytest.mark.vllm
def test_real_engine_does_not_outlive_its_killed_owner(run: Run) -> None:
    run.wait_for(run.busy)
    assert run.called("EngineCore").is_running()
    run.popen.kill()
    assert run.nothing_left()


@pytest.mark.slow
@pytest.mark.vllm
def test_real_engine_killed_while_it_starts(run: Run) -> None:
    def spawned() -> list[psutil.Process]:
        time.sleep(0.1)
        return [p for p in run.gather() if any("spawn_main" in word for word in p.cmdline())]

    run.wait_for(lambda: bool(spawned()))
    spawned()[0].kill()
    line = run.ended()
    assert "vLLM could not start on" in line
    assert "eval.backend=hf" in line
