"""Reads published data sets with the loaders and compares their counts with the published ones.

``make bench NAME=sources DATA=FOLDER`` searches a folder and its subfolders for files of published data sets, reads
each and prints its description.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

from llmrec.data.read.files import normalise_file_name
from llmrec.data.sets.locate import match_category, match_wildcard
from llmrec.data.sets.pages import KnownFormat, known_formats
from llmrec.data.sets.table import load_data
from llmrec.errors import LlmrecError
from llmrec.recipe.schema import DataSection


def copies(folder: Path) -> Iterator[tuple[KnownFormat, Path]]:
    """Yield the published data sets with the interaction files that a folder and its subfolders seem to contain.

    The longest matching pattern of a name wins, and then data sets whose folder has their name.
    """
    pages = known_formats()
    others = {name for page in pages for layout in page.layouts if layout.items for name in layout.items.files}
    for directory in sorted({folder, *(path for path in folder.rglob("*") if path.is_dir())}):
        for path in sorted(path for path in directory.iterdir() if path.is_file()):
            name = normalise_file_name(path.name)
            fitting = {page.name: _fit(page, name) for page in pages if name not in others}
            best = [page for page in pages if fitting.get(page.name) and fitting[page.name] == max(fitting.values())]
            for page in [page for page in best if directory.name in page.folders] or best:
                yield page, path


def _fit(page: KnownFormat, name: str) -> int:
    """Return the number of literal characters in the best matching pattern of a data set; 0 if none matches."""
    patterns = [
        pattern
        for layout in page.layouts
        if match_category(layout, name) is not None
        for pattern in layout.events.files
    ]
    return max((len(pattern) for pattern in patterns if match_wildcard(pattern, name) is not None), default=0)


def check(folder: Path) -> None:
    """Read every copy of a published data set in a folder, and print its description."""
    any_copy = False
    for page, path in copies(folder):
        any_copy = True
        section = DataSection(source=page.name, path=str(path), duplicates="keep_last")
        begin = perf_counter()
        try:
            data = load_data(section, seed=0)
        except LlmrecError as error:
            report: dict[str, object] = {"rejected": str(error).replace(f"{folder}/", "")}
        else:
            users, items = (data.interactions[column].n_unique() for column in ("user_id", "item_id"))
            report = {
                "read": [users, items, data.interactions.height],
                "rows": int(data.provenance["rows"]),
                "published": data.provenance.get("published", "no counts of this file are published"),
                "notes": data.provenance.get("notes", "").replace(f"{folder}/", ""),
                "seconds": round(perf_counter() - begin, 1),
            }
        sys.stdout.write(f"{page.name}: {path.relative_to(folder)}: {json.dumps(report)}\n")
    if not any_copy:
        sys.stdout.write(f"{folder} has no files of published data sets; see docs/datasets-and-output-files.md\n")


def main(arguments: Sequence[str]) -> None:
    """Read the data sets of a folder and print the results."""
    if len(arguments) != 1:
        sys.exit("name a folder: make bench NAME=sources DATA=FOLDER")
    check(Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
