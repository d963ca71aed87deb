"""The model card of an exported folder: a README with the front matter that model hubs read.

Everything that a run carries (names of data sets, nouns, descriptions, words of templates, rows of results) is
untrusted text here: it is escaped wherever it is put, so it can open neither markup nor a key of the front matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmrec.durable import Json
from llmrec.exports import snippets
from llmrec.report import escape
from llmrec.report.escape import cell, flat
from llmrec.report.table import grid
from llmrec.report.wording import (
    count,
    figure,
    interval,
    label,
    listed,
    number,
    title,
    tuning_sentence,
    verdict,
    winner_sentence,
    with_interval,
)
from llmrec.results import Results, Row, lower

UNKNOWN = "unknown: fill in"
"""What stands where nobody said which licence holds."""

_HERE = Path(__file__).resolve().parent
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LONGEST_LINE = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """The pretrained model.

    Attributes:
        name: As the recipe says it, without the folders of the machine.
        hub: Its name on the hub, if it has one.
        revision: Commit or tag, where it is known.
        licence: From its own card or configuration, or from the user.
        languages: From its own card.
        digest: Over its weights, configuration and tokenizer as they were used.
        note: What else a reader must know about these weights.
    """

    name: str
    hub: str | None = None
    revision: str | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()
    digest: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """One data set; counts are None where the data could not be read at export."""

    name: str
    source: str
    hub: str | None = None
    users: int | None = None
    items: int | None = None
    interactions: int | None = None
    parts: tuple[int, int, int] | None = None
    split: str = ""
    fingerprint: str | None = None
    filters: str = ""
    licence: str | None = None
    made: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How one family is asked: the strategies and the template of evaluation."""

    family: str
    strategies: tuple[str, ...]
    template: str
    version: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyAgreement:
    """One family measured before and after the export, on the same validation cases; losses in nats a token."""

    family: str
    rows: int
    target_tokens: int
    loss: tuple[float, float]
    metric: str | None = None
    cases: int = 0
    values: tuple[float, float] | None = None
    difference: tuple[float, float | None, float | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far the exported weights answer like what was trained.

    Attributes:
        before: What was trained: the adapter live on its own base.
        after: What is exported.
        families: One entry a tuned family.
        prompts: Prompts whose next-token logits were compared.
        logit: Largest absolute difference of a logit over them.
    """

    before: str
    after: str
    families: tuple[FamilyAgreement, ...]
    prompts: int
    logit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Everything that the card says."""

    name: str
    address: str
    description: str
    version: str
    noun: str
    adapter_only: bool
    dtype: str
    max_length: int
    base: BaseFacts
    licence: str | None
    method: str
    lora: Mapping[str, Any] | None
    seed: int
    training: Mapping[str, Any]
    data: tuple[DataFacts, ...]
    asked: tuple[Asked, ...]
    example: snippets.Example
    results: Results | None
    measured_dtype: str | None
    agreement: Agreement | None
    with_items: bool
    own_code: bool = False
    notes: tuple[str, ...] = ()


class Raw(str):
    """Text that is finished Markdown; everything else is escaped on its way into the card."""

    __slots__ = ()


def render(card: Card) -> str:
    """Return README.md."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        finalize=_escaped,
    )
    body = environment.get_template("card.md.j2").render(
        card=card,
        title=title,
        count=count,
        code=code,
        unknown=UNKNOWN,
        families=listed([title(entry.family).lower() for entry in card.asked]),
        rank=Raw(snippets.rank(asking(card))),
        python=Raw(snippets.python(asking(card))),
        shell=Raw(snippets.serve(asking(card))),
        request=Raw(snippets.request(asking(card))),
        training=Raw(_training(card)),
        scores=[] if card.results is None else _scores(card.results),
        results=card.results,
        agreement=Raw(_agreement(card.agreement)) if card.agreement else None,
        rounded=card.method in ("qlora", "lora8"),
    )
    header = yaml.safe_dump(metadata(card), sort_keys=False, allow_unicode=True, width=_LONGEST_LINE)
    return f"---\n{header}---\n\n{body}"


def asking(card: Card) -> snippets.Asking:
    """Return what the card's snippets are about."""
    return snippets.Asking(
        example=card.example,
        address=card.address,
        base=card.base.hub or card.base.name,
        adapter_only=card.adapter_only,
        rank=int((card.lora or {}).get("rank", 0)),
        max_length=card.max_length,
    )


def metadata(card: Card) -> dict[str, Json]:
    """Return the front matter.

    It names no metrics: figures without their protocol and their baselines are what the card is there to prevent.
    """
    found: dict[str, Json] = {}
    licence = card.licence or card.base.licence
    if licence is None:
        found["license"] = "unknown"
    elif _LICENCE_ID.fullmatch(licence):
        found["license"] = licence
    else:
        found |= {"license": "other", "license_name": flat(licence)}
    if card.base.hub and _HUB_NAME.fullmatch(card.base.hub):
        found |= {"base_model": card.base.hub, "base_model_relation": "adapter" if card.adapter_only else "finetune"}
    found["library_name"] = "peft" if card.adapter_only else "transformers"
    found["pipeline_tag"] = "text-generation"
    if card.base.languages:
        found["language"] = list(card.base.languages)
    hubs = [data.hub for data in card.data if data.hub and _HUB_NAME.fullmatch(data.hub)]
    if hubs:
        found["datasets"] = hubs
    found["tags"] = ["llmrec", "recommendation", "recommender-system", card.method, *(a.family for a in card.asked)]
    return found


def code(text: object) -> Raw:
    """Return text as a code span, or escaped as prose if it holds what a span cannot."""
    return Raw(escape.code(str(text)))


def _escaped(value: object) -> str:
    return value if isinstance(value, Raw) else cell(str(value))


# --------------------------------------------------------------------------- tables


def _training(card: Card) -> str:
    """Return the table of how the weights were made."""
    record, base = card.training, card.base
    rows = [["Base model", cell(base.hub or base.name)], ["Base revision", cell(base.revision or "not recorded")]]
    if base.digest:
        rows.append(["Digest of the base as used", f"`{base.digest}`"])
    rows.append(["Method", cell(card.method)])
    if card.lora:
        rows += [[cell(key), cell(str(value))] for key, value in card.lora.items()]
    rows += [
        ["Optimiser steps", count(record["steps"])],
        ["Tokens read", f"{count(record['tokens'])}, {count(record['target_tokens'])} of them with loss"],
        ["Trained parameters", f"{count(record['trainable_parameters'])} of {count(record['total_parameters'])}"],
        ["Rows", cell(", ".join(f"{family} {n}" for family, n in record["rows"].items()))],
        ["Seed", str(card.seed)],
        ["sha256 of the trained weights", code(record["adapter_sha256"])],
        ["llmrec", cell(card.version)],
    ]
    if not card.adapter_only:
        rows.append(["Weights in this folder", cell(card.dtype)])
    return grid(["What", "Value"], rows, numeric_from=2)


@dataclass(frozen=True, slots=True)
class _Score:
    """One task of the results: sentences, table, signature."""

    task: str
    first: str
    tuning: str
    table: Raw
    signature: str


def _scores(results: Results) -> list[_Score]:
    found = []
    for task in results.tasks:
        judged = verdict(results, task)
        signature = next(row.metrics[judged.metric].signature for row in results.rows if judged.metric in row.metrics)
        sentence = tuning_sentence(judged, results.rows)
        found.append(_Score(task, winner_sentence(judged), sentence, Raw(_score_table(results, task)), signature))
    return found


def _score_table(results: Results, task: str) -> str:
    """Return a task's rows, best first, baselines among them."""
    names = results.metrics(task)
    better = "lower" if lower(names[0]) else "higher"
    header = ["Row", f"{cell(names[0])} ({better} is better)", *map(cell, names[1:]), "n"]
    rows = []
    for row in results.standings(task):
        mark = f"{cell(label(row))} (baseline)" if row.arm == "baseline" else cell(label(row))
        rows.append([mark, *(_score(row, name, full=name == names[0]) for name in names), count(row.n)])
    return grid(header, rows)


def _score(row: Row, name: str, *, full: bool) -> str:
    metric = row.metrics.get(name)
    if metric is None or metric.value is None:
        return figure(metric)
    return with_interval(metric.value, metric.low, metric.high) if full else number(metric.value)


def _agreement(found: Agreement) -> str:
    """Return the table of what was measured before and after the export."""
    rows = []
    for entry in found.families:
        before, after = entry.loss
        rows.append(_line(entry.family, "loss, nats a target token", entry.rows, before, after, after - before, ""))
        if entry.metric and entry.values and entry.difference:
            change, low, high = entry.difference
            bounds = interval(low, high, sign=True)
            rows.append(_line(entry.family, entry.metric, entry.cases, *entry.values, change, bounds))
    return grid(["Family", "Figure", "Cases", "Before", "After", "After − before"], rows, numeric_from=2)


def agreement_lines(found: Agreement) -> dict[str, str]:
    """Return what `Agreement` holds as names and values, for a terminal."""
    lines = {}
    for entry in found.families:
        before, after = entry.loss
        change = f"{before:.4f} → {after:.4f} ({_signed(after - before)}) nats a token, {entry.rows} rows"
        lines[f"{entry.family}: validation loss"] = change
        if entry.metric and entry.values and entry.difference:
            (first, second), (value, low, high) = entry.values, entry.difference
            bounds = interval(low, high, sign=True)
            change = f"{first:.4f} → {second:.4f} ({_signed(value)} {bounds}), {entry.cases} cases"
            lines[f"{entry.family}: {entry.metric}"] = change
    return lines | {"largest difference of a logit": f"{found.logit:.2g}, {found.prompts} prompts"}


def _line(family: str, what: str, n: int, before: float, after: float, change: float, bounds: str) -> list[str]:
    shown = [f"{value:.4f}" for value in (before, after)]
    return [cell(title(family)), cell(what), count(n), *shown, f"{_signed(change)} {bounds}".rstrip()]


def _signed(change: float) -> str:
    return f"{round(change, 4) + 0.0:+.4f}".replace("-", "−")
