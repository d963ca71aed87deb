"""Slices by attributes of users: every case is in one of them, and no value can look like another slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmrec
from llmrec.data.dataset import Dataset
from llmrec.errors import RecipeError
from llmrec.evaluate.slices import attribute_slices, user_attributes
from llmrec.metrics.signature import parse_signature
from llmrec.report.breakdowns import slice_title
from llmrec.results import Results
from llmrec.types import Item
from tests.facts import Facts, raises


def people(values: dict[str, str], name: str = "gender") -> Dataset:
    rows, items = pl.DataFrame({"user_id": ["u"], "item_id": ["a"]}), {"a": Item(item_id="a", title="A")}
    users = {user: {name: value} for user, value in values.items()}
    return Dataset(name="made", noun="things", interactions=rows, items=items, users=users)


def sliced(values: dict[str, str], users: list[str], name: str = "gender") -> dict[str, list[int]]:
    result = attribute_slices(users, people(values, name), name)
    return {slice: np.flatnonzero(member).tolist() for slice, member in result.items()}


def test_values_are_slices_in_order_of_frequency() -> None:
    values = {"u0": "m", "u1": "f", "u2": "f", "u3": " "}
    assert sliced(values, ["u0", "u1", "u3", "u9", "u1"]) == {
        "user:gender=f": [1, 4],
        "user:gender=m": [0],
        "user:gender:none": [2, 3],
    }
    assert user_attributes(people(values)) == ("gender",) and user_attributes(people({"u0": ""})) == ()


def test_more_than_eight_words_keep_the_seven_most_frequent() -> None:
    values = {f"u{n}-{k}": f"w{n}" for n in range(9) for k in range(9 - n)}
    result = sliced(values, list(values))
    assert list(result) == [*(f"user:gender=w{n}" for n in range(7)), "user:gender:other", "user:gender:none"]
    assert len(result["user:gender:other"]) == 3
    assert "user:gender:other" not in sliced({k: v for k, v in values.items() if v != "w8"}, ["u0-0"])


def test_more_than_eight_numbers_are_cut_at_quartiles() -> None:
    values = {f"u{n}": str(n) for n in range(1, 101)}
    result = sliced(values, ["u1", "u26", "u50", "u51", "u75", "u76", "u77"], "age")
    assert result == {
        "user:age:below-26": [0],
        "user:age:26-to-51": [1, 2],
        "user:age:51-to-76": [3, 4],
        "user:age:from-76": [5, 6],
        "user:age:none": [],
    }
    few = sliced({"u0": "10", "u1": "2", "u2": "10"}, ["u1"], "level")
    assert list(few) == ["user:level=2", "user:level=10", "user:level:none"]
    # A postcode is not a number, even if it consists of digits.
    assert "user:zip:other" in sliced({f"u{n}": f"0{n}" for n in range(20)}, [], "zip")
    # Most users have the same value, so equal edges are merged.
    shared = {f"u{n}": "0" for n in range(90)} | {f"v{n}": f"{n}.5" for n in range(10)}
    assert list(sliced(shared, [], "spent")) == ["user:spent:below-0.5", "user:spent:from-0.5", "user:spent:none"]


@given(
    values=st.dictionaries(
        st.sampled_from([f"u{n}" for n in range(30)]),
        st.text(max_size=5) | st.from_regex("-?[1-9][.][0-9]", fullmatch=True),
    )
)
def test_each_case_is_in_one_slice(values: dict[str, str]) -> None:
    users = [f"u{n}" for n in range(30)]
    result = attribute_slices(users, people(values), "gender")
    assert np.sum(list(result.values()), axis=0).tolist() == [1] * 30
    for name in result:
        assert parse_signature(f"MRR|slice:{name}|split:s|llmrec:1").slice == name
        assert "\n" not in slice_title(name)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("user:gender=f", "Users with gender: f"),
        ("user:job%20title=a%7Cb%3Ac", "Users with job title: a|b:c"),
        ("user:gender:none", "Users without gender"),
        ("user:job:other", "Users with a less frequent job"),
        ("user:age:below-18", "Users with age below 18"),
        ("user:age:18-to-25.5", "Users with age from 18 to below 25.5"),
        ("user:age:-5-to--1", "Users with age from -5 to below -1"),
        ("user:age:from-43", "Users with age from 43 on"),
        # The slices of reports.
        ("item:cold-below-5", "Rare items: fewer than 5 training interactions"),
        ("item:warm-from-5", "Warm items: 5 training interactions or more"),
        ("item:head-0.8", "Head items: the most popular, with 80 % of training interactions"),
        ("item:long-tail-0.8", "Long-tail items: all others"),
        ("history:5-9", "History of 5 to 9 interactions"),
        ("history:from-50", "History of 50 interactions or more"),
        ("activity:0-4", "Users with 0 to 4 training interactions"),
        ("activity:from-50", "Users with 50 training interactions or more"),
        ("genre:drama", "genre:drama"),
        ("history:5-9 <b>", "history:5-9 <b>"),
        ("user:x=%7B0.__class__%7D", "Users with x: {0.__class__}"),
    ],
)
def test_titles_of_slices(name: str, title: str) -> None:
    assert slice_title(name) == title


# --------------------------------------------------------------------------- of a run


def recipe(folder: Path, **settings: Any) -> dict[str, Any]:
    rows = [
        {"user_id": f"u{user}", "item_id": f"i{(user + k) % 9}", "timestamp": 10 * user + k}
        for user in range(8)
        for k in range(5)
    ]
    pl.DataFrame(rows).write_csv(folder / "rows.csv")
    known = [{"user_id": f"u{user}", "gender": "fm"[user % 2] if user < 6 else None} for user in range(8)]
    pl.DataFrame(known).write_csv(folder / "users.csv")
    data = {"source": "table", "path": "rows.csv", "users": "users.csv", "columns": {"user_fields": ["gender"]}}
    evaluated = {"arms": [], "users": 8, "candidates": {"count": 4}, "bootstrap": 100, **settings}
    tasks = {"sequential": {"baselines": ["random", "popularity", "item-knn", "markov-1"]}}
    return {"name": "made", "data": data, "tasks": tasks, "eval": evaluated}


def test_run_with_slices_by_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llmrec.run(recipe(tmp_path, slices=["gender"]), out="run", quiet=True)
    row = Results.model_validate_json((tmp_path / "run" / "results.json").read_text()).rows[0]
    slices = {part.name: part for part in row.slices if part.name.startswith("user:")}
    assert {name: (part.n, part.users) for name, part in slices.items()} == {
        "user:gender=f": (3, 3),
        "user:gender=m": (3, 3),
        "user:gender:none": (2, 2),
    }
    assert slices["user:gender=f"].metrics.keys() == {"NDCG@10"}
    assert "Users without gender" in (tmp_path / "run" / "report" / "report.md").read_text()


def test_rejects_unknown_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = recipe(tmp_path, slices=["gendr"])
    for verb in (lambda: llmrec.check(content), lambda: llmrec.run(content, out="run", quiet=True)):
        with raises(RecipeError, Facts("unknown-name", column="eval.slices", says=("gendr", "gender"))):
            verb()
