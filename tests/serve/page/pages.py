"""Serve a synthetic shop with hostile titles, and test the pages of the service in a browser.

``python -m tests.serve.page.pages SHOTS`` needs ``pip install playwright`` and an installed
Chromium; it takes two minutes. It saves a screenshot of every step in SHOTS.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from llmrec.answer.opening import open_models
from llmrec.answer.options import RecommenderOptions
from tests.serve.page.drive import HOSTILE, IMAGES
from tests.servers.real import await_health, end, free_port

_RECIPE = "recipes/made/classic.yaml"
_USERS = ("u51", "u02", "u03")


def _table(run: Path, path: Path) -> None:
    """Write the items of a run, and then others with hostile titles and fields."""
    items = open_models(RecommenderOptions(model=str(run))).items.values()
    fields = sorted({name for item in items for name in item.fields})
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "title", "image_url", *fields])
        for item in items:
            image = f"{IMAGES}/{item.item_id}.png"
            rows.writerow([item.item_id, item.title, image, *(item.fields.get(name, "") for name in fields)])
        for place, title in enumerate(HOSTILE):
            rows.writerow([f"h{place}", title, *(HOSTILE[(place + at) % 20] for at in range(len(fields) + 1))])


def main(shots: Path) -> None:
    """Make the run, serve it, and test its pages."""
    port = free_port()
    base = f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryDirectory() as folder:
        run, items, log = (Path(folder) / name for name in ("run", "items.csv", "service.log"))
        llmrec = [sys.executable, "-m", "llmrec"]
        subprocess.run([*llmrec, "run", _RECIPE, "--out", str(run)], check=True, stdout=subprocess.DEVNULL)
        _table(run, items)
        command = [*llmrec, "serve", str(run), "--items", str(items), "--port", str(port)]
        with log.open("wb") as output:
            service = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            await_health(service, f"{base}ready", log)
            for module in ("drive", "drive_chat", "drive_docs"):
                drive = [sys.executable, "-m", f"tests.serve.page.{module}", base, str(shots / module)]
                drive += [f"--user={name}" for name in _USERS] if module == "drive" else []
                subprocess.run(drive, check=True)
        finally:
            end(service)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
