"""Compares the figures of pages with the results to which they are bound, and updates them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from eval.benchmarks.figures import verdicts
from eval.benchmarks.figures.generated import generated_pages
from eval.benchmarks.figures.pages import figures, masked, plain_claims, read
from eval.benchmarks.figures.pointers import PointerError, Results
from eval.benchmarks.record import changed_since

EXCEPTIONS = "eval/figures.yaml"
ELSEWHERE = {"docs/cli.md", "docs/config.md", "docs/python-api.md"}
"""Generated pages that another test compares as a whole."""


@dataclass(frozen=True)
class Allowed:
    """Figures without a committed source.

    Attributes:
        page: The page.
        text: Verbatim text of the page. The first line of a table means the whole table, a heading its section, ``*``
            the whole page.
        reason: Why there is no source.
    """

    page: str
    text: str
    reason: str

    def ranges_in(self, text: str) -> list[tuple[int, int]]:
        """Return the ranges of a page that the exception covers."""
        if self.text == "*":
            return [(0, len(text))]
        if self.text.startswith("#"):
            level = len(self.text) - len(self.text.lstrip("#"))
            section = rf"^{re.escape(self.text)}$.*?(?=^#{{1,{level}}} |\Z)"
            return [found.span() for found in re.finditer(section, text, re.M | re.S)]
        words = r"\s+".join(map(re.escape, self.text.split()))
        table = r".*(?:\n\|.*)*" if self.text.startswith("|") else ""
        return [found.span() for found in re.finditer(words + table, text)]


def named(root: Path) -> list[str]:
    """Return the pages whose figures must have a source."""
    # `make notebooks` leaves reports of runs in docs/notebooks/runs.
    paths = (path.relative_to(root) for path in sorted((root / "docs").rglob("*.md")))
    docs = (path.as_posix() for path in paths if "runs" not in path.parts)
    return ["README.md", "eval/PERFORMANCE.md", *(name for name in docs if name not in ELSEWHERE)]


def exceptions(root: Path) -> list[Allowed]:
    """Return the committed exceptions."""
    content = yaml.safe_load((root / EXCEPTIONS).read_text(encoding="utf-8"))
    return [Allowed(**entry) for entry in content or []]


def faults(root: Path) -> list[str]:
    """Return the faults in a checkout, one line each; empty if every figure equals its source."""
    allowed, results, messages = exceptions(root), Results(root), []
    pages = named(root)
    messages += [f"{EXCEPTIONS}: there is no page {each.page}" for each in allowed if each.page not in pages]
    messages += [f"{EXCEPTIONS}: {each.text!r} has no reason" for each in allowed if not each.reason.strip()]
    for name in pages:
        text = (root / name).read_text(encoding="utf-8")
        messages += _page(name, text, [each for each in allowed if each.page == name], results)
    messages += [
        f"{name}: is not what its generator writes from the committed results; run make figures"
        for name in _stale(root)
    ]
    messages += [
        f"docs/quickstart.md: its table was recorded with another recipes/quickstart.yaml: {each}; run make quickstart "
        "record"
        for each in changed_since(results.file("quickstart"), root / "recipes" / "quickstart.yaml")
    ]
    return messages


def _page(name: str, text: str, allowed: Sequence[Allowed], results: Results) -> Iterator[str]:
    ranges = []
    plain = masked(text)
    for each in allowed:
        covered = each.ranges_in(text)
        ranges += covered
        if not any(figures(plain, *start) for start in covered):
            yield f"{EXCEPTIONS}: {name} has no figure in {each.text!r} any more; take the exception out"
    page = read(text, ranges)
    yield from (f"{name}, {fault}" for fault in page.faults)
    for figure in page.unbound:
        yield f"{_where(name, text, figure.start)}: {figure} has no source; bind it, or put a parameter in backticks"
    for bound in page.bound:
        where = f"{_where(name, text, bound.figure.start)}: {bound.figure}"
        try:
            written = bound.figure.written(results.value(bound.expression))
        except PointerError as error:
            yield f"{where}: {error}"
            continue
        if written != f"{bound.figure.sign}{bound.figure.digits}":
            yield f"{where} is {written} in {bound.expression}"
    claims = plain_claims(text)
    problems = [*verdicts.faults(claims, page.bound, results), *verdicts.unfounded(claims, plain, page.bound)]
    for start, message in problems:
        yield f"{_where(name, text, start)}: {message}"


def _where(name: str, text: str, position: int) -> str:
    return f"{name}, line {text.count(chr(10), 0, position) + 1}"


def write(root: Path) -> list[str]:
    """Write bound figures and generated pages from the results; return the files that changed.

    Raises:
        PointerError: If a pointer is invalid; then no page is written.
    """
    results, changed = Results(root), {}
    allowed = exceptions(root)
    for name in named(root):
        text = (root / name).read_text(encoding="utf-8")
        ranges = [place for each in allowed if each.page == name for place in each.ranges_in(text)]
        new = text
        for bound in sorted(read(text, ranges).bound, key=lambda each: -each.figure.start):
            written = bound.figure.written(results.value(bound.expression))
            new = f"{new[: bound.figure.start]}{written}{new[bound.figure.end :]}"
        if new != text:
            changed[name] = new
    _put(root, changed)
    # Generated parts are inside pages that may just have been written.
    stale = _stale(root)
    _put(root, stale)
    return sorted({*changed, *stale})


def _stale(root: Path) -> dict[str, str]:
    """Return the generated pages that differ from the files of a checkout."""
    pages = generated_pages(root).items()
    return {n: text for n, text in pages if not (root / n).exists() or (root / n).read_text(encoding="utf-8") != text}


def _put(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")
