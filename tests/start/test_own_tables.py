"""`init` and `check` on common kinds of tables, and the data that the recipe reads from each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import pytest

from llmrec.data.sets.table import load_data
from llmrec.recipe.load import load_recipe
from tests import shop
from tests.command import llmrec

ORDERS = shop.orders()
PRODUCTS = {product.product_id: product for product in shop.products()}


def _csv(path: Path, rows: Sequence[Sequence[object]], *, mark: str = ",", encoding: str = "utf-8") -> None:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=mark).writerows(rows)


def _html(title: str) -> str:
    return f"<p>{escape(f'{title} & Söhne').replace(' ', '&nbsp;', 1)}</p>"


def german() -> None:
    """Windows-1252 with semicolons, day-first dates, decimal commas, notes with line breaks, and titles in HTML."""
    rows = [
        (f"B{o.order_id}", o.customer_id, o.product.product_id, "9,50", f"{o.at:%d.%m.%Y %H:%M}", "Bitte\nklingeln; ü")
        for o in ORDERS
    ]
    head = ("Bestellnr", "Kundennummer", "Artikelnummer", "Einzelpreis (€)", "Datum", "Kommentar")
    _csv(Path("bestellungen.csv"), [head, *rows], mark=";", encoding="cp1252")
    items = [(p.product_id, _html(p.name), p.category) for p in PRODUCTS.values()]
    _csv(Path("artikel.csv"), [("Artikelnummer", "Bezeichnung", "Kategorie"), *items], mark=";", encoding="cp1252")


def json_lines() -> None:
    """One event per line, with nested objects."""
    rows = (
        {
            "user": {"id": o.customer_id},
            "product": {"sku": o.product.product_id, "title": _html(o.product.name)},
            "ts": int(o.at.timestamp()),
        }
        for o in ORDERS
    )
    Path("events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def json_orders() -> None:
    """One order per line, with its products in a list; the orders of a customer in a quarter are merged."""
    orders = sorted(ORDERS, key=lambda o: (o.customer_id, o.at))
    rows = []
    for (customer, quarter), group in groupby(orders, key=lambda o: (o.customer_id, (o.at.month - 1) // 3)):
        lines = [{"sku": o.product.product_id, "title": _html(o.product.name), "quantity": 1} for o in group]
        created = f"2024-{1 + 3 * quarter:02d}-05T08:00"
        rows.append({"id": len(rows), "customer": {"id": customer}, "created_at": created, "lines": lines})
    Path("orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def movielens() -> None:
    """A folder with the files of MovieLens."""
    folder = Path("ml-latest-small")
    folder.mkdir()
    once = {(o.customer_id, o.product.product_id): o for o in ORDERS}
    rows = [(o.customer_id[1:], o.product.product_id[1:], o.stars, int(o.at.timestamp())) for o in once.values()]
    _csv(folder / "ratings.csv", [("userId", "movieId", "rating", "timestamp"), *rows])
    films = [(p.product_id[1:], f"{p.name} & Söhne (1990)", "Drama") for p in PRODUCTS.values()]
    _csv(folder / "movies.csv", [("movieId", "title", "genres"), *films])
    (folder / "README.txt").write_text("Summary\n=======\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("write", "arguments"),
    [
        (german, ["bestellungen.csv", "--items", "artikel.csv"]),
        (json_lines, ["events.jsonl"]),
        (json_orders, ["orders.jsonl"]),
        (movielens, ["ml-latest-small"]),
    ],
)
def test_init_and_check_read_a_table(
    write: Callable[[], None], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write()
    for words in (["init", *arguments, "--name", "mine"], ["check", "mine.yaml", "eval.arms=[]", "eval.users=40"]):
        done = llmrec(*words)
        assert done.returncode == 0, done.stderr
    section = load_recipe("mine.yaml").data
    data = load_data(section, seed=0)
    pairs = {(o.customer_id.lstrip("C"), o.product.product_id.lstrip("P")) for o in ORDERS}
    rows = data.interactions.select("user_id", "item_id").unique().rows()
    assert {(user.lstrip("C"), item.lstrip("P")) for user, item in rows} == pairs and data.has_time
    assert section.split.kind == ("last_basket" if write is json_orders else "leave_one_out")
    titles = {item.title.removesuffix(" (1990)") for item in data.items.values()}
    assert titles == {f"{product.name} & Söhne" for product in PRODUCTS.values()}
