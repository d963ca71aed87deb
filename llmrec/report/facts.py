"""What a run was, apart from its figures: protocols, made data, the recipe and answers as text."""

from __future__ import annotations

import json

import yaml

from llmrec.report.records import Results
from llmrec.report.wording import count

_LONGEST = 20_000  # characters of one prompt or raw answer on the page


def signatures(results: Results) -> dict[str, dict[str, list[str]]]:
    """Return each task's protocols, which all its rows share, with the metrics measured under them."""
    found: dict[str, dict[str, list[str]]] = {}
    for task in results.tasks:
        for row in results.rows:
            for name, metric in row.metrics.items() if row.task == task else ():
                protocol = metric.signature.removeprefix(f"{name}|")
                names = found.setdefault(task, {}).setdefault(protocol, [])
                if name not in names:
                    names.append(name)
    return found


def made_data(results: Results) -> list[str]:
    """Return the names of data sets that were made up, not collected."""
    return list(dict.fromkeys(data.name for data in results.data.values() if data and data.made))


def clip(text: str) -> str:
    """Return text, cut where it would swamp the page; the cut is said."""
    more = len(text) - _LONGEST
    return f"{text[:_LONGEST]}\n[… {count(more)} more characters]" if more > 0 else text


def answer(value: object) -> str:
    """Return a parsed answer or a truth as text: strings as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def dump(value: object) -> str:
    """Return a recipe as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=88)
