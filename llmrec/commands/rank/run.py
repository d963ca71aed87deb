"""A file of requests in, a file of ranked lists out: in parts that a kill cannot tear, resumed by the same command."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from llmrec.answering.rationales import Reasons
from llmrec.answering.requests import notes_of, rank_requests
from llmrec.answering.strategy import TWO_STEP
from llmrec.backends.cache import CachedBackend
from llmrec.commands.rank.job import Job, open_job
from llmrec.commands.rank.options import RankOptions, check_out
from llmrec.commands.rank.progress import RankBar, Tally, summary_of
from llmrec.data.reading.ranked import Ranked, read_part, write_part, write_ranked
from llmrec.data.reading.request_file import Raw, RequestFile, open_requests
from llmrec.data.requests import RankRequest, identity, read_request
from llmrec.durable import sha256_of, write_json, write_text
from llmrec.errors import DataError, LlmrecError
from llmrec.experiment.claiming import LOCK
from llmrec.experiment.resume import Budget, locked, read_stage
from llmrec.types import Item, Ranking, Unparsed


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

    def failed(self, reason: str) -> Ranked:
        """Return the record of a row that cannot be ranked."""
        return Ranked(request_id=self.request_id, user_id=self.user_id, line=self.raw.line, error=reason)

    def read(self, items: Mapping[str, Item] | None, *, whole: bool, retrieves: bool) -> RankRequest | Ranked:
        """Return the row's request, or the record of its failure; see `read_request`."""
        if self.error or self.raw.record is None:
            return self.failed(self.error)
        try:
            return read_request(self.raw.record, self.number, items, whole=whole, retrieves=retrieves)
        except DataError as error:
            return self.failed(str(error))


def record(
    job: Job, line: int, request: RankRequest, answer: Ranking | Unparsed, reasons: Reasons, *, top: int | None
) -> Ranked:
    """Return the record of a request that was asked about.

    Args:
        job: What it was ranked with.
        line: Where it stands in its file.
        request: What was asked.
        answer: The ranking, or why there is none.
        reasons: What was written about it.
        top: Items that are kept; None: all.
    """
    titles = {item.item_id: item.title for item in request.candidates}
    if job.whole is not None and job.items is not None and isinstance(answer, Ranking):
        titles = {item: job.items[item].title for item in answer.items}
    ranking = answer if isinstance(answer, Ranking) else None
    kept = ranking.items[:top] if ranking else ()
    return Ranked(
        request_id=request.id,
        user_id=request.user_id,
        line=line,
        items=kept,
        scores=ranking.scores[:top] if ranking else (),
        titles=tuple(titles[item] for item in kept),
        error=answer.reason if isinstance(answer, Unparsed) else None,
        notes=(*request.notes, *notes_of(job.way, request, answer), *reasons.notes),
        prompt_tokens=answer.cost.prompt_tokens,
        completion_tokens=answer.cost.completion_tokens,
        forwards=answer.cost.forwards,
        retrieved=request.retrieved,
        profile=(ranking.raw or None) if ranking and job.way.strategy == TWO_STEP else None,
        rationale=tuple(reasons.texts),
        rationale_prompt_tokens=reasons.cost.prompt_tokens,
        rationale_completion_tokens=reasons.cost.completion_tokens,
        rationale_forwards=reasons.cost.forwards,
    )


__all__ = ["PART", "RankOptions", "rank_file"]

log = logging.getLogger(__name__)

PART = 64
"""Requests of one part; more where the backend is handed more at a time."""

# hf scores requests one by one, so that handing it few at a time costs nothing and keeps the bar moving.
_FEW = 4
# Strategies that generate, which hf does for many prompts at once.
_GENERATE = ("list", TWO_STEP)


def rank_file(options: RankOptions) -> dict[str, Any]:
    """Rank a file of requests and return the summary, which also lies beside the output.

    Raises:
        LlmrecError: If nothing can be ranked, because a file, a model or an option cannot be used.
    """
    check_out(options)
    budget = Budget()
    with budget.stage("start"):
        source = open_requests(options.requests)
    with locked(options.parts, _own):
        if options.restart:
            _empty(options.parts)
        try:
            with budget.stage("start"):
                job = open_job(options, source, budget)
        except BaseException:
            if not any(options.parts.glob(_part("*"))):
                _remove(options.parts)
            raise
        try:
            done = None if options.restart else _finished(options, job.key)
            summary = done or _work(options, source, job, budget)
        finally:
            job.close()
        if done is not None:
            log.warning("%s is complete already; --restart ranks again", options.out)
        _remove(options.parts)
    return summary


def _finished(options: RankOptions, key: str) -> dict[str, Any] | None:
    """Return the summary of an output that the same inputs gave, if it still lies there as it was written."""
    done = read_stage(options.summary, key)
    same = done is not None and options.out.is_file() and sha256_of(options.out) == done["sha256"]
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


def _work(options: RankOptions, source: RequestFile, job: Job, budget: Budget) -> dict[str, Any]:
    _claim(options.parts, job.key)
    tally = Tally()
    earlier: dict[bytes, int] = {}
    total = source.rows if options.limit is None else min(source.rows, options.limit)
    backend = job.engines.get(job.engine, job.bundle.folder, job.weights)
    number = 0
    with budget.stage("reading"), RankBar(total, quiet=options.quiet) as bar:
        rows = islice(source, total)
        while raws := list(islice(rows, max(PART, options.batch))):
            asked = [Row.of(raw, tally.lines + n, earlier) for n, raw in enumerate(raws, start=1)]
            path = options.parts / _part(number)
            records = read_part(path, [raw.line for raw in raws])
            if records is not None:
                bar.skip(len(records))
                tally.add(records)
            else:
                before = budget.stages.get("ranking", 0.0)
                with budget.stage("ranking"):
                    records = _rank(options, job, backend, asked, bar, budget)
                write_part(path, records)
                tally.add(records, seconds=budget.stages["ranking"] - before)
            number += 1
    with budget.stage("write"):
        write_ranked(options.out, _stored(options.parts, number))
    summary = summary_of(options, source, job, tally, budget)
    write_json(options.summary, summary)
    return summary


def _rank(
    options: RankOptions, job: Job, backend: CachedBackend, rows: Sequence[Row], bar: RankBar, budget: Budget
) -> list[Ranked]:
    read = [row.read(job.items, whole=job.whole is not None, retrieves=job.retriever is not None) for row in rows]
    if job.retriever is not None:
        with budget.stage("retrieving"):
            read = _filled(job, rows, read)
    requests = [request for request in read if isinstance(request, RankRequest)]
    bar.advance(len(read) - len(requests))
    # What a killed run had asked already costs what it cost then.
    before = backend.recalled_seconds
    ranked = _ranked(options, job, backend, requests, bar)
    budget.add("ranking", backend.recalled_seconds - before)
    reasons = [Reasons() for _ in requests]
    if job.reasoner is not None:
        before = backend.recalled_seconds
        with budget.stage("rationales"):
            catalogue = job.items if job.whole is not None else None
            reasons = job.reasoner.write(requests, ranked, catalogue, backend)
        budget.add("rationales", backend.recalled_seconds - before)
    found = iter(zip(ranked, reasons, strict=True))
    return [
        each if isinstance(each, Ranked) else record(job, row.raw.line, each, *next(found), top=options.top)
        for row, each in zip(rows, read, strict=True)
    ]


def _ranked(
    options: RankOptions, job: Job, backend: CachedBackend, requests: Sequence[RankRequest], bar: RankBar
) -> list[Ranking | Unparsed]:
    one_by_one = job.engine == "hf" and job.way.strategy not in _GENERATE
    batch = min(_FEW, options.batch) if one_by_one else options.batch
    if job.whole is not None:
        return job.whole.rank(requests, backend, batch=batch, advance=bar.advance)
    return rank_requests(
        job.bundle,
        requests,
        way=job.way,
        backend=backend,
        encoder=job.encoder,
        batch=batch,
        advance=bar.advance,
    )


def _filled(job: Job, rows: Sequence[Row], read: Sequence[RankRequest | Ranked]) -> list[RankRequest | Ranked]:
    """Retrieve candidates for the requests that bring none; one that nothing is left for fails."""
    assert job.retriever is not None
    filled = iter(job.retriever.fill([each for each in read if isinstance(each, RankRequest)]))
    found: list[RankRequest | Ranked] = []
    for row, each in zip(rows, read, strict=True):
        request = each if isinstance(each, Ranked) else next(filled)
        if isinstance(request, RankRequest) and not request.candidates:
            request = row.failed("the history holds every item of the run's data, so that none is left to retrieve")
        found.append(request)
    return found


def _stored(folder: Path, parts: int) -> Iterator[Ranked]:
    for number in range(parts):
        path = folder / _part(number)
        records = read_part(path)
        if records is None:
            raise LlmrecError(f"{path} was changed while it waited; run the same command again")
        yield from records
