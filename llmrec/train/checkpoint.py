"""Checkpoints that can be trusted: sealed by a manifest once saving is over, and gone on from only if that verifies.

The Trainer writes a checkpoint file by file under its final name, so a kill in the middle leaves a folder that looks
newest and cannot be loaded.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llmrec.durable import seal, verifies

log = logging.getLogger(__name__)


class Seal(TrainerCallback):  # type: ignore[misc]
    """Seals each checkpoint after its last file is written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint that was just saved."""
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint that verifies, and remove those that do not.

    A torn checkpoint must go: the Trainer would count it among those to keep, and drop a sound one for it.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    sound = []
    for checkpoint in found:
        if verifies(checkpoint):
            sound.append(checkpoint)
        else:
            log.warning("training: %s was not saved in full and is dropped", checkpoint)
            shutil.rmtree(checkpoint)
    return sound[0] if sound else None
