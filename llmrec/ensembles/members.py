"""Ensemble members with stored answers, and functions that fit and store an ensemble."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from llmrec.baselines.parameters import baseline_config, feature_store_hashes, stops_early
from llmrec.data.split import SplitDataset, split_validation_users
from llmrec.durable import Json
from llmrec.ensembles.base import Ensemble
from llmrec.ensembles.blend import PredictionEnsemble
from llmrec.ensembles.cells import ScoreScale
from llmrec.ensembles.context import ContextFeatures
from llmrec.ensembles.rankers import CatalogueEnsemble, ListEnsemble, ListMember
from llmrec.ensembles.trees import Trees
from llmrec.ensembles.weights import Form, MemberAblation, Weights
from llmrec.errors import ModelError
from llmrec.models.text_encoder import encoder_training_hash
from llmrec.registry import BASELINES, import_component
from llmrec.results import FeatureGain, FusionWeights, PartWeight, Prediction, Reads, StoredTrees
from llmrec.types import Answer, Case, Probability, Ranking, Rating, Request, Unparsed

ENSEMBLE_NAMES: Mapping[Reads, str] = {
    "events": "fusion",
    "texts": "fusion with texts",
    "language model": "fusion with models",
}
"""Names of ensembles in tables, by the input modality of their members."""

RANDOM_BASELINE = "random"
"""The random baseline, which is never a member of an ensemble."""


def member_training_data(name: str, data: SplitDataset, reserved: float) -> SplitDataset:
    """Return the data on which a member is fitted, without users reserved for ensemble weights if it stops early."""
    return split_validation_users(data, reserved)[0] if stops_early(name) else data


@dataclass
class PrecomputedMember:
    """A member of an ensemble that returns stored answers.

    Attributes:
        name: Name in tables.
        reads: How it represents items.
        kind: The scale of its scores.
        answers: Answers by request id; see `restore_answers`.
        looked_at: Users whose validation interactions were used for model selection; not used for its weight.
    """

    name: str
    reads: Reads
    kind: ScoreScale
    answers: Mapping[str, Answer] = field(repr=False)
    looked_at: frozenset[str] = field(default=frozenset(), repr=False)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the stored answers."""
        return [self.answers[request.id] for request in requests]


def serialise_answer(answer: Answer) -> Json:
    """Return an answer in its stored form: items with scores, a number, or None."""
    if isinstance(answer, Ranking):
        return {"items": list(answer.items), "scores": [float(score) for score in answer.scores]}
    return answer.value if isinstance(answer, Rating | Probability) else None


def _restore_answer(request: str, stored: Any) -> Answer:
    if isinstance(stored, dict):
        return Ranking(request_id=request, items=tuple(stored["items"]), scores=tuple(stored["scores"]))
    if stored is None:
        return Unparsed(request_id=request, reason="the answer of the member could not be parsed")
    return Rating(request_id=request, value=float(stored))


def fit_ensemble(
    name: str,
    parts: Sequence[PrecomputedMember],
    cases: Sequence[Case],
    answer: type[Answer],
    *,
    base_ensembles: Sequence[Ensemble] = (),
    ablate: bool = True,
    context: ContextFeatures | None = None,
) -> ListEnsemble | PredictionEnsemble:
    """Fit an ensemble of members to cases, and return it.

    Args:
        name: Name in tables.
        parts: Two or more members, each with answers to all cases.
        cases: Validation cases; for yes/no answers with 1 or 0 as truth.
        answer: The answer type of the family.
        base_ensembles: Ensembles of some of the members, perhaps fitted to more cases; the other members may be added
            to them.
        ablate: Measure the loss without each member.
        context: Further features for a ranker.
    """
    result: ListEnsemble | PredictionEnsemble
    if answer is Ranking:
        result = ListEnsemble(name, [ListMember(part.name, part, part.kind) for part in parts], context=context)
    else:
        result = PredictionEnsemble(
            name, [(part.name, part) for part in parts], predicts_probability=answer is Probability
        )
    result.fit(cases, ablate=ablate, base_ensembles=base_ensembles)
    return result


def ensemble_weights_record(model: Any) -> FusionWeights | None:
    """Return the weights of an ensemble for results; None for other models."""
    if not isinstance(model, CatalogueEnsemble | ListEnsemble | PredictionEnsemble):
        return None
    return weights_record(model.fitted, model.names, model.without)


def weights_record(weights: Weights, names: Sequence[str], without: Sequence[MemberAblation] = ()) -> FusionWeights:
    """Convert weights to their stored form.

    Args:
        weights: The weights.
        names: The members.
        without: The loss without each member.
    """
    low, high = weights.low or (None,) * len(weights.parts), weights.high or (None,) * len(weights.parts)
    losses = {item.name: {"loss": item.loss, "loss_low": item.low, "loss_high": item.high} for item in without}
    parts = tuple(
        PartWeight(name=name, weight=weight, low=least, high=most, **losses.get(name, {}))
        for name, weight, least, most in zip(names, weights.parts, low, high, strict=False)
    )
    more: dict[str, Any] = {}
    if weights.trees is not None:
        gains = sorted(weights.trees.gains.items(), key=lambda item: -item[1])
        text = base64.b64encode(zlib.compress(weights.trees.text.encode())).decode()
        more = {
            "features": tuple(FeatureGain(name=name, gain=gain) for name, gain in gains),
            "trees": StoredTrees(text=text, features=weights.trees.names),
        }
    if weights.base is not None:
        more = {"base": weights_record(weights.base, names), "scale": weights.scale}
    return FusionWeights(form=weights.form, parts=parts, repeat=weights.repeat or None, **more)


def restore_weights(record: FusionWeights) -> Weights:
    """Restore the weights of an ensemble from a stored record.

    Raises:
        ModelError: If its trees are damaged.
    """
    parts = tuple(float(part.weight or 0.0) for part in record.parts)
    trees = None
    if record.trees is not None:
        try:
            text = zlib.decompress(base64.b64decode(record.trees.text, validate=True)).decode()
        except (ValueError, zlib.error) as error:
            raise ModelError(f"the trees of an ensemble cannot be read: {error}", kind="damaged") from error
        trees = Trees(text, record.trees.features)
    elif record.form == "ranker":
        raise ModelError("the trees of an ensemble are missing", kind="damaged")
    base = None if record.base is None else restore_weights(record.base)
    form: Form = record.form  # type: ignore[assignment]
    return Weights(form, parts, record.repeat or 0.0, trees=trees, base=base, scale=record.scale or 0.0)


def combined_reads(reads: Sequence[Reads | None]) -> Reads:
    """Return which item data an ensemble reads: the most that any member reads."""
    order = get_args(Reads)
    return max((read or order[0] for read in reads), key=order.index)


def baseline_score_scale(baseline: str) -> ScoreScale:
    """Return the scale of the scores of a baseline, counts or logits."""
    return import_component(BASELINES, baseline, "baseline").SCORES  # type: ignore[no-any-return]


def baseline_reads(baseline: str, parameters: Mapping[str, Any]) -> Reads:
    """Return which item data a baseline reads; with a fine-tuned encoder it counts as a language model."""
    baseline_type = import_component(BASELINES, baseline, "baseline")
    reads = baseline_type.reads(baseline_config(baseline, parameters, "parameters"))
    # Feature stores count as text with a frozen encoder, even if a language model wrote the texts.
    result = combined_reads(["texts", reads]) if feature_store_hashes(baseline, parameters) else reads
    encoder = baseline_type.text_encoder(parameters)
    return "language model" if result == "texts" and encoder is not None and encoder_training_hash(encoder) else result


def restore_answers(stored: Mapping[str, Json], records: Sequence[Prediction]) -> dict[str, Answer]:
    """Restore answers from their stored form and from prediction records, by request id."""
    known = {**stored, **{record.request_id: json.loads(record.parsed) for record in records}}
    return {request: _restore_answer(request, item) for request, item in known.items()}


def describe_ensemble_fit(parts: Sequence[object], cases: Sequence[Case]) -> str:
    """Return a description of how an ensemble was fitted, for reports."""
    users = len({case.request.user_id for case in cases})
    return f"ensemble of {len(parts)} models, weights fitted on {users} validation users"
