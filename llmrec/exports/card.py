"""Renders the model card of an exported folder: a README with the metadata that model hubs read.

All text of a run (names of data sets, nouns, descriptions, templates, results) is untrusted: it is escaped, so it can
neither open markup nor add a key to the front matter.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from llmrec.display import single_line
from llmrec.durable import Json
from llmrec.registry import is_lower_better
from llmrec.report.escape import code_span, escape_cell
from llmrec.report.render import markdown_environment
from llmrec.report.table import markdown_table
from llmrec.report.wording import (
    format_count,
    format_figure,
    format_interval,
    format_number,
    format_with_interval,
    join_words,
    label,
    title,
    tuning_sentence,
    verdict,
    winner_sentence,
)
from llmrec.results import Results, Row

UNKNOWN = "unknown: fill in"
"""The placeholder for an unknown licence."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LONGEST_LINE = 4000
# Characters that could end a code block or a shell quote, or start HTML.
_UNSAFE = frozenset("<>&`'")
# The values that vLLM accepts as maximum LoRA rank.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """The pretrained model.

    Attributes:
        name: The name in the recipe, without folders of the machine.
        hub: Its name on the hub, if it has one.
        revision: Commit or tag, if known.
        licence: The licence from its model card or configuration, or from the user.
        languages: The languages from its model card.
        digest: Hash of its weights, configuration and tokenizer as used.
        note: Further remarks on these weights.
    """

    name: str
    hub: str | None = None
    revision: str | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()
    digest: str | None = None
    note: str = ""

    @property
    def known_as(self) -> str:
        """Name of the model on the hub, or else in the recipe."""
        return self.hub or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """A data set; counts are None if the data could not be read at export."""

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
class TaskSettings:
    """The inference settings of a task: strategies and template used in evaluation."""

    family: str
    strategies: tuple[str, ...]
    template: str
    version: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyAgreement:
    """Results of a task before and after the export, on the same validation cases; losses in nats per token."""

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
    """How well the exported weights agree with the trained model.

    Attributes:
        before: The trained model: the unmerged adapter on its base.
        after: The exported model.
        families: One entry per tuned family.
        prompts: Number of prompts whose next-token logits were compared.
        logit: Largest absolute difference between their logits.
    """

    before: str
    after: str
    families: tuple[FamilyAgreement, ...]
    prompts: int
    logit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt with made-up titles, for code examples.

    Attributes:
        family: The family that it belongs to.
        messages: Chat turns as role and content; empty if the model has no chat template that takes them.
        given: The prefix of the answer, such as the history in a list.
        text: The final text of the prompt.
        stop: The stop text of the answer, in addition to the end of turn.
        max_tokens: Maximum length of the answer.
        thinking: Whether the chat template has a thinking option, which must be disabled.
        history: Titles of the history, oldest first.
        candidates: Titles of the candidates; empty if the model was not tuned to rank candidates.
    """

    family: str
    messages: tuple[tuple[str, str], ...]
    given: str
    text: str
    stop: str | None
    max_tokens: int
    thinking: bool = False
    history: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The content of a model card."""

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
    asked: tuple[TaskSettings, ...]
    example: Example
    results: Results | None
    measured_dtype: str | None
    agreement: Agreement | None
    with_items: bool
    own_code: bool = False
    notes: tuple[str, ...] = ()


def render_card(card: Card) -> str:
    """Return the text of README.md."""
    template = markdown_environment(Path(__file__).resolve().parent).get_template("card.md.j2")
    # All text is escaped that is not marked as finished Markdown.
    body = template.render(
        card=card,
        title=title,
        count=format_count,
        unknown=UNKNOWN,
        families=join_words([title(entry.family).lower() for entry in card.asked]),
        rank=Markup(rank_snippet(card)),
        python=Markup(python_snippet(card)),
        shell=Markup(serve_snippet(card)),
        request=Markup(request_snippet(card)),
        training=Markup(_training_table(card)),
        scores=[] if card.results is None else _task_scores(card.results),
        results=card.results,
        agreement=Markup(_agreement_table(card.agreement)) if card.agreement else None,
        rounded=card.method in ("qlora", "lora8"),
    )
    header = yaml.safe_dump(metadata(card), sort_keys=False, allow_unicode=True, width=_LONGEST_LINE)
    return f"---\n{header}---\n\n{body}"


def metadata(card: Card) -> dict[str, Json]:
    """Return the metadata at the top of the model card.

    It has no metrics, since they would be shown without their protocol and baselines.
    """
    result: dict[str, Json] = {}
    licence = card.licence or card.base.licence
    if licence is None:
        result["license"] = "unknown"
    elif _LICENCE_ID.fullmatch(licence):
        result["license"] = licence
    else:
        result |= {"license": "other", "license_name": single_line(licence)}
    if card.base.hub and _HUB_NAME.fullmatch(card.base.hub):
        result |= {"base_model": card.base.hub, "base_model_relation": "adapter" if card.adapter_only else "finetune"}
    result["library_name"] = "peft" if card.adapter_only else "transformers"
    result["pipeline_tag"] = "text-generation"
    if card.base.languages:
        result["language"] = list(card.base.languages)
    hubs = [data.hub for data in card.data if data.hub and _HUB_NAME.fullmatch(data.hub)]
    if hubs:
        result["datasets"] = hubs
    result["tags"] = ["llmrec", "recommendation", "recommender-system", card.method, *(a.family for a in card.asked)]
    return result


# --------------------------------------------------------------------------- tables


def _training_table(card: Card) -> str:
    """Return the table of training settings."""
    record, base = card.training, card.base
    rows = [["Base model", escape_cell(base.known_as)], ["Base revision", escape_cell(base.revision or "not recorded")]]
    if base.digest:
        rows.append(["Digest of the base as used", f"`{base.digest}`"])
    rows.append(["Method", escape_cell(card.method)])
    if card.lora:
        rows += [[escape_cell(key), escape_cell(str(value))] for key, value in card.lora.items()]
    rows += [
        ["Optimiser steps", format_count(record["steps"])],
        ["Tokens read", f"{format_count(record['tokens'])}, {format_count(record['target_tokens'])} of them with loss"],
        [
            "Trained parameters",
            f"{format_count(record['trainable_parameters'])} of {format_count(record['total_parameters'])}",
        ],
        ["Training examples", escape_cell(", ".join(f"{family} {n}" for family, n in record["rows"].items()))],
        ["Seed", str(card.seed)],
        ["sha256 of the trained weights", code_span(str(record["adapter_sha256"]))],
        ["llmrec", escape_cell(card.version)],
    ]
    if not card.adapter_only:
        rows.append(["Weights in this folder", escape_cell(card.dtype)])
    return markdown_table(["What", "Value"], rows, numeric_from=2)


def _task_scores(results: Results) -> list[dict[str, str]]:
    """Return the results of each task for the template: sentences, table, signature."""
    scores = []
    for task in results.tasks:
        judged = verdict(results, task)
        signature = next(row.metrics[judged.metric].signature for row in results.rows if judged.metric in row.metrics)
        sentences = {"first": winner_sentence(judged), "tuning": tuning_sentence(judged, results.rows)}
        table = Markup(_score_table(results, task))
        scores.append({"task": task, **sentences, "table": table, "signature": signature})
    return scores


def _score_table(results: Results, task: str) -> str:
    """Return the results of a task, including baselines, best first."""
    names = results.metrics(task)
    better = "lower" if is_lower_better(names[0]) else "higher"
    header = ["Model", f"{escape_cell(names[0])} ({better} is better)", *map(escape_cell, names[1:]), "n"]
    rows = []
    for row in results.standings(task):
        mark = f"{escape_cell(label(row))} (baseline)" if row.arm == "baseline" else escape_cell(label(row))
        rows.append([mark, *(_score_cell(row, name, full=name == names[0]) for name in names), format_count(row.n)])
    return markdown_table(header, rows)


def _score_cell(row: Row, name: str, *, full: bool) -> str:
    metric = row.metrics.get(name)
    if metric is None or metric.value is None:
        return format_figure(metric)
    return format_with_interval(metric.value, metric.low, metric.high) if full else format_number(metric.value)


def _agreement_values(agreement: Agreement) -> Iterator[tuple[str, str, int, float, float, str]]:
    """Yield task, metric (empty for the loss), number of cases, values before and after the export, and the change."""
    for entry in agreement.families:
        before, after = entry.loss
        yield entry.family, "", entry.rows, before, after, _format_signed(after - before)
        if entry.metric and entry.values and entry.difference:
            change, low, high = entry.difference
            text = f"{_format_signed(change)} {format_interval(low, high, sign=True)}".rstrip()
            yield entry.family, entry.metric, entry.cases, *entry.values, text


def _agreement_table(agreement: Agreement) -> str:
    """Return the table of metrics before and after the export."""
    rows = [
        [
            *(escape_cell(title(family)), escape_cell(metric or "loss, nats per target token"), format_count(n)),
            *(f"{before:.4f}", f"{after:.4f}", change),
        ]
        for family, metric, n, before, after, change in _agreement_values(agreement)
    ]
    return markdown_table(["Task", "Metric", "Cases", "Before", "After", "After − before"], rows, numeric_from=2)


def agreement_lines(agreement: Agreement) -> dict[str, str]:
    """Return an `Agreement` as names and values for the terminal."""
    lines = {}
    for family, metric, n, before, after, change in _agreement_values(agreement):
        count = f", {n} cases" if metric else f" nats per token, {n} examples"
        lines[f"{family}: {metric or 'validation loss'}"] = f"{before:.4f} → {after:.4f} ({change}){count}"
    return lines | {"largest difference of a logit": f"{agreement.logit:.2g}, {agreement.prompts} prompts"}


def _format_signed(change: float) -> str:
    return f"{round(change, 4) + 0.0:+.4f}".replace("-", "−")


# --------------------------------------------------------------------------- code literals
# Templates are untrusted. They are inserted as literals that cannot end a code block or a quote.


def safe_literal(value: object) -> str:
    """Return a value as JSON that is also a Python literal and safe in a code block."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(f"\\u{ord(entry):04x}" if entry in _UNSAFE or _is_hidden(entry) else entry for entry in text)


def _is_hidden(character: str) -> bool:
    # Beyond this code point, JSON and Python write escapes differently.
    return not character.isprintable() and ord(character) < 0x10000


def rank_snippet(card: Card) -> str:
    """Return commands that rank the candidates of the example."""
    example = card.example
    if card.adapter_only or not example.candidates:
        return ""
    request = {
        "history": [{"title": title} for title in example.history],
        "candidates": [{"title": title} for title in example.candidates],
    }
    command = f"llmrec rank --model {shlex.quote(card.address)} --in requests.jsonl --out ranked.jsonl"
    return f"echo '{safe_literal(request)}' > requests.jsonl\n{command}"


def python_snippet(card: Card) -> str:
    """Return a script that runs the example with transformers and prints the answer."""
    example, name = card.example, safe_literal(card.address)
    source = safe_literal(card.base.known_as) if card.adapter_only else name
    lines = ["from peft import PeftModel"] if card.adapter_only else []
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({source})",
        f"{'base' if card.adapter_only else 'model'} = AutoModelForCausalLM.from_pretrained({source})",
    ]
    if card.adapter_only:
        lines.append(f"model = PeftModel.from_pretrained(base, {name})")
    if example.messages:
        thinking = ", enable_thinking=False" if example.thinking else ""
        turns = [safe_literal({"role": role, "content": content}) for role, content in example.messages]
        lines += [
            *("messages = [", *(f"    {turn}," for turn in turns), "]"),
            f"text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True{thinking})",
        ]
        if example.given:
            lines.append(f"text += {safe_literal(example.given)}")
    else:
        lines.append(f"text = {safe_literal(example.text)}")
    stop = f", stop_strings=[{safe_literal(example.stop)}], tokenizer=tokenizer" if example.stop else ""
    lines += [
        'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)',
        f"output = model.generate(**inputs, max_new_tokens={example.max_tokens}, do_sample=False{stop})",
        'answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
        f"print(answer{f'.split({safe_literal(example.stop)})[0]' if example.stop else ''})",
    ]
    return "\n".join(lines)


def serve_snippet(card: Card) -> str:
    """Return the command that serves the exported folder."""
    address = shlex.quote(card.address)
    if card.adapter_only:
        base = shlex.quote(card.base.known_as)
        rank = int((card.lora or {}).get("rank", 0))
        rank = next((known for known in _LORA_RANKS if known >= rank), rank)
        return f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={address}"
    return f"vllm serve {address} --max-model-len {card.max_length}"


def request_snippet(card: Card) -> str:
    """Return the command that sends the example to a server."""
    path, body = request_body(card)
    return f"curl http://localhost:8000{path} -H 'Content-Type: application/json' \\\n  -d '{safe_literal(body)}'"


def request_body(card: Card) -> tuple[str, dict[str, Json]]:
    """Return the URL path and JSON body of a server request with the example prompt."""
    example = card.example
    body: dict[str, Json] = {"model": "tuned" if card.adapter_only else card.address, "temperature": 0}
    body["max_tokens"] = example.max_tokens
    if example.stop:
        body["stop"] = [example.stop]
    if not example.messages or example.given:
        # A server may trim the end of a message that it should continue, so a list is sent as plain text.
        return "/v1/completions", body | {"prompt": example.text, "add_special_tokens": False}
    body["messages"] = [{"role": role, "content": content} for role, content in example.messages]
    if example.thinking:
        body["chat_template_kwargs"] = {"enable_thinking": False}
    return "/v1/chat/completions", body
