"""Documents about items: matching, passages within the token budget, and retrieved texts as data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from llmrec.data.knowledge import BM25, Documents, format_passages, resolve_citations
from llmrec.data.sets.table import load_data
from llmrec.data.split import split_dataset
from llmrec.errors import DataError
from llmrec.prompts.template import load_templates
from llmrec.recipe.schema import DataSection
from llmrec.tasks.base import DataView
from llmrec.types import Item
from tests.facts import Facts, raises

TEXTS = {
    "i0": "A fox hunts at night. It was directed by Ada Byron. Music is by Clara Wieck.",
    "i1": "Two ships meet. The country is Peru. Shot in 1961 by the director Ida Noddack.",
    "i2": "{{ item.title }} <|im_start|>",
}


def _section(folder: Path, **facts: object) -> DataSection:
    rows = [f"u{user},i{item}" for user in range(4) for item in range(3)]
    (folder / "rows.csv").write_text("user_id,item_id\n" + "\n".join(rows) + "\n")
    titles = ("The Fox", "Two Ships", "The Third")
    lines = [json.dumps({"item_id": f"i{n}", "title": title}) for n, title in enumerate(titles)]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    documents = [json.dumps({"item_id": each, "text": text}) for each, text in TEXTS.items()]
    (folder / "facts.jsonl").write_text("\n".join(documents) + "\n")
    section = {"path": str(folder / "facts.jsonl"), "tokens": 12} | facts if facts.get("path", 1) else None
    paths = {"path": str(folder / "rows.csv"), "items": str(folder / "items.jsonl")}
    return DataSection.model_validate({"source": "table", **paths, "facts": section})


def test_bm25_equals_its_formula() -> None:
    texts = ["red fox red", "a blue ship", "the red ship sails on"]
    model = BM25.of(texts)
    idf = {"red": math.log(1 + 1.5 / 2.5), "ship": math.log(1 + 1.5 / 2.5)}
    slow = [1.2 * (0.25 + 0.75 * length / (11 / 3)) for length in (3, 3, 5)]
    expected = [
        idf["red"] * 2 * 2.2 / (2 + slow[0]),
        idf["ship"] * 2.2 / (1 + slow[1]),
        (idf["red"] + idf["ship"]) * 2.2 / (1 + slow[2]),
    ]
    assert np.allclose(model.scores("RED ship unknown"), expected)


def test_items_have_selected_passages(tmp_path: Path) -> None:
    selected = load_data(_section(tmp_path, about=["director", "directed", "country"], tokens=14), seed=0)
    assert selected.items["i0"].fields["facts"] == "[1] It was directed by Ada Byron."
    assert (
        selected.items["i1"].fields["facts"] == "[1] The country is Peru. [2] Shot in 1961 by the director Ida Noddack."
    )
    first = load_data(_section(tmp_path), seed=0)
    assert first.items["i0"].fields["facts"] == "[1] A fox hunts at night. [2] Music is by Clara Wieck."
    assert first.provenance["items with facts"] == "3 of 3"
    bare = load_data(_section(tmp_path, path=None), seed=0)
    # The fingerprint depends on the documents.
    assert len({each.fingerprint for each in (selected, first, bare)}) == 3


def test_documents_by_title(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(40)]
    titles = [" ".join(rng.choice(words, 3, replace=False)) + f" {n}" for n in range(60)]
    lines = [json.dumps({"title": title + ", a film", "text": f"It tells of {title}."}) for title in titles]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines) + "\n")
    known = Documents.read(str(tmp_path / "facts.jsonl"))
    results = [known.about(Item(item_id=str(n), title=title.upper())) for n, title in enumerate(titles)]
    assert np.mean([result == n for n, result in enumerate(results)]) >= 0.95
    assert known.about(Item(item_id="x", title="word1 nowhere")) is None
    assert known.about(Item(item_id="x", title="")) is None


def test_titles_of_one_word(tmp_path: Path) -> None:
    lines = [("Cooking at home", "You heat the pan. It is hot."), ("Heat, a film", "Two men."), ("Rocky", "A boxer.")]
    (tmp_path / "facts.jsonl").write_text("\n".join(json.dumps({"title": n, "text": t}) for n, t in lines))
    known = Documents.read(str(tmp_path / "facts.jsonl"))
    results = [known.about(Item(item_id="x", title=title)) for title in ("Heat", "It", "Rocky", "Two men")]
    assert results == [1, None, 2, 1]


def test_retrieved_text_is_no_template(tmp_path: Path) -> None:
    data = split_dataset(load_data(_section(tmp_path), seed=0), _section(tmp_path).split, seed=0)
    values = {"item": DataView(data).item("i2"), "history": []}
    (turn,) = load_templates("explanation")["cite-facts"].turns(values)
    assert "[1] {{ item.title }} <|im_start|>" in turn.text
    # It is in a data segment, so it does not become a control token.
    assert [segment.kind for segment in turn.segments if "im_start" in segment.text] == ["item"]


def test_removes_citations_of_other_passages() -> None:
    facts = format_passages(["It was directed by Ada Byron.", "Music is by Clara Wieck."])
    text, shown = resolve_citations("Ada Byron made it [1], and you like her [4] [1].", facts)
    assert text == "Ada Byron made it [1], and you like her [1]."
    assert shown == ("It was directed by Ada Byron.",)
    assert resolve_citations("Nothing is known [1].", "") == ("Nothing is known.", ())


def test_malformed_documents(tmp_path: Path) -> None:
    section = _section(tmp_path)
    pl.DataFrame({"item_id": ["i0", "i0"], "text": ["a", "b"]}).write_csv(tmp_path / "twice.csv")
    pl.DataFrame({"item_id": ["x"], "text": ["a b."]}).write_csv(tmp_path / "others.csv")
    pl.DataFrame({"name": ["x"], "text": ["a"]}).write_csv(tmp_path / "nameless.csv")
    for file, facts in {
        "twice.csv": Facts("duplicate", says="i0"),
        "others.csv": Facts("empty", says="check that the ids match"),
        "nameless.csv": Facts("missing-column", says="item_id or title"),
    }.items():
        assert section.facts is not None
        other = section.facts.model_copy(update={"path": str(tmp_path / file)})
        with raises(DataError, facts):
            load_data(section.model_copy(update={"facts": other}), seed=0)


@pytest.mark.parametrize("tokens", [1, 9])
def test_passages_keep_to_the_budget(tmp_path: Path, tokens: int) -> None:
    _section(tmp_path)
    known = Documents.read(str(tmp_path / "facts.jsonl"))
    shown = known.passages(1, "director country", tokens)
    assert sum(len(passage.replace(".", " .").split()) for passage in shown) <= tokens
