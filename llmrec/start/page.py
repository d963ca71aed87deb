"""The text of the recipe that `llmrec init` writes, from the template ``recipe.yaml.j2``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from keyword import iskeyword
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from llmrec.cli.console import format_minutes
from llmrec.data.read.tables import NO_COLUMN
from llmrec.recipe.schema import Columns, SequentialSection
from llmrec.start.plan import BATCH_TOKENS, ROW_TOKENS, RecipePlan, answer_tokens, shown_history, training_window
from llmrec.start.profile import printable_name

SCHEMA_FILE = "llmrec.schema.json"
"""The schema file in the folder of the recipe, for editors."""
_PLAIN_SCALAR = re.compile(r"[A-Za-z0-9_./-]+(?: [A-Za-z0-9_./-]+)*")


@dataclass(frozen=True)
class RecipeValues:
    """The values that fill the recipe template.

    Attributes:
        made_from: The files, as the recipe's first comment names them.
        why: A comment for each key of ``columns``.
        duplicates: Why only the latest of repeated rows is kept; empty if none repeat.
        query: ``data.query``, if ``path`` is a database.
        where: The line that keeps one kind of event; empty if there are no kinds.
        source: ``data.source``; sources other than ``table`` define their own columns.
    """

    name: str
    made_from: str
    path: str
    items: str | None
    columns: Columns
    why: Mapping[str, str]
    duplicates: str
    plan: RecipePlan
    query: str | None = None
    where: str = ""
    source: str = "table"


def yaml_scalar(value: str) -> str:
    """Return a string as a YAML scalar on one line, quoted if necessary."""
    return value if _PLAIN_SCALAR.fullmatch(value) and yaml.safe_load(value) == value else _quoted_scalar(value)


def format_estimate(plan: RecipePlan) -> str:
    """Return the estimated duration as text."""
    return f"about {format_minutes(sum(plan.seconds.values()))} on two CPU cores"


def render_recipe(page: RecipeValues) -> str:
    """Return the recipe as YAML text."""
    plan, columns = page.plan, page.columns
    keys = ("user", "item", "rating", "time", "dates", "title", "text", "split")
    return _recipe_template().render(
        page=page,
        plan=plan,
        facts=plan.facts,
        schema=SCHEMA_FILE,
        estimate=format_estimate(plan),
        seconds=", ".join(f"{name} {value:.0f} s" for name, value in plan.seconds.items()),
        columns=[(key, getattr(columns, key)) for key in keys],
        timed=columns.time not in (None, NO_COLUMN),
        rated=columns.rating not in (None, NO_COLUMN),
        tasks=_task_settings(plan),
        batch_tokens=BATCH_TOKENS,
        row_tokens=ROW_TOKENS,
        half=max(1, plan.steps // 2),
    )


@cache
def _recipe_template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {
        "shown": printable_name,
        "scalar": yaml_scalar,
        "in_list": _list_element,
        "number": _yaml_number,
    }
    environment.filters["remark"] = lambda text: f"  # {printable_name(text, 160)}" if text else ""
    return environment.get_template("recipe.yaml.j2")


def filter_line(column: str, value: str, core: int) -> str:
    """Return the ``filter`` line of a recipe that keeps rows with one value of a column."""
    name = column if column.isidentifier() and not iskeyword(column) else f"col({column!r})"
    cores = f", user_core: {core}, item_core: {core}" if core > 1 else ""
    return f"filter: {{where: {_quoted_scalar(f'{name} == {value!r}')}{cores}}}"


def _yaml_number(value: float) -> str:
    """Return a number as a YAML scalar."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else str(yaml.safe_dump(value)).split("\n")[0]


def _list_element(value: str) -> str:
    return yaml_scalar(value) if re.fullmatch(r"[A-Za-z0-9_]+", value) else _quoted_scalar(value)


def _quoted_scalar(value: str) -> str:
    dumped: str = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf)
    return dumped.rstrip("\n")


def _task_settings(plan: RecipePlan) -> dict[str, str]:
    """Return the recipe settings of each task."""
    facts = plan.facts
    tokens = facts.title_tokens + facts.field_tokens + 3
    ratings = "list-with-fields" if facts.field_tokens else "list-ratings"
    baselines = ""
    if plan.encoder:
        usual = ", ".join(baseline.name for baseline in SequentialSection().baselines)
        text = f"{{name: transitions-text, encoder: {plan.encoder}}}"
        baselines = f",\n    baselines: [{usual}, transitions,\n      {text}]"
    return {
        "rating": f"{{weight: 5, templates: [{ratings}], window: {training_window(plan, tokens=tokens)}}}",
        "sequential": (
            f"{{weight: 5, templates: [continue-list], history: {shown_history(plan)}, "
            f"window: {training_window(plan, tokens=facts.title_tokens)}{baselines}}}"
        ),
        "direct": f"{{weight: 0.5, templates: [after-history]{baselines}}}",
        "explanation": f"{{weight: 1, templates: [in-own-words], max_tokens: {answer_tokens(plan)}}}",
    }
