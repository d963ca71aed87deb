"""A table of users that matches few or none of them is said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llmrec.data.dataset import Dataset
from llmrec.errors import DataError
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import as_recipe
from tests.facts import Facts, raises


def loaded(folder: Path, users: str) -> Dataset:
    events = [f"{user},{item},{user * 10 + item}" for user in (1, 2, 3) for item in range(5)]
    (folder / "t.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]), encoding="utf-8")
    listed = [f"{user},F" for user in users.split()]
    (folder / "u.csv").write_text("\n".join(["user_id,gender", *listed]), encoding="utf-8")
    data = {"source": "table", "path": str(folder / "t.csv"), "users": str(folder / "u.csv")}
    page = {"name": "x", "data": {**data, "columns": {"user_fields": ["gender"]}}, "tasks": {"sequential": {}}}
    return load_split(as_recipe(page).data, 0).dataset


def test_users_of_whom_none_has_interactions_are_refused(tmp_path: Path) -> None:
    with raises(DataError, Facts("mismatch", "u.csv", says=("'1.0'", "'1'", "data.users"))):
        loaded(tmp_path, "1.0 2.0 3.0")


def test_few_users_are_told_and_more_than_there_are_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert set(loaded(tmp_path, "1 2 3 4 5 6 7 8").users) == {"1", "2", "3"} and not caplog.records
    assert set(loaded(tmp_path, "1 9").users) == {"1"}
    assert "2 of 3 users are missing" in caplog.text
