"""Explanations with profile texts: rows of a user, an item with its title, what suits both, and why (XRec's form).

XRec (Ma et al., EMNLP Findings 2024) has a language model write the profiles and explanations from real reviews.
"""

from __future__ import annotations

import polars as pl

from llmrec.data.assemble import assemble
from llmrec.data.columns import ids, one_per_item, texts
from llmrec.data.dataset import Dataset
from llmrec.data.files import json_lines, read_bytes, user_path
from llmrec.errors import DataError
from llmrec.recipe import Columns, DataSection
from llmrec.types import Item

_COLUMNS = ("uid", "iid", "title", "user_summary", "item_summary", "explanation")


def explanations(section: DataSection, *, seed: int) -> Dataset:
    """Load a JSON Lines file, gzipped or plain, of rows with the keys of `_COLUMNS`.

    Texts are the explanations; what is said of an item is its field ``about``, what is said of a user the profile
    ``taste``. There are no ratings and no times, so the order of the file is the order in time.

    Raises:
        DataError: If the file is missing or damaged, a key is not there, or a row cannot be used.
    """
    if section.path is None:
        raise DataError("source 'explanations' needs a file of JSON Lines; set data.path=FILE")
    if section.items is not None or section.columns != Columns():
        raise DataError("source 'explanations' knows its columns and has titles; leave out data.items and data.columns")
    path = user_path(section.path)
    raw, sha256 = read_bytes(path)
    main = json_lines(str(path), raw, sha256)
    absent = [name for name in _COLUMNS if name not in main.frame.columns]
    if absent:
        raise DataError(
            f"{main.name} has no {absent[0]!r}; this source reads rows with the keys {', '.join(_COLUMNS)}. Use source "
            "'table' and data.columns for other tables"
        )
    users, items = ids(main, "uid"), ids(main, "iid")
    given = texts(main, "explanation")
    titles, about = one_per_item(main, items, "title"), one_per_item(main, items, "item_summary")
    return assemble(
        section,
        main,
        pl.DataFrame({"user_id": users, "item_id": items, "text": given.set(given.str.strip_chars() == "", None)}),
        {
            item: Item(item_id=item, title=titles.get(item, item), fields={"about": about.get(item, "")})
            for item in items.unique()
        },
        {user: {"taste": taste} for user, taste in one_per_item(main, users, "user_summary").items()},
        name="explanations",
        noun="items",
        scale=None,
        provenance={
            "source": "explanations",
            "path": main.name,
            "sha256": main.sha256,
            "rows": str(main.frame.height),
            "made": "no",
            "derived": "profiles of users and items and the explanations, written by a language model from reviews; "
            "profiles may have been written from held-out reviews too",
            "licence": "as the owner of the file says",
        },
    )
