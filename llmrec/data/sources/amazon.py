"""The Amazon review sets of 2014, 2018 and 2023: one category's reviews or ratings, with its metadata.

Average ratings, numbers of ratings and sales ranks of the metadata are left out on purpose: they are taken over all
interactions, held-out ones included.
"""

from __future__ import annotations

import polars as pl

from llmrec.data.dataset import Dataset
from llmrec.data.sources.known import AMAZON_2014, AMAZON_2018, AMAZON_2023
from llmrec.data.sources.published import load
from llmrec.data.sources.spec import Known
from llmrec.errors import DataError
from llmrec.recipe.schema import DataSection

_ASIN = 10


def amazon_2014(section: DataSection, *, seed: int) -> Dataset:
    """Load a category of the 2014 set: ratings from 1 to 5, times by the day, review texts.

    Products carry ``categories``, ``brand`` and ``price`` where the metadata has them.

    Raises:
        DataError: If a file is missing or damaged, or holds a row that cannot be used.
    """
    return _load(AMAZON_2014, section)


def amazon_2018(section: DataSection, *, seed: int) -> Dataset:
    """Load a category of the 2018 set; see `amazon_2014`."""
    return _load(AMAZON_2018, section)


def amazon_2023(section: DataSection, *, seed: int) -> Dataset:
    """Load a category of the 2023 set, with parent products as items and times to the millisecond.

    See `amazon_2014`; products also carry ``main_category``.
    """
    return _load(AMAZON_2023, section)


def _load(known: Known, section: DataSection) -> Dataset:
    dataset = load(known, section)
    # The ratings-only files of 2014 and 2018 have no header and other orders of columns; a file read as one of the
    # other year would look fine and mean nothing.
    first = dataset.interactions.head(1000)
    users, items = (first[column].cast(pl.String).str.len_chars().eq(_ASIN).mean() for column in ("user_id", "item_id"))
    if isinstance(users, float) and isinstance(items, float) and users > 0.9 and items < 0.1:
        raise DataError(
            f"{dataset.provenance['path']}: the user column holds product numbers, so its columns are those of another "
            "edition; use source 'amazon-2014' for user,item,rating,time and 'amazon-2018' for item,user,rating,time",
            kind="wrong-format",
            at=dataset.provenance["path"],
        )
    return dataset
