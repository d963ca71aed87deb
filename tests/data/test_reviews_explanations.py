"""The source of explanations with profile texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrec.data.sets.table import load
from llmrec.data.split import split
from llmrec.errors import DataError
from llmrec.recipe.schema import DataSection, ExplanationSection, Split
from llmrec.tasks.explanation import ExplanationTask
from tests.facts import Facts, raises
from tests.review_files import write
from tests.tasks.making import make
from tests.tasks.task_data import load_templates, prompt_text


def rows() -> list[dict[str, Any]]:
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


def loaded(path: Path | None, **keys: object) -> Any:
    given = {"source": "explanations", "path": path and str(path), **keys}
    return load(DataSection.model_validate(given), seed=0)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_titles_profiles_and_texts_are_read(name: str, tmp_path: Path) -> None:
    data = loaded(write(tmp_path / name, rows()), noun="books")
    assert data.interactions.height == len(rows()) and not data.has_time and data.rating_scale is None
    assert data.items["103"].title == "Book 3" and data.items["103"].fields == {"about": "A tale about thing 3."}
    assert data.users["4"] == {"taste": "Reader 4 likes long tales."}
    assert not data.reviews and "language model" in data.provenance["derived"]


def test_a_question_shows_both_profiles_and_not_the_explanation(tmp_path: Path) -> None:
    data = loaded(write(tmp_path / "rows.jsonl", rows()), noun="books")
    parts = split(data, Split(kind="user_disjoint", valid=0.2, test=0.3), seed=0)
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
        (
            False,
            {"columns": {"user": "uid"}},
            Facts("contradiction", column="data.columns", says="remove data.items"),
        ),
        (False, {"path": None}, Facts("missing-key", column="data.path")),
    ],
)
def test_what_cannot_be_read_is_named(less: bool, keys: dict[str, object], facts: Facts, tmp_path: Path) -> None:
    told = [{key: value for key, value in row.items() if not less or key != "explanation"} for row in rows()]
    with raises(DataError, facts):
        loaded(**{"path": write(tmp_path / "rows.jsonl", told), **keys})


def test_a_user_or_a_pair_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    first, *rest = rows()
    with raises(DataError, Facts("missing-value", "a.jsonl", 1, "uid")):
        loaded(write(tmp_path / "a.jsonl", [{**first, "uid": ""}, *rest]))
    with raises(DataError, Facts("duplicate", "b.jsonl", 2, says="data.duplicates=keep_last")):
        loaded(write(tmp_path / "b.jsonl", [first, first, *rest]))
