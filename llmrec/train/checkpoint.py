"""Verified checkpoints: each has a manifest with checksums, and training resumes only from one that matches it.

The Trainer writes a checkpoint file by file under its final name, so the newest folder after a kill may be incomplete.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from llmrec.durable import check_not_link, matches_manifest
from llmrec.train.world import World

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

# Files from which the Trainer resumes in addition to the weights; torch loads no other files of a checkpoint.
_STATE_FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "optimizer.bin",
    "pytorch_model_fsdp.bin",
)
FSDP_MODEL_FILE = "pytorch_model_fsdp.bin"
"""The file of the Trainer's checkpoints that only FSDP writes."""

log = logging.getLogger(__name__)


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Adds files to each saved checkpoint, and writes its checksum manifest last.

    Args:
        works: Functions called with the checkpoint's folder, in order.
        world: The training processes; each saves its random states, and the first one does the rest.
        minutes: Maximum time between checkpoints; None: save only by steps.
        every: Save only after a multiple of this number of steps, which share their rollouts.
    """

    def __init__(
        self,
        works: Sequence[Callable[[Path], None]],
        world: World,
        *,
        minutes: float | None = None,
        every: int = 1,
    ) -> None:
        self._works, self._world, self._minutes, self._every = works, world, minutes, every
        self._since = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save a checkpoint if enough time has passed since the last one."""
        if self._minutes is not None and state.global_step % self._every == 0:
            control.should_save |= bool(self._world.agree(time.monotonic() - self._since >= 60 * self._minutes))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the checkpoint, in the first process only."""
        self._since = time.monotonic()
        self._world.wait()
        if self._world.first:
            for work in self._works:
                work(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints saved by the Trainer, newest first.

    Raises:
        LlmrecError: If one is a link, through which the Trainer would write.
    """
    check_not_link(folder)
    results = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    for path in results:
        check_not_link(path)
    return sorted((path for path in results if path.is_dir()), key=_checkpoint_step, reverse=True)


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the step numbers of the checkpoints in a folder, newest first."""
    return [_checkpoint_step(path) for path in checkpoint_folders(folder)]


def _checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_old_checkpoints(count: int, checkpoint: Path) -> None:
    """Remove all but the newest checkpoints, after a new one is complete.

    The Trainer's own limit would remove every folder whose name begins like that of a checkpoint.
    """
    for old in checkpoint_folders(checkpoint.parent)[count:]:
        shutil.rmtree(old)


def _describe_unloadable_file(checkpoint: Path) -> str:
    """Return the first file of a checkpoint that torch would refuse to load; empty if there is none.

    A sealed folder may still contain pickled objects. The Trainer refuses them too, by ending the run.
    """
    for file in sorted(file for name in _STATE_FILES for file in checkpoint.glob(name)):
        try:
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True, mmap=file.suffix == ".pt")
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:100]
            return f"holds {file.name}, which is not a plain state ({reason}),"
    return ""


def newest_valid_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is valid, and remove newer and invalid ones.

    Raises:
        LlmrecError: If one is a link.
    """
    sound: list[Path] = []
    for checkpoint in checkpoint_folders(folder):
        why = "" if matches_manifest(checkpoint) else "was not saved in full"
        if not why and not sound:
            why = _describe_unloadable_file(checkpoint)
        if not why:
            sound.append(checkpoint)
        else:
            log.warning("training: %s %s and is removed", checkpoint, why)
            shutil.rmtree(checkpoint)
    return sound[0] if sound else None
