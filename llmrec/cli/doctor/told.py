"""What `llmrec doctor` prints."""

from __future__ import annotations

from llmrec.cli.doctor.checks import examine
from llmrec.cli.doctor.security import examine as secured
from llmrec.cli.show.console import say, tell


def healthy(*, security: bool = False) -> bool:
    """Print what was found, a line each; returns whether nothing is wrong."""
    found = list(secured() if security else examine())
    tell(findings=[{"name": f.name, "level": f.level, "found": f.found, "fix": f.fix, "note": f.note} for f in found])
    for finding in found:
        advice = f". Fix: {finding.fix}" if finding.fix else f". Note: {finding.note}" if finding.note else ""
        say(f"{'✗' if finding.fix else '✓'} {finding.name}: {finding.found}{advice}")
    return not any(finding.fix for finding in found)
