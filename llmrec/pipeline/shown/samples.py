"""Texts that rows wrote, beside the true ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from llmrec.guard import clean
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.shown.entries import drawn, product_of, shortened, user_of
from llmrec.pipeline.study import Study
from llmrec.prompts.template import Template
from llmrec.records import Sample, Told, Written
from llmrec.results import Prediction
from llmrec.tasks.base import PAST, View
from llmrec.tasks.family import family_of
from llmrec.types import Request, Text

# Characters of an answer that could not be read, which no task has cut.
_RAW = 500
_TITLES = 3
_STATISTICS = {"user_stats": "chosen by the user", "item_stats": "chosen by others"}


def text_samples(study: Study, rows: Sequence[ResultRow]) -> list[Sample]:
    """Return ``texts`` of results.json, family by family.

    Args:
        study: Its cases are those of the rows, in order.
        rows: Finished rows.

    Returns:
        One a request, in the order of the draw.
    """
    return [
        sample for family in study.tasks if family_of(family).answer is Text for sample in _samples(study, family, rows)
    ]


def _samples(study: Study, family: str, rows: Sequence[ResultRow]) -> Iterator[Sample]:
    cases, own = study.cases(family), [row for row in rows if row.figures.task == family]
    view = View(study.task_data(family))
    for place in drawn([case.request.id for case in cases], study.recipe.seed):
        case = cases[place]
        dataset = study.task_data(family).dataset
        yield Sample(
            task=family,
            request_id=case.request.id,
            user=user_of(dataset, case.request.user_id),
            item=product_of(dataset, str(case.request.item)),
            told=tuple(_told(study, family, case.request, view)),
            truth=str(case.truth),
            answers={row.figures.id: _answer(row.records[place]) for row in own},
        )


def _told(study: Study, family: str, request: Request, view: View) -> Iterator[Told]:
    """Yield the request's context, which baselines read too, and what else some template shows."""
    templates = study.eval_templates(family)
    for name, text in request.context.items():
        yield Told(name=name, text=shortened(clean(text, len(text))), by=_showing(templates, {name}))
    dataset = study.task_data(family).dataset
    profile = _pairs(dataset.users.get(request.user_id, {}))
    if profile and (by := _showing(templates, {"profile"})) and "profile" not in request.context:
        yield Told(name="profile", text=shortened(profile), by=by)
    if request.history and (by := _showing(templates, PAST)):
        titles = [clean(dataset.items[event.item_id].title) for event in request.history[-_TITLES:]]
        text = f"{len(request.history)}, the last of them: {'; '.join(titles)}"
        yield Told(name="earlier items", text=shortened(text), by=by)
    known = view.pair(request.user_id, str(request.item))
    for variable, name in _STATISTICS.items():
        by = _showing(templates, {variable})
        if by and (statistics := cast(Callable[[], Mapping[str, Any] | None], known[variable])()):
            yield Told(name=name, text=_counted(statistics), by=by)


def _showing(templates: Sequence[Template], names: frozenset[str] | set[str]) -> tuple[str, ...]:
    return tuple(template.id for template in templates if names & template.names("system", "user"))


def _counted(statistics: Mapping[str, Any]) -> str:
    mean = f", rated about {statistics['mean']} on average" if statistics["mean"] else ""
    return f"{statistics['count']} in training{mean}"


def _pairs(fields: Mapping[str, str]) -> str:
    """Write a user's fields as one line; the name stands elsewhere."""
    found = {clean(name): clean(value) for name, value in fields.items() if name != "name"}
    return "; ".join(f"{name}: {value}" for name, value in found.items() if value)


def _answer(record: Prediction) -> Written:
    """Return what was read, or why nothing was."""
    text = json.loads(record.parsed)
    if text is not None:
        return Written(text=str(text))
    return Written(text=None, error=record.error or "", raw=shortened(record.raw or "", _RAW))
