"""What tests ask of a catalogue's tree."""

from __future__ import annotations

from llmrec.decode.token_tree import Catalogue


def branching(tree: Catalogue) -> int:
    """Most nodes on one path that have several children, the root included."""
    paths = [tree.path(place) for place in range(len(tree))]
    children: dict[tuple[int, ...], set[int]] = {}
    for path in paths:
        for depth, token in enumerate(path):
            children.setdefault(path[:depth], set()).add(token)
    return max(sum(len(children[path[:depth]]) > 1 for depth in range(len(path))) for path in paths)
