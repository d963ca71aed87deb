"""Rows of a request file on their way: read, failed, or recorded with their ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

from llmrec.build.rank_job import Job
from llmrec.build.ranking import notes_of
from llmrec.build.ranking_reasons import Reasons
from llmrec.build.ranking_way import TWO_STEP
from llmrec.data.ranked import Ranked
from llmrec.data.request_files import Raw
from llmrec.data.requests import RankRequest, identity, read_request
from llmrec.errors import DataError
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
