"""What every error carries beside its sentence, and that it survives being raised again and sent to another process."""

from __future__ import annotations

import ast
import pickle

import pytest

from llmrec.errors import DataError, LlmrecError, MissingExtra, Place, RecipeError, require
from llmrec.resources import resource
from tests.facts import Facts, raises
from tests.structure import without_kind


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Place("a.csv"), "a.csv"),
        (Place("a.csv", 0, 1), "a.csv, header"),
        (Place("a.csv", 3, 4), "a.csv, row 3 (line 4)"),
        (Place("a.csv", 3, 3), "a.csv, row 3"),
        (Place("a.csv", 3), "a.csv, row 3"),
        (Place("a.csv", line=4), "a.csv, line 4"),
    ],
)
def test_a_place_names_the_line_where_it_is_not_the_row(place: Place, text: str) -> None:
    assert str(place) == text
    error = DataError.at(place, "bad-value", ": correct it", "rating")
    assert str(error) == f"{text}: correct it"
    assert (error.file, error.row, error.line, error.column) == ("a.csv", place.row, place.line, "rating")


def test_an_error_without_facts_is_a_sentence() -> None:
    error = LlmrecError("correct it")
    assert str(error) == "correct it" and error.args == ("correct it",)
    assert [error.kind, error.file, error.row, error.line, error.column] == [None] * 5


def test_facts_survive_pickling_and_a_new_raise() -> None:
    error = RecipeError.at(Place("r.yaml", line=4), "unknown-key", ": unknown key 'a'", "train.a")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is RecipeError and vars(again) == vars(error) and str(again) == str(error)
    with raises(RecipeError, Facts("unknown-key", "r.yaml", None, "train.a", 4)) as caught:
        raise again from ValueError("what was below")
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_that_carries_another_names_its_place() -> None:
    inner = DataError.at(Place("a.csv", 3, 4), "bad-value", ": correct it", "rating")
    outer = LlmrecError(f"{inner}, or leave it out", kind=inner.kind, at=inner.place, column=inner.column)
    assert outer.place == inner.place == Place("a.csv", 3, 4) and outer.column == "rating"
    assert LlmrecError("correct it").place is None


def test_an_error_without_kind_is_found() -> None:
    """Under its name, another name, as a class that is derived from it, and raised as a class."""
    sources = {
        "llmrec.errors": "class LlmrecError(Exception): ...\nclass DataError(LlmrecError): ...",
        "llmrec.a": "from llmrec.errors import DataError as Wrong\nclass Mine(Wrong): ...\nraise Wrong('x')",
        "llmrec.b": "from llmrec.a import Mine\nx = Mine('x', at='f')\nraise Mine",
        "llmrec.c": "from llmrec.a import Mine\nraise Mine('x', kind='empty') from ValueError('x')",
        "llmrec.d": "class Mine(Exception): ...\nraise Mine('x')",
    }
    found = without_kind({module: ast.parse(source) for module, source in sources.items()})
    assert sorted((module, line) for module, line, _ in found) == [("llmrec.a", 3), ("llmrec.b", 2), ("llmrec.b", 3)]


def test_a_missing_package_is_told() -> None:
    with raises(MissingExtra, Facts("not-installed", says="pip install 'llmrec[train]'")):
        require("no_such_package", "train")


def test_a_file_that_does_not_ship_is_told() -> None:
    with raises(LlmrecError, Facts("missing-file", says="prompts/nothing")):
        resource("prompts", "nothing")
