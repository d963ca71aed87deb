"""Copies what the site shows into ``build/site-src``, with its links led to where each thing then lies.

The pages stay where a code host shows them: ``docs/``, ``eval/*.md`` and a few at the root. On the site those of
``docs/`` lie at the top and all others at their path in the repository. A link to another Markdown file or a notebook
becomes a page too; a link to any other file leads to a page that shows it as code, to a folder to a page that lists it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path(__file__).parent / "assets"

ROOT_PAGES = {
    "README.md": "overview.md",
    **{name: name for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")},
}
"""Pages at the root of the repository. The home page is docs/index.md, so that README.md has another name."""
IMAGES = {".svg", ".webp"}
LONGEST = 60_000
"""Bytes of a file that is shown as code; a longer one is handed out as it is."""
LANGUAGES = {".yml": "yaml"}
"""Names of languages that are not those of the file's ending."""

REPORT = "example/report/index.html"
REPORT_HERE = "<!-- site: report -->"
"""Where a page links to the example report, which only the site has."""

# Fences, code within a line, comments, targets of links: what stands first decides what the rest is.
_PIECES = re.compile(
    r"^ *(?P<fence>```+|~~~+).*?^ *(?P=fence) *$"
    r"|(?P<ticks>`+)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)"
    r"|(?P<comment><!--.*?-->)"
    r"|\]\((?P<target>[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


# What pandas adds to a table.
_STYLED = re.compile(r'<style.*?</style>| border="1"| class="dataframe"', re.DOTALL)


def pages() -> list[str]:
    """Return the files that are pages of the site by themselves, by their path in the repository."""
    found = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb"), *(ROOT / "eval").glob("*.md")]
    return sorted([*ROOT_PAGES, *(path.relative_to(ROOT).as_posix() for path in found)])


def place_of(path: str) -> str:
    """Return where a file or folder of the repository lies among the site's sources."""
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    file = ROOT / path
    if file.suffix == ".md" or file.suffix in IMAGES:
        return path.removeprefix("docs/")
    if file.suffix == ".ipynb":
        return file.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
    if file.is_dir():
        return f"code/{path}/index.md"
    return f"code/{path}" + (".md" if file.stat().st_size <= LONGEST else "")


def target_of(link: str, page: str) -> str | None:
    """Return the repository's path that a link of a page names; None: the page itself, or an address."""
    name = link.partition("#")[0]
    if "://" in link or link.startswith("mailto:") or not name:
        return None
    path = os.path.normpath(PurePosixPath(page).parent / name)
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def rewritten(text: str, page: str, place: str) -> tuple[str, list[str]]:
    """Return a page as the site has it, without comments, and the paths of the repository that it links to.

    Args:
        text: What is in the page.
        page: Its path in the repository, which its links start from.
        place: Where it lies on the site.
    """
    linked: list[str] = []

    def piece(found: re.Match[str]) -> str:
        if found["comment"] == REPORT_HERE:
            return f"[Open the report]({_relative(REPORT, place)}){{ .md-button }}"
        if found["comment"]:
            return ""
        target = target_of(found["target"], page) if found["target"] else None
        if target is None:
            return found[0]
        linked.append(target)
        _, mark, anchor = found["target"].partition("#")
        return f"]({_relative(place_of(target), place)}{mark}{anchor})"

    return _PIECES.sub(piece, text), linked


def _relative(place: str, page: str) -> str:
    return PurePosixPath(os.path.relpath(place, PurePosixPath(page).parent)).as_posix()


def shown(path: str) -> str:
    """Return a page of Markdown as it is, one that shows another file as code, or one that lists a folder."""
    file = ROOT / path
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return notebook(json.loads(file.read_text(encoding="utf-8"))["cells"])
    head = f"---\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
    if file.is_dir():
        inside = sorted(each for each in file.rglob("*") if each.is_file() and "__pycache__" not in each.parts)
        return head + "\n".join(f"- [`{_inside(each, file)}`]({_inside(each, file)})" for each in inside) + "\n"
    language = LANGUAGES.get(file.suffix, file.suffix[1:])
    return f"{head}````{language}\n{file.read_text(encoding='utf-8').rstrip()}\n````\n"


def notebook(cells: Iterable[Mapping[str, Any]]) -> str:
    """Return the cells of a notebook as Markdown, with their outputs."""
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"````python\n{text}\n````")
        parts += [_output(each) for each in cell.get("outputs", ())]
    return "\n\n".join(parts) + "\n"


def _output(output: Mapping[str, Any]) -> str:
    """Return an output of a cell: a picture or a table if it has one, else its text."""
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
    if picture := data.get("image/svg+xml"):
        source = base64.b64encode(picture.encode()).decode()
        return f'<img alt="{escape(data["text/plain"])}" src="data:image/svg+xml;base64,{source}">'
    if table := data.get("text/html"):
        return f'<div class="output">{_STYLED.sub("", table)}</div>'
    return f"````text\n{(data.get('text/plain') or ''.join(output.get('text', ()))).rstrip()}\n````"


def _inside(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def write(folder: Path) -> list[str]:
    """Write every page, and all that pages link to, into an empty folder; returns their places."""
    waiting, known = deque(pages()), set(pages())
    while waiting:
        path = waiting.popleft()
        file, place = ROOT / path, place_of(path)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        if not place.endswith(".md"):
            shutil.copyfile(file, folder / place)
            continue
        # What a folder lists lies in it. Links within code are none.
        text, linked = rewritten(shown(path), f"{path}/_" if file.is_dir() else path, place)
        (folder / place).write_text(text, encoding="utf-8")
        waiting += [each for each in dict.fromkeys(linked) if each not in known]
        known |= set(linked)
    shutil.copytree(ASSETS, folder / "assets")
    board = (ROOT / "eval" / "leaderboard.json").read_text(encoding="utf-8")
    (folder / "assets" / "leaderboard-data.js").write_text(f"window.LEADERBOARD = {board}", encoding="utf-8")
    return sorted(place_of(path) for path in known)
