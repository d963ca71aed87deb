"""`Family`: describes a task to the rest of llmrec. Each task defines its record in its own module.

A new family is one file with a `Task` and a `Family`, and one entry of `llmrec.registry.TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from llmrec import registry
from llmrec.data.split import ReviewPart
from llmrec.errors import RecipeError, did_you_mean
from llmrec.recipe.schema import TaskSection
from llmrec.registry import BASELINES, STRATEGIES, TASKS, Table, import_component
from llmrec.tasks.task import Task
from llmrec.types import Answer, Ranking

RANKING_CONTROLS = ("random", "popularity", "item-knn", "markov-1")
RATING_CONTROLS = ("global-mean", "user-mean", "item-mean", "user-item-bias")
NO_RATINGS = "needs ratings, but {data} has no ratings; set {where}.columns.rating"


@dataclass(frozen=True, kw_only=True)
class Family:
    """The properties of a task that the rest of llmrec uses, so that no other code depends on task names.

    Attributes:
        name: The name in recipes, ``prompts/NAME`` and tables.
        title: Heading of its table.
        task: Creates its task from a section and `TaskInputs`.
        section: Its section of a recipe.
        answer: Type of its answers; the truth of a `Ranking` is an item.
        headline: The main metric, at 10 if it has cutoffs.
        strategies: The scoring strategies of language models, the default first.
        baselines: Its baselines.
        controls: The baselines required in every table, each of which takes seconds. Stronger ones are in the suites
            and can be added to any recipe.
        candidates: The kind of stored candidate sets: of users, or of held-out items; None: none.
        lists: Whether its prompts list the candidates.
        column: The column that an interaction needs to become a case.
        lacking: The error if the data does not have that column, with the placeholders ``{data}`` and ``{where}``;
            empty: nothing is checked.
        writes: The part of a review that is in the text column for it.
        second_table: Whether it uses the table ``reviews`` if the recipe has one.
        grounded: Whether its texts are compared with training texts and features.
        quotes: Whether its questions may contain the words of the answer.
        prompts: Folder of its templates; None: ``prompts/NAME``.
    """

    name: str
    title: str
    task: Callable[..., Task]
    section: type[TaskSection]
    answer: type[Answer]
    headline: str
    strategies: tuple[str, ...]
    baselines: tuple[str, ...]
    controls: tuple[str, ...]
    candidates: Literal["users", "items"] | None = None
    lists: bool = False
    column: Literal["rating", "text"] | None = None
    lacking: str = ""
    writes: ReviewPart | None = None
    second_table: bool = False
    grounded: bool = False
    quotes: bool = False
    prompts: Path | None = None

    @property
    def answers_with_items(self) -> bool:
        """Whether the true answer of a case is an item."""
        return self.answer is Ranking

    @property
    def ranks_for_users(self) -> bool:
        """Whether the task ranks items for users, as required by `llmrec rank` and ranking of the whole catalogue."""
        return self.candidates == "users"

    def headline_at(self, cutoffs: Sequence[int]) -> str:
        """Return the main metric at cut-off 10 or, without it, at the largest cut-off."""
        if not self.answers_with_items or 10 in cutoffs:
            return self.headline
        return f"NDCG@{max(cutoffs)}" if max(cutoffs) > 1 else "HR@1"


@cache
def _load_family(address: str) -> Family:
    result = import_component({"": address}, "", "task")
    assert isinstance(result, Family)
    return result


def family_of(name: str) -> Family:
    """Return the `Family` with a name.

    Raises:
        RecipeError: If there is none, with the closest name; or if a plug-in is not a `Family`.
    """
    if name in TASKS:
        return _load_family(TASKS[name])
    result = registry.import_family(name)
    if not isinstance(result, Family):
        raise RecipeError(f"the task family {name!r} is not a llmrec.tasks.family.Family", kind="defect", at=name)
    return result


def families() -> Mapping[str, Family]:
    """Return all task families by name, in the order of tables, including plug-ins."""
    return {name: family_of(name) for name in registry.family_names()}


def is_family_supported(family: Family, table: Table, name: str, *, silent: bool = True) -> bool:
    """Whether a strategy or baseline supports a task; plug-ins list their tasks in the attribute ``families``.

    Args:
        family: The family.
        table: ``STRATEGIES`` or ``BASELINES``.
        name: A name in that table, or of a plug-in.
        silent: The value for a plug-in that does not define it.
    """
    if not registry.is_plugin(table, name):
        return name in (family.strategies if table is STRATEGIES else family.baselines)
    named = getattr(import_component(table, name, "plug-in"), "families", None)
    return silent if named is None else family.name in named


def ranking_families() -> tuple[str, ...]:
    """Return the names of the tasks that rank items for users, by priority."""
    return tuple(name for name, family in families().items() if family.ranks_for_users)


def check_task_components(family: str, strategies: Sequence[str], baselines: Sequence[str]) -> None:
    """Check that the strategies and baselines of a task exist, support it, and include the required baselines.

    Raises:
        RecipeError: If not; the message lists the valid or missing names.
    """
    record = family_of(family)
    for kind, names, known, table in (
        ("strategies", strategies, record.strategies, STRATEGIES),
        ("baselines", baselines, record.baselines, BASELINES),
    ):
        for name in names:
            if name in known or is_family_supported(record, table, name):
                continue
            exists = name in table or registry.is_plugin(table, name)
            why = "does not support this task" if exists else f"is unknown{did_you_mean(name, known)}"
            raise RecipeError(
                f"tasks.{family}.{kind}: {name!r} {why}; choose from {', '.join(known)}",
                kind="unknown-name",
                column=f"tasks.{family}.{kind}",
            )
    lacking = missing_controls(family, baselines)
    if lacking:
        raise RecipeError(
            f"tasks.{family}.baselines: the required baselines {', '.join(lacking)} are missing; add them, or remove "
            "the key to use the default",
            kind="missing-value",
            column=f"tasks.{family}.baselines",
        )


def missing_controls(family: str, baselines: Sequence[str]) -> list[str]:
    """Return the required baselines of a task that were not selected."""
    return [name for name in family_of(family).controls if name not in baselines]
