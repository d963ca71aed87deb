"""Training events as questions, asked as evaluation asks: the prompt of a request, and its answer as the target."""

from __future__ import annotations

from dataclasses import replace

from llmrec.tasks.base import pairs_of
from llmrec.tasks.task import Task
from llmrec.types import Case, Event, Example, Segment


def question(task: Task, case: Case, template: str) -> Example:
    """Return a question with its answer as a row, whose target tokens are the answer's path in the catalogue."""
    request, truth = case.request, str(case.truth)
    prompt = task.prompt(request, template=template)
    (text,) = task.continuations(replace(request, candidates=(truth,)), template=template)
    stop = (Segment("target", prompt.stop),) if prompt.stop else ()
    return Example(
        id=request.id,
        user_id=request.user_id,
        task=task.family,
        template=f"{task.family}/{template}",
        messages=prompt.messages,
        answer=(*prompt.answer_prefix, Segment("target", text), *stop),
        ends_turn=prompt.stop is None,
        pairs=pairs_of(request.user_id, (*request.history, Event(item_id=truth))),
    )
