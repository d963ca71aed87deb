"""The page: its sections, its safety, and writing it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmrec.report import page
from llmrec.report.escape import escape_cell
from llmrec.report.page import write_report
from llmrec.report.render import render_markdown_page
from llmrec.report.results import parse_results
from tests.report.payloads import FORMULAS, MARKDOWN, SCRIPTS
from tests.report.reading import blocks
from tests.report.sample_run import hostile_audit, hostile_results, sample_results, save_run

Save = Callable[[dict[str, Any]], Path]


class Tree(HTMLParser):
    """Collects start tags with attributes, and the text of each element by its id or tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[tuple[str, str, str]] = []
        self.comments: list[str] = []
        self.texts: list[str] = []
        self.open: list[tuple[str, int]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.values += [(tag, name, value or "") for name, value in attrs]
        if tag not in {"meta", "link", "br", "img", "hr", "input"}:
            self.open.append((tag, len(self.texts)))
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1][1]] += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def plot_of(text: str, name: str) -> str:
    """Return the drawings of a plot in a page, the wide and the narrow one."""
    return text.split(f'id="{name}" role="img"')[1].partition(">")[2].split("</div>")[0]


def test_sections_in_order(pages: dict[str, Path]) -> None:
    text = pages["html"].read_text("utf-8")
    tree = Tree(text)
    assert not tree.open, "every element is closed"
    ids = [value for tag, name, value in tree.values if tag == "section" and name == "id"]
    assert ids == [
        *("summary", "task-1", "task-2", "task-3", "task-4", "comparisons", "training", "cost", "failures"),
        *("examples", "audit", "protocol", "notes"),
    ]
    assert [tag for tag, _ in tree.tags].count("h1") == 1
    plots = [value for tag, name, value in tree.values if name == "id" and tag == "div"]
    assert plots == [
        *("differences", "forest-1", "forest-2", "positions-2", "forest-3", "positions-3", "forest-4"),
        *("training-loss", "training-speed", "cost-1", "cost-2", "cost-3", "cost-4", "budget"),
    ]
    headings = re.findall("<h3>(Templates|Position of the target among its candidates|Slices)</h3>", text)
    assert [heading.split()[0] for heading in headings] == [
        *("Templates", "Slices"), *("Templates", "Position", "Slices") * 2, *("Templates", "Slices"),
    ]  # fmt: skip
    hashes = ("5f3c1a9b" * 8, "a3" * 32, "c9" * 32)
    for part in ("The best model is a baseline, markov-1", "synthetic data", "0.930", "unseen", *hashes):
        assert part in text
    names = {path.name for path in pages["html"].parent.iterdir()}
    assert names == {"index.html", "report.md", "table.csv", "table.tex"}


def check_accessible(tree: Tree) -> None:
    """Check captions, headings, and that references to ids have a target."""
    names = [tag for tag, _ in tree.tags]
    assert names.count("h1") == 1 and names.count("table") == names.count("caption") > 1
    assert all("scope" in attributes for tag, attributes in tree.tags if tag == "th")
    ids = [value for _, name, value in tree.values if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value for _, name, value in tree.values if name == "aria-labelledby"} <= set(ids)
    anchors = {value[1:] for tag, name, value in tree.values if tag == "a" and name == "href" and value.startswith("#")}
    assert anchors <= set(ids)
    levels = [int(tag[1]) for tag in names if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_page_is_accessible(pages: dict[str, Path]) -> None:
    tree = Tree(pages["html"].read_text("utf-8"))
    check_accessible(tree)
    # Explanations of terms can be reached with the keyboard.
    tips = [set(attributes) for tag, attributes in tree.tags if tag == "abbr"]
    assert len(tips) > 10 and all({"tabindex", "title"} <= attributes for attributes in tips)


def _luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_enough_in_both_schemes() -> None:
    style = (Path(page.__file__).parent / "style.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in style.split(":root {")[1:3])
    pairs = [(text, back) for text in ("text", "muted", "link") for back in ("page", "surface", "raised")]
    pairs += [(name, f"{name}-back") for name in ("good", "bad", "warn")] + [
        ("warn", "surface"),
        ("text", "plain-back"),
    ]
    for scheme in (light, dark):
        for text, back in pairs:
            bright, dim = sorted((_luminance(scheme[text]), _luminance(scheme[back])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, back)
        for mark in ("zero-shot", "few-shot", "tuned", "baseline"):
            bright, dim = sorted((_luminance(scheme[mark]), _luminance(scheme["surface"])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 3, mark


def test_whitespace_of_prompts_is_kept(run_dir: Path, results: dict[str, Any]) -> None:
    results["examples"][0]["prompt"] = "\n  two  spaces\n\n\ttab\n"
    (run_dir / "results.json").write_text(json.dumps(results))
    text = write_report(run_dir)["html"].read_text("utf-8")
    # HTML drops one line feed after <pre ...>; the second one is in the prompt.
    assert '<pre dir="auto" tabindex="0">\n\n  two  spaces\n\n\ttab\n</pre>' in text


def test_run_without_optional_parts(results: dict[str, Any], save: Save) -> None:
    results.update(
        training=None, comparisons=[], examples=[], budget=[], notes=[], candidates={}, seconds=None, machine={}
    )
    results["data"] = {"main": {**results["data"]["main"]}, "reviews": None}
    results["detectable"] = {}
    del results["example"]
    for row in results["rows"]:
        row.update(parse_rate=1.0, tie_rate=None, failures=[], inputs="", slices=[], by_position=[], position_bias=None)
    pages = write_report(save(results))
    text = pages["html"].read_text("utf-8")
    assert not re.search("<h3>(Position|Slices)", text) and "Marks compare" not in text
    absent = "#### (Position|Slices)|## Comparisons|vs. best|Held out"
    assert not re.search(absent, pages["markdown"].read_text("utf-8")) and "Held out" not in text
    for part in ("trained no model", "No comparison was planned", "has no examples", "could be parsed", "None."):
        assert part in text
    assert len(re.findall("<section ", text)) == 13 and 'id="differences"' not in text


# --------------------------------------------------------------------------- safety


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a run full of scripts and formulas."""
    return _written(tmp_path_factory.mktemp("wild"), [*SCRIPTS, *FORMULAS])


@pytest.fixture(scope="module")
def tame(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of the same run with as many harmless texts."""
    return _written(tmp_path_factory.mktemp("tame"), [f"x{number}" for number, _ in enumerate((*SCRIPTS, *FORMULAS))])


def _written(folder: Path, texts: list[str]) -> dict[str, Path]:
    results = hostile_results(sample_results(), texts)
    return write_report(save_run(folder, results, hostile_audit(texts), reasons=texts))


def test_hostile_texts_change_no_element(wild: dict[str, Path], tame: dict[str, Path]) -> None:

    text = wild["html"].read_text("utf-8")
    tree = Tree(text)
    assert tree.tags == Tree(tame["html"].read_text("utf-8")).tags and not tree.comments
    assert {tag for tag, _ in tree.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "nav", "main", "footer", "section", "article"),
        *("h1", "h2", "h3", "p", "a", "ul", "ol", "li", "dl", "dt", "dd", "div", "span", "bdi", "em", "strong"),
        *("code", "pre", "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "figure", "figcaption"),
        *("details", "summary", "br", "abbr", "svg", "line", "rect", "path", "text"),
    }
    attributes = {name for _, names in tree.tags for name in names}
    assert attributes <= {
        *("aria-hidden", "aria-label", "aria-labelledby", "charset", "class", "colspan", "content", "dir", "href"),
        *("http-equiv", "id", "lang", "name", "nonce", "open", "role", "rowspan", "scope", "tabindex", "title"),
        *("viewbox", "width", "height", "x", "y", "x1", "x2", "y1", "y2", "d", "text-anchor"),
    }
    links = [value for _, name, value in tree.values if name in {"href", "src"}]
    assert all(re.fullmatch(r"#[\w-]+|table\.csv|table\.tex|report\.md|\.\./results\.json", link) for link in links)


def test_payloads_are_shown_as_text(wild: dict[str, Path]) -> None:
    texts = {text.removeprefix("\n") for text in Tree(wild["html"].read_text("utf-8")).texts}
    harmless = [payload for payload in SCRIPTS if not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", payload)]
    assert len(harmless) > 80
    assert set(harmless) <= texts


def test_policy_and_page_load_nothing(pages: dict[str, Path]) -> None:
    text = pages["html"].read_text("utf-8")
    tree = Tree(text)
    assert not re.search(r"https?://|//cdn|@import|url\(", text) and len(text) < 2_000_000
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {tag for tag, _ in tree.tags}
    assert not {"src", "srcset", "xlink:href"} & {name for _, name, _ in tree.values}
    at = tree.values.index(("meta", "http-equiv", "Content-Security-Policy"))
    policy = dict(part.strip().split(" ", 1) for part in tree.values[at + 1][2].split(";"))
    nonce = re.fullmatch(r"'nonce-([0-9a-f]{32})'", policy["style-src"])
    assert nonce is not None
    none = dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")
    assert policy == none | {"style-src": nonce[0]}
    assert [value for tag, name, value in tree.values if name == "nonce"] == [nonce[1]]
    assert not any(name == "style" or name.startswith("on") for _, names in tree.tags for name in names)


def test_markdown_page_is_inert(wild: dict[str, Path], tame: dict[str, Path]) -> None:
    text = wild["markdown"].read_text("utf-8")
    body, fence, recipe = text.partition("```")[0], "```", text.partition("```")[2]
    assert not re.search(r"<[A-Za-z!/?]", body)
    assert not re.search(r"(?<!\\)\]\(", body)
    assert fence in recipe and recipe.index("## Notes") > recipe.index("\n```")
    assert all(line.startswith(("#", "|", "-")) or line == "" or escape_cell(line) for line in body.splitlines())
    assert blocks(text) == blocks(tame["markdown"].read_text("utf-8"))


def test_markdown_payloads_are_inert() -> None:
    def page_of(texts: list[str]) -> str:
        return render_markdown_page(parse_results(hostile_results(sample_results(), texts)), {}, None, fix="")

    assert blocks(page_of(list(MARKDOWN))) == blocks(page_of([f"x{number}" for number, _ in enumerate(MARKDOWN)]))


# --------------------------------------------------------------------------- writing


def test_failed_write_keeps_the_old_report(
    run_dir: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = write_report(run_dir)
    before = {name: path.read_bytes() for name, path in pages.items()}
    assert {name: path.read_bytes() for name, path in write_report(run_dir).items()} == before
    results["notes"] = ["another run"]
    results["rows"][0]["metrics"]["RMSE"]["value"] = 9.0
    (run_dir / "results.json").write_text(json.dumps(results))

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(run_dir)
    assert {name: path.read_bytes() for name, path in pages.items()} == before
    assert not list((run_dir / "report").glob(".*"))
