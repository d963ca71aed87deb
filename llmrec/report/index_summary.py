"""Describes an item index: a sentence on its scheme, its figures by name, and a line for a run's report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec.errors import DataError
from llmrec.index.diagnostics import Diagnostics, Entry, Group, Level, Spread
from llmrec.report.escape import flat
from llmrec.report.wording import count, number, rough, share

PAGE = "item-index.html"
"""The page of a run's index, in the folder of the run's report."""
FOLDER, DIAGNOSTICS, NEIGHBOURS = "index", "diagnostics.json", "neighbours.json"
"""The index folder of a run, and its files of figures and of groups of similar items."""

SCHEMES: Mapping[str, str] = {
    "title": "An item is written as its title. Of items that share one, each is told apart by a field in brackets, "
    "or by a number.",
    "random": "An item is written as a number dealt at random. It says nothing about the item, and the tokenizer cuts "
    "it as it likes, so items share pieces that mean nothing.",
    "sequential": "An item is written as a number. Numbers are dealt in the order in which items first appear in the "
    "users' training histories: what one user chose one after another has neighbouring numbers.",
    "token": "An item is one new token of its own. Items share nothing: what the model knows of one, it learned from "
    "training interactions with it.",
    "collaborative": "Items that the same users chose stand together in a tree, cut again and again. A code is the "
    "path to an item, and ends with a token that tells the items of a leaf apart.",
    "semantic": "An item's text becomes a vector, and each token of the code says more exactly where that vector lies: "
    "items of similar text share their first tokens, and items of one code are told apart.",
    "category": "A code is the path of an item's categories, most general first, and ends with a token that tells the "
    "items of one category apart.",
    "external": "The codes were read from a file; nothing is known here of how they were found.",
}
HYBRID = "The last token belongs to the item alone (hybrid)."

# Key of a figure in a scheme -> its name on the page, and its format.
_FIGURES = {
    "collisions": ("Items that shared a code before repair", share),
    "largest_bucket": ("Most items of one code before repair", count),
    "moved": ("Items that repair gave another last token", share),
    "leaves": ("Leaves of the tree", count),
    "largest_leaf": ("Most items of a leaf", count),
    "paths": ("Paths of categories", count),
    "largest_path": ("Most items of a path", count),
    "unfiled": ("Items without a category", count),
    "depth": ("Most tokens before the last one", count),
    "isolated": ("Items that nobody chose along with another", count),
    "untrained": ("Items without training interactions", count),
    "inside": ("Pairs of one user's items that share a leaf", share),
    "spare": ("Codes in the file for items that the data lacks", count),
    "longest": ("Most pieces of a code", count),
    "mse": ("Squared error of quantisation, of the vectors' squared length", share),
}


def sentence(found: Diagnostics) -> str:
    """Return a sentence that describes the scheme."""
    text = SCHEMES.get(found.scheme, "")
    return f"{text} {HYBRID}".strip() if found.hybrid else text


def level_title(level: Level) -> str:
    """Return the form of a level's tokens: ``<a_…>``."""
    return f"<{level.name}_…>"


def spread(found: Spread) -> str:
    """Return counts as ``3`` if all are equal, else as ``2 to 5, 3.4 on average``."""
    if found.least == found.most:
        return count(found.most)
    return f"{count(found.least)} to {count(found.most)}, {rough(found.mean)} on average"


def key_figures(found: Diagnostics) -> dict[str, str]:
    """Return the key figures by name, in display order."""
    rows = {"Items": count(found.items)}
    if found.pieces is not None:
        rows |= {"New tokens": count(found.tokens), "Tokens of a code": spread(found.pieces)}
    if found.characters is not None:
        rows["Characters of a code"] = spread(found.characters)
    if found.first_words is not None:
        first = found.first_words
        common = f"most frequent: {flat(first.common)}, of {count(first.items)} items"
        rows["Different first words"] = f"{count(first.different)}; {common}"
    rows |= {name: text for name, text in map(_figure, found.figures.items()) if name}
    if found.bucket is not None:
        rows["Most codes that differ in the last token alone"] = count(found.bucket)
    rows["Duplicate codes"] = count(found.duplicates)
    what = "Codes that are the start of another"
    # A line break ends a text code, so a code may be a prefix of another.
    rows[what] = f"{count(found.begun)}{' (the end of the line tells them apart)' if found.begun else ''}"
    if found.tokens and found.begun:
        rows[what] = f"{count(found.begun)}: not prefix-free"
    return rows


def _figure(entry: tuple[str, float]) -> tuple[str, str]:
    name, value = entry[0], float(entry[1])
    if name.startswith("perplexity_"):
        return "", ""  # The table of levels has it, after repair.
    other = flat(name.replace("_", " ").capitalize()), count if value.is_integer() else number
    label, written = _FIGURES.get(name, other)
    return label, written(value)


# --------------------------------------------------------------------------- in a run's report


def line(run_dir: Path) -> str:
    """Return a line on a run's index; empty if its report has no page on one.

    Raises:
        DataError: If the page exists and the index's figures cannot be read.
    """
    path = run_dir / FOLDER / DIAGNOSTICS
    if not (run_dir / "report" / PAGE).is_file():
        return ""
    try:
        return line_of(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    text = f"{path}: cannot be read ({flat(str(error))}); run the recipe again, which writes it anew"
    return DataError(text, kind="damaged", at=path)


def neighbours(run_dir: Path) -> tuple[Group, ...]:
    """Return the groups of similar items of a run's index; empty if the run stored none.

    Raises:
        DataError: If the file exists and cannot be read.
    """
    path = run_dir / FOLDER / NEIGHBOURS
    try:
        result = json.loads(path.read_bytes()) if path.is_file() else []
        return tuple(
            Group(
                length=int(group["length"]), prefix=str(group["prefix"]), said=str(group["said"]),
                size=int(group["size"]), entries=tuple(
                    Entry(item=str(entry["item"]), code=str(entry["code"]), title=str(entry["title"]))
                    for entry in group["entries"]
                ),
            )
            for group in result
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def line_of(found: Mapping[str, Any]) -> str:
    """Return the line of `line` from the content of the file of figures."""
    length = found["pieces"] or found["characters"]
    shown = spread(Spread(least=int(length["least"]), mean=float(length["mean"]), most=int(length["most"])))
    unit = "tokens" if found["pieces"] else "characters"
    parts = [f"scheme {flat(str(found['scheme']))}", f"{count(int(found['items']))} items"]
    parts.append(f"{unit} of a code: {shown}")
    if found["tokens"]:
        parts.append(f"{count(int(found['tokens']))} new tokens")
    levels = [f"{rough(float(level['perplexity']))} of {count(int(level['available']))}" for level in found["levels"]]
    if levels:
        parts.append(f"perplexity by level: {', '.join(levels)}")
    if found["collisions"] is not None:
        parts.append(f"shared a code before repair: {share(float(found['collisions']))}")
    return "; ".join(parts)
