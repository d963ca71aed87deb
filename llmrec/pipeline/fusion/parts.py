"""Rows that join others: the parts answer validation users too, and what they say there weighs them.

The mathematics is in `llmrec.strategies`: `CandidateFusion` for rankings, `Blend` for ratings and yes/no answers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from llmrec.baselines.ctr.align import Align
from llmrec.baselines.item_texts import LSA
from llmrec.baselines.parameters import config_of, stops_early, stores_of
from llmrec.data.split import SplitDataset, halves
from llmrec.durable import Json
from llmrec.errors import DataError
from llmrec.models.text_encoder import learned_from
from llmrec.pipeline.fusion.retrieving import MOST
from llmrec.pipeline.study import Study, build_task, draw_sets
from llmrec.registry import BASELINES, lookup
from llmrec.results import FusionWeights, PartWeight, Prediction, Reads
from llmrec.strategies.blend import Blend
from llmrec.strategies.candidate_fusion import CandidateFusion, Voice
from llmrec.strategies.fusion import Fusion
from llmrec.strategies.fusion_weights import FOLDS, Kind
from llmrec.strategies.weighed import Weighed
from llmrec.tasks.cases import of_first_users
from llmrec.tasks.family import family_of
from llmrec.types import Answer, Case, Probability, Ranking, Rating, Request, Unparsed

log = logging.getLogger(__name__)

FUSIONS: Mapping[Reads, str] = {
    "events": "fusion",
    "texts": "fusion with texts",
    "language model": "fusion with models",
}
"""What the row of a fusion is called, by the widest kind among its parts."""

NOTHING = "random"
"""The baseline that knows nothing and is no part of a fusion."""


def fusible(study: Study, family: str) -> tuple[Reads, ...]:
    """Return the kinds of fusions of a family's baselines, judged by users that do not weigh them.

    There is one for each kind that a baseline is of: of two or more that say something, itself and all that know less.
    """
    own, section = family_of(family), study.recipe.eval
    able = own.ranks_for_users or own.answer in (Rating, Probability)
    if not able or not section.fusion.controls or section.split != "test":
        return ()
    reads = [reads_of(each.name, each.parameters) for each in study.baselines(family) if each.name != NOTHING]
    return tuple(
        kind for kind in get_args(Reads) if kind in reads and sum(widest([each, kind]) == kind for each in reads) > 1
    )


def joins_model(study: Study, family: str, arm: str, strategy: str) -> bool:
    """Whether the rows of a language model in a setting, under a strategy, are joined with the family's baselines."""
    first, section = ("head", study.section(family).strategies[0]), study.recipe.eval.fusion
    if section.model_users == 0 or (section.arms is not None and arm not in section.arms):
        return False
    return strategy in first and bool(fusible(study, family))


def choosing(name: str, data: SplitDataset, reserved: float) -> SplitDataset:
    """Return what a baseline is fitted on: one that chooses its epoch does so without the users that weigh."""
    return halves(data, reserved)[0] if stops_early(name) else data


class Weighing:
    """The validation users of a study who weigh its fusions, and what its rows answer them."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._cases: dict[str, list[Case]] = {}
        self._choosing: dict[tuple[int, str], SplitDataset] = {}

    def cases(self, family: str, *, model: bool = False) -> list[Case]:
        """Return the cases that weigh a family's fusion; none where it has no fusion.

        A fusion needs validation users who are not evaluated, and two baselines that say something.

        Args:
            family: A chosen family.
            model: Those that the rows of a language model answer too, the first ones.
        """
        if family not in self._cases:
            self._cases[family] = self._drawn(family)
        most = self._study.recipe.eval.fusion.model_users if model else None
        return of_first_users(self._cases[family], most)

    def choosing(self, name: str, data: SplitDataset) -> SplitDataset:
        """Return what a baseline is fitted on; see `choosing`."""
        section = self._study.recipe.eval.fusion
        if not section.controls:
            return data
        if (id(data), name) not in self._choosing:
            self._choosing[id(data), name] = choosing(name, data, section.reserved)
        return self._choosing[id(data), name]

    def _drawn(self, family: str) -> list[Case]:
        study, section, own = self._study, self._study.recipe.eval.fusion, family_of(family)
        if not fusible(study, family):
            return []
        data = study.task_data(family)
        task = study.tasks[family]
        weighers = halves(data, section.reserved)[1].holdouts("valid")
        aside = study.set_aside(family)
        if own.ranks_for_users and study.candidates is not None:
            users = frozenset(weighers.first_users(MOST, but=aside))
            asked = replace(study, candidates=draw_sets(study.recipe, study.data, "valid", users))
            task = build_task(asked, family, study.section(family), study.templates[family], study.recipe.seed)
        try:
            able = task.cases("valid")
        except DataError as error:
            log.warning("%s: no fusion of the baselines: %s", family, error)
            return []
        cases = of_first_users(able, MOST, among=set(weighers.frame["user_id"].to_list()), but=aside)
        found = len({case.request.user_id for case in cases})
        if found < 2 * FOLDS:
            log.warning(
                "%s: no fusion of the baselines, which needs %d validation users to weigh it; there are %d",
                *(family, 2 * FOLDS, found),
            )
            return []
        return cases


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
    onto: Sequence[Weighed] = (),
    dissect: bool = True,
) -> CandidateFusion | Blend:
    """Fit a fusion of parts to the cases that weigh it.

    Args:
        name: Of its row.
        parts: Two or more, each with answers to all cases.
        cases: Validation cases; of yes/no answers with 1 or 0 as truth.
        answer: What the family answers with.
        onto: Fusions of some of the parts, onto which the others may be put; more cases may have weighed them.
        dissect: Say what is lost without each part.
    """
    found: CandidateFusion | Blend
    if answer is Ranking:
        found = CandidateFusion(name, [Voice(part.name, part, part.kind) for part in parts])
    else:
        found = Blend(name, [(part.name, part) for part in parts], judges=answer is Probability)
    found.fit(cases, dissect=dissect, onto=onto)
    return found


def bases_of(
    study: Study, family: str, parts: Sequence[Recalled], cases: Sequence[Case]
) -> list[CandidateFusion | Blend]:
    """Return the fusions of a family's baselines that join some of the parts and not all, onto which others may be put.

    Args:
        study: The study.
        family: A chosen family.
        parts: Baselines with answers to all cases, and others behind them.
        cases: All that weigh the baselines.
    """
    found: list[CandidateFusion | Blend] = []
    for kind in fusible(study, family) if cases else ():
        able = [part for part in parts if widest([part.reads, kind]) == kind]
        if len(able) < len(parts):
            found.append(join(FUSIONS[kind], able, cases, family_of(family).answer, onto=found, dissect=False))
    return found


def weights_of(model: Any) -> FusionWeights | None:
    """Return the weights of a fusion as records have them, None of any other model."""
    if not isinstance(model, Fusion | CandidateFusion | Blend):
        return None
    found = model.fitted
    low, high = found.low or (None,) * len(found.parts), found.high or (None,) * len(found.parts)
    losses = {each.name: {"loss": each.loss, "loss_low": each.low, "loss_high": each.high} for each in model.without}
    parts = [
        PartWeight(name=name, weight=weight, low=least, high=most, **losses.get(name, {}))
        for name, weight, least, most in zip(model.names, found.parts, low, high, strict=False)
    ]
    return FusionWeights(form=found.form, parts=tuple(parts), repeat=found.repeat or None)


def widest(reads: Sequence[Reads | None]) -> Reads:
    """Return what a joined row knows items by: what any of its parts does."""
    order = get_args(Reads)
    return max((each or order[0] for each in reads), key=order.index)


def kind_of(baseline: str) -> Kind:
    """Return how the scores of a baseline are read."""
    return lookup(BASELINES, baseline, "baseline").SCORES  # type: ignore[no-any-return]


def reads_of(baseline: str, parameters: Mapping[str, Any]) -> Reads:
    """Return what a baseline knows items by; one whose encoder was tuned on the interactions is a language model."""
    made = lookup(BASELINES, baseline, "baseline")
    align = parameters.get("align")
    told = Align.model_validate(align) if isinstance(align, Mapping) else None
    # Features are texts through a fixed encoder, whoever wrote them; a first stage that is only longer reads none.
    reads_texts = stores_of(baseline, parameters) or (told is not None and not told.longer)
    own = made.reads(config_of(baseline, parameters, "parameters"))
    known = widest(["texts", own]) if reads_texts else own
    encoder = str(parameters.get("encoder", LSA)) if told is None else told.encoder
    return "language model" if known == "texts" and encoder != LSA and learned_from(encoder) else known


def answers_of(said: Mapping[str, Json], records: Sequence[Prediction]) -> dict[str, Answer]:
    """Return answers by request id: those that are `remembered`, and those that a row's records hold."""
    known = {**said, **{record.request_id: json.loads(record.parsed) for record in records}}
    return {request: _answer(request, each) for request, each in known.items()}


def weighed_by(parts: Sequence[object], cases: Sequence[Case]) -> str:
    """Say what the row of a fusion was given."""
    users = len({case.request.user_id for case in cases})
    return f"what {len(parts)} rows answer, weighed by {users} users of the validation split"
