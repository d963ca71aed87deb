"""Several processes of one command: which of them this one is, and which of them says how it ended.

torchrun and accelerate launch tell it in the environment, before anything of torch is imported. What a training does
with it is in `llmrec.train.world`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta

from llmrec.errors import LlmrecError, RecipeError, require

# What launchers of other kinds count processes in, which accelerate reads too.
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_WAIT = timedelta(seconds=10)


def size() -> int:
    """Return how many processes a launcher started for this command; 1: it was started alone."""
    return max(map(_number, _COUNTS))


def rank() -> int:
    """Return the number of this process among them; the first one is 0, and so is one that was started alone."""
    return max(0, _number("RANK", 0)) if size() > 1 else 0


def alone(command: str) -> None:
    """Refuse to be one of several processes.

    Args:
        command: What does not run in several, such as ``llmrec run``.

    Raises:
        RecipeError: If a launcher started several: each would write the same files.
    """
    if size() > 1:
        raise RecipeError(
            f"{command} works in one process, and the environment says that a launcher started {size()} "
            "(WORLD_SIZE); train with `llmrec train RECIPE --launch N`, and start the rest without torchrun or "
            "accelerate launch",
            kind="unsupported",
        )


def begins_to_tell() -> bool:
    """Whether this process is the first of its command that fails: it says why, and the others end silently.

    The launcher keeps the note, so that it outlives whoever wrote it. Where it is gone, every process speaks.
    """
    if size() == 1:
        return True
    with suppress(Exception):  # whatever is wrong with a connection, an error is not to be lost over it
        store = require("torch.distributed", "train").TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, _WAIT, False
        )
        return int(store.add(f"llmrec/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)) == 1
    return True


def lost(count: int) -> LlmrecError:
    """Return the error of a process whose work needs one that has ended."""
    return LlmrecError(
        f"training: another of the {count} processes ended, so this one ends too; the same command resumes at the last "
        "checkpoint, with as many processes or with others",
        kind="failed",
    )


def _number(name: str, default: int = 1) -> int:
    text = os.environ.get(name, "").strip()
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else default
