"""What `llmrec audit` prints: a line a check, with the first places where something was found."""

from __future__ import annotations

from pathlib import Path

from llmrec.cli.show.console import say, tell
from llmrec.pipeline import audit as audits

_MARKS = {"clean": "✓", "notice": "·", "leak": "✗"}


def leaks(folder: Path, *, memory: bool) -> bool:
    """Audit a run, print what was found, and say whether there is a leak."""
    checks = audits.audit(folder, memory=memory)
    tell(checks=checks)
    for check in checks:
        say(f"{_MARKS[check.verdict]} {check.name}: {check.found}")
        for example in check.examples:
            say(f"    {example}")
    return any(check.verdict == "leak" for check in checks)
