"""The reward of rollouts: a weighted sum of terms, each computed from a group of items and the true item."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmrec.decode.token_tree import TokenTrie
from llmrec.recipe.schema import RewardKind
from llmrec.tasks.base import user_item_pairs
from llmrec.tasks.task import Task
from llmrec.types import Case, CatalogueScorer, Event, Example, Ranking, Segment


@dataclass(frozen=True)
class Rewards:
    """Computes the rewards of a group of items, which are ordered by likelihood.

    Attributes:
        kinds: Terms and their weights.
        task: The task whose `Task.reward` scores a list.
        items: The catalogue's items, in the order of its paths.
        catalogue: Their paths.
        closing: The number of tokens that end every path and are not part of its code, such as a line break.
        scorer: For `percentile`: a baseline recommender.
    """

    kinds: Mapping[RewardKind, float]
    task: Task
    items: Sequence[str]
    catalogue: TokenTrie
    closing: int = 0
    scorer: CatalogueScorer | None = None

    def of(self, case: Case, indices: Sequence[int]) -> list[float]:
        """Return the total reward of each item of a group, by distinct catalogue indices, the most likely first."""
        terms: dict[RewardKind, Callable[[Case, Sequence[int]], Sequence[float]]] = {
            "hit": self._hit,
            "ndcg": self._ndcg,
            "rank-penalty": self._rank_penalty,
            "prefix": self._prefix,
            "percentile": self._percentile,
        }
        result = np.zeros(len(indices))
        for kind, weight in self.kinds.items():
            result += weight * np.array(terms[kind](case, indices))
        return [float(value) for value in result]

    def _listed(self, case: Case, indices: Sequence[int]) -> float:
        items = tuple(self.items[index] for index in indices)
        scores = tuple(float(-n) for n in range(len(items)))
        return self.task.reward(Ranking(request_id=case.request.id, items=items, scores=scores), case)

    def _hit(self, case: Case, indices: Sequence[int]) -> list[float]:
        """Return the reward ``hit``: 1 for the true item, otherwise 0."""
        return [self._listed(case, [index]) for index in indices]

    def _ndcg(self, case: Case, indices: Sequence[int]) -> list[float]:
        """Return how much each item lowers the NDCG of the list; negative for items ranked above the true item.

        The NDCG itself is the same for all items of a group.
        """
        ndcg = self._listed(case, indices)
        return [ndcg - self._listed(case, [*indices[:n], *indices[n + 1 :]]) for n in range(len(indices))]

    def _rank_penalty(self, case: Case, indices: Sequence[int]) -> list[float]:
        """Return 0 for the true item, and for others a penalty that decreases with rank (MiniOneRec, arXiv 2510.24431).

        In a group without the true item, all rewards are 0.
        """
        hits = self._hit(case, indices)
        if max(hits) <= 0:
            return [0.0] * len(indices)
        discounts = [1 / math.log2(2 + n) for n in range(len(indices))]
        return [0.0 if hit > 0 else -item / sum(discounts) for hit, item in zip(hits, discounts, strict=True)]

    def _prefix(self, case: Case, indices: Sequence[int]) -> list[float]:
        """Return the relative length of the prefix that each code shares with the true code."""
        truth = self._code(self.items.index(str(case.truth)))
        results = []
        for index in indices:
            code = self._code(index)
            pairs = zip(code, truth, strict=False)
            shared = next((n for n, (one, two) in enumerate(pairs) if one != two), min(len(code), len(truth)))
            results.append(shared / max(len(code), len(truth)))
        return results

    def _code(self, index: int) -> tuple[int, ...]:
        path = self.catalogue.path(int(self.catalogue.ranks[index]))
        return path[: len(path) - self.closing]

    def _percentile(self, case: Case, indices: Sequence[int]) -> list[float]:
        """Return the share of the catalogue that a baseline scores lower than each item; ties count half."""
        assert self.scorer is not None
        (scores,) = np.asarray(self.scorer.scores([case.request]))
        column = {item: n for n, item in enumerate(self.scorer.items)}
        values = np.array([scores[column[self.items[index]]] for index in indices])
        below = (scores < values[:, None]).sum(axis=1) + 0.5 * ((scores == values[:, None]).sum(axis=1) - 1)
        return [float(value) for value in below / max(len(scores) - 1, 1)]


def closing_token_count(catalogue: TokenTrie) -> int:
    """Return 1 if all token paths of a catalogue end with the same token, otherwise 0.

    Other shared tokens may be a level of the codes.
    """
    paths = [catalogue.path(rank) for rank in range(len(catalogue))]
    return int(min(map(len, paths)) > 1 and len({path[-1] for path in paths}) == 1)


# Training interactions as questions in evaluation form: the prompt of a request, with its answer as target.


def training_question(task: Task, case: Case, template: str) -> Example:
    """Return a training question with its answer in the form used for evaluation."""
    request, truth = case.request, str(case.truth)
    prompt = task.prompt(request, template=template)
    (text,) = task.continuations(replace(request, candidates=(truth,)), template=template)
    stop = (Segment("target", prompt.stop),) if prompt.stop else ()
    return Example(
        id=request.id,
        user_id=request.user_id,
        task=task.family,
        template=f"{task.family}/{template}",
        messages=prompt.messages,
        answer=(*prompt.answer_prefix, Segment("target", text), *stop),
        ends_turn=prompt.stop is None,
        pairs=user_item_pairs(request.user_id, (*request.history, Event(item_id=truth))),
    )
