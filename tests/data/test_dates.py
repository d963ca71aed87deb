"""Dates in the forms that people write: read where the column shows which they are, refused where it does not."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from data_cases import section
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.read.typed import DateOrder, read_dates
from llmrec.data.sets.table import load
from llmrec.errors import DataError
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Columns
from tests.facts import Facts, raises

pytest.importorskip("llmrec.start", reason="the extension is not there")

from llmrec.start.columns import requested_roles
from llmrec.start.init import init
from llmrec.start.options import InitOptions

DAY = datetime(2024, 6, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("cells", "seconds"),
    [
        (["31.05.2024 08:15", "01.06.2024"], DAY),
        (["01.06.2024", "02.06.2024"], DAY + 86_400),
        (["31/05/2024", "01/06/2024 00:00:00.5"], DAY + 0.5),
        (["31-05-2024", "1-6-2024"], DAY),
        (["5/31/2024 1:00 AM", "6/1/2024 3:04 PM"], DAY + 15 * 3600 + 4 * 60),
        (["2024/05/31", "2024/06/01"], DAY),
        (["31.05.24", "1.6.24, 10h30"], DAY + 10.5 * 3600),
        (["Sep 17, 2014", "Fri, 31 May 2024 23:59:59 GMT", "Jun 1, 2024"], DAY),
        (["17. Mai 2014", "1. Juni 2024"], DAY),
        (["2024-05-31 00:00:05 UTC", "2024-06-01T02:00:00+02:00"], DAY),
        (["2024-05-31", "01.06.2024"], DAY),
        (["05/05/2024", "06/06/2024"], DAY + 5 * 86_400),
    ],
)
def test_the_column_shows_which_date_is_meant(cells: list[str], seconds: float) -> None:
    assert read_dates(pl.Series(cells)).seconds.to_list()[-1] == seconds
    assert not read_dates(pl.Series(cells)).seconds.null_count()


@pytest.mark.parametrize(
    "cells",
    [["03/04/2024", "05/06/2024"], ["03-04-24"], ["03.04.2024", "05/06/2024"], ["3/4/2024 10:00", "2024-01-01"]],
)
def test_what_nothing_shows_is_not_guessed(cells: list[str]) -> None:
    read = read_dates(pl.Series(cells))
    assert read.order is None and read.seconds[0] is None and read.unsure[0]
    for order, month in (("day-first", 4), ("month-first", 3)):
        said: DateOrder = "day-first" if order == "day-first" else "month-first"
        moment = read_dates(pl.Series(cells), said).seconds[0]
        assert datetime.fromtimestamp(moment, UTC).month == month


@given(
    st.lists(st.datetimes(datetime(1970, 1, 2), datetime(2060, 1, 1)), min_size=2, max_size=9),
    st.sampled_from(["%d.%m.%Y %H:%M", "%d/%m/%Y %H:%M", "%m/%d/%Y %I:%M %p", "%b %d, %Y, %H:%M", "%Y/%m/%d %H:%M"]),
)
def test_a_date_is_the_date_that_was_written(moments: list[datetime], pattern: str) -> None:
    moments = [moment.replace(second=0, microsecond=0, tzinfo=UTC) for moment in moments]
    cells = pl.Series([moment.strftime(pattern) for moment in moments])
    order: DateOrder = "month-first" if pattern.startswith("%m") else "day-first"
    assert read_dates(cells, order).seconds.to_list() == [moment.timestamp() for moment in moments]


# --------------------------------------------------------------------------- recipes, init


def table_of(folder: Path, dates: list[str], name: str = "t.csv") -> Path:
    """Twelve users with about eight of 30 items each, on these dates."""
    dice = random.Random(0)
    rows = [f"u{n % 12};i{dice.randrange(30)};{dates[n] if n < len(dates) else dice.choice(dates)}" for n in range(99)]
    path = folder / name
    path.write_text("\n".join(["Kunde;Artikel;Datum", *rows]) + "\n", encoding="utf-8")
    return path


COLUMNS = Columns(user="Kunde", item="Artikel", time="Datum")
GERMAN = [f"{day:02}.01.2024 13:28" for day in (6, 7, 8, 9, 30, 31)]
ENGLISH = [f"{day:02}/01/2024" for day in (6, 7, 8, 9, 30, 31)]


@pytest.mark.parametrize("dates", [GERMAN, GERMAN[:3], ENGLISH, [f"1/{day}/2024" for day in (6, 7, 30)]])
def test_recipes_and_init_read_what_is_clear(dates: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = table_of(tmp_path, dates)
    data = load(section(path, columns=COLUMNS, duplicates="keep_last"), seed=0)
    moments = [datetime.fromtimestamp(seconds, UTC) for seconds in data.interactions["timestamp"].unique()]
    assert {moment.month for moment in moments} == {1} and {6, 7} < {moment.day for moment in moments}
    made = init("t.csv")
    assert not made.fixes and load_recipe(made.recipe).data.columns == COLUMNS
    assert load(load_recipe(made.recipe).data, seed=0).interactions.equals(data.interactions)


def test_what_is_not_clear_is_refused_with_the_key_that_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = table_of(tmp_path, ENGLISH[:4])
    facts = Facts("ambiguous", path, 1, "Datum", 2, ("'06/01/2024'", "data.columns.dates=day-first", "month-first"))
    with raises(DataError, facts):
        load(section(path, columns=COLUMNS), seed=0)
    with raises(DataError, Facts("bad-value", "t.csv", column="Datum", says="--dates day-first")):
        init("t.csv")
    for said, month in (("day-first", 1), ("month-first", 6)):
        made = init("t.csv", requested=requested_roles(InitOptions(table="t.csv", dates=said)), force=True)
        recipe = load_recipe(made.recipe)
        assert recipe.data.columns == COLUMNS.model_copy(update={"dates": said})
        seconds = load(recipe.data, seed=0).interactions["timestamp"][0]
        assert datetime.fromtimestamp(seconds, UTC).month == month


@pytest.mark.parametrize(
    ("dates", "row", "says"),
    [
        ([*ENGLISH, "01/30/2024"], 7, "day first"),
        ([*ENGLISH, "31/02/2024"], 7, "day first"),
        ([*GERMAN, "soon"], 7, "neither"),
        ([*GERMAN, ""], 7, "neither"),
        ([*GERMAN, "06.01.2024 25:00"], 7, ""),
    ],
)
def test_a_row_that_is_no_date_like_the_others_is_named(dates: list[str], row: int, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Kunde;Artikel;Datum\n" + "".join(f"u;i{n};{date}\n" for n, date in enumerate(dates)))
    with raises(DataError, Facts("bad-value", path, row, "Datum", row + 1, says)):
        load(section(path, columns=COLUMNS), seed=0)


def test_an_order_that_is_said_holds_for_every_row(tmp_path: Path) -> None:
    path = table_of(tmp_path, ENGLISH)
    facts = Facts("bad-value", path, 5, "Datum", 6, ("month first", "data.columns.dates"))
    with raises(DataError, facts):
        load(section(path, columns=COLUMNS.model_copy(update={"dates": "month-first"})), seed=0)


def test_a_copy_with_other_faults_fixed_keeps_the_dates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = table_of(tmp_path, ENGLISH[:4])
    path.write_text(path.read_text(encoding="utf-8") + ";i1;06/01/2024\n", encoding="utf-8")
    made = init(
        "t.csv", requested=requested_roles(InitOptions(table="t.csv", dates="day-first")), mend=Path("mended.csv")
    )
    recipe = load_recipe(made.recipe)
    assert any("without a user" in fix for fix in made.fixes) and recipe.data.columns.dates == "day-first"
    assert datetime.fromtimestamp(load(recipe.data, seed=0).interactions["timestamp"][0], UTC).month == 1
