"""Recognises published data sets by their files and columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from data_cases import archive, folder

from llmrec.data.sets.pages import known_formats, read_known_format
from llmrec.data.sets.recognise import recognise_source, sources_with_columns
from llmrec.errors import DataError
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_recipe
from llmrec.registry import SOURCES
from tests.facts import Facts, raises

pytest.importorskip("llmrec.start", reason="the extension is not there")

from llmrec.start import init as start


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (["userId", "movieId", "rating", "timestamp"], "movielens-20m"),
        (["reviewerID", "asin", "overall", "unixReviewTime", "reviewText"], "amazon-2014"),
        (["user_id", "parent_asin", "rating", "timestamp", "text"], ""),
        (["user_id", "item_id", "rating", "timestamp"], ""),
        (["userId", "movieId"], ""),
    ],
)
def test_data_sets_by_columns(columns: list[str], named: str) -> None:
    sources = sources_with_columns(columns)
    assert (named in sources) if named else not sources
    assert set(sources) <= set(SOURCES)


def test_init_reports_columns_of_a_data_set(tmp_path: Path) -> None:
    events = [(user, (user * 3 + step) % 9, 1 + step, 100 * step) for user in range(9) for step in range(4)]
    rows = "".join(",".join(map(str, event)) + "\n" for event in events)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows, encoding="utf-8")
    result = start.write_recipe(str(tmp_path / "ratings.csv"), out=tmp_path / "r.yaml", name="r", backend="hf")
    assert "the columns are the same as in movielens-" in result.found and "data.source" in result.found


USERS, ITEMS, EACH = 12, 30, 8
EVENTS = [
    (user, 1 + (user * 5 + step * 7) % ITEMS, 1 + (user + step) % 5, 10_000 * user + 60 * step)
    for user in range(1, USERS + 1)
    for step in range(EACH)
]
GENRES = "|".join("0" for _ in range(19))


def lines(rows: Iterable[Iterable[object]], mark: str, head: str = "") -> str:
    return head + "".join(mark.join(map(str, row)) + "\n" for row in rows)


def titles(mark: str, head: str = "") -> str:
    return lines(((item, f"Film {item} (1999)", "Drama") for item in range(1, ITEMS + 1)), mark, head)


SETS: dict[str, tuple[str, dict[str, str]]] = {
    "ml-latest-small": (
        "movielens-small",
        {
            "ratings.csv": lines(EVENTS, ",", "userId,movieId,rating,timestamp\n"),
            "movies.csv": titles(",", "movieId,title,genres\n"),
            "links.csv": "movieId,imdbId,tmdbId\n1,1,1\n",
            "README.txt": "Summary\n=======\n\nThis dataset describes ratings.\n",
        },
    ),
    "ml-1m": (
        "movielens-1m",
        {
            "ratings.dat": lines(EVENTS, "::"),
            "movies.dat": titles("::"),
            "users.dat": lines(((user, "F", 1, 10, "48067") for user in range(1, USERS + 1)), "::"),
        },
    ),
    "ml-100k": (
        "movielens-100k",
        {
            "u.data": lines(EVENTS, "\t"),
            "u.item": lines(((i, f"Film {i} (1999)", "1999", "", "x", GENRES) for i in range(1, ITEMS + 1)), "|"),
            "u.user": lines(((user, 30, "F", "artist", "1") for user in range(1, USERS + 1)), "|"),
        },
    ),
    "toys": (
        "sequences",
        {
            "sequences.txt": "".join(
                " ".join([str(user), *(str(item) for who, item, *_ in EVENTS if who == user)][: EACH - user % 3]) + "\n"
                for user in range(1, USERS + 1)
            ),
            "items.tsv": lines(((item, f"Toy {item}") for item in range(1, ITEMS + 1)), "\t", "item_id\ttitle\n"),
        },
    ),
}


def written(path: Path, files: Mapping[str, str], kind: str) -> Path:
    """Write files into a folder, compressed or not, or into an archive with a folder of that name."""
    if kind == "zip":
        return archive(path.with_suffix(".zip"), files, top=f"{path.name}/")
    return folder(path, files, packed=kind == "gz")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ml-latest-small", "gz"), ("ml-1m", "zip"), ("ml-100k", "folder"), ("toys", "zip"), ("toys", "gz")],
)
def test_init_writes_source_of_data_set(name: str, kind: str, tmp_path: Path) -> None:
    source, files = SETS[name]
    path = written(tmp_path / name, files, kind)
    result = start.write_recipe(str(path), out=tmp_path / "r.yaml", backend="hf")
    recipe = load_recipe(result.recipe)
    assert (recipe.data.source, recipe.data.path) == (source, str(path))
    assert f"files of {source}" in result.found and "no column" not in result.found
    study = build_study(recipe)
    assert len(study.data.dataset.items) == ITEMS and set(recipe.tasks.present()) >= {"sequential", "direct"}
    assert ("rating" in recipe.tasks.present()) == (source != "sequences")


def test_file_without_header(tmp_path: Path) -> None:
    for name, file in (("ml-1m", "ratings.dat"), ("ml-100k", "u.data"), ("toys", "sequences.txt")):
        source, files = SETS[name]
        path = written(tmp_path / name, files, "folder") / file
        recipe = load_recipe(start.write_recipe(str(path), out=tmp_path / f"{name}.yaml", backend="hf").recipe)
        assert (recipe.data.source, recipe.data.path) == (source, str(path))
    # Recognised under any name, as published by S3-Rec.
    (tmp_path / "toys" / "sequences.txt").rename(tmp_path / "toys" / "Beauty.txt")
    assert recognise_source(tmp_path / "toys" / "Beauty.txt") == "sequences"


@pytest.mark.parametrize(("last", "source"), [("c 6 7\n", "sequences"), ("c,6 7\n", None)])
def test_sequences_with_a_blank_line(last: str, source: str | None, tmp_path: Path) -> None:
    path = tmp_path / "shop.txt"
    path.write_text(f"a 1 2\n\nb 3 4 5\n{last}", encoding="utf-8")
    assert recognise_source(path) == source


def test_data_set_by_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "films", SETS["ml-latest-small"][1], "folder")
    assert recognise_source(path) == "movielens-latest"
    small = read_known_format("movielens-small")
    assert small.counts is not None
    counts = small.counts.model_copy(update={"files": {"ratings.csv": (USERS, ITEMS, len(EVENTS))}})
    pages = [
        small.model_copy(update={"counts": counts}) if page.name == small.name else page for page in known_formats()
    ]
    monkeypatch.setattr("llmrec.data.sets.recognise.known_formats", lambda: pages)
    assert recognise_source(path) == "movielens-small"


def test_samples_have_a_split(tmp_path: Path) -> None:
    people = [[(7 * user + step) % 50 for step in range(6)] for user in range(10)]
    parts = {
        f"{part}.tsv": lines(((" ".join(map(str, had[:size])), had[size]) for had in people), "\t", "history\ttarget\n")
        for part, size in (("train", 3), ("valid", 4), ("test", 5))
    }
    path = written(tmp_path / "s", parts, "folder")
    assert recognise_source(path) == "samples"
    recipe = load_recipe(start.write_recipe(str(path), out=tmp_path / "r.yaml", backend="hf").recipe)
    assert (recipe.data.source, recipe.data.split.kind) == ("samples", "given")


@pytest.mark.parametrize(
    "files",
    [
        {"part-1.csv": "user,item\na,x\n", "part-2.csv": "user,item\nb,y\n"},
        {"ratings.csv": "user,item,rating,timestamp\na,x,1,2\n", "movies.csv": "item,title\nx,X\n"},
        {"train.csv": "user,item\na,x\n", "valid.csv": "user,item\na,y\n", "test.csv": "user,item\na,z\n"},
        {"shop.inter": "user_id:token\titem_id:token\na\tx\n", "shop.item": "item_id:token\nx\n"},
    ],
)
def test_other_folders_are_tables(files: dict[str, str], tmp_path: Path) -> None:
    assert recognise_source(written(tmp_path / "f", files, "folder")) is None


@pytest.mark.parametrize("text", ["user\titem\na\tx\nb\ty\n", "a,x\nb,y,z\n", "the first words\nthe last ones\n", ""])
def test_other_texts_are_no_sequences(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    assert recognise_source(tmp_path / "t.txt") is None


def test_named_columns_require_a_table(tmp_path: Path) -> None:
    path = written(tmp_path / "ml-1m", SETS["ml-1m"][1], "folder")
    with raises(DataError, Facts("missing-file", says="with no table")):
        start.write_recipe(str(path), out=tmp_path / "r.yaml", requested=start.RequestedRoles(user="a", item="b"))
