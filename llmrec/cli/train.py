"""The command `llmrec train`: trains in this process, or in several local processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from llmrec import processes, terminal
from llmrec.cli.console import format_number, given_options, show_values
from llmrec.cli.options import Launch, Out, RecipeOptions
from llmrec.durable import read_json
from llmrec.errors import LlmrecError, require
from llmrec.machine import read_processor


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RecipeOptions):
    """Options of `llmrec train`."""

    out: Out = None
    launch: Launch = None


def train(options: TrainOptions) -> None:
    """Fine-tune the model of a recipe without evaluating it.

    llmrec run and llmrec eval reuse the result. torchrun and accelerate launch can start this command too, also on
    several machines: see docs/scaling.md.

    Example:
        llmrec train recipes/quickstart.yaml --launch 2
    """
    from llmrec.pipeline import run as pipeline
    from llmrec.pipeline.study import resolve_run_folder
    from llmrec.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.launch is None:
        record = pipeline.train(recipe, options.out)
    else:
        record = train_in_processes(
            options.recipe, options.overrides, resolve_run_folder(recipe, options.out), options.launch
        )
    shown = ("method", "steps", "tokens", "target_tokens", "processes", "distributed", "seconds", "tokens_per_second")
    show_values(
        "training", {name: record[name] for name in (*shown, "adapter_sha256") if name in record}, format_number
    )


def train_in_processes(recipe: str, overrides: Sequence[str], folder: Path, count: int) -> dict[str, Any]:
    """Train in several local processes, and return the training record.

    They get the environment of torchrun, and their messages go to the error stream; the caller prints the result.

    Args:
        recipe: The recipe file.
        overrides: Changed keys.
        folder: The run folder.
        count: The number of processes.

    Raises:
        RecipeError: If this is already one of several processes.
        LlmrecError: If one was killed.
        typer.Exit: If one failed, which has printed its error.
    """
    processes.check_single_process("--launch")
    # The store outlives the processes, so that the first one to fail can leave a note.
    store = require("torch.distributed", "train").TCPStore("localhost", 0, None, True, wait_for_workers=False)
    shared = {
        **processes.thread_variables(count, read_processor().usable),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    words = ["-m", "llmrec", "train", recipe, *overrides, *given_options, "--out", str(folder)]
    programs = [
        processes.Program(words, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, terminal.err())
        for rank in range(count)
    ]
    try:
        with processes.start_programs(programs, report_signals=True) as lines:
            for _ in lines:
                pass
    except processes.ProcessEnded as error:
        if error.first.status > 0:
            raise typer.Exit(error.first.status) from None
        raise LlmrecError(
            f"training: process {error.first.process} of {count} {error.first.why}; run the same command again to "
            "resume at the last checkpoint",
            kind="failed",
        ) from None
    return read_json(folder / "train.json", "train again")
