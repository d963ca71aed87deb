"""Draws the pictures of docs/generative-and-semantic-ids.md: the ID of a film, and the films that share its prefixes.

``python -m eval.benchmarks.index_pictures docs/indexes`` builds the indexes of recipes/movielens-100k/index-*.yaml.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from llmrec.data.sets.table import load
from llmrec.data.split import split
from llmrec.index.table import ItemIndex
from llmrec.pipeline.indexing import build_index
from llmrec.recipe.load import load_recipe

FILM = "Toy Story (1995)"
NAMES = ("semantic", "collaborative")
_WIDTH, _ROW, _PAD = 960, 74, 26
_INK, _SOFT, _LINE, _BACK = "#1f2430", "#5b6375", "#d5dae3", "#ffffff"
_FILL, _QUIET = "#2f6f9f", "#e8edf3"
_CHAR = 8.6


class Canvas:
    """SVG elements, from top to bottom."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, *, size: int = 15, ink: str = _INK, mono: bool = False) -> None:
        family = "ui-monospace, Menlo, Consolas, monospace" if mono else "system-ui, Segoe UI, Helvetica, sans-serif"
        look = f'font-family="{family}" font-size="{size}" fill="{ink}"'
        self.parts.append(f'<text x="{x:.0f}" y="{y:.0f}" {look}>{escape(text)}</text>')

    def box(self, x: float, y: float, text: str, *, strong: bool) -> float:
        """Draw a token and return its right edge."""
        width = len(text) * _CHAR + 18
        fill, ink = (_FILL, "#ffffff") if strong else (_QUIET, _SOFT)
        self.parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="30" rx="6" fill="{fill}"/>')
        self.text(x + 9, y + 20, text, size=14, ink=ink, mono=True)
        return x + width

    def svg(self, height: float, title: str) -> str:
        frame = (
            f'<rect x="1" y="1" width="{_WIDTH - 2}" height="{height - 2:.0f}" rx="10" fill="{_BACK}" '
            f'stroke="{_LINE}"/>'
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
            f'height="{height:.0f}" role="img" aria-label="{escape(title)}">'
        )
        return "\n".join([head, f"<title>{escape(title)}</title>", frame, *self.parts, "</svg>"]) + "\n"


def draw(index: ItemIndex, item: str, titles: Mapping[str, str], popular: Mapping[str, int]) -> str:
    """Draw one item's ID: a row for each prefix, with the items that share it."""
    pieces, canvas = index.codes[item], Canvas()
    canvas.text(_PAD, 40, titles[item], size=20)
    canvas.text(_PAD + len(titles[item]) * 11.6 + 12, 40, "has the ID", size=15, ink=_SOFT)
    x = _PAD + len(titles[item]) * 11.6 + 100
    for piece in pieces:
        x = canvas.box(x, 20, piece, strong=True) + 4
    y = 84.0
    left = 40 + max(sum(len(piece) * _CHAR + 24 for piece in pieces), 150)
    for depth in range(1, len(pieces) + 1):
        x = float(_PAD)
        for place, piece in enumerate(pieces):
            x = canvas.box(x, y, piece, strong=place < depth) + 4
        lines = _about(index, item, pieces[:depth], titles, popular)
        for n, (line, ink) in enumerate(lines):
            canvas.text(left, y + 14 + 21 * n, line, ink=ink)
        y += max(_ROW, 30 + 21 * len(lines))
    return canvas.svg(y + 4, f"The ID of {titles[item]} in an index with the scheme {index.scheme}")


def _about(
    index: ItemIndex, item: str, prefix: Sequence[str], titles: Mapping[str, str], popular: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return lines of text about the items that share a prefix."""
    sharing = [other for other, pieces in index.codes.items() if pieces[: len(prefix)] == tuple(prefix)]
    if len(sharing) == 1:
        return [("only this film", _INK)]
    others = sorted((other for other in sharing if other != item), key=lambda other: (-popular.get(other, 0), other))
    names = [_cut(titles[other], 44) for other in others[:5]]
    rows = [(f"shared by {len(sharing)} films, such as", _SOFT)]
    return [*rows, *((", ".join(names[at : at + 2]), _INK) for at in range(0, 4, 2) if names[at : at + 2])]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def main(folder: Path) -> None:
    """Draw the pictures of all schemes."""
    for name in NAMES:
        recipe = load_recipe(f"recipes/movielens-100k/index-{name}.yaml")
        assert recipe.index is not None
        data = split(load(recipe.data, seed=recipe.seed), recipe.data.split, seed=recipe.seed)
        titles = {item: entry.title for item, entry in data.dataset.items.items()}
        index = build_index(recipe.index, data, seed=recipe.seed)
        item = next(item for item, title in titles.items() if title == FILM)
        popular = Counter(data.train["item_id"].to_list())
        (folder / f"{name}.svg").write_text(draw(index, item, titles, popular), encoding="utf-8")
        sys.stdout.write(f"{name}: {index.encode(item)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
