"""Requests whose answers are texts, with what every row wrote, for people to read beside each other.

They are drawn by a seeded hash of the request, never by how good an answer is, and are the same for every row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from llmrec.build.evaluation import Row
from llmrec.build.study import Study
from llmrec.data.hashing import hash64
from llmrec.guard import clean
from llmrec.prompts import Template
from llmrec.tasks.common import PAST, View
from llmrec.types import Case, Request

TEXT_ANSWERS = ("explanation", "review")
"""Families whose answers are texts."""
COUNT = 20
"""Requests a family, or all that there are."""
# Characters of an input; of an answer that could not be read, which no task has cut.
_INPUT, _RAW = 400, 500
_TITLES = 3
_STATISTICS = {"user_stats": "chosen by the user", "item_stats": "chosen by others"}


def text_samples(study: Study, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return ``texts`` of results.json, family by family.

    Args:
        study: Its cases are those of the rows, in order.
        rows: Finished rows.

    Returns:
        One mapping a request: ``task``, ``request_id``; ``user`` (id and name) and ``item`` (id, title and fields);
        ``told``, what else there is to read, each with the templates whose questions show it (``by``); ``truth``; and
        ``answers``, row id to the ``text`` that was read, or the ``error`` and the ``raw`` answer.
    """
    return [sample for family in study.tasks if family in TEXT_ANSWERS for sample in _samples(study, family, rows)]


def _samples(study: Study, family: str, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    cases, own = study.cases(family), [row for row in rows if row.figures["task"] == family]
    view = View(study.task_data(family))
    for place in drawn([case.request.id for case in cases], study.recipe.seed):
        case = cases[place]
        yield {
            "task": family,
            "request_id": case.request.id,
            **_about(study, family, case),
            "told": list(_told(study, family, case.request, view)),
            "truth": str(case.truth),
            "answers": {row.figures["id"]: _answer(row.records[place]) for row in own},
        }


def drawn(requests: Sequence[str], seed: int, count: int = COUNT) -> list[int]:
    """Return the places of the requests to show, in the order of their seeded hash."""
    order = np.argsort(hash64("text sample", seed, requests), kind="stable")
    return [int(place) for place in order[:count]]


def _about(study: Study, family: str, case: Case) -> dict[str, Any]:
    """Say who and what a request is about, as questions write them."""
    dataset, user_id, item_id = study.task_data(family).dataset, case.request.user_id, str(case.request.item)
    item = dataset.items[item_id]
    return {
        "user": {"id": user_id, "name": clean(dataset.users.get(user_id, {}).get("name", ""))},
        "item": {
            "id": item_id,
            "title": clean(item.title),
            "fields": {clean(name): _cut(clean(value)) for name, value in item.fields.items() if clean(value)},
        },
    }


def _told(study: Study, family: str, request: Request, view: View) -> Iterator[dict[str, Any]]:
    """Yield the request's context, which baselines read too, and what else some template shows."""
    templates = study.eval_templates(family)
    for name, text in request.context.items():
        yield {"name": name, "text": _cut(clean(text, len(text))), "by": _showing(templates, {name})}
    dataset = study.task_data(family).dataset
    profile = _pairs(dataset.users.get(request.user_id, {}))
    if profile and (by := _showing(templates, {"profile"})) and "profile" not in request.context:
        yield {"name": "profile", "text": _cut(profile), "by": by}
    if request.history and (by := _showing(templates, PAST)):
        titles = [clean(dataset.items[event.item_id].title) for event in request.history[-_TITLES:]]
        text = f"{len(request.history)}, the last of them: {'; '.join(titles)}"
        yield {"name": "earlier items", "text": _cut(text), "by": by}
    known = view.pair(request.user_id, str(request.item))
    for variable, name in _STATISTICS.items():
        by = _showing(templates, {variable})
        if by and (statistics := cast(Callable[[], Mapping[str, Any] | None], known[variable])()):
            yield {"name": name, "text": _counted(statistics), "by": by}


def _showing(templates: Sequence[Template], names: frozenset[str] | set[str]) -> list[str]:
    return [template.id for template in templates if names & template.names("system", "user")]


def _counted(statistics: Mapping[str, Any]) -> str:
    mean = f", rated about {statistics['mean']} on average" if statistics["mean"] else ""
    return f"{statistics['count']} in training{mean}"


def _pairs(fields: Mapping[str, str]) -> str:
    """Write a user's fields as one line; the name stands elsewhere."""
    found = {clean(name): clean(value) for name, value in fields.items() if name != "name"}
    return "; ".join(f"{name}: {value}" for name, value in found.items() if value)


def _answer(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was read, or why nothing was."""
    text = json.loads(record["parsed"])
    if text is not None:
        return {"text": str(text)}
    return {"text": None, "error": record["error"] or "", "raw": _cut(record["raw"] or "", _RAW)}


def _cut(text: str, limit: int = _INPUT) -> str:
    """Return the beginning of a long text, and how long it is."""
    return text if len(text) <= limit else f"{text[:limit].rstrip()} … ({len(text)} characters)"
