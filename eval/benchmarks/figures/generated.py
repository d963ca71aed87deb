"""Pages, parts of pages and pictures that are written from committed results, as their generators write them now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.benchmarks import experiments, performance, record
from llmrec.bench import leaderboard
from llmrec.bench.pages import own_pages, read_results
from llmrec.bench.references import all_references

TIMED = ("search", "search_vllm", "training")
"""Results that docs/performance.md shows."""


def wanted(root: Path) -> dict[str, str]:
    """Return the content of everything that is generated, by its place in the checkout.

    The command-line reference is not among it: a test asks the program for that.

    Args:
        root: A checkout, whose results are read; around generated parts its pages are kept as they are.
    """
    results = root / "eval" / "results"
    benchmarks = read_results(results)
    references = all_references(root / "eval" / "references")
    pages = leaderboard.beside(results, references)
    for result in benchmarks:
        pages |= own_pages(result, references)
    found = {f"eval/{name}": text for name, text in pages.items()}
    found["eval/EXPERIMENTS.md"] = experiments.write(experiments.read(results))
    parts = {
        "docs/performance.md": {"performance:figures": performance.page([results / f"{name}.json" for name in TIMED])},
        "README.md": {"quickstart:table": record.table(_read(results / "quickstart.json"))},
        "docs/results.md": {"quickstart:screen": record.screen(_read(results / "quickstart.json"))},
    }
    for name, own in parts.items():
        text = (root / name).read_text(encoding="utf-8")
        for mark, part in own.items():
            text = _put(text, mark, part)
        found[name] = text
    return found


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _put(text: str, mark: str, part: str) -> str:
    """Return a page with what stands between two marks replaced; as it was if it has none."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, found, rest = text.partition(start)
    return f"{before}{start}\n\n{part}\n\n{end}{rest.partition(end)[2]}" if found else text
