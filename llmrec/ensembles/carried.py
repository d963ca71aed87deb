"""Stores training interactions in an exported folder, so that its baselines can be fitted without the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from llmrec.baselines.validation import sampling_keys
from llmrec.data.assemble import read_items
from llmrec.data.dataset import SCHEMA, Dataset
from llmrec.data.split import SplitDataset, split_validation_users
from llmrec.ensembles import stored
from llmrec.errors import ModelError

INTERACTIONS_FILE = "interactions.parquet"
USER_ID_PREFIX = "carried:"
"""Prefix of the new user ids; a bare number could be the id of another user."""
_KEPT_COLUMNS = ("rating", "timestamp")


def write_training_data(data: SplitDataset, items: Path, run: Path, draft: Path) -> None:
    """Write the training interactions and ensembles of a run into an exported folder.

    Users are numbered in the order of their ids, which are not written. Validation interactions for early stopping are
    included, with their sampling keys; those of the users for ensemble weights are not. So baselines fitted from the
    folder equal those of the run.

    Args:
        data: The split.
        items: The catalogue in the folder.
        run: The run.
        draft: The folder.

    Raises:
        ModelError: If the run has no ensemble of rankings, or the folder no catalogue.
    """
    content = stored.read_ensembles(run)
    if not content.fusions or not items.is_file():
        lacks = "ensemble of rankings; evaluate its recipe with eval.fusion.controls=true"
        what = lacks if items.is_file() else "catalogue, which --with-interactions needs; remove --no-items"
        raise ModelError(
            f"--with-interactions: {run} has no {what}", kind="missing-value", at=run, column="--with-interactions"
        )
    choosing = split_validation_users(data, content.fusions[0].reserved)[0]
    # Store only the ranks of the hashes, because a hash could identify a user.
    order = np.argsort(np.argsort(sampling_keys(choosing), kind="stable"), kind="stable").astype(np.uint64)
    valid = choosing.valid.with_columns(part=pl.lit("valid"), drawn=order)
    both = pl.concat([data.train.with_columns(part=pl.lit("train")), valid], how="diagonal")
    names = both["user_id"].unique().sort()
    width = len(str(len(names)))
    numbered = [f"{USER_ID_PREFIX}{number:0{width}d}" for number in range(len(names))]
    numbers = pl.DataFrame({"user_id": names, "user": numbered})
    rows = both.join(numbers, on="user_id", how="left", maintain_order="left")
    rows = rows.select(
        pl.col("user").alias("user_id"), pl.col("item_id").cast(pl.String), *_KEPT_COLUMNS, "part", "drawn"
    )
    rows.write_parquet(draft / INTERACTIONS_FILE)
    # Users reserved for ensemble weights are left out.
    stored.write_ensembles(draft, stored.without_reserved_users(content))


def read_training_data(folder: Path, *, seed: int) -> SplitDataset | None:
    """Return the split stored in an exported folder; None if there is none.

    Raises:
        ModelError: If one of its files cannot be read.
    """
    path = folder / INTERACTIONS_FILE
    if not path.is_file():
        return None
    try:
        rows = pl.read_parquet(path)
        items = read_items(folder / "items.parquet")
        frame = rows.with_columns(text=pl.lit(None, dtype=pl.String)).select(*SCHEMA, "part")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}); export the run again", kind="damaged", at=path
        ) from error
    # Held-out interactions of a saved recommender become part of the history.
    names = ("train", "valid", "held")
    train, valid, held = (frame.filter(pl.col("part") == name).select(*SCHEMA) for name in names)
    data = Dataset(name=folder.name, noun="items", interactions=frame.select(*SCHEMA), items=items)
    pairs = frozenset(pl.concat([valid, held]).select("user_id", "item_id").iter_rows())
    # Exports of an earlier version have no sampling keys.
    kept = rows.filter(pl.col("part") == "valid")["drawn"].to_numpy() if "drawn" in rows.columns else None
    return SplitDataset(data, "given", seed, train=train, valid=valid, test=held, held_out=pairs, drawn=kept)
