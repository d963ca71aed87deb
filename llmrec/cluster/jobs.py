"""A job in shards that others work for us: what they are told, what they say, and which shards are left.

Nothing here knows what spreads shards over machines. That is handed a number of shards and hands back a `Worked` each,
in any order; a shard of which nobody says anything was lost with a process or a machine, and is worked again. Its
finished parts lie in its folder (`llmrec.pipeline.shards`), so that they are not made twice.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from os import chdir
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.ranker import open_ranker
from llmrec.answer.rank.sharded import rank_shard
from llmrec.cli.ending import fix_of
from llmrec.cluster.evaluation import evaluate_shard
from llmrec.durable import read_json, write_checked
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline.augmenting import augment_shard
from llmrec.pipeline.engines import keep_engine
from llmrec.pipeline.resume import Budget, locked
from llmrec.pipeline.shards import Command, read, shard_folder, shards_of
from llmrec.progress import Bar
from llmrec.recipe.load import as_recipe
from llmrec.recipe.schema import Recipe
from llmrec.records import Shard
from llmrec.terminal import LOG

log = logging.getLogger(__name__)

JOB = "job.json"
"""In the folder of all shards while a job is worked: what is to be done, for every machine to read."""
EACH = 4
"""Shards for each actor, where nobody says how many: enough that the last ones end together."""
LOST = 3
"""Times in a row that not one of the shards that are left is finished, after which the job ends with an error."""
_BUSY, _PAUSE = 120.0, 2.0
_FOLDER = re.compile(r"[0-9]+-of-([0-9]+)")


@dataclass(frozen=True)
class Job:
    """What is worked in shards.

    Attributes:
        command: Which command it is of.
        target: What it makes: a file of rankings, a run folder, a store of features.
        asked: Options of `llmrec rank`, or a recipe.
    """

    command: Command
    target: Path
    asked: RankOptions | Recipe

    def write(self, token: str) -> None:
        """Write it where every machine reads it; the token says that it is this one."""
        asked = self.asked
        plain = (
            asked.model_dump(mode="json")
            if isinstance(asked, Recipe)
            else TypeAdapter(RankOptions).dump_python(asked, mode="json")
        )
        fields = {"command": self.command, "target": str(self.target.absolute()), "at": str(Path.cwd())}
        write_checked(shards_of(self.target) / JOB, {**fields, "token": token, "asked": plain})

    def opened(self) -> Callable[[Shard], Path]:
        """Return what works a shard and returns its folder, and does not open anew what the one before opened.

        Raises:
            LlmrecError: As the command in one process.
        """
        asked = self.asked
        if isinstance(asked, RankOptions):
            # What a part was answered with is in the part, so that no answers need be stored.
            return partial(rank_shard, asked, ranker=open_ranker(asked, store=None, budget=Budget(quiet=True)))
        keep_engine()
        work = evaluate_shard if self.command == "eval" else augment_shard
        return partial(work, asked, self.target, quiet=True)


def read_job(folder: Path, token: str) -> Job:
    """Read a job in the folder of its shards, and go to the folder that it was asked for in.

    Raises:
        LlmrecError: If this machine does not see the folder, or another one under its name.
    """
    try:
        fields = read_json(folder / JOB, "start the command again")
    except LlmrecError:
        fields = {}
    if fields.get("token") != token:
        raise LlmrecError(
            f"{folder} is not the folder here that it is where the command was started; give --out a folder on a file "
            "system that all nodes share, under one path",
            kind="missing-file",
            at=folder,
            column="--out",
        )
    try:
        chdir(fields["at"])
    except OSError as error:
        raise LlmrecError(
            f"{fields['at']}, where the command was started, cannot be opened here: {error.strerror}; start it in a "
            "folder that all nodes share",
            kind="missing-file",
            at=fields["at"],
        ) from None
    ranks = fields["command"] == "rank"
    asked = TypeAdapter(RankOptions).validate_python(fields["asked"]) if ranks else as_recipe(fields["asked"])
    return Job(fields["command"], Path(fields["target"]), asked)


@dataclass(frozen=True)
class Worked:
    """What became of a shard.

    Attributes:
        shard: Its number, from 1.
        node: The machine.
        process: The number of the process there.
        seconds: What it took, reading and opening with it.
        tokens: That were read and written for it now, as far as its command says so.
        error: Why there is none; empty where it is done.
    """

    shard: int
    node: str
    process: int
    seconds: float
    tokens: int = 0
    error: str = ""

    def as_json(self) -> str:
        """Write it as `parse` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Worked:
        """Read what `as_json` wrote."""
        return cls(**json.loads(text))


class Worker:
    """Works shards of one job, one after another, and keeps the engine that the first one opens.

    Args:
        folder: Where the shards of the job lie.
        token: See `Job.write`.
        count: How many shards there are.
        node: The name of this machine.
        process: The number of this process.
    """

    def __init__(self, folder: Path, token: str, count: int, node: str, process: int) -> None:
        self._folder, self._token, self._count = folder, token, count
        self._node, self._process = node, process
        self._work: Callable[[Shard], Path] | None = None

    def work(self, number: int) -> Worked:
        """Work one shard; what goes wrong is said, since another process would find the same."""
        begin = time.monotonic()
        shard = Shard(number, self._count)
        try:
            self._work = self._work or read_job(self._folder, self._token).opened()
            message = read(_patiently(self._work, shard)).told
        except Exception as error:
            wrong = fix_of(error)
            text = str(wrong) if wrong else "".join(traceback.format_exception(error))
            return Worked(number, self._node, self._process, time.monotonic() - begin, error=text)
        cost = message.get("cost") or {}
        tokens = message.get("fresh_tokens") or sum(cost.get(f"{name}_tokens", 0) for name in ("prompt", "completion"))
        return Worked(number, self._node, self._process, time.monotonic() - begin, tokens)


def _patiently(work: Callable[[Shard], Path], shard: Shard) -> Path:
    """Work a shard; one that a process holds which is about to end is waited for."""
    end = time.monotonic() + _BUSY
    while True:
        try:
            return work(shard)
        except LlmrecError as error:
            if error.kind != "busy" or time.monotonic() > end:
                raise
        time.sleep(_PAUSE)


def count_of(target: Path, wanted: int | None, default: int) -> int:
    """Return in how many shards a job is cut: as it was before, where it is worked further.

    Args:
        target: What the job makes.
        wanted: How many somebody asked for; None: nobody did.
        default: How many there are where nothing says so.

    Raises:
        RecipeError: If there are shards of another number than is wanted.
    """
    place = shards_of(target)
    names = [_FOLDER.fullmatch(path.name) for path in place.iterdir() if path.is_dir()] if place.is_dir() else []
    there = Counter(int(name[1]) for name in names if name).most_common()
    if len(there) > 1 or (there and wanted not in (None, there[0][0])):
        raise RecipeError(
            f"{place} holds shards of a job that was cut in {' and in '.join(str(count) for count, _ in there)}, not "
            f"in {wanted or 'one number'}; name that number with --shards, or move the folder away",
            kind="mismatch",
            at=place,
            column="--shards",
        )
    return there[0][0] if there else wanted or default


@contextmanager
def published(job: Job) -> Iterator[str]:
    """Write a job where others read it, hand out its token, and let nobody else start it meanwhile.

    Raises:
        LlmrecError: If somebody works it already, or the folder cannot be written.
    """
    place, token = shards_of(job.target), secrets.token_hex(16)
    with locked(place, (JOB, LOG)):
        job.write(token)
        try:
            yield token
        finally:
            (place / JOB).unlink(missing_ok=True)


Spread = Callable[[Sequence[int]], Iterator[Worked]]
"""Has others work the shards of these numbers, and yields what became of each; those that are lost are not yielded."""


def work_all(job: Job, count: int, spread: Spread) -> list[Worked]:
    """Have all shards of a job worked, lost ones again, and show how far it is.

    Args:
        job: What is worked.
        count: How many shards there are.
        spread: See `Spread`.

    Returns:
        What became of each shard, by number.

    Raises:
        LlmrecError: If a shard cannot be worked, or some are lost again and again.
    """
    done: dict[int, Worked] = {}
    fruitless = 0
    with Bar(job.command, count, unit="shards") as bar:
        while left := [number for number in range(1, count + 1) if number not in done]:
            before = len(done)
            for entry in spread(left):
                if entry.error:
                    raise LlmrecError(f"shard {entry.shard}/{count}, on {entry.node}: {entry.error}", kind="failed")
                done[entry.shard] = entry
                bar.reach(len(done), _said(done.values()))
            lost = [number for number in left if number not in done]
            fruitless = 0 if len(done) > before else fruitless + bool(lost)
            if fruitless == LOST:
                raise LlmrecError(
                    f"{len(lost)} of {count} shards were lost {LOST} times in a row with the processes that worked "
                    f"them, first {lost[0]}/{count}: their memory or their nodes may not suffice. Those that are "
                    f"finished are kept: the same command resumes, and llmrec {job.command} --shard {lost[0]}/{count} "
                    "shows what is wrong",
                    kind="failed",
                    at=shard_folder(job.target, Shard(lost[0], count)),
                )
            if lost:
                log.warning("%d shards were lost with the processes that worked them; they are worked again", len(lost))
    return [done[number] for number in sorted(done)]


def _said(done: Any) -> str:
    nodes, processes, tokens = facts_of(list(done))
    return f"{processes} actors on {nodes} nodes{f', {tokens:,} tokens' if tokens else ''}"


def facts_of(done: Sequence[Worked]) -> tuple[int, int, int]:
    """Return how many machines and processes worked shards, and the tokens of all."""
    processes = {(entry.node, entry.process) for entry in done}
    return len({node for node, _ in processes}), len(processes), sum(entry.tokens for entry in done)
