"""Texts beside each other: what every row wrote for one request, and what its question told."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.records import ExampleUser, Sample, Told, Written
from llmrec.report.wording import count, listed, rough
from llmrec.results import Results, Row

OPEN = 5
"""Requests of a task that stand open on the page, and that the Markdown page holds."""


def text_tasks(results: Results) -> list[str]:
    """Return the tasks with texts to read, in the order of the tables."""
    return [task for task in results.tasks if samples(results, task)]


def samples(results: Results, task: str) -> list[Sample]:
    """Return a task's requests with texts."""
    return [sample for sample in results.texts if sample.task == task]


def answered(results: Results, sample: Sample) -> list[tuple[Row, Written]]:
    """Return a request's rows with what each wrote, in the order of the task's table."""
    rows = results.standings(sample.task)
    return [(row, sample.answers[row.id]) for row in rows if row.id in sample.answers]


def asked_by(results: Results, sample: Sample, fact: Told) -> str:
    """Say which questions show something; nothing where all do."""
    templates = dict.fromkeys(row.template for row in results.rows if row.task == sample.task and row.template)
    if not fact.by:
        return "shown by no question"
    return "" if set(templates) <= set(fact.by) else f"shown by {listed([_bare(name) for name in fact.by])}"


def about_choice(results: Results, found: Sequence[Sample]) -> str:
    """Say how many requests there are to read, of how many, and how they were chosen."""
    asked = max((row.n for row in results.rows if row.task == found[0].task), default=len(found))
    if len(found) >= asked:
        return f"All {len(found)} requests, in an order drawn by the seed." if asked > 1 else "The only request."
    return f"{len(found)} of {asked} requests, drawn by the seed and not by how good an answer is."


def who(sample: Sample) -> str:
    """Return a user's name with the id, or the id alone."""
    return f"{sample.user.name} ({sample.user.id})" if sample.user.name else sample.user.id


def rank_words(shown: ExampleUser) -> str:
    """Say at which rank the held-out item of an example stands."""
    if shown.rank is None:
        return "not in the list"
    return f"rank {rough(shown.rank)}{f' of {count(shown.pool)}' if shown.pool else ''}"


def _bare(template: str) -> str:
    return template.rpartition("/")[2]
