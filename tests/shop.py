"""A synthetic shop: orders of 80 customers for 60 products, in common shapes of tables.

Everything is generated from a seed. A customer has two favourite categories and often buys the next product of a
category; stars depend on the product's grade and on the customer, and comments on the stars.

``python tests/shop.py FOLDER`` writes all tables.
"""

from __future__ import annotations

import csv
import io
import random
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

CUSTOMERS, ORDERS = 80, 900
_START = datetime(2024, 1, 2, 8, 0)
_THINGS = {
    "Kitchen": ("Kettle", "Bread Knife", "Skillet", "Tea Pot", "Spice Rack", "Hand Mixer"),
    "Garden": ("Watering Can", "Rake", "Plant Pot", "Secateurs", "Bird Feeder", "Hose Reel"),
    "Office": ("Desk Lamp", "Notebook", "Paper Tray", "Fountain Pen", "Footrest", "Wall Clock"),
    "Sport": ("Yoga Mat", "Jump Rope", "Water Bottle", "Dumbbell", "Bike Light", "Head Torch"),
    "Travel": ("Neck Pillow", "Packing Cube", "Luggage Tag", "Power Adapter", "Rain Poncho", "Day Pack"),
}
_MAKES = ("Alder", "Brook", "Cedar", "Dune", "Ember", "Fjord", "Grove", "Heath")
_GOOD = ("Does its job well", "Very happy with it", "Better than expected", "Would buy it again", "Lovely quality")
_FAIR = ("It is all right", "Good enough for the price", "Works, nothing special", "Neither good nor bad")
_POOR = ("Broke after a week", "Not what I hoped for", "Feels cheap", "Sent it back")
_ABOUT = {
    "Kitchen": ("easy to clean", "sharp and well balanced", "just right for two people"),
    "Garden": ("stands up to the rain", "light to carry", "the right size for a balcony"),
    "Office": ("looks tidy on the desk", "quiet and sturdy", "helps me to concentrate"),
    "Sport": ("comfortable to hold", "fits into my bag", "good for early mornings"),
    "Travel": ("saves a lot of space", "handy on the train", "dries within an hour"),
}


@dataclass(frozen=True)
class Product:
    """One product; its stars are about ``grade``, from 1 to 5."""

    product_id: str
    name: str
    category: str
    price: float
    grade: int


@dataclass(frozen=True)
class Order:
    """One row of the table of orders."""

    order_id: int
    customer_id: str
    product: Product
    stars: float
    at: datetime
    comment: str


def products() -> list[Product]:
    """Return 60 products, 12 in each category."""
    dice = random.Random("products 0")
    result = []
    for category, things in _THINGS.items():
        for thing in things * 2:
            make = _MAKES[len(result) * 3 % len(_MAKES)]
            price = dice.randint(400, 9900) / 100
            code = f"P{len(result) + 101}"
            result.append(Product(code, f"{make} {thing}", category, price, dice.randint(2, 5)))
    return result


def orders() -> list[Order]:
    """Return 900 orders in order of time; some customers buy a product again."""
    dice = random.Random("orders 0")
    shelf = {category: [p for p in products() if p.category == category] for category in _THINGS}
    favourites = {f"C{1001 + n}": dice.sample(sorted(_THINGS), 2) for n in range(CUSTOMERS)}
    strict = {customer: dice.choice((-1, 0, 0, 1)) for customer in favourites}
    last = dict.fromkeys(favourites, -1)
    had: dict[str, set[str]] = {customer: set() for customer in favourites}
    whose = [customer for customer in favourites for _ in range(6)]
    whose += [dice.choice(sorted(favourites)) for _ in range(ORDERS - len(whose))]
    dice.shuffle(whose)
    result, moment = [], _START
    for number, customer in enumerate(whose):
        moment += timedelta(minutes=dice.randint(20, 900))
        category = (
            dice.choices(favourites[customer], (3, 1))[0] if dice.random() < 0.85 else dice.choice(sorted(_THINGS))
        )
        # The next product on the shelf is the most likely successor of the last one.
        step = 1 if dice.random() < 0.6 else dice.randint(2, 9)
        last[customer] = (last[customer] + step) % len(shelf[category])
        product = shelf[category][last[customer]]
        if product.product_id in had[customer] and dice.random() < 0.8:
            product = next((p for p in shelf[category] if p.product_id not in had[customer]), product)
            last[customer] = shelf[category].index(product)
        had[customer].add(product.product_id)
        stars = min(5, max(1, product.grade + strict[customer] + dice.choice((-1, 0, 0, 0, 1))))
        tone = _GOOD if stars >= 4 else _FAIR if stars == 3 else _POOR
        comment = f"{dice.choice(tone)}, {dice.choice(_ABOUT[category])}." if dice.random() < 0.7 else ""
        result.append(Order(50_000 + number, customer, product, float(stars), moment, comment))
    return result


def write_orders(path: Path) -> Path:
    """Write a plain table: comma-separated, decimal points, ISO times."""
    head = (
        *("order_id", "customer_id", "product_id", "product_name", "category", "price"),
        *("stars", "ordered_at", "comment"),
    )
    rows = [
        (
            str(o.order_id),
            o.customer_id,
            o.product.product_id,
            o.product.name,
            o.product.category,
            f"{o.product.price:.2f}",
            f"{o.stars:.0f}",
            o.at.strftime("%Y-%m-%dT%H:%M"),
            o.comment,
        )
        for o in orders()
    ]
    return _write(path, [head, *rows], ",")


def write_european(path: Path) -> Path:
    """Write the orders as a European spreadsheet does: semicolons, decimal commas, day first, a byte order mark."""
    head = (
        *("Bestellnr", "Kundennummer", "Artikelnr", "Bezeichnung", "Warengruppe", "Preis"),
        *("Sterne", "Datum", "Kommentar"),
    )
    rows = [
        (
            str(o.order_id),
            o.customer_id,
            o.product.product_id,
            o.product.name,
            o.product.category,
            f"{o.product.price:.2f}".replace(".", ","),
            f"{o.stars:.1f}".replace(".", ","),
            o.at.strftime("%d.%m.%Y %H:%M"),
            o.comment,
        )
        for o in orders()
    ]
    return _write(path, [head, *rows], ";", mark="\ufeff")


def write_clicks(path: Path) -> Path:
    """Write visits only: no rating, no title, times in milliseconds."""
    rows = [
        (o.customer_id, o.product.product_id, str(int(o.at.timestamp() * 1000)), "web" if o.order_id % 3 else "app")
        for o in orders()
    ]
    return _write(path, [("visitor", "product_id", "ts", "channel"), *rows], ",")


def write_parts(path: Path) -> Path:
    """Write each customer's first order of a product, with a published split: by time, 70, 10 and 20 percent."""
    once = {(o.customer_id, o.product.product_id): o for o in reversed(orders())}
    kept = sorted(once.values(), key=lambda o: o.order_id)
    rows = [
        (
            o.customer_id,
            o.product.product_id,
            o.product.name,
            f"{o.stars:.0f}",
            o.at.strftime("%Y-%m-%dT%H:%M"),
            "train" if place < 0.7 * len(kept) else "valid" if place < 0.8 * len(kept) else "test",
        )
        for place, o in enumerate(kept)
    ]
    head = ("customer_id", "product_id", "product_name", "stars", "ordered_at", "part")
    return _write(path, [head, *rows], ",")


def write_products(path: Path) -> Path:
    """Write the table of products of the orders and the clicks."""
    rows = [(p.product_id, p.name, p.category, f"{p.price:.2f}") for p in products()]
    return _write(path, [("product_id", "name", "category", "price"), *rows], ",")


def _write(path: Path, rows: Sequence[Sequence[str]], separator: str, mark: str = "") -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows(rows)
    path.write_text(mark + text.getvalue(), encoding="utf-8")
    return path


def write_all(folder: Path) -> None:
    """Write every table of the shop."""
    folder.mkdir(parents=True, exist_ok=True)
    write_orders(folder / "orders.csv")
    write_european(folder / "bestellungen.csv")
    write_clicks(folder / "clicks.csv")
    write_products(folder / "products.csv")
    write_parts(folder / "published.csv")


def database(path: Path, **tables: list[tuple[object, ...]]) -> str:
    """Write a SQLite database from tables whose first rows are the names of their columns; return its URL."""
    with closing(sqlite3.connect(path)) as connection:
        for name, (head, *rows) in tables.items():
            connection.execute(f"CREATE TABLE {name} ({', '.join(map(str, head))})")
            connection.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(head))})", rows)
        connection.commit()
    return f"sqlite:///{path.name}"


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
