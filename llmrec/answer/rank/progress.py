"""What a ranking of many requests shows while it goes on, and says of itself at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.ranker import Ranker, told_of
from llmrec.data.read.ranked import Ranked
from llmrec.data.read.request_file import RequestFile
from llmrec.durable import sha256_of
from llmrec.machine import machine, versions
from llmrec.progress import Bar
from llmrec.recipe.shared import Form
from llmrec.types import Cost

_SHOWN = 5
# Texts that a request brought can make a note long; the output has it whole.
_LONGEST = 160


@dataclass(frozen=True)
class Part:
    """What ranking one part took, engine start, retrieval and rationales left out."""

    lines: int
    seconds: float


@dataclass
class Tally:
    """Counts over all records, and what was ranked in this invocation."""

    lines: int = 0
    failed: int = 0
    noted: int = 0
    retrieved: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    forwards: int = 0
    rationale: Cost = field(default_factory=Cost)
    written: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    fresh: int = 0
    fresh_ranked: int = 0
    fresh_tokens: int = 0
    parts: list[Part] = field(default_factory=list)

    def add(self, records: Sequence[Ranked], *, seconds: float | None = None) -> None:
        """Count the records of a part.

        Args:
            records: One a line.
            seconds: What ranking them took; None: an earlier invocation ranked them.
        """
        for record in records:
            self._add(record)
            if seconds is not None:
                self.fresh += 1
                self.fresh_ranked += record.error is None
                self.fresh_tokens += record.prompt_tokens + record.completion_tokens
        if seconds is not None:
            self.parts.append(Part(len(records), seconds))

    def _add(self, record: Ranked) -> None:
        self.lines += 1
        self.retrieved += record.retrieved > 0
        self.prompt_tokens += record.prompt_tokens
        self.completion_tokens += record.completion_tokens
        self.forwards += record.forwards
        self.written += sum(bool(text) for text in record.rationale)
        reasons = Cost(
            prompt_tokens=record.rationale_prompt_tokens,
            completion_tokens=record.rationale_completion_tokens,
            forwards=record.rationale_forwards,
        )
        self.rationale += reasons
        if record.error is not None:
            self.failed += 1
            if len(self.failures) < _SHOWN:
                self.failures.append({"line": record.line, "request_id": record.request_id, "error": record.error})
        if record.notes:
            self.noted += 1
            if len(self.notes) < _SHOWN:
                self.notes.append({"line": record.line, "request_id": record.request_id, "notes": list(record.notes)})


class RankBar:
    """The progress of a ranking, with the rate of this invocation."""

    def __init__(self, total: int) -> None:
        self._bar = Bar("ranking", total, unit="requests")
        self._done = 0
        self._begin: float | None = None

    def __enter__(self) -> RankBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop(failed=error is not None)

    def skip(self, count: int) -> None:
        """Show requests that an earlier run ranked."""
        self._bar.skip(count)

    def advance(self, count: int) -> None:
        """Show requests that were just ranked."""
        rate = ""
        if self._begin is None:
            # The first answers took the start of the engine with them.
            self._begin = time.monotonic()
        else:
            self._done += count
            rate = f"{self._done / max(time.monotonic() - self._begin, 0.001):.1f} requests/s"
        self._bar.advance(count, rate)


def console_rows(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return a summary as the console shows it: counts first, then the first failures and notes, costs last."""
    rows = {
        "ranked": f"{summary['ranked']:,} of {summary['lines']:,} lines",
        "failed": f"{summary['failed']:,}",
    }
    for each in summary["failures"]:
        rows[f"  line {each['line']}"] = each["error"]
    if summary["failed"] > len(summary["failures"]):
        rows["  and more"] = f"see the column 'error' of {summary['out']}"
    rows["with notes"] = f"{summary['with_notes']:,}"
    for each in summary["notes"]:
        note = "; ".join(each["notes"])
        rows[f"  note on line {each['line']}"] = note if len(note) <= _LONGEST else f"{note[: _LONGEST - 1]}…"
    if summary["requests_per_second"] is not None:
        tokens = "" if "signature" in summary else f", {summary['tokens_per_second']:,.0f} tokens/s"
        rows["speed"] = f"{summary['requests_per_second']:,.2f} requests/s{tokens}"
    if summary["seconds_per_request"] is not None:
        each = summary["seconds_per_request"]
        rows["seconds a request"] = (
            f"{each['mean']:.3f}, from {each['fastest_part']:.3f} in the fastest part to {each['slowest_part']:.3f}"
        )
    if "signature" not in summary:
        rows["cost"] = _cost(summary)
    if summary["rationale"] is not None:
        rows["cost of rationales"] = f"{summary['rationale']['written']:,} written: {_cost(summary['rationale'])}"
    if summary.get("retriever") is not None:
        found = summary["retriever"]
        rows["retrieved"] = f"{found['k']} by {found['retriever']}, for {summary['with_retrieved']:,} lines"
    if "baseline" in summary:
        rows["asked"] = f"{summary['baseline']}, fitted to {summary['data']}"
    elif "by" in summary:
        rows["asked"] = f"{summary['by']} of {summary['model']}"
    else:
        rows["asked"] = f"{summary['task']}/{summary['template']}, {summary['strategy']}, {summary['engine']}"
    rows["seconds"] = ", ".join(f"{name} {spent:.1f}" for name, spent in summary["seconds"].items())
    if summary["from_earlier_run"]:
        rows["from an earlier run"] = f"{summary['from_earlier_run']:,} lines"
    rows["output"] = str(summary["out"])
    return rows


def _cost(spent: Mapping[str, Any]) -> str:
    """Write a cost in words: its sums, and its tokens and forward passes a ranked line."""
    prompts, answers, each = spent["prompt_tokens"], spent["completion_tokens"], spent["per_request"]
    text = f"{prompts:,} tokens in prompts, {answers:,} in answers, {spent['forwards']:,} forward passes"
    if each is None:
        return text
    tokens = each["prompt_tokens"] + each["completion_tokens"]
    return f"{text}; {tokens:,.0f} tokens and {each['forwards']:,.1f} forward passes a ranked line"


@dataclass(frozen=True)
class Asked:
    """What was asked, by what, as a summary says it.

    Attributes:
        requests: The file of requests.
        out: The file of rankings.
        form: How they lie in it.
        blank_lines: Lines between the requests.
        told: What ranked, and how it was asked; see `told_of`.
        key: Hash of every input.
    """

    requests: str
    out: Path
    form: Form
    blank_lines: int
    told: Mapping[str, object]
    key: str


def asked_of(options: RankOptions, source: RequestFile, recommender: Ranker, key: str) -> Asked:
    """Return what was asked of a recommender."""
    told = told_of(recommender)
    return Asked(str(options.source), options.target, options.layout, source.blank, told, key)


def summary_of(asked: Asked, tally: Tally, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return what the console and the JSON file say.

    Args:
        asked: What was asked.
        tally: What became of it.
        seconds: Spent, by stage.
    """
    ranking = seconds.get("ranking", 0.0)
    told = dict(asked.told)
    reasons = bool(told.pop("rationales", False))
    return {
        "key": asked.key,
        "requests": asked.requests,
        "out": str(asked.out),
        "form": asked.form,
        "sha256": sha256_of(asked.out),
        **told,
        "lines": tally.lines,
        "blank_lines": asked.blank_lines,
        "ranked": tally.lines - tally.failed,
        "failed": tally.failed,
        "failures": tally.failures,
        "with_notes": tally.noted,
        "notes": tally.notes,
        "with_retrieved": tally.retrieved,
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "forwards": tally.forwards,
        "per_request": _means(tally, tally.prompt_tokens, tally.completion_tokens, tally.forwards),
        "rationale": _rationale(tally) if reasons else None,
        "from_earlier_run": tally.lines - tally.fresh,
        "requests_per_second": round(tally.fresh_ranked / ranking, 3) if tally.fresh_ranked else None,
        "tokens_per_second": round(tally.fresh_tokens / ranking, 1) if tally.fresh_ranked else None,
        "seconds_per_request": _seconds(tally),
        "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
        "versions": versions(),
        "machine": machine(),
    }


def _means(tally: Tally, prompt_tokens: int, completion_tokens: int, forwards: int) -> dict[str, float] | None:
    """Return the mean cost of a line that was ranked; None if none was."""
    ranked = tally.lines - tally.failed
    costs = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "forwards": forwards}
    return {name: round(cost / ranked, 2) for name, cost in costs.items()} if ranked else None


def _rationale(tally: Tally) -> dict[str, Any]:
    total = tally.rationale
    costs = (total.prompt_tokens, total.completion_tokens, total.forwards)
    return {
        "written": tally.written,
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "forwards": total.forwards,
        "per_request": _means(tally, *costs),
    }


def _seconds(tally: Tally) -> dict[str, float] | None:
    """Return seconds a request in the parts that this invocation ranked: over all of them, the fastest, the slowest."""
    if not tally.parts:
        return None
    each = [part.seconds / part.lines for part in tally.parts]
    whole = sum(part.seconds for part in tally.parts) / sum(part.lines for part in tally.parts)
    return {"mean": round(whole, 4), "fastest_part": round(min(each), 4), "slowest_part": round(max(each), 4)}
