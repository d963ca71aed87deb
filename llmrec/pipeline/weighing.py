"""Reserves validation users to fit ensemble weights, and lists the ensembles of a task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from llmrec.data.split import SplitDataset, split_validation_users
from llmrec.ensembles.blend import PredictionEnsemble
from llmrec.ensembles.context import ContextFeatures
from llmrec.ensembles.members import (
    ENSEMBLE_NAMES,
    RANDOM_BASELINE,
    PrecomputedMember,
    baseline_reads,
    combined_reads,
    fit_ensemble,
    member_training_data,
)
from llmrec.ensembles.rankers import ListEnsemble
from llmrec.ensembles.retrieving import MAX_WEIGHT_USERS
from llmrec.ensembles.stored import StoredEnsemble, stored_ensemble_of
from llmrec.ensembles.weights import FOLDS
from llmrec.errors import DataError
from llmrec.pipeline.study import Study, build_candidate_sets, build_task
from llmrec.results import Reads, Row
from llmrec.tasks.cases import cases_of_first_users
from llmrec.tasks.family import family_of
from llmrec.types import Case, Probability, Rating

log = logging.getLogger(__name__)


def ensemble_kinds(study: Study, family: str) -> tuple[Reads, ...]:
    """Return the kinds of ensembles that are built from a task's baselines.

    There is one for each kind of input, over the baselines that read at most this input, if these are two or more.
    """
    task, section = family_of(family), study.recipe.eval
    able = task.ranks_for_users or task.answer in (Rating, Probability)
    if not able or not section.fusion.controls or section.split != "test":
        return ()
    reads = [
        baseline_reads(baseline.name, baseline.parameters)
        for baseline in study.baselines(family)
        if baseline.name != RANDOM_BASELINE
    ]
    return tuple(
        kind
        for kind in get_args(Reads)
        if kind in reads and sum(combined_reads([read, kind]) == kind for read in reads) > 1
    )


def ensemble_includes_model(study: Study, family: str, arm: str, strategy: str) -> bool:
    """Whether ensembles of the task's baselines also include the language model."""
    first, section = ("head", study.section(family).strategies[0]), study.recipe.eval.fusion
    if section.model_users == 0 or (section.arms is not None and arm not in section.arms):
        return False
    return strategy in first and bool(ensemble_kinds(study, family))


class EnsembleUsers:
    """The validation users on which ensemble weights are fitted, with their cases."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._cases: dict[str, list[Case]] = {}
        self._choosing: dict[tuple[int, str], SplitDataset] = {}

    def cases(self, family: str, *, model: bool = False) -> list[Case]:
        """Return the cases on which a task's ensemble weights are fitted; empty if it has no ensembles.

        An ensemble needs validation users who are not evaluated, and two baselines with predictions.

        Args:
            family: A chosen family.
            model: Return only the first cases, which language-model rows answer too.
        """
        if family not in self._cases:
            self._cases[family] = self._drawn(family)
        most = self._study.recipe.eval.fusion.model_users if model else None
        return cases_of_first_users(self._cases[family], most)

    def choosing(self, name: str, data: SplitDataset) -> SplitDataset:
        """Return the data on which a baseline is fitted; see `member_training_data`."""
        section = self._study.recipe.eval.fusion
        if not section.controls:
            return data
        if (id(data), name) not in self._choosing:
            self._choosing[id(data), name] = member_training_data(name, data, section.reserved)
        return self._choosing[id(data), name]

    def _drawn(self, family: str) -> list[Case]:
        study, section, kind = self._study, self._study.recipe.eval.fusion, family_of(family)
        if not ensemble_kinds(study, family):
            return []
        data = study.task_data(family)
        task = study.tasks[family]
        weighers = split_validation_users(data, section.reserved)[1].holdouts("valid")
        aside = study.set_aside(family)
        if kind.ranks_for_users and study.candidates is not None:
            users = frozenset(weighers.first_users(MAX_WEIGHT_USERS, but=aside))
            valid_study = replace(study, candidates=build_candidate_sets(study.recipe, study.data, "valid", users))
            task = build_task(valid_study, family, study.section(family), study.templates[family], study.recipe.seed)
        try:
            able = task.cases("valid")
        except DataError as error:
            log.warning("%s: no ensemble of the baselines: %s", family, error)
            return []
        cases = cases_of_first_users(able, MAX_WEIGHT_USERS, among=set(weighers.frame["user_id"].to_list()), but=aside)
        result = len({case.request.user_id for case in cases})
        if result < 2 * FOLDS:
            log.warning(
                "%s: no ensemble of the baselines, which needs %d validation users, but there are %d",
                *(family, 2 * FOLDS, result),
            )
            return []
        return cases


def fit_task_ensemble(
    study: Study,
    family: str,
    name: str,
    members: Sequence[PrecomputedMember],
    cases: Sequence[Case],
    every: Sequence[Case],
) -> ListEnsemble | PredictionEnsemble:
    """Fit an ensemble of a task's models, which can build on ensembles of those that read fewer kinds of input.

    Args:
        study: The study.
        family: The task.
        name: The name of the ensemble.
        members: Baselines, followed by other members.
        cases: The cases for the weights.
        every: The cases for the weights of the smaller ensembles, which all baselines have answered.
    """
    answer, context = family_of(family).answer, ContextFeatures(study.data)
    smaller: list[ListEnsemble | PredictionEnsemble] = []
    for kind in ensemble_kinds(study, family) if every else ():
        able = [part for part in members if combined_reads([part.reads, kind]) == kind]
        if len(able) < len(members):
            smaller.append(
                fit_ensemble(
                    ENSEMBLE_NAMES[kind], able, every, answer, base_ensembles=smaller, ablate=False, context=context
                )
            )
    return fit_ensemble(name, members, cases, answer, base_ensembles=smaller, context=context)


def stored_ranking_ensembles(study: Study, rows: Sequence[Row]) -> list[StoredEnsemble]:
    """Return the ranking ensembles of a run in their stored form."""
    ranks = [row for row in rows if family_of(row.task).ranks_for_users and row.fusion is not None]
    section, seed = study.recipe.eval.fusion, study.recipe.seed
    return [stored_ensemble_of(row, study.baselines(row.task), seed=seed, reserved=section.reserved) for row in ranks]
