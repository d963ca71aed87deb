"""What `llmrec doctor` prints."""

from __future__ import annotations

import json

from llmrec import __version__
from llmrec.commands.doctor.checks import examine
from llmrec.commands.doctor.security import examine as secured
from llmrec.commands.show.console import say


def tell(*, as_json: bool, security: bool = False) -> bool:
    """Print what was found, a line each or one JSON object; returns whether something is wrong."""
    found = list(secured() if security else examine())
    if as_json:
        rows = [{"name": f.name, "level": f.level, "found": f.found, "mend": f.mend, "note": f.note} for f in found]
        say(json.dumps({"llmrec": __version__, "findings": rows}, indent=1, ensure_ascii=False))
    for finding in () if as_json else found:
        advice = f". Mend: {finding.mend}" if finding.mend else f". Note: {finding.note}" if finding.note else ""
        say(f"{'✗' if finding.mend else '✓'} {finding.name}: {finding.found}{advice}")
    return any(finding.mend for finding in found)
