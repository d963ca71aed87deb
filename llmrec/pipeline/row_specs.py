"""What rows a study has, and what of its recipe bears on each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmrec.baselines.parameters import Hashes, hashes_of
from llmrec.baselines.retrieve import LISTS
from llmrec.durable import Json
from llmrec.evaluate.figures import EvalProtocol
from llmrec.models.embedder import text_embedder
from llmrec.pipeline.fusion.parts import FUSIONS, fusible, joins_model
from llmrec.pipeline.study import Study
from llmrec.prompts.template import Template
from llmrec.recipe.schema import CandidateSection, EvalSection, Recipe
from llmrec.registry import BASELINES, STRATEGIES, TASKS, is_positional, options_of, stamps, written
from llmrec.results import Arm
from llmrec.tasks.family import family_of
from llmrec.tasks.fewshot import BY_TEXT
from llmrec.tasks.held_items import KIND as HELD_ITEMS
from llmrec.tasks.pool import NEGATIVES


@dataclass(frozen=True)
class RowSpec:
    """One row to be: which setting, how it asks, and of which model."""

    family: str
    arm: Arm
    predictor: str
    template: Template | None = None
    shots: int = 0

    @property
    def id(self) -> str:
        """A name that is unique in a run."""
        parts = [self.family, self.arm, self.predictor]
        return "/".join([*parts, self.template.name] if self.template else parts)

    @property
    def joins(self) -> bool:
        """Whether it joins other rows and asks nobody."""
        return self.predictor in FUSIONS.values()

    @property
    def asked(self) -> Mapping[str, Any]:
        """What its record says of how it asks."""
        return {
            "id": self.id,
            "task": self.family,
            "arm": self.arm,
            "predictor": self.predictor,
            "template": self.template.id if self.template else None,
            "template_use": self.template.use if self.template else None,
            "shots": self.shots,
        }


def asks(recipe: Recipe, family: str, arm: Arm) -> bool:
    """Whether a family is asked in a setting; one without a weight has no tuned rows."""
    section = recipe.tasks.present()[family]
    if arm == "tuned" and section.weight == 0:
        return False
    return arm in recipe.eval.arms and (section.arms is None or arm in section.arms)


def specs_of(study: Study, arm: Arm) -> Iterator[RowSpec]:
    """Yield the rows that a study's setting will have."""
    for family, task in study.tasks.items():
        section = study.section(family)
        if arm == "baseline":
            yield from (RowSpec(task.family, arm, baseline.label) for baseline in study.baselines(family))
            yield from (RowSpec(task.family, arm, FUSIONS[kind]) for kind in fusible(study, family))
            continue
        if not asks(study.recipe, family, arm):
            continue
        for template in study.asked_with(family, arm):
            for strategy in task.asked_by(template, section.strategies, tuned=arm == "tuned"):
                shots = study.recipe.eval.shots.k if arm == "few-shot" else 0
                yield RowSpec(task.family, arm, strategy, template, shots)
                if joins_model(study, family, arm, strategy):
                    yield RowSpec(task.family, arm, FUSIONS["language model"], template, shots)


def profile_of(study: Study, family: str) -> str:
    """Return the hash of the words of a two-step ranking's first step."""
    return study.tasks[family].profile_template.sha


def read_by(spec: RowSpec, study: Study) -> dict[str, Hashes]:
    """Return hashes over what a baseline reads besides the data; nothing for most, whose keys are those of before."""
    named = [each for each in study.baselines(spec.family) if ("baseline", each.label) == (spec.arm, spec.predictor)]
    found = [hashes_of(each.name, each.parameters) for each in named]
    return {"read": found[0]} if any(found) else {}


def code_of(spec: RowSpec, study: Study) -> dict[str, dict[str, str]]:
    """Return hashes of the code of the plug-ins that make a row; nothing where llmrec's own version says it all."""
    named = [(TASKS, written(spec.family)), (STRATEGIES, spec.predictor)]
    if spec.template is None:
        own = [each.name for each in study.baselines(spec.family) if each.label == spec.predictor]
        named[1:] = [(BASELINES, name) for name in own]
    return stamps(named)


def nearness(spec: RowSpec, study: Study) -> dict[str, str]:
    """Return what says which items read alike, where that decides what a prompt shows."""
    near = spec.shots and study.recipe.eval.shots.choice in BY_TEXT
    relevant = spec.template is not None and study.section(spec.family).past == "relevant"
    return {"encoder": text_embedder(study.recipe.encoder).stamp} if near or relevant else {}


def drawing(spec: RowSpec, section: EvalSection) -> dict[str, int]:
    """Return what says how negatives are drawn, where solved examples or questions about positions show any."""
    measured = section.debias == "measured" and is_positional(spec.predictor)
    if not family_of(spec.family).lists or spec.template is None or not (spec.shots or measured):
        return {}
    return {"negatives": NEGATIVES} | listing(section) if measured else {"negatives": NEGATIVES}


def listing(section: EvalSection) -> dict[str, int]:
    """Return what says how lists about training events are made, where they are retrieved."""
    return {"lists": LISTS} if section.candidates.kind == "retrieved" else {}


def asking_of(strategy: str, section: EvalSection) -> dict[str, Json]:
    """Return every key of the eval section that can change a strategy's answers, with its value."""
    measured = is_positional(strategy) and section.debias != "none"
    more = {"debias": section.debias, "debias_questions": section.debias_questions} if measured else {}
    return options_of(strategy, section) | more


def protocol_of(study: Study, family: str) -> EvalProtocol:
    """Return the protocol of a family's table."""
    recipe, data, task = study.recipe, study.task_data(family), study.tasks[family]
    return EvalProtocol(
        split=f"{data.kind}/{recipe.eval.split}",
        candidates=_candidates(recipe.eval.candidates, family),
        cutoffs=recipe.eval.cutoffs,
        resamples=recipe.eval.bootstrap,
        seed=recipe.seed,
        catalogue=len(data.dataset.items),
        users=task.users_kind,
        liked=task.liked_from,
    )


def _candidates(sets: CandidateSection, family: str) -> str:
    if family_of(family).candidates == "items":
        return f"{HELD_ITEMS}-{sets.count}"
    kind = f"retrieved-{sets.retriever}" if sets.kind == "retrieved" else sets.kind
    return "full" if kind == "catalogue" else f"{kind}-{sets.count}"


def left_out(spec: RowSpec, study: Study) -> str:
    """Say that a family was no part of training, where it was not."""
    return "; trained on other families alone" if spec.arm == "tuned" and spec.family not in study.shares else ""


def inputs_of(spec: RowSpec, study: Study) -> str:
    """Say what a row was given."""
    task = study.tasks[spec.family]
    fitted = "; scaled by answers to the validation split" if task.calibrates else ""
    if spec.template is not None:
        return task.shows(spec.template, spec.shots) + fitted
    if family_of(spec.family).candidates == "items":
        return "the candidates"
    return f"training interactions and the request's history{fitted}"
