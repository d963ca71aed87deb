"""Examples of generated texts: the texts of all models for a request, and what its prompt contained."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.records import ExampleUser, GeneratedText, PromptContents, Sample
from llmrec.report.wording import format_count, format_mean_count, join_words
from llmrec.results import Results, Row

EXPANDED_REQUESTS = 5
"""Number of requests per task that are expanded on the page and included in the Markdown page."""


def tasks_with_texts(results: Results) -> list[str]:
    """Return the tasks with example texts, in the order of the tables."""
    return [task for task in results.tasks if text_samples(results, task)]


def text_samples(results: Results, task: str) -> list[Sample]:
    """Return the example requests of a task."""
    return [sample for sample in results.texts if sample.task == task]


def models_with_texts(results: Results, sample: Sample) -> list[tuple[Row, GeneratedText]]:
    """Return the models with their texts for a request, in the order of the result table."""
    rows = results.standings(sample.task)
    return [(row, sample.answers[row.id]) for row in rows if row.id in sample.answers]


def prompts_showing_fact(results: Results, sample: Sample, fact: PromptContents) -> str:
    """Return which prompts show the additional information; empty if all do."""
    templates = dict.fromkeys(row.template for row in results.rows if row.task == sample.task and row.template)
    if not fact.by:
        return "in no prompt"
    names = [name.rpartition("/")[2] for name in fact.by]
    return "" if set(templates) <= set(fact.by) else f"in the prompts of {join_words(names)}"


def describe_sampling(results: Results, shown: Sequence[Sample]) -> str:
    """Return a sentence on the number of example requests and how they were selected."""
    total = max((row.n for row in results.rows if row.task == shown[0].task), default=len(shown))
    if len(shown) >= total:
        return f"All {len(shown)} requests, in random order." if total > 1 else "The only request."
    return f"{len(shown)} of {total} requests, a random sample."


def format_user(sample: Sample) -> str:
    """Return the name of a user with the id, or the id alone."""
    return f"{sample.user.name} ({sample.user.id})" if sample.user.name else sample.user.id


def format_rank(shown: ExampleUser) -> str:
    """Return the rank of the held-out item in an example, as text."""
    if shown.rank is None:
        return "not in the list"
    return f"rank {format_mean_count(shown.rank)}{f' of {format_count(shown.pool)}' if shown.pool else ''}"
