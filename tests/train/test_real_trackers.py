"""Trackers with their packages, offline: logged losses and metrics are read back; run by `make test-trackers`."""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmrec
from tests.train.test_trackers import FIGURE, ROWS, recipe

# Warnings of the packages, such as deprecations of libraries that they use.
pytestmark = pytest.mark.filterwarnings("ignore")


def installed(package: str) -> Any:
    return pytest.importorskip(package, reason=f"{package} is not installed: make test-trackers")


def done(model: Path, folder: Path, name: str) -> float:
    """Train and evaluate with a tracker, and return the RMSE of the fine-tuned model."""
    result = llmrec.run(recipe(model, [name]), out=folder / "films", data=ROWS, quiet=True)
    (row,) = (row for row in result.results["rows"] if row["arm"] == "tuned")
    value: float = row["metrics"]["RMSE"]["value"]
    return value


def check(logged: dict[str, list[float]], value: float, loss: str, valid: str) -> None:
    """Compare the records of a tracker with the run: two losses of training and of validation, and each metric once."""
    assert len(logged[loss]) == 2 and len(logged[valid]) == 2
    (name,) = (name for name in logged if name.startswith(FIGURE) and name.endswith("RMSE"))
    assert logged[name] == [pytest.approx(value)]


def test_tensorboard(llama_folder: Path, tmp_path: Path) -> None:
    installed("tensorboard")
    value = done(llama_folder, tmp_path, "tensorboard")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(tmp_path / "films" / "tensorboard")).Reload()
    logged = {name: [each.value for each in read.Scalars(name)] for name in read.Tags()["scalars"]}
    check(logged, value, "train/loss", "eval/loss/rating")


def test_mlflow(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = installed("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    value = done(llama_folder, tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("llmrec").experiment_id])
    assert (run.info.run_name, run.info.status) == ("films", "FINISHED")
    logged = {
        name: [each.value for each in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    check(logged, value, "loss", "eval_loss/rating")


def stored(file: bytes) -> Iterator[bytes]:
    """Yield the records of a W&B file: after 7 bytes, blocks of 32 KiB as in the log of LevelDB."""
    offset, parts = 7, b""
    while offset + 7 <= len(file):
        room = 32768 - offset % 32768
        if room < 7:
            offset += room
            continue
        _, length, kind = struct.unpack("<IHB", file[offset : offset + 7])
        parts += file[offset + 7 : offset + 7 + length]
        offset += 7 + length
        # A complete record, or the last part of one.
        if kind in (1, 4):
            yield parts
            parts = b""


def test_wandb(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    value = done(llama_folder, tmp_path, "wandb")
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    logged: dict[str, list[float]] = {}
    for data in stored(path.read_bytes()):
        record = records.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            logged.setdefault(item.key or ".".join(item.nested_key), []).append(json.loads(item.value_json))
    check(logged, value, "train/loss", "eval/loss/rating")
