"""`init` and `check` on common kinds of tables, generated from a seed, and what the recipe reads of each.

They are a shop with orders of several products, whose titles are HTML, and a folder in MovieLens' format. The data that
a recipe reads must equal the written data: users, items, pairs, and plain-text titles.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from llmrec.cli.main import app
from llmrec.data.sets.table import load
from llmrec.recipe.load import load_recipe

SEED = 0
CUSTOMERS, PRODUCTS, ORDERS = 120, 60, 700
_START = datetime(2024, 1, 2, 8, 0, tzinfo=UTC)
_THINGS = (
    "Schöpflöffel",
    "Röstkaffee",
    "Brotmesser",
    "Wasserkocher",
    "Teekanne",
    "Gießkanne",
    "Tischlampe",
    "Rucksack",
)
_MAKES = ("Müller & Söhne", "™Pro", "Ahorn", "Bach <Werk>", "Düne", "Fjord", "Hain", "Heide")
_NOTES = ("Bitte klingeln; zweimal!", "Ware zum\nHintereingang", "", "", "Beim Nachbarn abgeben")


@dataclass(frozen=True)
class Product:
    """One product; ``title`` is plain text, ``html`` the title as stored."""

    sku: str
    title: str
    html: str
    price: float
    category: str


@dataclass(frozen=True)
class Line:
    """One line of an order."""

    order: int
    customer: str
    email: str
    product: Product
    time: datetime


@dataclass(frozen=True)
class Shop:
    """A shop generated from a seed."""

    products: tuple[Product, ...]
    lines: tuple[Line, ...]

    @property
    def orders(self) -> Iterator[list[Line]]:
        """Yield the lines of each order."""
        for number in dict.fromkeys(line.order for line in self.lines):
            yield [line for line in self.lines if line.order == number]


def shop() -> Shop:
    """Return a shop."""
    dice = random.Random(SEED)
    products = []
    for number in range(PRODUCTS):
        title = f"{_MAKES[number % len(_MAKES)]} {_THINGS[number // len(_MAKES)]} {1 + number % 5},5 kg"
        html = escape(title).replace(" kg", "&nbsp;kg")
        category = ("Küche", "Garten", "Büro")[number % 3]
        price = round(3 + 90 * dice.random(), 2)
        products.append(Product(f"SKU-{number:03}", title, f"<p>{html}</p>" if number % 2 else html, price, category))
    lines, time = [], _START
    for number in range(ORDERS):
        time += timedelta(minutes=dice.randint(20, 700))
        customer = number % CUSTOMERS if number < 3 * CUSTOMERS else dice.randrange(CUSTOMERS)
        for product in dice.sample(products, dice.choice((1, 2, 2, 3, 4))):
            lines.append(Line(number, f"K{customer:04}", f"kunde{customer}@example.org", product, time))
    return Shop(tuple(products), tuple(lines))


# --------------------------------------------------------------------------- the tables


def _csv(path: Path, rows: Sequence[Sequence[object]], *, mark: str = ",", encoding: str = "utf-8") -> None:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=mark).writerows(rows)


def _comma(value: float) -> str:
    return f"{value:.2f}".replace(".", ",")


def german(made: Shop, folder: Path) -> None:
    """Windows-1252 with semicolons, day-first dates, decimal commas, notes with line breaks, titles in HTML."""
    dice = random.Random(SEED)
    head = ("Bestellnr", "Kundennummer", "Artikelnummer", "Preis", "Einzelpreis (€)", "Datum", "Kommentar")
    rows = []
    for line in made.lines:
        price, day = _comma(line.product.price), line.time.strftime("%d.%m.%Y %H:%M")
        rows.append((f"B{line.order}", line.customer, line.product.sku, price, price, day, dice.choice(_NOTES)))
    _csv(folder / "bestellungen.csv", [head, *rows], mark=";", encoding="cp1252")
    items = [(each.sku, each.html, _comma(each.price), each.category) for each in made.products]
    names = ("Artikelnummer", "Bezeichnung", "Preis", "Kategorie")
    _csv(folder / "artikel.csv", [names, *items], mark=";", encoding="cp1252")


def events(made: Shop, folder: Path) -> None:
    """Event types, e-mail addresses as ids, and no titles."""
    kinds = ("view", "view", "cart", "purchase")
    rows = [
        (kinds[number % 4], line.email, line.product.sku, line.time.isoformat())
        for number, line in enumerate(made.lines)
    ]
    _csv(folder / "events.csv", [("event", "email", "sku", "ts"), *rows])


def _nested(line: Line) -> dict[str, Any]:
    return {
        "user": {"id": line.customer},
        "product": {"sku": line.product.sku, "title": line.product.html},
        "ts": int(line.time.timestamp()),
    }


def json_lines(made: Shop, folder: Path) -> None:
    """One event per line, with nested objects."""
    text = "".join(json.dumps(_nested(line)) + "\n" for line in made.lines)
    (folder / "events.jsonl").write_text(text, encoding="utf-8")


def json_orders(made: Shop, folder: Path) -> None:
    """One order per line, with its items in a list."""
    rows = (
        {
            "id": lines[0].order,
            "customer": {"id": lines[0].customer},
            "created_at": lines[0].time.isoformat(),
            "lines": [{"sku": line.product.sku, "title": line.product.html, "quantity": 1} for line in lines],
        }
        for lines in made.orders
    )
    (folder / "orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def nested_parquet(made: Shop, folder: Path) -> None:
    """Structs in a Parquet file."""
    pl.DataFrame([_nested(line) for line in made.lines]).write_parquet(folder / "events.parquet")


def movielens(made: Shop, folder: Path) -> None:
    """A folder with the files of MovieLens."""
    place = folder / "ml-latest-small"
    place.mkdir()
    items = {each.sku: number for number, each in enumerate(made.products, start=1)}
    latest = {(line.customer, line.product.sku): line for line in made.lines}
    rows = [
        (int(line.customer[1:]) + 1, items[line.product.sku], 1 + line.order % 5, int(line.time.timestamp()))
        for line in latest.values()
    ]
    _csv(place / "ratings.csv", [("userId", "movieId", "rating", "timestamp"), *rows])
    films = [(items[each.sku], f"{each.title} ({1990 + number})", "Drama") for number, each in enumerate(made.products)]
    _csv(place / "movies.csv", [("movieId", "title", "genres"), *films])
    (place / "README.txt").write_text("Summary\n=======\n", encoding="utf-8")


# How each kind of table is written, and the arguments of `llmrec init`.
TABLES: Mapping[str, tuple[Callable[[Shop, Path], None], tuple[str, ...]]] = {
    "cp1252 CSV and items in HTML": (german, ("bestellungen.csv", "--items", "artikel.csv")),
    "CSV of events without titles": (events, ("events.csv",)),
    "nested JSON Lines": (json_lines, ("events.jsonl",)),
    "orders with lines": (json_orders, ("orders.jsonl",)),
    "nested Parquet": (nested_parquet, ("events.parquet",)),
    "MovieLens folder": (movielens, ("ml-latest-small",)),
}


@pytest.mark.parametrize("name", TABLES)
def test_init_and_check_understand_a_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made, (write, arguments) = shop(), TABLES[name]
    write(made, tmp_path)
    for words in (["init", *arguments, "--name", "mine"], ["check", "mine.yaml", "eval.arms=[]", "eval.users=40"]):
        done = CliRunner().invoke(app, words)
        assert done.exception is None, done.exception
    section = load_recipe("mine.yaml").data
    data = load(section, seed=0)
    pairs = {(line.customer, line.product.sku) for line in made.lines}
    rows = data.interactions.select("user_id", "item_id").unique()
    assert (rows.height, rows["user_id"].n_unique()) == (len(pairs), len({user for user, _ in pairs}))
    assert len(data.items) == len({item for _, item in pairs})
    assert section.split.kind == "last_basket" and data.has_time
    if write is not events:
        titles = {item.title.partition(" (19")[0].partition(" (20")[0] for item in data.items.values()}
        assert titles <= {" ".join(each.title.split()) for each in made.products}
