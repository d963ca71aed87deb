"""`llmrec index` on a small table, and the index of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmrec.cli.main import app
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.index.table import ItemIndex
from llmrec.pipeline import index_report
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_recipe
from llmrec.report import index_summary
from tests.facts import Facts, raises

KINDS = ("Tools > Saws", "Tools > Drills", "Toys > Blocks", "Toys > Dolls", "Books > Maps")
SCHEMES = ("title", "token", "collaborative", "category")
SMALL = {"collaborative": ("index.collaborative.clusters=3", "index.collaborative.leaf=6")}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of 25 items of five kinds, two with the same title, and its recipe, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    rows = [(user, (user * 5 + k * (1 + user % 3)) % 25, 100 * user + k) for user in range(20) for k in range(6)]
    lines = [
        f"u{user},i{item},{1 + (user + item) % 5},{time},Thing {max(item, 1)},{KINDS[item % 5]},Fine thing {time}"
        for user, item, time in rows
    ]
    header = "user,item,stars,day,title,kind,words"
    (tmp_path / "shop.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    page = tmp_path / "shop.yaml"
    page.write_text(
        """\
name: shop
data:
  source: table
  path: shop.csv
  columns: {user: user, item: item, rating: stars, time: day, title: title, text: words, fields: [kind]}
tasks:
  sequential: {}
index: {scheme: title}
eval: {candidates: {count: 5}}
""",
        encoding="utf-8",
    )
    return page


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_is_written_and_printed(recipe: Path, scheme: str) -> None:
    overrides = [f"index.scheme={scheme}", *SMALL.get(scheme, ())]
    done = CliRunner().invoke(app, ["index", str(recipe), *overrides, "--out", "made"])
    assert done.exit_code == 0, done.output
    index, loaded = ItemIndex.load(Path("made")), load_recipe(recipe, overrides)
    complete = build_study(loaded).index
    assert complete is not None and index.digest == complete.digest
    assert f"index {scheme} of" in done.stdout and "made/index.html" in done.stdout
    assert ("perplexity" in done.stdout) is bool(index.tokens)
    shown = done.stdout.partition("examples\n")[2].partition("written\n")[0].splitlines()
    assert len(shown) == 5
    assert all(index.decode(line.strip().split("  ")[0]) for line in shown)
    figures = json.loads(Path("made/diagnostics.json").read_text(encoding="utf-8"))
    assert (figures["scheme"], figures["items"], figures["duplicates"]) == (scheme, 25, 0)
    assert figures["begun"] == 0 or not index.tokens
    page = Path("made/index.html").read_text(encoding="utf-8")
    assert index_summary.SCHEME_SENTENCES[scheme].partition(".")[0].replace("'", "&#39;") in page
    assert {path.name for path in Path("made").iterdir()} - {"index.safetensors"} == {
        "index.json", "diagnostics.json", "index.html",
    }  # fmt: skip


def test_counts_shared_titles(recipe: Path) -> None:
    result = index_report.index(load_recipe(recipe))
    assert result.found.collisions == 2 / 25
    assert index_summary.key_figures(result.found)["Items with a duplicate ID before repair"] == "8 %"


def test_held_out_pairs_of_the_review_table(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    data = text[text.index("data:") : text.index("tasks:")]
    recipe.write_text(
        text.replace("tasks:\n", data.replace("data:", "reviews:") + "  filter: {min_rating: 3}\ntasks:\n").replace(
            "sequential: {}", "sequential: {}\n  explanation: {}"
        ),
        encoding="utf-8",
    )
    loaded = load_recipe(recipe, ["index.scheme=sequential"])
    study = build_study(loaded)
    assert study.index is not None
    indexed = index_report.index(loaded)
    assert indexed.data.fingerprint == study.data.fingerprint and indexed.index.digest == study.index.digest


def test_requested_items_come_first(recipe: Path) -> None:
    overrides = ["index.scheme=collaborative", *SMALL["collaborative"]]
    done = CliRunner().invoke(app, ["index", str(recipe), *overrides, "--items", "i7, i3", "--out", "made"])
    assert done.exit_code == 0, done.output
    index = ItemIndex.load(Path("made"))
    shown = done.stdout.partition("examples\n")[2].splitlines()
    assert shown[0].split() == [index.encode("i7"), "Thing", "7"]
    assert shown[1].split() == [index.encode("i3"), "Thing", "3"]
    assert f"nearest to {index.encode('i7')}, Thing 7" in done.stdout
    unknown = CliRunner().invoke(app, ["index", str(recipe), *overrides, "--items", "i99", "--out", "none"])
    assert isinstance(unknown.exception, DataError) and "'i99'" in str(unknown.exception)
    assert not Path("none").exists()
    done = CliRunner().invoke(app, ["index", str(recipe), "index=null"])
    assert isinstance(done.exception, RecipeError)
    assert "recipe shop has no section index" in str(done.exception)
    assert "'index={scheme: semantic}'" in str(done.exception)


def test_only_index_folders_are_replaced(recipe: Path) -> None:
    precious = recipe.parent / "mine"
    precious.mkdir()
    (precious / "notes.txt").write_text("mine", encoding="utf-8")
    for out in (precious, precious / "notes.txt"):
        with raises(LlmrecError, Facts("exists", out, says="--out")):
            index_report.index(load_recipe(recipe), out)
    assert (precious / "notes.txt").read_text(encoding="utf-8") == "mine"
    (recipe.parent / "empty").mkdir()
    assert index_report.index(load_recipe(recipe), recipe.parent / "empty").page.is_file()
    for _ in range(2):
        assert CliRunner().invoke(app, ["index", str(recipe)]).exit_code == 0
    assert Path("runs/shop/index/index.html").is_file()


def test_control_characters_are_escaped(recipe: Path) -> None:
    text = Path("shop.csv").read_text(encoding="utf-8").replace("Thing 7", "\x1b[31mThing\u202e 7")
    Path("shop.csv").write_text(text, encoding="utf-8")
    done = CliRunner().invoke(app, ["index", str(recipe), "index.scheme=token", "--items", "i7"])
    assert done.exit_code == 0 and "\x1b" not in done.stdout and "\u202e" not in done.stdout
    assert "[U+001B][31mThing" in done.stdout


def test_index_of_a_run_is_kept_or_replaced(recipe: Path, tmp_path: Path) -> None:
    folder, study = tmp_path / "run", build_study(load_recipe(recipe, ["index.scheme=random"]))
    index_report.write_run_index(study, folder)
    assert study.index is not None and ItemIndex.load(folder / "index").digest == study.index.digest
    assert "Report of the run" in (folder / "report" / "item-index.html").read_text(encoding="utf-8")
    assert index_summary.describe_run_index(folder).startswith("scheme random; 25 items")
    stamp = (folder / "index" / "index.json").stat().st_ino
    index_report.write_run_index(study, folder)
    assert (folder / "index" / "index.json").stat().st_ino == stamp, "an existing index is not written again"
    index_report.write_run_index(build_study(load_recipe(recipe, ["index.scheme=token"])), folder)
    assert ItemIndex.load(folder / "index").scheme == "token"
    assert index_summary.describe_run_index(folder).startswith("scheme token")
    index_report.write_run_index(build_study(load_recipe(recipe, ["index=null"])), folder)
    assert index_summary.describe_run_index(folder) == "" and not (folder / "report" / "item-index.html").exists()
