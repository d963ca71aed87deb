"""Draws the pictures of docs/generative-and-semantic-ids.md: the ID of a film, and the films that share its prefixes.

``python -m eval.benchmarks.index_pictures docs/indexes`` builds the semantic and the collaborative index of
MovieLens-100K.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmrec.data.sets.table import load_data
from llmrec.data.split import split_dataset
from llmrec.index.table import ItemIndex
from llmrec.pipeline.indexing import build_index
from llmrec.recipe.load import load_recipe
from llmrec.report.canvas import WIDE, Canvas, text_width, truncate_to_width
from llmrec.report.render import render_svg

FILM = "Toy Story (1995)"
NAMES = ("semantic", "collaborative")
_TOKEN, _PAD, _LINE = 26, 12, 20


def draw(index: ItemIndex, item: str, titles: Mapping[str, str], popular: Mapping[str, int]) -> Canvas:
    """Draw one item's ID: a row for each prefix, with the items that share it."""
    pieces = index.codes[item]
    rows = [_about(index, item, pieces[:depth], titles, popular) for depth in range(1, len(pieces) + 1)]
    tops = [_PAD + sum(max(_TOKEN, _LINE * len(lines)) + 18 for lines in rows[:n]) for n in range(len(rows) + 1)]
    canvas = Canvas(width=WIDE, height=tops[-1])
    for depth, (top, lines) in enumerate(zip(tops, rows, strict=False), start=1):
        left = float(_PAD)
        for position, piece in enumerate(pieces):
            width = text_width(piece) + 18
            canvas.box(left, top, width, _TOKEN, "fill zero-shot" if position < depth else "band")
            canvas.text(left + width / 2, top + 18, piece, "on" if position < depth else "axis-title", anchor="middle")
            left += width + 4
        for number, (line, look) in enumerate(lines):
            canvas.text(left + 20, top + 18 + _LINE * number, line, look)
    return canvas


def _about(
    index: ItemIndex, item: str, prefix: Sequence[str], titles: Mapping[str, str], popular: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return lines of text about the items that share a prefix, with their styles."""
    sharing = [other for other, pieces in index.codes.items() if pieces[: len(prefix)] == tuple(prefix)]
    if len(sharing) == 1:
        return [("only this film", "")]
    others = sorted((other for other in sharing if other != item), key=lambda other: (-popular.get(other, 0), other))
    names = [truncate_to_width(titles[other], 330) for other in others[:5]]
    rows = [(f"shared by {len(sharing)} films, such as", "axis-title")]
    return [*rows, *((", ".join(names[at : at + 2]), "") for at in range(0, 4, 2) if names[at : at + 2])]


def main(folder: Path) -> None:
    """Draw the pictures of all schemes."""
    for name in NAMES:
        recipe = load_recipe(f"recipes/movielens-100k/index-{name}.yaml")
        assert recipe.index is not None
        data = split_dataset(load_data(recipe.data, seed=recipe.seed), recipe.data.split, seed=recipe.seed)
        titles = {item: entry.title for item, entry in data.dataset.items.items()}
        index = build_index(recipe.index, data, seed=recipe.seed)
        item = next(item for item, title in titles.items() if title == FILM)
        popular = Counter(data.train["item_id"].to_list())
        drawn = render_svg(draw(index, item, titles, popular), f"The ID of {FILM} in an index with the scheme {name}")
        (folder / f"{name}.svg").write_text(drawn, encoding="utf-8")
        sys.stdout.write(f"{name}: {index.encode(item)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
