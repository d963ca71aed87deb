"""Loads the MIND news data set (Wu et al., ACL 2020): clicks from the logs of train or dev.

A user's click history comes first, in its own order; it has no timestamps. The clicked items of the impressions follow,
by the time of the impression. Items shown without a click are left out.
"""

from __future__ import annotations

import polars as pl

from llmrec.data.assemble import build_dataset, build_provenance, check_column_settings
from llmrec.data.dataset import Dataset
from llmrec.data.read.limits import format_value
from llmrec.data.read.table import read_blocks
from llmrec.data.read.tables import Table
from llmrec.data.read.typed import date_column, id_column
from llmrec.data.sets.locate import locate_files
from llmrec.data.sets.pages import read_known_format
from llmrec.data.sets.published import read_published_catalogue
from llmrec.data.sets.sequences import line_location_table
from llmrec.errors import DataError, Location
from llmrec.recipe.schema import DataSection

_CLICKED, _NOT_CLICKED = "-1", "-0"
_LINE = "line"


def load_mind(section: DataSection, *, seed: int) -> Dataset:
    """Load MIND; news items have the fields ``category`` and ``subcategory``.

    Raises:
        DataError: If a file is missing or damaged, or has an invalid row.
    """
    page = read_known_format("mind")
    check_column_settings(section, page.name, "text")
    located = locate_files(page, section.path, section.items)
    spec = located.layout.events
    histories: list[pl.DataFrame] = []
    clicks: list[pl.DataFrame] = []
    for block in read_blocks(
        located.events, spec.form, dict.fromkeys(("user", "time", "history", "impressions"), "text")
    ):
        users = id_column(block, spec.user)
        lines = pl.Series(_LINE, list(block.lines or ()), pl.Int64)
        rows = pl.DataFrame({"user_id": users, "items": block.frame["history"], _LINE: lines})
        histories.append(_longest_histories(rows))
        seconds = date_column(block, "time", spec.clock)
        clicks.append(_clicks(block, pl.DataFrame({"user_id": users, "time": seconds, _LINE: lines})))
    frame = _concatenate_clicks(_longest_histories(pl.concat(histories)), pl.concat(clicks))
    if frame.is_empty():
        raise DataError.at(
            located.events.name, "empty", " contains neither histories nor clicks; use the train or dev split of MIND"
        )
    items, notes = read_published_catalogue(located, set(frame["item_id"].unique()), {})
    return build_dataset(
        section,
        line_location_table(located.events.name, frame),
        frame.drop(_LINE),
        items,
        name=page.name,
        noun=page.noun,
        provenance=build_provenance(
            page.name,
            (located.events, located.items),
            rows=frame.height,
            licence=page.licence,
            notes=[*page.notes, *notes],
        ),
    )


def _longest_histories(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the longest history of each user."""
    order = frame.with_columns(pl.col("items").str.len_bytes().alias("_size"))
    order = order.sort("_size", descending=True, maintain_order=True)
    return order.unique("user_id", keep="first", maintain_order=True).drop("_size")


def _clicks(block: Table, rows: pl.DataFrame) -> pl.DataFrame:
    """Return the clicked items of a block of the impression log."""
    listed = rows.with_columns(block.frame["impressions"].str.split(" ").alias("item_id")).explode("item_id")
    listed = listed.with_columns(pl.col("item_id").str.strip_chars()).filter(pl.col("item_id") != "")
    unlabelled = listed.filter(~pl.col("item_id").str.contains(f"({_CLICKED}|{_NOT_CLICKED})$"))
    if unlabelled.height:
        item, line = unlabelled.select("item_id", _LINE).row(0)
        raise DataError.at(
            Location(block.name, line=line),
            "bad-value",
            f": {format_value(item)} lacks the click label ({_CLICKED} or {_NOT_CLICKED} at the end); the test split "
            "of MIND has no labels, so use the train or dev split",
            "impressions",
        )
    clicked = listed.filter(pl.col("item_id").str.ends_with(_CLICKED))
    return clicked.with_columns(pl.col("item_id").str.head(-len(_CLICKED)))


def _concatenate_clicks(histories: pl.DataFrame, clicks: pl.DataFrame) -> pl.DataFrame:
    """Return all clicks, oldest first for each user."""
    past = histories.with_columns(pl.col("items").str.split(" ").alias("item_id")).explode("item_id")
    past = past.select("user_id", "item_id", _LINE).filter(pl.col("item_id").str.strip_chars() != "")
    later = clicks.sort("time", maintain_order=True).select("user_id", "item_id", _LINE)
    return pl.concat([past, later])
