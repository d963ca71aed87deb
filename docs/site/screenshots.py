"""Makes the pictures of the documentation from a run and the built site; ``make screenshots`` calls it.

``python -m docs.site.screenshots build/site runs/quickstart`` writes the first screen of the run's report, the page of
its service, the leaderboard and the output of a command into ``docs/``, and prints their paths; names such as
``service`` after the folders select some.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from docs.site.browser import Browser
from docs.site.pages import ROOT
from tests.servers.real import await_health, end, free_port

DOCS = ROOT / "docs"
LARGEST = 150_000
"""Bytes."""
COLUMNS, LINES = 80, 30
"""Of the terminal."""
SECONDS = 300
"""The longest wait, here for the answer of a language model."""


def report(browser: Browser, site: Path, run: Path) -> bytes:
    """Return the first screen of a run's report."""
    browser.view((1200, 850), "light")
    browser.open((run / "report" / "index.html").resolve().as_uri())
    return browser.screenshot()


def leaderboard(browser: Browser, site: Path, run: Path) -> bytes:
    """Return the leaderboard of the built site, as it can be sorted and filtered."""
    browser.view((1280, 800), "light")
    browser.open((site / "eval" / "LEADERBOARD.html").resolve().as_uri())
    return browser.screenshot()


def service(browser: Browser, site: Path, run: Path) -> bytes:
    """Serve a run, and return its page with the lists of two models for an example."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "service.log"
        command = [sys.executable, "-m", "llmrec", "serve", str(run), "--port", str(port)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            await_health(process, f"{address}ready", log)
            browser.view((1200, 640), "light")
            browser.open(address)
            browser.wait("document.querySelector('#example')?.checkVisibility()")
            browser.run("document.querySelector('#example').click()")
            browser.wait("[0, 1].every((each) => document.querySelector(`#list-${each} li`))")
            return browser.screenshot()
        finally:
            end(process)


def terminal(browser: Browser, site: Path, run: Path) -> bytes:
    """Return the first lines of ``llmrec report RUN --table`` as SVG, without the font that it would load."""
    # The picture shows a path as a user types it, and none of this machine.
    run = run.resolve()
    words = ["report", f"{run.parent.name}/{run.name}", "--table"]
    command = [sys.executable, "-m", "llmrec", *words]
    shown = subprocess.run(
        command,
        cwd=run.parent.parent,
        env=os.environ | {"FORCE_COLOR": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    lines = [f"$ llmrec {' '.join(words)}", *shown.splitlines()]
    console.print(Text.from_ansi("\n".join(lines[:LINES])))
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="llmrec"), flags=re.DOTALL)
    return drawn.replace("Fira Code", "ui-monospace").encode()


PICTURES = {"report.webp": report, "service.webp": service, "leaderboard.webp": leaderboard, "terminal.svg": terminal}
"""How each picture is made; pages show them."""


def main(site: Path, run: Path, names: Sequence[str]) -> None:
    """Write the pictures, or those with some names, and print their paths."""
    with Browser(SECONDS) as browser:
        for name, make in PICTURES.items():
            if names and name.partition(".")[0] not in names:
                continue
            picture = make(browser, site, run)
            if len(picture) > LARGEST:
                sys.exit(f"screenshots: {name} has {len(picture)} bytes, more than {LARGEST}")
            (DOCS / name).write_bytes(picture)
            sys.stdout.write(f"docs/{name}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
