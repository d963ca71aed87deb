"""Judges a model while it is trained: NDCG@10 on validation users, beside what classic recommenders reach on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.backend import HFBackend
from llmrec.baselines.fits.fitting import fitted
from llmrec.data.split import halves
from llmrec.errors import DataError, RecipeError
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.pipeline.fusion.parts import (
    FUSIONS,
    NOTHING,
    Recalled,
    Weighing,
    bases_of,
    fusible,
    join,
    kind_of,
    reads_of,
    widest,
)
from llmrec.pipeline.row_specs import protocol_of
from llmrec.pipeline.study import Study, build_task, draw_sets
from llmrec.registry import options_of
from llmrec.strategies.asking import Prompting, strategy_of
from llmrec.tasks.cases import of_first_users
from llmrec.tasks.family import family_of
from llmrec.tasks.task import Task
from llmrec.types import Case, Predictor, Ranking

METRIC = "NDCG@10"


def judged(study: Study) -> list[str]:
    """Return the families that are trained and rank items for users; a model in training is judged by the first."""
    return [family for family in study.tasks if family in study.shares and family_of(family).ranks_for_users]


def judges(study: Study) -> frozenset[str]:
    """Return the validation users by whom a model in training is judged; none of them weighs a fusion."""
    section, able = study.recipe.train.judge, judged(study)
    if section is None or not able:
        return frozenset()
    choosing = halves(study.data, study.recipe.eval.fusion.reserved)[0].holdouts("valid")
    return frozenset(choosing.first_users(section.users, but=study.set_aside(able[0])))


@dataclass(frozen=True)
class Judge:
    """Measures a model on the validation cases of one family.

    Attributes:
        study: The study, with the candidate sets of its validation split.
        family: The first family that is trained and ranks items for users.
        task: Its task over these sets.
        cases: Those of the validation users who choose; none of them weighs a fusion.
        encoder: The tokenizer of the model.
    """

    study: Study
    family: str
    task: Task
    cases: Sequence[Case]
    encoder: Encoder

    @staticmethod
    def of(study: Study, encoder: Encoder) -> Judge | None:
        """Return the judge that a recipe asks for, None where it asks for none.

        Raises:
            RecipeError: If no family that is trained ranks items for users, or a rating head is trained.
            DataError: If the validation split has no cases of these users.
        """
        section = study.recipe.train.judge
        if section is None:
            return None
        rating = study.recipe.tasks.rating
        able = judged(study)
        if not able or (rating is not None and rating.head is not None):
            raise RecipeError(
                "train.judge: it measures rankings, and none is trained here; train sequential or direct, without "
                "tasks.rating.head, or drop the section",
                kind="contradiction",
                column="train.judge",
            )
        family, data, users = able[0], study.data, judges(study)
        asked = replace(study, candidates=draw_sets(study.recipe, data, "valid", users))
        task = build_task(asked, family, study.section(family), study.templates[family], study.recipe.seed)
        cases = of_first_users(task.cases("valid"), None, among=users)
        if not cases:
            raise DataError(
                f"{data.dataset.name}: the validation split has no case of {family} to judge a model by; give it "
                "users, or drop train.judge",
                kind="empty",
                at=data.dataset.name,
                column="train.judge",
            )
        return Judge(asked, family, task, cases, encoder)

    def model(self, model: Any) -> float:
        """Return NDCG@10 of a model in training, by the first strategy of the family; it is left in evaluation mode."""
        section = self.study.recipe.eval
        # Adapters are parts of the model's own modules, which the backend reads like those of any other.
        live = model.get_base_model() if hasattr(model, "get_base_model") else model
        asker = Prompting(
            backend=HFBackend(live, self.encoder),
            task=self.task,
            template=self.task.eval_templates[0],
            batch=section.batch,
        )
        name = self.study.section(self.family).strategies[0]
        options = options_of(name, section) | dict(self.task.strategy_options)
        return self.figure(strategy_of(name, asker, **options))

    def figure(self, predictor: Predictor) -> float:
        """Return NDCG@10 of a predictor."""
        found = evaluate(predictor, self.cases, name=self.family, kind=Ranking, protocol=self._protocol)
        value = found.figures.metrics[METRIC].value
        assert value is not None
        return value

    def controls(self) -> dict[str, float]:
        """Return NDCG@10 of the family's baselines by label, and of their fusions by name."""
        weighing = Weighing(self.study)
        weighers = weighing.cases(self.family)
        data, found, parts = self.study.task_data(self.family), {}, []
        for section in self.study.baselines(self.family):
            used = weighing.choosing(section.name, data)
            predictor = fitted(section.name, section.parameters, used, seed=self.study.recipe.seed)
            found[section.label] = self.figure(predictor)
            if section.name != NOTHING:
                requests = [case.request for case in (*weighers, *self.cases)]
                answers = dict(zip([each.id for each in requests], predictor.answer(requests), strict=True))
                reads = reads_of(section.name, section.parameters)
                seen = frozenset(getattr(predictor, "looked_at", ()))
                parts.append(Recalled(section.label, reads, kind_of(section.name), answers, seen))
        for kind in fusible(self.study, self.family) if weighers else ():
            able = [part for part in parts if widest([part.reads, kind]) == kind]
            onto = bases_of(self.study, self.family, able, weighers)
            found[FUSIONS[kind]] = self.figure(join(FUSIONS[kind], able, weighers, Ranking, onto=onto))
        return found

    @cached_property
    def _protocol(self) -> EvalProtocol:
        return replace(protocol_of(self.study, self.family), cutoffs=(10,), resamples=1)
