"""Shows how negatives that avoid held-out items tell the answer, and that those of training rows do not.

``python -m eval.benchmarks.negatives eval/results/negatives.json``. The rule knows no history and no item: it counts
how often training rows showed each item to a user as a negative, and ranks the stored candidates by how seldom. Draws
that know what is held out are built here as the negative example; nothing in llmrec can make them.
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
from llmrec.data.candidates import draw
from llmrec.data.sets.table import load
from llmrec.data.split import SplitDataset, request_id, split
from llmrec.durable import write_json
from llmrec.recipe.schema import CandidateSection, DataSection, Split
from llmrec.tasks.base import keyed
from llmrec.tasks.pool import Negatives

COUNT = 20
"""Candidates of a request, and of a training row."""
ROWS = (20, 100, 200, 400)
"""Training rows a user."""


class Knowing(Negatives):
    """Draws items that a user has had in no split, so that a held-out item is never shown as a negative."""

    def __init__(self, data: SplitDataset, kind: str) -> None:
        """Remember all interactions, held-out ones among them."""
        super().__init__(data, kind)
        self._whole = data.dataset.interactions

    @cached_property
    def _trained(self) -> Mapping[str, frozenset[str]]:
        by_user = self._whole.group_by("user_id").agg("item_id").iter_rows()
        return {user: frozenset(items) for user, items in by_user}


def chance(count: int) -> float:
    """Return the NDCG@10 of candidates in random order."""
    return sum(1 / math.log2(2 + rank) for rank in range(10)) / count


def ndcg(items: Sequence[str], target: str, shown: Mapping[str, int]) -> float:
    """Return the NDCG@10 of candidates ranked by how seldom they were shown, in expectation over ties."""
    above = sum(shown[item] < shown[target] for item in items)
    level = sum(shown[item] == shown[target] for item in items)
    return sum(1 / math.log2(2 + rank) for rank in range(above, above + level) if rank < 10) / level


def attacked(
    data: SplitDataset, negatives: Negatives, rows: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield numbers of rows a user and what the rule then reaches, a value a held-out interaction."""
    sets = draw(data, "test", CandidateSection(count=COUNT), seed=0).sets
    held = data.holdouts("test")
    shown: dict[str, Counter[str]] = defaultdict(Counter)
    for number in range(1, max(rows) + 1):
        for user in data.train["user_id"].unique().sort():
            rng = keyed("negatives", 0, str(number), user)
            shown[user].update(negatives.draw(user, COUNT - 1, rng))
        if number in rows:
            found = [ndcg(sets[request_id(h.user_id, h.item_id)], h.item_id, shown[h.user_id]) for h in held]
            yield number, np.array(found)


def main(target: Path) -> None:
    """Measure and write."""
    data = split(load(DataSection(source="movielens-100k"), seed=0), Split(), seed=0)
    draws = {"training": Negatives(data, "uniform"), "all splits": Knowing(data, "uniform")}
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
