"""Properties of a catalogue tree for tests."""

from __future__ import annotations

from llmrec.decode.token_tree import TokenTrie


def branching(tree: TokenTrie) -> int:
    """Return the maximal number of nodes with several children on a path, including the root."""
    paths = [tree.path(number) for number in range(len(tree))]
    children: dict[tuple[int, ...], set[int]] = {}
    for path in paths:
        for depth, token in enumerate(path):
            children.setdefault(path[:depth], set()).add(token)
    return max(sum(len(children[path[:depth]]) > 1 for depth in range(len(path))) for path in paths)
