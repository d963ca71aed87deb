"""A file of requests in, a file of ranked lists out: in parts that a kill cannot tear, resumed by the same command."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmrec import terminal
from llmrec.answering.recommender import Answered
from llmrec.commands.rank.options import RankOptions
from llmrec.commands.rank.outputs import check_out
from llmrec.commands.rank.progress import RankBar, Tally, summary_of
from llmrec.commands.rank.ranker import Ranker, open_ranker
from llmrec.data.reading.ranked import Ranked, form_of, listed, read_part, write_lists, write_part
from llmrec.data.reading.request_file import Raw, RequestFile, open_requests
from llmrec.data.requests import RankRequest, identity
from llmrec.durable import sha256_of, write_checked, write_text
from llmrec.errors import DataError, LlmrecError, Place
from llmrec.experiment.claiming import LOCK
from llmrec.experiment.resume import Budget, key_of, locked, read_stage
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
    check_out(options.target, reads, option="--out", by="rank", parts=options.parts)
    budget = Budget()
    with budget.stage("start"):
        bare = options.whole or options.retrieve is not None or options.baseline is not None
        source = open_requests(options.source, bare=bare)
    with locked(options.parts, _own):
        if options.restart:
            _empty(options.parts)
        with ExitStack() as opened:
            try:
                with budget.stage("start"):
                    recommender = open_ranker(options, store=options.parts / "answers.sqlite", budget=budget)
                    opened.enter_context(recommender)
                    _check_titled(options, source, recommender)
                    key = key_of(requests=source.sha256, limit=options.limit, **recommender.identity)
            except BaseException:
                opened.close()
                if not any(options.parts.glob(_part("*"))):
                    _remove(options.parts)
                raise
            done = None if options.restart else _finished(options, key)
            summary = done or _work(options, source, recommender, key)
        if done is not None:
            log.warning("%s is complete already; --restart ranks again", options.target)
        _remove(options.parts)
    return summary


def _check_titled(options: RankOptions, source: RequestFile, recommender: Ranker) -> None:
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


def _finished(options: RankOptions, key: str) -> Mapping[str, Any] | None:
    """Return the summary of an output that the same inputs gave, if it still lies there as it was written."""
    done = read_stage(options.summary, key, itemgetter("sha256"))
    same = (
        done is not None
        and done.get("form") == options.layout
        and options.target.is_file()
        and sha256_of(options.target) == done["sha256"]
    )
    return done if same else None


# --------------------------------------------------------------------------- parts


def _part(number: int | str) -> str:
    return f"part-{number:0>8}.jsonl" if isinstance(number, int) else f"part-{number}.jsonl"


def _claim(folder: Path, key: str) -> None:
    """Drop parts that other inputs gave."""
    mark = folder / "key"
    if mark.is_file() and mark.read_text(encoding="utf-8") == key:
        return
    others = [path for path in folder.glob(_part("*")) if _own(path.name)]
    if others:
        log.warning("%d parts in %s were made from other inputs or options; they are discarded", len(others), folder)
    for path in others:
        path.unlink()
    write_text(mark, key)


_OWN = re.compile(r"\.lock|\.?(key|part-[0-9]{8}\.jsonl)((\.llmrec)?\.draft)?|answers\.sqlite.*")


def _own(name: str) -> bool:
    """Whether a file of this name in a folder of parts is one that ranking writes there."""
    return _OWN.fullmatch(name) is not None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK and _own(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()


def _remove(folder: Path) -> None:
    """Remove a folder of parts; what somebody else put there since stays, and the folder with it."""
    _empty(folder)
    others = [path.name for path in folder.iterdir() if path.name != LOCK]
    if others:
        log.warning("%s is kept, since it holds files that llmrec did not write: %s", folder, ", ".join(others[:3]))
        return
    (folder / LOCK).unlink()
    folder.rmdir()


def _work(options: RankOptions, source: RequestFile, recommender: Ranker, key: str) -> Mapping[str, Any]:
    _claim(options.parts, key)
    budget = recommender.budget
    tally, form = Tally(), options.layout
    earlier: dict[bytes, int] = {}
    owners: dict[str, int] = {}
    total = source.rows if options.limit is None else min(source.rows, options.limit)
    number = 0
    with budget.stage("reading"), RankBar(total) as bar:
        rows = islice(source, total)
        while raws := list(islice(rows, max(PART, options.batch))):
            lines = [Row.of(raw, tally.lines + n, earlier) for n, raw in enumerate(raws, start=1)]
            path = options.parts / _part(number)
            records = read_part(path, [raw.line for raw in raws])
            if records is not None:
                bar.skip(len(records))
                tally.add(records)
            else:
                before = budget.stages.get("ranking", 0.0)
                with budget.stage("ranking"):
                    answers = recommender.answer([row.asked(recommender) for row in lines], advance=bar.advance)
                    records = [row.record(answer) for row, answer in zip(lines, answers, strict=True)]
                write_part(path, records)
                tally.add(records, seconds=budget.stages["ranking"] - before)
            if form != "records":
                _check_owners(source, records, owners)
            number += 1
    with budget.stage("write"):
        write_lists(options.target, _stored(options.parts, number), form, options.baseline or "llmrec")
    summary = summary_of(options, source, recommender, key, tally)
    write_checked(options.summary, summary)
    return summary


def _check_owners(source: RequestFile, records: Sequence[Ranked], earlier: dict[str, int]) -> None:
    """Refuse a second list of a user where a row of the output names the user alone.

    Raises:
        DataError: If there is one; what was ranked is kept, for a call that writes another form.
    """
    for record in records:
        if record.error is None and (first := earlier.setdefault(listed(record), record.line)) != record.line:
            raise DataError(
                f"{source.path}, line {record.line} asks for a second list of {listed(record)[:60]!r}, after line "
                f"{first}, and --form long and trec tell lists apart by the user; leave user_id out, so that the id of "
                "the request stands for it, or write --form records",
                kind="duplicate",
                at=Place(str(source.path), line=record.line),
                column="user_id",
            )


def _stored(folder: Path, parts: int) -> Iterator[Ranked]:
    for number in range(parts):
        path = folder / _part(number)
        records = read_part(path)
        if records is None:
            raise LlmrecError(
                f"{path} was changed while it waited; run the same command again", kind="damaged", at=path
            )
        yield from records
