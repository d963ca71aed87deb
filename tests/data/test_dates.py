"""Date formats: read if the column is unambiguous, rejected otherwise."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from data_cases import section
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.read.typed import DateOrder, parse_dates
from llmrec.data.sets.table import load_data
from llmrec.errors import DataError
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Columns
from tests.facts import Facts, raises

pytest.importorskip("llmrec.start", reason="the extension is not there")

from llmrec.start.columns import requested_roles
from llmrec.start.init import write_recipe
from llmrec.start.options import InitOptions

DAY = datetime(2024, 6, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("cells", "seconds"),
    [
        (["31.05.2024 08:15", "01.06.2024"], DAY),
        (["31/05/2024", "01/06/2024 00:00:00.5"], DAY + 0.5),
        (["5/31/2024 1:00 AM", "6/1/2024 3:04 PM"], DAY + 15 * 3600 + 4 * 60),
        (["31.05.24", "1.6.24, 10h30"], DAY + 10.5 * 3600),
        (["Sep 17, 2014", "Fri, 31 May 2024 23:59:59 GMT", "Jun 1, 2024"], DAY),
        (["17. Mai 2014", "1. Juni 2024"], DAY),
        (["2024-05-31 00:00:05 UTC", "2024-06-01T02:00:00+02:00"], DAY),
        (["2024-05-31", "01.06.2024"], DAY),
    ],
)
def test_order_of_dates_is_inferred(cells: list[str], seconds: float) -> None:
    assert parse_dates(pl.Series(cells)).seconds.to_list()[-1] == seconds
    assert not parse_dates(pl.Series(cells)).seconds.null_count()


@pytest.mark.parametrize(
    "cells",
    [["03/04/2024", "05/06/2024"], ["03-04-24"], ["03.04.2024", "05/06/2024"], ["3/4/2024 10:00", "2024-01-01"]],
)
def test_ambiguous_dates_are_not_guessed(cells: list[str]) -> None:
    read = parse_dates(pl.Series(cells))
    assert read.order is None and read.seconds[0] is None and read.unsure[0]
    for order, month in (("day-first", 4), ("month-first", 3)):
        given_order: DateOrder = "day-first" if order == "day-first" else "month-first"
        moment = parse_dates(pl.Series(cells), given_order).seconds[0]
        assert datetime.fromtimestamp(moment, UTC).month == month


@given(
    st.lists(st.datetimes(datetime(1970, 1, 2), datetime(2060, 1, 1)), min_size=2, max_size=9),
    st.sampled_from(["%d.%m.%Y %H:%M", "%d/%m/%Y %H:%M", "%m/%d/%Y %I:%M %p", "%b %d, %Y, %H:%M", "%Y/%m/%d %H:%M"]),
)
def test_written_dates_are_read_back(moments: list[datetime], pattern: str) -> None:
    moments = [moment.replace(second=0, microsecond=0, tzinfo=UTC) for moment in moments]
    cells = pl.Series([moment.strftime(pattern) for moment in moments])
    order: DateOrder = "month-first" if pattern.startswith("%m") else "day-first"
    assert parse_dates(cells, order).seconds.to_list() == [moment.timestamp() for moment in moments]


def table_of(folder: Path, dates: list[str], name: str = "t.csv") -> Path:
    """Write twelve users with about eight of 30 items each, on these dates."""
    dice = random.Random(0)
    rows = [f"u{n % 12};i{dice.randrange(30)};{dates[n] if n < len(dates) else dice.choice(dates)}" for n in range(99)]
    path = folder / name
    path.write_text("\n".join(["Kunde;Artikel;Datum", *rows]) + "\n", encoding="utf-8")
    return path


COLUMNS = Columns(user="Kunde", item="Artikel", time="Datum")
GERMAN = [f"{day:02}.01.2024 13:28" for day in (6, 7, 8, 9, 30, 31)]
ENGLISH = [f"{day:02}/01/2024" for day in (6, 7, 8, 9, 30, 31)]


@pytest.mark.parametrize("dates", [GERMAN, [f"1/{day}/2024" for day in (6, 7, 30)]])
def test_recipes_and_init_read_clear_dates(dates: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = table_of(tmp_path, dates)
    data = load_data(section(path, columns=COLUMNS, duplicates="keep_last"), seed=0)
    moments = [datetime.fromtimestamp(seconds, UTC) for seconds in data.interactions["timestamp"].unique()]
    assert {moment.month for moment in moments} == {1} and {6, 7} < {moment.day for moment in moments}
    result = write_recipe("t.csv")
    assert not result.fixes and load_recipe(result.recipe).data.columns == COLUMNS
    assert load_data(load_recipe(result.recipe).data, seed=0).interactions.equals(data.interactions)


def test_ambiguous_dates_name_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = table_of(tmp_path, ENGLISH[:4])
    facts = Facts("ambiguous", path, 1, "Datum", 2, ("'06/01/2024'", "data.columns.dates=day-first", "month-first"))
    with raises(DataError, facts):
        load_data(section(path, columns=COLUMNS), seed=0)
    with raises(DataError, Facts("bad-value", "t.csv", column="Datum", says="--dates day-first")):
        write_recipe("t.csv")
    for order, month in (("day-first", 1), ("month-first", 6)):
        result = write_recipe("t.csv", requested=requested_roles(InitOptions(table="t.csv", dates=order)), force=True)
        recipe = load_recipe(result.recipe)
        assert recipe.data.columns == COLUMNS.model_copy(update={"dates": order})
        seconds = load_data(recipe.data, seed=0).interactions["timestamp"][0]
        assert datetime.fromtimestamp(seconds, UTC).month == month


@pytest.mark.parametrize(
    ("dates", "row", "says"),
    [
        ([*ENGLISH, "01/30/2024"], 7, "day first"),
        ([*GERMAN, "soon"], 7, "neither"),
        ([*GERMAN, "06.01.2024 25:00"], 7, ""),
    ],
)
def test_malformed_dates_name_the_row(dates: list[str], row: int, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Kunde;Artikel;Datum\n" + "".join(f"u;i{n};{date}\n" for n, date in enumerate(dates)))
    with raises(DataError, Facts("bad-value", path, row, "Datum", row + 1, says)):
        load_data(section(path, columns=COLUMNS), seed=0)


def test_configured_order_applies_to_every_row(tmp_path: Path) -> None:
    path = table_of(tmp_path, ENGLISH)
    facts = Facts("bad-value", path, 5, "Datum", 6, ("month first", "data.columns.dates"))
    with raises(DataError, facts):
        load_data(section(path, columns=COLUMNS.model_copy(update={"dates": "month-first"})), seed=0)


def test_fixed_copy_keeps_the_dates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = table_of(tmp_path, ENGLISH[:4])
    path.write_text(path.read_text(encoding="utf-8") + ";i1;06/01/2024\n", encoding="utf-8")
    result = write_recipe(
        "t.csv", requested=requested_roles(InitOptions(table="t.csv", dates="day-first")), mend=Path("mended.csv")
    )
    recipe = load_recipe(result.recipe)
    assert any("without a user" in fix for fix in result.fixes) and recipe.data.columns.dates == "day-first"
    assert datetime.fromtimestamp(load_data(recipe.data, seed=0).interactions["timestamp"][0], UTC).month == 1
