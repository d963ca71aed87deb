"""The table of docs/tested.md, from eval/results/faults.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec.report.escape import cell
from llmrec.report.table import grid

_HEADER = ["What was done", "To", "Cases of those planned", "Held", "Refused", "Made again"]


def table(record: Mapping[str, Any]) -> str:
    """Return one line a kind of fault and command or file, and a sentence before them."""
    rows = []
    for part, counts in record["parts"].items():
        for name, own in counts["of"].items():
            done = f"{own['kills']} kills" if own.get("kills") else part
            tried = f"{own['tried']} of {own['planned']}"
            rows.append(
                [cell(done), cell(name), tried, *(str(own.get(key, 0)) for key in ("held", "refused", "made_again"))]
            )
    whole = record["all"]
    failed = whole["tried"] - whole["held"]
    said = (
        f"`{record['command']}` (`eval/results/faults.json`, {record['date']}): {whole['tried']} of {whole['planned']} "
        f"planned cases were made, with {whole.get('kills', 0)} kills; {whole['held']} held, {failed} did not, and "
        f"{whole.get('silent', 0)} gave other figures silently."
    )
    return f"{said}\n\n{grid(_HEADER, rows, numeric_from=2)}"
