"""Retrieves candidates for reranking with an ensemble of baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from llmrec.baselines.base import LSA
from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.parameters import stops_early
from llmrec.baselines.retrieve import ENSEMBLE_RETRIEVER_NAME
from llmrec.data.split import SplitDataset, request_of, split_validation_users
from llmrec.ensembles.context import ContextFeatures
from llmrec.ensembles.members import RANDOM_BASELINE
from llmrec.ensembles.rankers import CatalogueEnsemble, CatalogueMember
from llmrec.ensembles.weights import FOLDS
from llmrec.errors import DataError, RecipeError
from llmrec.models.text_encoder import encoder_training_hash
from llmrec.recipe.schema import BaselineSection
from llmrec.registry import BASELINES, import_component
from llmrec.types import Case, CatalogueScorer, Request, SplitName

MAX_WEIGHT_USERS = 5000
"""Maximum number of users for ensemble weights; more change them little and take longer."""


@dataclass(frozen=True)
class EnsembleRetriever:
    """Retrieves candidates with an ensemble of baselines.

    The random baseline, and baselines with early stopping on the validation split or with an encoder fine-tuned on the
    interactions, are left out.

    Attributes:
        baselines: The baselines of the family.
        reserved: Share of the validation users for ensemble weights.
        seed: The run's seed.
    """

    baselines: Sequence[BaselineSection]
    reserved: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the retriever in recipes."""
        return ENSEMBLE_RETRIEVER_NAME

    def fitted(self, data: SplitDataset, split: SplitName) -> Sequence[tuple[CatalogueScorer, frozenset[str] | None]]:
        """Return the ensembles that retrieve candidates for held-out interactions."""
        parts = self._parts(data)
        choosing, weighing = (
            {one.user_id for one in half.holdouts("valid")} for half in split_validation_users(data, self.reserved)
        )
        context = ContextFeatures(data)
        ensemble = _fit_catalogue_ensemble(parts, _held_out_cases(data, weighing), context)
        if split != "valid":
            return [(ensemble, None)]
        other = _fit_catalogue_ensemble(parts, _held_out_cases(data, choosing), context)
        return [(ensemble, frozenset(choosing)), (other, frozenset(weighing))]

    def apart(self, data: SplitDataset, parts: Mapping[str, int], part: int) -> CatalogueScorer:
        """Return an ensemble fitted only on training interactions of the other folds.

        Its weights are fitted on the last training interactions of the users of the next fold, on which its members are
        not fitted.
        """
        folds = sorted(set(parts.values()))
        weight_fold = folds[(folds.index(part) + 1) % len(folds)] if part in folds else folds[0]
        users = [user for user, fold in sorted(parts.items()) if fold == weight_fold != part]
        excluded = [user for user, fold in parts.items() if fold in (part, weight_fold)]
        rest = replace(data, train=data.train.filter(~pl.col("user_id").is_in(excluded)))
        return _fit_catalogue_ensemble(
            self._parts(rest), [_last_case(data, user) for user in users[:MAX_WEIGHT_USERS]], ContextFeatures(rest)
        )

    def _parts(self, data: SplitDataset) -> list[CatalogueMember]:
        """Return the baselines, fitted on training interactions."""
        results = []
        for section in self.baselines:
            baseline_type = import_component(BASELINES, section.name, "baseline")
            encoder = str(section.parameters.get("encoder", LSA))
            if section.name == RANDOM_BASELINE or stops_early(section.name):
                continue
            if encoder != LSA and encoder_training_hash(encoder):
                continue
            model = fit_baseline(section.name, section.parameters, data, seed=self.seed)
            results.append(CatalogueMember(section.label, model, baseline_type.SCORES))
        if len(results) < 2:
            raise RecipeError(
                f"eval.candidates.retriever: {ENSEMBLE_RETRIEVER_NAME} needs at least two baselines without early "
                "stopping; add them to the baselines of the task, or choose another retriever",
                kind="contradiction",
                column="eval.candidates.retriever",
            )
        return results


def _fit_catalogue_ensemble(
    parts: Sequence[CatalogueMember], cases: Sequence[Case], context: ContextFeatures
) -> CatalogueEnsemble:
    """Return an ensemble with weights fitted on these cases."""
    users = len({case.request.user_id for case in cases})
    if users < 2 * FOLDS:
        raise DataError(
            f"eval.candidates.retriever: {ENSEMBLE_RETRIEVER_NAME} needs {2 * FOLDS} users for its weights, in "
            f"validation and in each fifth of training, but there are {users}; use more data, hold out more users, or "
            "choose a single retriever such as transitions",
            kind="too-few",
            column="eval.candidates.retriever",
        )
    fusion = CatalogueEnsemble(ENSEMBLE_RETRIEVER_NAME, parts, filtered=True, context=context)
    fusion.fit(cases)
    return fusion


def _held_out_cases(data: SplitDataset, users: set[str]) -> list[Case]:
    holdouts = [one for one in data.holdouts("valid") if one.user_id in users]
    kept = set(list(dict.fromkeys(one.user_id for one in holdouts))[:MAX_WEIGHT_USERS])
    return [Case(request=request_of(data, one, "valid"), truth=one.item_id) for one in holdouts if one.user_id in kept]


def _last_case(data: SplitDataset, user: str) -> Case:
    *past, last = data.train_events(user)
    return Case(request=Request(id=f"weighs/{user}", user_id=user, history=tuple(past)), truth=last.item_id)
