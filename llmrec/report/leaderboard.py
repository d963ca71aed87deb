"""The leaderboard: committed suite results beside published figures, one protocol a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from llmrec.errors import DataError

_LOWER = frozenset({"RMSE", "MAE"})
_HEAD = """# Leaderboard

Written by `llmrec eval SUITE` from `eval/results/` and `eval/references/`; do not edit. Full ranking of the whole
catalogue, exact expectation over ties, parameters chosen on validation only. A table holds one protocol. Published
figures are as printed by their source; nobody but the source vouches for them.
"""


class Page(BaseModel):
    """Frozen base of the pages under eval/references."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Published(Page):
    """One published row. ``seen``: whether items of the history could be ranked, as far as the source tells."""

    system: str
    source: str
    seen: Literal["excluded", "included", "unknown", "rating"]
    values: Mapping[str, float]
    note: str = ""


class Protocol(Page):
    """What a reference's rows share."""

    split: str
    candidates: str


class Reference(Page):
    """One page of published figures on one data set."""

    reference: str
    data: str
    counts: Mapping[str, int]
    protocol: Protocol
    rows: tuple[Published, ...]


def load_reference(path: Path) -> Reference:
    """Read a page of published figures.

    Raises:
        DataError: If it cannot be read or does not have this form.
    """
    try:
        return Reference.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise DataError(f"{path}: not a page of published figures ({error}); see the other pages beside it") from error


def leaderboard(results: Sequence[Mapping[str, Any]], references: Mapping[str, Reference]) -> str:
    """Return the Markdown page.

    Args:
        results: What `llmrec.build.suite` wrote, one mapping a suite.
        references: Published pages by name.
    """
    parts = [_HEAD]
    for found in sorted(results, key=lambda r: str(r["suite"])):
        parts.append(_section(found, [references[name] for name in found["references"] if name in references]))
    return "\n".join(parts)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return every suite result in a folder; other files there are left alone."""
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file}: is not JSON ({error}); write it again with `llmrec eval`") from error
        if isinstance(content, dict) and content.get("kind") == "suite":
            found.append(content)
    return found


def _section(found: Mapping[str, Any], references: Sequence[Reference]) -> str:
    data, protocol = found["data"], found["protocol"]
    counts = f"{data['users']:,} users, {data['items']:,} items, {data['interactions']:,} interactions"
    lines = [
        f"## {found['suite']}",
        "",
        f"{escape(found['description'])} {counts}; split {protocol['split']}, {protocol['users']:,} evaluated users, "
        f"seeds {', '.join(map(str, protocol['seeds']))}. `{escape(found['command'])}`, "
        f"{found['seconds'] / 60:.0f} min on {escape(found['machine']['cpu'])}, {found['machine']['cores']} cores.",
    ]
    metrics = protocol["metrics"]
    for seen in protocol["seen"]:
        title = "Ratings" if seen == "rating" else f"Items of the history {seen}"
        lines += ["", f"### {title}", "", _ours(found, seen, metrics)]
        if found.get("detectable", {}).get(seen):
            lines += ["", found["detectable"][seen]]
        same = [row for page in references for row in page.rows if row.seen == seen and _fits(page, protocol)]
        if same:
            lines += ["", "Published under the same protocol:", "", _published(same, metrics)]
    unknown = [row for page in references for row in page.rows if row.seen == "unknown" and _fits(page, protocol)]
    if unknown:
        lines += ["", "### Published, treatment of the history not stated", "", _published(unknown, metrics)]
    return "\n".join([*lines, ""])


def _fits(page: Reference, protocol: Mapping[str, Any]) -> bool:
    same = page.protocol.candidates == (protocol["candidates"] or "rating")
    return bool(same and page.protocol.split in protocol["split"])


def _ours(found: Mapping[str, Any], seen: str, metrics: Sequence[str]) -> str:
    last = metrics[-1]
    sign = -1 if last in _LOWER else 1
    rows = sorted(found["rows"], key=lambda row: -sign * row["tables"][seen]["metrics"][last]["value"])
    best = {
        m: (min if m in _LOWER else max)(row["tables"][seen]["metrics"][m]["value"] for row in rows) for m in metrics
    }
    ranged = any("range" in row["tables"][seen]["metrics"][last] for row in rows)
    table = [["predictor", *metrics, *(["over tie rules"] if ranged else []), "ties", "parameters", "seconds", "GB"]]
    for row in rows:
        figures = row["tables"][seen]["metrics"]
        cells = [
            f"**{figures[m]['value']:.4f}**" if figures[m]["value"] == best[m] else f"{figures[m]['value']:.4f}"
            for m in metrics
        ]
        spread = f" sd {figures[last]['sd']:.4f}" if "sd" in figures[last] else ""
        cells[-1] += f" [{figures[last]['low']:.4f}, {figures[last]['high']:.4f}]{spread}"
        if ranged:
            cells.append("{:.4f} to {:.4f}".format(*figures[last]["range"]))
        chosen = ", ".join(f"{name} {value}" for name, value in row["parameters"].items()) or "none"
        ties = f"{row['tables'][seen]['tie_rate']:.1%}"
        seconds = f"{sum(row['seconds'].values()):.0f}"
        table.append([row["name"], *cells, ties, escape(chosen), seconds, f"{row['memory_gb']:.1f}"])
    return _markdown(table)


def _published(rows: Sequence[Published], metrics: Sequence[str]) -> str:
    table = [["system", *metrics, "source", "note"]]
    sign = -1 if metrics[-1] in _LOWER else 1
    for row in sorted(rows, key=lambda row: -sign * row.values.get(metrics[-1], row.values.get(metrics[-2], 0.0))):
        cells = [f"{row.values[m]:.4f}" if m in row.values else "" for m in metrics]
        table.append([escape(row.system), *cells, escape(row.source), escape(row.note)])
    return _markdown(table)


def _markdown(table: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(table[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [table[0], rule, *table[1:]])


def escape(text: object) -> str:
    """Return text that Markdown shows as it is, on one line."""
    line = " ".join(str(text).split())
    return "".join(f"\\{mark}" if mark in "\\|<>*_[]`" else mark for mark in line)
