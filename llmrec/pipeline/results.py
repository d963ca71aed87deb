"""Writes results.json, predictions.parquet and items.parquet."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec import __version__
from llmrec.baselines.retrieve import candidate_recall
from llmrec.data.split import SplitDataset
from llmrec.data.stats import basket_warning, wide_cutoff_warning
from llmrec.durable import parse_checked_json, parse_json, replace_atomically, sha256_of, write_checked_json
from llmrec.evaluate.slices import case_item, slice_figures
from llmrec.machine import command_line, machine_facts, package_versions
from llmrec.metrics import ranking
from llmrec.metrics.significance import holm_p_values
from llmrec.metrics.stats import mean_ranks
from llmrec.pipeline.comparing import compare_rows
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.examples import cold_start_examples, example_user, text_feature_examples, text_samples
from llmrec.pipeline.resume import StageTimer
from llmrec.pipeline.row_specs import is_arm_evaluated, protocol_of
from llmrec.pipeline.study import Study, leak_warning, leaking_users
from llmrec.recipe.load import recipe_hash
from llmrec.records import Candidates, DataInfo, ExcludedUsers, Stage, Training
from llmrec.registry import mean_metric
from llmrec.results import Choice, PositionBias, PositionResult, Results, Row, SliceOfRow, Unevaluated
from llmrec.tasks.family import families, ranking_families
from llmrec.types import Case


@dataclass(frozen=True)
class WrittenResults:
    """The written ``results.json`` with its SHA-256, the predictions, and the evaluated models."""

    results: dict[str, Any]
    sha256: str
    predictions: pl.DataFrame
    rows: Sequence[ResultRow]


def write_results(
    study: Study,
    rows: Sequence[ResultRow],
    training: Mapping[str, Any] | None,
    model: Mapping[str, Any],
    budget: StageTimer,
    folder: Path,
    missing: Sequence[Unevaluated] = (),
    choice: Choice | None = None,
) -> WrittenResults:
    """Write ``results.json``, ``predictions.parquet`` and ``items.parquet`` to the run folder.

    ``missing`` are the rows that no engine could answer. ``budget`` has the cost of each stage in its last execution: a
    stage that this invocation reused keeps its cost.
    """
    recipe = study.recipe
    spent = {**_earlier_stage_seconds(folder / "results.json", recipe_hash(recipe)), **budget.stages}
    headlines = {
        name: family.headline_at(recipe.eval.cutoffs) for name, family in families().items() if name in study.tasks
    }
    compared, detectable = compare_rows(study, rows, choice)
    files = (folder / "predictions.parquet", folder / "items.parquet")
    predictions = write_predictions(study, rows, files[0])
    write_items(study, files[1])
    record = {key: value for key, value in training.items() if key not in ("key", "code")} if training else None
    results = Results(
        llmrec=__version__,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        command=command_line(),
        recipe=recipe.model_dump(mode="json"),
        recipe_hash=recipe_hash(recipe),
        seed=recipe.seed,
        versions=package_versions(),
        machine=machine_facts(),
        model=dict(model),
        data={"main": data_info(study.data), "reviews": data_info(study.reviews) if study.reviews else None},
        tables={family: study.table_name(family) for family in study.tasks},
        candidates=_candidate_records(study),
        training=Training.model_validate(record) if record else None,
        rows=tuple(rows_with_breakdowns(study, rows, headlines)),
        **({"unevaluated": tuple(missing)} if missing else {}),
        headline=headlines,
        comparisons=tuple(compared),
        **({"choice": choice} if choice else {}),
        detectable=detectable,
        budget=tuple(Stage(stage=stage, seconds=seconds) for stage, seconds in spent.items()),
        seconds=sum(spent.values()),
        examples=tuple(example for row in rows for example in row.examples),
        texts=tuple(text_samples(study, rows)),
        gallery=tuple(text_feature_examples(study, rows)),
        newcomers=tuple(cold_start_examples(study, rows)),
        **({"example": shown} if (shown := example_user(study, rows, headlines)) else {}),
        set_aside=tuple(
            ExcludedUsers(
                data=table.dataset.name, said=f"{leak_warning(table, result)}.", users=tuple(leaking_users(result))
            )
            for table in study.tables
            if (result := study.leaks(table))
        ),
        notes=(*unevaluated_notes(missing), *result_notes(study)),
        files={file.name: sha256_of(file) for file in files},
    ).as_json()
    return WrittenResults(results, write_checked_json(folder / "results.json", results), predictions, rows)


def cutoff_warning(study: Study) -> str:
    """Return a warning if cut-offs are not smaller than the number of candidates; otherwise empty."""
    section, drawn = study.recipe.eval, study.candidates
    if drawn is None or section.candidates.kind == "retrieved" or "cutoffs" not in section.model_fields_set:
        return ""
    return wide_cutoff_warning(section.cutoffs, drawn.count)


def overwrite_warning(file: Path, key: str, hashed: str) -> str:
    """Return a warning if the file has results of another recipe, which will be overwritten; empty otherwise.

    ``key`` is the key of the recipe's hash in the file, and ``hashed`` its current value.
    """
    try:
        earlier = parse_json(file.read_bytes()).get(key)
    except (OSError, ValueError, AttributeError):
        return ""
    if earlier in (None, hashed):
        return ""
    return f"{file} contains results of other settings and will be overwritten; rename this run to keep both"


def _earlier_stage_seconds(path: Path, hashed: str) -> dict[str, float]:
    """Return the seconds per stage of an earlier run of the same recipe, if there is one."""
    try:
        earlier = parse_checked_json(path.read_bytes())
        return {e["stage"]: float(e["seconds"]) for e in earlier["budget"]} if earlier["recipe_hash"] == hashed else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def data_info(data: SplitDataset) -> DataInfo:
    """Return the counts and hashes of a dataset."""
    rows = data.dataset.interactions
    users, items = rows["user_id"].n_unique(), len(data.dataset.items)
    return DataInfo(
        name=data.dataset.name,
        users=users,
        items=items,
        interactions=len(rows),
        density=len(rows) / (users * items),
        train=len(data.train),
        valid=len(data.valid),
        test=len(data.test),
        fingerprint=data.dataset.fingerprint,
        split_fingerprint=data.fingerprint,
        split=data.kind,
        noun=data.dataset.noun,
        made=data.dataset.made,
        derived=data.dataset.provenance.get("derived", ""),
    )


def unevaluated_notes(missing: Sequence[Unevaluated]) -> Iterator[str]:
    """Yield notes on models that were not evaluated, grouped by reason."""
    for reason, count in Counter(row.reason for row in missing).items():
        what = "1 model was" if count == 1 else f"{count} models were"
        yield f"{what} not evaluated: {reason}. Run the same command again to evaluate the missing models."


def result_notes(study: Study) -> list[str]:
    """Return notes for readers of the result tables."""
    results = []
    for data in study.tables:
        if data.dataset.made:
            results.append(
                f"{data.dataset.name}: synthetic data of the llmrec project; its texts are not real reviews."
            )
        if derived := data.dataset.provenance.get("derived"):
            results.append(f"{data.dataset.name}: derived: {derived}.")
    if (shape := study.recipe.model.shape) is not None:
        results.append(
            f"The language model is a new {shape.kind} of width {shape.width}, trained from scratch on the "
            "training examples of this run, without pretraining."
        )
    for family in study.tasks:
        results += [
            f"The prompt {template.id} contains information that could reveal the answer: {template.leak}."
            for template in study.eval_templates(family)
            if template.leak
        ]
    if study.candidates and study.recipe.eval.candidates.kind == "retrieved":
        name = study.recipe.eval.candidates.retriever
        results += [
            f"Ranking metrics of {family} are over the {study.candidates.count} items retrieved by {name}. These "
            f"contain {share:.1%} of the targets, which is the maximum of HR."
            for family, share in _candidate_recalls(study).items()
        ]
    elif study.candidates:
        results.append(
            f"Ranking metrics are over {study.candidates.count} sampled candidates per request, not over the whole "
            "catalogue, so they are not comparable with full-ranking metrics."
        )
        if wide := cutoff_warning(study):
            results.append(f"{wide}.")
    if study.recipe.eval.candidates.kind == "catalogue" and study.recipe.tasks.sequential is not None:
        results.append(
            "Ranking metrics are over the whole catalogue without the items of the history. A language model returns "
            "one item per beam, a baseline 100 items; a target that is not returned is a miss. This lowers MRR, but "
            "not metrics with a cut-off of at most the number of beams."
        )
    results += [f"{cut}." for table in study.tables if (cut := basket_warning(table))]
    if study.aligned is not None:
        results.append(
            f"Alignment metrics are over {study.aligned.count} candidates per prompt, all of them held-out items, "
            f"whose ID and text were never trained together; random HR@1 is {1 / study.aligned.count:.3f}. Each item "
            "counts as one user."
        )
    rating = study.recipe.tasks.rating
    if rating is not None and rating.head is not None:
        results.append(
            "The fine-tuned model is evaluated with its rating head only; the base model has no head and is evaluated "
            "with the other scoring methods."
        )
    judged = study.recipe.tasks.ctr
    if judged is not None and judged.balance == "user":
        results.append(
            "Yes/no cases are balanced within each user, so a model that uses only user information, such as the "
            "share of likes, has an AUC and GAUC of 0.5."
        )
    if "tuned" in study.recipe.eval.arms:
        results += _training_notes(study)
    if len(study.recipe.eval.arms) > 1 or "tuned" in study.recipe.eval.arms:
        results.append("One training seed: intervals do not include the variance between seeds.")
    return results


def _training_notes(study: Study) -> list[str]:
    """Return notes on the training data of the tuned model."""
    results = []
    weighted = [family for family in study.tasks if is_arm_evaluated(study.recipe, family, "tuned")]
    untaught = [family for family in weighted if family not in study.shares]
    if untaught:
        results.append(
            f"The fine-tuned model was not trained on {', '.join(untaught)}; its answers for these tasks come from "
            f"the base model and from training on {', '.join(study.shares)}."
        )
    if study.recipe.train.start is not None:
        results.append(
            f"Training continued from the fine-tuned model of another run, {Path(study.recipe.train.start).name}; "
            "zero-shot and few-shot use the base model without that training."
        )
    if study.recipe.train.teacher is not None:
        results.append(f"The fine-tuned model was distilled from the run {Path(study.recipe.train.teacher.run).name}.")
    return results


def _candidate_recalls(study: Study) -> dict[str, float]:
    """Return the share of requests whose retrieved candidates include the target, by task."""
    if study.candidates is None or study.recipe.eval.candidates.kind != "retrieved":
        return {}
    cases_by_family = {family: study.cases(family) for family in ranking_families() if family in study.tasks}
    return {
        family: candidate_recall(study.candidates, {case.request.id: str(case.truth) for case in cases})
        for family, cases in cases_by_family.items()
    }


def _candidate_records(study: Study) -> dict[str, Candidates | None]:
    drawn = {"main": study.candidates, "alignment": study.aligned}
    # Tasks may have different users: the highest share is an upper bound for all.
    most = max(_candidate_recalls(study).values(), default=None)
    return {
        name: Candidates(digest=sets.digest, count=sets.count, kind=sets.kind, ceiling=most if name == "main" else None)
        for name, sets in drawn.items()
        if sets is not None
    }


# --------------------------------------------------------------------------- predictions


ROW_COLUMNS: Mapping[str, Any] = {
    "row_id": pl.String,
    "task": pl.String,
    "arm": pl.String,
    "predictor": pl.String,
    "template": pl.String,
}
"""Columns that identify the row of results.json to which a line belongs."""
REQUEST_COLUMNS: Mapping[str, Any] = {
    "item_id": pl.String,
    "position": pl.Int32,
    "history": pl.Int32,
    "user_training": pl.Int32,
    "item_training": pl.Int32,
}
"""Columns of a request, equal in all rows."""
ANSWER_COLUMNS: Mapping[str, Any] = {
    "request_id": pl.String,
    "user_id": pl.String,
    "truth": pl.String,
    "parsed": pl.String,
    "raw": pl.String,
    "prompt_hash": pl.String,
    "rank": pl.Float64,
    "error": pl.String,
    "prompt_tokens": pl.Int64,
    "completion_tokens": pl.Int64,
    "above": pl.Int32,
    "tied": pl.Int32,
    "pool": pl.Int32,
    "value": pl.Float64,
    "copied": pl.Boolean,
    "feature": pl.String,
    "feature_named": pl.Boolean,
    "features": pl.List(pl.String),
    "unsupported": pl.Int32,
    "truth_copied": pl.Boolean,
    "truth_features": pl.Int32,
    "truth_unsupported": pl.Int32,
    "forwards": pl.Int64,
}
"""The fields of `llmrec.results.Prediction`."""
PREDICTION_SCHEMA: Mapping[str, Any] = {**ROW_COLUMNS, **ANSWER_COLUMNS, **REQUEST_COLUMNS}
ITEM_COLUMNS: Mapping[str, Any] = {"table": pl.String, "item_id": pl.String, "training": pl.Int64, "users": pl.Int64}
"""Columns of items.parquet."""


def write_predictions(study: Study, rows: Sequence[ResultRow], path: Path) -> pl.DataFrame:
    """Write the predictions, one line per model and request, and return them as a table.

    The cases of the study are those of the rows, in order.
    """
    requests = {family: list(_request_fields(study.task_data(family), study.cases(family))) for family in study.tasks}
    lines = [
        {**{key: getattr(row.figures, key) for key in ROW_COLUMNS if key != "row_id"}, "row_id": row.figures.id}
        | dict(record)
        | about
        for row in rows
        for record, about in zip(row.records, requests[row.figures.task], strict=True)
    ]
    frame = pl.DataFrame(lines, schema=dict(PREDICTION_SCHEMA))
    with replace_atomically(path) as draft:
        frame.write_parquet(draft)
    return frame


def _request_fields(data: SplitDataset, cases: Sequence[Case]) -> Iterator[dict[str, object]]:
    users, items = (dict(data.train.group_by(column).len().iter_rows()) for column in ("user_id", "item_id"))
    for case in cases:
        request, item, target = case.request, case_item(case, data), str(case.truth)
        listed = request.candidates is not None and target in request.candidates
        yield {
            "item_id": item,
            "position": request.candidates.index(target) + 1 if listed and request.candidates else None,
            "history": len(request.history),
            "user_training": users.get(request.user_id, 0),
            "item_training": items.get(item, 0) if item is not None else None,
        }


def write_items(study: Study, path: Path) -> None:
    """Write one line per item, sorted by id, with its training interactions and users."""
    frames = []
    for name, data in (("main", study.data), ("reviews", study.reviews)):
        if data is None:
            continue
        counted = data.train.group_by("item_id").agg(
            pl.len().alias("training"), pl.col("user_id").n_unique().alias("users")
        )
        counted = counted.with_columns(pl.col("item_id").cast(pl.String))
        items = pl.DataFrame({"item_id": sorted(data.dataset.items)}).join(counted, on="item_id", how="left")
        frames.append(items.with_columns(pl.lit(name).alias("table"), pl.col("training", "users").fill_null(0)))
    frame = pl.concat([item.select(pl.col(name).cast(kind) for name, kind in ITEM_COLUMNS.items()) for item in frames])
    with replace_atomically(path) as draft:
        frame.write_parquet(draft)


# --------------------------------------------------------------------------- details of a model


_RESAMPLES_PER_ROW = 100
# Permutations drawn at a time (4 MB).
_CHUNK = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPositions:
    """The position of each target among its candidates, and its predicted rank.

    Attributes:
        position: Position of the target in the stored order of its candidates, from 1, shape (n,).
        hit: HR@1, shape (n,).
        rank: Expected rank, shape (n,); a target missing from an answer counts as last.
    """

    position: NDArray[np.int64]
    hit: NDArray[np.float64]
    rank: NDArray[np.float64]


def rows_with_breakdowns(study: Study, rows: Sequence[ResultRow], headline: Mapping[str, str]) -> Iterator[Row]:
    """Yield each model's entry in ``results.json`` with its results by user group, item group and position.

    Rows with candidates have positions, and those of language models the test for bias.

    Args:
        study: Its cases are those of the rows, in order.
        rows: Finished rows.
        headline: The metric for the slices of a family.
    """
    placed = [target_positions(row, study.cases(row.figures.task)) for row in rows]
    biases = _position_biases(rows, placed, resamples=study.recipe.eval.bootstrap, seed=study.recipe.seed)
    for row, at, bias in zip(rows, placed, biases, strict=True):
        users = len({record.user_id for record in row.records})
        more: dict[str, object] = {"users": users, "slices": _row_slices(study, row, headline[row.figures.task])}
        if at is not None:
            more["by_position"] = results_by_position(at)
        if bias is not None:
            more["position_bias"] = bias
        yield row.figures.model_copy(update=more)


def _row_slices(study: Study, row: ResultRow, headline: str) -> tuple[SliceOfRow, ...]:
    family = row.figures.task
    # A metric that is not a mean over requests, such as AUC, has no value per group; log loss is used instead.
    metric = mean_metric(headline)
    if metric not in row.values:
        return ()
    return slice_figures(
        {metric: row.values[metric]},
        study.cases(family),
        study.task_data(family),
        metrics=row.figures.metrics,
        protocol=protocol_of(study, family),
        attributes=study.recipe.eval.slices,
    )


# --------------------------------------------------------------------------- positions


def target_positions(row: ResultRow, cases: Sequence[Case]) -> TargetPositions | None:
    """Return the position of each target among its candidates; None if requests have no candidates."""
    if not cases or any(case.request.candidates is None for case in cases):
        return None
    sets = [case.request.candidates or () for case in cases]
    # Retrieved candidates may not include the target.
    there = [n for n, (candidates, case) in enumerate(zip(sets, cases, strict=True)) if case.truth in candidates]
    if not there:
        return None
    records = [row.records[n] for n in there]
    above, tied = np.array([record.above for record in records]), np.array([record.tied for record in records])
    return TargetPositions(
        position=np.array([sets[n].index(str(cases[n].truth)) + 1 for n in there]),
        hit=ranking.hit_rate(above, tied, 1),
        rank=np.array([record.pool if record.rank is None else record.rank for record in records], dtype=np.float64),
    )


def results_by_position(placed: TargetPositions) -> tuple[PositionResult, ...]:
    """Return HR@1 and the mean predicted rank for each candidate position with requests."""
    results = []
    for position in np.unique(placed.position):
        here = placed.position == position
        rank = placed.rank[here]
        results.append(
            PositionResult(
                position=int(position),
                n=int(here.sum()),
                hit=float(placed.hit[here].mean()),
                rank=float(rank.mean()),
                rank_sd=float(rank.std(ddof=1)) if len(rank) > 1 else None,
            )
        )
    return tuple(results)


def _position_biases(
    rows: Sequence[ResultRow], placed: Sequence[TargetPositions | None], *, resamples: int, seed: int
) -> list[PositionBias | None]:
    """Test language models for position bias; p-values are Holm-adjusted over all of them."""
    tested = [row.figures.arm != "baseline" and at is not None for row, at in zip(rows, placed, strict=True)]
    # As for comparisons, with enough permutations for the smallest p-value to stay small after Holm's adjustment.
    resamples = max(resamples, _RESAMPLES_PER_ROW * sum(tested))
    results = [
        position_bias(at.position, at.rank, resamples=resamples, seed=seed) if at is not None and chosen else None
        for at, chosen in zip(placed, tested, strict=True)
    ]
    adjusted = iter(holm_p_values([float(item.p or 0.0) for item in results if item is not None]))
    return [None if item is None else item.model_copy(update={"p": next(adjusted)}) for item in results]


def position_bias(
    position: NDArray[np.int64], rank: NDArray[np.float64], *, resamples: int, seed: int
) -> PositionBias | None:
    """Test whether the rank of targets depends on their position (Kruskal and Wallis, JASA 1952).

    Positions are drawn at random when candidate sets are made, so without a bias every assignment of positions to
    requests is equally likely, for any users and items: p is the share of drawn assignments with at least the observed
    statistic, ``(1 + number of these) / (1 + resamples)``.

    Args:
        position: Position of the target among its candidates, shape (n,).
        rank: Rank of the target, shape (n,).
        resamples: Number of assignments that are drawn.
        seed: Seed of the draws.

    Returns:
        None if all positions or all ranks are equal, or no position has two requests.
    """
    order = np.argsort(position, kind="stable")
    _, starts, sizes = np.unique(position[order], return_index=True, return_counts=True)
    y = mean_ranks(rank)[order] - (len(rank) + 1) / 2
    x = mean_ranks(position)[order] - (len(position) + 1) / 2
    total = float(y @ y)
    if total == 0 or not 1 < len(sizes) < len(y):
        return None

    def explained(values: NDArray[np.float64]) -> NDArray[np.float64]:
        # Ratio of the sum of squares between positions and the total; values are grouped by position.
        return (np.add.reduceat(values, starts, axis=-1) ** 2 / sizes).sum(axis=-1) / total  # type: ignore[no-any-return]

    observed = float(explained(y))
    rng = np.random.default_rng(seed)
    beyond, drawn = 0, 0
    while drawn < resamples:
        rows = min(max(1, _CHUNK // len(y)), resamples - drawn)
        beyond += int(np.count_nonzero(explained(rng.permuted(np.tile(y, (rows, 1)), axis=1)) >= observed - 1e-9))
        drawn += rows
    return PositionBias(
        share=observed,
        chance=(len(sizes) - 1) / (len(y) - 1),
        rho=float(x @ y / np.sqrt((x @ x) * total)),
        p=(1 + beyond) / (1 + resamples),
    )
