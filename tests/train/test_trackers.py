"""Trackers get the losses of training and the figures of the evaluation, in one run each, once."""

from __future__ import annotations

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


class Said:
    """What the fake modules were told, in order: ``(module, verb, what)``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []

    def of(self, module: str, verb: str) -> list[Any]:
        return [what for name, called, what in self.calls if (name, called) == (module, verb)]

    def logged(self, module: str, name: str) -> list[float]:
        """Return what was logged under a name that begins so."""
        lines = [what for what in self.of(module, "log")]
        return [value for line in lines for key, value in line.items() if key.startswith(name)]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Said]:
    """Put fake packages of four trackers where Python finds them."""
    told = Said()
    place = tmp_path / "packages"
    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", trackers.importlib.util.find_spec)
    made = {"wandb": wandb(told), "mlflow": mlflow(told), "trackio": trackio(told)}
    made |= {"torch.utils.tensorboard": tensorboard(told)}
    made |= {name: types.ModuleType(name) for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util")}
    made["wandb.sdk.lib.config_util"].ConfigError = ValueError  # type: ignore[attr-defined]
    # TRL looks for it when it is imported, which was before.
    monkeypatch.setattr("trl.trainer.base_trainer.wandb", made["wandb"], raising=False)
    for name, module in made.items():
        if "." not in name:
            import importlib.machinery

            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    yield told


def wandb(told: Said) -> types.ModuleType:
    module: Any = types.ModuleType("wandb")
    module.run, module.config = None, {}

    def init(**options: Any) -> None:
        told.calls.append(("wandb", "init", options))
        module.run = types.SimpleNamespace(id=options["id"] or "w1", url="", summary={}, _label=lambda **_: None)

    def finish() -> None:
        module.run = None

    module.init, module.finish = init, finish
    module.log = lambda line: told.calls.append(("wandb", "log", line))
    module.config = type("Config", (dict,), {"update": lambda *_, **__: None})()
    return module


def mlflow(told: Said) -> types.ModuleType:
    module: Any = types.ModuleType("mlflow")
    active: list[Any] = []

    def start_run(run_id: str | None = None, run_name: str | None = None) -> None:
        told.calls.append(("mlflow", "init", {"run_id": run_id, "run_name": run_name}))
        active.append(types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "m1")))

    module.__version__ = "3.0.0"
    module.utils = types.SimpleNamespace(
        validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100)
    )
    module.active_run = lambda: active[-1] if active else None
    module.is_tracking_uri_set = lambda: False
    module.set_experiment = lambda name: told.calls.append(("mlflow", "experiment", name))
    module.start_run, module.end_run = start_run, active.clear
    module.log_params = lambda *_, **__: None
    module.log_metrics = lambda metrics, step, **_: told.calls.append(("mlflow", "log", metrics))
    return module


def trackio(told: Said) -> types.ModuleType:
    module: Any = types.ModuleType("trackio")
    module.__version__ = "0.30.0"
    module.config = type("Config", (dict,), {"update": lambda *_, **__: None})()
    nothing = types.SimpleNamespace(get=lambda: None)
    module.context_vars = types.SimpleNamespace(current_space_id=nothing, current_run=nothing, current_project=nothing)
    module.init = lambda **options: told.calls.append(("trackio", "init", options))
    module.log = lambda line: told.calls.append(("trackio", "log", line))
    module.finish = lambda: None
    return module


def tensorboard(told: Said) -> types.ModuleType:
    module: Any = types.ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            Path(log_dir).mkdir(exist_ok=True)
            told.calls.append(("tensorboard", "init", log_dir))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.calls.append(("tensorboard", "log", {name: value}))

        def add_text(self, *_: Any) -> None: ...

        def flush(self) -> None: ...

        def close(self) -> None: ...

    module.SummaryWriter = SummaryWriter
    return module


@pytest.mark.slow
def test_losses_and_figures_go_to_every_tracker_once(said: Said, llama_folder: Path, tmp_path: Path) -> None:
    names, out = ["tensorboard", "wandb", "mlflow", "trackio"], tmp_path / "films"
    done = llmrec.run(recipe(llama_folder, names), out=out, data=ROWS, quiet=True)
    (row,) = (row for row in done.results["rows"] if row["arm"] == "tuned")
    value = row["metrics"]["RMSE"]["value"]
    for name in names:
        loss, valid = ("loss", "eval_loss/rating") if name == "mlflow" else ("train/loss", "eval/loss/rating")
        assert len(said.logged(name, loss)) == 2, name
        assert len(said.logged(name, valid)) == 2, name
        figures = said.logged(name, FIGURE)
        assert figures.count(value) == 1, (name, figures)
        assert said.logged(name, "rating/baseline/"), name
    assert (out / "tensorboard").is_dir() and said.of("tensorboard", "init") == [str(out / "tensorboard")] * 2
    # Losses and figures stand in one run of each.
    assert [each["name"] for each in said.of("wandb", "init")] == ["films"]
    assert said.of("mlflow", "init") == [{"run_id": None, "run_name": "films"}]
    assert {(each["name"], each["project"]) for each in said.of("trackio", "init")} == {("films", "llmrec")}
    # A second run finds all done, and has nothing to tell.
    count = len(said.calls)
    llmrec.run(recipe(llama_folder, names), out=out, data=ROWS, quiet=True)
    assert len(said.calls) == count
    # Other figures go to the same runs; the weights are reused.
    llmrec.run(recipe(llama_folder, names, ("tuned", "zero-shot")), out=out, data=ROWS, quiet=True)
    assert said.of("wandb", "init")[-1]["id"] == "w1" and said.of("mlflow", "init")[-1]["run_id"] == "m1"
    assert len(said.logged("trackio", "train/loss")) == 2 and said.logged("trackio", "rating/zero-shot/")


def test_tensorboard_is_the_default_where_it_is_installed(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers.chosen(TrainSection()) == ("tensorboard",)
    assert trackers.chosen(TrainSection(report_to=())) == ()
    assert trackers.chosen(TrainSection(report_to=("wandb",))) == ("wandb",)
    found = trackers.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else found(name))
    assert trackers.chosen(TrainSection()) == ()


def test_a_tracker_that_cannot_begin_stops_before_training(said: Said, tmp_path: Path) -> None:
    def fails(**_: Any) -> None:
        raise ConnectionError("nobody\nanswers")

    sys.modules["wandb"].init = fails  # type: ignore[attr-defined]
    with raises(RecipeError, Facts("failed", column="train.report_to", says="nobody answers")):
        trackers.callbacks(["wandb"], tmp_path)


def test_a_tracker_that_is_lost_costs_no_results(said: Said, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: Any) -> None:
        raise ConnectionError("nobody answers")

    log, sys.modules["wandb"].log = sys.modules["wandb"].log, fails  # type: ignore[attr-defined]
    trackers.report(["wandb", "trackio"], {"a/NDCG@10": 0.5}, tmp_path, step=3)
    assert "wandb did not accept the evaluation metrics" in caplog.text
    assert said.logged("trackio", "a/") == [0.5]
    # They are told the next time, to the one that lacks them.
    sys.modules["wandb"].log = log  # type: ignore[attr-defined]
    trackers.report(["wandb", "trackio"], {"a/NDCG@10": 0.5}, tmp_path, step=3)
    assert (said.logged("wandb", "a/"), said.logged("trackio", "a/")) == ([0.5], [0.5])


def test_another_training_in_a_folder_has_runs_of_its_own(said: Said, tmp_path: Path) -> None:
    trackers.callbacks(["wandb", "tensorboard"], tmp_path)
    sys.modules["wandb"].run = None  # type: ignore[attr-defined]
    trackers.forget(tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    trackers.callbacks(["wandb"], tmp_path)
    assert [each["id"] for each in said.of("wandb", "init")] == [None, None]
