"""Describes an item index as text, for its HTML page and the report of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from llmrec.display import single_line
from llmrec.errors import DataError
from llmrec.index.diagnostics import CodeGroup, Diagnostics, Level, RangeSummary
from llmrec.report.wording import format_count, format_mean_count, format_number, format_percentage

PAGE = "item-index.html"
"""The page of a run's index, in the folder of the run's report."""
FOLDER, DIAGNOSTICS, NEIGHBOURS = "index", "diagnostics.json", "neighbours.json"
"""The index folder of a run, and its files of figures and of groups of similar items."""

SCHEME_SENTENCES: Mapping[str, str] = {
    "title": "Each item is written as its title. Items with the same title get a field in brackets or a number.",
    "random": (
        "Each item is written as a random number. The number has no meaning, and its tokens are shared with "
        "unrelated items."
    ),
    "sequential": "Each item is written as a number. Numbers follow the order of first appearance in the training "
    "histories of users, so consecutive items of a user have close numbers.",
    "token": "Each item is one new token. Items share no tokens, so the model learns each item from its training "
    "interactions.",
    "collaborative": "Items are clustered hierarchically by co-occurrence in user histories. An ID is the path of an "
    "item in the tree, followed by a token that distinguishes the items of a leaf.",
    "semantic": (
        "The text embedding of an item is quantised: each token of the ID refines it, so items with similar texts "
        "share their first tokens. Items with the same tokens get another last token."
    ),
    "category": "An ID is the category path of an item, most general category first, followed by a token that "
    "distinguishes the items of a category.",
    "external": "The IDs were read from a file.",
}
HYBRID_SENTENCE = "The last token is unique to the item (hybrid)."

# Key of a value recorded by a scheme -> its name on the page, and its format.
_FIGURE_FORMATS = {
    "collisions": ("Items with a duplicate ID before repair", format_percentage),
    "largest_bucket": ("Largest number of items with one ID before repair", format_count),
    "moved": ("Items with another last token after repair", format_percentage),
    "leaves": ("Leaves of the tree", format_count),
    "largest_leaf": ("Largest leaf, items", format_count),
    "paths": ("Category paths", format_count),
    "largest_path": ("Largest category path, items", format_count),
    "unfiled": ("Items without a category", format_count),
    "depth": ("Largest depth without the last token", format_count),
    "isolated": ("Items without co-occurrences", format_count),
    "untrained": ("Items without training interactions", format_count),
    "inside": ("Item pairs of a user in the same leaf", format_percentage),
    "spare": ("IDs in the file for unknown items", format_count),
    "longest": ("Longest ID, pieces", format_count),
    "mse": ("Quantisation error, relative to the squared norm", format_percentage),
}


def scheme_sentence(diagnostics: Diagnostics) -> str:
    """Return a sentence that describes how item codes were made."""
    text = SCHEME_SENTENCES.get(diagnostics.scheme, "")
    return f"{text} {HYBRID_SENTENCE}".strip() if diagnostics.hybrid else text


def level_title(level: Level) -> str:
    """Return the form of the tokens of a level: ``<a_…>``."""
    return f"<{level.name}_…>"


def format_count_range(spread_of: RangeSummary) -> str:
    """Return counts as ``3`` if all are equal, else as ``2 to 5, 3.4 on average``."""
    if spread_of.least == spread_of.most:
        return format_count(spread_of.most)
    limits = f"{format_count(spread_of.least)} to {format_count(spread_of.most)}"
    return f"{limits}, {format_mean_count(spread_of.mean)} on average"


def key_figures(diagnostics: Diagnostics) -> dict[str, str]:
    """Return the main properties by name, in display order."""
    rows = {"Items": format_count(diagnostics.items)}
    if diagnostics.pieces is not None:
        rows |= {
            "New tokens": format_count(diagnostics.tokens),
            "Tokens per ID": format_count_range(diagnostics.pieces),
        }
    if diagnostics.characters is not None:
        rows["Characters per ID"] = format_count_range(diagnostics.characters)
    if diagnostics.first_words is not None:
        first = diagnostics.first_words
        common = f"most frequent: {single_line(first.common)}, of {format_count(first.items)} items"
        rows["Different first words"] = f"{format_count(first.different)}; {common}"
    rows |= {name: text for name, text in map(_labelled_figure, diagnostics.figures.items()) if name}
    if diagnostics.bucket is not None:
        rows["Largest number of IDs that differ only in the last token"] = format_count(diagnostics.bucket)
    rows["Duplicate IDs"] = format_count(diagnostics.duplicates)
    prefixes = "IDs that are a prefix of another ID"
    # A line break ends a text code, so one code may be the beginning of another.
    rows[prefixes] = (
        f"{format_count(diagnostics.begun)}{' (the line break separates them)' if diagnostics.begun else ''}"
    )
    if diagnostics.tokens and diagnostics.begun:
        rows[prefixes] = f"{format_count(diagnostics.begun)}: not prefix-free"
    return rows


def _labelled_figure(entry: tuple[str, float]) -> tuple[str, str]:
    name, value = entry[0], float(entry[1])
    if name.startswith("perplexity_"):
        return "", ""  # The table of levels shows it, after repair.
    other = single_line(name.replace("_", " ").capitalize()), format_count if value.is_integer() else format_number
    label, written = _FIGURE_FORMATS.get(name, other)
    return label, written(value)


# --------------------------------------------------------------------------- in the report of a run


def describe_run_index(run_dir: Path) -> str:
    """Return a line about the index of a run; empty if there is no index page.

    Raises:
        DataError: If the page exists and the index's figures cannot be read.
    """
    path = run_dir / FOLDER / DIAGNOSTICS
    if not (run_dir / "report" / PAGE).is_file():
        return ""
    try:
        return _describe_diagnostics(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged_error(path, error) from error


def _damaged_error(path: Path, error: Exception) -> DataError:
    text = f"{path} cannot be read ({single_line(str(error))}); run the recipe again"
    return DataError(text, kind="damaged", at=path)


def read_neighbours(run_dir: Path) -> tuple[CodeGroup, ...]:
    """Return the groups of similar items in the index of a run; empty if none are stored.

    Raises:
        DataError: If the file exists and cannot be read.
    """
    path = run_dir / FOLDER / NEIGHBOURS
    try:
        return TypeAdapter(tuple[CodeGroup, ...]).validate_json(path.read_bytes()) if path.is_file() else ()
    except (OSError, ValueError) as error:
        raise _damaged_error(path, error) from error


def _describe_diagnostics(found: Mapping[str, Any]) -> str:
    """Return a line about an item index, from the content of its metrics file."""
    unit = "tokens" if found["pieces"] else "characters"
    length = format_count_range(RangeSummary(**(found["pieces"] or found["characters"])))
    parts = [
        f"scheme {single_line(found['scheme'])}",
        f"{format_count(found['items'])} items",
        f"{unit} per ID: {length}",
    ]
    if found["tokens"]:
        parts.append(f"{format_count(found['tokens'])} new tokens")
    levels = [
        f"{format_mean_count(level['perplexity'])} of {format_count(level['available'])}" for level in found["levels"]
    ]
    if levels:
        parts.append(f"perplexity by level: {', '.join(levels)}")
    if found["collisions"] is not None:
        parts.append(f"duplicate IDs before repair: {format_percentage(found['collisions'])}")
    return "; ".join(parts)
