"""Rankings of a model joined with those of classic recommenders, as a run weighed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmrec.answer.naming import Naming
from llmrec.answer.strategy import Asking
from llmrec.baselines.fits import fitted
from llmrec.baselines.parameters import hashes_of
from llmrec.data.requests import RankRequest
from llmrec.data.split import SplitDataset
from llmrec.errors import RecipeError
from llmrec.pipeline.bundle import Bundle
from llmrec.pipeline.fusion.parts import Recalled, choosing
from llmrec.pipeline.fusion.stored import Fused, FusedPart, read
from llmrec.strategies.candidate_fusion import CandidateFusion, Voice
from llmrec.types import Answer, Item, Predictor, Ranking, Unparsed


def fusion_of(bundle: Bundle, way: Asking, joined: str) -> Fused:
    """Return the fusion that a run weighed for a way of asking.

    Args:
        bundle: The model.
        way: How requests are put.
        joined: ``model``: the fusion with the language model's row; ``baselines``: that of the baselines alone.

    Raises:
        RecipeError: If there is none; the message says how to get one.
    """
    folder = bundle.run or Path(bundle.folder)
    own = [each for each in read(folder).fusions if each.family == way.family]
    found = [each for each in own if (each.arm == "baseline") == (joined == "baselines")]
    if joined == "model":
        name = bundle.templates[way.family][way.template].id
        asked = [each for each in found if each.template == name and each.parts[-1].name == way.strategy]
        found = [each for each in asked if each.arm == ("tuned" if bundle.tuned else "zero-shot")]
    if found:
        # Of the fusions of baselines the last one joins the most.
        return found[-1]
    known = ", ".join(each.id for each in own) or "none"
    more = "eval.fusion.model_users=200 and " if joined == "model" else ""
    raise RecipeError(
        f"--fuse {joined}: {folder} holds no such fusion of {way.family} under {way.strategy} (it holds: {known}); "
        f"evaluate its recipe with {more}eval.fusion.controls=true",
        kind="missing-value",
        at=folder,
        column="--fuse",
    )


class Fuser:
    """Joins rankings; its baselines are fitted when the first request needs them.

    Args:
        fused: What a run weighed.
        data: What its baselines learn from; held-out interactions stay out.
    """

    def __init__(self, fused: Fused, data: SplitDataset) -> None:
        self._fused, self._data, self._naming = fused, data, Naming(data)
        self._baselines: dict[str, Predictor] = {}

    @property
    def asks_model(self) -> bool:
        """Whether a language model is one of the parts."""
        return any(part.baseline is None for part in self._fused.parts)

    def seen(self, request: RankRequest) -> frozenset[str]:
        """Return the items of a request's history under the data's ids."""
        return frozenset(event.item_id for event in self._naming.known(request)[0])

    def strange(self, request: RankRequest) -> list[str]:
        """Return the names of the items of a request's history that the data does not have."""
        return self._naming.strange(request)

    def knows(self, item: Item) -> bool:
        """Whether the data has an item, under its id or its title."""
        return self._naming.has(item)

    @property
    def identity(self) -> dict[str, object]:
        """Everything that decides how rankings are joined."""
        parts = [part for part in self._fused.parts if part.baseline is not None]
        read = [hashes_of(str(part.baseline), part.parameters) for part in parts]
        return {"fused": self._fused.model_dump(mode="json"), "data": self._data.fingerprint, "read": read}

    def join(
        self, requests: Sequence[RankRequest], ranked: Sequence[Ranking | Unparsed] | None
    ) -> list[Ranking | Unparsed]:
        """Return the joined rankings, with the cost of the model's.

        Args:
            requests: What was asked.
            ranked: What the model answered; None where it is no part.
        """
        asked = [self._naming.request(request) for request in requests]
        answers: dict[str, Answer] = {}
        for n, each in enumerate(ranked or ()):
            answers[str(n)] = self._naming.answered(each, requests[n]) if isinstance(each, Ranking) else each
        # A language model reads the title of an item that no table has.
        parts = [
            Voice(
                part.name,
                self._predictor(part, answers),
                part.kind,
                self._data.dataset.items if part.baseline else None,
            )
            for part in self._fused.parts
        ]
        fusion = CandidateFusion(self._fused.id, parts, self._fused.weights())
        numbered = [replace(request, id=str(n)) for n, request in enumerate(asked)]
        found: list[Ranking | Unparsed] = []
        for n, answer in enumerate(fusion.answer(numbered)):
            given = ranked[n] if ranked else None
            if isinstance(given, Unparsed):
                found.append(given)
            elif isinstance(answer, Ranking):
                back = self._naming.back(answer, requests[n])
                found.append(back if given is None else replace(back, raw=given.raw, cost=given.cost))
            else:
                found.append(Unparsed(request_id=requests[n].id, reason="there is nothing to rank"))
        return found

    def _predictor(self, part: FusedPart, answers: dict[str, Answer]) -> Predictor:
        if part.baseline is None:
            return Recalled(part.name, "language model", part.kind, answers)
        if part.name not in self._baselines:
            data = choosing(part.baseline, self._data, self._fused.reserved)
            self._baselines[part.name] = fitted(part.baseline, part.parameters, data, seed=self._fused.seed)
        return self._baselines[part.name]
