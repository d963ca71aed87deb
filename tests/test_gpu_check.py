"""`make gpu-check` with commands that are made up: verdicts, resuming, the page; and its measurements on a CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.gpu import __main__ as gpu_check
from eval.benchmarks.gpu.checks import CHECKS, Check, Done, Failure, Machine, NotRun, call
from eval.benchmarks.gpu.page import page

STAMP = "NVIDIA L4, 580.1, commit abc"


class Shell:
    """Answers commands by what they hold."""

    def __init__(self, answers: Mapping[str, tuple[int, str]]) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    def __call__(self, command: Sequence[str], log: Path, **_: Any) -> Done:
        words = " ".join(map(str, command))
        self.asked.append(words)
        status, text = next((answer for sign, answer in self.answers.items() if sign in words), (0, ""))
        return Done(status, text, 1.0)


def machine(tmp_path: Path, answers: Mapping[str, tuple[int, str]]) -> Machine:
    first = {"nvidia-smi": (0, "NVIDIA L4, 580.1\n"), "rev-parse": (0, "abc\n")}
    return Machine(tmp_path, Path("work"), Shell({**first, **answers}))


def chosen(*numbers: int) -> list[Check]:
    return [check for check in CHECKS if check.number in numbers]


def found_by(tmp_path: Path, numbers: Sequence[int], answers: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    return gpu_check.run(
        chosen(*numbers), machine(tmp_path, answers), {"checks": {}}, again=False, keep=lambda kept: None
    )["checks"]


def test_there_are_fifteen() -> None:
    assert [check.number for check in CHECKS] == list(range(1, 16))


def test_without_a_gpu_it_says_so_and_ends_with_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_check, "has_nvidia_gpu", lambda: False)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_verdicts(tmp_path: Path) -> None:
    torch = json.dumps({"torch": "2.13.0", "cuda": "13.0", "available": True, "card": "L4"})
    right = {"import json, torch": (0, f"hello\n{torch}\n"), "du -s": (0, "9000000000\t.venv\n")}
    found = found_by(tmp_path, [1, 3], right)
    assert [found[n]["verdict"] for n in ("1", "3")] == ["passed", "passed"]
    assert found["1"]["found"]["cuda"] == "13.0" and found["3"]["found"] == {"environment_gb": 9.0}
    assert found["1"]["stamp"] == STAMP
    # A build for the CPU alone, a command that fails, and one that says nothing.
    wrong = {"import json, torch": (0, torch.replace('"13.0"', "null")), "doctor": (1, "a\nthe driver is too old\n\n")}
    found = found_by(tmp_path, [1, 3, 10], wrong)
    assert [found[n]["verdict"] for n in ("1", "3", "10")] == ["failed"] * 3
    assert "the driver is too old" in found["3"]["said"] and "no JSON" in found["10"]["said"]


@pytest.mark.parametrize(
    ("number", "told", "verdict"),
    [
        (8, {"float32": 0, "bfloat16": 20}, "passed"),
        (8, {"float32": 3, "bfloat16": 2}, "failed"),
        (9, {"peak_gib": 10.0, "estimate_gib": 9.0, "free_gib": 22.0}, "passed"),
        (9, {"peak_gib": 14.0, "estimate_gib": 9.0, "free_gib": 22.0}, "failed"),
        (9, {"peak_gib": None, "estimate_gib": 27.0, "free_gib": 22.0}, "passed"),
        (9, {"peak_gib": None, "estimate_gib": 9.0, "free_gib": 22.0}, "failed"),
        (10, {"plain": 5.0, "packed": 5.01, "math_attention": 0}, "passed"),
        (10, {"plain": 5.0, "packed": 5.01, "math_attention": 2}, "failed"),
        (10, {"plain": 5.0, "packed": 6.0, "math_attention": 0}, "failed"),
        (12, {"waited": 0.2, "unwaited": 0.1}, "passed"),
        (12, {"waited": 0.1, "unwaited": 0.2}, "failed"),
    ],
)
def test_what_is_measured_decides(number: int, told: dict[str, Any], verdict: str, tmp_path: Path) -> None:
    entry = found_by(tmp_path, [number], {"gpu.measure": (0, json.dumps(told))})[str(number)]
    assert entry["verdict"] == verdict and (entry["said"] == "") is (verdict == "passed")
    assert entry["found"], "what was measured is told in either case"


def test_engines_are_compared_row_by_row(tmp_path: Path) -> None:
    shell = machine(tmp_path, {})
    run = shell.folder(CHECKS[4]) / "run"
    run.mkdir(parents=True)
    rows = [
        {"id": "direct/tuned", "arm": "tuned", "metrics": {"NDCG@10": {"value": 0.25}}},
        {"id": "direct/random", "arm": "baseline", "metrics": {"NDCG@10": {"value": 0.1}}},
    ]
    (run / "results.json").write_text(json.dumps({"rows": rows}))
    entry = gpu_check.one(CHECKS[5], shell)
    assert entry["verdict"] == "passed"
    assert {each["largest_difference"] for each in entry["found"].values()} == {0.0}
    (run / "results.json").unlink()
    assert gpu_check.one(CHECKS[5], shell)["verdict"] == "not run"


def test_what_passed_is_not_run_again_and_each_result_is_kept_at_once(tmp_path: Path) -> None:
    kept: list[dict[str, Any]] = []
    runs: list[int] = []

    def fails(_: Machine, folder: Path) -> dict[str, Any]:
        runs.append(2)
        raise Failure("too slow", {"seconds": 9})

    def cannot(_: Machine, folder: Path) -> dict[str, Any]:
        raise NotRun("there is no docker")

    def passes(_: Machine, folder: Path) -> dict[str, Any]:
        runs.append(1)
        assert folder.is_dir()
        return {"a": 1}

    checks = [
        Check(1, "one", "it ends", passes),
        Check(2, "two", "it is fast", fails),
        Check(3, "3", "it ends", cannot),
    ]
    place = machine(tmp_path, {})
    for count in (1, 2):
        before = kept[-1] if kept else {"checks": {}}
        found = gpu_check.run(
            checks, place, before, again=False, keep=lambda now: kept.append(json.loads(json.dumps(now)))
        )
        assert [found["checks"][str(n)]["verdict"] for n in (1, 2, 3)] == ["passed", "failed", "not run"]
        assert runs == [1, *[2] * count]
    assert [len(each["checks"]) for each in kept[:3]] == [1, 2, 3]
    gpu_check.run(checks[:1], place, kept[-1], again=True, keep=lambda now: None)
    assert runs.count(1) == 2
    other = Machine(
        tmp_path, Path("work"), Shell({"nvidia-smi": (0, "NVIDIA H100, 580.1\n"), "rev-parse": (0, "abc\n")})
    )
    gpu_check.run(checks[:1], other, kept[-1], again=False, keep=lambda now: None)
    assert runs.count(1) == 3, "what another card passed is not taken over"


def test_the_page_says_what_was_run_and_that_nothing_was(tmp_path: Path) -> None:
    empty = page({"checks": {}})
    assert empty.count("| not run |") == len(CHECKS) and "No machine with a GPU" in empty
    assert Path("docs/gpu.md").read_text(encoding="utf-8") == page(gpu_check.stored(gpu_check.RESULT))
    found = {
        "1": {"verdict": "passed", "seconds": 61.4, "found": {"card": "a|b"}, "said": "", "stamp": STAMP},
        "2": {"verdict": "failed", "seconds": 5.0, "found": {}, "said": "x | y", "stamp": STAMP},
    }
    told = page({"checks": found})
    assert f"1 of 15 passed, on `{STAMP}`." in told
    assert '| passed | `61` | `{"card": "a\\|b"}` |' in told and "x \\| y" in told


def test_commands_are_run_for_real_and_their_output_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert call(["sh", "-c", "echo one; exit 3"], log, root=tmp_path).status == 3
    done = call(["sh", "-c", "echo $MORE"], log, root=tmp_path, env={"MORE": "two"})
    assert (done.status, done.output) == (0, "two\n")
    assert call(["sleep", "9"], log, root=tmp_path, seconds=0.1).status == 124
    assert call(["no-such-command"], log, root=tmp_path).status == 127
    assert "one\n" in log.read_text()


@pytest.mark.slow
def test_measurements_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_folder: Path) -> None:
    pytest.importorskip("trl")
    from eval.benchmarks.gpu import measure

    for checkpointing in (False, True):
        found = measure.step("tiny", checkpointing, device="cpu", tokens=64, steps=2)
        assert found["peak_gib"] is None and found["estimate_gib"] > 0 and found["seconds"] > 0
    packed = measure.packing(device="cpu", shape="tiny")
    assert packed["packed"] == pytest.approx(packed["plain"], rel=0.02) and packed["attention"]
    assert set(measure.clock(device="cpu", shape="tiny", steps=3)) == {"waited", "unwaited"}
    monkeypatch.setattr(measure, "resolve", lambda *_: str(llama_folder))
    assert measure.model("tiny", tmp_path / "m", device="cpu")["parameters"] > 0
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.hidden_size == 32
