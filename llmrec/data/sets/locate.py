"""Finds the files of a published data set in a folder or zip archive; downloads are cached."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from llmrec.data.read.files import DataFile, expand_path, list_files
from llmrec.data.read.limits import check_regular_file, format_error, suggest_file_name
from llmrec.data.sets.pages import KnownFormat, Layout, is_description_path
from llmrec.errors import DataError
from llmrec.resources import cache_dir


@dataclass(frozen=True)
class LocatedFiles:
    """The files of a data set in one of its published variants.

    ``category`` is the text that ``*`` matches in the pattern of the file of interactions.
    """

    where: str
    layout: Layout
    category: str
    events: DataFile
    items: DataFile | None
    people: DataFile | None
    renames: DataFile | None


def locate_files(known: KnownFormat, path: str | None, items: str | None) -> LocatedFiles:
    """Find the files of a data set, and download them if necessary and possible.

    Args:
        known: The data set.
        path: ``data.path``: a folder, an archive, or the file of interactions. None: llmrec's cache folder.
        items: ``data.items``: the file of items, if it is stored elsewhere.

    Raises:
        DataError: If a file is missing or ambiguous.
    """
    chosen = expand_path(path) if path is not None else _find_or_download(known)
    if not chosen.is_dir() and (chosen.exists() or chosen.is_symlink()):
        check_regular_file(chosen, _describe_download(known))
    named = chosen.is_file() and chosen.suffix.lower() != ".zip"
    if named:
        events = DataFile(str(chosen), chosen)
        layout, category = _find_layout(known, events)
        folder = chosen.parent
        return _locate_companion_files(known, str(folder), layout, category, events, list_files(folder), items)
    for root in (chosen, *(chosen / folder for folder in known.folders)):
        members = list_files(root) if root.exists() else []
        fitting = _find_interaction_files(known, members)
        if fitting:
            layout, category, events = _select_single_file(known, str(root), fitting)
            return _locate_companion_files(known, str(root), layout, category, events, members, items)
    if not chosen.exists():
        raise DataError(
            f"data.path={path}: the file or folder does not exist{suggest_file_name(chosen)}; "
            f"{_describe_download(known)}",
            kind="missing-file",
            at=chosen,
            column="data.path",
        )
    wanted = " or ".join(dict.fromkeys(pattern for layout in known.layouts for pattern in layout.events.files))
    raise DataError(
        f"data.path={path or chosen} contains no file {wanted} of {known.name} (each may end in .gz); "
        f"{_describe_download(known)}",
        kind="missing-file",
        at=chosen,
        column="data.path",
    )


def _describe_download(known: KnownFormat) -> str:
    return (
        f"download {known.fetch} from {known.page} (terms: {known.licence}) and set data.path to the folder, "
        "the zip or the file"
    )


def _find_or_download(known: KnownFormat) -> Path:
    if (folder := _wheel_folder(known)) is not None and _find_interaction_files(known, list_files(folder)):
        return folder
    home = cache_dir() / "data"
    # The name of a data set described by the user is a path, not a folder of the cache.
    for folder in (*known.folders, *(() if is_description_path(known.name) else (known.name,))):
        for path in (home / folder, home / f"{folder}.zip"):
            if path.exists():
                return path
    if known.download is None:
        raise DataError(
            f"source {known.name!r} needs data.path: {_describe_download(known)}",
            kind="missing-key",
            column="data.path",
        )
    archive = home / f"{known.folders[0] if known.folders else known.name}.zip"
    try:
        download_file(known.download, archive, md5=known.md5)
    except DataError as error:
        raise DataError(
            f"{known.name} is not on this machine: {error}. Options: {_describe_download(known)}, or use a network "
            f"with access to {urlsplit(known.download).hostname}",
            kind=error.kind,
            at=error.location,
        ) from error
    return archive


def _wheel_folder(known: KnownFormat) -> Path | None:
    """Return the data folder of an installed package without importing it; None if it is not installed."""
    package, _, folder = (known.wheel or "").partition("/")
    try:
        spec = find_spec(package) if package else None
    except (ImportError, ValueError):
        return None
    locations = spec.submodule_search_locations if spec is not None else None
    path = Path(next(iter(locations)), folder) if locations else None
    return path if path is not None and path.is_dir() else None


def match_wildcard(pattern: str, name: str) -> str | None:
    """Return the text that matches ``*`` in a pattern; None if the name does not match."""
    match = re.fullmatch(re.escape(pattern).replace(r"\*", "(.+)"), name, flags=re.IGNORECASE)
    return None if match is None else (match[1] if match.groups() else "")


def match_category(layout: Layout, name: str) -> str | None:
    """Return the category of an interaction file from its name; None if it is another file."""
    if any(fnmatchcase(name.lower(), pattern) for pattern in layout.events.skip):
        return None
    tried = (match_wildcard(pattern, name) for pattern in layout.events.files)
    return next((category for category in tried if category is not None), None)


def _find_interaction_files(known: KnownFormat, members: Sequence[DataFile]) -> list[tuple[Layout, str, DataFile]]:
    result: dict[tuple[str, str], tuple[Layout, str, DataFile]] = {}
    for layout in known.layouts:
        for member in members:
            category = match_category(layout, member.plain)
            if category is not None:
                # A file that is stored both compressed and uncompressed counts once; the uncompressed one sorts first.
                result.setdefault((member.folder, member.plain), (layout, category, member))
    return list(result.values())


def _select_single_file(
    known: KnownFormat, where: str, fitting: list[tuple[Layout, str, DataFile]]
) -> tuple[Layout, str, DataFile]:
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(member.name.removeprefix(f"{where}/") for _, _, member in fitting[:6])
    way = "" if fitting[0][2].inner is None else "; extract the archive first"
    raise DataError.at(
        where,
        "ambiguous",
        f" contains several interaction files of {known.name} ({names}); set data.path to one of these files{way}",
        "data.path",
    )


def _find_layout(known: KnownFormat, events: DataFile) -> tuple[Layout, str]:
    """Return the variant of the data set to which a given file belongs, by file name or else by extension."""
    for layout in known.layouts:
        category = match_category(layout, events.plain)
        if category is not None:
            return layout, category
    json = events.plain.lower().endswith(".json")
    for layout in known.layouts:
        if json == (layout.events.form.kind != "delimited"):
            return layout, ""
    wanted = " or ".join(layout.events.files[0] for layout in known.layouts)
    raise DataError.at(
        events.name,
        "wrong-format",
        f": {known.name} has files that end in {wanted}, not in this ending; {_describe_download(known)}",
    )


def _locate_companion_files(
    known: KnownFormat,
    where: str,
    layout: Layout,
    category: str,
    events: DataFile,
    members: Sequence[DataFile],
    items: str | None,
) -> LocatedFiles:
    """Return all files of the data set to which a file of interactions belongs."""
    siblings = [member for member in members if member.folder == events.folder]

    def companion(patterns: Sequence[str]) -> DataFile | None:
        for pattern in patterns:
            name = pattern.replace("{}", category) if category else pattern.replace("{}", "*")
            fitting = [file for file in siblings if match_wildcard(name, file.plain) is not None and file != events]
            if len({file.plain for file in fitting}) == 1:
                return fitting[0]
        return None

    entries: DataFile | None = None
    if layout.items is not None:
        entries = DataFile(items, expand_path(items)) if items is not None else companion(layout.items.files)
        if entries is None and layout.items.complete:
            raise _missing_file_error(known, where, layout.items.files[0], "the file of items")
    elif items is not None:
        raise DataError(
            f"data.items: the source {known.name!r} has no item file; drop the key",
            kind="contradiction",
            column="data.items",
        )
    renames = companion(layout.renames.files) if layout.renames is not None else None
    if renames is None and layout.renames is not None and entries is not None:
        raise _missing_file_error(known, where, layout.renames.files[0], "which maps the item ids")
    people = companion(layout.people.files) if layout.people is not None else None
    return LocatedFiles(where, layout, category, events, entries, people, renames)


def _missing_file_error(known: KnownFormat, where: str, name: str, what: str) -> DataError:
    return DataError.at(where, "missing-file", f" lacks {name} (or {name}.gz), {what}; {_describe_download(known)}")


_TIMEOUT = 30
_MAX_ARCHIVE = 64 * 2**20
_CHUNK = 2**20


def download_file(url: str, target: Path, *, md5: str | None = None) -> None:
    """Download a file under a temporary name, verify it, and then move it to its path.

    Args:
        url: The URL.
        target: The path.
        md5: Its published checksum, if any.

    Raises:
        DataError: If it cannot be downloaded or written, is too large, or is not the published file.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    except OSError as error:
        raise DataError(
            f"the download folder {target.parent} is not writable ({format_error(error)}); set LLMREC_CACHE to another "
            "folder",
            kind="unreadable",
            at=target.parent,
        ) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out, urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            size = 0
            while chunk := answer.read(_CHUNK):
                size += len(chunk)
                if size > _MAX_ARCHIVE:
                    raise DataError.at(
                        url, "too-large", f" is larger than {_MAX_ARCHIVE} bytes, so it is not the published file"
                    )
                digest.update(chunk)
                out.write(chunk)
        if md5 is not None and digest.hexdigest() != md5:
            raise DataError.at(
                url, "damaged", f" has the MD5 {digest.hexdigest()} instead of the published {md5}; try again later"
            )
        part.replace(target)
    except (OSError, HTTPException, ValueError) as error:
        raise DataError.at(url, "unreachable", f" cannot be downloaded ({format_error(error)})") from error
    finally:
        part.unlink(missing_ok=True)
