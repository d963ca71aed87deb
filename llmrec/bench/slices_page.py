"""Where texts and language models help: planned comparisons of suites over parts of their requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from llmrec.bench.records import PairSlice, SuitePair, SuiteResult
from llmrec.report.escape import cell
from llmrec.report.slices import in_words
from llmrec.report.table import grid
from llmrec.report.wording import DASH, KINDS, difference
from llmrec.results import Reads

_HEAD = """# Where texts and language models help

Written by `llmrec eval SUITE` from `eval/results/`; do not edit. Each table takes apart a planned comparison between
rows that know items by different things: the figure of the row named first less that of the other, over requests of
one kind. Counts are those of the training interactions. The whole comparison has its verdict in
[LEADERBOARD.md](LEADERBOARD.md); its parts are exploratory: unadjusted 95 % intervals, no p and no verdict. They are
over users, and for kinds of targets over the items that are targets, whose number is printed after that of the
requests. An interval that leaves out 0 is set in bold.
"""
_TREATED = {"excluded": "seen items filtered", "included": "seen items not filtered"}


def slices_page(results: Sequence[SuiteResult]) -> str:
    """Return the Markdown page; suites of which no planned comparison joins two kinds of rows are not on it."""
    sections = [section for found in sorted(results, key=lambda each: each.suite) if (section := _section(found))]
    return "\n".join([_HEAD, *sections])


def _section(found: SuiteResult) -> str:
    reads = {row.name: row.reads for row in found.rows}
    order = get_args(Reads)
    kinds: dict[tuple[str, str], list[SuitePair]] = {}
    for pair in found.pairs:
        one, other = reads.get(pair.a), reads.get(pair.b)
        if pair.slices and one is not None and other is not None and order.index(one) > order.index(other):
            kinds.setdefault((pair.a, pair.b), []).append(pair)
    lines = [f"## {cell(found.suite)}", "", f"{cell(found.description)} {found.protocol.users:,} users.", ""]
    for (a, b), pairs in kinds.items():
        what = f"{cell(a)} ({KINDS[reads[a]]}) less {cell(b)} ({KINDS[reads[b]]}), {cell(pairs[0].metric)}"
        lines += [what + ":", "", _table(pairs), ""]
    return "\n".join(lines) if kinds else ""


def _table(pairs: Sequence[SuitePair]) -> str:
    header = ["requests", "n", "items", *(cell(_TREATED.get(pair.seen, pair.seen)) for pair in pairs)]
    names = dict.fromkeys((part.name, part.n, part.clusters) for pair in pairs for part in pair.slices)
    rows = [["all", "", "", *(_shown(pair) for pair in pairs)]]
    for name, n, items in names:
        parts = [next((part for part in pair.slices if part.name == name), None) for pair in pairs]
        many = f"{items:,}" if items else ""
        rows.append([cell(in_words(name)), f"{n:,}", many, *(DASH if part is None else _shown(part) for part in parts)])
    return grid(header, rows, numeric_from=1)


def _shown(found: SuitePair | PairSlice) -> str:
    if found.value is None or found.low is None or found.high is None:
        return DASH
    said = difference(found.value, found.low, found.high, 4)
    return f"**{said}**" if found.low > 0 or found.high < 0 else said
