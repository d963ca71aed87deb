"""The documentation site, as far as testable without its generator: navigation, links, the example, the checker."""

from __future__ import annotations

import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmrec
from docs.site import check, pages
from docs.site.screenshots import LARGEST, PICTURES


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    read: dict[str, Any] = tomllib.loads((pages.ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    return read


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("site")
    pages.write(folder)
    return folder


def _entries(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for inside in entry.values():
                yield from [inside] if isinstance(inside, str) else _entries(inside)


def test_navigation_has_every_page_once(settings: dict[str, Any]) -> None:
    named, expected = Counter(_entries(settings["nav"])), {pages.place_of(path) for path in pages.pages()}
    assert sorted(expected - set(named)) == [], "add these to zensical.toml"
    assert sorted(set(named) - expected) == [], "take these out of zensical.toml: there is no such page"
    assert [entry for entry, times in named.items() if times > 1] == []
    assert [next(iter(part)) for part in settings["nav"]] == ["Home", "Get started", "Guides", "Reference", "Results"]


def test_loads_nothing_from_other_hosts(settings: dict[str, Any]) -> None:
    assert settings["theme"]["font"] is False
    named = [*settings["extra_css"], *(each["path"] for each in settings["extra"]["polyfills"])]
    assert all((pages.ASSETS / Path(path).name).is_file() for path in named)


def test_links_stay_within_the_site(sources: Path) -> None:
    result, missing = 0, list[str]()
    for page in sources.rglob("*.md"):
        text = re.sub(r"^ *(```+).*?^ *\1 *$|`[^`\n]+`", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        assert "<!--" not in text, page
        for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text):
            if "://" in link:
                continue
            result += 1
            if not (page.parent / link).is_file() and page.parent / link != sources / pages.REPORT:
                missing.append(f"{page.relative_to(sources)}: {link}")
    assert result > 300 and missing == []


def test_rewrites_links_but_not_code() -> None:
    text = (
        "[a](../eval/LEADERBOARD.md#top) ![b](generative/scaling.svg) [c](https://x.org) [d](#here) [e](../LICENSE) "
        "[f](../docker/) [`g`](../README.md)<!-- not seen --> `[h](../LICENSE) <!-- seen -->`\n"
        "```md\n[i](../LICENSE)\n```\n" + pages.REPORT_HERE
    )
    written, linked = pages.rewritten(text, "docs/experimental.md", "experimental.md")
    assert written == (
        "[a](eval/LEADERBOARD.md#top) ![b](generative/scaling.svg) [c](https://x.org) [d](#here) [e](code/LICENSE.md) "
        "[f](docker/README.md) [`g`](overview.md) `[h](../LICENSE) <!-- seen -->`\n"
        "```md\n[i](../LICENSE)\n```\n[Open the report](example/report/index.html){ .md-button }"
    )
    assert linked == ["eval/LEADERBOARD.md", "docs/generative/scaling.svg", "LICENSE", "docker/README.md", "README.md"]


def test_files_folders_and_notebooks(sources: Path) -> None:
    shown = (sources / "code" / "LICENSE.md").read_text(encoding="utf-8")
    assert "exclude: true" in shown and "Apache License" in shown
    folder = "docs/examples/llmrec-example"
    listed = (sources / "code" / folder / "index.md").read_text(encoding="utf-8")
    assert "[`recipe.yaml`](recipe.yaml.md)" in listed
    assert "name:" in (sources / "code" / folder / "recipe.yaml.md").read_text(encoding="utf-8")
    assert (sources / pages.place_of("docs/openapi.json")).read_bytes() == (
        pages.ROOT / "docs" / "openapi.json"
    ).read_bytes()
    shown = (sources / "notebooks" / "demo.md").read_text(encoding="utf-8")
    assert "````python\nimport llmrec" in shown and "(../code/recipes/demo.yaml.md)" in shown
    assert '<img alt="Chart of forest-1" src="data:image/svg+xml;base64,' in shown
    assert '<div class="output">' in shown and "<style" not in shown and 'class="dataframe"' not in shown


def test_example_needs_no_model_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    recipe = llmrec.load_recipe(pages.ROOT / "recipes" / "made" / "classic.yaml", {"eval.bootstrap": 50})
    assert (recipe.data.source, recipe.eval.arms) == ("made-reviews", ())
    run = llmrec.run(recipe, out=tmp_path / "run", quiet=True)
    assert {row["arm"] for row in run.results["rows"]} == {"baseline"}
    assert "made-reviews" in run.report.read_text(encoding="utf-8")


def test_checker_finds_broken_links(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="deep/#here">1</a><a href="#top">2</a><a href="https://x.org">3</a>'
        '<a href="deep/b.html#gone">4</a><img src="no.svg"><script src="https://x.org/y.js"></script>'
    )
    (tmp_path / "deep" / "index.html").write_text('<p id="here"><a href="../a.html#top">1</a><a href="../../up">2</a>')
    (tmp_path / "deep" / "b.html").write_text("")
    problems, count, links = check.broken(tmp_path)
    assert (count, links) == (3, 6)
    assert problems == [
        "a.html: no anchor for deep/b.html#gone",
        "a.html: loads https://x.org/y.js from elsewhere",
        "a.html: no file for no.svg",
        "deep/index.html: no file for ../../up",
    ]


def test_pictures_are_small_and_have_a_description() -> None:
    shown = "".join((pages.ROOT / path).read_text(encoding="utf-8") for path in pages.pages())
    for name in PICTURES:
        assert 0 < (pages.ROOT / "docs" / name).stat().st_size <= LARGEST, name
        assert re.search(rf"!\[[^\]]{{20,}}\]\((?:\S*/)?{re.escape(name)}\)", shown), name
