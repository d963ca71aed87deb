"""What `llmrec init` infers from names and values: roles, formats of numbers and dates, parts of large files."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.read.table import read_table
from llmrec.data.read.tables import NO_COLUMN, Table
from llmrec.data.read.typed import number_column, time_column
from llmrec.data.read.words import interpret_column_name, plural_noun
from llmrec.errors import DataError
from llmrec.start.columns import RequestedRoles, Roles, guess_roles, requested_roles
from llmrec.start.faults import find_table_errors, repair_table
from llmrec.start.options import InitOptions
from llmrec.start.profile import (
    READABLE_FORMS,
    count_event_types,
    parse_numbers,
    parse_times,
    printable_name,
    profile_columns,
    read_sample,
)
from tests.facts import Facts, raises

dice = random.Random(0)
PAIRS = [(dice.randrange(40), dice.randrange(70)) for _ in range(700)]
USERS, ITEMS = [f"u{u}" for u, _ in PAIRS], [f"B0{i:03d}" for _, i in PAIRS]
TITLES = [f"The {i} Thing" for _, i in PAIRS]
STARS = [dice.randint(1, 5) for _ in PAIRS]
DAYS = [f"2024-03-{dice.randint(1, 28):02d}" for _ in PAIRS]
SECONDS = [1_600_000_000 + dice.randrange(10**7) for _ in PAIRS]
LINES = list(range(len(PAIRS)))
WORDS = ["good", "bad", "fine", "great", "nice", "thing", "really", "works", "well", "for", "me", "and", "my", "dog"]
TEXTS = [" ".join(dice.choices(WORDS, k=dice.randint(4, 15))) for _ in PAIRS]
COUNTS = [int(dice.expovariate(0.1)) + 1 for _ in PAIRS]


def table(columns: dict[str, Sequence[object]]) -> Table:
    frame = pl.DataFrame({name: [str(value) for value in values] for name, values in columns.items()})
    return Table("t.csv", frame, header=1)


def roles(columns: dict[str, Sequence[object]], **options: str) -> Roles:
    return guess_roles(table(columns), requested_roles(InitOptions(table="t", **options)))


def found(answer: Roles) -> tuple[str | None, ...]:
    return (answer.user, answer.item, answer.rating, answer.time, answer.title, answer.text)


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            "user",
            "customer_id userId member reviewerID User-ID Kundennummer id_client usuario 用户ID ユーザーID userid "
            "email e-mail customer customer_email client Kunde",
        ),
        (
            "item",
            "product_id asin parent_asin sku isbn13 movieId business_id Artikelnr id_produit 商品编号 товар itemid",
        ),
        ("rating", "stars score overall rate Book-Rating product_rating Bewertung puntuación avaliação 评分 note"),
        ("time", "ts ordered_at unixReviewTime timestamp created_at Bestelldatum fecha дата 时间 date_commande"),
        ("title", "title product_name name Bezeichnung headline nom_produit título 商品名 book_title"),
        ("text", "review_text reviewText comment Kommentar avis reseña отзыв review/text"),
        ("field", "genre genres category brand price Kategorie marque precio category_name"),
        ("row", "order_id review_id Bestellnr Unnamed:0 invoice_no"),
        ("count", "play_count qty quantity helpful_vote num_ratings Anzahl"),
    ],
)
def test_names_in_many_languages(role: str, names: str) -> None:
    for name in names.split(" "):
        output = interpret_column_name(name)
        assert output.weight(role) == max(output.roles.values()) > 0, (name, output)


def test_attributes_are_not_their_object() -> None:
    assert not interpret_column_name("product_rating").weight("item")
    assert not interpret_column_name("review_title").weight("title")
    assert not interpret_column_name("review_id").weight("text")
    assert interpret_column_name("customer_city").weight("user") < interpret_column_name("customer").weight("user")
    assert interpret_column_name("artist").weight("item") > 0 and not interpret_column_name("product_category").weight(
        "item"
    )


@pytest.mark.parametrize(
    ("word", "noun"), [("product_id", "products"), ("isbn", "books"), ("stories.csv", "stories"), ("xyz", None)]
)
def test_nouns(word: str, noun: str | None) -> None:
    assert plural_noun(word) == noun


# --------------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("cells", "form", "values"),
    [
        (["4.5", "3", " 5 "], "plain numbers", [4.5, 3.0, 5.0]),
        (["4,5", "3", "5,0"], "decimal commas", [4.5, 3.0, 5.0]),
        (["1.234,5", "2"], "decimal commas", [1234.5, 2.0]),
        (["1,234", "2,000", "7"], "thousands separators", [1234.0, 2000.0, 7.0]),
        (["5", "", "n/a", "4", "3", "2", "1", "5"], "plain numbers", [5.0, None, None, 4.0, 3.0, 2.0, 1.0, 5.0]),
        (["five", "nan", "inf"], "no numbers", [None, None, None]),
    ],
)
def test_numbers(cells: list[str], form: str, values: list[float | None]) -> None:
    read = parse_numbers(pl.Series(cells))
    assert (read.form, read.values.to_list()) == (form, values)


@pytest.mark.parametrize(
    ("cells", "form", "first"),
    [
        (["2024-05-31", "2024-06-01T08:15:00Z"], "ISO dates", "2024-05-31"),
        (["1717140000000", "1717150000000"], "numbers", "1717140000000"),
        (["01.06.2024", "02.06.2024", "soon", "", "", "1.6.2024", "2.6.2024"], "day-first dates", "01.06.2024"),
        (["01/06/2024", "31/05/2024"], "day-first dates", "01/06/2024"),
        (["6/1/2024 3:04 PM", "5/31/2024 1:00 AM"], "month-first dates", "6/1/2024 3:04 PM"),
        (["01/06/2024", "02/06/2024"], "dates with ambiguous day and month", None),
        (["Sep 17, 2014", "Oct 1, 2014"], "dates", "Sep 17, 2014"),
        (["2019-11-01 00:00:05 UTC", "2019-11-01 00:00:06 UTC"], "ISO dates", "2019-11-01 00:00:05 UTC"),
        (["yesterday", "soon"], "no times", None),
    ],
)
def test_times(cells: list[str], form: str, first: str | None) -> None:
    series = pl.Series(cells)
    read = parse_times(series, series)
    assert (read.form, read.values[0]) == (form, first)


@given(st.lists(st.sampled_from(["4", "4,5", "x", "", "1.5", "1,234", "nan", "2024-01-05", "05.01.2024"]), min_size=1))
def test_readable_form_is_read_by_the_data_layer(cells: list[str]) -> None:
    """If a format is readable and every cell has a value, the data layer accepts the column, with the same numbers."""
    series = pl.Series(cells)
    complete = Table("t.csv", pl.DataFrame({"c": cells}), header=1)
    read = parse_numbers(series)
    if read.form == "plain numbers" and read.values.null_count() == 0:
        assert number_column(complete, "c", "rating").to_list() == read.values.to_list()
    when = parse_times(series, series)
    if when.form in READABLE_FORMS and when.form != "numbers" and when.values.null_count() == 0:
        assert len(time_column(complete, "c")) == len(cells)


# --------------------------------------------------------------------------- roles


def test_well_known_layouts() -> None:
    movies = roles({"userId": USERS, "movieId": ITEMS, "rating": STARS, "timestamp": SECONDS})
    assert found(movies) == ("userId", "movieId", "rating", "timestamp", None, None)
    amazon = {
        "rating": STARS,
        "title": [text[:20] for text in TEXTS],
        "text": TEXTS,
        "asin": [f"{item}{dice.choice('AB')}" for item in ITEMS],
        "parent_asin": ITEMS,
        "user_id": USERS,
        "timestamp": [1000 * second for second in SECONDS],
        "helpful_vote": COUNTS,
    }
    answer = roles(amazon)
    assert found(answer) == ("user_id", "parent_asin", "rating", "timestamp", None, "text")
    assert "--item asin" in answer.why["asin"] and "milliseconds" in answer.why["timestamp"]
    yelp = {"review_id": LINES, "user_id": USERS, "business_id": ITEMS, "stars": STARS, "useful": COUNTS, "date": DAYS}
    assert found(roles(yelp)) == ("user_id", "business_id", "stars", "date", None, None)
    books = {"User-ID": USERS, "ISBN": ITEMS, "Book-Rating": [dice.choice((0, 0, 7, 9)) for _ in PAIRS]}
    assert found(roles(books))[:3] == ("User-ID", "ISBN", "Book-Rating")
    music = roles({"user": USERS, "artist": TITLES, "plays": COUNTS})
    assert found(music) == ("user", "artist", None, None, "artist", None)


def test_table_of_order_lines() -> None:
    answer = roles(
        {
            "order_id": [line // 3 for line in LINES],
            "line_id": LINES,
            "customer_id": USERS,
            "customer_city": [f"city {user}" for user, _ in PAIRS],
            "sku": ITEMS,
            "product": TITLES,
            "unit_price": [1 + item / 10 for _, item in PAIRS],
            "colour": [f"c{item % 4}" for _, item in PAIRS],
            "quantity": COUNTS,
            "currency": ["EUR"] * len(PAIRS),
            "order_date": DAYS,
        }
    )
    assert found(answer) == ("customer_id", "sku", None, "order_date", "product", None)
    assert set(answer.fields) == {"unit_price", "colour"}
    assert "order or row" in answer.why["order_id"]
    assert "every row" in answer.why["line_id"]
    assert "same value" in answer.why["currency"]
    assert "count" in answer.why["quantity"]
    assert answer.taken_for("currency") == "-"
    assert answer.taken_for("colour") == "field"


def test_values_decide_where_names_do_not() -> None:
    answer = roles({"a": USERS, "b": ITEMS, "c": STARS, "d": DAYS, "e": TEXTS}, user="a")
    assert found(answer) == ("a", "b", "c", "d", None, "e")
    counts = roles({"user": USERS, "item": ITEMS, "score": COUNTS})
    assert counts.rating is None
    assert "look like counts" in counts.why["score"] and "--rating score" in counts.why["score"]
    assert roles({"user": USERS, "item": ITEMS, "score": COUNTS}, rating="score").rating == "score"
    hours = roles({"user": USERS, "item": ITEMS, "value": [f"{count * 1.3 - 1.2:.1f}" for count in COUNTS]})
    assert hours.rating is None
    assert "look like amounts" in hours.why["value"] and "--rating value" in hours.why["value"]
    assert roles({"user": USERS, "item": ITEMS, "stars": STARS, "note": TEXTS}).text == "note"
    assert roles({"user": USERS, "item": ITEMS, "note": STARS}).rating == "note"
    birth = [f"19{10 + user}-01-01" for user, _ in PAIRS]
    assert roles({"user": USERS, "item": ITEMS, "date_of_birth": birth, "day": DAYS}).time == "day"
    about = [f"a long and true description of thing number {item}" for _, item in PAIRS]
    assert roles({"user": USERS, "item": ITEMS, "text": about}).text is None


def test_columns_of_one_role() -> None:
    addresses = [f"{user}@example.org" for user in USERS]
    assert roles({"event": ["view"] * len(PAIRS), "email": addresses, "sku": ITEMS, "ts": SECONDS}).user == "email"
    assert roles({"customer_id": USERS, "customer_email": addresses, "sku": ITEMS}).user == "customer_id"
    assert roles({"client": USERS, "mail": addresses, "sku": ITEMS}).user == "client"
    answer = roles({"user": USERS, "item": ITEMS, "stars": STARS, "score": STARS, "date": DAYS, "time": DAYS})
    assert answer.rating == "stars" and "--rating score" in answer.why["score"]
    assert {answer.time} < {"date", "time"}
    columns = {"user": USERS, "item": ITEMS, "stars": STARS, "day": DAYS, "name": TITLES, "comment": TEXTS}
    answer = roles(columns, rating=NO_COLUMN, time=NO_COLUMN, title=NO_COLUMN, text=NO_COLUMN, fields=NO_COLUMN)
    assert found(answer) == ("user", "item", None, None, None, None)
    assert answer.fields == ()


@pytest.mark.parametrize("name", ["Kommentar", "delivery_note"])
def test_text_is_a_review_only_with_evidence(name: str) -> None:
    orders = {"Kunde": USERS, "Artikelnr": ITEMS, name: TEXTS}
    answer = roles(orders)
    assert answer.text is None and f"--text {name}" in answer.why[name]
    assert roles(orders, text=name).text == name
    assert roles({"user": USERS, "item": ITEMS, "Rezension": TEXTS}).text == "Rezension"
    # A rating in the same row is evidence, but not for a column whose name says that it is about the order.
    assert roles({**orders, "Sterne": STARS}).text == (None if name == "delivery_note" else name)


def test_one_of_two_equal_columns_is_a_field() -> None:
    prices = [f"{10 + item},50" for _, item in PAIRS]
    answer = roles({"Kunde": USERS, "Artikelnr": ITEMS, "Preis": prices, "Einzelpreis": prices, "Marke": TITLES})
    assert answer.fields == ("Preis", "Marke") and answer.why["Einzelpreis"] == "has the same values as Preis"
    pointed = [price.replace(",", ".") for price in prices]
    assert (
        "Einzelpreis" not in roles({"Kunde": USERS, "Artikelnr": ITEMS, "Preis": prices, "Einzelpreis": pointed}).fields
    )
    other = [f"{11 + item},50" for _, item in PAIRS]
    assert "Einzelpreis" in roles({"Kunde": USERS, "Artikelnr": ITEMS, "Preis": prices, "Einzelpreis": other}).fields


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (("view", "cart", "purchase"), "purchase"),
        (("page_view", "add_to_cart", "Remove from cart"), "add_to_cart"),
        (("click", "impression"), "click"),
        (("red", "blue", "green"), None),
    ],
)
def test_kinds_of_events(values: tuple[str, ...], kept: str | None) -> None:
    held = profile_columns(table({"event": [values[line % len(values)] for line in LINES], "sku": ITEMS}))["event"]
    assert next(iter(count_event_types(held)), None) == kept


def test_sparse_table_is_judged_by_repeated_values() -> None:
    items = [n if n > 40 else n // 2 for n in range(600)]
    columns = {
        "buyer": [f"b{n % 90}" for n in range(600)],
        "sku": [f"s{item}" for item in items],
        "name": [f"The {item} Thing" for item in items],
        "brand": [f"brand {item % 7}" for item in items],
        "headline": [f"My {dice.random()} words" for _ in items],
    }
    answer = roles(columns)
    assert (answer.user, answer.item, answer.title, answer.fields) == ("buyer", "sku", "name", ("brand",))
    assert "several" in answer.why["headline"]


PAIR: dict[str, Sequence[object]] = {"user": USERS, "item": ITEMS}
PEOPLE: dict[str, Sequence[object]] = {"customer": USERS, "member": USERS[::-1], "item": ITEMS}


@pytest.mark.parametrize(
    ("columns", "options", "facts"),
    [
        ({"a": USERS, "b": ITEMS}, {}, Facts("missing-column", says=("--user COLUMN --item COLUMN", "a (40 values)"))),
        ({"user_id": LINES, "item": ITEMS}, {}, Facts("missing-column", says="different value in every row")),
        (PEOPLE, {}, Facts("ambiguous", says="--user customer or --user member")),
        (PAIR, {"user": "uzer"}, Facts("missing-column", column="uzer", says=("did you mean 'user'", "--user"))),
        (PAIR, {"fields": "itm"}, Facts("missing-column", column="itm", says=("did you mean 'item'", "--fields"))),
        ({**PAIR, "n": LINES}, {"user": "n"}, Facts("bad-value", column="n", says=("every row", "--user"))),
        (PAIR, {"user": "item", "item": "item"}, Facts("contradiction", column="item", says="--user, --item")),
        ({"196": USERS, "242": ITEMS, "3.5": STARS}, {}, Facts("wrong-format", says="196, 242, 3.5")),
        ({"user|item|rating": ["a|b|3"]}, {}, Facts("missing-column", says="user|item|rating")),
    ],
)
def test_questions_are_one_paragraph(
    columns: dict[str, Sequence[object]], options: dict[str, str], facts: Facts
) -> None:
    with raises(DataError, facts if facts.kind == "contradiction" else replace(facts, file="t.csv")):
        roles(columns, **options)


def test_rejects_unknown_date_order() -> None:
    with raises(DataError, Facts("unknown-name", column="dates", says="did you mean 'day-first'")):
        requested_roles(InitOptions(table="t", dates="day_first"))


def test_names_of_a_file_are_escaped() -> None:
    assert printable_name("a\n# b\x1b[31m") == "a # b[31m"
    answer = roles({"user\n": USERS, "item": ITEMS})
    assert answer.user == "user\n"
    assert all("\n" not in why for why in answer.why.values())


# --------------------------------------------------------------------------- parts of files


def write_csv(path: Path, rows: int) -> Path:
    body = "".join(f"u{n % 50},i{n % 31},{n * n % 7 % 5 + 1},{n}\n" for n in range(rows))
    path.write_text("user,item,stars,ts\n" + body, encoding="utf-8")
    return path


def test_parts_of_a_csv_file(tmp_path: Path) -> None:
    part = read_sample(write_csv(tmp_path / "t.csv", 100))
    assert part.whole and part.table.frame.height == part.first == 100
    assert part.where(1).endswith("row 2 (line 3)")
    body = "".join(f'u{n % 50},i{n % 31},"one\ntwo, ""three"" {n}"\n' for n in range(5_000))
    (tmp_path / "t.csv").write_text("user,item,text\n" + body, encoding="utf-8")
    part = read_sample(tmp_path / "t.csv", limit=20_000, part=20_000)
    assert not part.whole
    assert part.table.frame["text"][-1].startswith('one\ntwo, "three" ')
    (tmp_path / "t.csv.gz").write_bytes(b"\x1f\x8bnothing")
    for facts in (Facts("damaged", "t.csv.gz"), Facts("missing-file", "gone.csv")):
        with raises(DataError, facts):
            read_sample(tmp_path / str(facts.file))


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl"])
def test_part_of_a_large_file_is_read(tmp_path: Path, ending: str) -> None:
    plain = write_csv(tmp_path / "t.csv", 20_000)
    complete = read_table(plain).frame
    path = tmp_path / f"large.{ending}"
    if ending == "csv":
        path.write_bytes(plain.read_bytes())
    elif ending == "csv.gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        path.write_text(complete.write_ndjson(), encoding="utf-8")
    part = read_sample(path, limit=60_000, part=30_000)
    assert not part.whole
    assert 0 < part.first <= part.table.frame.height < 20_000
    assert part.table.frame.join(complete, on=complete.columns, how="anti").is_empty()
    last = part.table.frame["ts"].cast(pl.Int64).max()
    assert last is not None and (int(last) > 15_000) == (ending != "csv.gz")  # type: ignore[call-overload]
    assert part.where(part.first).endswith("a row further down") or part.first == part.table.frame.height
    assert guess_roles(part.table, RequestedRoles()).rating == "stars"


def test_parquet_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.start.profile.WHOLE_ROWS", 1000)
    monkeypatch.setattr("llmrec.start.profile.PART_ROWS", 600)
    frame = read_table(write_csv(tmp_path / "t.csv", 5000)).frame
    frame.write_parquet(tmp_path / "t.parquet", row_group_size=500)
    part = read_sample(tmp_path / "t.parquet")
    assert not part.whole and part.table.frame.height < 5000
    assert part.table.frame["ts"].cast(pl.Int64).max() > 4000  # type: ignore[operator]
    assert read_sample(tmp_path / "t.parquet", whole=True).table.frame.height == 5000


# --------------------------------------------------------------------------- faults and their repair

SPOILERS: dict[str, tuple[str, Callable[[list[str]], list[str]], str]] = {
    "decimal commas": ("stars", lambda cells: [f"{cell},5" for cell in cells], "decimal comma"),
    "no stars in a row": ("stars", lambda cells: ["", *cells[1:]], "not a number"),
    "no day in a row": ("day", lambda cells: [cells[0], "", *cells[2:]], "format of the other times"),
    "no user in a row": ("user", lambda cells: ["", *cells[1:]], "the user"),
    "a timestamp of words": ("timestamp", lambda cells: ["at noon"] * len(cells), "not a time"),
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_unreadable_values_are_reported_and_repaired(spoiler: str, tmp_path: Path) -> None:
    columns = {"user": USERS, "item": ITEMS, "stars": list(map(str, STARS)), "day": DAYS, "title": TITLES}
    name, spoil, output = SPOILERS[spoiler]
    columns[name] = spoil(columns.get(name, DAYS))
    if name == "timestamp":
        del columns["day"]  # a column with a default name is read if no other one is set
    pl.DataFrame(columns).write_csv(tmp_path / "t.csv")
    part = read_sample(tmp_path / "t.csv")
    answer = guess_roles(part.table, requested_roles(InitOptions(table="t", title="title")))
    wrong = find_table_errors(part, answer, None, answer.item)
    assert [fault.column for fault in wrong] == [name]
    assert output in wrong[0].text and "row " in wrong[0].text and wrong[0].mend
    frame, done = repair_table(part.table, answer, None, answer.item)
    frame.write_csv(tmp_path / "mended.csv")
    again = read_sample(tmp_path / "mended.csv")
    assert (
        find_table_errors(
            again, guess_roles(again.table, requested_roles(InitOptions(table="t", title="title"))), None, answer.item
        )
        == []
    )
    assert (frame.height < len(PAIRS)) == bool(done)
    if name == "stars" and not done:
        assert frame["stars"].to_list() == [star + 0.5 for star in STARS]
    if name == "day" and not done:
        assert [text[:10] for text in frame["day"]] == DAYS


def test_column_of_an_unusable_type(tmp_path: Path) -> None:
    arrow = pa.table({"item": ITEMS, "stars": STARS, "user": pa.array([{"a": b"x"}] * len(ITEMS))})
    pq.write_table(arrow, tmp_path / "t.parquet")
    part = read_sample(tmp_path / "t.parquet")
    for expected, kind in ((RequestedRoles(), "missing-column"), (RequestedRoles(user="user"), "bad-value")):
        with raises(DataError, Facts(kind, says=("'user'" if expected.user else "user", "cannot be used"))):
            guess_roles(part.table, expected)


def test_second_table_is_joined(tmp_path: Path) -> None:
    kept = sorted(set(ITEMS))[1:]
    listed = table({"id": kept, "name": [f"Name {item}" for item in kept]})
    pl.DataFrame({"user": USERS, "item": ITEMS}).write_csv(tmp_path / "t.csv")
    part = read_sample(tmp_path / "t.csv")
    answer = guess_roles(part.table, RequestedRoles(), listed)
    assert answer.title == "name"
    output = [fault.text for fault in find_table_errors(part, answer, listed, "id")]
    assert "'id'" in output[0] and "'item'" in output[0]
    assert f"1 of {len(kept) + 1} items" in output[1]
    frame, done = repair_table(part.table, answer, listed, "id")
    assert frame.columns == ["user", "id"]
    assert set(frame["id"]) == set(kept)
    assert len(done) == 1


def test_profiles_of_parquet_types(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "user": [1.0, 2.0, 1.0],
            "item": [7, 8, 8],
            "liked": [True, False, True],
            "at": [datetime(2024, 1, 1), datetime(2024, 1, 2), datetime(2024, 1, 3)],
            "tags": [["a", "b"], ["c"], []],
        }
    )
    frame.write_parquet(tmp_path / "t.parquet")
    held = profile_columns(read_table(tmp_path / "t.parquet"))
    assert held["user"].cells.to_list() == ["1", "2", "1"]
    assert held["liked"].levels == (0.0, 1.0)
    assert held["at"].times.form == "times"
    assert held["tags"].cells.to_list() == ["a, b", "c", ""]
    assert json.dumps([p.distinct for p in held.values()]) == "[2, 2, 2, 3, 2]"
