"""The page in a real browser: it draws its plots and runs nothing else. Skipped where no Chromium is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.report.page import write

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", "--enable-logging=stderr",
    "--virtual-time-budget=8000", "--dump-dom",
)  # fmt: skip
# The page runs in a frame, so that this one can look into it without changing it.
PROBE = """<!doctype html><pre id=found></pre><iframe id=frame src=index.html width=1200 height=900></iframe><script>
frame.onload = () => setTimeout(() => {
  const page = frame.contentWindow, seen = page.document;
  seen.querySelectorAll("details").forEach((entry) => { entry.open = true; });
  found.textContent = JSON.stringify({
    pwned: page.__pwned === undefined && window.__pwned === undefined ? null : true,
    plots: seen.querySelectorAll(".js-plotly-plot").length,
    marks: seen.querySelectorAll(".js-plotly-plot .point").length,
    fallbacks: seen.querySelectorAll(".fallback").length,
    overflow: seen.documentElement.scrollWidth - seen.documentElement.clientWidth,
  });
}, 1500);
</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
Save = Callable[[dict[str, Any]], Path]
Hostile = Callable[[dict[str, Any], list[str]], dict[str, Any]]


def _browse(folder: Path, profile: Path, width: int = 1200) -> tuple[dict[str, Any], str]:
    """Open the report of a folder; return what the probe saw, and the browser's console."""
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("width=1200", f"width={width}"))
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found is not None and found[1], done.stderr[-2000:]
    return json.loads(found[1]), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("width", [1200, 390])
def test_plots_are_drawn_without_a_complaint(run_dir: Path, tmp_path: Path, width: int) -> None:
    write(run_dir)
    found, console = _browse(run_dir / "report", tmp_path / "profile", width)
    assert found["plots"] == 7 and found["marks"] > 30
    assert found["fallbacks"] == 0 and found["overflow"] <= 0 and found["pwned"] is None
    assert console == ""


def test_hostile_texts_run_nothing(
    results: dict[str, Any], save: Save, hostile: Hostile, payloads: list[str], tmp_path: Path
) -> None:
    folder = save(hostile(results, payloads))
    write(folder)
    found, console = _browse(folder / "report", tmp_path / "profile", width=390)
    assert found["pwned"] is None and found["plots"] == 7 and console == ""
    assert found["overflow"] <= 0


def test_escaping_alone_is_enough(
    results: dict[str, Any], save: Save, hostile: Hostile, payloads: list[str], tmp_path: Path
) -> None:
    folder = save(hostile(results, payloads))
    page = write(folder)["html"]
    text, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    assert removed == 1
    page.write_text(text, "utf-8")
    found, _ = _browse(folder / "report", tmp_path / "profile")
    assert found["pwned"] is None and found["plots"] == 7


def test_policy_alone_is_enough_and_the_probe_would_see_a_script(run_dir: Path, tmp_path: Path) -> None:
    page = write(run_dir)["html"]
    attack = '<script>window.__pwned=1</script><img src=x onerror="window.__pwned=1">'
    text = page.read_text("utf-8").replace("<main>", f"<main>{attack}")
    page.write_text(text, "utf-8")
    found, console = _browse(run_dir / "report", tmp_path / "one")
    assert found["pwned"] is None and "Content Security Policy" in console
    page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text), "utf-8")
    found, _ = _browse(run_dir / "report", tmp_path / "two")
    assert found["pwned"] is True
