"""Paths in recipe files: relative to the working folder or, if missing there, to the folder of the file."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrec.durable import Json
from llmrec.errors import LlmrecError
from llmrec.recipe.schema import Recipe

_DATA_KEYS = (
    ("source",),
    ("path",),
    ("items",),
    ("users",),
    ("facts", "path"),
    ("texts", "path"),
    *(("files", part) for part in ("train", "valid", "test")),
)
_PATH_KEYS = (
    *((table, *key) for table in ("data", "reviews") for key in _DATA_KEYS),
    ("index", "path"),
    ("train", "start"),
    ("train", "teacher", "run"),
    ("model", "name"),
    ("encoder",),
    ("index", "semantic", "encoder"),
    ("augment", "encoder"),
)
# Keys whose values may be names on the hub or of data sets: paths must begin with a dot or be recipe files.
_NAME_KEYS = ("source", "name", "encoder")
# A database path follows one of these prefixes; with a fourth slash, the path is absolute.
_DATABASE_PREFIX = re.compile(r"(?:sqlite|duckdb):///(?!/)")


def resolve_paths(values: dict[str, Json], folder: Path, sought: dict[str, Path]) -> None:
    """Replace paths that exist only relative to the folder of the recipe file, in place.

    Args:
        values: The values of the file.
        folder: Its folder.
        sought: Receives the paths that exist in neither folder, with that folder.
    """
    for *parents, last in _PATH_KEYS:
        section: Any = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        named = section.get(last) if isinstance(section, dict) else None
        if not isinstance(section, dict) or not isinstance(named, str) or not named:
            continue
        head = result.group() if (result := _DATABASE_PREFIX.match(named)) else ""
        path = named.removeprefix(head)
        if "://" in path or path.startswith("~") or Path(path).is_absolute() or _path_exists(path):
            continue
        if last in _NAME_KEYS and not path.startswith(".") and not path.endswith(".yaml"):
            continue
        candidate = str(folder / path)
        if _path_exists(candidate):
            section[last] = head + candidate
        else:
            sought[path] = folder


@contextmanager
def name_searched_folders(recipe: Recipe) -> Iterator[None]:
    """Add both searched folders to the error about a missing path."""
    try:
        yield
    except LlmrecError as error:
        folder = recipe.sought.get(str(Path(error.file))) if error.file and error.kind == "missing-file" else None
        if folder is None or folder.resolve() == Path.cwd():
            raise
        raise error.reworded(
            f"{error}. Paths of a recipe are relative to the working folder, {Path.cwd()}, or else to the recipe's "
            f"folder, {folder.resolve()}"
        ) from error


def _path_exists(path: str) -> bool:
    """Whether a path, a spreadsheet with sheet name, or a file pattern exists."""
    start = Path(Path(path).anchor)
    try:
        if Path(path).exists() or Path(path.partition("#")[0] or path).is_file():
            return True
        return glob.has_magic(path) and any(start.glob(str(Path(path).relative_to(start))))
    except (OSError, ValueError):
        return False
