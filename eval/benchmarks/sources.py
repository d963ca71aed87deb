"""Reads real data with the loaders and writes down what came out beside the published counts.

``LLMREC_DATA=FOLDER python -m eval.benchmarks.sources eval/results/sources.json``. MovieLens-100K comes with the
set-up. FOLDER holds what else is at hand, each under the name given below; what is missing is written down as missing,
and what cannot be read with the reason.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmrec.data.sources.table import load
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
# The official names of files that a folder holds under names of its own, packed.
OFFICIAL = {
    "amazon14_musical_instruments": {"reviews.jsonl.gz": "reviews_Musical_Instruments_5.json"},
    "ml_latest_small": {name + ".gz": name for name in ("ratings.csv", "movies.csv", "tags.csv")},
}


def section(name: str, source: str, folder: Path | None, scratch: Path) -> DataSection:
    """Describe a set, its files unpacked under their official names where they have others."""
    if folder is None:
        return DataSection(source=source)
    if name not in OFFICIAL:
        return DataSection(source=source, path=str(folder))
    # A folder with the official name, by which the loader knows which of the sets it is.
    place = scratch / name.replace("_", "-")
    place.mkdir()
    for packed, official in OFFICIAL[name].items():
        with gzip.open(folder / packed) as come, (place / official).open("wb") as go:
            shutil.copyfileobj(come, go)
    only = next(iter(OFFICIAL[name].values())) if len(OFFICIAL[name]) == 1 else ""
    return DataSection(source=source, path=str(place / only))


def read(name: str, scratch: Path) -> dict[str, Any]:
    """Read one set and describe what came out."""
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


def main(target: Path) -> None:
    """Read all of them and write."""
    with tempfile.TemporaryDirectory() as scratch:
        sets = {name: read(name, Path(scratch)) for name in SETS}
    result = {
        "command": "LLMREC_DATA=FOLDER python -m eval.benchmarks.sources eval/results/sources.json",
        "sets": sets,
    }
    write_json(target, result)
    sys.stdout.write(json.dumps(sets, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
