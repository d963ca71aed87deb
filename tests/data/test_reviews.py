"""The source of reviews: what is read, what is derived from training reviews alone, and what must not leak into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmrec.data import derived
from llmrec.data.dataset import Dataset
from llmrec.data.derived import extract, pseudonyms, sentences
from llmrec.data.sets.table import load
from llmrec.data.split import SplitDataset, split, with_review_part
from llmrec.errors import DataError
from llmrec.recipe.schema import DataSection, Filter, Split
from tests.facts import Facts, raises
from tests.review_files import FEATURES, marks, records, write


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("reviews") / "reviews_Things_5.json.gz", records())


@pytest.fixture(scope="module")
def dataset(file: Path) -> Dataset:
    return section_data(file)


@pytest.fixture(scope="module", params=["leave_one_out", "global_time", "user_disjoint"])
def data(request: pytest.FixtureRequest, dataset: Dataset) -> SplitDataset:
    return split(dataset, Split(kind=request.param), seed=0)


def section_data(path: Path, **keys: object) -> Dataset:
    return load(DataSection.model_validate({"source": "amazon-reviews", "path": str(path), **keys}), seed=0)


def derived_texts(data: SplitDataset) -> str:
    names = [text for known in data.dataset.users.values() for text in known.values()]
    return "\n".join([*(item.title for item in data.dataset.items.values()), *names]).casefold()


# --------------------------------------------------------------------------- reading


def test_every_review_is_read_with_its_headline(dataset: Dataset) -> None:
    rows = records()
    assert dataset.interactions.height == len(rows) == len(dataset.reviews)
    for row in rows:
        review = dataset.reviews[row["reviewerID"], row["asin"]]
        assert review.text == row["reviewText"] and review.headline == row["summary"]
        assert marks(row["reviewerID"], row["asin"])[1] in review.phrases
    assert dataset.rating_scale == (1.0, 5.0) and dataset.has_time
    assert "derived" in dataset.provenance and "pseudonyms" in dataset.provenance["derived"]
    assert "A Real Name" not in repr(dataset)


def test_a_plain_file_says_the_same(dataset: Dataset, tmp_path: Path) -> None:
    plain = section_data(write(tmp_path / "reviews.json", records()))
    assert plain.fingerprint == dataset.fingerprint


def test_html_entities_are_decoded_once(tmp_path: Path) -> None:
    first, *rest = records()
    path = write(
        tmp_path / "html.json",
        [{**first, "summary": "R&amp;B &#34;fan&#34; &amp;lt;", "reviewText": "A &lt; B"}, *rest],
    )
    review = section_data(path).reviews[first["reviewerID"], first["asin"]]
    assert (review.headline, review.text) == ('R&B "fan" &lt;', "A < B")


def test_reviews_are_part_of_the_fingerprint(dataset: Dataset) -> None:
    pair, review = next(iter(dataset.reviews.items()))
    other = replace(dataset, reviews={**dataset.reviews, pair: replace(review, headline="another")})
    assert other.fingerprint != dataset.fingerprint


def test_a_filter_keeps_the_reviews_of_what_is_left(file: Path) -> None:
    kept = section_data(file, filter=Filter(min_rating=4).model_dump())
    pairs = set(kept.interactions.select("user_id", "item_id").iter_rows())
    assert 0 < len(pairs) < len(records()) and set(kept.reviews) == pairs


def test_of_a_repeated_pair_the_later_review_is_kept(tmp_path: Path) -> None:
    rows = records()
    late = {**rows[0], "summary": "later", "reviewText": "Later words about it.", "unixReviewTime": 1_500_000_000}
    path = write(tmp_path / "again.json", [late, *rows])
    with raises(DataError, Facts("duplicate", path, 2, says="data.duplicates=keep_last")):
        section_data(path)
    review = section_data(path, duplicates="keep_last").reviews[rows[0]["reviewerID"], rows[0]["asin"]]
    assert (review.headline, review.text) == ("later", "Later words about it.")


def test_titles_of_a_table_stand_where_there_is_one(file: Path, tmp_path: Path) -> None:
    table = tmp_path / "items.csv"
    table.write_text("item_id,title\n" + "".join(f"B{n:02d},Thing {n}\n" for n in range(12)), encoding="utf-8")
    data = split(section_data(file, items=str(table)), Split(), seed=0)
    assert data.dataset.items["B03"].title == "Thing 3"
    assert "titles" not in data.dataset.provenance["derived"]
    assert set(data.dataset.users["U00"]) == {"name"}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"overall": None}, Facts("bad-value", None, 1, "overall")),
        ({"asin": {"a": 1}}, Facts("bad-value", None, None, "asin", line=1)),
        ({"reviewerID": " "}, Facts("missing-value", None, 1, "reviewerID")),
        ({"reviewText": "a\0b"}, Facts("encoding", None, None, "reviewText", line=1)),
    ],
)
def test_a_row_that_cannot_be_used_is_named(change: dict[str, object], facts: Facts, tmp_path: Path) -> None:
    first, *rest = records()
    with raises(DataError, replace(facts, file="bad.json")):
        section_data(write(tmp_path / "bad.json", [{**first, **change}, *rest]))


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "other.json", [{"user_id": "a", "item_id": "b", "rating": 1.0}])
    with raises(DataError, Facts("missing-column", path, column="reviewerID", says="unlike this data set")):
        section_data(path)
    (tmp_path / "none.json").write_text("\n\n", encoding="utf-8")
    with raises(DataError, Facts("empty", "none.json")):
        section_data(tmp_path / "none.json")
    with raises(DataError, Facts("missing-key", column="data.path")):
        load(DataSection(source="amazon-reviews"), seed=0)
    with raises(DataError, Facts("contradiction", column="data.columns")):
        section_data(path, columns={"user": "reviewerID"})


# --------------------------------------------------------------------------- what is derived


def test_titles_are_unique_and_names_too(data: SplitDataset) -> None:
    titles = [item.title for item in data.dataset.items.values()]
    assert len(set(titles)) == len(titles) and all(titles)
    names = [known["name"] for known in data.dataset.users.values()]
    assert len(set(names)) == len(names) == data.dataset.interactions["user_id"].n_unique()


def test_nothing_derived_holds_a_word_of_a_held_out_review(data: SplitDataset) -> None:
    shown = derived_texts(data)
    assert data.held_out
    for pair in data.held_out:
        assert not [mark for mark in marks(*pair) if mark in shown]


def test_titles_do_hold_words_of_training_reviews(data: SplitDataset) -> None:
    """The test above could not fail if titles were made of nothing."""
    shown = derived_texts(data)
    assert any(feature in shown for feature in FEATURES)
    taught = list(data.train.select("user_id", "item_id").iter_rows())
    assert any(mark in shown for pair in taught for mark in marks(*pair))


def test_what_is_derived_does_not_move_with_held_out_reviews(dataset: Dataset) -> None:
    before = split(dataset, Split(), seed=0)
    other = {
        pair: replace(review, text="Other words entirely.", phrases=("other words", "strap"), headline="other")
        if pair in before.held_out
        else review
        for pair, review in dataset.reviews.items()
    }
    after = split(replace(dataset, reviews=other), Split(), seed=0)
    assert after.held_out == before.held_out
    assert after.dataset.items == before.dataset.items and after.dataset.users == before.dataset.users
    for pair, review in before.dataset.reviews.items():
        if pair not in before.held_out:
            assert after.dataset.reviews[pair] == review


def test_pairs_that_another_table_holds_out_leave_the_titles(dataset: Dataset) -> None:
    data = split(dataset, Split(), seed=0)
    shown = derived_texts(data)
    taught = data.train.select("user_id", "item_id").iter_rows()
    pair = next(pair for pair in taught if any(mark in shown for mark in marks(*pair)))
    less = derived_texts(data.without(frozenset({pair})))
    assert not [mark for mark in marks(*pair) if mark in less]


def test_features_are_words_of_training_and_stand_in_their_sentence(data: SplitDataset) -> None:
    found = {review.feature for review in data.dataset.reviews.values()} - {""}
    assert found & set(FEATURES)
    taught = [data.dataset.reviews[pair] for pair in data.train.select("user_id", "item_id").iter_rows()]
    for feature in found:
        assert sum(feature in review.phrases for review in taught) >= 3
    for pair, review in data.dataset.reviews.items():
        assert bool(review.feature) == bool(review.sentence)
        assert review.feature in review.sentence.casefold() and review.sentence in " ".join(review.text.split())
        assert marks(*pair)[2] not in review.sentence.casefold()


def test_another_seed_gives_other_names_and_more_users_keep_theirs() -> None:
    users = [f"u{n}" for n in range(3000)]
    names = pseudonyms(users, seed=0)
    assert len(set(names.values())) == len(users)
    few = pseudonyms(users[:10], seed=0)
    assert few == {user: names[user] for user in users[:10]}
    assert pseudonyms(users[:10], seed=1) != few


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("It is cheap.I like it", ["It is cheap.", "I like it"]),
        ("At 3.5 volts\nit  runs", ["At 3.5 volts", "it runs"]),
        ("", []),
    ],
)
def test_sentences(text: str, cut: list[str]) -> None:
    assert sentences(text) == cut


# --------------------------------------------------------------------------- what a family writes


def test_the_text_column_is_what_a_family_writes(data: SplitDataset) -> None:
    for part, name in (("sentence", "sentence"), ("headline", "headline")):
        view = with_review_part(data, part)  # type: ignore[arg-type]
        assert view.held_out == data.held_out and view.fingerprint != data.fingerprint
        for frame in (view.train, view.valid, view.test, view.known):
            for user, item, text in frame.select("user_id", "item_id", "text").iter_rows():
                assert (text or "") == getattr(view.dataset.reviews[user, item], name)
    assert set(data.train.columns) < set(with_review_part(data, "sentence").train.columns)


def test_data_without_reviews_stay_as_they_are(dataset: Dataset) -> None:
    plain = split(replace(dataset, reviews={}, derives=frozenset()), Split(), seed=0)
    assert with_review_part(plain, "headline") is plain
    assert plain.dataset.items["B00"].title == "B00"


# --------------------------------------------------------------------------- keyphrases


def test_phrases_are_kept_on_disk_and_a_damaged_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    texts = ["The acoustic guitar has a warm tone.", "", "A cheap cable with gold plugs."]
    found = derived.keyphrases(texts)
    assert found[1] == () and any("guitar" in phrase for phrase in found[0])
    (kept,) = (tmp_path / "keyphrases").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(derived, "_of", lambda *_: pytest.fail("extracted again"))
        assert derived.keyphrases(texts) == found
    for damage in ("{", json.dumps([["one"]]), "7"):
        kept.write_text(damage, encoding="utf-8")
        assert derived.keyphrases(texts) == found
    assert derived.keyphrases(texts[:1]) == found[:1]


def test_phrases_follow_case_place_frequency_and_neighbours() -> None:
    text = (
        "This guitar strap is comfortable and the leather is thick. The leather strap holds my guitar well, and the "
        "buckle of the Fender strap is solid. I bought it for $15."
    )
    # The scores that the reference implementation of the paper gives this text.
    assert extract(text)[:7] == [
        (pytest.approx(score, abs=5e-5), phrase)
        for score, phrase in (
            *((0.0919, "fender strap"), (0.1158, "leather strap"), (0.1166, "strap"), (0.1419, "guitar strap")),
            *((0.1483, "leather"), (0.1523, "thick"), (0.1776, "guitar")),
        )
    ]
    assert extract("") == extract("ok 123 the") == []
    alike = [phrase for _, phrase in extract("Good strings, good string")]
    assert set(alike) == {"good", "string", "good string"}
