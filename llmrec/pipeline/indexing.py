"""Builds the item index of a recipe, and adds its tokens to the base model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmrec.baselines.fits import fit_baseline
from llmrec.data.split import SplitDataset
from llmrec.durable import write_checked_json
from llmrec.errors import DataError
from llmrec.fingerprint import fingerprint, stage_settings
from llmrec.index import table
from llmrec.index.numbers import user_tokens
from llmrec.index.semantic import item_fields, item_vectors
from llmrec.index.table import Embed, ItemIndex
from llmrec.models.text_encoder import text_embedder, text_embedder_for_split
from llmrec.pipeline.resume import read_stage
from llmrec.recipe.schema import IndexSection, ModelSection
from llmrec.registry import BASELINES, INDEXES
from llmrec.resources import cache_dir
from llmrec.tasks.held_items import HeldItems
from llmrec.types import Item

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

FOLDER = "index"
"""The folder of the index in a model folder."""
COLLABORATIVE_TOKENS = "collaborative"
"""The value of ``index.tokens`` for token embeddings initialised from a recommender's item vectors."""
# Key of the index settings with the identity of the text encoder.
_ENCODER_STAMP_KEY = "encoder_stamp"
# Schemes that are slow to build, and therefore cached.
_CACHED_SCHEMES = ("collaborative", "semantic")


def build_index(section: IndexSection, data: SplitDataset, *, seed: int, fresh: bool = False) -> ItemIndex:
    """Build an item index, or load the cached index with the same settings, data and seed, unless ``fresh``.

    With ``index.ids: tokens`` every user with training interactions also has a token.
    """
    index = _load_or_build_index(section, data, seed=seed, fresh=fresh)
    if section.ids == "text":
        return index
    users = user_tokens(data.train["user_id"].unique().to_list(), seed) if section.ids == "tokens" else {}
    return replace(index, users=users, writes_ids=True)


def _load_or_build_index(section: IndexSection, data: SplitDataset, *, seed: int, fresh: bool) -> ItemIndex:
    """Return the index of items without user tokens; slow schemes are cached.

    The cache key covers held-out interactions too, so that the audit's rebuild with other held-out interactions never
    reads the cached index.
    """
    embed = text_embedder_for_split(section.semantic.encoder, data) if section.scheme == "semantic" else None
    if section.scheme not in _CACHED_SCHEMES:
        return table.build_item_index(section, data, seed=seed)
    key = fingerprint(
        "index",
        made_by=[(INDEXES, section.scheme)],
        section=stage_settings(section, "index"),
        encoder=embed.stamp if embed else None,
        data=data.fingerprint,
        seed=seed,
    )
    folder = cache_dir() / "indexes" / key
    if folder.is_dir() and not fresh:
        try:
            return ItemIndex.load(folder)
        except DataError as error:
            log.warning("%s; building it again", error)
    built = table.build_item_index(section, data, seed=seed, embed=embed)
    if embed is not None:
        built = replace(built, settings={**built.settings, _ENCODER_STAMP_KEY: embed.stamp})
    built.save(folder)
    return built


def load_stored_index(folder: Path, scheme: str | None) -> ItemIndex | None:
    """Load the index from a model folder; None if items are not encoded."""
    if scheme is None:
        return None
    if (folder / FOLDER).is_dir():
        return ItemIndex.load(folder / FOLDER)
    if scheme == "title":
        return ItemIndex("title", {})
    raise DataError(
        f"{folder} was tuned on codes of the scheme {scheme!r}, but its folder {FOLDER}/ is missing; export the run "
        "again",
        kind="missing-file",
        at=folder / FOLDER,
    )


# --------------------------------------------------------------------------- text embeddings


def index_text_encoder(index: ItemIndex) -> Embed | None:
    """Return the text encoder with which an index was built; None if it used none."""
    stored = index.settings.get("semantic")
    if stored is None:
        return None
    embed, stamp = text_embedder(str(stored["encoder"])), index.settings.get(_ENCODER_STAMP_KEY)
    if stamp not in (None, embed.stamp):
        raise DataError(
            f"the index was built with another version of the text encoder {stored['encoder']!r}, so new items cannot "
            "be encoded; restore that version, or build the index and tune again",
            kind="mismatch",
            column="index.semantic.encoder",
        )
    return embed


def with_items_added(index: ItemIndex, items: Mapping[str, Item]) -> ItemIndex:
    """Add items to an index; the text encoder is loaded only if an item is new."""
    if all(item in index.codes for item in items):
        return index
    return index.extend(items, embed=index_text_encoder(index))


# --------------------------------------------------------------------------- the base model


def extend_base_model(
    base: str,
    model: ModelSection,
    section: IndexSection | None,
    index: ItemIndex | None,
    data: SplitDataset,
    folder: Path,
    *,
    seed: int,
    held: HeldItems | None = None,
) -> str:
    """Create a base model with the tokens of an index in ``folder/base``, and return the folder.

    The tokens of items held out by the alignment task are not initialised from their words: a token of a single item
    would reveal its title before training.

    If codes are ordinary text, no tokens are needed: the model's own folder is returned, and the copy of an earlier
    recipe is removed.
    """
    if index is None or not index.vocabulary:
        if (folder / "base.json").is_file():
            shutil.rmtree(folder / "base", ignore_errors=True)
            (folder / "base.json").unlink()
        return base
    from llmrec.models.item_tokens import save_with_item_tokens
    from llmrec.models.load import model_folder_hash

    start = section.tokens if section is not None else "words"
    words = start == "words"
    target, record = folder / "base", folder / "base.json"
    hidden = held.items if held is not None else frozenset()
    key = fingerprint(
        "tokens",
        modules=(save_with_item_tokens.__module__,),
        made_by=[(BASELINES, section.recommender)] if section and start == COLLABORATIVE_TOKENS else [],
        base=model_folder_hash(base),
        model=stage_settings(model, "train"),
        index=index.digest,
        section=stage_settings(section, "tokens") if section is not None else None,
        encoder=text_embedder_for_split(section.semantic.encoder, data).stamp
        if section and start == "vectors"
        else None,
        split=data.fingerprint if start == COLLABORATIVE_TOKENS else None,
        titles=data.dataset.fingerprint if start != "random" else None,
        hidden=sorted(hidden) if start != "random" else None,
        seed=seed,
    )
    stored = read_stage(record, key, itemgetter("stamp"))
    if stored is None or not target.is_dir() or model_folder_hash(str(target)) != stored["stamp"]:
        items = {item: entry for item, entry in data.dataset.items.items() if item not in hidden}
        titles = {item: entry.title for item, entry in items.items()}
        vectors = (
            _initial_item_vectors(section, items, data, seed)
            if section and start in ("vectors", COLLABORATIVE_TOKENS)
            else None
        )
        save_with_item_tokens(
            base,
            model,
            index,
            titles,
            target,
            words=words,
            seed=seed,
            vectors=vectors,
            whitened=start != COLLABORATIVE_TOKENS,
        )
        write_checked_json(record, {"key": key, "stamp": model_folder_hash(str(target))})
    return str(target)


def _initial_item_vectors(
    section: IndexSection, items: Mapping[str, Item], data: SplitDataset, seed: int
) -> dict[str, NDArray[np.float32]]:
    """Return item vectors from texts or training interactions; some items may have none."""
    if section.tokens == COLLABORATIVE_TOKENS:
        model = fit_baseline(section.recommender, {}, data, seed=seed)
        return {item: vector for item, vector in model.item_vectors().items() if item in items}
    names = sorted(items)
    entries = [items[name] for name in names]
    texts = section.semantic
    result = item_vectors(entries, item_fields(entries, texts), text_embedder(texts.encoder))
    return dict(zip(names, result, strict=True))
