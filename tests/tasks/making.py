"""Makes a task from its section and the inputs of every task."""

from __future__ import annotations

from typing import Any

from llmrec.tasks.task import TaskInputs


def make(kind: Any, data: Any, section: Any, templates: Any, **more: Any) -> Any:
    """Return a task of a class over data, with the templates and further `TaskInputs`."""
    return kind(section, TaskInputs(data=data, templates=templates, **more))
