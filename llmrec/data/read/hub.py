"""Reads a table from the Hugging Face hub, or a folder that the datasets library has saved."""

from __future__ import annotations

from llmrec.data.read.limits import reason
from llmrec.data.read.parquet import from_arrow
from llmrec.data.read.text import Table
from llmrec.errors import DataError, require

_HUB = "hf://"


def is_hub(path: str) -> bool:
    """Whether ``data.path`` names a data set on the hub: ``hf://NAME`` or ``hf://NAME:SPLIT``."""
    return path.startswith(_HUB)


def hub_name(path: str) -> str:
    """Return the name of the data set."""
    return path.removeprefix(_HUB).partition(":")[0]


def read_hub(path: str) -> Table:
    """Read ``hf://NAME[:SPLIT]`` through the datasets library; the split is ``train`` unless named.

    Raises:
        DataError: If it cannot be loaded.
        MissingExtra: If the library is not installed.
    """
    part = path.removeprefix(_HUB).partition(":")[2]
    datasets = require("datasets", "train")
    try:
        found = datasets.load_dataset(hub_name(path), split=part or "train")
        values = found.with_format("arrow")[:]
    except Exception as error:  # the library raises dozens of types, from network errors to parser errors
        raise DataError.at(
            path,
            "unreachable",
            f" cannot be loaded ({type(error).__name__}: {reason(error)}); check the name and the split in "
            "data.path, and that the hub can be reached, or download the table and give its file as data.path",
            "data.path",
        ) from error
    return from_arrow(path, values)
