"""Jobs whose shards are run by worker processes: the job file, results of workers, and lost shards.

This module is independent of the scheduler that distributes shards over machines. The scheduler gets shard numbers and
yields a `ShardResult` for each, in any order; a shard without one was lost with a process or a machine, and is
repeated. Its finished parts are stored in its folder (`llmrec.pipeline.shards`) and not computed twice.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.ranker import open_ranker
from llmrec.answer.rank.sharded import rank_shard
from llmrec.cli.ending import as_fixable_error
from llmrec.cluster.evaluation import evaluate_shard
from llmrec.durable import read_json, write_checked_json
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline.augmenting import augment_shard
from llmrec.pipeline.engines import keep_engine
from llmrec.pipeline.resume import StageTimer, lock_folder
from llmrec.pipeline.shards import Command, job_folder, read_shard, shard_folder
from llmrec.progress import Progress
from llmrec.recipe.load import as_recipe
from llmrec.recipe.schema import Recipe
from llmrec.records import Shard
from llmrec.terminal import LOG_FILE

log = logging.getLogger(__name__)

JOB_FILE = "job.json"
"""The file of a running job in the folder of its shards, read by every machine."""
SHARDS_PER_ACTOR = 4
"""The default number of shards per actor, enough for the actors to finish at about the same time."""
MAX_LOST_PASSES = 3
"""The number of consecutive passes without a finished shard after which the job ends with an error."""
_BUSY, _PAUSE = 120.0, 2.0
_FOLDER = re.compile(r"[0-9]+-of-([0-9]+)")


@dataclass(frozen=True)
class Job:
    """A job that is divided into shards.

    Attributes:
        command: The command of the job.
        target: Its output: a rankings file, a run folder, a feature store.
        options: Options of `llmrec rank`, or a recipe.
    """

    command: Command
    target: Path
    options: RankOptions | Recipe

    def write(self, token: str) -> None:
        """Write the job file for all machines, with a token that identifies the job."""
        options = self.options
        plain = (
            options.model_dump(mode="json")
            if isinstance(options, Recipe)
            else TypeAdapter(RankOptions).dump_python(options, mode="json")
        )
        fields = {"command": self.command, "target": str(self.target.absolute()), "at": str(Path.cwd())}
        write_checked_json(job_folder(self.target) / JOB_FILE, {**fields, "token": token, "asked": plain})

    def opened(self, report: Callable[[float], None]) -> Callable[[Shard], Path]:
        """Return a function that runs a shard and returns its folder; open models are reused.

        Args:
            report: Called with the finished fraction of the shard of an evaluation.

        Raises:
            LlmrecError: The errors of the command in one process.
        """
        options = self.options
        if isinstance(options, RankOptions):
            # Each part contains its results, so answers need not be cached.
            return partial(rank_shard, options, ranker=open_ranker(options, store=None, budget=StageTimer(quiet=True)))
        keep_engine()
        if self.command == "eval":
            return partial(evaluate_shard, options, self.target, quiet=True, report=report)
        return partial(augment_shard, options, self.target, quiet=True)


def read_job(folder: Path, token: str) -> Job:
    """Read a job from its folder, and change to the working folder of its command.

    Raises:
        LlmrecError: If this machine does not have the folder, or has another one under its name.
    """
    try:
        fields = read_json(folder / JOB_FILE, "start the command again")
    except LlmrecError:
        fields = {}
    if fields.get("token") != token:
        raise LlmrecError(
            f"{folder} is not the same folder here as where the command was started; set --out to a folder on a file "
            "system that all nodes share, with the same path",
            kind="missing-file",
            at=folder,
            column="--out",
        )
    try:
        os.chdir(fields["at"])
    except OSError as error:
        raise LlmrecError(
            f"{fields['at']}, where the command was started, cannot be opened here: {error.strerror}; start it in a "
            "folder that all nodes share",
            kind="missing-file",
            at=fields["at"],
        ) from None
    ranks = fields["command"] == "rank"
    options = TypeAdapter(RankOptions).validate_python(fields["asked"]) if ranks else as_recipe(fields["asked"])
    return Job(fields["command"], Path(fields["target"]), options)


@dataclass(frozen=True)
class ShardResult:
    """The result of running a shard.

    Attributes:
        shard: Number of the shard, from 1.
        node: The machine.
        process: Process id on that machine.
        seconds: Duration, including reading and opening.
        tokens: Tokens read and generated in this attempt, if its command reports them.
        error: The error message; empty if the shard is finished.
    """

    shard: int
    node: str
    process: int
    seconds: float
    tokens: int = 0
    error: str = ""

    def as_json(self) -> str:
        """Return the result as JSON, for `parse`."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> ShardResult:
        """Parse a result from JSON written by `as_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class ShardProgress:
    """The progress of a shard: its number and the finished fraction."""

    shard: int
    fraction: float


class Worker:
    """Runs shards of a job one after another, and keeps the engine open.

    Args:
        folder: The folder of the job's shards.
        token: See `Job.write`.
        count: The number of shards.
        node: The name of this machine.
        report: Called with the progress of a shard.
    """

    def __init__(
        self,
        folder: Path,
        token: str,
        count: int,
        node: str,
        report: Callable[[ShardProgress], None] = lambda _: None,
    ) -> None:
        self._folder, self._token, self._count = folder, token, count
        self._node, self._report = node, report
        self._work: Callable[[Shard], Path] | None = None
        self._number = 0

    def work(self, number: int) -> ShardResult:
        """Run one shard; errors are returned instead of raised, since they would occur in other processes too."""
        begin = time.monotonic()
        shard = Shard(number, self._count)
        try:
            opened = self._work or read_job(self._folder, self._token).opened(self._advance)
            self._number, self._work = number, opened
            facts = read_shard(_run_when_unlocked(self._work, shard)).facts
        except Exception as error:
            wrong = as_fixable_error(error)
            text = str(wrong) if wrong else "".join(traceback.format_exception(error))
            return ShardResult(number, self._node, os.getpid(), time.monotonic() - begin, error=text)
        cost = facts.get("cost") or {}
        tokens = facts.get("fresh_tokens") or sum(cost.get(f"{name}_tokens", 0) for name in ("prompt", "completion"))
        return ShardResult(number, self._node, os.getpid(), time.monotonic() - begin, tokens)

    def _advance(self, fraction: float) -> None:
        self._report(ShardProgress(self._number, fraction))


def _run_when_unlocked(work: Callable[[Shard], Path], shard: Shard) -> Path:
    """Run a shard; wait if another process is about to release its lock."""
    end = time.monotonic() + _BUSY
    while True:
        try:
            return work(shard)
        except LlmrecError as error:
            if error.kind != "busy" or time.monotonic() > end:
                raise
        time.sleep(_PAUSE)


def choose_shard_count(target: Path, requested: int | None, default: int) -> int:
    """Return the number of shards of a job; a resumed job keeps its number.

    Args:
        target: The output of the job.
        requested: The requested number; None: not requested.
        default: The number for a new job without a request.

    Raises:
        RecipeError: If existing shards have a number other than the requested one.
    """
    folder, counts = job_folder(target), shard_counts(target)
    if len(counts) > 1 or (counts and requested not in (None, counts[0])):
        raise RecipeError(
            f"{folder} has shards of a job that was split into {' and '.join(map(str, counts))}, not into "
            f"{requested or 'one number'}; set --shards to the existing number, or move the folder away",
            kind="mismatch",
            at=folder,
            column="--shards",
        )
    return counts[0] if counts else requested or default


def shard_counts(target: Path) -> list[int]:
    """Return the numbers of shards into which a job was already divided, most frequent first."""
    folder = job_folder(target)
    names = [_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return [count for count, _ in Counter(int(name[1]) for name in names if name).most_common()]


@contextmanager
def publish_job(job: Job) -> Iterator[str]:
    """Write the job file for workers, yield its token, and prevent other processes from starting the same job.

    Raises:
        LlmrecError: If the job is already running, or the folder cannot be written.
    """
    folder, token = job_folder(job.target), secrets.token_hex(16)
    with lock_folder(folder, (JOB_FILE, LOG_FILE)):
        job.write(token)
        try:
            yield token
        finally:
            (folder / JOB_FILE).unlink(missing_ok=True)


ShardRunner = Callable[[Sequence[int]], Iterator[ShardResult | ShardProgress]]
"""Runs the shards with these numbers on workers, and yields the result of each, except for lost ones."""


def run_all_shards(job: Job, count: int, spread: ShardRunner) -> list[ShardResult]:
    """Run all shards of a job, run lost shards again, and show the progress.

    Args:
        job: The job.
        count: The number of shards.
        spread: See `ShardRunner`.

    Returns:
        The result of each shard, by number.

    Raises:
        LlmrecError: If a shard fails, or some are lost repeatedly.
    """
    done: dict[int, ShardResult] = {}
    fractions: dict[int, float] = {}
    fruitless = 0
    with Progress(job.command, count, unit="shards") as bar:
        while left := [number for number in range(1, count + 1) if number not in done]:
            before = len(done)
            for entry in spread(left):
                if isinstance(entry, ShardProgress):
                    fractions[entry.shard] = entry.fraction
                    bar.reach(sum(fractions.values()))
                    continue
                if entry.error:
                    raise LlmrecError(f"shard {entry.shard}/{count}, on {entry.node}: {entry.error}", kind="failed")
                done[entry.shard], fractions[entry.shard] = entry, 1.0
                bar.reach(sum(fractions.values()), _describe_progress(done.values()))
            lost = [number for number in left if number not in done]
            fruitless = 0 if len(done) > before else fruitless + bool(lost)
            if fruitless == MAX_LOST_PASSES:
                raise LlmrecError(
                    f"{len(lost)} of {count} shards failed {MAX_LOST_PASSES} times in a row because their processes "
                    f"died, first {lost[0]}/{count}; memory or nodes may be insufficient. Run the same command to "
                    f"resume from the finished shards, or llmrec {job.command} --shard {lost[0]}/{count} to see the "
                    "error",
                    kind="failed",
                    at=shard_folder(job.target, Shard(lost[0], count)),
                )
            if lost:
                log.warning("the processes of %d shards died; processing these shards again", len(lost))
    return [done[number] for number in sorted(done)]


def _describe_progress(done: Any) -> str:
    nodes, processes, tokens = summarise_workers(list(done))
    where = f" on {nodes} nodes" if nodes > 1 else ""
    return f"{processes} processes{where}{f', {tokens:,} tokens' if tokens else ''}"


def summarise_workers(done: Sequence[ShardResult]) -> tuple[int, int, int]:
    """Return the number of machines and processes that ran shards, and the total number of tokens."""
    processes = {(entry.node, entry.process) for entry in done}
    return len({node for node, _ in processes}), len(processes), sum(entry.tokens for entry in done)
