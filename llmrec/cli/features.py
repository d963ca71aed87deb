"""`llmrec features`: makes, shows, compares, corrects and times stores of features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from llmrec.cli.common import App
from llmrec.cli.show.console import say, short, show, tell

app = App(no_args_is_help=True)

Store = Annotated[Path, typer.Argument(metavar="STORE", help="A folder of features; docs/features.md.")]
Kind = Annotated[Literal["user", "item", "synthetic"], typer.Option("--kind", help="What the ids name.")]


@app.command("import")
def bring(
    texts: Annotated[str, typer.Argument(metavar="TEXTS", help="A table with user_id or item_id, and a text.")],
    out: Annotated[Path, typer.Option("--out", help="The store; a new version of it is published.")],
    kind: Kind = "item",
    text: Annotated[str, typer.Option("--text", help="Column of the texts.")] = "text",
    seen: Annotated[
        str | None,
        typer.Option("--seen", help="A table with user_id and item_id: the interactions that texts were written from."),
    ] = None,
    encoder: Annotated[str, typer.Option("--encoder", help="A text encoder, a name or a folder.")] = "all-MiniLM-L6-v2",
) -> None:
    """Make features of texts that somebody else wrote.

    Those of the other kind stay as they are.
    """
    from llmrec.augment.stores import from_table, whole
    from llmrec.data.features import FeatureStore, write_version, writing

    made = [from_table(texts, kind, column=text, seen=seen, encoder=encoder)]
    with writing(out) as place:
        if (place / "current").is_file():
            store = FeatureStore.open(place)
            made += [whole(store, other) for other in store.kinds if other != kind]
        write_version(place, made)
    show("features", _facts(out))


@app.command("show")
def what(
    store: Store,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Whose texts; none: what is in it.")
    ] = None,
    kind: Kind = "user",
) -> None:
    """Print what a store holds, or some of its texts."""
    from llmrec.data.features import FeatureStore

    if not ids:
        show("features", _facts(store))
        return
    opened = FeatureStore.open(store)
    texts, seen = opened.texts(kind, ids), opened.seen_by(kind)
    tell(texts={each: {"text": texts.get(each), "seen": len(seen.get(each, ()))} for each in ids})
    for each in ids:
        say(f"{each}: {texts.get(each, 'no text')}")
        if each in seen:
            say(f"    written from {len(seen[each])} interactions")


@app.command()
def diff(old: Store, new: Annotated[Path, typer.Argument(metavar="STORE", help="The newer one.")]) -> None:
    """Print what two stores say differently.

    Exit code 1 if they do.
    """
    from llmrec.augment.stores import compare
    from llmrec.data.features import PLURALS, FeatureStore

    found = compare(FeatureStore.open(old), FeatureStore.open(new))
    tell(differences=found)
    for each in found:
        counted = f"{len(each.added)} added, {len(each.removed)} removed, {len(each.changed)} texts changed"
        say(f"{PLURALS[each.kind]}: {counted}")
        for name, before, after in each.changed[:20]:
            say(f"  {name}\n    - {before}\n    + {after}")
    if any(each.added or each.removed or each.changed for each in found):
        raise typer.Exit(1)


@app.command()
def edit(
    store: Store,
    name: Annotated[str, typer.Argument(metavar="ID", help="Whose text.")],
    text: Annotated[str, typer.Option("--text", help="What it should say.")],
    kind: Kind = "user",
) -> None:
    """Correct a text.

    Its vector is computed again by the encoder of the store.
    """
    from llmrec.augment import stores

    made = stores.edit(store, kind, name, text)
    tell(kind=kind, id=name, text=text, made_from_it=made)
    for other in made:
        say(f"written from it, and unchanged: the text of {other} {name}; correct it with edit --kind {other}")


@app.command()
def forget(store: Store, user: Annotated[str, typer.Argument(metavar="USER", help="Who is erased.")]) -> None:
    """Erase a person: text, vector and interactions.

    Texts on others that had seen some of them are named.
    """
    from llmrec.augment import stores

    gone = stores.forget(store, user)
    tell(erased=gone)
    say(f"erased: {'a text, ' if gone.text else ''}{gone.pairs} interactions; versions before are removed")
    if gone.others:
        say(f"written from them too, and to be written anew: {', '.join(gone.others)}")


@app.command()
def bench(store: Store) -> None:
    """Time look-ups of one id and of a hundred.

    Half of them are unknown.
    """
    from llmrec.augment.stores import timed
    from llmrec.data.features import PLURALS, FeatureStore

    opened = FeatureStore.open(store)
    for kind in opened.kinds:
        show(f"look-ups of {PLURALS[kind]}", timed(opened, kind), short)


def _facts(folder: Path) -> dict[str, str]:
    from llmrec.data.features import PLURALS, FeatureStore

    store = FeatureStore.open(folder)
    facts = {}
    for kind in store.kinds:
        made, seen, name = store.provenance(kind), store.seen_by(kind), PLURALS[kind]
        facts[name] = f"{len(store.ids(kind)):,} vectors of {store.width(kind)}"
        facts[f"{name}: made by"] = made.system + (f", split {made.split[:12]}" if made.split else "")
        facts[f"{name}: texts by"] = json.dumps(dict(made.generator)) if made.generator else "nobody: as they are"
        facts[f"{name}: encoder"] = str(made.encoder.get("name", "none"))
        facts[f"{name}: have seen"] = f"{sum(map(len, seen.values())):,} interactions"
    return facts
