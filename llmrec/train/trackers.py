"""Experiment trackers (``train.report_to``), which log training losses and evaluation metrics.

Both go into one run of a tracker, whose id is stored in the run folder. The trackers in `_METRIC_LOGGERS` also get
evaluation metrics; the others that transformers supports get losses only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrec.durable import parse_json, write_json
from llmrec.errors import MissingExtra, RecipeError, did_you_mean, require
from llmrec.recipe.schema import TrainSection

log = logging.getLogger(__name__)

TRACKER_FILES = ("trackers.json", "tensorboard")
"""Files in a run folder: the ids of its tracker runs, and TensorBoard's files."""
DEFAULT_PROJECT = "llmrec"
"""Default project of a tracker; WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME and TRACKIO_PROJECT override it."""
_REPORTED = "reported"


def selected_trackers(section: TrainSection) -> tuple[str, ...]:
    """Return the trackers of a recipe; by default TensorBoard, if it is installed."""
    if section.report_to is not None:
        return section.report_to
    installed = all(importlib.util.find_spec(name) is not None for name in ("tensorboard", "torch"))
    return ("tensorboard",) if installed else ()


def check_trackers(names: Sequence[str]) -> None:
    """Reject trackers that are unknown or not installed.

    Raises:
        RecipeError: If transformers does not support a tracker.
        MissingExtra: If the package of one is not installed.
    """
    if not names:
        return
    known = _integrations_module()
    for name in names:
        if name not in known.INTEGRATION_TO_CALLBACK:
            raise RecipeError(
                f"train.report_to: unknown tracker {name!r}{did_you_mean(name, known.INTEGRATION_TO_CALLBACK)}; "
                f"known: {', '.join(sorted(known.INTEGRATION_TO_CALLBACK))}",
                kind="unknown-name",
                column="train.report_to",
            )
        if name not in known.get_available_reporting_integrations():
            raise MissingExtra(
                f"train.report_to: the package of {name!r} is not installed; install it with: pip install {name}, or "
                "remove the tracker",
                kind="not-installed",
                column="train.report_to",
            )


def remove_tracker_runs(folder: Path) -> None:
    """Remove the tracker runs of an earlier training from a run folder."""
    ids, events = (folder / name for name in TRACKER_FILES)
    ids.unlink(missing_ok=True)
    shutil.rmtree(events, ignore_errors=True)


def tracker_callbacks(names: Sequence[str], folder: Path) -> list[Any]:
    """Start or resume a run of each tracker, and return the callbacks that log training steps.

    Raises:
        RecipeError: If a tracker cannot start a run.
    """
    check_trackers(names)
    known, result = _integrations_module().INTEGRATION_TO_CALLBACK, []
    for name in names:
        try:
            if name == "tensorboard":
                result.append(known[name](_tensorboard_writer(folder)))
            else:
                _start_run(name, folder)
                result.append(known[name]())
        except Exception as error:
            raise RecipeError(
                f"train.report_to: {name} cannot start a run ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); fix this, or remove the tracker",
                kind="failed",
                column="train.report_to",
            ) from error
    return result


def log_evaluation_metrics(names: Sequence[str], figures: Mapping[str, float], folder: Path, *, step: int) -> None:
    """Log the metrics of an evaluation; errors of trackers are only warnings.

    Trackers that do not support evaluation metrics are skipped. Names of figures are such as
    ``direct/tuned/label/after-history/NDCG@10``; ``step`` is that of the evaluated model.
    """
    stamp = hashlib.sha256(json.dumps([sorted(figures.items()), step]).encode()).hexdigest()[:16]
    for name in names:
        reported = f"{name} {_REPORTED}"
        if name not in _METRIC_LOGGERS or _read_tracker_file(folder).get(reported) == stamp:
            continue
        try:
            if name != "tensorboard":
                _start_run(name, folder)
            _METRIC_LOGGERS[name](figures, folder, step)
        except Exception as error:
            log.warning("%s did not accept the evaluation metrics (%s: %s)", name, type(error).__name__, error)
        else:
            write_json(folder / TRACKER_FILES[0], {**_read_tracker_file(folder), reported: stamp})


# --------------------------------------------------------------------------- individual trackers


def _start_run(name: str, folder: Path) -> None:
    """Start a tracker run, or resume the run of the folder."""
    if name in _RUN_STARTERS:
        known = _read_tracker_file(folder).get(name)
        write_json(
            folder / TRACKER_FILES[0], {**_read_tracker_file(folder), name: _RUN_STARTERS[name](folder.name, known)}
        )


def _open_wandb(run: str, known: str | None) -> str:
    wandb = require("wandb", "train")
    if wandb.run is None:
        wandb.init(
            project=os.getenv("WANDB_PROJECT", DEFAULT_PROJECT), name=run, id=known, resume="allow" if known else None
        )
    return str(wandb.run.id)


def _open_mlflow(run: str, known: str | None) -> str:
    mlflow = require("mlflow", "train")
    if mlflow.active_run() is None:
        mlflow.set_experiment(os.getenv("MLFLOW_EXPERIMENT_NAME", DEFAULT_PROJECT))
        mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=run)
    return str(mlflow.active_run().info.run_id)


def _log_to_wandb(figures: Mapping[str, float], folder: Path, step: int) -> None:
    wandb = require("wandb", "train")
    wandb.log({**figures, "train/global_step": step})
    wandb.finish()


def _log_to_mlflow(figures: Mapping[str, float], folder: Path, step: int) -> None:
    mlflow = require("mlflow", "train")
    mlflow.log_metrics({re.sub(r"[^\w\-. :/]", "_", name): value for name, value in figures.items()}, step=step)
    mlflow.end_run()


def _log_to_trackio(figures: Mapping[str, float], folder: Path, step: int) -> None:
    trackio = require("trackio", "train")
    trackio.init(project=trackio_project(), name=folder.name, resume="allow")
    trackio.log({**figures, "train/global_step": step})
    trackio.finish()


def _log_to_tensorboard(figures: Mapping[str, float], folder: Path, step: int) -> None:
    writer = _tensorboard_writer(folder)
    for name, value in figures.items():
        writer.add_scalar(name, value, step)
    writer.close()


_RUN_STARTERS: Mapping[str, Callable[[str, str | None], str]] = {"wandb": _open_wandb, "mlflow": _open_mlflow}
_METRIC_LOGGERS: Mapping[str, Callable[[Mapping[str, float], Path, int], None]] = {
    "tensorboard": _log_to_tensorboard,
    "wandb": _log_to_wandb,
    "mlflow": _log_to_mlflow,
    "trackio": _log_to_trackio,
}


def trackio_project() -> str:
    """Return the project name for trackio, which transformers also uses."""
    return os.getenv("TRACKIO_PROJECT", DEFAULT_PROJECT)


def _tensorboard_writer(folder: Path) -> Any:
    return require("torch.utils.tensorboard", "train").SummaryWriter(log_dir=str(folder / TRACKER_FILES[1]))


def _read_tracker_file(folder: Path) -> dict[str, str]:
    try:
        result = parse_json((folder / TRACKER_FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in result.items()} if isinstance(result, dict) else {}


def _integrations_module() -> Any:
    return require("transformers.integrations.integration_utils", "train")
