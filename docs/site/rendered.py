"""Checks the built site in Chromium: every page on a desktop and a phone, light and dark.

``python -m docs.site.rendered build/site`` prints what is wrong, a line each: errors in the console, text with too
little contrast, content wider than the window, images without an alternative text. It also uses the search and the
leaderboard. The exit code is 1 where something is wrong. With ``--pictures FOLDER`` it writes a screenshot of each page
in each view, but for those that show code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from docs.site.browser import SETTLED, Browser

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
"""Width and height in CSS pixels."""
SCHEMES = ("light", "dark")
CHECKS = (Path(__file__).parent / "rendered.js").read_text(encoding="utf-8").rstrip()

USES = {"start": "index.html", "search": "index.html", "leaderboard": "eval/LEADERBOARD.html"}
"""Checks of what a page does, and the page."""


def looks(browser: Browser, page: Path, pictures: Path | None = None) -> Iterator[tuple[str, str]]:
    """Show a page in each size and scheme; yields the name of the view and each problem in it.

    Args:
        browser: Shows the page.
        page: A file.
        pictures: The start of the paths of screenshots, if wanted.
    """
    browser.open(page.resolve().as_uri())
    for size, pixels in SIZES.items():
        for scheme in SCHEMES:
            browser.view(pixels, scheme)
            browser.run(SETTLED)
            yield from ((f"{size}, {scheme}", problem) for problem in browser.run(f"{CHECKS}.look()"))
            if pictures:
                Path(f"{pictures}-{size}-{scheme}.webp").write_bytes(browser.screenshot())
    yield from (("console", error) for error in browser.errors)


def uses(browser: Browser, site: Path) -> Iterator[str]:
    """Use the start page, the leaderboard and the search; yields what does not work."""
    browser.view(SIZES["desktop"], "light")
    for check, page in USES.items():
        browser.open((site / page).resolve().as_uri())
        yield from (f"{page} ({check}): {problem}" for problem in browser.run(f"{CHECKS}.{check}()"))


def main(site: Path, names: Sequence[str], pictures: Path | None) -> int:
    """Print what is wrong with some pages or all of them, and their number; returns the exit code."""
    # The page for addresses that do not exist loads from the root of a server.
    every = sorted(page for page in site.rglob("*.html") if page.name != "404.html")
    problems, pages = list[str](), [site / name for name in names] or every
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
    with Browser() as browser:
        for page in pages:
            name = page.relative_to(site).as_posix()
            shots = pictures / name.replace("/", "-") if pictures and not name.startswith("code/") else None
            problems += [f"{name} ({view}): {problem}" for view, problem in looks(browser, page, shots)]
        problems += uses(browser, site)
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    sys.stdout.write(f"{len(pages)} pages in {len(SIZES) * len(SCHEMES)} views, {len(problems)} problems\n")
    return int(bool(problems) or not pages)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("pages", nargs="*", help="pages to show, such as eval/toys.html; default: all")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    arguments = parser.parse_args()
    sys.exit(main(arguments.site, arguments.pages, arguments.pictures))
