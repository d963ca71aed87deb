"""Compares claims about planned comparisons with the verdicts of the results to which their figures are bound.

A figure that is bound to the difference of a pair makes its sentence a claim about that pair. The first of these words
after the figure in the sentence, or else the last before it, state the claim:
*significantly better* (or higher, worse, lower), *significant*, or *no significant difference*. A row of the result in
backticks after *than*, *less*, *over*, *against* or *minus* is the named opponent, which must be the pair's second row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from eval.benchmarks.figures.pages import Bound
from eval.benchmarks.figures.pointers import PointerError, Results

PAIR = re.compile(r"^(?P<entry>[\w./-]+:(?:pairs|comparisons|explored)\[[^\]]*\])(?:/value)?$")
SAID = re.compile(
    r"\b(?P<no>(?:no|not|nor|nothing|neither)(?: [\w-]+){0,2}|[Nn]one(?: [\w-]+){0,12}) significant(?:ly)?"
    r"|\bsignificantly (?P<way>better|higher|worse|lower|more|less)|\bsignificant(?:ly)?"
)
# A sentence ends at a full stop before a blank, a semicolon, or the end of a cell, of an item or of a paragraph.
END = re.compile(r";|[.!?](?=[\s)])(?!\s*\d)|\n\s*\n|\n\s*[-*] |\|")
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
        before = [*SAID.finditer(text, start, each.figure.start)]
        words = SAID.search(text, each.figure.end, end) or (before[-1] if before else None)
        if words is not None and (wrong := _wrong(words, pair)):
            yield each.figure.start, f"{each.figure}: the text says {words.group()!r}, and {entry} {wrong}"
        rows = {row["name"] for row in results.file(entry.partition(":")[0]).get("rows", []) if "name" in row}
        named = [name for name in OPPONENT.findall(text[start : each.figure.start]) if name in rows]
        if named and named[-1] != pair["b"]:
            yield each.figure.start, f"{each.figure}: the text compares with {named[-1]}, and {entry} with {pair['b']}"


def _sentence(text: str, place: int) -> tuple[int, int]:
    start = max((found.end() for found in END.finditer(text, 0, place)), default=0)
    found = END.search(text, place)
    return start, found.start() if found else len(text)


def _wrong(words: re.Match[str], pair: dict[str, Any]) -> str:
    verdict = pair["verdict"]
    if words["no"]:
        return "" if verdict == "not shown" else f"is {verdict}"
    if verdict == "not shown":
        return "is not significant"
    if words["way"] in ("better", "worse"):
        return "" if (verdict == "shown") == (words["way"] == "better") else f"is {verdict}"
    return ""
