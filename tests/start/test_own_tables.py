"""The kinds of tables of `tests.start.own_tables`: `init` and `check` in this process, and what is read of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmrec.cli.main import app
from llmrec.data.sets.table import load
from llmrec.recipe.load import load_recipe
from tests.start import own_tables

SHOP = own_tables.shop()


@pytest.mark.parametrize("name", own_tables.TABLES)
def test_init_and_check_understand_a_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "spreadsheet":
        pytest.importorskip("fastexcel")
    monkeypatch.chdir(tmp_path)
    table = own_tables.TABLES[name]
    table.write(SHOP, tmp_path)
    for words in own_tables.commands(table):
        done = CliRunner().invoke(app, words)
        assert done.exception is None, done.exception
    recipe = load_recipe("mine.yaml")
    assert own_tables.differences(SHOP, table, load(recipe.data, seed=0), recipe.data.split.kind) == []


def test_what_was_not_read_as_it_was_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = own_tables.TABLES["Parquet"]
    table.write(SHOP, tmp_path)
    assert CliRunner().invoke(app, own_tables.commands(table)[0]).exception is None
    section = load_recipe("mine.yaml").data
    cut = section.model_copy(update={"filter": section.filter.model_copy(update={"item_core": 25})})
    told = own_tables.differences(SHOP, table, load(cut, seed=0), "leave_one_out")
    assert [line.partition(":")[0] for line in told] == ["items", "pairs", "split"]
    untitled = section.model_copy(update={"columns": section.columns.model_copy(update={"title": "item_id"})})
    assert "titles: " in str(own_tables.differences(SHOP, table, load(untitled, seed=0), "last_basket"))
