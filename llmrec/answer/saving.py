"""Saves a recommender as a self-contained folder: the model, the catalogue, interactions and ensembles.

`llmrec.load` and `llmrec serve` open them without the run; `llmrec refresh` adds interactions and items.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import polars as pl

from llmrec.answer.known import ITEMS_FILE
from llmrec.data.assemble import write_items
from llmrec.data.split import SplitDataset, split_validation_users
from llmrec.durable import read_json, replace_atomically, write_json
from llmrec.ensembles import stored
from llmrec.ensembles.carried import INTERACTIONS_FILE
from llmrec.errors import DataError
from llmrec.pipeline.bundle import CHECKSUMS_FILE
from llmrec.types import Item

MARK_FILE = "refreshed.json"
"""The file that marks such a folder, so that `llmrec refresh` may overwrite it."""

INTERACTION_COLUMNS = ("user_id", "item_id", "rating", "timestamp", "part")
"""The columns of its interactions."""
_OTHER_FOLDER_ADVICE = "choose another folder"


def interactions_with_parts(data: SplitDataset, reserved: float) -> pl.DataFrame:
    """Return all interactions with their part of the split, ordered by user and time.

    Args:
        data: The split.
        reserved: The fraction of validation users not used for early stopping; their interactions are only history.
    """
    choosing, weighing = split_validation_users(data, reserved)
    parts = {"train": [data.train], "valid": [choosing.valid], "held": [data.known, weighing.valid, data.test]}
    frames = [frame.with_columns(part=pl.lit(part)) for part, some in parts.items() for frame in some]
    return pl.concat(
        [frame.select(pl.col("user_id", "item_id").cast(pl.String), *INTERACTION_COLUMNS[2:]) for frame in frames]
    )


def write_model_data(
    draft: Path, source: str, items: Mapping[str, Item], rows: pl.DataFrame | None, measured: stored.StoredEnsembles
) -> None:
    """Write everything except the model to a folder.

    Args:
        draft: The folder.
        source: The name of the model, for the record.
        items: The catalogue.
        rows: The interactions, if any.
        measured: The ensembles, and the default model.
    """
    if rows is not None:
        rows.write_parquet(draft / INTERACTIONS_FILE)
    write_items(items, draft / ITEMS_FILE)
    stored.write_ensembles(draft, measured)
    write_json(
        draft / MARK_FILE, {"from": source, "interactions": 0 if rows is None else rows.height, "items": len(items)}
    )


def check_other_files(out: Path, option: str) -> None:
    """Reject a folder with files that llmrec did not write."""
    if out.exists() and any(out.iterdir()) and not (out / MARK_FILE).is_file():
        raise DataError(
            f"{option} {out} contains files that were not written by this command; choose another folder",
            kind="exists",
            at=out,
            column=option,
        )


def link_model_files(model: Path, draft: Path) -> None:
    """Add the files of a model to a folder, as hard links if the file system supports them."""
    for file in sorted(model.rglob("*")):
        if not file.is_file() or file.name in (
            INTERACTIONS_FILE,
            MARK_FILE,
            stored.ENSEMBLES_FILE,
            ITEMS_FILE,
            CHECKSUMS_FILE,
        ):
            continue
        target = draft / file.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)


@contextmanager
def draft_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder next to the output folder; see `publish_folder`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish_folder(draft: Path, out: Path, *, keep: bool = False) -> None:
    """Move a folder to its destination; an existing folder is replaced file by file, with interactions and mark last.

    Files of the previous model that the new one does not have are removed first. Files that were not written by llmrec
    remain.

    Args:
        draft: The folder.
        out: The destination.
        keep: Keep all files of the previous model: the draft has only those that change.

    Raises:
        DataError: If the mark of ``out`` cannot be read.
    """
    present, previous, mark = _file_names(out), _written_files(out), draft / MARK_FILE
    # Files of a user remain theirs, even if the model was linked together with them.
    written = _file_names(draft) - (present - previous) | (previous if keep else set())
    write_json(mark, {**read_json(mark, _OTHER_FOLDER_ADVICE), "files": sorted(written)})
    if not out.exists():
        draft.rename(out)
        return
    # In this order, a reader gets an error until the new model is complete: the recipe is removed before the
    # interactions, and weights before their description.
    for name in sorted(previous - written, reverse=True):
        (out / name).unlink()
    for file in sorted(
        draft.rglob("*"), key=lambda path: (path.name == MARK_FILE, path.name == INTERACTIONS_FILE, str(path))
    ):
        if file.is_file():
            with replace_atomically(out / file.relative_to(draft)) as target:
                shutil.move(file, target)


def _written_files(folder: Path) -> set[str]:
    """Return the names of the existing files that llmrec wrote to a folder."""
    mark = folder / MARK_FILE
    return _file_names(folder).intersection(
        read_json(mark, _OTHER_FOLDER_ADVICE).get("files", ()) if mark.is_file() else ()
    )


def _file_names(folder: Path) -> set[str]:
    """Return the names of all files of a folder, relative to it."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
