"""Checks the built site: every link within it leads to a file and an anchor, every image and script exists.

``python -m docs.site.check build/site`` prints what is broken, a line each, and the counts; the exit code is 1 where
something is. Addresses of other hosts are not fetched, but what a page loads (scripts, styles, images, frames) has to
come from the site itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Attributes of what a browser loads by itself."""


@dataclass
class Page(HTMLParser):
    """The anchors of a page, what it links to and what it loads."""

    anchors: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    loads: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Prepare the parser, which has state of its own."""
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one tag has."""
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        elif tag in LOADED and LOADED[tag] in found and found.get("rel") not in ("canonical", "prev", "next"):
            self.loads.add(found[LOADED[tag]])


def read(file: Path) -> Page:
    """Return what a page of HTML holds."""
    page = Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def broken(site: Path) -> tuple[list[str], int, int]:
    """Return what is broken, a line each, and the numbers of pages and links."""
    pages = {file.resolve(): read(file) for file in sorted(site.rglob("*.html"))}
    problems, count = [], 0
    for file, page in pages.items():
        # The page for addresses that do not exist is shown at any depth and links from the root.
        start = site.resolve() if file.name == "404.html" else file.parent
        where = file.relative_to(site.resolve()).as_posix()
        for link in sorted(page.links | page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    problems.append(f"{where}: loads {link} from elsewhere")
                continue
            count += 1
            path = unquote(parts.path)
            target = (site / path[1:] if path.startswith("/") else start / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or site.resolve() not in target.parents:
                problems.append(f"{where}: no file for {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                problems.append(f"{where}: no anchor for {link}")
    return problems, len(pages), count


def main(site: Path) -> int:
    """Print what is broken; returns the exit code."""
    problems, pages, links = broken(site)
    if not pages:
        problems.append(f"{site}: no page; make site builds it")
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    sys.stdout.write(f"{pages} pages, {links} links within the site, {len(problems)} broken\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/site")))
