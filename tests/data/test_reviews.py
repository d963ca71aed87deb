"""The source of reviews: reading, and titles and features derived from training reviews alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmrec.data import derived
from llmrec.data.dataset import Dataset
from llmrec.data.derived import pseudonyms, score_keyphrases, split_sentences
from llmrec.data.sets.table import load_data
from llmrec.data.split import SplitDataset, split_dataset, with_review_part
from llmrec.errors import DataError
from llmrec.recipe.schema import DataSection, ExplanationSection, Filter, Split
from llmrec.tasks.explanation import ExplanationTask
from tests.facts import Facts, raises
from tests.review_files import FEATURES, marks, records, write
from tests.tasks.making import make
from tests.tasks.task_data import load_templates, prompt_text


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


@pytest.fixture(scope="module", params=["leave_one_out", "user_disjoint"])
def data(request: pytest.FixtureRequest, dataset: Dataset) -> SplitDataset:
    return split_dataset(dataset, Split(kind=request.param), seed=0)


def section_data(path: Path, **keys: object) -> Dataset:
    return load_data(DataSection.model_validate({"source": "amazon-reviews", "path": str(path), **keys}), seed=0)


def derived_texts(data: SplitDataset) -> str:
    names = [text for known in data.dataset.users.values() for text in known.values()]
    return "\n".join([*(item.title for item in data.dataset.items.values()), *names]).casefold()


def test_reads_reviews_with_headlines(dataset: Dataset) -> None:
    rows = records()
    assert dataset.interactions.height == len(rows) == len(dataset.reviews)
    for row in rows:
        review = dataset.reviews[row["reviewerID"], row["asin"]]
        assert review.text == row["reviewText"] and review.headline == row["summary"]
        assert marks(row["reviewerID"], row["asin"])[1] in review.phrases
    assert dataset.rating_scale == (1.0, 5.0) and dataset.has_time
    assert "derived" in dataset.provenance and "pseudonyms" in dataset.provenance["derived"]
    assert "A Real Name" not in repr(dataset)


def test_html_entities_are_decoded_once(tmp_path: Path) -> None:
    first, *rest = records()
    escaped = {**first, "summary": "R&amp;B &#34;fan&#34; &amp;lt;", "reviewText": "A &lt; B"}
    path = write(tmp_path / "html.json", [escaped, *rest])
    review = section_data(path).reviews[first["reviewerID"], first["asin"]]
    assert (review.headline, review.text) == ('R&B "fan" &lt;', "A < B")


def test_fingerprint_depends_on_reviews(dataset: Dataset) -> None:
    pair, review = next(iter(dataset.reviews.items()))
    other = replace(dataset, reviews={**dataset.reviews, pair: replace(review, headline="another")})
    assert other.fingerprint != dataset.fingerprint


def test_filter_applies_to_reviews(file: Path) -> None:
    kept = section_data(file, filter=Filter(min_rating=4).model_dump())
    pairs = set(kept.interactions.select("user_id", "item_id").iter_rows())
    assert 0 < len(pairs) < len(records()) and set(kept.reviews) == pairs


def test_later_review_of_duplicates(tmp_path: Path) -> None:
    rows = records()
    late = {**rows[0], "summary": "later", "reviewText": "Later words about it.", "unixReviewTime": 1_500_000_000}
    path = write(tmp_path / "again.json", [late, *rows])
    with raises(DataError, Facts("duplicate", path, 2, says="data.duplicates=keep_last")):
        section_data(path)
    review = section_data(path, duplicates="keep_last").reviews[rows[0]["reviewerID"], rows[0]["asin"]]
    assert (review.headline, review.text) == ("later", "Later words about it.")


def test_titles_of_a_table(file: Path, tmp_path: Path) -> None:
    table = tmp_path / "items.csv"
    table.write_text("item_id,title\n" + "".join(f"B{n:02d},Thing {n}\n" for n in range(12)), encoding="utf-8")
    data = split_dataset(section_data(file, items=str(table)), Split(), seed=0)
    assert data.dataset.items["B03"].title == "Thing 3"
    assert "titles" not in data.dataset.provenance["derived"]
    assert set(data.dataset.users["U00"]) == {"name"}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"overall": None}, Facts("bad-value", None, 1, "overall")),
        ({"reviewerID": " "}, Facts("missing-value", None, 1, "reviewerID")),
    ],
)
def test_malformed_rows(change: dict[str, object], facts: Facts, tmp_path: Path) -> None:
    first, *rest = records()
    with raises(DataError, replace(facts, file="bad.json")):
        section_data(write(tmp_path / "bad.json", [{**first, **change}, *rest]))


def test_rejects_other_files(tmp_path: Path) -> None:
    path = write(tmp_path / "other.json", [{"user_id": "a", "item_id": "b", "rating": 1.0}])
    with raises(DataError, Facts("missing-column", path, column="reviewerID", says="unlike this data set")):
        section_data(path)
    (tmp_path / "none.json").write_text("\n\n", encoding="utf-8")
    with raises(DataError, Facts("empty", "none.json")):
        section_data(tmp_path / "none.json")
    with raises(DataError, Facts("missing-key", column="data.path")):
        load_data(DataSection(source="amazon-reviews"), seed=0)
    with raises(DataError, Facts("contradiction", column="data.columns")):
        section_data(path, columns={"user": "reviewerID"})


def test_titles_and_names_are_unique(data: SplitDataset) -> None:
    titles = [item.title for item in data.dataset.items.values()]
    assert len(set(titles)) == len(titles) and all(titles)
    names = [known["name"] for known in data.dataset.users.values()]
    assert len(set(names)) == len(names) == data.dataset.interactions["user_id"].n_unique()


def test_derived_texts_have_no_words_of_held_out_reviews(data: SplitDataset) -> None:
    shown = derived_texts(data)
    assert data.held_out
    for pair in data.held_out:
        assert not [mark for mark in marks(*pair) if mark in shown]


def test_titles_have_words_of_training_reviews(data: SplitDataset) -> None:
    shown = derived_texts(data)
    assert any(feature in shown for feature in FEATURES)
    pairs = list(data.train.select("user_id", "item_id").iter_rows())
    assert any(mark in shown for pair in pairs for mark in marks(*pair))


def test_derived_texts_do_not_depend_on_held_out_reviews(dataset: Dataset) -> None:
    before = split_dataset(dataset, Split(), seed=0)
    other = {
        pair: replace(review, text="Other words entirely.", phrases=("other words", "strap"), headline="other")
        if pair in before.held_out
        else review
        for pair, review in dataset.reviews.items()
    }
    after = split_dataset(replace(dataset, reviews=other), Split(), seed=0)
    assert after.held_out == before.held_out
    assert after.dataset.items == before.dataset.items and after.dataset.users == before.dataset.users
    for pair, review in before.dataset.reviews.items():
        if pair not in before.held_out:
            assert after.dataset.reviews[pair] == review


def test_removed_pairs_are_not_in_titles(dataset: Dataset) -> None:
    data = split_dataset(dataset, Split(), seed=0)
    shown = derived_texts(data)
    pairs = data.train.select("user_id", "item_id").iter_rows()
    pair = next(pair for pair in pairs if any(mark in shown for mark in marks(*pair)))
    less = derived_texts(data.without(frozenset({pair})))
    assert not [mark for mark in marks(*pair) if mark in less]


def test_features_are_from_training_and_in_their_sentence(data: SplitDataset) -> None:
    features = {review.feature for review in data.dataset.reviews.values()} - {""}
    assert features & set(FEATURES)
    reviews = [data.dataset.reviews[pair] for pair in data.train.select("user_id", "item_id").iter_rows()]
    for feature in features:
        assert sum(feature in review.phrases for review in reviews) >= 3
    for pair, review in data.dataset.reviews.items():
        assert bool(review.feature) == bool(review.sentence)
        assert review.feature in review.sentence.casefold() and review.sentence in " ".join(review.text.split())
        assert marks(*pair)[2] not in review.sentence.casefold()


def test_pseudonyms_depend_on_seed_and_user() -> None:
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
    assert split_sentences(text) == cut


def test_text_column_is_part_of_the_review(data: SplitDataset) -> None:
    for part, name in (("sentence", "sentence"), ("headline", "headline")):
        view = with_review_part(data, part)  # type: ignore[arg-type]
        assert view.held_out == data.held_out and view.fingerprint != data.fingerprint
        for frame in (view.train, view.valid, view.test, view.known):
            for user, item, text in frame.select("user_id", "item_id", "text").iter_rows():
                assert (text or "") == getattr(view.dataset.reviews[user, item], name)
    assert set(data.train.columns) < set(with_review_part(data, "sentence").train.columns)


def test_data_without_reviews(dataset: Dataset) -> None:
    plain = split_dataset(replace(dataset, reviews={}, derives=frozenset()), Split(), seed=0)
    assert with_review_part(plain, "headline") is plain
    assert plain.dataset.items["B00"].title == "B00"


def test_phrases_are_cached_and_damaged_files_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    texts = ["The acoustic guitar has a warm tone.", "", "A cheap cable with gold plugs."]
    phrases = derived.keyphrases(texts)
    assert phrases[1] == () and any("guitar" in phrase for phrase in phrases[0])
    (kept,) = (tmp_path / "keyphrases").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(derived, "_extract_keyphrases", lambda *_: pytest.fail("extracted again"))
        assert derived.keyphrases(texts) == phrases
    for damage in ("{", json.dumps([["one"]]), "7"):
        kept.write_text(damage, encoding="utf-8")
        assert derived.keyphrases(texts) == phrases
    assert derived.keyphrases(texts[:1]) == phrases[:1]


def test_phrases_equal_the_reference_implementation() -> None:
    text = (
        "This guitar strap is comfortable and the leather is thick. The leather strap holds my guitar well, and the "
        "buckle of the Fender strap is solid. I bought it for $15."
    )
    # The scores that the reference implementation of the paper gives this text.
    assert score_keyphrases(text)[:7] == [
        (pytest.approx(score, abs=5e-5), phrase)
        for score, phrase in (
            *((0.0919, "fender strap"), (0.1158, "leather strap"), (0.1166, "strap"), (0.1419, "guitar strap")),
            *((0.1483, "leather"), (0.1523, "thick"), (0.1776, "guitar")),
        )
    ]
    assert score_keyphrases("") == score_keyphrases("ok 123 the") == []
    alike = [phrase for _, phrase in score_keyphrases("Good strings, good string")]
    assert set(alike) == {"good", "string", "good string"}


def explanation_rows() -> list[dict[str, Any]]:
    return [
        {
            "uid": user,
            "iid": 100 + (user + n) % 7,
            "title": f"Book {(user + n) % 7}",
            "user_summary": f"Reader {user} likes long tales.",
            "item_summary": f"A tale about thing {(user + n) % 7}.",
            "explanation": f"Reader {user} would take book {(user + n) % 7} for its length.",
        }
        for user in range(10)
        for n in range(1 + user % 3)
    ]


def explanations(path: Path | None, **keys: object) -> Any:
    return load_data(DataSection.model_validate({"source": "explanations", "path": path and str(path), **keys}), seed=0)


def test_explanations(tmp_path: Path) -> None:
    data = explanations(write(tmp_path / "rows.jsonl.gz", explanation_rows()), noun="books")
    assert data.interactions.height == len(explanation_rows()) and not data.has_time and data.rating_scale is None
    assert data.items["103"].title == "Book 3" and data.items["103"].fields == {"about": "A tale about thing 3."}
    assert data.users["4"] == {"taste": "Reader 4 likes long tales."}
    assert not data.reviews and "language model" in data.provenance["derived"]


def test_prompt_of_explanations_shows_profiles_and_no_explanation(tmp_path: Path) -> None:
    data = explanations(write(tmp_path / "rows.jsonl", explanation_rows()), noun="books")
    parts = split_dataset(data, Split(kind="user_disjoint", valid=0.2, test=0.3), seed=0)
    task = make(ExplanationTask, parts, ExplanationSection(templates=("plain",)), load_templates("explanation"), seed=0)
    assert task.cases("test")
    for case in task.cases("test"):
        shown = prompt_text(task.prompt(case.request, template="plain"))
        user, item = case.request.user_id, str(case.request.item)
        assert f"Reader {user} likes long tales." in shown and f"thing {int(item) - 100}" in shown
        assert str(case.truth) not in shown


@pytest.mark.parametrize(
    ("less", "keys", "facts"),
    [
        (True, {}, Facts("missing-column", "rows.jsonl", column="explanation")),
        (False, {"items": "items.csv"}, Facts("contradiction", column="data.columns", says="remove data.items")),
        (False, {"path": None}, Facts("missing-key", column="data.path")),
    ],
)
def test_malformed_explanations(less: bool, keys: dict[str, object], facts: Facts, tmp_path: Path) -> None:
    rows = [
        {key: value for key, value in row.items() if not less or key != "explanation"} for row in explanation_rows()
    ]
    with raises(DataError, facts):
        explanations(**{"path": write(tmp_path / "rows.jsonl", rows), **keys})


def test_malformed_rows_of_explanations(tmp_path: Path) -> None:
    first, *rest = explanation_rows()
    with raises(DataError, Facts("missing-value", "a.jsonl", 1, "uid")):
        explanations(write(tmp_path / "a.jsonl", [{**first, "uid": ""}, *rest]))
    with raises(DataError, Facts("duplicate", "b.jsonl", 2, says="data.duplicates=keep_last")):
        explanations(write(tmp_path / "b.jsonl", [first, first, *rest]))
