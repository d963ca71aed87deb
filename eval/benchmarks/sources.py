"""Reads published data sets with the loaders and compares the counts with the published ones.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.sources eval/results/sources.json``. MovieLens-100K comes with the
set-up. FOLDER contains other data sets under the names below; missing ones are recorded as missing, and unreadable ones
with the reason.

``make bench NAME=sources DATA=FOLDER`` searches a folder and its subfolders for files of published data sets, reads
each and prints the same; nothing is written unless ARGS names a file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from llmrec.data.read.files import plain_name
from llmrec.data.sets.locate import captured, fits
from llmrec.data.sets.pages import Known, published
from llmrec.data.sets.table import load
from llmrec.durable import write_json
from llmrec.errors import LlmrecError
from llmrec.recipe.schema import DataSection

# Name of the folder -> source, and the published counts of users, items and interactions.
SETS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "movielens-100k": ("movielens-100k", (943, 1_682, 100_000)),
    "amazon14_beauty": ("sequences", (22_363, 12_101, 198_502)),
    "amazon14_toys": ("sequences", (19_412, 11_924, 167_597)),
    "amazon14_musical_instruments": ("amazon-2014", (1_429, 900, 10_261)),
    "ml_latest_small": ("movielens-latest", (610, 9_724, 100_836)),
}
# Official names of files that are compressed under other names.
OFFICIAL = {
    "amazon14_musical_instruments": {"reviews.jsonl.gz": "reviews_Musical_Instruments_5.json"},
    "ml_latest_small": {name + ".gz": name for name in ("ratings.csv", "movies.csv", "tags.csv")},
}


def section(name: str, source: str, folder: Path | None, scratch: Path) -> DataSection:
    """Describe a data set, with its files unpacked under their official names."""
    if folder is None:
        return DataSection(source=source)
    if name not in OFFICIAL:
        return DataSection(source=source, path=str(folder))
    # The loader recognises the data set by the official folder name.
    place = scratch / name.replace("_", "-")
    place.mkdir()
    for packed, official in OFFICIAL[name].items():
        with gzip.open(folder / packed) as come, (place / official).open("wb") as go:
            shutil.copyfileobj(come, go)
    only = next(iter(OFFICIAL[name].values())) if len(OFFICIAL[name]) == 1 else ""
    return DataSection(source=source, path=str(place / only))


def read(name: str, scratch: Path) -> dict[str, Any]:
    """Read one data set and describe it."""
    source, published = SETS[name]
    found: dict[str, Any] = {"source": source, "published": list(published)}
    folder = None if name == source else Path(os.environ.get("LLMREC_DATA", ".")) / name
    if folder is not None and not folder.is_dir():
        return found | {"missing": True}
    try:
        data = load(section(name, source, folder, scratch), seed=0)
    except LlmrecError as error:
        return found | {"refused": str(error).replace(str(scratch) + "/", "").replace(str(folder), name)}
    users, items = (data.interactions[column].n_unique() for column in ("user_id", "item_id"))
    counts = [users, items, len(data.interactions)]
    return found | {"read": counts, "equal": counts == list(published), "says": data.provenance.get("published")}


def copies(folder: Path) -> Iterator[tuple[Known, Path]]:
    """Yield the published data sets with the interaction files that a folder and its subfolders seem to contain.

    The longest matching pattern of a name wins, and then data sets whose folder has their name.
    """
    pages = published()
    others = {name for page in pages for layout in page.layouts if layout.items for name in layout.items.files}
    for place in sorted({folder, *(path for path in folder.rglob("*") if path.is_dir())}):
        for path in sorted(path for path in place.iterdir() if path.is_file()):
            name = plain_name(path.name)
            fitting = {page.name: _fit(page, name) for page in pages if name not in others}
            best = [page for page in pages if fitting.get(page.name) and fitting[page.name] == max(fitting.values())]
            for page in [page for page in best if place.name in page.folders] or best:
                yield page, path


def _fit(page: Known, name: str) -> int:
    """Return the number of literal characters in the best matching pattern of a data set; 0 if none matches."""
    patterns = [pattern for layout in page.layouts if fits(layout, name) is not None for pattern in layout.events.files]
    return max((len(pattern) for pattern in patterns if captured(pattern, name) is not None), default=0)


def check(folder: Path) -> dict[str, Any]:
    """Read every copy of a published data set in a folder, and print its description."""
    found: dict[str, Any] = {}
    for page, path in copies(folder):
        where = str(path.relative_to(folder))
        section = DataSection(source=page.name, path=str(path), duplicates="keep_last")
        begin = perf_counter()
        try:
            data = load(section, seed=0)
        except LlmrecError as error:
            found[f"{page.name}: {where}"] = {"refused": str(error).replace(f"{folder}/", "")}
        else:
            users, items = (data.interactions[column].n_unique() for column in ("user_id", "item_id"))
            found[f"{page.name}: {where}"] = {
                "read": [users, items, data.interactions.height],
                "rows": int(data.provenance["rows"]),
                "says": data.provenance.get("published", "no counts of this file are published"),
                "notes": data.provenance.get("notes", "").replace(f"{folder}/", ""),
                "seconds": round(perf_counter() - begin, 1),
            }
        sys.stdout.write(f"{page.name}: {where}: {json.dumps(found[f'{page.name}: {where}'])}\n")
    if not found:
        sys.stdout.write(f"{folder} has no files of published data sets; see docs/datasets-and-output-files.md\n")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the available data sets, and write or print the results."""
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks.sources")
    parser.add_argument("target", type=Path, nargs="?", help="output file; optional with --check")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="search a folder for published data sets")
    given = parser.parse_args(arguments)
    if given.check is not None:
        found = check(given.check)
        if given.target is not None:
            write_json(given.target, {"command": "make bench NAME=sources DATA=FOLDER", "files": found})
        return
    if given.target is None:
        parser.error("name the file to write, or a folder after --check")
    with tempfile.TemporaryDirectory() as scratch:
        sets = {name: read(name, Path(scratch)) for name in SETS}
    result = {
        "command": "LLMREC_DATA=FOLDER python -m eval.benchmarks.sources eval/results/sources.json",
        "sets": sets,
    }
    write_json(given.target, result)
    sys.stdout.write(json.dumps(sets, indent=1) + "\n")


if __name__ == "__main__":
    main()
