"""A file of requests in, a file of ranked lists out: in parts that a kill cannot tear, resumed by the same command."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmrec import terminal
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.outputs import check_out, summary_beside
from llmrec.answer.rank.progress import RankBar, Tally, asked_of, summary_of
from llmrec.answer.rank.ranker import Ranker, open_ranker, resolved
from llmrec.answer.recommender import Answered
from llmrec.data.read.ranked import Ranked, form_of, listed, read_part, write_lists, write_part
from llmrec.data.read.request_file import Raw, RequestFile, open_requests
from llmrec.data.requests import RankRequest, identity
from llmrec.durable import sha256_of, write_checked, write_text
from llmrec.errors import DataError, LlmrecError, Place
from llmrec.fingerprint import digest_of
from llmrec.pipeline.resume import LOCK, Budget, locked, read_stage
from llmrec.recipe.shared import Form
from llmrec.records import Shard
from llmrec.types import Ranking, Unparsed

log = logging.getLogger(__name__)

STDOUT = Path("-")
"""Stands for the standard output."""

PART = 64
"""Requests of one part; more where the backend is handed more at a time."""


@dataclass(frozen=True)
class Row:
    """A row with its id, and whether an earlier one has it."""

    raw: Raw
    number: int
    request_id: str | None
    user_id: str | None
    error: str

    @classmethod
    def of(cls, raw: Raw, number: int, earlier: dict[bytes, int]) -> Row:
        """Look for a row's id among those of ``earlier`` rows, and add it."""
        request_id, user_id = identity(raw.record, number)
        error = raw.error
        if request_id is not None:
            # A digest takes the same room whatever the id, so that many millions of them stay small.
            digest = blake2b(request_id.encode(), digest_size=16).digest()
            first = earlier.setdefault(digest, raw.line)
            if first != raw.line and not error:
                error = f"the id {request_id!r} is that of line {first}; give each request its own"
        return cls(raw, number, request_id, user_id, error)

    def asked(self, recommender: Ranker) -> RankRequest | Unparsed:
        """Return the row's request, or why there is none."""
        if self.error or self.raw.record is None:
            return Unparsed(request_id=self.request_id or "", reason=self.error)
        return recommender.read(self.raw.record, self.number)

    def record(self, found: Answered) -> Ranked:
        """Return the record of what became of the row."""
        answer, reasons = found.answer, found.reasons
        ranking = answer if isinstance(answer, Ranking) else None
        return Ranked(
            request_id=self.request_id,
            user_id=self.user_id,
            line=self.raw.line,
            items=ranking.items if ranking else (),
            scores=ranking.scores if ranking else (),
            titles=found.titles,
            error=answer.reason if isinstance(answer, Unparsed) else None,
            notes=found.notes,
            prompt_tokens=answer.cost.prompt_tokens,
            completion_tokens=answer.cost.completion_tokens,
            forwards=answer.cost.forwards,
            retrieved=found.retrieved,
            profile=found.profile,
            rationale=tuple(reasons.texts),
            rationale_prompt_tokens=reasons.cost.prompt_tokens,
            rationale_completion_tokens=reasons.cost.completion_tokens,
            rationale_forwards=reasons.cost.forwards,
        )


def rank_file(options: RankOptions) -> Mapping[str, Any]:
    """Rank a file of requests and return the summary, which also lies beside the output.

    Where the output is the standard output, nothing else is written there, and nothing is kept for another call.

    Raises:
        LlmrecError: If nothing can be ranked, because a file, a model or an option cannot be used.
    """
    options = resolved(options)
    if options.target != STDOUT:
        return _rank_into(options)
    with TemporaryDirectory(prefix="llmrec-rank-") as folder:
        target = Path(folder) / ("lists.trec" if options.form == "trec" else "lists.jsonl")
        summary = _rank_into(replace(options, out=target))
        with target.open("rb") as found:
            shutil.copyfileobj(found, terminal.out().buffer)
        terminal.out().flush()
    return {**summary, "out": str(STDOUT)}


def _rank_into(options: RankOptions) -> Mapping[str, Any]:
    form_of(options.target, options.form)
    reads = (options.source, options.items)
    check_out(options.target, reads, option="--out", by="rank", parts=options.parts, restart=options.restart)
    budget = Budget()
    with budget.stage("start"):
        source = open_requests(options.source, bare=options.bare)
    with locked(options.parts, own):
        if options.restart:
            empty(options.parts)
        with opening(options, source, options.parts, budget) as (recommender, key):
            done = None if options.restart else finished(options.target, options.layout, key)
            summary = done or _work(options, source, recommender, key)
        if done is not None:
            log.warning("%s is complete already; --restart ranks again", options.target)
        remove(options.parts)
    return summary


@contextmanager
def opening(options: RankOptions, source: RequestFile, folder: Path, budget: Budget) -> Iterator[tuple[Ranker, str]]:
    """Open what ranks, and hand it out with the hash of every input; where that fails a new folder is removed.

    Args:
        options: What is asked for.
        source: The requests.
        folder: Where parts and answers are kept.
        budget: Where seconds are booked.

    Raises:
        LlmrecError: If nothing can be ranked.
    """
    with ExitStack() as opened:
        try:
            with budget.stage("start"):
                recommender = open_ranker(options, store=folder / "answers.sqlite", budget=budget)
                opened.enter_context(recommender)
                check_titled(options, source, recommender)
                key = rank_key(options, source, recommender)
        except BaseException:
            opened.close()
            if not any(folder.glob(part_name("*"))):
                remove(folder)
            raise
        yield recommender, key


def rank_key(options: RankOptions, source: RequestFile, recommender: Ranker) -> str:
    """Return the hash of every input that can change a ranking."""
    return digest_of(requests=source.sha256, limit=options.limit, users=recommender.stored, **recommender.identity)


def check_titled(options: RankOptions, source: RequestFile, recommender: Ranker) -> None:
    """Refuse the whole file where a request names an item by its id alone, and no item is known.

    Raises:
        DataError: If one does.
    """
    for raw in islice(source, options.limit) if recommender.items == {} else ():
        if raw.record is not None and (fault := recommender.untitled(raw.record)):
            raise DataError(
                f"{source.path}, line {raw.line} {fault}",
                kind="unknown-name",
                at=Place(str(source.path), line=raw.line),
                column="item_id",
            )


def finished(target: Path, form: Form, key: str) -> Mapping[str, Any] | None:
    """Return the summary of an output that the same inputs gave, if it still lies there as it was written."""
    done = read_stage(summary_beside(target), key, itemgetter("sha256"))
    same = done is not None and done.get("form") == form and target.is_file() and sha256_of(target) == done["sha256"]
    return done if same else None


# --------------------------------------------------------------------------- parts


def part_name(number: int | str) -> str:
    """Return the name of a part's file."""
    return f"part-{number:0>8}.jsonl" if isinstance(number, int) else f"part-{number}.jsonl"


def _claim(folder: Path, key: str) -> None:
    """Drop parts that other inputs gave."""
    mark = folder / "key"
    if mark.is_file() and mark.read_text(encoding="utf-8") == key:
        return
    others = [path for path in folder.glob(part_name("*")) if own(path.name)]
    if others:
        log.warning("%d parts in %s were made from other inputs or options; they are discarded", len(others), folder)
    for path in others:
        path.unlink()
    write_text(mark, key)


_OWN = re.compile(r"\.lock|\.?(key|part-[0-9]{8}\.jsonl|shard\.json)((\.llmrec)?\.draft)?|answers\.sqlite.*")


def own(name: str) -> bool:
    """Whether a file of this name in a folder of parts is one that ranking writes there."""
    return _OWN.fullmatch(name) is not None


def empty(folder: Path) -> None:
    """Remove what ranking wrote into a folder of parts, but its lock."""
    for path in folder.iterdir():
        if path.name != LOCK and own(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()


def remove(folder: Path) -> None:
    """Remove a folder of parts; what somebody else put there since stays, and the folder with it."""
    empty(folder)
    others = [path.name for path in folder.iterdir() if path.name != LOCK]
    if others:
        log.warning("%s is kept, since it holds files that llmrec did not write: %s", folder, ", ".join(others[:3]))
        return
    (folder / LOCK).unlink()
    folder.rmdir()


def rank_parts(
    options: RankOptions,
    source: RequestFile,
    recommender: Ranker,
    folder: Path,
    key: str,
    tally: Tally,
    shard: Shard | None = None,
) -> Iterator[list[Ranked]]:
    """Rank part after part, and keep each in a folder; one that lies there already is not ranked again.

    Args:
        options: What is asked for.
        source: The requests.
        recommender: What ranks them.
        folder: Where parts are kept.
        key: Hash of every input; parts that others gave are dropped.
        tally: Where records are counted.
        shard: Rank the parts of one shard alone; ids of the rows before it are read, since one may stand twice.
    """
    _claim(folder, key)
    budget, earlier = recommender.budget, dict[bytes, int]()
    total, size = part_sizes(options, source)
    parts = (shard or Shard(1, 1)).chunks(total, size)
    rows = islice(source, total)
    mine = max(0, min(total, parts.stop * size) - parts.start * size)
    with budget.stage("reading"), RankBar(mine) as bar:
        for number in range(parts.stop if parts else 0):
            raws = list(islice(rows, size))
            lines = [Row.of(raw, number * size + n, earlier) for n, raw in enumerate(raws, start=1)]
            if number not in parts:
                continue
            path = folder / part_name(number)
            records = read_part(path, [raw.line for raw in raws])
            if records is not None:
                bar.skip(len(records))
                tally.add(records)
            else:
                before = budget.stages.get("ranking", 0.0)
                with budget.stage("ranking"):
                    asked = [row.asked(recommender) for row in lines]
                    answers = recommender.answer(asked, advance=bar.advance, part=number)
                    records = [row.record(answer) for row, answer in zip(lines, answers, strict=True)]
                write_part(path, records)
                tally.add(records, seconds=budget.stages["ranking"] - before)
            yield records


def part_sizes(options: RankOptions, source: RequestFile) -> tuple[int, int]:
    """Return how many requests are ranked, and how many of them are a part."""
    total = source.rows if options.limit is None else min(source.rows, options.limit)
    return total, max(PART, options.batch)


def _work(options: RankOptions, source: RequestFile, recommender: Ranker, key: str) -> Mapping[str, Any]:
    budget, tally, form = recommender.budget, Tally(), options.layout
    owners: dict[str, int] = {}
    paths: list[Path] = []
    for records in rank_parts(options, source, recommender, options.parts, key, tally):
        if form != "records":
            check_owners(source.path, records, owners)
        paths.append(options.parts / part_name(len(paths)))
    with budget.stage("write"):
        write_lists(options.target, stored(paths), form, options.tag)
    summary = summary_of(asked_of(options, source, recommender, key), tally, budget.stages)
    write_checked(options.summary, summary)
    return summary


def check_owners(source: Path, records: Sequence[Ranked], earlier: dict[str, int]) -> None:
    """Refuse a second list of a user where a row of the output names the user alone.

    Raises:
        DataError: If there is one; what was ranked is kept, for a call that writes another form.
    """
    for record in records:
        if record.error is None and (first := earlier.setdefault(listed(record), record.line)) != record.line:
            raise DataError(
                f"{source}, line {record.line} asks for a second list of {listed(record)[:60]!r}, after line "
                f"{first}, and --form long and trec tell lists apart by the user; leave user_id out, so that the id of "
                "the request stands for it, or write --form records",
                kind="duplicate",
                at=Place(str(source), line=record.line),
                column="user_id",
            )


def stored(paths: Iterable[Path]) -> Iterator[Ranked]:
    """Yield the records of finished parts.

    Raises:
        LlmrecError: If one was changed since.
    """
    for path in paths:
        records = read_part(path)
        if records is None:
            raise LlmrecError(
                f"{path} was changed while it waited; run the same command again", kind="damaged", at=path
            )
        yield from records
