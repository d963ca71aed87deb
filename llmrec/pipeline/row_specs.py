"""Lists the models that a recipe evaluates, with the settings that affect each result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmrec.baselines.parameters import InputHashes, input_hashes
from llmrec.durable import Json
from llmrec.ensembles.members import ENSEMBLE_NAMES
from llmrec.evaluate.figures import EvalProtocol
from llmrec.models.text_encoder import text_embedder
from llmrec.pipeline.study import Study
from llmrec.pipeline.weighing import ensemble_includes_model, ensemble_kinds
from llmrec.prompts.template import Template
from llmrec.recipe.schema import CandidateSection, EvalSection, Recipe
from llmrec.registry import (
    BASELINES,
    STRATEGIES,
    TASKS,
    Table,
    is_positional,
    strategy_eval_options,
    task_name_in_recipes,
)
from llmrec.results import Arm
from llmrec.tasks.family import family_of
from llmrec.tasks.fewshot import TEXT_CHOICES
from llmrec.tasks.held_items import CANDIDATE_KIND

DEBIAS_SETTINGS = ("debias", "debias_questions")
"""Settings that positional strategies read in addition to those of their registry entries."""


@dataclass(frozen=True)
class RowSpec:
    """A model to evaluate: its task, setting, predictor and prompt template."""

    family: str
    arm: Arm
    predictor: str
    template: Template | None = None
    shots: int = 0

    @property
    def id(self) -> str:
        """Id of the model, unique in a run."""
        parts = [self.family, self.arm, self.predictor]
        return "/".join([*parts, self.template.name] if self.template else parts)

    @property
    def joins(self) -> bool:
        """Whether the model is an ensemble of others."""
        return self.predictor in ENSEMBLE_NAMES.values()

    @property
    def fields(self) -> Mapping[str, Any]:
        """Fields that describe the model in results."""
        return {
            "id": self.id,
            "task": self.family,
            "arm": self.arm,
            "predictor": self.predictor,
            "template": self.template.id if self.template else None,
            "template_use": self.template.use if self.template else None,
            "shots": self.shots,
        }


def is_arm_evaluated(recipe: Recipe, family: str, arm: Arm) -> bool:
    """Whether a task is evaluated in a setting (zero-shot, few-shot or tuned)."""
    section = recipe.tasks.present()[family]
    if arm == "tuned" and section.weight == 0:
        return False
    return arm in recipe.eval.arms and (section.arms is None or arm in section.arms)


def specs_for_arm(study: Study, arm: Arm) -> Iterator[RowSpec]:
    """Yield the models to evaluate in a setting (zero-shot, few-shot, tuned or baseline)."""
    for family, task in study.tasks.items():
        section = study.section(family)
        if arm == "baseline":
            yield from (RowSpec(task.family, arm, baseline.label) for baseline in study.baselines(family))
            yield from (RowSpec(task.family, arm, ENSEMBLE_NAMES[kind]) for kind in ensemble_kinds(study, family))
            continue
        if not is_arm_evaluated(study.recipe, family, arm):
            continue
        for template in study.templates_for(family, arm):
            for strategy in task.asked_by(template, section.strategies, tuned=arm == "tuned"):
                shots = study.recipe.eval.shots.k if arm == "few-shot" else 0
                yield RowSpec(task.family, arm, strategy, template, shots)
                if ensemble_includes_model(study, family, arm, strategy):
                    yield RowSpec(task.family, arm, ENSEMBLE_NAMES["language model"], template, shots)


def baseline_file_hashes(spec: RowSpec, study: Study) -> InputHashes:
    """Return hashes of files that a model reads in addition to the data; usually none."""
    known = study.baselines(spec.family) if spec.arm == "baseline" else ()
    return next((input_hashes(item.name, item.parameters) for item in known if item.label == spec.predictor), {})


def registry_entries(spec: RowSpec, study: Study) -> list[tuple[Table, str]]:
    """Return the registry entries whose code affects a model's answers."""
    family = TASKS, task_name_in_recipes(spec.family)
    if spec.template is not None:
        return [family, (STRATEGIES, spec.predictor)]
    known = study.baselines(spec.family)
    return [family, *((BASELINES, item.name) for item in known if item.label == spec.predictor)]


def unused_settings(spec: RowSpec, study: Study) -> set[str]:
    """Return the evaluation settings that do not affect a model, except the settings of its strategy."""
    family, model = family_of(spec.family), spec.template is not None
    named = {f"tasks.{task}" for task in study.tasks if task != spec.family}
    named |= {
        f"eval.{key}" for keys in (*(entry.keys for entry in STRATEGIES.values()), DEBIAS_SETTINGS) for key in keys
    }
    return (
        named
        | ({"model", "index"} if not model else set())
        | ({"eval.shots"} if not spec.shots else set())
        | ({"eval.candidates"} if family.candidates is None else set())
    )


def encoder_stamp(spec: RowSpec, study: Study) -> str | None:
    """Return the identity of the text encoder if prompts show similar items."""
    near = spec.shots and study.recipe.eval.shots.choice in TEXT_CHOICES
    relevant = spec.template is not None and study.section(spec.family).past == "relevant"
    return text_embedder(study.recipe.encoder).stamp if near or relevant else None


def strategy_settings(strategy: str, section: EvalSection) -> dict[str, Json]:
    """Return the evaluation settings that a strategy reads."""
    measured = is_positional(strategy) and section.debias != "none"
    return strategy_eval_options(strategy, section) | (
        {key: getattr(section, key) for key in DEBIAS_SETTINGS} if measured else {}
    )


def protocol_of(study: Study, family: str) -> EvalProtocol:
    """Return the evaluation protocol of a task."""
    recipe, data, task = study.recipe, study.task_data(family), study.tasks[family]
    return EvalProtocol(
        split=f"{data.kind}/{recipe.eval.split}",
        candidates=_describe_candidates(recipe.eval.candidates, family),
        cutoffs=recipe.eval.cutoffs,
        resamples=recipe.eval.bootstrap,
        seed=recipe.seed,
        catalogue=len(data.dataset.items),
        users=task.users_kind,
        liked=task.liked_from,
    )


def _describe_candidates(sets: CandidateSection, family: str) -> str:
    if family_of(family).candidates == "items":
        return f"{CANDIDATE_KIND}-{sets.count}"
    kind = f"retrieved-{sets.retriever}" if sets.kind == "retrieved" else sets.kind
    return "full" if kind == "catalogue" else f"{kind}-{sets.count}"


def describe_inputs(spec: RowSpec, study: Study) -> str:
    """Describe the input of a model, and whether its task was not trained."""
    task = study.tasks[spec.family]
    notes = "; calibrated on the validation split" if task.calibrates else ""
    if spec.arm == "tuned" and spec.family not in study.shares:
        notes += "; trained only on other tasks"
    if spec.template is not None:
        return task.shows(spec.template, spec.shots) + notes
    if family_of(spec.family).candidates == "items":
        return "the candidates"
    return f"training interactions and the request's history{notes}"
