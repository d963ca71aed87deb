"""The facts of an error, and that they survive being raised again and sent to another process."""

from __future__ import annotations

import ast
import pickle

import pytest

from llmrec.errors import DataError, LlmrecError, Location, MissingExtra, RecipeError, require
from llmrec.resources import resource
from tests.facts import Facts, raises
from tests.structure import circles, without_kind


@pytest.mark.parametrize(
    ("location", "text"),
    [
        (Location("a.csv"), "a.csv"),
        (Location("a.csv", 0, 1), "a.csv, header"),
        (Location("a.csv", 3, 4), "a.csv, row 3 (line 4)"),
        (Location("a.csv", 3, 3), "a.csv, row 3"),
        (Location("a.csv", line=4), "a.csv, line 4"),
    ],
)
def test_location_has_a_line_that_is_not_the_row(location: Location, text: str) -> None:
    assert str(location) == text
    error = DataError.at(location, "bad-value", ": correct it", "rating")
    assert str(error) == f"{text}: correct it"
    assert (error.file, error.row, error.line, error.column) == ("a.csv", location.row, location.line, "rating")


def test_facts_of_errors() -> None:
    error = LlmrecError("correct it")
    assert str(error) == "correct it" and error.args == ("correct it",)
    assert [error.kind, error.file, error.row, error.line, error.column] == [None] * 5
    inner = DataError.at(Location("a.csv", 3, 4), "bad-value", ": correct it", "rating")
    outer = LlmrecError(f"{inner}, or leave it out", kind=inner.kind, at=inner.location, column=inner.column)
    assert outer.location == inner.location == Location("a.csv", 3, 4) and outer.column == "rating"
    assert LlmrecError("correct it").location is None
    with raises(MissingExtra, Facts("not-installed", says="pip install 'llmrec[train]'")):
        require("no_such_package", "train")
    with raises(LlmrecError, Facts("missing-file", says="prompts/nothing")):
        resource("prompts", "nothing")


def test_facts_survive_pickling_and_raising() -> None:
    error = RecipeError.at(Location("r.yaml", line=4), "unknown-key", ": unknown key 'a'", "train.a")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is RecipeError and vars(again) == vars(error) and str(again) == str(error)
    with raises(RecipeError, Facts("unknown-key", "r.yaml", None, "train.a", 4)) as caught:
        raise again from ValueError("what was below")
    assert isinstance(caught.value.__cause__, ValueError)


def test_structure_finds_errors_without_kind_and_circles() -> None:
    """Errors appear under their name, under an alias, as a subclass, and raised as a class."""
    sources = {
        "llmrec.errors": "class LlmrecError(Exception): ...\nclass DataError(LlmrecError): ...",
        "llmrec.a": "from llmrec.errors import DataError as Wrong\nclass Mine(Wrong): ...\nraise Wrong('x')",
        "llmrec.b": "from llmrec.a import Mine\nx = Mine('x', at='f')\nraise Mine",
        "llmrec.c": "from llmrec.a import Mine\nraise Mine('x', kind='empty') from ValueError('x')",
        "llmrec.d": "class Mine(Exception): ...\nraise Mine('x')",
    }
    result = without_kind({module: ast.parse(source) for module, source in sources.items()})
    assert sorted((module, line) for module, line, _ in result) == [("llmrec.a", 3), ("llmrec.b", 2), ("llmrec.b", 3)]
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) and not circles({"a": {"b"}, "b": set(), "c": {"a"}})
