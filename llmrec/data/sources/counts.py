"""Counts that the pages and papers of published data sets give, and how data at hand compares with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Numbers of users, of items and of interactions.

    Attributes:
        users: Users with an interaction; None where it is not published.
        items: Items with an interaction; None where it is not published.
        interactions: Rows.
        origin: Who says so.
        rounded: Whether the page rounds to tenths of a thousand or of a million.
    """

    users: int | None
    items: int | None
    interactions: int
    origin: str
    rounded: bool = False

    def agrees(self, other: Counts) -> bool:
        """Whether another count is the same, as far as this one says."""
        pairs = (
            (self.users, other.users),
            (self.items, other.items),
            (self.interactions, other.interactions),
        )
        return all(
            mine is None or (theirs is not None and abs(mine - theirs) <= self._slack(mine)) for mine, theirs in pairs
        )

    def _slack(self, number: int) -> int:
        if not self.rounded or number < 1000:
            return 0
        return 50_000 if number >= 1_000_000 else 50

    def __str__(self) -> str:
        parts = ((self.users, "users"), (self.items, "items"), (self.interactions, "interactions"))
        return " / ".join(f"{number:,} {what}" for number, what in parts if number is not None)


_2014_PAGE = "the page of the Amazon 2014 set"
# Users and items as well where papers that use the file give them.
_2014: Mapping[str, tuple[int | None, int | None, int]] = {
    "Amazon_Instant_Video": (None, None, 37_126),
    "Apps_for_Android": (None, None, 752_937),
    "Automotive": (None, None, 20_473),
    "Baby": (None, None, 160_792),
    "Beauty": (22_363, 12_101, 198_502),
    "Books": (None, None, 8_898_041),
    "CDs_and_Vinyl": (None, None, 1_097_592),
    "Cell_Phones_and_Accessories": (None, None, 194_439),
    "Clothing_Shoes_and_Jewelry": (None, None, 278_677),
    "Digital_Music": (None, None, 64_706),
    "Electronics": (None, None, 1_689_188),
    "Grocery_and_Gourmet_Food": (None, None, 151_254),
    "Health_and_Personal_Care": (None, None, 346_355),
    "Home_and_Kitchen": (None, None, 551_682),
    "Kindle_Store": (None, None, 982_619),
    "Movies_and_TV": (None, None, 1_697_533),
    "Musical_Instruments": (1_429, 900, 10_261),
    "Office_Products": (None, None, 53_258),
    "Patio_Lawn_and_Garden": (None, None, 13_272),
    "Pet_Supplies": (None, None, 157_836),
    "Sports_and_Outdoors": (35_598, 18_357, 296_337),
    "Tools_and_Home_Improvement": (None, None, 134_476),
    "Toys_and_Games": (19_412, 11_924, 167_597),
    "Video_Games": (None, None, 231_780),
}

_2018_PAGE = "the page of the Amazon 2018 set"
_2018: Mapping[str, int] = {
    "Automotive": 1_711_519,
    "Books": 27_164_983,
    "CDs_and_Vinyl": 1_443_755,
    "Cell_Phones_and_Accessories": 1_128_437,
    "Clothing_Shoes_and_Jewelry": 11_285_464,
    "Electronics": 6_739_590,
    "Grocery_and_Gourmet_Food": 1_143_860,
    "Home_and_Kitchen": 6_898_955,
    "Kindle_Store": 2_222_983,
    "Movies_and_TV": 3_410_019,
    "Office_Products": 800_357,
    "Patio_Lawn_and_Garden": 798_415,
    "Pet_Supplies": 2_098_325,
    "Sports_and_Outdoors": 2_839_940,
    "Tools_and_Home_Improvement": 2_070_831,
    "Toys_and_Games": 1_828_971,
}

_2023_PAGE = "the page of the Amazon 2023 set, 5-core"
_2023: Mapping[str, tuple[int, int, int]] = {
    "All_Beauty": (253, 356, 2_500),
    "Arts_Crafts_and_Sewing": (197_300, 90_000, 1_800_000),
    "Automotive": (632_100, 267_300, 6_100_000),
    "Baby_Products": (150_800, 36_000, 1_200_000),
    "Beauty_and_Personal_Care": (729_600, 207_600, 6_600_000),
    "Books": (776_400, 495_100, 9_500_000),
    "CDs_and_Vinyl": (123_900, 89_400, 1_600_000),
    "Cell_Phones_and_Accessories": (381_000, 111_500, 2_800_000),
    "Clothing_Shoes_and_Jewelry": (2_500_000, 715_000, 23_100_000),
    "Electronics": (1_600_000, 368_200, 15_500_000),
    "Gift_Cards": (377, 129, 2_400),
    "Grocery_and_Gourmet_Food": (404_800, 132_900, 3_900_000),
    "Health_and_Household": (796_100, 184_300, 7_200_000),
    "Home_and_Kitchen": (2_900_000, 763_600, 28_200_000),
    "Industrial_and_Scientific": (51_000, 25_800, 412_900),
    "Kindle_Store": (892_200, 466_600, 16_100_000),
    "Magazine_Subscriptions": (30, 21, 176),
    "Movies_and_TV": (657_200, 197_900, 7_400_000),
    "Musical_Instruments": (57_400, 24_600, 511_800),
    "Office_Products": (223_300, 77_600, 1_800_000),
    "Patio_Lawn_and_Garden": (416_600, 133_400, 3_400_000),
    "Pet_Supplies": (594_800, 114_600, 5_300_000),
    "Software": (146_400, 17_600, 1_300_000),
    "Sports_and_Outdoors": (409_800, 156_200, 3_500_000),
    "Tools_and_Home_Improvement": (842_000, 274_700, 7_900_000),
    "Toys_and_Games": (432_300, 162_000, 3_900_000),
    "Video_Games": (94_800, 25_600, 814_600),
}

_README = "the set's README"
_STEAM_PAGE = "the page of the Steam set"
_GOODREADS_PAGE = "the page of the Goodreads set"

PUBLISHED: Mapping[tuple[str, str], Counts] = {
    # README.txt of each set; the numbers of rated films of the larger ones are counted in many papers.
    ("movielens-1m", "ratings.dat"): Counts(6_040, 3_706, 1_000_209, _README),
    ("movielens-10m", "ratings.dat"): Counts(None, None, 10_000_054, _README),
    ("movielens-20m", "ratings.csv"): Counts(138_493, 26_744, 20_000_263, _README),
    ("movielens-25m", "ratings.csv"): Counts(162_541, 59_047, 25_000_095, _README),
    ("movielens-32m", "ratings.csv"): Counts(200_948, None, 32_000_204, _README),
    ("steam", "steam_reviews.json"): Counts(2_567_538, 15_474, 7_793_069, _STEAM_PAGE),
    ("yelp", "yelp_academic_dataset_review.json"): Counts(None, 150_346, 6_990_280, "Yelp's page, last edition"),
    ("goodreads", "goodreads_interactions.csv"): Counts(876_145, None, 228_648_342, _GOODREADS_PAGE),
    ("lastfm-2k", "user_artists.dat"): Counts(1_892, 17_632, 92_834, _README),
    ("lastfm-1k", "userid-timestamp-artid-artname-traid-traname.tsv"): Counts(992, None, 19_150_868, _README),
    **{
        ("amazon-2014", f"reviews_{name}_5.json"): Counts(users, items, rows, _2014_PAGE)
        for name, (users, items, rows) in _2014.items()
    },
    **{("amazon-2018", f"{name}_5.json"): Counts(None, None, rows, _2018_PAGE) for name, rows in _2018.items()},
    **{
        ("amazon-2023", f"{name}.csv"): Counts(users, items, rows, _2023_PAGE, rounded=True)
        for name, (users, items, rows) in _2023.items()
    },
}
"""By source and by the name of the file of interactions, without ``.gz`` and with ``.json`` for JSON Lines."""


def comparison(source: str, file: str, here: Counts) -> tuple[str, bool] | None:
    """Say how data compares with what is published about its file.

    Args:
        source: Name of the source.
        file: Name of the file of interactions, as in `PUBLISHED`.
        here: What was read, before any filter.

    Returns:
        A sentence, and whether the counts differ; None where nothing is published.
    """
    known = PUBLISHED.get((source, file))
    if known is None:
        return None
    if known.agrees(here):
        return f"as published: {known} ({known.origin})", False
    sentence = f"published: {known} ({known.origin}); here: {here}; expected when the file was filtered or cut"
    return sentence, True
