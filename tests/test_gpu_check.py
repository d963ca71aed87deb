"""`make gpu-check`: each check can fail, passed checks are kept, the page, and measurements on a CPU."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.benchmarks.figures.parts import put
from eval.benchmarks.gpu import __main__ as gpu_check
from eval.benchmarks.gpu import checks
from eval.benchmarks.gpu.checks import CHECKS, Check, Facts, Failure, Machine, NotRun, faults
from llmrec.recipe.load import load_recipe

STAMP = "NVIDIA L4, 580.1, commit abc"
NAMED = {check.name: check for check in CHECKS}


@pytest.fixture
def machine(tmp_path: Path, llama_folder: Path) -> Machine:
    work = tmp_path / "work"
    work.mkdir()
    return Machine(Path.cwd(), work, 0, sys.executable, llama_folder)


def inside(check: Check) -> Facts:
    """Return a measurement that passes, nested by one level as in some checks."""
    return {"way": {name: low if math.isfinite(low) else high for name, (low, high) in check.limits.items()}}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_passes_and_fails(check: Check, machine: Machine) -> None:
    def verdict(facts: Mapping[str, Any]) -> str:
        measured = replace(check, measure=lambda *_: facts, gpus=0, on_cpu=True)
        return str(gpu_check.one(measured, machine)["verdict"])

    good = inside(check)
    assert check.limits and verdict(good) == "passed"
    for name, (low, high) in check.limits.items():
        wrong = [low - 1, high + 1, None, math.nan, "many", [1]]
        for value in [value for value in wrong if value not in (-math.inf, math.inf)]:
            assert verdict({"way": {**good["way"], name: value}}) == "failed", value
            # One wrong measurement of several is enough.
            assert verdict({**good, "other way": {name: value}}) == "failed"
        assert verdict({"way": {key: value for key, value in good["way"].items() if key != name}}) == "failed"


def test_limits_of_measurements_that_decide() -> None:
    """Measurements as they would be on a GPU with the fault that the check is for."""
    nan = {"columns_mod_128": 64, "lowest_logsumexp": -132.0, "math_attention": 0}
    for name, facts in {
        "masked-backward": {**nan, "nonfinite_gradients": 3072, "gradient_difference": None},
        "launch": {**checks.apart([2.0, 1.0], [2.0, 1.1]), "status_of_killed": 2, "seconds_to_end": 9},
        "quantised": {
            "qlora": checks.fall([3.0] * 120),
            "resumed": checks.apart([3.0], [3.0]),
            "steps_when_killed": 60,
        },
        "equal-losses": checks.apart([2.0, 1.0], [2.0, math.nan]),
        "fsdp": checks.apart([2.0, 1.0], [2.0]),
        "serve": {"not_answered": 1, "answered": 3, "memory_left_mib": 0},
        "environment": {"cuda": 0, "faults": 0, "environment_gb": 9.0},
    }.items():
        assert len(faults(NAMED[name].limits, facts)) in (1, 2), name
    assert checks.fall([4.0] * 20 + [2.0] * 20) == {"steps": 40, "last_to_first_loss": 0.5}
    assert checks.fall([]) == {"steps": 0, "last_to_first_loss": None}


def test_checks_cover_the_gpu_recipes_and_fsdp() -> None:
    recipes = {f"recipe-{file.stem}": load_recipe(str(file), []) for file in Path("recipes/gpu").rglob("*.yaml")}
    trained = {name for name, recipe in recipes.items() if "tuned" in recipe.eval.arms}
    assert trained == {name for name in NAMED if name.startswith("recipe-")} and len(NAMED) == len(CHECKS)
    config = yaml.safe_load(checks.fsdp_config(Path("docs/scaling.md").read_text(encoding="utf-8")))
    assert config["distributed_type"] == "FSDP" and config["num_processes"] == 2
    assert config["fsdp_config"]["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_exit_code_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_passed_checks_are_kept_and_skipped(machine: Machine) -> None:
    kept: list[dict[str, Any]] = []
    runs: list[str] = []

    def measured(name: str, facts: Facts | Exception, **needs: Any) -> Check:
        def measure(machine: Machine, folder: Path) -> Facts:
            runs.append(name)
            assert folder.is_dir() and machine.ends < math.inf
            if isinstance(facts, Exception):
                raise facts
            return facts

        return Check(name=name, title=name, limits={"a": (1, 2)}, measure=measure, on_cpu=True, **needs)

    listed = [
        measured("good", {"a": 1}),
        measured("bad", {"a": 3}),
        measured("broken", Failure("`x` ended with 1")),
        measured("absent", NotRun("needs docker")),
        measured("two", {"a": 1}, gpus=2),
        measured("large", {"a": 1}, disk=10**9),
    ]
    one_gpu = replace(machine, gpus=1)
    for again in (False, False, True):
        before = kept[-1] if kept else {"checks": {}}
        keep = lambda now: kept.append(json.loads(json.dumps(now)))  # noqa: E731
        result = gpu_check.run(listed, one_gpu, before, STAMP, again=again, keep=keep)["checks"]
    verdicts = [result[check.name]["verdict"] for check in listed]
    assert verdicts == ["passed", "failed", "failed", "not run", "not run", "not run"]
    assert result["two"]["why"] == "needs 2 GPUs" and "needs docker" in result["absent"]["why"]
    assert result["bad"]["measured"] == {"a": 3} and result["bad"]["why"] == "a is 3, not 1 to 2"
    assert [runs.count(name) for name in ("good", "bad", "two", "large")] == [2, 3, 0, 0]
    assert [len(item["checks"]) for item in kept[:6]] == [1, 2, 3, 4, 5, 6]
    gpu_check.run(listed[:1], one_gpu, kept[-1], "NVIDIA H100, 580.1, commit abc", again=False, keep=lambda now: None)
    assert runs.count("good") == 3, "what another GPU passed is not taken over"


def test_page_of_results() -> None:
    empty = gpu_check.table({"checks": {}})
    assert empty.count("| not run |") == len(CHECKS) and "no machine with a GPU" in empty
    page = gpu_check.PAGE.read_text(encoding="utf-8")
    assert page == put(page, gpu_check.PART, gpu_check.table(gpu_check.stored(gpu_check.RESULT)))
    entry = {"verdict": "failed", "seconds": 61.4, "measured": {"wrong": "a|b"}, "why": "x | y", "stamp": STAMP}
    text = gpu_check.table({"checks": {"environment": entry}})
    assert f"0 of {len(CHECKS)} passed, on `{STAMP}`." in text
    assert '| failed; 61 s; x \\| y; `{"wrong": "a\\|b"}` |' in text


def test_runs_commands_and_keeps_their_output(machine: Machine) -> None:
    folder = machine.work
    assert machine.call(folder, "sh", "-c", "echo two; echo why >&2; exit 3").status == 3
    with pytest.raises(Failure, match="ended with 3: why"):
        machine.do(folder, "sh", "-c", "echo two; echo why >&2; exit 3")
    assert machine.call(folder, "sh", "-c", "echo $MORE", MORE="two").output == "two\n"
    assert machine.call(folder, "sleep", "99", until=lambda: True).status == -9
    assert replace(machine, ends=time.monotonic()).call(folder, "sleep", "99").status == -9
    assert "why\n" in (folder / "log.txt").read_text()


def nan_under_masks(patch: pytest.MonkeyPatch) -> None:
    """Make attention return NaN gradients in bfloat16 with a mask, as cuDNN 9.20 does on some GPUs."""
    import torch

    attention = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Any, *rest: Any, attn_mask: Any = None, **options: Any) -> Any:
        result = attention(query, *rest, attn_mask=attn_mask, **options)
        if query.dtype == torch.bfloat16 and attn_mask is not None and result.requires_grad:
            result.register_hook(lambda gradient: gradient * math.nan)
        return result

    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)


def mask_that_is_causal(patch: pytest.MonkeyPatch) -> None:
    """Let rows see the other rows that are packed into the same masked row."""
    import torch

    from llmrec.train import loss

    def everything(model: Any, ends: Any) -> Any:
        return (
            torch.ones(ends.shape[1], ends.shape[1], dtype=torch.bool).tril()[None, None].expand(len(ends), 1, -1, -1)
        )

    patch.setattr(loss, "block_mask", everything)


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        (None, []),
        (nan_under_masks, ["nonfinite_gradients", "gradient_difference"]),
        (mask_that_is_causal, ["gradient_difference"]),
    ],
)
def test_masked_backward_pass_finds_faults(
    fault: Any, wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    from eval.benchmarks.gpu import measure

    if fault is not None:
        fault(monkeypatch)
    facts = json.loads(json.dumps(measure.masked(str(tmp_path / "model"), "cpu")))
    assert [line.split()[0] for line in faults(NAMED["masked-backward"].limits, facts)] == wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.name for check in CHECKS if check.on_cpu])
def test_checks_run_on_a_cpu(name: str, machine: Machine) -> None:
    pytest.importorskip("trl")
    entry = gpu_check.one(NAMED[name], machine)
    assert entry["verdict"] == "passed", entry


@pytest.mark.slow
def test_measures_a_recipe_and_a_merge_on_a_cpu(machine: Machine) -> None:
    pytest.importorskip("trl")
    facts = checks.recipe_of("recipes/movielens-100k/four-tasks.yaml", machine, machine.work)
    assert facts["steps"] == 200 and facts["last_to_first_loss"] < 1 and facts["estimate_gib"] > 0
    facts = checks.merge(machine, machine.work)
    assert facts["weights_gib"] > 0 and "peak_to_weights" in facts


def test_recipe_without_data_or_model_is_not_run(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {"data.path": "no data", "model.name": "no access", None: "no reviews"}
    calls: list[list[str]] = []

    def call(self: Machine, folder: Path, *command: str, **_: Any) -> checks.Done:
        calls.append([word for word in command if "=" in word][-2:])
        column = next(column for column in wrong if checks._INSTEAD.get(column) not in command or column == wrong[-1])
        error = {"kind": "missing-file", "column": column, "message": plans[column]}
        return checks.Done(2, json.dumps({"error": error}), 1.0)

    monkeypatch.setattr(Machine, "call", call)
    for wrong in (["data.path", "model.name"], [None]):
        with pytest.raises(NotRun, match=plans[wrong[-1]]):
            checks.recipe_of("recipes/gpu/p5.yaml", machine, machine.work)
    assert calls[2] == ["data.source=movielens-100k", "model.name=Qwen/Qwen3-8B"] and len(calls) == 4
