"""Ranks a file of requests in parts, so that an interrupted command can be resumed."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmrec import terminal
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.outputs import check_output_file, open_output_table, summary_path
from llmrec.answer.rank.ranker import Ranker, open_ranker, with_resolved_model
from llmrec.answer.recommender import AnnotatedAnswer
from llmrec.data.ranked import (
    LIST_INDEX,
    LIST_SCHEMA,
    LIST_TABLE,
    RankingRecord,
    read_part,
    read_records,
    record_key,
    resolve_form,
    to_arrow_table,
    write_lists,
    write_part,
)
from llmrec.data.request_file import RequestFile, RequestRow, open_requests
from llmrec.data.requests import RankRequest, request_identity
from llmrec.durable import sha256_of, write_checked_json, write_text
from llmrec.errors import DataError, LlmrecError, Location, RecipeError
from llmrec.fingerprint import digest_of
from llmrec.machine import machine_facts, package_versions
from llmrec.pipeline.resume import LOCK_FILE, StageTimer, lock_folder, read_stage
from llmrec.progress import Progress
from llmrec.recipe.shared import Form
from llmrec.records import Shard
from llmrec.types import Cost, Ranking, Unparsed

log = logging.getLogger(__name__)

STDOUT = Path("-")
"""The path that means standard output."""

PART_SIZE = 64
"""Requests per part; more if the backend takes larger batches."""

_MAX_SHOWN_LINES = 5
# A note with texts of a request can be long; the output file has the full note.
_MAX_NOTE_LENGTH = 160


@dataclass(frozen=True)
class InputRow:
    """A row of the input file with its id, and whether an earlier row has the same id."""

    raw: RequestRow
    number: int
    request_id: str | None
    user_id: str | None
    error: str

    @classmethod
    def of(cls, raw: RequestRow, number: int, earlier: dict[bytes, int]) -> InputRow:
        """Return a row with its request id; a row whose id occurs in ``earlier`` rows gets an error."""
        request_id, user_id = request_identity(raw.record, number)
        error = raw.error
        if request_id is not None:
            # Hashes have the same size for all ids, so that millions of them need little memory.
            digest = blake2b(request_id.encode(), digest_size=16).digest()
            first = earlier.setdefault(digest, raw.line)
            if first != raw.line and not error:
                error = f"duplicate id {request_id!r}, first used in line {first}; give each request a unique id"
        return cls(raw, number, request_id, user_id, error)

    def parse(self, recommender: Ranker) -> RankRequest | Unparsed:
        """Parse the request of the row, or return why it is invalid."""
        if self.error or self.raw.record is None:
            return Unparsed(request_id=self.request_id or "", reason=self.error)
        return recommender.read(self.raw.record, self.number)

    def record(self, answered: AnnotatedAnswer) -> RankingRecord:
        """Return the record to write for an answer."""
        answer, reasons = answered.answer, answered.reasons
        ranking = answer if isinstance(answer, Ranking) else None
        return RankingRecord(
            request_id=self.request_id,
            user_id=self.user_id,
            line=self.raw.line,
            items=ranking.items if ranking else (),
            scores=ranking.scores if ranking else (),
            titles=answered.titles,
            error=answer.reason if isinstance(answer, Unparsed) else None,
            notes=answered.notes,
            prompt_tokens=answer.cost.prompt_tokens,
            completion_tokens=answer.cost.completion_tokens,
            forwards=answer.cost.forwards,
            retrieved=answered.retrieved,
            profile=answered.profile,
            rationale=tuple(reasons.texts),
            rationale_prompt_tokens=reasons.cost.prompt_tokens,
            rationale_completion_tokens=reasons.cost.completion_tokens,
            rationale_forwards=reasons.cost.forwards,
        )


def rank_file(options: RankOptions) -> Mapping[str, Any]:
    """Rank a file of requests; returns the summary, which is also written next to the output.

    If the output is the standard output, only rankings are written there, and no parts are kept for a later call.

    Raises:
        LlmrecError: If a file, a model or an option cannot be used.
    """
    options = with_resolved_model(options)
    if options.to is not None:
        return _rank_into_table(options, options.to)
    if options.target != STDOUT:
        return _rank_into_file(options)
    with TemporaryDirectory(prefix="llmrec-rank-") as folder:
        target = Path(folder) / ("lists.txt" if options.form in ("trec", "recbole") else "lists.jsonl")
        summary = _rank_into_file(replace(options, out=target))
        with target.open("rb") as stream:
            shutil.copyfileobj(stream, terminal.out().buffer)
        terminal.out().flush()
    return {**summary, "out": str(STDOUT)}


def _rank_into_table(options: RankOptions, to: str) -> Mapping[str, Any]:
    """Rank a file of requests into a table of a database; a file in the working folder keeps the lists until then."""
    with open_output_table(to, LIST_TABLE, LIST_SCHEMA, replace=options.restart, out=options.out) as (database, out):
        if options.form != "auto":
            raise RecipeError(
                "--form has no effect with --to, whose table has one row per item; drop one of the options",
                kind="contradiction",
                column="--form",
            )
        summary = _rank_into_file(replace(options, out=out))
        database.write(LIST_TABLE, to_arrow_table(read_records(out)), index=LIST_INDEX, replace=options.restart)
    return {**summary, "out": database.shown}


def _rank_into_file(options: RankOptions) -> Mapping[str, Any]:
    resolve_form(options.target, options.form)
    reads = (options.source, options.items)
    check_output_file(options.target, reads, option="--out", by="rank", parts=options.parts, restart=options.restart)
    budget = StageTimer()
    with budget.stage("start"):
        source = open_requests(options.source, bare=options.bare)
    with lock_folder(options.parts, is_rank_file):
        if options.restart:
            empty_parts_folder(options.parts)
        with open_keyed_ranker(options, source, options.parts, budget) as (recommender, key):
            done = None if options.restart else read_finished_summary(options.target, options.layout, key)
            summary = done or _rank_and_write(options, source, recommender, key)
        if done is not None:
            log.warning("%s is already complete; use --restart to rank again", options.target)
        remove_parts_folder(options.parts)
    return summary


@contextmanager
def open_keyed_ranker(
    options: RankOptions, source: RequestFile, folder: Path, budget: StageTimer, ranker: Ranker | None = None
) -> Iterator[tuple[Ranker, str]]:
    """Open the model, and yield it with the hash of all inputs; a new folder is removed on failure.

    Args:
        options: The options of the command.
        source: The requests.
        folder: The folder of parts and cached answers.
        budget: The recorder of seconds per stage.
        ranker: An open model, which stays open; None: it is opened and closed here.

    Raises:
        LlmrecError: If nothing can be ranked.
    """
    with ExitStack() as opened:
        try:
            with budget.stage("start"):
                recommender = ranker or open_ranker(options, store=folder / "answers.sqlite", budget=budget)
                if ranker is None:
                    opened.enter_context(recommender)
                _check_titles(options, source, recommender)
                inputs = {"requests": source.sha256, "limit": options.limit, "users": recommender.histories}
                key = digest_of(**inputs, **recommender.identity)
        except BaseException:
            opened.close()
            if not any(folder.glob(part_name("*"))):
                remove_parts_folder(folder)
            raise
        yield recommender, key


def _check_titles(options: RankOptions, source: RequestFile, recommender: Ranker) -> None:
    """Reject a file in which a request names an item only by id, if there is no catalogue."""
    for raw in islice(source, options.limit) if recommender.items == {} else ():
        if raw.record is not None and (fault := recommender.untitled(raw.record)):
            raise DataError(
                f"{source.path}, line {raw.line} {fault}",
                kind="unknown-name",
                at=Location(str(source.path), line=raw.line),
                column="item_id",
            )


def read_finished_summary(target: Path, form: Form, key: str) -> Mapping[str, Any] | None:
    """Return the summary of an existing output with the same inputs, if the file is unchanged."""
    done = read_stage(summary_path(target), key, itemgetter("sha256"))
    same = done is not None and done.get("form") == form and target.is_file() and sha256_of(target) == done["sha256"]
    return done if same else None


# --------------------------------------------------------------------------- parts


def part_name(number: int | str) -> str:
    """Return the file name of a part."""
    return f"part-{number:0>8}.jsonl" if isinstance(number, int) else f"part-{number}.jsonl"


def _remove_outdated_parts(folder: Path, key: str) -> None:
    """Remove parts that were computed from other inputs."""
    mark = folder / "key"
    if mark.is_file() and mark.read_text(encoding="utf-8") == key:
        return
    others = [path for path in folder.glob(part_name("*")) if is_rank_file(path.name)]
    if others:
        log.warning("%d partial results in %s are from other inputs or options and are discarded", len(others), folder)
    for path in others:
        path.unlink()
    write_text(mark, key)


_RANK_FILE = re.compile(r"\.lock|\.?(key|part-[0-9]{8}\.jsonl|shard\.json)((\.llmrec)?\.draft)?|answers\.sqlite.*")


def is_rank_file(name: str) -> bool:
    """Whether a file name in a folder of parts was written by `llmrec rank`."""
    return _RANK_FILE.fullmatch(name) is not None


def empty_parts_folder(folder: Path) -> None:
    """Remove the parts from a folder, but not its lock."""
    for path in folder.iterdir():
        if path.name != LOCK_FILE and is_rank_file(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()


def remove_parts_folder(folder: Path) -> None:
    """Remove a folder of parts, except for files that `llmrec rank` did not write."""
    empty_parts_folder(folder)
    others = [path.name for path in folder.iterdir() if path.name != LOCK_FILE]
    if others:
        log.warning("%s is kept because it contains files that llmrec did not write: %s", folder, ", ".join(others[:3]))
        return
    (folder / LOCK_FILE).unlink()
    folder.rmdir()


def rank_parts(
    options: RankOptions,
    source: RequestFile,
    recommender: Ranker,
    folder: Path,
    key: str,
    tally: RankTotals,
    shard: Shard | None = None,
) -> Iterator[list[RankingRecord]]:
    """Rank the requests part by part; existing parts are not ranked again.

    Args:
        options: The options of the command.
        source: The requests.
        recommender: The model.
        folder: The folder of parts.
        key: Hash of every input; parts with another key are removed.
        tally: The counter of records.
        shard: Rank only the parts of this shard; the ids of earlier rows are read to detect duplicates.
    """
    _remove_outdated_parts(folder, key)
    budget, earlier = recommender.budget, dict[bytes, int]()
    total, size = total_and_part_size(options, source)
    parts = (shard or Shard(1, 1)).chunks(total, size)
    rows = islice(source, total)
    mine = max(0, min(total, parts.stop * size) - parts.start * size)
    with budget.stage("reading"), RankProgress(mine) as bar:
        for number in range(parts.stop if parts else 0):
            raws = list(islice(rows, size))
            lines = [InputRow.of(raw, number * size + n, earlier) for n, raw in enumerate(raws, start=1)]
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
                    requests = [row.parse(recommender) for row in lines]
                    answers = recommender.rank(requests, advance=bar.answered, part=number)
                    records = [row.record(answer) for row, answer in zip(lines, answers, strict=True)]
                write_part(path, records)
                tally.add(records, seconds=budget.stages["ranking"] - before)
            yield records


def total_and_part_size(options: RankOptions, source: RequestFile) -> tuple[int, int]:
    """Return the number of requests to rank, and the number of requests per part."""
    total = source.rows if options.limit is None else min(source.rows, options.limit)
    return total, max(PART_SIZE, options.batch)


def _rank_and_write(options: RankOptions, source: RequestFile, recommender: Ranker, key: str) -> Mapping[str, Any]:
    budget, tally, form = recommender.budget, RankTotals(), options.layout
    owners: dict[str, int] = {}
    paths: list[Path] = []
    for records in rank_parts(options, source, recommender, options.parts, key, tally):
        if form != "records" or options.to is not None:
            check_unique_users(source.path, records, owners)
        paths.append(options.parts / part_name(len(paths)))
    with budget.stage("write"):
        write_lists(options.target, read_part_records(paths), form, options.tag)
    summary = ranking_summary(ranking_inputs(options, source, recommender, key), tally, budget.stages)
    write_checked_json(options.summary, summary)
    return summary


def check_unique_users(source: Path, records: Sequence[RankingRecord], earlier: dict[str, int]) -> None:
    """Reject a second list for the same user if users identify the lists in the output."""
    for record in records:
        if record.error is None and (first := earlier.setdefault(record_key(record), record.line)) != record.line:
            raise DataError(
                f"{source}, line {record.line} requests a second list of {record_key(record)[:60]!r}, after line "
                f"{first}, but outputs with one row per item identify lists by user; omit user_id to use the id of the "
                "request, or write records to a file",
                kind="duplicate",
                at=Location(str(source), line=record.line),
                column="user_id",
            )


def read_part_records(paths: Iterable[Path]) -> Iterator[RankingRecord]:
    """Yield the records of finished parts."""
    for path in paths:
        records = read_part(path)
        if records is None:
            raise LlmrecError(
                f"{path} was changed after it was written; run the same command again", kind="damaged", at=path
            )
        yield from records


# --------------------------------------------------------------------------- progress and summary


@dataclass(frozen=True)
class PartCost:
    """The cost of ranking a part, without engine start, retrieval and explanations."""

    lines: int
    seconds: float


@dataclass
class RankTotals:
    """Counts over all records, and the costs of this call."""

    lines: int = 0
    failed: int = 0
    noted: int = 0
    retrieved: int = 0
    cost: Cost = field(default_factory=Cost)
    rationale: Cost = field(default_factory=Cost)
    written: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    fresh: int = 0
    fresh_ranked: int = 0
    fresh_tokens: int = 0
    parts: list[PartCost] = field(default_factory=list)

    def add(self, records: Sequence[RankingRecord], *, seconds: float | None = None) -> None:
        """Count the records of a part.

        Args:
            records: One record per line of the file.
            seconds: The time that ranking took; None if an earlier invocation ranked them.
        """
        for record in records:
            self._add(record)
            if seconds is not None:
                self.fresh += 1
                self.fresh_ranked += record.error is None
                self.fresh_tokens += record.prompt_tokens + record.completion_tokens
        if seconds is not None:
            self.parts.append(PartCost(len(records), seconds))

    def _add(self, record: RankingRecord) -> None:
        self.lines += 1
        self.retrieved += record.retrieved > 0
        self.written += sum(bool(text) for text in record.rationale)
        self.cost += Cost(
            prompt_tokens=record.prompt_tokens,
            completion_tokens=record.completion_tokens,
            forwards=record.forwards,
        )
        self.rationale += Cost(
            prompt_tokens=record.rationale_prompt_tokens,
            completion_tokens=record.rationale_completion_tokens,
            forwards=record.rationale_forwards,
        )
        if record.error is not None:
            self.failed += 1
            if len(self.failures) < _MAX_SHOWN_LINES:
                self.failures.append({"line": record.line, "request_id": record.request_id, "error": record.error})
        if record.notes:
            self.noted += 1
            if len(self.notes) < _MAX_SHOWN_LINES:
                self.notes.append({"line": record.line, "request_id": record.request_id, "notes": list(record.notes)})


class RankProgress(Progress):
    """The progress of a ranking, with the speed of this call."""

    def __init__(self, total: int) -> None:
        super().__init__("ranking", total, unit="requests")
        self._ranked = 0
        self._first: float | None = None

    def answered(self, count: int) -> None:
        """Count requests that were just ranked."""
        rate = ""
        if self._first is None:
            # The time of the first answers includes starting the engine.
            self._first = time.monotonic()
        else:
            self._ranked += count
            rate = f"{self._ranked / max(time.monotonic() - self._first, 0.001):.1f} requests/s"
        self.advance(count, rate)


def console_rows(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines of a summary for the terminal: counts, the first failures and notes, and costs."""
    rows = {
        "ranked": f"{summary['ranked']:,} of {summary['lines']:,} lines",
        "failed": f"{summary['failed']:,}",
    }
    for item in summary["failures"]:
        rows[f"  line {item['line']}"] = item["error"]
    if summary["failed"] > len(summary["failures"]):
        rows["  and more"] = f"see the column 'error' of {summary['out']}"
    rows["with notes"] = f"{summary['with_notes']:,}"
    for item in summary["notes"]:
        note = "; ".join(item["notes"])
        rows[f"  note on line {item['line']}"] = (
            note if len(note) <= _MAX_NOTE_LENGTH else f"{note[: _MAX_NOTE_LENGTH - 1]}…"
        )
    if summary["requests_per_second"] is not None:
        tokens = "" if "signature" in summary else f", {summary['tokens_per_second']:,.0f} tokens/s"
        rows["speed"] = f"{summary['requests_per_second']:,.2f} requests/s{tokens}"
    if summary["seconds_per_request"] is not None:
        item = summary["seconds_per_request"]
        rows["seconds per request"] = (
            f"{item['mean']:.3f} on average ({item['fastest_part']:.3f} to {item['slowest_part']:.3f} per part)"
        )
    if "signature" not in summary:
        rows["cost"] = _format_cost(summary)
    if summary["rationale"] is not None:
        rows["cost of rationales"] = (
            f"{summary['rationale']['written']:,} written: {_format_cost(summary['rationale'])}"
        )
    if summary.get("retriever") is not None:
        result = summary["retriever"]
        rows["retrieved"] = f"{result['k']} by {result['retriever']}, for {summary['with_retrieved']:,} lines"
    if "baseline" in summary:
        rows["ranked by"] = f"{summary['baseline']}, fitted to {summary['data']}"
    elif "by" in summary:
        rows["ranked by"] = f"{summary['by']} of {summary['model']}"
    else:
        rows["ranked by"] = f"{summary['task']}/{summary['template']}, {summary['strategy']}, {summary['engine']}"
    rows["seconds"] = ", ".join(f"{name} {spent:.1f}" for name, spent in summary["seconds"].items())
    if summary["from_earlier_run"]:
        rows["from an earlier run"] = f"{summary['from_earlier_run']:,} lines"
    rows["output"] = str(summary["out"])
    return rows


def _format_cost(spent: Mapping[str, Any]) -> str:
    """Return a cost as text: totals, and tokens and forward passes per ranked request."""
    prompts, answers, item = spent["prompt_tokens"], spent["completion_tokens"], spent["per_request"]
    text = f"{prompts:,} tokens in prompts, {answers:,} in answers, {spent['forwards']:,} forward passes"
    if item is None:
        return text
    tokens = item["prompt_tokens"] + item["completion_tokens"]
    return f"{text}; {tokens:,.0f} tokens and {item['forwards']:,.1f} forward passes per ranked line"


@dataclass(frozen=True)
class RankingInputs:
    """The inputs of a ranking, for its summary.

    Attributes:
        requests: The file of requests.
        out: The file of rankings.
        form: The format of that file.
        blank_lines: Number of blank lines.
        model: The model and its settings; see `LanguageModel.described`.
        key: Hash of every input.
    """

    requests: str
    out: Path
    form: Form
    blank_lines: int
    model: Mapping[str, object]
    key: str


def ranking_inputs(options: RankOptions, source: RequestFile, recommender: Ranker, key: str) -> RankingInputs:
    """Return the inputs of a ranking for its summary."""
    return RankingInputs(str(options.source), options.target, options.layout, source.blank, recommender.described, key)


def ranking_summary(inputs: RankingInputs, tally: RankTotals, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the summary for the terminal and the JSON file.

    Args:
        inputs: The inputs.
        tally: The counts and costs.
        seconds: The seconds per stage.
    """
    ranking = seconds.get("ranking", 0.0)
    model = dict(inputs.model)
    reasons = bool(model.pop("rationales", False))
    return {
        "key": inputs.key,
        "requests": inputs.requests,
        "out": str(inputs.out),
        "form": inputs.form,
        "sha256": sha256_of(inputs.out),
        **model,
        "lines": tally.lines,
        "blank_lines": inputs.blank_lines,
        "ranked": tally.lines - tally.failed,
        "failed": tally.failed,
        "failures": tally.failures,
        "with_notes": tally.noted,
        "notes": tally.notes,
        "with_retrieved": tally.retrieved,
        **_cost_totals(tally, tally.cost),
        "rationale": {"written": tally.written, **_cost_totals(tally, tally.rationale)} if reasons else None,
        "from_earlier_run": tally.lines - tally.fresh,
        "requests_per_second": round(tally.fresh_ranked / ranking, 3) if tally.fresh_ranked else None,
        "tokens_per_second": round(tally.fresh_tokens / ranking, 1) if tally.fresh_ranked else None,
        "seconds_per_request": _seconds_per_request(tally),
        "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
        "versions": package_versions(),
        "machine": machine_facts(),
    }


def _cost_totals(tally: RankTotals, cost: Cost) -> dict[str, Any]:
    """Return the totals of a cost, and the means per ranked request if there are any."""
    sums, ranked = asdict(cost), tally.lines - tally.failed
    return {**sums, "per_request": {name: round(sum_ / ranked, 2) for name, sum_ in sums.items()} if ranked else None}


def _seconds_per_request(tally: RankTotals) -> dict[str, float] | None:
    """Return the seconds per request of this call: mean, fastest part and slowest part."""
    if not tally.parts:
        return None
    seconds = [part.seconds / part.lines for part in tally.parts]
    mean = sum(part.seconds for part in tally.parts) / sum(part.lines for part in tally.parts)
    return {"mean": round(mean, 4), "fastest_part": round(min(seconds), 4), "slowest_part": round(max(seconds), 4)}
