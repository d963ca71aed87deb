"""What a run and an exported folder keep of ensembles: their members and weights, and which row is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import Field, JsonValue, ValidationError

from llmrec.durable import checked, write_checked
from llmrec.ensembles.members import answers_of, kind_of
from llmrec.ensembles.weights import CUT, Kind, Weights
from llmrec.errors import ModelError
from llmrec.metrics.ranking import ndcg, standing
from llmrec.recipe.schema import BaselineSection
from llmrec.records import Record
from llmrec.results import Arm, Choice, FusionWeights, Row
from llmrec.tasks.family import ranking_families
from llmrec.types import Case, Ranking

FILE = "fusions.json"
"""Where a run and an exported folder hold them."""

FORMAT = 2
"""Of the file; raised whenever the same weights give other lists than before."""


class FusedPart(Record):
    """A part: a baseline with its parameters, or a strategy that asks the model, which has no baseline."""

    name: str
    baseline: str | None = None
    parameters: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """How its scores are read."""
        return "logits" if self.baseline is None else kind_of(self.baseline)


class Fused(Record):
    """A fusion of rankings.

    Attributes:
        id: Of its row.
        family: Whose requests it answers.
        arm: Of its language model; ``baseline`` where it has none.
        template: Which the language model is asked by.
        parts: In the order of the weights.
        fitted: The weights.
        seed: Of the baselines.
        reserved: Share of validation users that weighed, and chose no epoch of a baseline.
    """

    id: str
    family: str
    arm: Arm
    template: str | None = None
    parts: tuple[FusedPart, ...]
    fitted: FusionWeights
    seed: int
    reserved: float

    def weights(self) -> Weights:
        """Return the weights as a fusion takes them."""
        parts = tuple(float(part.weight or 0.0) for part in self.fitted.parts)
        return Weights(self.fitted.form, parts, self.fitted.repeat or 0.0)  # type: ignore[arg-type]


def fused_of(row: Row, baselines: Sequence[BaselineSection], *, seed: int, reserved: float) -> Fused:
    """Return the ensemble behind a row.

    Args:
        row: Has the weights of an ensemble.
        baselines: Of its family.
        seed: Of the baselines.
        reserved: Share of validation users that weighed.
    """
    assert row.fusion is not None
    known = {baseline.label: baseline for baseline in baselines}
    parts = [
        FusedPart(name=part.name, baseline=known[part.name].name, parameters=known[part.name].parameters)
        if part.name in known
        else FusedPart(name=part.name)
        for part in row.fusion.parts
    ]
    return Fused(
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
class Stored:
    """What the file holds.

    Attributes:
        fusions: In the order of their rows.
        choice: The row that is served where nobody says; None: the language model, if there is one.
    """

    fusions: Sequence[Fused] = ()
    choice: Choice | None = None


def save(folder: Path, found: Stored) -> None:
    """Write the file into a folder; that of an earlier run does not stay."""
    fusions = [fused.model_dump(mode="json") for fused in found.fusions]
    chosen = None if found.choice is None else found.choice.model_dump(mode="json")
    write_checked(folder / FILE, {"format": FORMAT, "fusions": fusions, "choice": chosen})


def settled(found: Stored) -> Stored:
    """Return what a folder holds from which the interactions of the users that weighed are gone."""
    return replace(found, fusions=[fused.model_copy(update={"reserved": 0.0}) for fused in found.fusions])


def read(folder: Path) -> Stored:
    """Return the fusions of a run or an exported folder, and the choice; none where it has no such file.

    Raises:
        ModelError: If the file cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return Stored()
    try:
        result = checked(path.read_bytes())
        if result["format"] == FORMAT:
            chosen = result.get("choice")
            return Stored(
                [Fused.model_validate(item) for item in result["fusions"]],
                None if chosen is None else Choice.model_validate(chosen),
            )
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}); run `llmrec eval` on its recipe again",
            kind="damaged",
            at=path,
        ) from error
    raise ModelError(
        f"{path} was written by another version, which joined lists otherwise; run `llmrec eval` on its recipe again",
        kind="unsupported",
        at=path,
    )


def named(fusions: Sequence[Fused], families: Sequence[str], arm: str) -> dict[str, Fused]:
    """Return the fusions that can answer, by name: each has that of its row in the report.

    Where several families have a row of one name, it is that of the first of them, and the others go by their ids.

    Args:
        fusions: Of a run or an exported folder.
        families: That rank, the first one first.
        arm: Of the language model that is at hand; fusions with another are left out.
    """
    result: dict[str, Fused] = {}
    for family in families:
        for fusion in fusions:
            if fusion.family == family and fusion.arm in ("baseline", arm):
                name = fusion.id.split("/")[2]
                names = (name, f"{name} ({arm})") if fusion.arm != "baseline" else (name,)
                free = [one for one in names if one not in result]
                result[free[0] if free and family == families[0] else fusion.id] = fusion
    return result


def name_of(choice: Choice, fusions: Mapping[str, Fused], model: str) -> str:
    """Return the name under which the row of a choice answers.

    Args:
        choice: Of a run.
        fusions: From `named`.
        model: What the language model is called.
    """
    _, arm, rest = choice.row.split("/", 2)
    joined = next((name for name, fused in fusions.items() if fused.id == choice.row), None)
    return joined or (rest if arm == "baseline" else model)


# --------------------------------------------------------------------------- choice


class Answered(Protocol):
    """A finished row with what it answered validation users; see `llmrec.pipeline.evaluation.ResultRow`."""

    @property
    def figures(self) -> Row:
        """What the report says of it."""
        ...

    @property
    def weighing(self) -> Mapping[str, Any]:
        """What it said to the users that weigh fusions, by request id."""
        ...

    @property
    def validation(self) -> Mapping[str, float]:
        """Of a fusion its cross-fitted figure for their cases, by request id."""
        ...


# What can be served: classic recommenders, and the model that the run tuned.
_ARMS = ("baseline", "tuned")
# Figures that differ by less are those of one list, computed in two ways.
_SAME = 9


def chosen(rows: Sequence[Answered], cases: Mapping[str, Sequence[Case]]) -> Choice | None:
    """Return the row to serve, of the first family that ranks and has rows that validation users judged.

    Every row is judged by the validation users that weigh ensembles, who chose no parameter and no epoch of it: an
    ensemble by its cross-fitted figure, each user under weights that the user had no part in. Test users are not used.

    Of equal rows it is the first, and a single recommender goes before a fusion. A fusion that is one of its parts
    alone is that part, and no choice.

    Args:
        rows: Of a run.
        cases: The cases of validation users that weigh fusions, by family.

    Returns:
        The choice; None where nobody weighs.
    """
    for family in ranking_families():
        able = [row for row in rows if row.figures.task == family and row.figures.arm in _ARMS and not _is_part(row)]
        judged = {row.figures.id: result for row in able if (result := validated(row, cases.get(family, ())))}
        common = set.intersection(*(set(result) for result in judged.values())) if judged else set()
        if not common:
            continue
        # Users who say nothing about one row say nothing about any: all are judged by the same ones.
        figures = {name: float(np.mean([result[item] for item in sorted(common)])) for name, result in judged.items()}
        single = {row.figures.id for row in able if row.figures.fusion is None}
        order = sorted(figures, key=lambda name: name not in single)
        best = max(order, key=lambda name: round(figures[name], _SAME))
        users = {case.request.user_id for case in cases[family] if case.request.id in common}
        return Choice(row=best, metric=f"NDCG@{CUT}", value=figures[best], users=len(users), figures=figures)
    return None


def validated(row: Answered, cases: Sequence[Case]) -> Mapping[str, float]:
    """Return NDCG@10 of a row for each validation case that it answered, by request id."""
    if row.figures.fusion is not None:
        return row.validation
    answers = answers_of(row.weighing, ())
    known = [case for case in cases if case.request.id in answers]
    if not known:
        return {}
    results = []
    for case in known:
        answer = answers[case.request.id]
        items = answer.items if isinstance(answer, Ranking) else ()
        ranking = answer if isinstance(answer, Ranking) else Ranking(request_id=case.request.id, items=(), scores=())
        results.append(standing(ranking, str(case.truth), max(len(items), len(case.request.candidates or ()))))
    greater, tied = (
        np.array([getattr(item, name) for item in results], dtype=np.int64) for name in ("greater", "tied")
    )
    values = ndcg(greater, tied, CUT)
    return {case.request.id: float(value) for case, value in zip(known, values, strict=True)}


def _is_part(row: Answered) -> bool:
    return row.figures.fusion is not None and row.figures.fusion.form == "alone"
