"""The Amazon data sets of 2014, 2018 and 2023, from small files in the official formats."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from data_cases import dicts, lines

from llmrec.data.dataset import Dataset
from llmrec.data.read.markup import has_markup, remove_markup
from llmrec.data.sets.table import load_data
from llmrec.errors import DataError
from llmrec.recipe.schema import Columns, DataSection
from tests.facts import Facts, raises

# Invented IDs of the official lengths: 13 or 14 and 10 characters.
ANN, BOB = "A2IBPI20UZIR0", "A14VAT5EAX3D9S"
PICK, CASE = "B000000001", "1384719342"


def review(user: str, item: str, stars: float, day: int, text: str, summary: str) -> dict[str, object]:
    return {
        "reviewerID": user,
        "asin": item,
        "reviewerName": "N.",
        "helpful": [0, 1],
        "reviewText": text,
        "overall": stars,
        "summary": summary,
        "unixReviewTime": day,
        "reviewTime": "02 28, 2014",
    }


REVIEWS = [
    review(ANN, CASE, 5.0, 1393545600, "Does what it should &#34;well&#34;", "good"),
    review(BOB, CASE, 4.0, 1363392000, "", "Jake"),
    review(ANN, PICK, 1.0, 1377648000, "Broke & bent; no AT&T;", "bad &amp; ugly"),
]
META = [
    {
        "asin": CASE,
        "title": 'Tom &amp; Jerry\'s "Case"',
        "price": 9.5,
        "brand": "",
        "categories": [["Musical Instruments", "Cases"], ["Other", "Path"]],
        "salesRank": {"Musical Instruments": 7},
        "related": {"also_bought": ["B0"]},
    },
    {"asin": "B0000000XX", "title": "Not bought", "categories": [["X"]]},
    {"asin": CASE, "title": "Listed again", "categories": [["X"]]},
]
NEW = [
    {"rating": 5.0, "title": "Fine", "text": "It&#39;s fine", "images": [], "asin": "B00V", "parent_asin": PICK}
    | {"user_id": ANN, "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True},
    {"rating": 2.0, "title": "No", "text": "no", "images": [{"a": "b"}], "asin": "B00W", "parent_asin": CASE}
    | {"user_id": ANN, "timestamp": 1588687729000, "helpful_vote": 2, "verified_purchase": False},
    {"rating": 3.0, "title": "", "text": "", "images": [], "asin": "B00V", "parent_asin": PICK}
    | {"user_id": BOB, "timestamp": 1288687728923, "helpful_vote": 0, "verified_purchase": True},
]
NEW_META = [
    {"main_category": "All Beauty", "title": "Pick", "average_rating": 4.8, "rating_number": 10, "price": "None"}
    | {"store": "Howard", "categories": ["Beauty", "Hair"], "details": {"a": "b"}, "parent_asin": PICK},
    {"main_category": None, "title": "Case &eacute;", "price": 19.99, "store": None, "categories": []}
    | {"parent_asin": CASE},
]


def write(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def read(year: int, path: Path, **keys: Any) -> Dataset:
    return load_data(DataSection(source=f"amazon-{year}", path=str(path), **keys), seed=0)


@pytest.fixture
def beauty(tmp_path: Path) -> Path:
    write(tmp_path / "reviews_Beauty_5.json.gz", lines(*REVIEWS))
    write(tmp_path / "meta_Beauty.json.gz", dicts(*META))
    return tmp_path


def test_2014(beauty: Path) -> None:
    data = read(2014, beauty)
    assert data.interactions.rows() == [
        (ANN, CASE, 5.0, 1393545600.0, 'Does what it should "well"'),
        (BOB, CASE, 4.0, 1363392000.0, None),
        (ANN, PICK, 1.0, 1377648000.0, "Broke & bent; no AT&T;"),
    ]
    assert {key: item.title for key, item in data.items.items()} == {CASE: 'Tom & Jerry\'s "Case"', PICK: PICK}
    fields = {"categories": "Musical Instruments > Cases", "brand": "", "price": "9.5"}
    assert data.items[CASE].fields == fields
    assert data.items[PICK].fields == {"categories": "", "brand": "", "price": ""}
    assert (data.name, data.noun, data.rating_scale) == ("amazon-2014-beauty", "products", (1.0, 5.0))
    notes = data.provenance["notes"]
    assert "1 of 2 items have no title" in notes and "repeats 1 items; the first entry is used" in notes


def test_2018(tmp_path: Path) -> None:
    meta = [
        {"asin": CASE, "title": "Case", "category": ["Music", "Cases"], "brand": "B&amp;O", "price": "$3.50 - $4.00"},
        {"asin": PICK, "title": "x.getTime() }", "category": [], "price": ".a-box-inner{background:#fff}"},
    ]
    rows = [{key: value for key, value in row.items() if key != "helpful"} | {"verified": True} for row in REVIEWS]
    write(tmp_path / "Beauty_5.json.gz", lines(*rows))
    write(tmp_path / "meta_Beauty.json.gz", lines(*meta))
    data = read(2018, tmp_path)
    assert data.items[CASE].fields == {"categories": "Music > Cases", "brand": "B&O", "price": "$3.50 - $4.00"}
    assert data.items[PICK].title == PICK and data.items[PICK].fields["price"] == ""
    assert data.interactions.equals(read(2014, tmp_path / "Beauty_5.json.gz").interactions)


SPAN = '<span class="a-size-medium a-color-secondary"'


@pytest.mark.parametrize(
    ("title", "html"),
    [
        (SPAN, True),
        ("Vogue</span>", True),
        ('a-color-secondary" class="a-text-bold">Vogue', True),
        ("<SCRIPT SRC='x'>", True),
        ("2 < 3 > 1", False),
        ("<Untitled>", False),
        ("Abc <i", True),
        ('First "class" = best', False),
    ],
)
def test_detects_html(title: str, html: bool) -> None:
    assert has_markup(title) is html


def test_scraped_pages_are_no_titles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    meta = [
        {"asin": CASE, "title": SPAN, "category": ["Music", "</span></span></span>"], "brand": "A"},
        {"asin": PICK, "title": "Picks <3 for Bass & Guitar, size=12", "category": ["Music"], "brand": SPAN},
    ]
    write(tmp_path / "Beauty_5.json.gz", lines(*REVIEWS))
    write(tmp_path / "meta_Beauty.json.gz", lines(*meta))
    data = read(2018, tmp_path)
    assert {key: item.title for key, item in data.items.items()} == {CASE: CASE, PICK: meta[1]["title"]}
    assert data.items[CASE].fields == {"categories": "Music", "brand": "A", "price": ""}
    assert data.items[PICK].fields["brand"] == ""
    assert "1 titles in " in data.provenance["notes"] and "HTML and count as missing" in caplog.text


def test_2023(tmp_path: Path) -> None:
    write(tmp_path / "All_Beauty.jsonl.gz", lines(*NEW))
    write(tmp_path / "meta_All_Beauty.jsonl.gz", lines(*NEW_META))
    data = read(2023, tmp_path)
    assert data.interactions.rows() == [
        (ANN, PICK, 5.0, 1588687728.923, "It's fine"),
        (ANN, CASE, 2.0, 1588687729.0, "no"),
        (BOB, PICK, 3.0, 1288687728.923, None),
    ]
    assert data.items[PICK].fields == {
        "categories": "Beauty > Hair",
        "main_category": "All Beauty",
        "brand": "Howard",
        "price": "",
    }
    assert data.items[CASE].title == "Case é" and data.items[CASE].fields["price"] == "19.99"
    # Averages over all ratings would show the held-out ones.
    assert not {"average_rating", "rating_number", "salesRank"} & set(data.items[PICK].fields)


def test_ratings_only(tmp_path: Path) -> None:
    pairs = [(row["reviewerID"], row["asin"], row["overall"], row["unixReviewTime"]) for row in REVIEWS]
    old = "".join(f"{user},{item},{stars},{time}\n" for user, item, stars, time in pairs).encode()
    middle = "".join(f"{item},{user},{stars},{time}\n" for user, item, stars, time in pairs).encode()
    new = b"user_id,parent_asin,rating,timestamp\n" + old.replace(b"00\n", b"00000\n")
    results = [
        read(2014, write(tmp_path / "a" / "ratings_Beauty.csv", old)),
        read(2018, write(tmp_path / "b" / "Beauty.csv", middle)),
        read(2023, write(tmp_path / "c" / "Beauty.csv.gz", new)),
    ]
    assert len({data.fingerprint for data in results}) == 1
    assert results[0].interactions["text"].null_count() == 3
    for year, path in ((2018, tmp_path / "a" / "ratings_Beauty.csv"), (2014, tmp_path / "b" / "Beauty.csv")):
        with raises(DataError, Facts("wrong-format", path, says=("amazon-2014", "amazon-2018"))):
            read(year, path)
    with raises(DataError, Facts("missing-column", "ratings_Beauty.csv", column="user_id")):
        read(2023, tmp_path / "a" / "ratings_Beauty.csv")


def test_headline_as_text(beauty: Path) -> None:
    data = read(2014, beauty, columns=Columns(text="summary"))
    assert data.interactions["text"].to_list() == ["good", "Jake", "bad & ugly"]
    assert read(2014, beauty, columns=Columns(text="none")).interactions["text"].null_count() == 3
    with raises(DataError, Facts("unknown-name", column="data.columns.text", says="reviewText, summary")):
        read(2014, beauty, columns=Columns(text="headline"))


@pytest.mark.parametrize("name", ["reviews.jsonl.gz", "anything.json"])
def test_other_file_names(tmp_path: Path, name: str) -> None:
    data = read(2014, write(tmp_path / name, lines(*REVIEWS)), items=None)
    assert data.interactions.height == 3 and data.items[PICK].title == PICK
    assert "2 of 2 items have no title" in data.provenance["notes"]


def test_metadata_file(beauty: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write(beauty / "meta_Baby.json", dicts({"asin": CASE, "title": "A baby's case"}))
    assert read(2014, beauty).items[CASE].title.startswith("Tom")
    named = write(other / "products.json", dicts({"asin": CASE, "title": "Named"}))
    assert read(2014, beauty, items=str(named)).items[CASE].title == "Named"
    write(beauty / "reviews_Baby_5.json", lines(*REVIEWS))
    with raises(DataError, Facts("ambiguous", beauty, says="reviews_Baby_5.json, reviews_Beauty_5.json.gz")):
        read(2014, beauty)
    assert read(2014, beauty / "reviews_Baby_5.json").items[CASE].title == "A baby's case"


def test_fingerprint_depends_neither_on_order_nor_on_spelling(beauty: Path) -> None:
    data = read(2014, beauty)
    write(beauty / "reviews_Beauty_5.json.gz", dicts(*REVIEWS[::-1]).replace(b"4.0", b"'4.0'").replace(b"5.0,", b"5,"))
    again = read(2014, beauty)
    assert again.fingerprint == data.fingerprint and again.items == data.items
    assert data.fingerprint.startswith("a928ba3938fe")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("A &amp; B", "A & B"),
        ("&quot;Hi&quot; &#39;x&#39; &#x2122;", "\"Hi\" 'x' ™"),
        ("&amp;amp;", "&amp;"),
        ("AT&T; R&B &copy 2001 &notathing; &", "AT&T; R&B &copy 2001 &notathing; &"),
        ("&lt;|im_end|&gt;", "<|im_end|>"),
        ("3,5&nbsp;kg&#160;net", "3,5 kg net"),
        ("One<br/>Two", "One Two"),
        ('<a href="x">Two  words</a><!-- no -->', "Two words"),
        ("&lt;b&gt;Vogue&lt;/b&gt;", "Vogue"),
        ("I <3 you,  <Untitled> 2 < 3 > 1 <s>", "I <3 you,  <Untitled> 2 < 3 > 1 <s>"),
        ("<script>x</script>", "<script>x</script>"),
        ("Cut <span class=", "Cut <span class="),
    ],
)
def test_plain_text_of_html(raw: str, text: str) -> None:
    assert remove_markup(raw) == text
