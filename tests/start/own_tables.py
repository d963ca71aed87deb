"""Nine common kinds of tables, generated from a seed, and what a recipe must read of them.

They are a shop with orders of several products, whose titles are HTML, and a folder in MovieLens' format. The data that
a recipe reads must equal the written data: users, items, pairs, and plain-text titles.
"""

from __future__ import annotations

import csv
import json
import random
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any

import polars as pl

from llmrec.data.dataset import Dataset
from tests.workbook import workbook

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


def shop(seed: int = SEED) -> Shop:
    """Return a shop."""
    dice = random.Random(seed)
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
    rows = [
        (
            f"B{line.order}",
            line.customer,
            line.product.sku,
            _comma(line.product.price),
            _comma(line.product.price),
            line.time.strftime("%d.%m.%Y %H:%M"),
            dice.choice(_NOTES),
        )
        for line in made.lines
    ]
    _csv(folder / "bestellungen.csv", [head, *rows], mark=";", encoding="cp1252")
    items = [(each.sku, each.html, _comma(each.price), each.category) for each in made.products]
    _csv(
        folder / "artikel.csv",
        [("Artikelnummer", "Bezeichnung", "Preis", "Kategorie"), *items],
        mark=";",
        encoding="cp1252",
    )


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


def spreadsheet(made: Shop, folder: Path) -> None:
    """A workbook whose first sheet is a note."""
    rows = [(line.customer, line.product.sku, line.time.isoformat()) for line in made.lines]
    items = [(each.sku, each.title, each.price) for each in made.products]
    sheets: dict[str, list[tuple[object, ...]]] = {
        "Hinweise": [("Hinweise",), ("Bitte nicht verändern",)],
        "Bestellungen": [("Kunde", "Artikel", "Datum"), *rows],
        "Artikel": [("Artikel", "Bezeichnung", "Preis"), *items],
    }
    workbook(folder / "shop.xlsx", sheets)


def database(made: Shop, folder: Path) -> None:
    """An SQLite file with customers, products and events."""
    people = sorted({(line.customer, line.email) for line in made.lines})
    with closing(sqlite3.connect(folder / "shop.db")) as connection:
        connection.execute("CREATE TABLE customers (customer_id TEXT, email TEXT)")
        connection.executemany("INSERT INTO customers VALUES (?, ?)", people)
        connection.execute("CREATE TABLE products (sku TEXT, title TEXT, price REAL)")
        connection.executemany(
            "INSERT INTO products VALUES (?, ?, ?)", [(each.sku, each.title, each.price) for each in made.products]
        )
        connection.execute("CREATE TABLE events (customer_id TEXT, sku TEXT, ts INTEGER)")
        connection.executemany(
            "INSERT INTO events VALUES (?, ?, ?)",
            [(line.customer, line.product.sku, int(line.time.timestamp())) for line in made.lines],
        )
        connection.commit()


def parquet(made: Shop, folder: Path) -> None:
    """A plain Parquet file with llmrec's column names."""
    rows = [(line.customer, line.product.sku, line.time, line.product.title) for line in made.lines]
    names = ["user_id", "item_id", "timestamp", "title"]
    pl.DataFrame(rows, schema=names, orient="row").write_parquet(folder / "plain.parquet")


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


@dataclass(frozen=True)
class Table:
    """One kind of table.

    Attributes:
        write: Writes it into a folder.
        init: Arguments of ``llmrec init``.
        titled: Whether its items have titles.
        split: The kind of split.
    """

    write: Callable[[Shop, Path], None]
    init: tuple[str, ...]
    titled: bool = True
    split: str = "last_basket"


_QUERY = "SELECT events.*, products.title, products.price FROM events LEFT JOIN products USING (sku)"
TABLES: Mapping[str, Table] = {
    "cp1252 CSV and items in HTML": Table(german, ("bestellungen.csv", "--items", "artikel.csv")),
    "CSV of events": Table(events, ("events.csv",), titled=False),
    "nested JSON Lines": Table(json_lines, ("events.jsonl",)),
    "orders with lines": Table(json_orders, ("orders.jsonl",)),
    "nested Parquet": Table(nested_parquet, ("events.parquet",)),
    "spreadsheet": Table(spreadsheet, ("shop.xlsx#Bestellungen", "--items", "shop.xlsx#Artikel")),
    "SQLite": Table(database, ("sqlite:///shop.db", "--query", _QUERY)),
    "Parquet": Table(parquet, ("plain.parquet",)),
    "MovieLens folder": Table(movielens, ("ml-latest-small",)),
}


def commands(table: Table) -> list[list[str]]:
    """Return `init` and `check` of a table, run in its folder, without a language model."""
    return [["init", *table.init, "--name", "mine"], ["check", "mine.yaml", "eval.arms=[]", "eval.users=40"]]


def differences(made: Shop, table: Table, data: Dataset, split: str) -> list[str]:
    """Return the differences between the data that a recipe reads and the written data."""
    pairs = {(line.customer, line.product.sku) for line in made.lines}
    rows = data.interactions.select("user_id", "item_id").unique()
    wanted = {
        "users": (rows["user_id"].n_unique(), len({user for user, _ in pairs})),
        "items": (len(data.items), len({item for _, item in pairs})),
        "pairs": (rows.height, len(pairs)),
        "split": (split, table.split),
        "times": (data.has_time, True),
    }
    titles = {item.title.partition(" (19")[0].partition(" (20")[0] for item in data.items.values()}
    if table.titled:
        known = {" ".join(each.title.split()) for each in made.products}
        wanted["titles"] = (sorted(titles - known), [])
    return [f"{name}: {found} and not {said}" for name, (found, said) in wanted.items() if found != said]
