"""Runs the shards of a job on this machine, in N processes, each with its own GPUs or share of the cores.

``python -m llmrec.cluster.local FOLDER TOKEN COUNT CORES LOG NUMBER...`` is such a worker. It writes one line of JSON
for each result and each step of its progress.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from llmrec import machine, processes
from llmrec.cli.run import RunOptions
from llmrec.cli.train import train_in_processes
from llmrec.cluster.evaluation import check_language_model, merge_run
from llmrec.cluster.jobs import Job, ShardProgress, ShardResult, Worker, publish_job, run_all_shards, shard_counts
from llmrec.errors import LlmrecError, RecipeError, require
from llmrec.pipeline.augmenting import FEATURES, check_text_store, merge_augment
from llmrec.pipeline.engines import gpus_of_engine
from llmrec.pipeline.run import Run, run
from llmrec.pipeline.shards import job_folder, shard_folder
from llmrec.progress import QUIET
from llmrec.recipe.schema import Recipe
from llmrec.records import Shard

# Lines of a process's output to show in an error.
_ERROR_LINES = 8


def run_locally(recipe: Recipe, home: Path, options: RunOptions) -> Run:
    """Generate texts, train and evaluate a recipe, each with ``options.launch`` processes.

    A recipe whose language model only writes texts is evaluated by this process.

    Raises:
        RecipeError: If the recipe has no language model, or the machine has too few GPUs.
        LlmrecError: If a process fails.
    """
    assert options.launch is not None
    if recipe.augment is None:
        check_language_model(recipe)
    else:
        store = home / FEATURES
        check_text_store(recipe, store)
        merge_augment(store, run_job_locally(Job("augment", store, recipe), recipe, options.launch))
    if "tuned" in recipe.eval.arms:
        train_in_processes(options.recipe, options.overrides, home, options.launch)
    return evaluate_locally(recipe, home, options.launch) if recipe.eval.arms else run(recipe, home)


def evaluate_locally(recipe: Recipe, home: Path, count: int) -> Run:
    """Evaluate a recipe in several processes of this machine; the results equal those of a single process.

    Args:
        recipe: The recipe.
        home: The run folder, with the fine-tuned model if the recipe evaluates one.
        count: The number of processes.

    Raises:
        RecipeError: If the machine has too few GPUs.
        LlmrecError: If a shard fails.
    """
    check_language_model(recipe)
    return merge_run(home, run_job_locally(Job("eval", home, recipe), recipe, count))


def run_job_locally(job: Job, recipe: Recipe, count: int) -> list[Path]:
    """Run the shards of a job in several processes of this machine, and return the folders of the shards.

    A job that was stopped resumes with its shards, also with another number of processes. All processes are stopped
    when one fails.

    Raises:
        RecipeError: If this is one of several processes, or the machine has too few GPUs.
        LlmrecError: If a shard fails.
    """
    processes.check_single_process("--launch")
    environments = process_environments(recipe, count)
    before = shard_counts(job.target)
    shards = count if count in before or len(before) != 1 else before[0]
    with publish_job(job) as token:
        folder = job_folder(job.target).absolute()
        logs = [folder / f"process-{number}.log" for number in range(1, count + 1)]
        programs = []
        for index, (environment, log) in enumerate(zip(environments, logs, strict=True)):
            if numbers := range(index + 1, shards + 1, count):
                cores = "" if "CUDA_VISIBLE_DEVICES" in environment else _process_cores(index, count)
                words = ["-m", __name__, str(folder), token, str(shards), cores, str(log), *map(str, numbers)]
                programs.append(processes.Program(words, environment, log))
        try:
            with processes.start_programs(programs) as lines:
                run_all_shards(job, shards, lambda _: _parse_lines(lines))
        except processes.ProcessEnded as error:
            first, log = error.first, logs[error.first.process]
            raise LlmrecError(
                f"{job.command}: process {first.process + 1} of {count} {first.why}, so all processes were stopped; "
                f"run the same command to resume. Last messages of this process ({log}):{_last_lines(log)}",
                kind="failed",
                at=log,
            ) from None
    return [shard_folder(job.target, Shard(number, shards)) for number in range(1, shards + 1)]


def process_environments(recipe: Recipe, count: int) -> list[dict[str, str]]:
    """Return the environment variables of each process, with its GPUs and number of threads.

    Raises:
        RecipeError: If there are too few GPUs, or GPUs of several kinds.
    """
    shared = {**processes.thread_variables(count, machine.read_processor().usable), QUIET: "1"}
    size = gpus_of_engine(recipe.model, recipe.eval)
    if size == 0:
        return [shared for _ in range(count)]
    cuda = require("torch", "train").cuda
    available, visible = cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (
        [name.strip() for name in visible.split(",")][:available]
        if visible
        else [str(index) for index in range(available)]
    )
    if count * size > len(names):
        need = "a GPU each" if size == 1 else f"{size} GPUs each (eval.tensor_parallel * eval.pipeline_parallel)"
        raise RecipeError(
            f"--launch {count}: {count} processes with {need} need {count * size} GPUs, but only {len(names)} are "
            f"visible; use --launch {max(1, len(names) // size)}",
            kind="unsupported",
            column="--launch",
        )
    kinds = {str(cuda.get_device_name(index)) for index in range(count * size)}
    if len(kinds) > 1:
        raise RecipeError(
            f"--launch {count}: the GPUs are of several types ({', '.join(sorted(kinds))}), whose answers differ in "
            "the last digits; set CUDA_VISIBLE_DEVICES to GPUs of one type",
            kind="unsupported",
            column="--launch",
        )
    return [
        {**shared, "CUDA_VISIBLE_DEVICES": ",".join(names[index * size : (index + 1) * size])} for index in range(count)
    ]


def _process_cores(index: int, count: int) -> str:
    """Return the cores of a process, separated by commas; empty if there are fewer cores than processes."""
    cores = machine.available_cores()
    return ",".join(map(str, cores[index::count])) if len(cores) >= count else ""


def _parse_lines(lines: Iterator[str]) -> Iterator[ShardResult | ShardProgress]:
    for line in lines:
        fields = json.loads(line)
        yield ShardProgress(**fields) if "fraction" in fields else ShardResult(**fields)


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_ERROR_LINES:] if log.is_file() else []
    return "".join(f"\n    {line}" for line in lines) or " none"


# --------------------------------------------------------------------------- the worker process


def run_worker(folder: Path, token: str, count: int, node: str, numbers: Sequence[int]) -> None:
    """Run shards one after another, and print results and progress; all other output goes to stderr."""
    # Libraries and their processes print to standard output too, so it is redirected to stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as out:
        os.dup2(2, 1)
        logging.basicConfig(format="%(asctime)s %(message)s")

        def report(progress: ShardProgress) -> None:
            out.write(json.dumps(asdict(progress)) + "\n")

        worker = Worker(folder, token, count, node, report)
        for number in numbers:
            out.write(worker.work(number).as_json() + "\n")


def _main(folder: str, token: str, count: str, cores: str, log: str, *numbers: str) -> None:
    processes.end_with_parent()
    if cores:
        # vLLM binds a thread to each core that it may use
        machine.bind_to_cores([int(core) for core in cores.split(",")])
    run_worker(Path(folder), token, int(count), f"this machine ({log})", [int(number) for number in numbers])


if __name__ == "__main__":
    _main(*sys.argv[1:])
