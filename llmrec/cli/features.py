"""The commands `llmrec features`: import, show, compare, correct, delete and time feature stores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import format_number, say, show_values, store_facts

Store = Annotated[
    Path,
    OptionHelp(
        argument=True, metavar="STORE", help="Folder of a feature store, see docs/text-features-and-cold-start.md."
    ),
]
Kind = Annotated[Literal["user", "item", "synthetic"], OptionHelp(help="Kind of entity.")]


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Options with the folder of a feature store."""

    store: Store


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of `llmrec features import`."""

    texts: Annotated[
        str, OptionHelp(argument=True, metavar="TEXTS", help="Table with user_id or item_id, and a text column.")
    ]
    out: Annotated[Path, OptionHelp(help="Feature store to write. An existing store gets a new version.")]
    kind: Kind = "item"
    text: Annotated[str, OptionHelp(help="Name of the text column.")] = "text"
    seen: Annotated[
        str | None, OptionHelp(help="Table of the interactions on which the texts are based, with user_id and item_id.")
    ] = None
    encoder: Annotated[str, OptionHelp(help="Text encoder: name or folder.")] = "all-MiniLM-L6-v2"


def import_texts(options: ImportOptions) -> None:
    """Import texts into a feature store.

    An existing store keeps its texts of other kinds.

    Example:
        llmrec features import item_texts.csv --out features --kind item
    """
    from llmrec.augment.stores import all_features, features_from_table
    from llmrec.data.features import FeatureStore, lock_store, write_version

    tables = [
        features_from_table(
            options.texts, options.kind, column=options.text, seen=options.seen, encoder=options.encoder
        )
    ]
    with lock_store(options.out) as folder:
        if (folder / "current").is_file():
            store = FeatureStore.open(folder)
            tables += [all_features(store, other) for other in store.kinds if other != options.kind]
        write_version(folder, tables)
    show_values("features", _store_summary(options.out))


@dataclass(frozen=True, kw_only=True)
class ShowOptions(StoreOptions):
    """Options of `llmrec features show`."""

    ids: Annotated[
        tuple[str, ...],
        OptionHelp(
            argument=True,
            metavar="[ID]...",
            help="IDs of the users or items whose texts to print. Default: print a summary.",
        ),
    ] = ()
    kind: Kind = "user"


def show_store(options: ShowOptions) -> None:
    """Print a summary of a feature store, or its texts.

    Example:
        llmrec features show features C1042 --kind user
    """
    from llmrec.data.features import FeatureStore

    if not options.ids:
        show_values("features", _store_summary(options.store))
        return
    store = FeatureStore.open(options.store)
    texts, seen = store.texts(options.kind, options.ids), store.seen_by(options.kind)
    store_facts(texts={name: {"text": texts.get(name), "seen": len(seen.get(name, ()))} for name in options.ids})
    for name in options.ids:
        say(f"{name}: {texts.get(name, 'no text')}")
        if name in seen:
            say(f"    written from {len(seen[name])} interactions")


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """Options of `llmrec features diff`."""

    old: Store
    new: Annotated[Path, OptionHelp(argument=True, metavar="STORE", help="Folder of the newer feature store.")]


def diff(options: DiffOptions) -> None:
    """Compare two feature stores.

    Exit code 1 if they differ.

    Example:
        llmrec features diff features-old features-new
    """
    from llmrec.augment.stores import compare_stores
    from llmrec.data.features import PLURALS, FeatureStore

    differences = compare_stores(FeatureStore.open(options.old), FeatureStore.open(options.new))
    store_facts(differences=differences)
    for kind in differences:
        counted = f"{len(kind.added)} added, {len(kind.removed)} removed, {len(kind.changed)} texts changed"
        say(f"{PLURALS[kind.kind]}: {counted}")
        for name, before, after in kind.changed[:20]:
            say(f"  {name}\n    - {before}\n    + {after}")
    if any(kind.added or kind.removed or kind.changed for kind in differences):
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class EditOptions(StoreOptions):
    """Options of `llmrec features edit`."""

    name: Annotated[str, OptionHelp(argument=True, metavar="ID", help="ID of the user or item whose text to change.")]
    text: Annotated[str, OptionHelp(help="New text.")]
    kind: Kind = "user"


def edit(options: EditOptions) -> None:
    """Change one text in a feature store.

    Its embedding is computed again with the text encoder of the store.

    Example:
        llmrec features edit features C1042 --text 'Bakes bread at home.'
    """
    from llmrec.augment import stores

    name, text, kind = options.name, options.text, options.kind
    derived = stores.edit_text(options.store, kind, name, text)
    store_facts(kind=kind, id=name, text=text, made_from_it=derived)
    for other in derived:
        say(
            f"not updated: the text of {other} {name}, which was written from this text; change it with edit --kind "
            f"{other}"
        )


@dataclass(frozen=True, kw_only=True)
class ForgetOptions(StoreOptions):
    """Options of `llmrec features forget`."""

    user: Annotated[str, OptionHelp(argument=True, metavar="USER", help="User to erase.")]


def forget(options: ForgetOptions) -> None:
    """Erase a user: text, embedding and interactions.

    Lists the users whose texts were written from some of the erased interactions.

    Example:
        llmrec features forget features C1042
    """
    from llmrec.augment import stores

    erased = stores.forget_user(options.store, options.user)
    store_facts(erased=erased)
    say(f"erased: {'a text, ' if erased.text else ''}{erased.pairs} interactions; earlier versions are removed")
    if erased.others:
        say(
            "generate these texts again, since they were written from erased interactions too: "
            f"{', '.join(erased.others)}"
        )


def bench(options: StoreOptions) -> None:
    """Measure the lookup latency of a feature store.

    Looks up one ID and 100 IDs at a time; half of them are unknown.

    Example:
        llmrec features bench features
    """
    from llmrec.augment.stores import measure_latency
    from llmrec.data.features import PLURALS, FeatureStore

    store = FeatureStore.open(options.store)
    for kind in store.kinds:
        show_values(f"look-ups of {PLURALS[kind]}", measure_latency(store, kind), format_number)


COMMANDS: Mapping[str, Callable[[Any], None]] = {
    "import": import_texts,
    "show": show_store,
    "diff": diff,
    "edit": edit,
    "forget": forget,
    "bench": bench,
}


def _store_summary(folder: Path) -> dict[str, str]:
    from llmrec.data.features import PLURALS, FeatureStore

    store = FeatureStore.open(folder)
    facts = {}
    for kind in store.kinds:
        origin, seen, name = store.provenance(kind), store.seen_by(kind), PLURALS[kind]
        facts[name] = f"{len(store.ids(kind)):,} vectors of {store.width(kind)}"
        facts[f"{name}: made by"] = origin.system + (f", split {origin.split[:12]}" if origin.split else "")
        facts[f"{name}: texts by"] = json.dumps(dict(origin.generator)) if origin.generator else "none: not generated"
        facts[f"{name}: encoder"] = str(origin.encoder.get("name", "none"))
        facts[f"{name}: have seen"] = f"{sum(map(len, seen.values())):,} interactions"
    return facts
