"""What `llmrec doctor` prints."""

from __future__ import annotations

from llmrec.commands.doctor.checks import examine
from llmrec.commands.doctor.security import examine as secured
from llmrec.commands.show.console import say, tell


def healthy(*, security: bool = False) -> bool:
    """Print what was found, a line each; returns whether nothing is wrong."""
    found = list(secured() if security else examine())
    tell(findings=[{"name": f.name, "level": f.level, "found": f.found, "mend": f.mend, "note": f.note} for f in found])
    for finding in found:
        advice = f". Mend: {finding.mend}" if finding.mend else f". Note: {finding.note}" if finding.note else ""
        say(f"{'✗' if finding.mend else '✓'} {finding.name}: {finding.found}{advice}")
    return not any(finding.mend for finding in found)
