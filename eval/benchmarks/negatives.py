"""Measures the leak of training negatives that avoid held-out items, and that llmrec's negatives do not leak.

``python -m eval.benchmarks.negatives eval/results/negatives.json``. A rule without history and item features counts
how often each item was a user's negative in training, and ranks the stored candidates by ascending count. Sampling that
avoids held-out items is implemented here as the negative example; llmrec does not support it.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.benchmarks.provenance import provenance
from llmrec.data.candidates import sample_candidates
from llmrec.data.sets.table import load_data
from llmrec.data.split import SplitDataset, request_id, split_dataset
from llmrec.durable import write_json
from llmrec.recipe.schema import CandidateSection, DataSection, Split
from llmrec.tasks.base import seeded_random
from llmrec.tasks.pool import NegativeSampler

COUNT = 20
"""Number of candidates of a request, and of a training example."""
ROWS = (20, 100, 200, 400)
"""Training examples per user."""


class Knowing(NegativeSampler):
    """Samples items that a user has in no split, so that a held-out item is never a negative."""

    def __init__(self, data: SplitDataset, kind: str) -> None:
        """Store all interactions, including held-out ones."""
        super().__init__(data, kind)
        self._interactions = data.dataset.interactions

    @cached_property
    def _trained(self) -> Mapping[str, frozenset[str]]:
        by_user = self._interactions.group_by("user_id").agg("item_id").iter_rows()
        return {user: frozenset(items) for user, items in by_user}


def chance(count: int) -> float:
    """Return the NDCG@10 of candidates in random order."""
    return sum(1 / math.log2(2 + rank) for rank in range(10)) / count


def ndcg(items: Sequence[str], target: str, shown: Mapping[str, int]) -> float:
    """Return the NDCG@10 of candidates ranked by ascending number of uses as negatives, in expectation over ties."""
    above = sum(shown[item] < shown[target] for item in items)
    level = sum(shown[item] == shown[target] for item in items)
    return sum(1 / math.log2(2 + rank) for rank in range(above, above + level) if rank < 10) / level


def attacked(
    data: SplitDataset, negatives: NegativeSampler, rows: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield numbers of training examples per user with the rule's NDCG@10, one value per held-out interaction."""
    sets = sample_candidates(data, "test", CandidateSection(count=COUNT), seed=0).sets
    held = data.holdouts("test")
    shown: dict[str, Counter[str]] = defaultdict(Counter)
    for number in range(1, max(rows) + 1):
        for user in data.train["user_id"].unique().sort():
            rng = seeded_random("negatives", 0, str(number), user)
            shown[user].update(negatives.draw(user, COUNT - 1, rng))
        if number in rows:
            values = [ndcg(sets[request_id(h.user_id, h.item_id)], h.item_id, shown[h.user_id]) for h in held]
            yield number, np.array(values)


def main(target: Path) -> None:
    """Measure and write."""
    data = split_dataset(load_data(DataSection(source="movielens-100k"), seed=0), Split(), seed=0)
    draws = {"training": NegativeSampler(data, "uniform"), "all splits": Knowing(data, "uniform")}
    rows = []
    for name, negatives in draws.items():
        for number, values in attacked(data, negatives, ROWS):
            mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
            rows.append({"without": name, "rows": number, "NDCG@10": mean, "low": mean - half, "high": mean + half})
            sys.stdout.write(f"without {name:<10} {number:>4} rows a user: {mean:.4f} ± {half:.4f}\n")
    result = {
        "command": "python -m eval.benchmarks.negatives eval/results/negatives.json",
        "what": "NDCG@10 of ranking candidates by how seldom rows showed them as negatives; MovieLens-100K, test split",
        "users": len(data.holdouts("test")),
        "candidates": COUNT,
        "chance": chance(COUNT),
        "rows": rows,
        **provenance(),
    }
    write_json(target, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
