"""Which row of a run is served where nobody says: the one with the best figure on validation users.

Every row is judged by the validation users that weigh fusions, who chose no parameter and no epoch of it: a fusion by
its cross-fitted figure, each user under weights that the user had no part in. Test users are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from llmrec.metrics.ranking import ndcg, standing
from llmrec.pipeline.fusion.parts import answers_of
from llmrec.results import Choice, Row
from llmrec.strategies.fusion_weights import CUT
from llmrec.tasks.family import ranking_families
from llmrec.types import Case, Ranking


class Answered(Protocol):
    """A finished row with what it answered validation users; see `llmrec.pipeline.evaluation.ResultRow`."""

    @property
    def figures(self) -> Row:
        """What the report says of it."""
        ...

    @property
    def weighing(self) -> Mapping[str, Any]:
        """What it said to the users that weigh fusions, by request id."""
        ...

    @property
    def validation(self) -> Mapping[str, float]:
        """Of a fusion its cross-fitted figure for their cases, by request id."""
        ...


# What can be served: classic recommenders, and the model that the run tuned.
_ARMS = ("baseline", "tuned")
# Figures that differ by less are those of one list, computed in two ways.
_SAME = 9


def chosen(rows: Sequence[Answered], cases: Mapping[str, Sequence[Case]]) -> Choice | None:
    """Return the row to serve, of the first family that ranks and has rows that validation users judged.

    Of equal rows it is the first, and a single recommender goes before a fusion. A fusion that is one of its parts
    alone is that part, and no choice.

    Args:
        rows: Of a run.
        cases: The cases of validation users that weigh fusions, by family.

    Returns:
        The choice; None where nobody weighs.
    """
    for family in ranking_families():
        able = [row for row in rows if row.figures.task == family and row.figures.arm in _ARMS and not _is_part(row)]
        judged = {row.figures.id: found for row in able if (found := validated(row, cases.get(family, ())))}
        common = set.intersection(*(set(found) for found in judged.values())) if judged else set()
        if not common:
            continue
        # Users who say nothing about one row say nothing about any: all are judged by the same ones.
        figures = {name: float(np.mean([found[each] for each in sorted(common)])) for name, found in judged.items()}
        single = {row.figures.id for row in able if row.figures.fusion is None}
        order = sorted(figures, key=lambda name: name not in single)
        best = max(order, key=lambda name: round(figures[name], _SAME))
        users = {case.request.user_id for case in cases[family] if case.request.id in common}
        return Choice(row=best, metric=f"NDCG@{CUT}", value=figures[best], users=len(users), figures=figures)
    return None


def validated(row: Answered, cases: Sequence[Case]) -> Mapping[str, float]:
    """Return NDCG@10 of a row for each validation case that it answered, by request id."""
    if row.figures.fusion is not None:
        return row.validation
    answers = answers_of(row.weighing, ())
    known = [case for case in cases if case.request.id in answers]
    if not known:
        return {}
    found = []
    for case in known:
        answer = answers[case.request.id]
        items = answer.items if isinstance(answer, Ranking) else ()
        ranking = answer if isinstance(answer, Ranking) else Ranking(request_id=case.request.id, items=(), scores=())
        found.append(standing(ranking, str(case.truth), max(len(items), len(case.request.candidates or ()))))
    greater, tied = (np.array([getattr(each, name) for each in found], dtype=np.int64) for name in ("greater", "tied"))
    values = ndcg(greater, tied, CUT)
    return {case.request.id: float(value) for case, value in zip(known, values, strict=True)}


def _is_part(row: Answered) -> bool:
    return row.figures.fusion is not None and row.figures.fusion.form == "alone"
