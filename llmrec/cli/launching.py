"""Trains in this process or in several of this machine, by torchrun's launcher, which accelerate launch uses too."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from llmrec import processes, terminal
from llmrec.durable import read_json
from llmrec.errors import LlmrecError, require
from llmrec.machine import processor
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.study import folder_of
from llmrec.recipe.schema import Recipe


def train(recipe: Recipe, out: Path | None, words: Sequence[str], count: int | None) -> Mapping[str, Any]:
    """Train a recipe, and return what was recorded.

    Args:
        recipe: The recipe.
        out: The run folder; by default that of the recipe.
        words: The command line that trains it, without the program and the folder.
        count: How many processes of this machine train; None: this one.
    """
    if count is None:
        return pipeline.train(recipe, out)
    folder = folder_of(recipe, out)
    _launch([*words, "--out", str(folder)], count)
    return read_json(folder / "train.json", "train again")


def _launch(words: Sequence[str], count: int) -> None:
    """Run ``llmrec WORDS`` in so many processes, and return when all have ended well.

    What they say goes to the error stream; what the first one answers is left to the caller to tell.

    Args:
        words: The command line, without the program.
        count: How many processes.

    Raises:
        RecipeError: If this is one of several processes itself.
        LlmrecError: If one ended without a word: it was killed.
        typer.Exit: If one failed, which it has said itself, or a signal came.
    """
    processes.alone("--launch")
    run = require("torch.distributed.run", "train")
    elastic = require("torch.distributed.elastic.multiprocessing.api", "train")
    errors = require("torch.distributed.elastic.multiprocessing.errors", "train")
    # Threads of all processes share the cores; unset, torchrun gives each one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processor().usable // count)))
    # It tells at length how processes end, and they have said it in a line.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    arguments = run.parse_args(["--standalone", "--nproc-per-node", str(count), "-m", "llmrec", *words])
    try:
        with terminal.heard():
            run.run(arguments)
    except elastic.SignalException as error:
        raise typer.Exit(128 + error.sigval) from None
    except errors.ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        # The launcher itself ends the rest with SIGTERM.
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        rank = next((rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM), None)
        if rank is None:
            raise typer.Exit(status if status >= 0 else 128 - status) from None
        killed = signal.Signals(-codes[rank]).name
        why = ", as the system does where memory runs out" if killed == "SIGKILL" else ""
        raise LlmrecError(
            f"training: process {rank} of {count} was ended by {killed}{why}; the same command resumes at the last "
            "checkpoint",
            kind="failed",
        ) from None
