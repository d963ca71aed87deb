"""Members of an ensemble: what they know, what they answered before, and how an ensemble of them is fitted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from llmrec.baselines.parameters import config_of, stops_early, stores_of
from llmrec.data.split import SplitDataset, halves
from llmrec.durable import Json
from llmrec.ensembles.base import Ensemble
from llmrec.ensembles.blend import Blend
from llmrec.ensembles.rankers import CatalogueEnsemble, ListEnsemble, ListMember
from llmrec.ensembles.weights import Kind
from llmrec.models.text_encoder import learned_from
from llmrec.registry import BASELINES, lookup
from llmrec.results import FusionWeights, PartWeight, Prediction, Reads
from llmrec.types import Answer, Case, Probability, Ranking, Rating, Request, Unparsed

FUSIONS: Mapping[Reads, str] = {
    "events": "fusion",
    "texts": "fusion with texts",
    "language model": "fusion with models",
}
"""What the row of a fusion is called, by the widest kind among its parts."""

NOTHING = "random"
"""The baseline that knows nothing and is no part of a fusion."""


def choosing(name: str, data: SplitDataset, reserved: float) -> SplitDataset:
    """Return what a baseline is fitted on: one that chooses its epoch does so without the users that weigh."""
    return halves(data, reserved)[0] if stops_early(name) else data


@dataclass
class Recalled:
    """A part of a fusion that gives the answers which it gave before.

    Attributes:
        name: In tables.
        reads: What it knows items by.
        kind: How the scores of its rankings are read.
        answers: By request id; see `answers_of`.
        looked_at: Users whose validation interactions chose something of it; none of them may weigh it.
    """

    name: str
    reads: Reads
    kind: Kind
    answers: Mapping[str, Answer] = field(repr=False)
    looked_at: frozenset[str] = field(default=frozenset(), repr=False)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the answers; one that could not be read stays unread."""
        return [self.answers[request.id] for request in requests]


def remembered(answer: Answer) -> Json:
    """Return what a part said, as it stands in files: items with scores, a number, or None."""
    if isinstance(answer, Ranking):
        return {"items": list(answer.items), "scores": [float(score) for score in answer.scores]}
    return answer.value if isinstance(answer, Rating | Probability) else None


def _answer(request: str, said: Any) -> Answer:
    if isinstance(said, dict):
        return Ranking(request_id=request, items=tuple(said["items"]), scores=tuple(said["scores"]))
    if said is None:
        return Unparsed(request_id=request, reason="the part gave no answer that could be read")
    return Rating(request_id=request, value=float(said))


def join(
    name: str,
    parts: Sequence[Recalled],
    cases: Sequence[Case],
    answer: type[Answer],
    *,
    onto: Sequence[Ensemble] = (),
    dissect: bool = True,
) -> ListEnsemble | Blend:
    """Fit a fusion of parts to the cases that weigh it.

    Args:
        name: Of its row.
        parts: Two or more, each with answers to all cases.
        cases: Validation cases; of yes/no answers with 1 or 0 as truth.
        answer: What the family answers with.
        onto: Fusions of some of the parts, onto which the others may be put; more cases may have weighed them.
        dissect: Say what is lost without each part.
    """
    result: ListEnsemble | Blend
    if answer is Ranking:
        result = ListEnsemble(name, [ListMember(part.name, part, part.kind) for part in parts])
    else:
        result = Blend(name, [(part.name, part) for part in parts], judges=answer is Probability)
    result.fit(cases, dissect=dissect, onto=onto)
    return result


def weights_of(model: Any) -> FusionWeights | None:
    """Return the weights of a fusion as records have them, None of any other model."""
    if not isinstance(model, CatalogueEnsemble | ListEnsemble | Blend):
        return None
    result = model.fitted
    low, high = result.low or (None,) * len(result.parts), result.high or (None,) * len(result.parts)
    losses = {item.name: {"loss": item.loss, "loss_low": item.low, "loss_high": item.high} for item in model.without}
    parts = [
        PartWeight(name=name, weight=weight, low=least, high=most, **losses.get(name, {}))
        for name, weight, least, most in zip(model.names, result.parts, low, high, strict=False)
    ]
    return FusionWeights(form=result.form, parts=tuple(parts), repeat=result.repeat or None)


def widest(reads: Sequence[Reads | None]) -> Reads:
    """Return what a joined row knows items by: what any of its parts does."""
    order = get_args(Reads)
    return max((read or order[0] for read in reads), key=order.index)


def kind_of(baseline: str) -> Kind:
    """Return how the scores of a baseline are read."""
    return lookup(BASELINES, baseline, "baseline").SCORES  # type: ignore[no-any-return]


def reads_of(baseline: str, parameters: Mapping[str, Any]) -> Reads:
    """Return what a baseline knows items by; one whose encoder was tuned on the interactions is a language model."""
    made = lookup(BASELINES, baseline, "baseline")
    own = made.reads(config_of(baseline, parameters, "parameters"))
    # Features are texts through a fixed encoder, whoever wrote them.
    known = widest(["texts", own]) if stores_of(baseline, parameters) else own
    encoder = made.text_encoder(parameters)
    return "language model" if known == "texts" and encoder is not None and learned_from(encoder) else known


def answers_of(said: Mapping[str, Json], records: Sequence[Prediction]) -> dict[str, Answer]:
    """Return answers by request id: those that are `remembered`, and those that a row's records hold."""
    known = {**said, **{record.request_id: json.loads(record.parsed) for record in records}}
    return {request: _answer(request, item) for request, item in known.items()}


def weighed_by(parts: Sequence[object], cases: Sequence[Case]) -> str:
    """Say what the row of a fusion was given."""
    users = len({case.request.user_id for case in cases})
    return f"what {len(parts)} rows answer, weighed by {users} users of the validation split"
