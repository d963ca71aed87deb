"""Takes screenshots of the built site with an installed Chromium; ``CHROMIUM`` names another executable.

``python -m docs.site.screenshots build/site`` writes those that pages of ``docs/`` show.
``python -m docs.site.screenshots build/site FOLDER`` writes some pages, wide and narrow, light and dark, into a folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from docs.site.pages import REPORT, ROOT

SHOWN = {
    "home": "index.html",
    "tutorial": "your-data.html",
    "guide": "install.html",
    "reference": "python-api.html",
    "leaderboard": "eval/LEADERBOARD.html",
    "report": REPORT,
}
"""What is shown, by the name of its pictures."""
PICTURES = {"report.png": (REPORT, (1200, 850))}
"""Screenshots in ``docs/``: the page of the site, and the size in CSS pixels."""
SIZES = {"desktop": (1400, 1800), "phone": (390, 1800)}
"""Width and height in CSS pixels."""
SCHEMES = {"dark": 0, "light": 1}
"""Blink's numbers of colour schemes that a reader may prefer."""
NAMES = ("chromium", "chromium-browser", "google-chrome")
# A window has a least width, a frame has none.
FRAME = (
    "<!doctype html><style>body{{margin:0}}iframe{{border:0;display:block;width:{0}px;height:{1}px}}</style>"
    '<iframe src="{2}"></iframe>'
)


def browser() -> str:
    """Return the browser's executable."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        sys.exit(f"screenshots: none of {', '.join(NAMES)} is installed; install one, or name it: CHROMIUM=/path")
    return found


def take(page: Path, picture: Path, size: tuple[int, int], scheme: int, scratch: Path) -> None:
    """Write one picture of a page."""
    frame = scratch / "frame.html"
    frame.write_text(FRAME.format(*size, page.resolve().as_uri()), encoding="utf-8")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={scratch / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    # Time for scripts, in the browser's own clock, and no requests to other hosts.
    command += ["--virtual-time-budget=8000", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if not picture.is_file():
        sys.exit(f"screenshots: {page} has no picture\n{done.stderr[-2000:]}")


def pictures(site: Path) -> None:
    """Write the screenshots of the documentation, and print their paths."""
    for name, (page, size) in PICTURES.items():
        with tempfile.TemporaryDirectory() as scratch:
            take(site / page, ROOT / "docs" / name, size, SCHEMES["light"], Path(scratch))
        sys.stdout.write(f"{ROOT / 'docs' / name}\n")


def main(site: Path, out: Path) -> None:
    """Write a picture of each page in each size and scheme, and print their paths."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name, page in SHOWN.items():
        if not (site / page).is_file():
            sys.exit(f"screenshots: there is no {site / page}; make site builds it")
        for size, pixels in SIZES.items():
            for scheme, number in SCHEMES.items():
                picture = out / f"{name}-{size}-{scheme}.png"
                picture.unlink(missing_ok=True)
                with tempfile.TemporaryDirectory() as scratch:
                    take(site / page, picture, pixels, number, Path(scratch))
                sys.stdout.write(f"{picture}\n")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        pictures(Path(sys.argv[1]))
