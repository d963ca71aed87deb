"""The head of the leaderboard: of each suite the best row of each kind, on one screen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import get_args

from llmrec.bench.records import SuiteLine, SuiteResult
from llmrec.bench.wording import fewer, standing
from llmrec.report.escape import cell
from llmrec.report.table import grid
from llmrec.report.wording import DASH, SEEDS, USERS
from llmrec.results import Reads, lower

_SAID = (
    "The best row of each kind by the last metric, with seen items filtered where there is such a table. Rows know "
    "items by the events of users alone, by texts too through an encoder that is not trained here, or through a "
    "language model or a text encoder that is fine-tuned; some files do not say. *Exploratory*: fewer than "
    f"{USERS} users or {SEEDS} seeds. The best is picked on the very figures that are printed: what is better than "
    "what stands in the sections."
)
_KINDS: dict[Reads | None, str] = {
    "events": "events alone",
    "texts": "texts too",
    "language model": "a language model or fine-tuned text encoder",
    None: "not said",
}
# What Markdown makes an anchor of without changing it.
_ANCHOR = re.compile(r"[a-z0-9]+(?:[-_][a-z0-9]+)*")


def glance(suites: Sequence[SuiteResult]) -> str:
    """Return a table in Markdown, one line a suite in the order given, that links to the sections of the page."""
    kinds = [kind for kind in (*get_args(Reads), None) if any(row.reads == kind for s in suites for row in s.rows)]
    rows = [
        [
            _name(found),
            f"{found.protocol.users:,}",
            cell(found.protocol.metrics[-1]),
            *(_best([row for row in found.rows if row.reads == kind], found) for kind in kinds),
        ]
        for found in suites
    ]
    header = ["suite", "users", "metric", *(_KINDS[kind] for kind in kinds)]
    return f"{_SAID}\n\n{grid(header, rows, numeric_to=2)}"


def _name(found: SuiteResult) -> str:
    linked = f"[{cell(found.suite)}](#{found.suite})" if _ANCHOR.fullmatch(found.suite) else cell(found.suite)
    return f"{linked}, *exploratory*" if standing(found.protocol.users, len(found.protocol.seeds)) else linked


def _best(rows: Sequence[SuiteLine], found: SuiteResult) -> str:
    """Return the best row's name and figure, and whether it has too few seeds where its suite has enough."""
    seen, metric = found.protocol.seen, found.protocol.metrics[-1]
    table = "excluded" if "excluded" in seen else seen[0]
    figures = [(row.tables[table].metrics[metric].value, row) for row in rows]
    values = [(value, row) for value, row in figures if value is not None]
    if not values:
        return DASH
    value, row = (min if lower(metric) else max)(values, key=lambda each: each[0])
    few = fewer([row]) and len(found.protocol.seeds) >= SEEDS
    return f"{cell(row.name)} {value:.4f}" + (", *exploratory*" if few else "")
