"""Compares claims about planned comparisons with the verdicts of the results to which their figures are bound.

A figure that is bound to the difference of a pair makes its sentence a claim about that pair. The first of these words
after the figure in the sentence, or else the last before it, state the claim:
*significantly better* (or higher, worse, lower), *significant*, or *no significant difference*. A model of the result
in backticks after *than*, *less*, *over*, *against* or *minus* must be the second model of the pair.
A paragraph with such words and a measured figure, or a link to a result's page, must have the difference of a pair.
A sentence on the *best single model* must be about a pair with the best one on validation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from eval.benchmarks.figures.pages import Bound, figures
from eval.benchmarks.figures.pointers import PointerError, Results
from llmrec.bench.pages import parse_benchmark_result

PAIR = re.compile(r"^(?P<entry>[\w./-]+:(?:\w+/)?(?:pairs|comparisons|explored)\[[^\]]*\])(?:/value)?$")
VERDICT_WORDS = re.compile(
    r"\b(?P<no>(?:no|not|nor|nothing|neither)(?: [\w-]+){0,2}|[Nn]one(?: [\w-]+){0,12}) significant(?:ly)?"
    r"|\bsignificantly (?P<way>better|higher|worse|lower|more|less)|\bsignificant(?:ly)?"
)
# A sentence ends at a full stop before a space, a semicolon, or the end of a cell, of an item or of a paragraph.
END = re.compile(r";|[.!?](?=[\s)])(?!\s*\d)|\n\s*\n|\n\s*[-*] |\|")
BEST = re.compile(r"\bbest\s+single\s+model\b")
PARAGRAPH = re.compile(r"\n\s*\n|\n(?=\|)|\n\s*(?=[-*] |\d+\. )")
OPPONENT = re.compile(r"\b(?:than|less|over|against|minus)(?: the)? `([^`\n]+)`")


def faults(text: str, bound: Sequence[Bound], results: Results) -> Iterator[tuple[int, str]]:
    """Yield the position and description of each sentence that contradicts its pair.

    Args:
        text: A page.
        bound: Its figures with their expressions.
        results: The committed results.
    """
    claims = [(each, match["entry"]) for each in bound if (match := PAIR.match(each.expression))]
    for each, entry in claims:
        try:
            pair = results.entry(entry)
        except PointerError as error:
            yield each.figure.start, str(error)
            continue
        if "verdict" not in pair:
            continue
        start, end = _sentence(text, each.figure.start)
        before = [*VERDICT_WORDS.finditer(text, start, each.figure.start)]
        words = VERDICT_WORDS.search(text, each.figure.end, end) or (before[-1] if before else None)
        if words is not None and (wrong := _wrong(words, pair)):
            yield each.figure.start, f"{each.figure}: the text says {words.group()!r}, and {entry} {wrong}"
        result = results.file(entry.partition(":")[0])
        rows = {row["name"] for row in result.get("rows", []) if "name" in row}
        named = [name for name in OPPONENT.findall(text[start : each.figure.start]) if name in rows]
        if named and named[-1] != pair["b"]:
            yield each.figure.start, f"{each.figure}: the text compares with {named[-1]}, and {entry} with {pair['b']}"
        if BEST.search(text, start, end) and pair["b"] not in (best := _best_on_validation(result, pair)):
            yield (
                each.figure.start,
                f"{each.figure}: the text compares with the best single model, which on validation is "
                f"{' or '.join(sorted(best))} and not {pair['b']}",
            )


def unfounded(text: str, plain: str, bound: Sequence[Bound]) -> Iterator[tuple[int, str]]:
    """Yield the position and description of each verdict in a paragraph without the difference of a pair.

    Paragraphs without measured figures and links to results explain the words.

    Args:
        text: A page without comments and code blocks.
        plain: The page as its figures are read.
        bound: Its figures with their expressions.
    """
    pairs = [each.figure.start for each in bound if PAIR.match(each.expression)]
    ends = [*(match.end() for match in PARAGRAPH.finditer(text)), len(text)]
    for start, end in pairwise([0, *ends]):
        words = VERDICT_WORDS.search(text, start, end)
        measured = "](../eval/" in text[start:end] or figures(plain, start, end)
        if words and measured and not any(start <= position < end for position in pairs):
            yield words.start(), f"{words.group()!r} has no difference of a pair in its paragraph"


def _best_on_validation(result: dict[str, Any], pair: dict[str, Any]) -> set[str]:
    """Return the best single models on validation, among those with the same kinds of input as a pair's first model."""
    benchmark = parse_benchmark_result(result)
    table = next(table for table in benchmark.tables if table.name == pair["table"])
    reads = next(row.reads for row in benchmark.rows if row.name == pair["a"])
    return benchmark.best_on_validation(table, reads)


def _sentence(text: str, position: int) -> tuple[int, int]:
    start = max((match.end() for match in END.finditer(text, 0, position)), default=0)
    end = END.search(text, position)
    return start, end.start() if end else len(text)


def _wrong(words: re.Match[str], pair: dict[str, Any]) -> str:
    verdict = pair["verdict"]
    if words["no"]:
        return "" if verdict == "not shown" else f"is {verdict}"
    if verdict == "not shown":
        return "is not significant"
    if words["way"] in ("better", "worse"):
        return "" if (verdict == "shown") == (words["way"] == "better") else f"is {verdict}"
    return ""
