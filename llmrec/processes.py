"""Multi-process commands: size and rank, and which process reports a failure.

torchrun and accelerate launch set environment variables, which are read without importing torch. Their use in training
is in `llmrec.train.world`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta

from llmrec.errors import LlmrecError, RecipeError, require

# Variables with the number of processes of other launchers, which accelerate reads too.
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_WAIT = timedelta(seconds=10)


def size() -> int:
    """Return the number of processes of this command; 1 without a launcher."""
    return max(map(_number, _COUNTS))


def rank() -> int:
    """Return the rank of this process, from 0; 0 without a launcher."""
    return max(0, _number("RANK", 0)) if size() > 1 else 0


def alone(command: str) -> None:
    """Reject being one of several processes.

    Args:
        command: The command that requires a single process, such as ``llmrec run``.

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


def is_first_to_fail() -> bool:
    """Return whether this process is the first of its command to fail: it reports why, the others end silently.

    The launcher stores the note, so that it outlives the process. If the launcher is gone, every process reports.
    """
    if size() == 1:
        return True
    with suppress(Exception):  # a broken connection must not hide the error
        store = require("torch.distributed", "train").TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, _WAIT, False
        )
        return int(store.add(f"llmrec/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)) == 1
    return True


def lost(count: int) -> LlmrecError:
    """Return the error of a process that depends on one that has ended."""
    return LlmrecError(
        f"training: another of the {count} processes ended, so this one ends too; the same command resumes at the last "
        "checkpoint, with as many processes or with others",
        kind="failed",
    )


def _number(name: str, default: int = 1) -> int:
    text = os.environ.get(name, "").strip()
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else default
