"""Answers a file of questions about single items: ratings, yes/no answers, explanations, headlines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa

from llmrec.answer.checks import with_resolved_engine
from llmrec.answer.known import parse_request_with_history
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.predict.options import PredictOptions
from llmrec.answer.prompting import CONTEXT_KEYS, answer_value
from llmrec.answer.rank.outputs import check_output_file, open_output_table, write_summary
from llmrec.answer.rank.run import RankProgress
from llmrec.answer.strategy import item_families, select_item_strategy
from llmrec.data.ranked import PREDICTION_SCHEMA, PredictionRecord, write_records
from llmrec.data.request_file import RequestRow, file_ending, open_requests
from llmrec.data.requests import RankRequest, request_identity
from llmrec.errors import DataError, RecipeError
from llmrec.types import Answer, Text, Unparsed

_TABLE_NAME = "predictions"


def predict_file(options: PredictOptions) -> Mapping[str, str | int]:
    """Answer a file of questions and return a summary to print.

    Answers are cached next to the output until it is complete, so that a killed call can resume.

    Raises:
        LlmrecError: If a file, a model or an option cannot be used.
    """
    if options.to is not None:
        with open_output_table(
            options.to, _TABLE_NAME, PREDICTION_SCHEMA, replace=options.restart, out=options.out
        ) as (database, out):
            summary, records = _predict_to_file(options, out)
            rows = {name: [getattr(record, name) for record in records] for name in PREDICTION_SCHEMA.names}
            table = pa.table(rows, schema=PREDICTION_SCHEMA)
            database.write(_TABLE_NAME, table, index=("request_id",), replace=options.restart)
        _remove_answers(out)
        return {**summary, "file": database.shown}
    if options.out is None:
        raise RecipeError(
            "--out is missing: give the output file, or a database with --to", kind="missing-key", column="--out"
        )
    summary, _ = _predict_to_file(options, options.out)
    _remove_answers(options.out)
    return summary


def _answers_file(out: Path) -> Path:
    """Return the file of the answers that a killed call reads again."""
    return out.with_name(out.name + ".answers.sqlite")


def _remove_answers(out: Path) -> None:
    """Remove the answers of a call that is complete."""
    for ending in ("", "-wal", "-shm", "-journal"):
        _answers_file(out).with_name(_answers_file(out).name + ending).unlink(missing_ok=True)


def _predict_to_file(options: PredictOptions, out: Path) -> tuple[Mapping[str, str | int], list[PredictionRecord]]:
    """Answer a file of questions into a file, and return what to print and the records."""
    file_ending(out)
    reads = (options.requests, options.items)
    check_output_file(out, reads, option="--out", by="predict", restart=options.restart)
    source = open_requests(options.requests)
    model_options = options.recommender(batch=options.batch)
    failed = 0
    total = source.rows if options.limit is None else min(source.rows, options.limit)
    with (
        LanguageModel.open(with_resolved_engine(model_options), store=_answers_file(out), ranks=False) as recommender,
        RankProgress(total) as bar,
    ):
        family = _select_family(recommender, options.family)
        way = select_item_strategy(recommender.bundle, family, template=options.template, strategy=options.strategy)
        records: list[PredictionRecord] = []
        rows = islice(source, total)
        while raws := list(islice(rows, options.batch)):
            read = [_parse_question(raw, len(records) + n, recommender) for n, raw in enumerate(raws, start=1)]
            valid = [request for request in read if isinstance(request, RankRequest)]
            answers = iter(recommender.about(valid, way))
            for raw, request in zip(raws, read, strict=True):
                result: Answer = next(answers) if isinstance(request, RankRequest) else request
                records.append(_prediction_record(raw, len(records) + 1, request, result))
                failed += records[-1].error is not None
            bar.answered(len(raws))
        write_records(out, records, PredictionRecord)
        digest = recommender.weights[:12]
    summary: dict[str, str | int] = {
        "family": family,
        "template": way.template,
        "strategy": way.strategy,
        "weights": digest or "a server's own",
        "answered": len(records) - failed,
        "failed": failed,
        "file": str(out),
    }
    write_summary(out, dict(summary))
    return summary, records


def _select_family(recommender: LanguageModel, requested: str) -> str:
    """Return the requested task, or the only task that the model supports."""
    known = list(item_families(recommender.bundle))
    if requested != "auto":
        return requested
    if len(known) != 1:
        has = f"has {', '.join(known)}; choose one with --family" if known else "has no task about one item"
        raise DataError(
            f"--family: {recommender.options.model} {has}",
            kind="ambiguous" if known else "unsupported",
            column="--family",
        )
    return known[0]


def _parse_question(raw: RequestRow, number: int, recommender: LanguageModel) -> RankRequest | Unparsed:
    """Parse a question; the history of a known user is added from the data of the run."""
    request_id = request_identity(raw.record, number)[0] or ""
    if raw.error or raw.record is None:
        return Unparsed(request_id=request_id, reason=raw.error)
    if raw.record.get("item") is None:
        return Unparsed(request_id=request_id, reason="'item' is missing; give the item to predict for")
    context = {key: str(raw.record[key]) for key in CONTEXT_KEYS if raw.record.get(key) is not None}
    record = {key: value for key, value in raw.record.items() if key not in ("item", *CONTEXT_KEYS)}
    try:
        request = parse_request_with_history(
            {**record, "candidates": [raw.record["item"]]},
            number,
            lambda user: recommender.known().histories.of_user(user),
            recommender.items,
            recommender.profiles,
        )
    except DataError as error:
        return Unparsed(request_id=request_id, reason=str(error))
    return replace(request, context={**request.context, **context})


def _prediction_record(
    raw: RequestRow, number: int, request: RankRequest | Unparsed, answer: Answer
) -> PredictionRecord:
    request_id, user_id = request_identity(raw.record, number)
    value = answer_value(answer)
    return PredictionRecord(
        request_id=request_id,
        user_id=user_id,
        line=raw.line,
        item_id=request.candidates[0].item_id if isinstance(request, RankRequest) else None,
        value=value if isinstance(value, float) else None,
        text=answer.text if isinstance(answer, Text) else None,
        error=answer.reason if isinstance(answer, Unparsed) else None,
        notes=request.notes if isinstance(request, RankRequest) else (),
        prompt_tokens=answer.cost.prompt_tokens,
        completion_tokens=answer.cost.completion_tokens,
    )
