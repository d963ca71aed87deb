"""Semantic codes: texts become vectors, and vectors become a few numbers, most telling first.

Items of similar text share the first pieces of their codes (TIGER: Rajput et al., NeurIPS 2023; LC-Rec: Zheng et al.,
ICDE 2024). Items that the numbers do not tell apart are repaired, so every item has a code of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.data.hashing import hash64
from llmrec.errors import DataError, RecipeError, did_you_mean
from llmrec.guard import TEXT_LIMIT, clean
from llmrec.index.kmeans import Floats, Ints, Quantised, nearest, perplexity, reconstructed, residual_kmeans
from llmrec.index.rqvae import encode, fit
from llmrec.index.table import Embed, ItemIndex, own_token, token
from llmrec.recipe.schema import IndexSection, SemanticIndex
from llmrec.types import Item

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset


class Semantic:
    """Residual quantisation of text vectors.

    ``repair: extra_level`` counts items of an equal code in one more piece, 0 for the one most popular in training, as
    in TIGER. ``repair: last_level`` gives the items that share all pieces but the last one different last pieces, with
    the least sum of squared distances, as LC-Rec's uniform mapping does within its batches. With ``index.item_token``
    the last piece is a token of the item's own instead.
    """

    @staticmethod
    def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Embed | None = None) -> ItemIndex:
        """Return the codes; see `Scheme`.

        Raises:
            RecipeError: If a field that the recipe names is in no item, or items cannot be told apart as it asks.
            DataError: If there is no encoder, or its vectors cannot be used.
        """
        semantic = section.semantic
        names = sorted(data.dataset.items)
        items = [data.dataset.items[name] for name in names]
        fields = item_fields(items, semantic)
        x = item_vectors(items, fields, embed)
        vectors, found, arrays, figures = _quantised(x, semantic, seed)
        grid = [token(level, number) for level in range(semantic.levels) for number in range(semantic.codes)]
        rows, added = [tuple(map(int, row)) for row in found.codes], []
        if section.item_token:
            added = [own_token(number) for number in range(len(rows))]
            codes = {name: (*_pieces(row), own) for name, row, own in zip(names, rows, added, strict=True)}
        elif semantic.repair == "extra_level":
            numbers = _counted(rows, names, data, seed)
            added = [token(semantic.levels, number) for number in range(max(numbers) + 1)]
            codes = {name: _pieces((*row, n)) for name, row, n in zip(names, rows, numbers, strict=True)}
        else:
            moved = _moved(vectors, found)
            figures |= {"moved": float((moved != found.codes[:, -1]).mean())}
            codes = {name: _pieces((*row[:-1], int(n))) for name, row, n in zip(names, rows, moved, strict=True)}
        settings = {"semantic": semantic.model_dump(mode="json"), "fields": list(fields), "seed": seed}
        settings |= {"item_token": section.item_token}
        return ItemIndex(
            "semantic", codes, (*grid, *added), settings, {"codebooks": found.codebooks, **arrays}, figures
        )

    @staticmethod
    def extend(index: ItemIndex, items: Mapping[str, Item], *, embed: Embed | None = None) -> ItemIndex:
        """Place further items at the nearest codes with room, in the order of their ids; see `Scheme`.

        The vocabulary stays as it is, except with ``item_token``. Where the nearest code is full, the nearest last
        number with room is taken, then the nearest number of the level before, and so on.

        Raises:
            DataError: If there is no encoder, its vectors are not those of the index, or every code is full.
        """
        names, arrays = sorted(items), dict(index.arrays)
        x = _vectors([item_text(items[name], index.settings["fields"]) for name in names], embed)
        codebooks = arrays.pop("codebooks")
        width = arrays["encoder.0.weight"].shape[1] if arrays else codebooks.shape[2]
        if x.shape[1] != width:
            raise DataError(
                f"index semantic: it was built on vectors of {width} numbers, and this text encoder gives "
                f"{x.shape[1]}; use {index.settings['semantic']['encoder']!r} again",
                kind="mismatch",
                column="index.semantic.encoder",
            )
        x = encode(arrays, x) if arrays else x
        spare = len(index.tokens) - codebooks.shape[0] * codebooks.shape[1]
        if index.settings["item_token"]:
            new = [own_token(number) for number in range(spare, spare + len(names))]
            rows = (tuple(map(int, row)) for row in nearest(x, codebooks))
            return index.adding({n: (*_pieces(row), own) for n, row, own in zip(names, rows, new, strict=True)}, new)
        levels, room = len(codebooks), max(1, spare)
        held = Counter(pieces[:levels] for pieces in index.codes.values())
        codes = {}
        for name, vector in zip(names, x, strict=True):
            place = next((p for c in _by_distance(vector, codebooks) if held[p := _pieces(c)] < room), None)
            if place is None:
                raise DataError(
                    f"index semantic: no code is left for item {name!r}; build the index again", kind="exhausted"
                )
            codes[name] = (*place, token(levels, held[place])) if spare else place
            held[place] += 1
        return index.adding(codes)


def _pieces(numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(token(level, number) for level, number in enumerate(numbers))


# --------------------------------------------------------------------------- texts and vectors


def item_vectors(items: Sequence[Item], fields: Sequence[str], embed: Embed | None) -> Floats:
    """Return vectors of length 1 of what is said of items, shape (n, d).

    Args:
        items: The items.
        fields: Which of their fields are read, after the title.
        embed: The text encoder.

    Raises:
        DataError: If there is no encoder, or its vectors cannot be used.
    """
    return _vectors([item_text(item, fields) for item in items], embed)


def item_fields(items: Sequence[Item], section: SemanticIndex) -> tuple[str, ...]:
    """Return the fields that a recipe names, by default all that items have.

    Raises:
        RecipeError: If no item has a field of that name.
    """
    known = tuple(dict.fromkeys(name for item in items for name in item.fields))
    for name in section.fields:
        if name not in known:
            raise RecipeError(
                f"index.semantic.fields: no item has a field {name!r}{did_you_mean(name, known)}; the data has "
                f"{', '.join(known) or 'no fields'}",
                kind="unknown-name",
                column="index.semantic.fields",
            )
    return section.fields or known


def item_text(item: Item, fields: Sequence[str]) -> str:
    """Return what is said of an item as one line: ``title. categories: Skin Care``; its id where that is nothing."""
    said = [f"{name}: {value}" for name in fields if (value := clean(item.fields.get(name, ""), TEXT_LIMIT))]
    return ". ".join(part for part in (clean(item.title), *said) if part) or item.item_id


def _vectors(texts: Sequence[str], embed: Embed | None) -> Floats:
    """Return vectors of length 1, shape (n, d)."""
    if embed is None:
        raise DataError(
            "index semantic: it is built from texts, and no text encoder was given; pass embed=",
            kind="missing-value",
            column="embed",
        )
    x = np.array(embed(texts), np.float32, order="C")
    if x.ndim != 2 or len(x) != len(texts) or not x.size:
        raise DataError(
            f"index semantic: the text encoder gave an array of {x.shape} for {len(texts)} texts", kind="defect"
        )
    wrong = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(wrong):
        raise DataError(
            f"index semantic: the text encoder gave no finite vector for the text {texts[wrong[0]]!r}", kind="defect"
        )
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x


def _quantised(
    x: Floats, section: SemanticIndex, seed: int
) -> tuple[Floats, Quantised, dict[str, NDArray[Any]], dict[str, float]]:
    """Return what is quantised, its codes, what encodes further vectors, and figures."""
    arrays: dict[str, NDArray[Any]] = {}
    if section.quantizer == "kmeans":
        if 0 < section.balance < 1:
            raise RecipeError(
                f"index.semantic.balance: {section.balance:g} of an even share leaves no room for all items; say 1 or "
                "more, or 0 for no bound",
                kind="bad-value",
                column="index.semantic.balance",
            )
        vectors, found = x, residual_kmeans(x, section.levels, section.codes, balance=section.balance, seed=seed)
        rest = x - reconstructed(found.codes, found.codebooks)
        error = float(np.square(rest).sum(dtype=np.float64) / max(np.square(x).sum(dtype=np.float64), 1e-12))
    else:
        trained = fit(x, section.rqvae, section.levels, section.codes, seed=seed)
        arrays, error = dict(trained.weights), trained.error
        vectors = encode(arrays, x)
        found = Quantised(nearest(vectors, trained.codebooks), trained.codebooks)
    sizes = np.unique(found.codes, axis=0, return_counts=True)[1]
    figures = {
        "collisions": float(sizes[sizes > 1].sum() / len(x)),
        "largest_bucket": float(sizes.max()),
        "mse": error,
    }
    for level in range(section.levels):
        figures[f"perplexity_{level + 1}"] = perplexity(found.codes[:, level], section.codes)
    return vectors, found, arrays, figures


# --------------------------------------------------------------------------- items of equal codes


def _counted(rows: Sequence[tuple[int, ...]], names: Sequence[str], data: SplitDataset, seed: int) -> list[int]:
    """Return each item's number among those of its code: by training popularity, then by hash."""
    popular = Counter(dict(data.train.group_by("item_id").len().iter_rows()))
    chance = hash64("semantic codes", seed, names)
    numbers, seen = [0] * len(names), Counter[tuple[int, ...]]()
    for place in sorted(range(len(names)), key=lambda n: (-popular[names[n]], int(chance[n]))):
        numbers[place] = seen[rows[place]]
        seen[rows[place]] += 1
    return numbers


def _moved(vectors: Floats, found: Quantised) -> Ints:
    """Return last numbers, shape (n,), different within each group of items that share all the others."""
    first, codebook = found.codes[:, :-1], found.codebooks[-1]
    rest = vectors - reconstructed(first, found.codebooks[:-1])
    _, group = np.unique(first, axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    moved = found.codes[:, -1].copy()
    for rows in np.split(order, np.cumsum(np.bincount(group.ravel()))[:-1]):
        if len(rows) > len(codebook):
            raise RecipeError(
                f"index.semantic.repair: last_level cannot tell {len(rows)} items of equal first numbers apart with "
                f"{len(codebook)} codes; use extra_level, more codes or levels, or a tighter index.semantic.balance",
                kind="contradiction",
                column="index.semantic.repair",
            )
        if len(np.unique(moved[rows])) < len(rows):
            # A row's own norm is left out: it is the same wherever the item goes.
            costs = np.square(codebook).sum(axis=1) - 2 * rest[rows] @ codebook.T
            # Takes a tenth of a second to import, and most commands fit nothing.
            from scipy.optimize import linear_sum_assignment

            moved[rows] = linear_sum_assignment(costs)[1]
    return moved


def _by_distance(rest: Floats, codebooks: Floats, before: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Yield all codes, the nearest number of each level first; the last level turns fastest."""
    level = len(before)
    if level == len(codebooks):
        yield before
        return
    steps = rest - codebooks[level]
    for number in np.argsort(np.square(steps).sum(axis=1), kind="stable"):
        yield from _by_distance(steps[number], codebooks, (*before, int(number)))
