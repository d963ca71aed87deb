"""What a run and an exported folder keep of fusions: which rows they join, with which weights, and what is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, JsonValue, ValidationError

from llmrec.durable import checked, write_checked
from llmrec.errors import ModelError
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.fusion.parts import kind_of
from llmrec.pipeline.study import Study
from llmrec.records import Record
from llmrec.results import Arm, Choice, FusionWeights
from llmrec.strategies.fusion_weights import Kind, Weights
from llmrec.tasks.family import family_of

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


def fused_of(study: Study, row: ResultRow) -> Fused | None:
    """Return the fusion behind a row that ranks; None of any other row."""
    figures = row.figures
    if figures.fusion is None:
        return None
    known = {each.label: each for each in study.baselines(figures.task)}
    parts = [
        FusedPart(name=part.name, baseline=known[part.name].name, parameters=known[part.name].parameters)
        if part.name in known
        else FusedPart(name=part.name)
        for part in figures.fusion.parts
    ]
    return Fused(
        id=figures.id,
        family=figures.task,
        arm=figures.arm,
        template=figures.template,
        parts=tuple(parts),
        fitted=figures.fusion,
        seed=study.recipe.seed,
        reserved=study.recipe.eval.fusion.reserved,
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


def write(study: Study, rows: Sequence[ResultRow], folder: Path, choice: Choice | None) -> None:
    """Write the fusions of rankings among a run's rows, and the choice; a file of an earlier run does not stay."""
    ranks = [row for row in rows if family_of(row.figures.task).ranks_for_users]
    save(folder, Stored([fused for row in ranks if (fused := fused_of(study, row)) is not None], choice))


def save(folder: Path, found: Stored) -> None:
    """Write the file into a folder."""
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
        found = checked(path.read_bytes())
        if found["format"] == FORMAT:
            chosen = found.get("choice")
            return Stored(
                [Fused.model_validate(each) for each in found["fusions"]],
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
    found: dict[str, Fused] = {}
    for family in families:
        for each in fusions:
            if each.family == family and each.arm in ("baseline", arm):
                name = each.id.split("/")[2]
                names = (name, f"{name} ({arm})") if each.arm != "baseline" else (name,)
                free = [one for one in names if one not in found]
                found[free[0] if free and family == families[0] else each.id] = each
    return found


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
