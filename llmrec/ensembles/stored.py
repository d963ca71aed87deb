"""Stores ensembles in runs and exported folders: members, weights, and the model to serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import Field, JsonValue, ValidationError

from llmrec.durable import parse_checked_json, write_checked_json
from llmrec.ensembles.cells import NDCG_CUTOFF, ScoreScale
from llmrec.ensembles.members import baseline_score_scale, restore_answers, restore_weights
from llmrec.ensembles.weights import Weights
from llmrec.errors import ModelError
from llmrec.metrics.ranking import ndcg, target_rank
from llmrec.recipe.schema import BaselineSection
from llmrec.records import Record
from llmrec.results import Arm, Choice, FusionWeights, Row
from llmrec.tasks.family import ranking_families
from llmrec.types import Case, Ranking

ENSEMBLES_FILE = "fusions.json"
"""File name of the ensembles in a run folder and an exported folder."""

FORMAT_VERSION = 3
"""Format version; increased whenever the same weights give different lists."""


class StoredMember(Record):
    """A stored member: a baseline with its parameters, or a scoring method of the language model."""

    name: str
    baseline: str | None = None
    parameters: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def kind(self) -> ScoreScale:
        """The scale of the scores, counts or logits."""
        return "logits" if self.baseline is None else baseline_score_scale(self.baseline)


class StoredEnsemble(Record):
    """A stored ensemble of ranking models.

    Attributes:
        id: Id of its row in the report.
        family: The task whose requests it answers.
        arm: The variant of its language model; ``baseline`` without one.
        template: The template for the language model.
        parts: The members, in the order of the weights.
        fitted: The weights.
        seed: The seed of the baselines.
        reserved: Share of validation users for ensemble weights, who are not used for early stopping.
    """

    id: str
    family: str
    arm: Arm
    template: str | None = None
    parts: tuple[StoredMember, ...]
    fitted: FusionWeights
    seed: int
    reserved: float

    def weights(self) -> Weights:
        """Return the weights for an ensemble."""
        return restore_weights(self.fitted)


def stored_ensemble_of(row: Row, baselines: Sequence[BaselineSection], *, seed: int, reserved: float) -> StoredEnsemble:
    """Return the stored form of an evaluated ensemble.

    Args:
        row: A row with the weights of an ensemble.
        baselines: The baselines of its family.
        seed: The seed of the baselines.
        reserved: Share of validation users for ensemble weights.
    """
    assert row.fusion is not None
    known = {baseline.label: baseline for baseline in baselines}
    parts = [
        StoredMember(name=part.name, baseline=known[part.name].name, parameters=known[part.name].parameters)
        if part.name in known
        else StoredMember(name=part.name)
        for part in row.fusion.parts
    ]
    return StoredEnsemble(
        id=row.id,
        family=row.task,
        arm=row.arm,
        template=row.template,
        parts=tuple(parts),
        fitted=row.fusion,
        seed=seed,
        reserved=reserved,
    )


@dataclass(frozen=True)
class StoredEnsembles:
    """The content of the file with stored ensembles.

    Attributes:
        fusions: The ensembles, in the order of their rows.
        choice: The model that is served by default; None: the language model, if there is one.
    """

    fusions: Sequence[StoredEnsemble] = ()
    choice: Choice | None = None


def write_ensembles(folder: Path, content: StoredEnsembles) -> None:
    """Write the stored ensembles to a folder."""
    fusions = [fused.model_dump(mode="json") for fused in content.fusions]
    chosen = None if content.choice is None else content.choice.model_dump(mode="json")
    write_checked_json(folder / ENSEMBLES_FILE, {"format": FORMAT_VERSION, "fusions": fusions, "choice": chosen})


def without_reserved_users(content: StoredEnsembles) -> StoredEnsembles:
    """Return the stored ensembles for a folder without the users reserved for ensemble weights."""
    return replace(content, fusions=[fused.model_copy(update={"reserved": 0.0}) for fused in content.fusions])


def read_ensembles(folder: Path) -> StoredEnsembles:
    """Read the ensembles of a run or exported folder, and the model to serve; empty if the file is missing.

    Raises:
        ModelError: If the file cannot be read.
    """
    path = folder / ENSEMBLES_FILE
    if not path.is_file():
        return StoredEnsembles()
    try:
        result = parse_checked_json(path.read_bytes())
        if result["format"] == FORMAT_VERSION:
            chosen = result.get("choice")
            fusions = [StoredEnsemble.model_validate(item) for item in result["fusions"]]
            for fused in fusions:
                fused.weights()
            return StoredEnsembles(fusions, None if chosen is None else Choice.model_validate(chosen))
    except (OSError, ValueError, KeyError, TypeError, ValidationError, ModelError) as error:
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}); run `llmrec eval` on its recipe again",
            kind="damaged",
            at=path,
        ) from error
    raise ModelError(
        f"{path} was written by an incompatible version; run `llmrec eval` on its recipe again",
        kind="unsupported",
        at=path,
    )


def ensembles_by_name(
    fusions: Sequence[StoredEnsemble], families: Sequence[str], arm: str
) -> dict[str, StoredEnsemble]:
    """Return the available ensembles by their names in the report.

    If several families have an ensemble of the same name, the first one gets the name, and the others use their ids.

    Args:
        fusions: The ensembles of a run or an exported folder.
        families: The families that rank, in order.
        arm: The variant of the available language model; ensembles with another one are left out.
    """
    result: dict[str, StoredEnsemble] = {}
    for family in families:
        for fusion in fusions:
            if fusion.family == family and fusion.arm in ("baseline", arm):
                name = fusion.id.split("/")[2]
                names = (name, f"{name} ({arm})") if fusion.arm != "baseline" else (name,)
                free = [candidate for candidate in names if candidate not in result]
                result[free[0] if free and family == families[0] else fusion.id] = fusion
    return result


def served_model_name(choice: Choice, fusions: Mapping[str, StoredEnsemble], model: str) -> str:
    """Return the name under which the chosen model is served.

    Args:
        choice: The choice of a run.
        fusions: The result of `ensembles_by_name`.
        model: The name of the language model.
    """
    _, arm, rest = choice.row.split("/", 2)
    joined = next((name for name, fused in fusions.items() if fused.id == choice.row), None)
    return joined or (rest if arm == "baseline" else model)


# --------------------------------------------------------------------------- choice


class EvaluatedModel(Protocol):
    """An evaluated model with its answers for validation users; see `llmrec.pipeline.evaluation.ResultRow`."""

    @property
    def figures(self) -> Row:
        """Results of the model in the report."""
        ...

    @property
    def weighing(self) -> Mapping[str, Any]:
        """Answers for the validation users that fit ensemble weights, by request id."""
        ...

    @property
    def validation(self) -> Mapping[str, float]:
        """Cross-fitted results of an ensemble on validation users, by request id."""
        ...


# Models that can be served: baselines, and the model that the run fine-tuned.
_SERVABLE_ARMS = ("baseline", "tuned")
# Smaller differences do not change ranked lists.
_COMPARED_DIGITS = 9


def choose_served_model(rows: Sequence[EvaluatedModel], cases: Mapping[str, Sequence[Case]]) -> Choice | None:
    """Return the model to serve, which is best on validation users.

    Models are compared on the validation users for ensemble weights, who were not used for model selection; ensembles
    by their cross-fitted result. Test users are not used.

    Of equal models the first is returned, and single models before ensembles. An ensemble that equals one of its
    members is never returned.

    Args:
        rows: The models of a run.
        cases: The cases of validation users for ensemble weights, by family.

    Returns:
        The choice; None if there are no such users.
    """
    for family in ranking_families():
        models = [
            row
            for row in rows
            if row.figures.task == family and row.figures.arm in _SERVABLE_ARMS and not _is_single_member(row)
        ]
        results = {row.figures.id: result for row in models if (result := validation_ndcgs(row, cases.get(family, ())))}
        common = set.intersection(*(set(result) for result in results.values())) if results else set()
        if not common:
            continue
        # Only users whom all models answered, so that all are compared on the same users.
        figures = {name: float(np.mean([result[item] for item in sorted(common)])) for name, result in results.items()}
        single = {row.figures.id for row in models if row.figures.fusion is None}
        order = sorted(figures, key=lambda name: name not in single)
        best = max(order, key=lambda name: round(figures[name], _COMPARED_DIGITS))
        users = {case.request.user_id for case in cases[family] if case.request.id in common}
        return Choice(row=best, metric=f"NDCG@{NDCG_CUTOFF}", value=figures[best], users=len(users), figures=figures)
    return None


def validation_ndcgs(row: EvaluatedModel, cases: Sequence[Case]) -> Mapping[str, float]:
    """Return NDCG@10 of a model for each validation case that it answered, by request id."""
    if row.figures.fusion is not None:
        return row.validation
    answers = restore_answers(row.weighing, ())
    known = [case for case in cases if case.request.id in answers]
    if not known:
        return {}
    results = []
    for case in known:
        answer = answers[case.request.id]
        items = answer.items if isinstance(answer, Ranking) else ()
        ranking = answer if isinstance(answer, Ranking) else Ranking(request_id=case.request.id, items=(), scores=())
        results.append(target_rank(ranking, str(case.truth), max(len(items), len(case.request.candidates or ()))))
    greater, tied = (
        np.array([getattr(item, name) for item in results], dtype=np.int64) for name in ("greater", "tied")
    )
    values = ndcg(greater, tied, NDCG_CUTOFF)
    return {case.request.id: float(value) for case, value in zip(known, values, strict=True)}


def _is_single_member(row: EvaluatedModel) -> bool:
    return row.figures.fusion is not None and row.figures.fusion.form == "alone"
