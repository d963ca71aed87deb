"""The pages in Chromium: plots are drawn and no text is run as a script. Skipped without Chromium.

A payload that runs sets ``window.__pwned``. A separate test checks that the probe detects this.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from docs.site import browser
from docs.site.browser import executable
from llmrec.report.page import write_report
from tests.report.payloads import FORMULAS, MARKDOWN, SCRIPTS
from tests.report.reading import parser
from tests.report.sample_run import hostile_audit, hostile_results, sample_results, save_run

pytest.importorskip("llmrec.bench", reason="the extension is not there")

from tests.bench.suites import hostile_suite, page_of, sample_reference

CHROMIUM = executable()
FLAGS = (
    *browser.FLAGS, "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=8000",
    "--dump-dom",
)  # fmt: skip
# Pages run in frames, so that the probe does not change them.
PROBE = """<!doctype html><pre id=found></pre><script>
const frames = SOURCES.map(([src, width]) => {
  const frame = document.createElement("iframe");
  Object.assign(frame, { src, width, height: 900 });
  document.body.append(frame);
  return frame;
});
const loaded = frames.map((frame) => new Promise((done) => { frame.onload = done; }));
const seenBy = (each) => each.getBoundingClientRect().height > 0;
const shown = (seen, what) => [...seen.querySelectorAll(what)].filter(seenBy);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
Promise.all(loaded).then(() => wait(1200)).then(() => {
  for (const frame of frames) {
    const seen = frame.contentWindow.document;
    seen.querySelectorAll("details").forEach((entry) => { entry.open = true; });
    for (const name of ["mouseover", "mouseenter", "focus", "toggle"])
      seen.querySelectorAll("body *").forEach((entry) => entry.dispatchEvent(new Event(name)));
  }
}).then(() => wait(600)).then(() => {
  found.textContent = JSON.stringify(frames.map((frame) => {
    const page = frame.contentWindow, seen = page.document;
    return {
      pwned: page.__pwned === undefined && window.__pwned === undefined ? null : true,
      plots: shown(seen, ".plot svg").length,
      marks: shown(seen, ".plot .fill").length,
      beyond: shown(seen, ".plot text").filter((text) => {
        const inside = text.getBoundingClientRect(), whole = text.closest("svg").getBoundingClientRect();
        return inside.left < whole.left - 3 || inside.right > whole.right + 3;
      }).length,
      overflow: seen.documentElement.scrollWidth - seen.documentElement.clientWidth,
      links: [...seen.links].filter((link) => link.protocol !== "file:").length,
      text: seen.body.innerText.length,
    };
  }));
});
</script>"""
ATTACK = '<script>window.__pwned=1</script><img src=x onerror="window.__pwned=1">'
ACTIVE = {
    "script": "<script>window.__pwned=1</script>",
    "handler": '<svg onload="window.__pwned=1"></svg>',
    "hover": '<p onmouseover="window.__pwned=1">x</p>',
    "folded": "<details ontoggle=window.__pwned=1>x</details>",
    "link": "[x](javascript:window.__pwned=1)",
}
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# Differences, forests, positions, training, costs and the budget of the sample run.
PLOTS = 1 + 4 + 2 + 2 + 4 + 1

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


@dataclass(frozen=True)
class Seen:
    """Observations of the probe by name of the page, and the console of the browser."""

    pages: Mapping[str, Mapping[str, Any]]
    console: str

    def page(self, name: str) -> Mapping[str, Any]:
        return self.pages[name]


def _browse(folder: Path, sources: Mapping[str, tuple[str, int]], profile: Path) -> Seen:
    """Open pages of a folder, each in a frame of some width."""
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("SOURCES", json.dumps(list(sources.values()))))
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    result = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert result is not None and result[1], done.stderr[-2000:]
    pages = dict(zip(sources, json.loads(result[1]), strict=True))
    return Seen(pages, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line))


def _without_policy(page: Path, name: str) -> Path:
    text, removed = POLICY.subn("", page.read_text("utf-8"))
    assert removed == 1
    page.with_name(name).write_text(text, "utf-8")
    return page.with_name(name)


def _rendered(text: str, page: Path) -> None:
    """Write Markdown as a page without any policy."""
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{parser().render(text)}", "utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of a harmless run and of a hostile one, and pages whose script should run."""
    folder, texts = tmp_path_factory.mktemp("runs"), [*SCRIPTS, *FORMULAS, *MARKDOWN]
    clean = write_report(save_run(folder / "clean", sample_results()))["html"]
    attacked = clean.with_name("attacked.html")
    attacked.write_text(clean.read_text("utf-8").replace("<main>", f"<main>{ATTACK}"), "utf-8")
    _without_policy(attacked, "attacked-open.html")
    pages = write_report(
        save_run(folder / "wild", hostile_results(sample_results(), texts), hostile_audit(texts), texts)
    )
    _without_policy(pages["html"], "open.html")
    _rendered(pages["markdown"].read_text("utf-8"), folder / "markdown.html")
    suites = [hostile_suite([*texts[start:], *texts[:start]]) for start in range(0, len(texts), 12)]
    text = "\n\n".join(page_of(suite, {"papers": sample_reference(texts)}) for suite in suites)
    _rendered(text, folder / "suites.html")
    for name, text in ACTIVE.items():
        _rendered(text, folder / f"{name}.html")
    return folder


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Unchanged pages: the harmless one, wide and narrow, and the hostile one."""
    clean, wild = "clean/report/index.html", "wild/report/index.html"
    sources = {"wide": (clean, 1200), "narrow": (clean, 390), "hostile": (wild, 390)}
    return _browse(folder, sources, tmp_path_factory.mktemp("guarded"))


@pytest.fixture(scope="module")
def unguarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Hostile pages without a policy, pages whose script must run, and one whose script the policy must block."""
    sources = {name: (f"{name}.html", 1200) for name in ("markdown", "suites", *ACTIVE)}
    sources["page"] = ("wild/report/open.html", 1200)
    sources |= {name: (f"clean/report/{name}.html", 1200) for name in ("attacked", "attacked-open")}
    return _browse(folder, sources, tmp_path_factory.mktemp("unguarded"))


@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_plots_are_drawn_without_errors(guarded: Seen, name: str) -> None:
    result = guarded.page(name)
    assert result["plots"] == PLOTS and result["marks"] > 30
    assert result["beyond"] == 0 and result["overflow"] <= 0 and result["pwned"] is None
    assert guarded.console == ""


def test_hostile_texts_run_nothing(guarded: Seen) -> None:
    result = guarded.page("hostile")
    assert result["pwned"] is None and result["plots"] == PLOTS and guarded.console == ""
    assert result["overflow"] <= 0 and result["links"] == 0


def test_escaping_alone_is_enough(unguarded: Seen) -> None:
    result = unguarded.page("page")
    assert result["pwned"] is None and result["plots"] == PLOTS and result["links"] == 0


@pytest.mark.parametrize("name", ["markdown", "suites"])
def test_rendered_markdown_runs_nothing(unguarded: Seen, name: str) -> None:
    result = unguarded.page(name)
    assert result["pwned"] is None and result["links"] == 0 and result["text"] > 10_000


def test_probe_detects_scripts(unguarded: Seen) -> None:
    assert [unguarded.page(name)["pwned"] for name in ("script", "handler", "hover", "folded")] == [True] * 4
    assert unguarded.page("link")["links"] == 1


def test_policy_alone_is_enough(unguarded: Seen) -> None:
    assert unguarded.page("attacked")["pwned"] is None and "Content Security Policy" in unguarded.console
    assert unguarded.page("attacked-open")["pwned"] is True
