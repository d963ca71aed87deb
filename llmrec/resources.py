"""Finds prompts/, recipes/ and eval/ in a checkout or inside the installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

from llmrec.errors import LlmrecError

_PACKAGE = Path(__file__).resolve().parent


def resource(*parts: str) -> Path:
    """Return the path of a shipped file or folder, such as ``resource("prompts", "rating")``.

    Raises:
        LlmrecError: If neither the checkout nor the wheel has it.
    """
    # Search the wheel first: other installed packages may have folders with these names.
    for root in (_PACKAGE / "_shipped", _PACKAGE.parent):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise LlmrecError(
        f"{'/'.join(parts)} is missing in this installation of llmrec; reinstall the package or use a complete "
        "checkout",
        kind="missing-file",
    )


def cache_dir() -> Path:
    """Return the folder for converted models and downloads: ``$LLMREC_CACHE`` or ``~/.cache/llmrec``."""
    chosen = os.environ.get("LLMREC_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "llmrec"
