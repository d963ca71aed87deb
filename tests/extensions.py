"""Removes each extension with its tests from a copy of the checkout, and checks the rest: ``make check-extensions``.

``python -m tests.extensions [NAME...]`` checks the named extensions. The rest must not import removed packages, must
keep the import contracts, print its help, and pass the tests of the command line; pytest must collect all others.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
EXTENSIONS = ("systems", "serve", "chat", "start", "bench", "cluster")
# Extensions that depend on another one are removed with it.
BUILT_ON = {"chat": ("bench", "serve")}
TESTS = ("tests/test_cli.py", "tests/cli/test_common.py", "tests/cli/test_options.py")
# Tests of the whole checkout, whose documents name every extension. Tests that import eval are also left out.
WHOLE = ("tests/test_packaging.py", "tests/test_site.py")
OF_EVAL = re.compile(r"^ *(?:from|import) eval\b", re.MULTILINE)
IMPORTS = """
import importlib, pkgutil, sys
import llmrec
from llmrec.errors import MissingExtra
for module in pkgutil.walk_packages(llmrec.__path__, "llmrec."):
    if module.name == "llmrec.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except MissingExtra:
        pass
    except ImportError as error:
        # A library of an extra that is not installed.
        if (error.name or "llmrec").startswith("llmrec"):
            raise
"""


def copied(folder: Path) -> None:
    """Copy the files of the checkout that git tracks or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def checked(extension: str, folder: Path) -> str | None:
    """Remove an extension from a copy, and return the command that then fails, if any."""
    settings = folder / "pyproject.toml"
    for name in (extension, *BUILT_ON.get(extension, ())):
        for home in ("llmrec", "tests"):
            shutil.rmtree(folder / home / name, ignore_errors=True)
        # A contract must not name a package that does not exist.
        settings.write_text(re.sub(rf', "llmrec\.{name}"|"llmrec\.{name}", ', "", settings.read_text()))
    programs = Path(sys.executable).parent
    ignored = [f"--ignore={name}" for name in WHOLE]
    for file in sorted((folder / "tests").rglob("*.py")):
        if OF_EVAL.search(file.read_text(encoding="utf-8")):
            ignored.append(f"--ignore={file.relative_to(folder)}")
    commands = (
        [sys.executable, "-c", IMPORTS],
        [sys.executable, "-m", "llmrec", "--help"],
        [str(programs / "lint-imports")],
        [str(programs / "pytest"), "-q", "--collect-only", *ignored],
        [str(programs / "pytest"), "-q", "-p", "no:cacheprovider", *TESTS, "-k", "not reference"],
    )
    for command in commands:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return None


def main(names: list[str]) -> int:
    """Check the named extensions, or all, and return an exit status."""
    failed = 0
    for extension in names or EXTENSIONS:
        with TemporaryDirectory() as made:
            copied(Path(made))
            problem = checked(extension, Path(made))
        sys.stdout.write(f"without {extension}: {problem or 'all is well'}\n")
        sys.stdout.flush()
        failed += problem is not None
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
