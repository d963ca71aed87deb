"""Builds feature stores from texts, and compares, corrects and deletes their contents."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmrec import __version__
from llmrec.data.features import (
    ANSWERS_FILE,
    KINDS,
    USER_KINDS,
    FeatureKind,
    Features,
    FeatureStore,
    Pair,
    Provenance,
    lock_store,
    remove_old_versions,
    write_version,
)
from llmrec.data.read.files import expand_path
from llmrec.data.read.table import read_table
from llmrec.data.read.tables import find_column
from llmrec.data.read.typed import check_unique_ids, id_column, text_column
from llmrec.errors import DataError
from llmrec.models.text_encoder import text_embedder

log = logging.getLogger(__name__)

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
# Number of ids per look-up, and of look-ups per measurement.
_BATCH, _LOOKUPS = 100, 2000


def features_from_texts(
    kind: FeatureKind,
    written: Mapping[str, str],
    *,
    encoder: str = DEFAULT_ENCODER,
    provenance: Provenance,
    seen: Mapping[str, frozenset[Pair]] | None = None,
) -> Features:
    """Convert texts to features with vectors.

    Args:
        kind: The kind of the ids: users or items.
        written: Texts by id; blank ones are omitted.
        encoder: A text encoder, by name or folder.
        provenance: The provenance of the texts, without the encoder.
        seen: The pairs that each text was generated from.

    Raises:
        DataError: If all texts are blank.
        ModelError: If the encoder is missing.
    """
    kept = {item: text for item, text in sorted(written.items()) if text.strip()}
    if not kept:
        raise DataError(f"no {kind} has a text, so there are no features to create", kind="empty")
    embedder = text_embedder(encoder)
    return Features(
        kind,
        tuple(kept),
        embedder(list(kept.values())),
        replace(provenance, encoder={"name": encoder, "stamp": embedder.stamp}, version=__version__),
        texts=tuple(kept.values()),
        seen={item: pairs for item, pairs in (seen or {}).items() if item in kept},
    )


def features_from_table(
    path: str, kind: FeatureKind, *, column: str = "text", seen: str | None = None, encoder: str = DEFAULT_ENCODER
) -> Features:
    """Read the texts of a table as features.

    Args:
        path: A table with the column ``user_id`` or ``item_id``, and a column of texts.
        kind: The kind of the ids: users or items.
        column: Name of the text column.
        seen: A table of the interactions that each text was written from, with the columns user_id and item_id.
        encoder: A text encoder, by name or folder.

    Raises:
        DataError: If a table cannot be read, an id occurs twice, or ``seen`` has none of the ids.
    """
    table = read_table(expand_path(path))
    person = kind in USER_KINDS
    key = find_column(table, "user_id" if person else "item_id", "", f"--kind {kind}")
    text = find_column(table, column, "", "--text")
    assert key is not None and text is not None
    ids = id_column(table, key)
    check_unique_ids(table, key, ids, kind, "keep one of its texts")
    names = ids.to_list()
    written = dict(zip(names, text_column(table, text), strict=True))
    pairs: dict[str, set[Pair]] = {}
    if seen is not None:
        interactions = read_table(expand_path(seen))
        for user, item in zip(id_column(interactions, "user_id"), id_column(interactions, "item_id"), strict=True):
            pairs.setdefault(str(user if person else item), set()).add((str(user), str(item)))
        with_text = [name for name in names if written[name].strip()]
        unmatched = [name for name in with_text if name not in pairs]
        if with_text and len(unmatched) == len(with_text):
            raise DataError.at(
                interactions.name,
                "mismatch",
                f" contains none of the {kind}s of {table.name}, such as {with_text[0]!r}; use the same ids in both",
                "user_id" if person else "item_id",
            )
        if unmatched:
            log.warning(
                "%s: %s of the %s %ss of %s are missing, such as %r; their texts are treated as written from no "
                "interactions",
                *(interactions.name, f"{len(unmatched):,}", f"{len(with_text):,}", kind, table.name, unmatched[0]),
            )
    provenance = Provenance(system="import", generator={"file": table.name, "sha256": table.sha256})
    return features_from_texts(
        kind,
        written,
        encoder=encoder,
        provenance=provenance,
        seen={entry: frozenset(known) for entry, known in pairs.items()},
    )


# --------------------------------------------------------------------------- one store


def all_features(store: FeatureStore, kind: FeatureKind) -> Features:
    """Return all features of users or of items."""
    names = store.ids(kind)
    text = store.texts(kind, names)
    return Features(
        kind,
        names,
        store.get(kind, names)[0],
        store.provenance(kind),
        texts=[text.get(name, "") for name in names] if text else (),
        seen=store.seen_by(kind),
        fallback=store.fallback(kind),
    )


@dataclass(frozen=True)
class DeletionResult:
    """The result of deleting a user's data.

    Attributes:
        text: Whether there was a text on the user.
        pairs: Number of the user's interactions that texts were generated from.
        others: Ids of other texts that were generated from some of them; these are kept and should be regenerated.
    """

    text: bool
    pairs: int
    others: tuple[str, ...]


def forget_user(folder: Path, user: str) -> DeletionResult:
    """Delete a user's text, vector, interactions and cached answers, and remove earlier versions of the store.

    Answers and older versions are removed first and for all users, since they do not record whom they are about: a user
    with a blank answer has no text, and a killed call is completed by the next one.

    Raises:
        DataError: If the store has nothing on the user; the cached answers are removed all the same.
        LlmrecError: If another process writes to the store.
    """
    FeatureStore.open(folder)
    with lock_store(folder) as root:
        # Cached questions and answers of a language model, with the other files of the database.
        for path in root.glob(f"{ANSWERS_FILE}*"):
            path.unlink()
        remove_old_versions(root)
        store = FeatureStore.open(folder)
        tables = [all_features(store, kind) for kind in store.kinds]
        pairs = {pair for table in tables for known in table.seen.values() for pair in known if pair[0] == user}
        entries = [(table.kind, item, known) for table in tables for item, known in table.seen.items()]
        others = sorted(
            item for kind, item, known in entries if known & pairs and not (kind in USER_KINDS and item == user)
        )
        had_text = any(table.kind in USER_KINDS and user in table.ids for table in tables)
        if not had_text and not pairs:
            raise DataError.at(
                folder, "unknown-name", f" has no data on user {user!r}; cached model answers were removed"
            )
        write_version(root, [_without_user(table, user, pairs) for table in tables], dtype=store.dtype, keep=1)
    return DeletionResult(had_text, len(pairs), tuple(others))


def _without_user(table: Features, user: str, pairs: set[Pair]) -> Features:
    of_persons = table.kind in USER_KINDS
    kept = [row for row, item in enumerate(table.ids) if not of_persons or item != user]
    seen = {item: known - pairs for item, known in table.seen.items() if not of_persons or item != user}
    return Features(
        table.kind,
        [table.ids[row] for row in kept],
        table.vectors[kept],
        table.provenance,
        texts=[table.texts[row] for row in kept] if table.texts else (),
        seen={item: frozenset(known) for item, known in seen.items() if known},
        fallback=table.fallback,
    )


def edit_text(folder: Path, kind: FeatureKind, item: str, text: str) -> tuple[FeatureKind, ...]:
    """Correct a text, and compute its vector again with the text encoder of the store.

    Returns:
        Kinds of texts that were generated from it, which do not change.

    Raises:
        DataError: If the store has no text with this id or was built with another encoder, or the text is blank.
        LlmrecError: If another process writes to the store.
    """
    store = FeatureStore.open(folder)
    if kind not in store.kinds or not store.texts(kind, [item]):
        raise DataError.at(folder, "unknown-name", f" has no text of {kind} {item!r}")
    if not text.strip():
        raise DataError(f"the text of {kind} {item!r} would be blank; erase it with forget instead", kind="bad-value")
    spec = store.provenance(kind).encoder
    if "name" not in spec:
        raise DataError.at(folder, "unsupported", " does not record the encoder of its vectors; rebuild the store")
    embedder = text_embedder(str(spec["name"]))
    if embedder.stamp != spec.get("stamp"):
        raise DataError.at(folder, "mismatch", f" was built with another version of {spec['name']}; rebuild the store")
    with lock_store(folder) as root:
        store = FeatureStore.open(folder)
        tables = {other: all_features(store, other) for other in store.kinds}
        table = tables[kind]
        row = list(table.ids).index(item)
        vectors, new_texts = np.array(table.vectors), list(table.texts)
        vectors[row], new_texts[row] = embedder([text])[0], text
        tables[kind] = replace(table, vectors=vectors, texts=new_texts)
        write_version(root, list(tables.values()), dtype=store.dtype)
    synthetic = tables.get("synthetic")
    return ("synthetic",) if kind == "user" and synthetic is not None and item in synthetic.ids else ()


@dataclass(frozen=True)
class StoreDifference:
    """The differences between two versions of a feature store."""

    kind: FeatureKind
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[tuple[str, str, str], ...]


def compare_stores(old: FeatureStore, new: FeatureStore) -> list[StoreDifference]:
    """Compare two feature stores: added and removed ids, and changed texts."""
    results = []
    for kind in KINDS:
        before, after = (set(store.ids(kind)) if kind in store.kinds else set() for store in (old, new))
        both = sorted(before & after)
        texts_before, texts_after = ((store.texts(kind, both) if both else {}) for store in (old, new))
        changed = tuple(
            (item, texts_before.get(item, ""), texts_after.get(item, ""))
            for item in both
            if texts_before.get(item) != texts_after.get(item)
        )
        if before or after:
            results.append(StoreDifference(kind, tuple(sorted(after - before)), tuple(sorted(before - after)), changed))
    return results


def measure_latency(store: FeatureStore, kind: FeatureKind) -> dict[str, float]:
    """Measure the p50 and p99 latency of look-ups in microseconds, for one id and for a hundred ids."""
    names = store.ids(kind)
    rng = np.random.default_rng(0)
    drawn = [names[index] for index in rng.integers(0, len(names), _LOOKUPS).tolist()]
    ids = [item if n % 2 else item + "?" for n, item in enumerate(drawn)]

    def microseconds(requested: Sequence[str]) -> float:
        begin = time.perf_counter()
        store.get(kind, requested)
        return (time.perf_counter() - begin) * 1e6

    single = [microseconds([name]) for name in ids]
    many = [microseconds(ids[at : at + _BATCH]) for at in range(0, len(ids) - _BATCH + 1, _BATCH)]
    return {
        "single_p50_us": _percentile(single, 50),
        "single_p99_us": _percentile(single, 99),
        "hundred_p50_us": _percentile(many, 50),
        "hundred_p99_us": _percentile(many, 99),
    }


def _percentile(values: Sequence[float], share: float) -> float:
    return round(float(np.percentile(np.array(values), share)), 1)
