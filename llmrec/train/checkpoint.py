"""Checkpoints that can be trusted: sealed by a manifest once saving is over, and gone on from only if that verifies.

The Trainer writes a checkpoint file by file under its final name, so a kill in the middle leaves a folder that looks
newest and cannot be loaded.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llmrec.durable import verifies

log = logging.getLogger(__name__)


class OnSave(TrainerCallback):  # type: ignore[misc]
    """Does something with each checkpoint that was just saved: writes more into it, or seals it after its last file.

    Args:
        work: Handed the checkpoint's folder. Of several callbacks the first is called first.
    """

    def __init__(self, work: Callable[[Path], None]) -> None:
        self._work = work

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do it, in one process of many."""
        if state.is_world_process_zero:
            self._work(Path(args.output_dir) / f"checkpoint-{state.global_step}")


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
