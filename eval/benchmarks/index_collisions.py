"""Builds every scheme on three catalogues and counts what must not be there.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.index_collisions eval/results/index_collisions.json
docs/indexes.md``, where FOLDER holds ``amazon14_beauty`` and ``amazon14_toys``; MovieLens-100K comes from its
wheel. Writes the table into the page too, and that of ``index_leak.json`` beside the result.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from llmrec.data.sets.table import load
from llmrec.data.split import SplitDataset, split
from llmrec.durable import write_json, write_text
from llmrec.index.diagnostics import diagnose
from llmrec.index.table import ItemIndex, build
from llmrec.machine import machine, versions
from llmrec.models.text_encoder import text_embedder
from llmrec.recipe.schema import DataSection, IndexSection, Split

SCHEMES: dict[str, dict[str, Any]] = {
    "title": {"scheme": "title"},
    "random": {"scheme": "random"},
    "sequential": {"scheme": "sequential"},
    "token": {"scheme": "token"},
    "collaborative": {"scheme": "collaborative"},
    "collaborative, item token": {"scheme": "collaborative", "item_token": True},
    "semantic, extra level": {"scheme": "semantic"},
    "semantic, last level": {"scheme": "semantic", "semantic": {"repair": "last_level"}},
    "semantic, item token": {"scheme": "semantic", "item_token": True},
    "category": {"scheme": "category"},
}


def catalogues() -> dict[str, SplitDataset]:
    """Return the three sets, split by leave-one-out."""
    root = os.environ.get("LLMREC_DATA")
    if not root:
        raise SystemExit("name the folder that holds amazon14_beauty and amazon14_toys: LLMREC_DATA=FOLDER")
    sources = {
        "Beauty": DataSection(source="sequences", path=str(Path(root) / "amazon14_beauty")),
        "Toys": DataSection(source="sequences", path=str(Path(root) / "amazon14_toys")),
        "MovieLens-100K": DataSection(source="movielens-100k"),
    }
    return {name: split(load(section, seed=0), Split(), seed=0) for name, section in sources.items()}


def row(index: ItemIndex, seconds: float) -> dict[str, Any]:
    """Return what an index is like."""
    found = diagnose(index)
    return {
        "items": len(index.codes),
        "tokens": len(index.tokens),
        "collisions_before": index.figures.get("collisions"),
        "collisions_after": found.duplicates,
        "codes_that_begin_another": found.begun,
        "seconds": round(seconds, 2),
        "sha256": index.digest,
    }


def main(target: Path, page: Path) -> None:
    """Build, count and write."""
    embed, rows = text_embedder("all-MiniLM-L6-v2"), {}
    for name, data in catalogues().items():
        embed([f"warm up {name}"])
        rows[name] = {}
        for scheme, settings in SCHEMES.items():
            section = IndexSection.model_validate(settings)
            if section.scheme == "semantic":
                # Vectors are made once and remembered; what is timed is the index.
                build(section, data, seed=0, embed=embed)
            begin = time.perf_counter()
            index = build(section, data, seed=0, embed=embed)
            rows[name][scheme] = row(index, time.perf_counter() - begin)
            sys.stdout.write(f"{name} {scheme}: {rows[name][scheme]}\n")
    result = {
        "command": "LLMREC_DATA=FOLDER make bench NAME=index-leak",
        "what": "every scheme on three catalogues: items that share a code, and codes that begin another",
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(target, result)
    put(page, "collisions", collisions_table(rows))
    leaks = json.loads(target.with_name("index_leak.json").read_text(encoding="utf-8"))
    put(page, "leak", leak_table(leaks))


def put(page: Path, name: str, table: str) -> None:
    """Write a table between its two marks."""
    start, end = f"<!-- {name}:table -->", f"<!-- /{name}:table -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    write_text(page, f"{before}{start}\n\n{table}\n\n{end}{rest.partition(end)[2]}")


def collisions_table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the table in Markdown."""
    names = list(rows)
    lines = [f"| Scheme | {' | '.join(f'{n}: tokens, shared before → after, seconds' for n in names)} |"]
    lines.append("|" + "---|" * (len(names) + 1))
    for scheme in next(iter(rows.values())):
        cells = [_cell(rows[name][scheme]) for name in names]
        lines.append(f"| {scheme} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    before = found["collisions_before"]
    shared = "–" if before is None else f"{before:.1%}".replace("%", " %")
    return f"{found['tokens']:,}, {shared} → {found['collisions_after']}, {found['seconds']:.1f}"


def leak_table(result: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| Item IDs | HR@5 of the counting rule | Same rule over random IDs | Same bytes without held-out data |",
        "|---|---|---|---|",
    ]
    for name, found in result["rows"].items():
        lines.append(
            f"| {name} | {found['HR@5']:.4f} | {found['chance']:.4f} | {'yes' if found['invariant'] else 'no'} |"
        )
    said = result["published"]
    lines.append(f"| published: {said['of']} | {said['HR@5']:.4f} | {said['chance']:.4f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
