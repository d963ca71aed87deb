"""Generates a small synthetic table of reviews, for the explanation task and for tests.

A seeded grammar generates products and reviews such that histories are informative: every user cares about two aspects,
such as *quiet* or *easy to clean*; every product is good at some aspects and bad at others; rating and text follow from
both.

``python -m eval.benchmarks.make_reviews OUT.csv`` reproduces ``recipes/made/reviews.csv`` byte for byte.
"""

from __future__ import annotations

import csv
import io
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

COLUMNS = ("user_id", "item_id", "rating", "timestamp", "title", "category", "brand", "price", "text")
_SEED = 0
_USERS = 120
_START = 1_609_459_200  # 1 January 2021
_DAY = 86_400


class _Aspect(NamedTuple):
    """A quality of products, with positive and negative phrases."""

    model: str
    good: tuple[str, ...]
    bad: tuple[str, ...]


_ASPECTS: Mapping[str, _Aspect] = {
    "quiet": _Aspect(
        "Whisper",
        ("makes hardly a sound", "hums very softly", "never wakes anyone up"),
        ("is far too loud", "rattles all the time", "is heard next door"),
    ),
    "easy to clean": _Aspect(
        "Clearside",
        ("wipes clean in seconds", "rinses off without scrubbing", "hides no dirt"),
        ("is hard to clean", "traps dirt everywhere", "stains after one use"),
    ),
    "durable": _Aspect(
        "Ironwood",
        ("looks new after months", "survives daily use well", "feels built to last"),
        ("wore out within weeks", "already has a crack", "feels flimsy and thin"),
    ),
    "compact": _Aspect(
        "Nook",
        ("fits into small spaces", "needs almost no room", "stows away neatly"),
        ("needs too much room", "is bulkier than expected", "is hard to stow"),
    ),
    "quick": _Aspect(
        "Swift",
        ("finishes in no time", "saves me minutes daily", "works very fast"),
        ("takes ages every time", "slows everything down", "needs too much time"),
    ),
    "good-looking": _Aspect(
        "Atelier",
        ("looks lovely at home", "has a beautiful finish", "suits every room"),
        ("looks cheap", "has an ugly finish", "has a dull colour"),
    ),
    "comfortable to hold": _Aspect(
        "Palm",
        ("sits well in hand", "has a secure grip", "is light and balanced"),
        ("is awkward to hold", "has a slippery grip", "makes my wrist ache"),
    ),
    "safe": _Aspect(
        "Shelter",
        ("has no sharp edges", "stays firmly in place", "is harmless around children"),
        ("tips over too easily", "has edges that scratch", "is risky around children"),
    ),
}

_CATEGORIES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "small appliances": (
        ("blender", "juicer", "hand mixer", "food chopper", "bread maker"),
        ("quiet", "easy to clean", "quick", "compact"),
    ),
    "coffee and tea": (
        ("kettle", "coffee grinder", "milk frother", "coffee press", "teapot"),
        ("quick", "good-looking", "easy to clean", "comfortable to hold"),
    ),
    "cookware": (
        ("frying pan", "saucepan", "casserole", "wok", "baking tray"),
        ("durable", "easy to clean", "comfortable to hold", "good-looking"),
    ),
    "kitchen tools": (
        ("grater", "peeler", "can opener", "herb cutter", "garlic press"),
        ("comfortable to hold", "durable", "safe", "quick"),
    ),
    "storage": (
        ("bread bin", "spice rack", "lunch box", "jar set", "drawer divider"),
        ("compact", "durable", "good-looking", "easy to clean"),
    ),
    "cleaning": (
        ("hand vacuum", "floor mop", "carpet sweeper", "window wiper", "feather duster"),
        ("quick", "compact", "comfortable to hold", "durable"),
    ),
    "air and time": (
        ("wall clock", "table fan", "room heater", "humidifier", "air purifier"),
        ("quiet", "safe", "good-looking", "compact"),
    ),
    "steps and shelves": (
        ("step stool", "wall shelf", "coat stand", "folding table", "shoe rack"),
        ("safe", "durable", "compact", "good-looking"),
    ),
}

_BRANDS = ("Morvane", "Tilsby", "Orlune", "Kestwick", "Brindal", "Yarrowell")

# {it} is the product, {says} a phrase about it, and {wish} the aspect that the writer cares about. Every kind has one
# sentence for each of the five styles. The first two kinds are about the wish, the next two about another aspect.
_PRAISE = (
    "This {it} {says}, and {wish} is what I look for first.",
    "I wanted something {wish}, and this {it} {says}.",
    "I care most about things being {wish}: this {it} {says}.",
    "It helps that this {it} {says}, since I like things {wish}.",
    "Happy with it: the {it} {says}, just right for someone who wants things {wish}.",
)
_BLAME = (
    "This {it} {says}, although {wish} is what I look for first.",
    "I wanted something {wish}, but this {it} {says}.",
    "I care most about things being {wish}: sadly this {it} {says}.",
    "It is a pity that this {it} {says}, since I like things {wish}.",
    "Not happy with it: the {it} {says}, wrong for someone who wants things {wish}.",
)
_OTHER_PRAISE = (
    "This {it} {says}, even if {wish} is what I look for first.",
    "I usually want something {wish}, yet I like that this {it} {says}.",
    "I care most about things being {wish}; still, this {it} {says}.",
    "It helps that this {it} {says}, though mostly I like things {wish}.",
    "Happy with it: the {it} {says}, even for someone who mostly wants things {wish}.",
)
_OTHER_BLAME = (
    "This {it} {says}, and not only {wish} is what I look for.",
    "I usually want something {wish}, but here I mind that the {it} {says}.",
    "I care most about things being {wish}; even so, this {it} {says}.",
    "It is a pity that this {it} {says}, though mostly I like things {wish}.",
    "Not happy with it: the {it} {says}, even for someone who wants things {wish}.",
)
_MIXED = (
    "This {it} {says} but {also}; I look for something {wish}.",
    "I wanted something {wish}; this {it} {says} but {also}.",
    "I like things {wish}; this {it} {says} but {also}.",
    "The {it} {says}, yet it {also}; I like things {wish}.",
    "So-so: the {it} {says} but {also}; I want things {wish}.",
)


@dataclass(frozen=True)
class _Product:
    item_id: str
    noun: str
    title: str
    category: str
    brand: str
    price: int
    quality: Mapping[str, int]
    weight: float


@dataclass(frozen=True)
class _Person:
    user_id: str
    first: str
    second: str
    voice: int
    lenience: float
    favourites: tuple[str, str]


class _Dice:
    """Samples with `random.Random.random` only, whose values are stable across Python versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random.random()

    def integer(self, low: int, high: int) -> int:
        """Return an integer from ``low`` to ``high``, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, values: Sequence[str]) -> str:
        return values[self.integer(0, len(values) - 1)]

    def weighted(self, weights: Sequence[float]) -> int:
        at = self.between(0.0, sum(weights))
        for index, weight in enumerate(weights):
            at -= weight
            if at < 0:
                return index
        return len(weights) - 1


def generate(seed: int) -> pl.DataFrame:
    """Generate the table.

    Args:
        seed: The random seed; the shipped table has seed 0.

    Returns:
        About 1,400 rows sorted by time: `COLUMNS`, with ratings 1 to 5, timestamps in seconds and integer prices.
    """
    dice = _Dice(seed)
    products = _products(dice)
    rows = [row for number in range(1, _USERS + 1) for row in _reviews(dice, _person(dice, number), products)]
    return pl.DataFrame(rows, schema=list(COLUMNS), orient="row").sort("timestamp", "user_id")


def _products(dice: _Dice) -> list[_Product]:
    products: list[_Product] = []
    for category, (nouns, aspects) in _CATEGORIES.items():
        for noun in nouns:
            # One strength, one weakness, and two random aspects.
            strong = dice.integer(0, 3)
            weak = (strong + dice.integer(1, 3)) % 4
            quality = {aspect: dice.integer(-1, 1) for aspect in aspects}
            quality |= {aspects[strong]: 1, aspects[weak]: -1}
            brand = dice.pick(_BRANDS)
            products.append(
                _Product(
                    item_id=f"k{len(products) + 1:02d}",
                    noun=noun,
                    title=f"{brand} {_ASPECTS[aspects[strong]].model} {noun.title()}",
                    category=category,
                    brand=brand,
                    price=dice.integer(8, 90),
                    quality=quality,
                    weight=dice.between(0.3, 1.0) ** 2,
                )
            )
    return products


def _person(dice: _Dice, number: int) -> _Person:
    names = list(_ASPECTS)
    first = dice.pick(names)
    second = dice.pick([name for name in names if name != first])
    # Users buy in categories in which their first aspect occurs.
    likely = [category for category, (_, aspects) in _CATEGORIES.items() if first in aspects]
    favourite = dice.pick(likely)
    other = dice.pick([category for category in _CATEGORIES if category != favourite])
    return _Person(
        user_id=f"u{number:02d}",
        first=first,
        second=second,
        voice=dice.integer(0, len(_PRAISE) - 1),
        lenience=dice.between(-0.4, 0.6),
        favourites=(favourite, other),
    )


def _reviews(dice: _Dice, person: _Person, products: Sequence[_Product]) -> list[tuple[object, ...]]:
    left = list(products)
    moment = _START + dice.integer(0, 400) * _DAY
    rows: list[tuple[object, ...]] = []
    for _ in range(dice.integer(9, 15)):
        product = left.pop(dice.weighted([_appeal(person, candidate) for candidate in left]))
        moment += dice.integer(2, 40) * _DAY + dice.integer(0, _DAY - 1)
        rating = _rating(dice, person, product)
        text = _text(dice, person, product, rating)
        about = (product.title, product.category, product.brand, product.price)
        rows.append((person.user_id, product.item_id, rating, moment, *about, text))
    return rows


def _appeal(person: _Person, product: _Product) -> float:
    favoured = 3.0 if product.category in person.favourites else 1.0
    return product.weight * favoured * (2.0 if product.quality.get(person.first, 0) > 0 else 1.0)


def _rating(dice: _Dice, person: _Person, product: _Product) -> int:
    fit = 1.3 * product.quality.get(person.first, 0) + 0.7 * product.quality.get(person.second, 0)
    general = 0.2 * sum(product.quality.values())
    return max(1, min(5, int(3.4 + person.lenience + fit + general + dice.between(-0.5, 0.5) + 0.5)))


def _text(dice: _Dice, person: _Person, product: _Product, rating: int) -> str:
    good, bad = (_most_telling(person, product, sign) for sign in (1, -1))
    praise, blame = dice.pick(_ASPECTS[good].good), dice.pick(_ASPECTS[bad].bad)
    aspects = (good, bad) if rating == 3 else (good,) if rating > 3 else (bad,)
    # The wish is the writer's aspect that the sentence is about, or else the first one.
    wish = person.second if person.second in aspects and person.first not in aspects else person.first
    if rating == 3:
        kind = _MIXED
    elif wish in aspects:
        kind = _PRAISE if rating > 3 else _BLAME
    else:
        kind = _OTHER_PRAISE if rating > 3 else _OTHER_BLAME
    # Sometimes another style, so that style does not identify the user.
    voice = person.voice if dice.between(0, 1) < 0.7 else dice.integer(0, len(kind) - 1)
    return kind[voice].format(it=product.noun, says=blame if rating < 3 else praise, also=blame, wish=wish)


def _most_telling(person: _Person, product: _Product, sign: int) -> str:
    for aspect in (person.first, person.second):
        if product.quality.get(aspect, 0) == sign:
            return aspect
    return next(aspect for aspect, value in product.quality.items() if value == sign)


# --------------------------------------------------------------------------- the file


def to_csv(frame: pl.DataFrame) -> bytes:
    """Return a table as CSV in UTF-8, with line feeds and minimal quoting."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(frame.columns)
    writer.writerows(frame.iter_rows())
    return out.getvalue().encode()


def main(arguments: Sequence[str]) -> int:
    """Write the table to a file or to standard output."""
    raw = to_csv(generate(_SEED))
    if arguments:
        Path(arguments[0]).write_bytes(raw)
    else:
        sys.stdout.buffer.write(raw)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
