"""Builds the documentation site, ``build/site``: ``python -m docs.site``, which ``make site`` runs.

Its pages are laid out (`docs.site.pages`), a run without a model makes the example report (docs/quickstart.md), and
Zensical builds the rest as ``zensical.toml`` says. Nothing is fetched.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import llmrec
from docs.site import pages

BUILD = pages.ROOT / "build"
EXAMPLE = pages.ROOT / "recipes" / "made" / "classic.yaml"


def main() -> int:
    """Build the site anew and return the exit code of Zensical; a warning of it is an error."""
    for name in ("site-src", "site"):
        shutil.rmtree(BUILD / name, ignore_errors=True)
    (BUILD / "site-src").mkdir(parents=True)
    pages.write(BUILD / "site-src")
    run = llmrec.run(llmrec.load_recipe(EXAMPLE), out=BUILD / "example", quiet=True)
    build = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(build, cwd=pages.ROOT, check=False)
    if done.returncode:
        return done.returncode
    # Beside the pages: what the report links to would become pages too.
    place = (BUILD / "site" / pages.REPORT).parent
    shutil.copytree(run.report.parent, place)
    shutil.copyfile(run.folder / "results.json", place.parent / "results.json")
    sys.stdout.write(f"{(BUILD / 'site' / 'index.html').relative_to(pages.ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
