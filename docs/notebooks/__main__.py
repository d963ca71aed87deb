"""Executes the notebooks and writes their outputs into them: ``python -m docs.notebooks [NAME ...]``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(page: Path) -> None:
    """Execute a notebook in a fresh kernel, and write it without what differs between machines."""
    notebook = nbformat.read(page, as_version=4)
    # One thread, so that sums of floating-point numbers have the same order everywhere.
    os.environ |= {"LLMREC_QUIET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    resources = {"metadata": {"path": str(page.parent)}}
    options = {"timeout": None, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=resources, **options).execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, page)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
        execute(FOLDER / f"{name}.ipynb")
