"""The command `llmrec train`: training in this process, or in several that torchrun's launcher starts."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from llmrec import processes, terminal
from llmrec.answer.options import About
from llmrec.cli.console import given, short, show
from llmrec.cli.options import Out, RecipeOptions
from llmrec.durable import read_json
from llmrec.errors import LlmrecError, require
from llmrec.machine import processor


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RecipeOptions):
    """A recipe, its run folder, and the number of processes."""

    out: Out = None
    launch: Annotated[int | None, About(least=1, metavar="N", help="Train in N processes of this machine.")] = None


def train(options: TrainOptions) -> None:
    """Train and merge only; `run` and `eval` reuse the result.

    torchrun and accelerate launch can start it too, also on several machines: see docs/scaling.md.
    """
    from llmrec.pipeline import run as pipeline
    from llmrec.pipeline.study import folder_of
    from llmrec.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.launch is None:
        record = pipeline.train(recipe, options.out)
    else:
        folder = folder_of(recipe, options.out)
        _launch(["train", options.recipe, *options.overrides, *given, "--out", str(folder)], options.launch)
        record = read_json(folder / "train.json", "train again")
    shown = ("method", "steps", "tokens", "target_tokens", "processes", "distributed", "seconds", "tokens_per_second")
    show("training", {name: record[name] for name in (*shown, "adapter_sha256") if name in record}, short)


def _launch(words: Sequence[str], count: int) -> None:
    """Run ``llmrec WORDS`` in several processes, and return when all have succeeded.

    Their messages go to the error stream; the caller prints the result.

    Raises:
        RecipeError: If this is already one of several processes.
        LlmrecError: If one was killed.
        typer.Exit: If one failed, which has printed its error, or a signal arrived.
    """
    processes.alone("--launch")
    run = require("torch.distributed.run", "train")
    elastic = require("torch.distributed.elastic.multiprocessing.api", "train")
    errors = require("torch.distributed.elastic.multiprocessing.errors", "train")
    # The processes share the cores; if this is unset, torchrun gives each one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processor().usable // count)))
    # The launcher logs each failure at length, and the process has printed it already.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    arguments = run.parse_args(["--standalone", "--nproc-per-node", str(count), "-m", "llmrec", *words])
    try:
        with terminal.child_output():
            run.run(arguments)
    except elastic.SignalException as error:
        raise typer.Exit(128 + error.sigval) from None
    except errors.ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        # The launcher ends the other processes with SIGTERM.
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
