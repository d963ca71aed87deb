"""Pages and parts of pages that are generated from results, definitions of data sets and the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks import lines_of_code, negative, performance, record
from eval.benchmarks.figures import chart, model_size
from eval.benchmarks.figures.parts import put
from eval.benchmarks.gpu import __main__ as gpu_check
from llmrec.bench import leaderboard
from llmrec.bench.pages import benchmark_pages, read_benchmark_results
from llmrec.bench.references import read_references
from llmrec.data.sets.pages import KnownFormat, Layout, known_formats
from llmrec.registry import METRICS, SOURCES
from llmrec.report.table import markdown_table

PUBLISHED = "llmrec.data.sets.published:load_published"
"""The loader of most published data sets."""

TIMED = ("search", "search_vllm", "training")
"""Results that eval/PERFORMANCE.md shows."""
_KINDS = {"ranking": "rankings", "lists": "lists", "rating": "ratings", "probability": "yes/no", "text": "texts"}


def generated_pages(root: Path) -> dict[str, str]:
    """Return the content of all generated files, by path in the checkout.

    The command-line reference is not included; another test compares it.

    Args:
        root: A checkout with results and pages; pages change only in generated parts.
    """
    results = root / "eval" / "results"
    benchmarks = read_benchmark_results(results)
    references = read_references(root / "eval" / "references")
    pages = leaderboard.leaderboard_pages(results, references)
    for result in benchmarks:
        pages |= benchmark_pages(result, references)
    files = {f"eval/{name}": text for name, text in pages.items()}
    files[chart.NAME] = chart.chart(json.loads(pages[leaderboard.DATA]))
    files[model_size.NAME] = model_size.chart(_read(results / "encoder_tuning.json")["variants"])
    files[negative.PAGE] = negative.write(root)
    files[lines_of_code.PAGE] = lines_of_code.page(root)
    board = leaderboard.read_leaderboard_config(root / "eval")
    assert board is not None
    matrix = leaderboard.featured(board, next(leaderboard.leaderboard_tables(board, benchmarks, references)))
    parts = {
        "eval/PERFORMANCE.md": {"performance:figures": performance.page([results / f"{name}.json" for name in TIMED])},
        "docs/evaluation-protocol-and-metrics.md": {"metrics:table": _metrics()},
        "README.md": {"leaderboard:matrix": leaderboard.short_table(matrix, "eval/")},
        "docs/quickstart.md": {
            "quickstart:screen": record.screen(_read(results / "quickstart.json")),
            record.PART: record.table(_read(results / "quickstart.json")),
        },
        "docs/install.md": {"gpu:checks": gpu_check.table(gpu_check.stored(root / gpu_check.RESULT))},
        "docs/datasets-and-output-files.md": {"datasets:published": data_sets(known_formats())},
        "docs/serving.md": {"serving:endpoints": endpoints(_read(root / "docs" / "openapi.json"))},
    }
    for name, own in parts.items():
        text = (root / name).read_text(encoding="utf-8")
        for mark, part in own.items():
            text = put(text, mark, part)
        files[name] = text
    return files


def data_sets(known: Sequence[KnownFormat]) -> str:
    """Return the table of published data sets, and a list of their terms.

    Args:
        known: Their definitions.
    """
    head = ("`data.source`", "Files", "Users / items / interactions", "Rating", "Time", "Text", "Fields")
    terms: dict[str, list[str]] = {}
    for each in known:
        terms.setdefault(each.licence, []).append(f"`{each.name}`")
    listed = [f"- {', '.join(names)}: {licence}." for licence, names in terms.items()]
    return "\n".join([markdown_table(head, [_data_set(each) for each in known], numeric_from=len(head)), "", *listed])


def _data_set(known: KnownFormat) -> list[str]:
    layouts = known.layouts
    fields = dict.fromkeys(each.name for one in layouts if one.items for each in one.items.attributes)
    people = dict.fromkeys(each.name for one in layouts if one.people for each in one.people.attributes)
    columns = [*([", ".join(fields)] if fields else []), *([f"of users: {', '.join(people)}"] if people else [])]
    # MIND, a data set with a separate loader, has times that only order its interactions.
    time = _some(layouts, "time") if SOURCES[known.name] == PUBLISHED else "order only"
    return [
        f"[`{known.name}`]({known.page})",
        known.fetch,
        _counts(known),
        f"{known.scale[0]:g} to {known.scale[1]:g}" if known.scale and _some(layouts, "rating") != "–" else "–",
        time,
        _some(layouts, "texts"),
        "; ".join(columns) or "–",
    ]


def _some(layouts: Sequence[Layout], column: str) -> str:
    """Return whether all, some or none of the variants of a data set have a column."""
    match = {bool(getattr(layout.events, column)) for layout in layouts}
    return "–" if match == {False} else "yes" if match == {True} else "some files"


def _counts(known: KnownFormat) -> str:
    """Return the published size of the only file, or of the largest one with the number of files."""
    files = known.counts.files if known.counts else {}
    if not files:
        return "not published"
    largest = max(files, key=lambda name: files[name][2])
    sizes = " / ".join("–" if size is None else f"{size:,}" for size in files[largest])
    return sizes if len(files) == 1 else f"{len(files)} categories; largest {largest.partition('.')[0]}: {sizes}"


def endpoints(document: Mapping[str, Any]) -> str:
    """Return the table of the HTTP endpoints.

    Args:
        document: The OpenAPI document of the service.
    """
    rows: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method in operations:
            # A batch route is in the row of its single route.
            about = document["paths"][path.removesuffix("/batch")][method]["description"].replace("``", "`")
            rows.setdefault(about, []).append(f"`{method.upper()} {path}`")
    return markdown_table(
        ["Endpoint", "Purpose"], [[", ".join(paths), about] for about, paths in rows.items()], numeric_from=2
    )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _metrics() -> str:
    """Return every registered metric with its meaning, direction, and use in comparisons."""
    rows = []
    for name, entry in METRICS.items():
        names = [name] * (entry.both or not entry.cut) + [f"{name}@k"] * (entry.both or entry.cut)
        where = _KINDS[entry.kind] + (", full ranking" if entry.full else "")
        better = "lower" if entry.lower else "higher"
        shown = ", ".join(f"`{each}`" for each in names)
        rows.append([shown, where, entry.about, better, "yes" if entry.compared else "no"])
    return markdown_table(["metric", "of", "meaning", "better", "compared"], rows, 5)
