"""Trackers get the losses of training and the metrics of evaluation in one run each, once."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmrec
from llmrec.errors import RecipeError
from llmrec.recipe.schema import TrainSection
from llmrec.train import trackers
from tests.facts import Facts, raises

ROWS = [
    {"user_id": f"u{u}", "item_id": f"i{(u + k) % 9}", "rating": 1 + (u * k) % 5, "timestamp": 100 * u + k}
    for u in range(8)
    for k in range(6)
]
FIGURE = "rating/tuned/expected/"


def recipe(model: Path, names: list[str] | None, arms: tuple[str, ...] = ("tuned",)) -> dict[str, Any]:
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"source": "table"},
        "tasks": {"rating": {"strategies": ["expected"]}},
        "train": {"steps": 2, "valid_every": 1, "batch_tokens": 300, "report_to": names},
        "eval": {"backend": "hf", "arms": list(arms), "users": 3, "bootstrap": 50},
    }


class Calls:
    """Calls of the fake modules, in order: ``(module, verb, arguments)``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []

    def of(self, module: str, verb: str) -> list[Any]:
        return [what for name, called, what in self.calls if (name, called) == (module, verb)]

    def logged(self, module: str, name: str) -> list[float]:
        """Return the values that were logged under names with this prefix."""
        return [value for line in self.of(module, "log") for key, value in line.items() if key.startswith(name)]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Install fake packages of four trackers in this process."""
    record = Calls()
    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", trackers.importlib.util.find_spec)
    modules = {"wandb": wandb(record), "mlflow": mlflow(record), "trackio": trackio(record)}
    modules |= {"torch.utils.tensorboard": tensorboard(record)}
    modules |= {name: types.ModuleType(name) for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util")}
    modules["wandb.sdk.lib.config_util"].ConfigError = ValueError  # type: ignore[attr-defined]
    # TRL looks for it at import time, which is over.
    monkeypatch.setattr("trl.trainer.base_trainer.wandb", modules["wandb"], raising=False)
    for name, module in modules.items():
        if "." not in name:
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    yield record


def wandb(record: Calls) -> types.ModuleType:
    module: Any = types.ModuleType("wandb")
    module.run, module.config = None, {}

    def init(**options: Any) -> None:
        record.calls.append(("wandb", "init", options))
        module.run = types.SimpleNamespace(id=options["id"] or "w1", url="", summary={}, _label=lambda **_: None)

    def finish() -> None:
        module.run = None

    module.init, module.finish = init, finish
    module.log = lambda line: record.calls.append(("wandb", "log", line))
    module.config = type("Config", (dict,), {"update": lambda *_, **__: None})()
    return module


def mlflow(record: Calls) -> types.ModuleType:
    module: Any = types.ModuleType("mlflow")
    active: list[Any] = []

    def start_run(run_id: str | None = None, run_name: str | None = None) -> None:
        record.calls.append(("mlflow", "init", {"run_id": run_id, "run_name": run_name}))
        active.append(types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "m1")))

    module.__version__ = "3.0.0"
    module.utils = types.SimpleNamespace(
        validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100)
    )
    module.active_run = lambda: active[-1] if active else None
    module.is_tracking_uri_set = lambda: False
    module.set_experiment = lambda name: record.calls.append(("mlflow", "experiment", name))
    module.start_run, module.end_run = start_run, active.clear
    module.log_params = lambda *_, **__: None
    module.log_metrics = lambda metrics, step, **_: record.calls.append(("mlflow", "log", metrics))
    return module


def trackio(record: Calls) -> types.ModuleType:
    module: Any = types.ModuleType("trackio")
    module.__version__ = "0.30.0"
    module.config = type("Config", (dict,), {"update": lambda *_, **__: None})()
    nothing = types.SimpleNamespace(get=lambda: None)
    module.context_vars = types.SimpleNamespace(current_space_id=nothing, current_run=nothing, current_project=nothing)
    module.init = lambda **options: record.calls.append(("trackio", "init", options))
    module.log = lambda line: record.calls.append(("trackio", "log", line))
    module.finish = lambda: None
    return module


def tensorboard(record: Calls) -> types.ModuleType:
    module: Any = types.ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            Path(log_dir).mkdir(exist_ok=True)
            record.calls.append(("tensorboard", "init", log_dir))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            record.calls.append(("tensorboard", "log", {name: value}))

        def add_text(self, *_: Any) -> None: ...

        def flush(self) -> None: ...

        def close(self) -> None: ...

    module.SummaryWriter = SummaryWriter
    return module


@pytest.mark.slow
def test_losses_and_metrics_are_logged_once_per_tracker(calls: Calls, llama_folder: Path, tmp_path: Path) -> None:
    names, out = ["tensorboard", "wandb", "mlflow", "trackio"], tmp_path / "films"
    done = llmrec.run(recipe(llama_folder, names), out=out, data=ROWS, quiet=True)
    (row,) = (row for row in done.results["rows"] if row["arm"] == "tuned")
    value = row["metrics"]["RMSE"]["value"]
    for name in names:
        loss, valid = ("loss", "eval_loss/rating") if name == "mlflow" else ("train/loss", "eval/loss/rating")
        assert len(calls.logged(name, loss)) == 2, name
        assert len(calls.logged(name, valid)) == 2, name
        figures = calls.logged(name, FIGURE)
        assert figures.count(value) == 1, (name, figures)
        assert calls.logged(name, "rating/baseline/"), name
    assert (out / "tensorboard").is_dir() and calls.of("tensorboard", "init") == [str(out / "tensorboard")] * 2
    # Losses and metrics are in one run of each tracker.
    assert [each["name"] for each in calls.of("wandb", "init")] == ["films"]
    assert calls.of("mlflow", "init") == [{"run_id": None, "run_name": "films"}]
    assert {(each["name"], each["project"]) for each in calls.of("trackio", "init")} == {("films", "llmrec")}
    # A second run logs nothing.
    count = len(calls.calls)
    llmrec.run(recipe(llama_folder, names), out=out, data=ROWS, quiet=True)
    assert len(calls.calls) == count
    # New metrics are logged to the same runs.
    llmrec.run(recipe(llama_folder, names, ("tuned", "zero-shot")), out=out, data=ROWS, quiet=True)
    assert calls.of("wandb", "init")[-1]["id"] == "w1" and calls.of("mlflow", "init")[-1]["run_id"] == "m1"
    assert len(calls.logged("trackio", "train/loss")) == 2 and calls.logged("trackio", "rating/zero-shot/")


def test_tensorboard_is_the_default_if_installed(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers.selected_trackers(TrainSection()) == ("tensorboard",)
    assert trackers.selected_trackers(TrainSection(report_to=())) == ()
    assert trackers.selected_trackers(TrainSection(report_to=("wandb",))) == ("wandb",)
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else find(name))
    assert trackers.selected_trackers(TrainSection()) == ()


def test_failing_tracker_is_an_error_before_training(calls: Calls, tmp_path: Path) -> None:
    def fails(**_: Any) -> None:
        raise ConnectionError("no\nanswer")

    sys.modules["wandb"].init = fails  # type: ignore[attr-defined]
    with raises(RecipeError, Facts("failed", column="train.report_to", says="no answer")):
        trackers.tracker_callbacks(["wandb"], tmp_path)


def test_tracker_failure_loses_no_results(calls: Calls, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: Any) -> None:
        raise ConnectionError("no answer")

    log, sys.modules["wandb"].log = sys.modules["wandb"].log, fails  # type: ignore[attr-defined]
    trackers.log_evaluation_metrics(["wandb", "trackio"], {"a/NDCG@10": 0.5}, tmp_path, step=3)
    assert "wandb did not accept the evaluation metrics" in caplog.text
    assert calls.logged("trackio", "a/") == [0.5]
    # The next report goes to the tracker without these metrics only.
    sys.modules["wandb"].log = log  # type: ignore[attr-defined]
    trackers.log_evaluation_metrics(["wandb", "trackio"], {"a/NDCG@10": 0.5}, tmp_path, step=3)
    assert (calls.logged("wandb", "a/"), calls.logged("trackio", "a/")) == ([0.5], [0.5])


def test_new_training_in_a_folder_starts_new_runs(calls: Calls, tmp_path: Path) -> None:
    trackers.tracker_callbacks(["wandb", "tensorboard"], tmp_path)
    sys.modules["wandb"].run = None  # type: ignore[attr-defined]
    trackers.remove_tracker_runs(tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    trackers.tracker_callbacks(["wandb"], tmp_path)
    assert [each["id"] for each in calls.of("wandb", "init")] == [None, None]
