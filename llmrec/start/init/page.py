"""The recipe page that `llmrec init` writes: every value from the table, with the reason beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from keyword import iskeyword

import yaml

from llmrec.cli.show.console import minutes
from llmrec.data.read.columns import NONE
from llmrec.recipe.schema import AUTO, Columns
from llmrec.start.init.plan import BATCH_TOKENS, ROW_TOKENS, Plan, answer_tokens, shown_history, window
from llmrec.start.init.profile import shown

SCHEMA = "llmrec.schema.json"
"""Beside the page, for editors."""
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+(?: [A-Za-z0-9_./-]+)*")


@dataclass(frozen=True)
class Page:
    """What a page says.

    Attributes:
        name: The recipe's name.
        made_from: The files, as its first words name them.
        path: ``data.path``.
        items: ``data.items``.
        columns: ``data.columns``.
        why: A remark for each of its keys.
        duplicates: Why repeated rows keep the latest; empty where there are none.
        plan: Everything else.
        query: ``data.query``, where ``path`` is a database.
        where: The line that keeps one kind of event; empty where there are no kinds.
        source: ``data.source``; other sources than ``table`` know their own columns.
    """

    name: str
    made_from: str
    path: str
    items: str | None
    columns: Columns
    why: Mapping[str, str]
    duplicates: str
    plan: Plan
    query: str | None = None
    where: str = ""
    source: str = "table"


def scalar(value: str) -> str:
    """Return a text as YAML on one line, quoted so that it is read back as this text, whatever it holds."""
    plain = _PLAIN.fullmatch(value) and yaml.safe_load(value) == value
    if plain:
        return value
    dumped: str = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf)
    return dumped.rstrip("\n")


def expected(plan: Plan) -> str:
    """Return the estimate in words."""
    return f"about {minutes(sum(plan.seconds.values()))} on two CPU cores"


def render(page: Page) -> str:
    """Return the page as YAML."""
    blocks = [_head(page), _data(page), _tasks(page.plan), _train(page.plan), _eval(page.plan)]
    return "\n".join("\n".join(block) + "\n" for block in blocks)


def _line(text: str, remark: str = "") -> str:
    return f"{text}  # {shown(remark, 160)}" if remark else text


def _head(page: Page) -> list[str]:
    plan = page.plan
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in plan.seconds.items())
    return [
        f"# yaml-language-server: $schema={SCHEMA}",
        f"# Made by `llmrec init` from {shown(page.made_from, 200)}; docs/recipe.md explains the keys.",
        f"# Estimate: {expected(plan)} ({seconds});",
        "# `llmrec check RECIPE --dry-run` estimates it for the machine that it runs on.",
        f"name: {scalar(page.name)}",
        "seed: 0",
        "",
        "model:",
        _line("  name: SmolLM2-135M-Instruct", "small enough for a CPU; or a folder, or a name on the hub"),
        _line("  max_length: 2048", "tokens of the longest prompt with its answer"),
    ]


def _data(page: Page) -> list[str]:
    plan, columns = page.plan, page.columns
    lines = ["data:", f"  source: {page.source}"]
    where = "" if page.path.startswith("/") or "://" in page.path else "from the folder in which llmrec is run"
    lines.append(_line(f"  path: {scalar(page.path)}", where))
    if page.query is not None:
        lines.append(f"  query: {scalar(page.query)}")
    if page.items is not None:
        lines.append(f"  items: {scalar(page.items)}")
    if page.source == "table":
        lines += _columns(page)
    if plan.core > 1:
        remark = f"the table is large and sparse; this keeps {plan.facts.users} users and {plan.facts.items} items"
        lines.append(_line(f"  filter: {{user_core: {plan.core}, item_core: {plan.core}}}", remark))
    if page.where:
        lines.append(_line(f"  # {page.where}", "keeps one kind of event"))
    if plan.split != "leave_one_out":
        remarks = {
            "given": "the column of the split says what is held out"
            if columns.split
            else "the files say what is held out",
            "last_basket": f"of each user all items of the last time; {plan.facts.tied:.0%} of the users have several",
            "global_time": "no user has 3 different items, as leave_one_out needs",
        }
        lines.append(_line(f"  split: {{kind: {plan.split}}}", remarks[plan.split]))
    lines.append(_line(f"  noun: {scalar(plan.noun)}", "what prompts call the items, in the plural; use your own word"))
    if page.duplicates:
        lines.append(_line("  duplicates: keep_last", page.duplicates))
    if plan.scale is not None and columns.rating not in (None, NONE):
        low, high = plan.scale
        seen = (plan.facts.levels[0], plan.facts.levels[-1])
        remark = "lowest and highest rating" + (
            "" if seen == plan.scale else f"; the table has {seen[0]:g} to {seen[1]:g}"
        )
        lines.append(_line(f"  rating_scale: [{_number(low)}, {_number(high)}]", remark))
    if plan.facts.zeros > 0.3 and columns.rating not in (None, NONE):
        share = f"{plan.facts.zeros:.0%}"
        lines.append(f"  # {share} of the ratings are 0; if that means no rating, add  filter: {{min_rating: 1}}")
    return lines


def _columns(page: Page) -> list[str]:
    columns, lines = page.columns, ["  columns:"]
    for key in ("user", "item", "rating", "time", "dates", "title", "text", "split"):
        value = getattr(columns, key)
        if value is not None:
            lines.append(_line(f"    {key}: {scalar(value)}", page.why.get(key, "")))
    if columns.time in (None, NONE):
        lines.append("    # no time: the order of the rows is the order in time")
    if columns.fields:
        named = ", ".join(map(_in_list, columns.fields))
        lines.append(_line(f"    fields: [{named}]", "further columns about items, for templates to show"))
    return lines


def where_line(column: str, value: str, core: int) -> str:
    """Return the line of a recipe, below ``data``, that keeps the rows of one value of a column, and a core filter."""
    name = column if column.isidentifier() and not iskeyword(column) else f"col({column!r})"
    cores = f", user_core: {core}, item_core: {core}" if core > 1 else ""
    return f"filter: {{where: {_quoted(f'{name} == {value!r}')}{cores}}}"


def _number(value: float) -> str:
    """Return a number as YAML that is read back as this number."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else str(yaml.safe_dump(value)).split("\n")[0]


def _in_list(value: str) -> str:
    return scalar(value) if re.fullmatch(r"[A-Za-z0-9_]+", value) else _quoted(value)


def _quoted(value: str) -> str:
    dumped: str = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf)
    return dumped.rstrip("\n")


def _tasks(plan: Plan) -> list[str]:
    facts = plan.facts
    about = facts.title_tokens + (facts.field_tokens if facts.field_tokens else 0) + 3
    ratings = "list-with-fields" if facts.field_tokens else "list-ratings"
    written = {
        "rating": f"{{weight: 5, templates: [{ratings}], window: {window(plan, tokens=about)}}}",
        "sequential": (
            f"{{weight: 5, templates: [continue-list], history: {shown_history(plan)}, "
            f"window: {window(plan, tokens=facts.title_tokens)}}}"
        ),
        "direct": "{weight: 0.5, templates: [after-history]}",
        "explanation": f"{{weight: 1, templates: [in-own-words], max_tokens: {answer_tokens(plan)}}}",
    }
    lines = [_line("tasks:", "weight is the share of training tokens")]
    for family, (on, reason) in plan.tasks.items():
        if on:
            lines.append(_line(f"  {family}: {written[family]}", reason))
        else:
            lines.append(f"  # {family} is off: {shown(reason, 160)}")
    return lines


def _train(plan: Plan) -> list[str]:
    half = max(1, plan.steps // 2)
    return [
        "train:",
        _line(
            f"  steps: {plan.steps}",
            f"of {BATCH_TOKENS} tokens each; 2 to 5 times as many is better, where time allows",
        ),
        f"  batch_tokens: {BATCH_TOKENS}",
        f"  max_row_tokens: {ROW_TOKENS}",
        "  learning_rate: 1.0e-3",
        _line("  lora: {top_layers: 15}", "the upper half of the model; without this line all layers are adapted"),
        f"  valid_every: {half}",
        f"  save_every: {half}",
    ]


def _eval(plan: Plan) -> list[str]:
    lines = [
        "eval:",
        _line(
            f"  arms: [{', '.join(plan.arms)}]",
            "" if "few-shot" in plan.arms else "few-shot was left out to save time",
        ),
        _line(f"  users: {plan.users}", f"{plan.facts.able} could be evaluated" if plan.facts.able else "a task"),
        _line(
            f"  backend: {plan.backend}",
            "vllm where it is installed and starts, otherwise hf" if plan.backend == AUTO else "",
        ),
        "  shots: {k: 1}",
    ]
    if plan.candidates < 20 and {"sequential", "direct"} & set(plan.on):
        most = plan.facts.history[2]
        remark = f"20 is usual; there are {plan.facts.items} items, and one user has had {most}"
        lines.append(_line(f"  candidates: {{count: {plan.candidates}}}", remark))
    return lines
