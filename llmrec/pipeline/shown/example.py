"""The user whom the first screen of a report shows: history, list and held-out item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmrec.guard import clean
from llmrec.pipeline.evaluation import ResultRow
from llmrec.pipeline.shown.entries import drawn, ranked, user_of
from llmrec.pipeline.study import Study
from llmrec.records import ExampleUser
from llmrec.results import lower
from llmrec.tasks.family import family_of

_HISTORY, _LISTED = 8, 5


def example_user(study: Study, rows: Sequence[ResultRow], headline: Mapping[str, str]) -> ExampleUser | None:
    """Return ``example`` of results.json.

    The row is the best tuned one of the first task that ranks for users, which is the sequential one where there is
    one; without a tuned model the best row of a language model by itself, and without that the best baseline. The user
    is drawn by the seed among those with a history, and not by how good the list is.

    Args:
        study: Its cases are those of the rows, in order.
        rows: Finished rows.
        headline: The metric by which rows of a family are ordered.

    Returns:
        None where no row ranks for users.
    """
    # In the order of tables, in which the sequential task comes first of these.
    for family in (family for family in study.tasks if family_of(family).ranks_for_users):
        row = _row(family, headline[family], rows)
        if row is not None:
            return _example(study, family, row)
    return None


def _row(family: str, metric: str, rows: Sequence[ResultRow]) -> ResultRow | None:
    own = [
        row
        for row in rows
        if row.figures.task == family and metric in row.figures.metrics and row.figures.fusion is None
    ]
    sign = 1 if lower(metric) else -1

    def order(row: ResultRow) -> tuple[bool, bool, float]:
        value = row.figures.metrics[metric].value
        arm = row.figures.arm
        return arm != "tuned", arm == "baseline", float("inf") if value is None else sign * value

    return min(own, key=order, default=None)


def _example(study: Study, family: str, row: ResultRow) -> ExampleUser:
    cases, dataset = study.cases(family), study.task_data(family).dataset
    known = [place for place, case in enumerate(cases) if case.request.history] or list(range(len(cases)))
    place = known[drawn([cases[each].request.id for each in known], study.recipe.seed, 1)[0]]
    request, truth, record = cases[place].request, str(cases[place].truth), row.records[place]

    def title(item: str) -> str:
        return clean(dataset.items[item].title) if item in dataset.items else item

    listed = ranked(record.parsed)[:_LISTED]
    return ExampleUser(
        task=family,
        row=row.figures.id,
        user=user_of(dataset, request.user_id),
        history=tuple(title(event.item_id) for event in request.history[-_HISTORY:]),
        events=len(request.history),
        listed=tuple(map(title, listed)),
        hit=listed.index(truth) + 1 if truth in listed else None,
        truth=title(truth),
        rank=record.rank,
        pool=record.pool,
    )
