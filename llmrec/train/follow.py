"""Monitors training: progress, speed, validation metrics, and one log line per step."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from llmrec.backends.encode import TokenRow
from llmrec.durable import check_not_link, parse_json, replace_atomically, write_text
from llmrec.errors import LlmrecError
from llmrec.progress import Progress, log_line
from llmrec.recipe.schema import TrainSection
from llmrec.train.batches import padded_inputs
from llmrec.train.checkpoint import checkpoint_steps
from llmrec.train.loss import StateLoss, rows_loss
from llmrec.train.precision import mixed_precision
from llmrec.train.world import World, run_in_wrapped_forward

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

# Early stopping: keeps the adapter with the best validation metric so far.


class BestAdapter:
    """Keeps the adapter with the best validation result so far.

    A validation that is repeated after a kill may give a different value, since sums on a GPU are not deterministic. So
    the best adapter at a checkpoint is kept even if a later one is better.
    """

    def __init__(
        self,
        folder: Path,
        patience: int | None,
        measure: Callable[[Any], float],
        save: Callable[[Any, Path], None],
        checkpoints: Path,
    ) -> None:
        """Prepare to record validations.

        Args:
            folder: The folder of the adapters, each in a folder named by its step.
            patience: Validations without improvement after which `done` is true; None: never.
            measure: Returns the metric of a model; higher is better.
            save: Writes a model's adapter into an existing folder.
            checkpoints: The folder of the checkpoints.
        """
        self._folder, self._patience, self._measure, self._save = folder, patience, measure, save
        self._checkpoints = checkpoints
        # Step and metric of each validation that was the best at its time.
        self._found: list[tuple[int, float]] = []
        self._since = 0

    @property
    def step(self) -> int:
        """Step of the best validation."""
        return self._found[-1][0] if self._found else 0

    def resume(self, looks: Iterable[tuple[int, float]]) -> None:
        """Read the validation results of an interrupted run up to the checkpoint."""
        self._found, self._since = [], 0
        for step, value in looks:
            self._count(step, value)
        while self._found and not (self._folder / str(self.step)).is_dir():
            self._found.pop()
        self._tidy()

    def look(self, step: int, model: torch.nn.Module) -> float:
        """Validate a model, and keep its adapter if it is the best so far."""
        value = self._measure(model)
        if self._count(step, value):
            with replace_atomically(self._folder / str(step)) as draft:
                draft.mkdir()
                self._save(model, draft)
            self._tidy()
        return value

    def saved(self, checkpoint: Path) -> None:
        """Remove adapters that are no longer needed, after a new checkpoint is complete."""
        self._tidy()

    @property
    def done(self) -> bool:
        """Whether training should end."""
        return self._patience is not None and self._since >= self._patience

    def copy_to(self, folder: Path) -> None:
        """Copy the best adapter into a new folder.

        Raises:
            LlmrecError: If it was removed.
        """
        kept = self._folder / str(self.step)
        if not kept.is_dir():
            raise LlmrecError(
                f"{kept}, the adapter with the best validation result, is missing; remove {self._checkpoints} and "
                "train again",
                kind="missing-file",
                at=kept,
            )
        shutil.copytree(kept, folder)

    def _count(self, step: int, value: float) -> bool:
        better = value > (self._found[-1][1] if self._found else -math.inf)
        if better:
            self._found.append((step, value))
            self._since = 0
        else:
            self._since += 1
        return better

    def _tidy(self) -> None:
        """Remove adapters that no checkpoint needs, and incomplete files of an interrupted run."""
        steps = [step for step, _ in self._found]
        needed = {
            next((step for step in reversed(steps) if step <= at), 0) for at in checkpoint_steps(self._checkpoints)
        }
        kept = {str(step) for step in {*needed, self.step}} if steps else set()
        check_not_link(self._folder)
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else ():
            if path.name not in kept and re.fullmatch(r"[0-9]+|\.[0-9]+\.llmrec\.draft", path.name):
                shutil.rmtree(path)


class TrainingMonitor(TrainerCallback):  # type: ignore[misc]
    """Shows progress, measures speed, computes validation losses, and writes one JSON line per step."""

    def __init__(
        self,
        steps: int,
        tokens: int,
        valid: Mapping[str, Sequence[TokenRow]],
        section: TrainSection,
        log_file: Path,
        *,
        pad: int,
        quiet: bool,
        by: StateLoss | None = None,
        best: BestAdapter | None = None,
        world: World,
    ) -> None:
        self._world = world
        # With sharded weights, a single process cannot run the model.
        self.everybody = False
        # Log fields of steps whose examples are generated during training.
        self.metrics: Callable[[], Mapping[str, float]] = dict
        self._mean_tokens = tokens / max(steps, 1)
        self._valid, self._section, self._file, self._pad, self._by = valid, section, log_file, pad, by
        self._best = best
        self.records: list[dict[str, Any]] = []
        # Gradient norm of the last step.
        self._norm: float | None = None
        # Seconds of earlier, interrupted calls up to the checkpoint from which this call resumed.
        self.before = 0.0
        self._begin = time.monotonic()
        self._spent = 0.0
        self._tokens_timed = 0.0
        self._step_start = 0.0
        self._quiet = quiet or not world.first
        self._bar = Progress("train", steps, unit="steps", quiet=self._quiet)

    def open(self, *, resumed: bool) -> None:
        """Start a new log, or read the log of a resumed run."""
        if resumed and self._file.is_file():
            self.records = [
                record
                for line in self._file.read_text(encoding="utf-8").splitlines()
                if (record := _parse_log_line(line))
            ]
        elif self._world.first:
            write_text(self._file, "")

    def speed(self) -> float:
        """Tokens per second over the timed steps, without validation."""
        if not self._spent:
            return float(self.records[-1].get("tokens_per_second", 0.0)) if self.records else 0.0
        return self._tokens_timed / self._spent

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove log lines after the checkpoint, and compute the validation loss before the first step."""
        self.records = [record for record in self.records if record["step"] <= state.global_step]
        if self._world.first:
            write_text(self._file, "".join(json.dumps(record) + "\n" for record in self.records))
        self.before = float(self.records[-1].get("seconds", 0.0)) if self.records else 0.0
        if state.global_step and self._world.first:
            log_line(f"training: resuming from step {state.global_step} of {state.max_steps}")
        self._bar.start()
        self._bar.skip(state.global_step)
        if self._best is not None:
            looks = [(record["step"], record.get("valid_ndcg")) for record in self.records]
            self._best.resume((step, value) for step, value in looks if value is not None)
        if not self.records:
            self._write_record({"step": 0, "loss": None, "learning_rate": 0.0, **self._validate(0, kwargs["model"])})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._step_start = _synchronised_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self._spent += _synchronised_time() - self._step_start
        self._tokens_timed += self.metrics().get("tokens", self._mean_tokens)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write the log line of a step, with validation losses if they are due.

        Raises:
            LlmrecError: If the loss is not a number.
        """
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        if not math.isfinite(float(logs["loss"])):
            self._bar.stop(failed=True)
            raise self._divergence_error(step, logs["loss"])
        self._norm = float(logs["grad_norm"]) if "grad_norm" in logs else None
        due = step % self._section.valid_every == 0 or step == state.max_steps
        looks = self._validate(step, kwargs["model"]) if due else self._no_validation()
        figures = {name: float(value) for name, value in logs.items() if "/" in name}
        metrics = dict(self.metrics())
        # Trackers are called next with the same log.
        logs.update(_tracker_metrics(looks) | {f"reward/{name}": value for name, value in metrics.items()})
        self._write_record(
            {
                "step": step,
                "loss": float(logs["loss"]),
                "learning_rate": float(logs.get("learning_rate", 0.0)),
                **looks,
                **({"figures": figures} if figures else {}),
                **({"reward": metrics} if metrics else {}),
            }
        )
        # The measurement of one process decides for all processes.
        if self._section.judge is not None:
            control.should_training_stop |= bool(self._world.agree(self._best is not None and self._best.done))
        self._bar.reach(step, f"loss {float(logs['loss']):.3f}  {self.speed():,.0f} tokens/s")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the progress bar."""
        self._bar.stop()

    def _divergence_error(self, step: int, loss: object) -> LlmrecError:
        """Return the error for a loss that is not finite, with the gradient norm of the previous step."""
        before = "" if self._norm is None else f", after a gradient of norm {self._norm:g} at step {step - 1}"
        column, advice = "train.learning_rate", "lower train.learning_rate, or set model.dtype=float32"
        if self._norm is not None and not math.isfinite(self._norm):
            # The loss of the previous step was finite, so its backward pass failed, whatever the learning rate.
            column = "model.dtype"
            advice = (
                "the loss was finite, so the backward pass overflowed or an attention kernel is faulty; set "
                "model.dtype=float32, or train.packing=none. A lower train.learning_rate does not help"
            )
        return LlmrecError(
            f"training: the loss is {loss} at step {step}{before}; {advice}", kind="failed", column=column
        )

    def _write_record(self, record: dict[str, Any]) -> None:
        record["tokens_per_second"] = self.speed()
        record["seconds"] = self.before + time.monotonic() - self._begin
        self.records.append(record)
        if not self._world.first:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _validate(self, step: int, model: torch.nn.Module) -> dict[str, object]:
        """Compute the validation metrics in one process while the others wait."""
        if not (self._world.first or self.everybody):
            return dict(self._no_validation())
        when = f"at step {step}" if step else "before step 1"
        with Progress(f"validation {when}", sum(map(len, self._valid.values())), unit="rows", quiet=self._quiet) as bar:
            result: dict[str, object] = {"valid_loss": self._validation_losses(model, bar)}
        if self._best is not None:
            training = model.training
            with Progress(f"validation {when}: NDCG@10", None, quiet=self._quiet):
                result["valid_ndcg"] = self._best.look(step, model)
            model.train(training)
        return result

    def _no_validation(self) -> dict[str, None]:
        return {"valid_loss": None} | ({} if self._best is None else {"valid_ndcg": None})

    def _validation_losses(self, model: torch.nn.Module, bar: Progress) -> dict[str, float] | None:
        """Return the mean validation loss by task: in nats per target token, or the loss of the rating head."""
        if not any(self._valid.values()):
            return None
        was_training = model.training
        model.eval()
        losses = {}
        with torch.no_grad():
            for task, rows in self._valid.items():
                total, count = 0.0, 0.0
                for start in range(0, len(rows), 8):
                    laid = padded_inputs(model, rows[start : start + 8], self._pad)
                    inputs = {name: torch.tensor(values, device=model.device) for name, values in laid.items()}
                    loss, n = run_in_wrapped_forward(model, self._summed, inputs)
                    total, count = total + float(loss), count + n
                    bar.advance(len(rows[start : start + 8]))
                if count:
                    losses[task] = total / count
        model.train(was_training)
        return losses

    def _summed(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, float]:
        with mixed_precision(model):
            return rows_loss(model, inputs, self._by)


def _parse_log_line(line: str) -> dict[str, Any] | None:
    """Parse a log line; None for an incomplete line of an interrupted run."""
    try:
        record: dict[str, Any] = parse_json(line)
    except ValueError:
        return None
    return record


def _tracker_metrics(looks: Mapping[str, Any]) -> dict[str, float]:
    """Return validation metrics under the names that trainers use."""
    losses = {f"eval_loss/{task}": loss for task, loss in (looks.get("valid_loss") or {}).items()}
    ndcg = looks.get("valid_ndcg")
    return losses if ndcg is None else {**losses, "eval_NDCG@10": ndcg}


def _synchronised_time() -> float:
    """Return the time after all pending GPU work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()
