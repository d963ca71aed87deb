"""Fusion: several rankers become one, with weights from validation users whom no part was tuned on.

Two forms of one question, how likely is each item to be the next:

- a conditional logit, ``p(j) = softmax_j(sum_k w_k z_kj)`` over what the parts say of the items (McFadden, 1974):
  weights are exponents, and one below 0 says that a part goes too far in what another says too;
- a linear pool, ``p(j) = sum_k w_k p_k(j)`` with weights that sum to 1 (Jelinek and Mercer, 1980): a part that gives
  an item nothing cannot veto it.

Both are fitted by maximum likelihood. Likelihood is not NDCG, so the form is chosen by NDCG on users that the weights
do not know, cross-fitted over users, and every part alone is a form too: on validation no fusion is below its best
part. Where items of the history can be ranked, such an item has one more weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.errors import LlmrecError
from llmrec.strategies.fusion_cases import Known
from llmrec.strategies.fusion_weights import CELLS, Kind, Tried, combined
from llmrec.strategies.weighed import Weighed
from llmrec.types import Case, CatalogueScorer, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """One of the rankers.

    Attributes:
        name: In tables.
        scorer: Fitted; scores the catalogue.
        kind: How its scores are read.
    """

    name: str
    scorer: CatalogueScorer
    kind: Kind


class Fusion(Weighed):
    """Ranks the catalogue by several rankers at once; it is a `CatalogueScorer`."""

    def __init__(self, name: str, parts: Sequence[Part], *, filtered: bool) -> None:
        """Set up.

        Args:
            name: Of the row.
            parts: The rankers, over one catalogue in one order.
            filtered: Items of the history cannot be ranked.

        Raises:
            LlmrecError: If there are fewer than two parts, or they have different catalogues.
        """
        if len(parts) < 2 or any(part.scorer.items != parts[0].scorer.items for part in parts):
            raise LlmrecError(f"{name}: a fusion needs two or more parts over one catalogue", kind="mismatch")
        super().__init__(name)
        self.parts, self.filtered = tuple(parts), filtered

    @property
    def items(self) -> tuple[str, ...]:
        """The catalogue in column order."""
        return self.parts[0].scorer.items

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parts."""
        return tuple(part.name for part in self.parts)

    def fit(self, cases: Sequence[Case], *, dissect: bool = False, only: Tried | None = None) -> None:
        """Fit the weights of every form, and keep the best form by cross-fitted NDCG@10.

        Args:
            cases: Validation cases of users that no part has learned from or was chosen by.
            dissect: Fit the best form once more without each part, for the attribute ``without``.
            only: The form to fit, where it was chosen before: with another seed of the parts.

        Raises:
            LlmrecError: If a part says that one of these users has chosen its parameters or its epoch.
            LlmrecError: If there are too few users to fit weights on all but a fifth of them.
        """
        self._refuse([(part.name, part.scorer) for part in self.parts], cases)
        self._choose(_known(self, cases), [case.request.user_id for case in cases], dissect=dissect, only=only)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.float64]:
        """Return log-probabilities, shape (n, items); see `CatalogueScorer.scores`."""
        # A part without a weight is not asked.
        raw = [
            np.asarray(part.scorer.scores(requests)) if weight else np.empty(0)
            for part, weight in zip(self.parts, self.fitted.parts, strict=True)
        ]
        kinds, had = [part.kind for part in self.parts], _history(self, requests)
        return np.asarray(combined(self.fitted, raw, kinds, had, had if self.filtered else None), dtype=np.float64)


def _known(fusion: Fusion, cases: Sequence[Case]) -> Known:
    requests = [case.request for case in cases]
    column = {item: place for place, item in enumerate(fusion.items)}
    truth = np.array([column[str(case.truth)] for case in cases])
    had = _history(fusion, requests)
    if fusion.filtered:
        had[np.arange(len(truth)), truth] = False
    block = max(1, CELLS // len(fusion.items))
    raw = [
        np.concatenate(
            [
                np.asarray(part.scorer.scores(requests[start : start + block]), dtype=np.float32)
                for start in range(0, len(requests), block)
            ]
        )
        for part in fusion.parts
    ]
    out = had if fusion.filtered else None
    return Known(raw, [part.kind for part in fusion.parts], had, truth, out, not fusion.filtered)


def _history(fusion: Fusion, requests: Sequence[Request]) -> NDArray[np.bool_]:
    column: Mapping[str, int] = {item: place for place, item in enumerate(fusion.items)}
    had = np.zeros((len(requests), len(column)), dtype=bool)
    for row, request in enumerate(requests):
        had[row, [column[event.item_id] for event in request.history if event.item_id in column]] = True
    return had
