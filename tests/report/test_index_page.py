"""The page of an item index: its parts, its safety, and its link in the report of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from llmrec.durable import write_json
from llmrec.errors import DataError
from llmrec.index.diagnostics import diagnose, example_items, largest_code_groups
from llmrec.index.table import ItemIndex, item_token, level_token
from llmrec.registry import INDEXES
from llmrec.report import index_page, index_plots, index_summary, page
from tests.facts import Facts, raises
from tests.report.payloads import FORMULAS, SCRIPTS
from tests.report.test_report_browser import CHROMIUM, _browse, _without_policy
from tests.report.test_report_page import Tree, check_accessible

TEXTS = [*SCRIPTS, *FORMULAS]
LINKS = r"#[\w-]+|index\.html"


def content(index: ItemIndex, titles: dict[str, str], **more: Any) -> index_page.IndexPage:
    counts = {item: number for number, item in enumerate(index.codes)}
    shown = {"name": "films", "data": "made", "noun": "things"} | more
    return index_page.IndexPage(
        made=True,
        seed=0,
        digest=index.digest,
        seconds=1.5,
        found=diagnose(index, counts),
        groups=largest_code_groups(index, titles, counts=counts),
        examples=example_items(index, titles, 20),
        version="1.2.3",
        **shown,
    )


def tree_index(items: int, *, hybrid: bool = False) -> ItemIndex:
    """Codes of three tokens, of which the last may be unique to the item."""
    codes = {
        f"i{n}": (
            level_token(0, n % 5),
            level_token(1, n // 5 % 4),
            item_token(n) if hybrid else level_token(2, n // 20),
        )
        for n in range(items)
    }
    tokens = sorted({piece for code in codes.values() for piece in code})
    figures = {"collisions": 0.125, "perplexity_1": 4.5, "something_else": 3.0}
    return ItemIndex("semantic", codes, tuple(tokens), {"item_token": hybrid}, figures=figures)


def numbered(items: int) -> ItemIndex:
    return ItemIndex("sequential", {f"i{n}": (str(1001 + n),) for n in range(items)})


def titled(texts: Sequence[str]) -> ItemIndex:
    """Titles as codes."""
    lines = (" ".join(text.split()) for text in texts)
    return ItemIndex("title", {f"i{n}": (f"{n} {line}",) for n, line in enumerate(lines) if line})


def written(folder: Path, texts: Sequence[str]) -> dict[str, Path]:
    """Pages of three indexes of items with these titles, which are also the names of the data."""
    titles = {f"i{n}": text for n, text in enumerate(texts)}
    names = {"name": texts[0], "data": texts[1], "noun": texts[2]}
    indexes = {"tokens": tree_index(len(texts)), "titles": titled(texts), "numbers": numbered(len(texts))}
    return {
        kind: index_page.write_index_page(content(index, titles, **names), folder / kind / "index.html")
        for kind, index in indexes.items()
    }


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written(tmp_path_factory.mktemp("wild"), TEXTS)


@pytest.fixture(scope="module")
def tame(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written(tmp_path_factory.mktemp("tame"), [f"x{n}" for n in range(len(TEXTS))])


def sections(text: str) -> list[str]:
    return [value for tag, name, value in Tree(text).values if tag == "section" and name == "id"]


def test_page_of_tokens(tame: dict[str, Path]) -> None:
    text = tame["tokens"].read_text("utf-8")
    assert sections(text) == ["summary", "levels", "prefixes", "neighbours", "examples"]
    assert text.count('class="plot"') == 2 and text.count("<svg") == 4
    result = diagnose(tree_index(len(TEXTS)))
    assert [level.available for level in index_plots.shared_levels(result)] == [5, 4, 7]
    drawn = [shape.title for shape in index_plots.draw_index_plots(result)["branching"][0].shapes]
    assert f"most at length 0: {len(TEXTS)}" in drawn
    parts = ("&lt;a_…&gt;", "12.5 %", "Something else", "synthetic data", "1.5 s", "&lt;a_0&gt;&lt;b_0&gt;", "1.2.3")
    assert all(part in text for part in parts)
    assert "Perplexity 1" not in text
    assert {path.name for path in tame["tokens"].parent.iterdir()} == {"index.html"}


def test_pages_of_titles_and_numbers_have_no_plots(tame: dict[str, Path]) -> None:
    assert sections(tame["titles"].read_text("utf-8")) == ["summary", "examples"]
    text = tame["numbers"].read_text("utf-8")
    assert sections(text) == ["summary", "neighbours", "examples"]
    assert "1001–1008" in text and 'class="plot"' not in text


def test_plots_omit_tokens_of_single_items() -> None:
    result = diagnose(tree_index(40, hybrid=True))
    drawn = [shape.text for shape in index_plots.draw_index_plots(result)["usage"][0].shapes]
    assert [text for text in drawn if text.startswith("items per")] == ["items per <a_…>", "items per <b_…>"]
    assert index_summary.HYBRID_SENTENCE in index_summary.scheme_sentence(result)
    tokens = tuple(item_token(n) for n in range(9))
    alone = diagnose(ItemIndex("token", {f"i{n}": (piece,) for n, piece in enumerate(tokens)}, tokens=tokens))
    assert index_plots.draw_index_plots(alone) == {}


def test_key_figures_name_faults() -> None:
    assert set(index_summary.SCHEME_SENTENCES) == set(INDEXES)
    result = diagnose(tree_index(40))
    assert index_summary.key_figures(result)["IDs that are a prefix of another ID"] == "0"
    broken = replace(result, begun=3, duplicates=2)
    rows = index_summary.key_figures(broken)
    assert "not prefix-free" in rows["IDs that are a prefix of another ID"] and rows["Duplicate IDs"] == "2"


@pytest.mark.parametrize("kind", ["tokens", "titles", "numbers"])
def test_hostile_texts_change_no_element(wild: dict[str, Path], tame: dict[str, Path], kind: str) -> None:
    text = wild[kind].read_text("utf-8")
    tree = Tree(text)
    assert tree.tags == Tree(tame[kind].read_text("utf-8")).tags and not tree.comments and not tree.open
    attributes = {name for _, names in tree.tags for name in names}
    assert not any(name.startswith("on") for name in attributes) and "style" not in attributes
    assert all(re.fullmatch(LINKS, value) for _, name, value in tree.values if name in {"href", "src"})
    policy = next(value for _, _, value in tree.values if value.startswith("default-src"))
    nonce = re.search("style-src 'nonce-([0-9a-f]{32})'", policy)
    assert nonce is not None and policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert {value for _, name, value in tree.values if name == "nonce"} == {nonce[1]}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert kind != "numbers" or len(set(tree.texts) & set(SCRIPTS)) > 20
    check_accessible(tree)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_pages_in_a_browser(tmp_path: Path) -> None:
    pages = written(tmp_path, TEXTS)
    for path in pages.values():
        _without_policy(path, "open.html")
    sources = {f"{kind}-{width}": (f"{kind}/index.html", width) for kind in pages for width in (1200, 390)}
    sources |= {f"{kind}-open": (f"{kind}/open.html", 1200) for kind in pages}
    seen = _browse(tmp_path, sources, tmp_path / "profile")
    assert seen.console == ""
    for name in sources:
        result = seen.page(name)
        assert result["pwned"] is None and result["links"] == 0 and result["overflow"] <= 0, name
        assert result["plots"] == (2 if name.startswith("tokens") else 0) and result["beyond"] == 0, name


# --------------------------------------------------------------------------- in a run's report


def with_index(run_dir: Path, index: ItemIndex) -> None:
    (run_dir / "index").mkdir()
    figures = diagnose(index).as_json()
    (run_dir / "index" / "diagnostics.json").write_text(json.dumps(figures), "utf-8")
    index_page.write_index_page(content(index, {}, run=True), run_dir / "report" / index_summary.PAGE)


def test_report_links_to_the_page_of_the_index(run_dir: Path) -> None:
    with_index(run_dir, tree_index(40))
    text = page.write_report(run_dir)["html"].read_text("utf-8")
    assert '<a href="item-index.html">' in text
    assert "scheme semantic; 40 items; tokens per ID: 3; 11 new tokens; perplexity by level: 5 of 5, 4 of 4" in text
    assert "before repair: 12.5 %" in text
    assert 'href="index.html"' in (run_dir / "report" / "item-index.html").read_text("utf-8")
    assert 'id="neighbours"' not in text
    (run_dir / "report" / index_summary.PAGE).unlink()
    assert "item-index" not in page.write_report(run_dir)["html"].read_text("utf-8")


def test_report_shows_neighbours(run_dir: Path) -> None:
    with_index(run_dir, tree_index(len(SCRIPTS)))
    titles = {f"i{n}": text for n, text in enumerate(SCRIPTS)}
    groups = largest_code_groups(tree_index(len(SCRIPTS)), titles, prefixes=2, members=3)
    write_json(run_dir / "index" / "neighbours.json", [asdict(group) for group in groups])
    text = page.write_report(run_dir)["html"].read_text("utf-8")
    part = text.split('<section id="neighbours"')[1].split("</section>")[0]
    assert part.count("<article") == len(groups) > 1 and 'href="#neighbours"' in text
    assert part.count("<li><bdi>") == sum(len(group.entries) for group in groups)
    assert not re.search("<(?!/?(h2|p|a|div|article|code|span|bdi|ul|li)[ >])[a-z]", part.partition(">")[2])


def test_line_of_an_index_of_text(run_dir: Path) -> None:
    with_index(run_dir, numbered(12))
    assert index_summary.describe_run_index(run_dir) == "scheme sequential; 12 items; characters per ID: 4"


def test_rejects_damaged_files_of_the_index(run_dir: Path) -> None:
    with_index(run_dir, tree_index(40))
    wrong = [("neighbours", content) for content in ("{", '[{"length": 1}]', "3")]
    wrong += [("diagnostics", content) for content in ("", "[]", '{"pieces": 3, "items": 1}')]
    for name, content in wrong:
        path = run_dir / "index" / f"{name}.json"
        path.write_text(content, "utf-8")
        with raises(DataError, Facts("damaged", path, says="run the recipe again")):
            page.write_report(run_dir)
