"""Adds new interactions and items to a model folder, and fits its baselines on all interactions.

The folder has the model, the catalogue and every interaction, without held-out ones: it is for serving and must not be
used for evaluation. The weights of ensembles remain those of the run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from llmrec.answer.opening import reserved_fraction
from llmrec.answer.saving import (
    INTERACTION_COLUMNS,
    MARK_FILE,
    check_other_files,
    draft_folder,
    link_model_files,
    publish_folder,
    write_model_data,
)
from llmrec.baselines.parameters import stops_early
from llmrec.data.assemble import read_items
from llmrec.data.dataset import SCHEMA, Dataset, conform_to_schema
from llmrec.data.described import items_with_stored_texts
from llmrec.data.read.table import read_table
from llmrec.data.read.typed import id_column, is_epoch_time, number_column, time_column, time_units_per_second
from llmrec.data.sets.table import load_data
from llmrec.data.split import split_dataset, split_validation_users, split_without_test, time_order
from llmrec.ensembles import stored
from llmrec.ensembles.carried import read_training_data
from llmrec.errors import DataError, LlmrecError, did_you_mean, require
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline.bundle import Bundle
from llmrec.recipe.load import STORED_RECIPE_FILE, load_stored_recipe
from llmrec.serve.databases import POSTGRES_PREFIXES
from llmrec.serve.options import RefreshOptions
from llmrec.serve.store import ServiceStore
from llmrec.types import Item


@dataclass(frozen=True)
class _ModelData:
    """Interactions with their part of the split, the catalogue, and user data."""

    rows: pl.DataFrame
    items: dict[str, Item]
    users: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def refresh(options: RefreshOptions) -> Mapping[str, str | int]:
    """Write the new model folder and return a summary to print.

    Raises:
        LlmrecError: If a file cannot be read or written, an item has no title, or a service rejects the folder.
    """
    if options.events is None and options.items is None:
        raise DataError(
            "nothing to add; give new interactions with --events, new items with --items, or both",
            kind="missing-key",
            column="--events",
        )
    bundle = bundles.read(options.model)
    out = _output_folder(options, bundle)
    measured = stored.read_ensembles(bundle.source_folder)
    early = _uses_early_stopping(bundle, measured.fusions)
    before = _read_model_data(bundle, reserved_fraction(bundle) if early else None)
    after, added = _add_new_data(before, options, bundle.seed)
    model = Path(bundle.folder)
    with draft_folder(out) as draft:
        if options.train is not None:
            model = _continue_training(bundle, after, options, draft / "training")
        if not bundle.weights:
            # this file lists the recommenders
            shutil.copyfile((bundle.run or model) / STORED_RECIPE_FILE, draft / STORED_RECIPE_FILE)
        elif model != out:
            link_model_files(model, draft)
        rows = after.rows if early else after.rows.with_columns(part=pl.lit("train"))
        write_model_data(draft, str(options.model), after.items, rows, stored.without_reserved_users(measured))
        shutil.rmtree(draft / "training", ignore_errors=True)
        publish_folder(draft, out, keep=model == out)
    if options.server is not None:
        _reload_service(options.server, options.key_env)
    return {
        "new interactions": added,
        "interactions": after.rows.height,
        "new items": len(after.items) - len(before.items),
        "items": len(after.items),
        "weights": f"trained for {options.train} more steps" if options.train else "unchanged",
        "folder": str(out),
        "service": "reloaded" if options.server else f"llmrec serve {out}",
    }


def _output_folder(options: RefreshOptions, bundle: Bundle) -> Path:
    """Return the output folder."""
    refreshed = bool(bundle.folder) and (Path(bundle.folder) / MARK_FILE).is_file()
    if options.out is None and not refreshed:
        raise DataError(
            f"{options.model} is a run folder, which is never changed; give an output folder with --out",
            kind="missing-key",
            column="--out",
        )
    out = options.out or Path(bundle.folder)
    check_other_files(out, "--out")
    if options.train is not None and bundle.run is None:
        raise DataError(
            f"--train needs a run folder, and {options.model} is not one; give the run folder, with --out {out}",
            kind="unsupported",
            column="--train",
        )
    return out


def _read_model_data(bundle: Bundle, reserved: float | None) -> _ModelData:
    """Read the interactions and items of a run or of an earlier refresh.

    Args:
        bundle: The model of either.
        reserved: The fraction of a run's validation users used for ensemble weights; the interactions of the others
            remain validation data. None: there is no early stopping.
    """
    if bundle.run is not None:
        recipe = load_stored_recipe(bundle.run)
        data = load_data(recipe.data, seed=recipe.seed)
        rows = data.interactions.with_columns(pl.col("user_id", "item_id").cast(pl.String), part=pl.lit("train"))
        if reserved is not None:
            cut = split_dataset(data, recipe.data.split, seed=recipe.seed)
            order = time_order(data, recipe.seed, ties=recipe.data.split.ties)
            rows = _mark_validation_rows(rows[order], split_validation_users(cut, reserved)[0].valid)
        return _ModelData(
            rows.select(INTERACTION_COLUMNS), dict(items_with_stored_texts(data.items, recipe.data.texts)), data.users
        )
    result = read_training_data(Path(bundle.folder), seed=bundle.seed)
    if result is None:
        raise DataError(
            f"{bundle.folder} contains no interactions; give the run folder",
            kind="unsupported",
            at=bundle.folder,
        )
    parts = (("train", result.train), ("valid", result.valid), ("train", result.test))
    rows = pl.concat([frame.with_columns(part=pl.lit(name)) for name, frame in parts if frame.height])
    return _ModelData(rows.select(INTERACTION_COLUMNS), dict(result.dataset.items))


def _mark_validation_rows(rows: pl.DataFrame, valid: pl.DataFrame) -> pl.DataFrame:
    """Return rows in time order with validation interactions marked and earlier duplicates removed."""
    pairs = valid.select(pl.col("user_id", "item_id").cast(pl.String)).unique().with_columns(held=pl.lit(True))
    result = rows.join(pairs, on=["user_id", "item_id"], how="left", maintain_order="left")
    last = pl.int_range(pl.len()).over("user_id", "item_id") == pl.len().over("user_id", "item_id") - 1
    result = result.filter(pl.col("held").is_null() | last)
    return result.with_columns(part=pl.when(pl.col("held")).then(pl.lit("valid")).otherwise(pl.lit("train"))).drop(
        "held"
    )


def _add_new_data(before: _ModelData, options: RefreshOptions, seed: int) -> tuple[_ModelData, int]:
    """Add new interactions and items, without duplicates."""
    rows, items = before.rows, dict(before.items)
    if options.items is not None:
        items.update(read_items(options.items))
    if options.events is None:
        new = rows.select("user_id", "item_id", "rating", "timestamp").clear()
    elif _is_store(options.events):
        store = ServiceStore.open(options.events)
        try:
            put, removed = store.item_changes()
            items.update(put)
            erased = store.erased_among(rows["user_id"].unique())
            rows = rows.filter(~pl.col("user_id").is_in(erased) & ~pl.col("item_id").is_in(list(removed)))
            items = {name: item for name, item in items.items() if name not in removed}
            events = [(event.user_id, event.item_id, event.rating, event.timestamp) for event in store.all_events()]
        finally:
            store.close()
        schema = {name: SCHEMA[name] for name in ("user_id", "item_id", "rating", "timestamp")}
        new = pl.DataFrame(events, schema=schema, orient="row").filter(~pl.col("item_id").is_in(list(removed)))
    else:
        new = _align_times(_read_events(options.events), rows)
    strange = new.filter(~pl.col("item_id").is_in(list(items)))["item_id"].unique().sort().to_list()
    if strange:
        raise DataError(
            f"{len(strange)} items of the new interactions have no title, such as {strange[0]!r}; give a table with "
            "--items",
            kind="unknown-name",
            column="--items",
        )
    same = ["user_id", "item_id", "timestamp"]
    fresh = new.unique(same, keep="first", maintain_order=True).join(rows, on=same, how="anti", nulls_equal=True)
    # Validation pairs are excluded from training, including their repetitions.
    held = rows.filter(pl.col("part") == "valid")
    fresh = fresh.join(held, on=["user_id", "item_id"], how="anti")
    both = pl.concat([rows, fresh.with_columns(part=pl.lit("train")).select(INTERACTION_COLUMNS)])
    # Readers of a split rely on the order of each user's interactions; its seed orders ties.
    data = Dataset(name="refreshed", noun="items", interactions=conform_to_schema(both), items=items)
    return _ModelData(both[time_order(data, seed)], items, before.users), fresh.height


def _read_events(path: str) -> pl.DataFrame:
    """Read a table of interactions: user_id, item_id and optionally rating and timestamp."""
    read = read_table(Path(path))
    for name in ("user_id", "item_id"):
        if name not in read.frame.columns:
            raise DataError.at(
                read.name,
                "missing-column",
                f" has no column {name!r}{did_you_mean(name, read.frame.columns)}; use the "
                "column names user_id, item_id, rating, timestamp",
                name,
            )
    columns = {name: id_column(read, name).cast(pl.String) for name in ("user_id", "item_id")}
    nothing = pl.repeat(None, read.frame.height, dtype=pl.Float64, eager=True)
    has = read.frame.columns
    columns["rating"] = number_column(read, "rating", "a rating") if "rating" in has else nothing
    columns["timestamp"] = time_column(read, "timestamp") if "timestamp" in has else nothing
    return pl.DataFrame(columns)


def _align_times(new: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Return new interactions with times in the unit of the existing ones.

    Interactions without times follow the known ones in order; those with a known pair are duplicates.
    """
    latest, least = rows["timestamp"].max(), new["timestamp"].max()
    if not isinstance(latest, float):
        return new
    if isinstance(least, float):
        if is_epoch_time(latest) and is_epoch_time(least):
            return new.with_columns(
                pl.col("timestamp") * (time_units_per_second(latest) / time_units_per_second(least))
            )
        return new
    pair = ["user_id", "item_id"]
    fresh = new.unique(pair, keep="first", maintain_order=True).join(rows, on=pair, how="anti", maintain_order="left")
    after = (pl.int_range(1, pl.len() + 1) * time_units_per_second(latest)).cast(pl.Float64)
    return fresh.with_columns(timestamp=latest + after)


def _is_store(events: str) -> bool:
    if events.startswith(POSTGRES_PREFIXES):
        return True
    try:
        with Path(events).open("rb") as file:
            return file.read(15) == b"SQLite format 3"
    except OSError:
        # the table reader reports why it cannot be read
        return False


def _uses_early_stopping(bundle: Bundle, fusions: Sequence[stored.StoredEnsemble]) -> bool:
    """Whether a baseline of a task or a member of an ensemble uses early stopping on validation interactions."""
    members = [part.baseline for fused in fusions for part in fused.parts if part.baseline is not None]
    served = [baseline.name for section in bundle.tasks.present().values() for baseline in section.baselines]
    return any(stops_early(name) for name in (*members, *served))


def _continue_training(bundle: Bundle, state: _ModelData, options: RefreshOptions, folder: Path) -> Path:
    """Continue training on all interactions, and return the folder of the merged model."""
    from llmrec.pipeline import run as pipeline

    assert bundle.run is not None
    recipe = load_stored_recipe(bundle.run)
    rated = state.rows["rating"].null_count() < state.rows.height
    everything = Dataset(
        name=bundle.run.name,
        noun=bundle.noun,
        interactions=conform_to_schema(state.rows),
        items=state.items,
        users=state.users,
        rating_scale=(recipe.data.rating_scale or bundle.rating_scale) if rated else None,
    )
    # Nothing is held out, so there is no validation loss or early stopping.
    new = {"start": str(bundle.run), "steps": options.train, "valid_rows": 0, "judge": None}
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update=new), "name": folder.name})
    pipeline.train(changed, folder, data=split_without_test(everything, seed=recipe.seed))
    return folder / "merged"


def _reload_service(url: str, key_env: str | None) -> None:
    """Make a running service reload its folder."""
    httpx = require("httpx", "openai")
    key = None if key_env is None else os.environ.get(key_env)
    if key_env is not None and not key:
        raise DataError(f"--key-env: the variable {key_env} is not set", kind="missing-value", column="--key-env")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.post(f"{url.rstrip('/')}/v1/reload", headers=headers, timeout=600)
    except httpx.HTTPError as error:
        raise LlmrecError(
            f"--server {url}: {type(error).__name__}; reload the service with POST /v1/reload. The output folder is "
            "complete",
            kind="unreachable",
            column="--server",
        ) from None
    if answer.status_code != 200:
        message = answer.json().get("error", {}).get("message", "") if answer.content else ""
        raise LlmrecError(f"--server {url} answered {answer.status_code}: {message}", kind="failed", column="--server")
