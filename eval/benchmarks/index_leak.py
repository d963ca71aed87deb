"""Shows how item numbers leak the answer, and that the indexes here do not: HR@5 of a rule that only counts on.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.index_leak eval/results/index_leak.json``, where FOLDER holds
``amazon14_beauty`` (docs/data.md, source ``sequences``). The rule guesses largest number + 1, last + 1, largest + 2,
and so on, skips what is in the history, and knows nothing else. Numbers in the order of *complete* sequences, as P5
published them, are built here as the negative example; nothing in llmrec can build them.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from llmrec.data.sets.table import load
from llmrec.data.split import SplitDataset, split
from llmrec.durable import write_json
from llmrec.index.numbers import user_order
from llmrec.index.table import ItemIndex
from llmrec.machine import machine, versions
from llmrec.pipeline.audit import code_arithmetic
from llmrec.pipeline.indexing import build_index
from llmrec.pipeline.leaks import redrawn
from llmrec.recipe.schema import DataSection, IndexSection, Split

PUBLISHED = {"HR@5": 0.0524, "of": "last id + 1 over P5's published Beauty files", "chance": 0.0004}
# Schemes with their settings; every one is built from training interactions alone.
SCHEMES = {
    "sequential, users in order": {"scheme": "sequential"},
    "sequential, shortest histories first": {"scheme": "sequential", "order": "shortest"},
    "sequential, longest histories first": {"scheme": "sequential", "order": "longest"},
    "sequential, users at random": {"scheme": "sequential", "order": "random"},
    "random": {"scheme": "random"},
    "collaborative": {"scheme": "collaborative"},
    "category": {"scheme": "category"},
    "semantic": {"scheme": "semantic"},
}


def leaky(data: SplitDataset) -> ItemIndex:
    """Number items by first appearance in complete sequences, the held-out end of each included."""
    histories = {
        held.user_id: [*(e.item_id for e in data.history(held.user_id, "test")), held.item_id]
        for held in data.holdouts("test")
    }
    order = dict.fromkeys(item for user in user_order(histories, "user", 0) for item in histories[user])
    rest = [item for item in sorted(data.dataset.items) if item not in order]
    return ItemIndex("leaky", {item: (str(n),) for n, item in enumerate([*order, *rest], 1)})


def main(target: Path) -> None:
    """Measure and write."""
    root = os.environ.get("LLMREC_DATA")
    if not root:
        raise SystemExit("name the folder that holds amazon14_beauty: LLMREC_DATA=FOLDER")
    source = DataSection(source="sequences", path=str(Path(root) / "amazon14_beauty"))
    data = split(load(source, seed=0), Split(), seed=0)
    moved = redrawn(redrawn(data, "valid"), "test")
    rows = {"numbers of complete sequences (leaky)": _row(leaky(data), leaky(moved), data, 0.0)}
    for name, settings in SCHEMES.items():
        section = IndexSection.model_validate(settings)
        begin = time.perf_counter()
        index = build_index(section, data, seed=0)
        rows[name] = _row(index, build_index(section, moved, seed=0), data, time.perf_counter() - begin)
    result = {
        "command": "LLMREC_DATA=FOLDER python -m eval.benchmarks.index_leak eval/results/index_leak.json",
        "what": "HR@5 of counting on from the codes of the history; Amazon 2014 Beauty, leave-one-out, full ranking",
        "items": len(data.dataset.items),
        "users": len(data.holdouts("test")),
        "published": PUBLISHED,
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(target, result)
    for name, row in rows.items():
        sys.stdout.write(
            f"{name:<40} HR@5 {row['HR@5']:.4f}  chance {row['chance']:.4f}  invariant {row['invariant']}\n"
        )


def _row(index: ItemIndex, again: ItemIndex, data: SplitDataset, seconds: float) -> dict[str, object]:
    figures = code_arithmetic(index, data, "test").figures
    return {
        "HR@5": figures["HR@5"],
        "chance": figures["chance"],
        "invariant": index.digest == again.digest,
        "seconds_both_builds": round(seconds, 2),
        "sha256": index.digest,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
