"""Builds ensembles from the stored answers of finished runs, and writes them to a new run folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from llmrec.ensembles.members import (
    ENSEMBLE_NAMES,
    PrecomputedMember,
    combined_reads,
    describe_ensemble_fit,
    ensemble_weights_record,
)
from llmrec.errors import DataError
from llmrec.evaluate.predictor import evaluate
from llmrec.pipeline.evaluation import ResultRow, ensemble_member
from llmrec.pipeline.results import WrittenResults, write_results
from llmrec.pipeline.resume import RUN_FILES, StageTimer, lock_folder
from llmrec.pipeline.row_specs import protocol_of
from llmrec.pipeline.runs import read_finished_results, read_stored_row
from llmrec.pipeline.study import Study, build_study
from llmrec.pipeline.weighing import EnsembleUsers, fit_task_ensemble
from llmrec.recipe.load import load_stored_recipe
from llmrec.report.results import read_results_json
from llmrec.results import Reads, Row
from llmrec.tasks.family import family_of
from llmrec.terminal import set_command_folder
from llmrec.types import Case


def fuse_runs(runs: Sequence[Path], out: Path) -> WrittenResults:
    """Build ensembles of the models of several runs on the same test cases, and write the results like a run.

    Every family gets an ensemble of its rows that read interactions only, one of those that also read texts, and one of
    all rows. Weights are fitted on the validation users that all members answered, so that the three are comparable.

    Args:
        runs: Folders of finished runs; the recipe of the first one defines the held-out data and the evaluated users.
        out: The output folder, separate from those of the runs.

    Raises:
        DataError: If a run is not finished or has other data or cases, or no rows can be joined.
    """
    study = build_study(load_stored_recipe(runs[0]))
    budget, weighing = StageTimer(), EnsembleUsers(study)
    with lock_folder(out, RUN_FILES), budget.stage("fusing"):
        set_command_folder(out)
        results = [_read_run_rows(run, study) for run in runs]
        rows = _rows_with_unique_ids(list(zip([run.resolve().name for run in runs], results, strict=True)))
        joined: list[ResultRow] = []
        for family in study.tasks:
            family_rows = [row for row in rows if row.figures.task == family]
            joined += _evaluate_ensembles(study, weighing, family, family_rows)
        if not joined:
            raise DataError(
                f"{', '.join(map(str, runs))}: no two models answered the same validation users, on which ensemble "
                "weights are fitted; run the recipes again with eval.fusion.controls=true, and with "
                "eval.fusion.model_users=200 for language models",
                kind="empty",
                at=runs[0],
                column="eval.fusion",
            )
        model = read_results_json(runs[0])["model"]
        return write_results(study, [*rows, *joined], None, model, budget, out)


def _uniquely_named_members(rows: Sequence[ResultRow]) -> list[PrecomputedMember]:
    """Return models as ensemble members with unique names, since several templates can share a predictor."""
    many = Counter(row.figures.predictor for row in rows)
    parts = [(row, ensemble_member(row)) for row in rows]
    return [
        replace(part, name=row.figures.id.partition("/")[2]) if many[part.name] > 1 else part for row, part in parts
    ]


def _read_run_rows(run: Path, study: Study) -> list[ResultRow]:
    """Return the evaluated models of a run, except ensembles; its data and cases must be those of the study."""
    results = read_finished_results(run)
    data = results.data["main"]
    if data is None or data.split_fingerprint != study.data.fingerprint:
        raise DataError(
            f"{run} was evaluated on other data or another split than the first run, so the models cannot form an "
            "ensemble",
            kind="mismatch",
            at=run,
            column="data",
        )
    rows = []
    for figures in results.rows:
        if figures.fusion is not None or figures.task not in study.tasks:
            continue
        row = read_stored_row(run, figures)
        request_ids = [case.request.id for case in study.cases(figures.task)]
        same_sets = figures.candidates == study.sets_digest(figures.task)
        if [record.request_id for record in row.records] != request_ids or not same_sets:
            raise DataError(
                f"{run}: {figures.id} was evaluated on other users or candidates than the first run; run both with "
                "the same eval.users, eval.candidates and seed",
                kind="mismatch",
                at=run,
                column="eval",
            )
        rows.append(row)
    return rows


def _rows_with_unique_ids(runs: Sequence[tuple[str, Sequence[ResultRow]]]) -> list[ResultRow]:
    """Return results with unique ids; a result that two runs share is included once."""
    rows: dict[str, ResultRow] = {}
    for name, run_rows in runs:
        for row in run_rows:
            known = rows.get(row.figures.id)
            if known is None:
                rows[row.figures.id] = row
            elif known.figures.metrics != row.figures.metrics:
                predictor = f"{row.figures.predictor} of {name}"
                family, arm, _, *template = row.figures.id.split("/")
                figures = row.figures.model_copy(
                    update={"id": "/".join([family, arm, predictor, *template]), "predictor": predictor}
                )
                rows[figures.id] = replace(row, figures=figures)
    return list(rows.values())


def _evaluate_ensembles(
    study: Study, weighing: EnsembleUsers, family: str, rows: Sequence[ResultRow]
) -> Iterator[ResultRow]:
    able = [row for row in rows if row.weighing]
    for kind in get_args(Reads):
        parts = [row for row in able if combined_reads([row.figures.reads, kind]) == kind]
        cases = [case for case in weighing.cases(family) if all(case.request.id in row.weighing for row in parts)]
        if cases and len(parts) >= 2 and combined_reads([row.figures.reads for row in parts]) == kind:
            yield _evaluate_ensemble(study, weighing, family, kind, parts, cases)


def _evaluate_ensemble(
    study: Study, weighing: EnsembleUsers, family: str, kind: Reads, parts: Sequence[ResultRow], cases: Sequence[Case]
) -> ResultRow:
    answer, members = family_of(family).answer, _uniquely_named_members(parts)
    baselines = [row for row in parts if row.figures.arm == "baseline"]
    every = [case for case in weighing.cases(family) if all(case.request.id in row.weighing for row in baselines)]
    model = fit_task_ensemble(study, family, ENSEMBLE_NAMES[kind], members, cases, every)
    result = evaluate(model, study.cases(family), name=family, kind=answer, protocol=protocol_of(study, family))
    arms = [row.figures.arm for row in parts if row.figures.arm != "baseline"]
    arm = "baseline" if not arms else "tuned" if "tuned" in arms else arms[0]
    figures = Row(
        id=f"{family}/{arm}/{ENSEMBLE_NAMES[kind]}",
        task=family,
        arm=arm,
        predictor=ENSEMBLE_NAMES[kind],
        engine="numpy",
        inputs=describe_ensemble_fit(parts, cases),
        candidates=parts[0].figures.candidates,
        reads=kind,
        fusion=ensemble_weights_record(model),
        **result.figures.as_json(),
    )
    return ResultRow(figures, result.values, result.records)
