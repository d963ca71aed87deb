"""The command `llmrec schema`: JSON schemas of recipes and suites, for editors.

Keys, bounds and descriptions come from `llmrec.recipe`, names from the registry of this installation. A schema covers
one file: `llmrec check` also validates keys from ``base`` and combinations of keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import say, store_facts, written
from llmrec.durable import write_text
from llmrec.prompts.template import load_templates
from llmrec.recipe.comparisons import Benchmark, ChatSuite, Suite
from llmrec.recipe.schema import Recipe, TaskSection, TasksSection
from llmrec.registry import BASELINES, SOURCES, TASKS, lookup
from llmrec.tasks.family import families

Schema: TypeAlias = MutableMapping[str, Any]
PageKind = Literal["recipe", "suite"]

_DIALECT = "http://json-schema.org/draft-07/schema#"
# A custom name is a path or module:attribute, which cannot be listed.
_OWN = {"type": "string", "pattern": r"[:/.\\]"}


@dataclass(frozen=True, kw_only=True)
class SchemaOptions:
    """Options of `llmrec schema`."""

    kind: Annotated[
        PageKind, OptionHelp(argument=True, help="File type of the schema; suite also covers benchmarks.")
    ] = "recipe"
    out: Annotated[Path | None, OptionHelp(metavar="FILE", help="Output file. Default: print the schema.")] = None


def schema(options: SchemaOptions) -> None:
    """Write the JSON schema of recipes or suites for editors.

    Editors use it to complete keys and mark errors.

    Example:
        llmrec schema recipe --out recipe.schema.json
    """
    text = schema_text(options.kind)
    if options.out is None:
        store_facts(schema=json.loads(text))
        say(text.rstrip())
        return
    write_text(options.out, text)
    written({"schema": options.out})


def schema_text(kind: PageKind) -> str:
    """Return the JSON schema of recipes, or the one of suites and benchmarks."""
    return json.dumps({"recipe": _recipe, "suite": _suite}[kind](), ensure_ascii=False, indent=1) + "\n"


def _recipe() -> Schema:
    result = described(Recipe)
    defs = result["$defs"]
    for name, family in families().items():
        section = _section(family.section, defs)
        section["strategies"]["items"] = _named(family.strategies)
        section["baselines"]["items"] = {"$ref": "#/$defs/Baseline"}
        templates = load_templates(name, family.prompts)
        sets = dict.fromkeys(entry for template in templates.values() for entry in template.sets)
        for key in ("templates", "eval_templates"):
            section[key]["items"] = _named([*templates, *sets])
    tasks = defs["TasksSection"]
    tasks["additionalProperties"] = False
    further = {name: {"type": "object"} for name in TASKS if name not in TasksSection.model_fields}
    tasks["properties"] |= further
    defs["DataSection"]["properties"]["source"] |= _named(SOURCES)
    defs["Baseline"] = _baseline(defs)
    del defs["BaselineSection"]
    base = {
        "type": "string",
        "description": "Base recipe, relative to this file, with the values of keys that this recipe does not set.",
    }
    result["properties"] = {"base": base} | result["properties"]
    needed = result.pop("required")
    result["anyOf"] = [{"required": ["base"]}, {"required": needed}]
    for section in defs.values():
        # the base file may have it
        section.pop("required", None)
    return {"$schema": _DIALECT, "title": "llmrec recipe", **result}


def _suite() -> Schema:
    suite, benchmark, chat = described(Suite), described(Benchmark), described(ChatSuite)
    defs = suite.pop("$defs") | benchmark.pop("$defs") | chat.pop("$defs")
    defs["SuiteRow"]["properties"]["baseline"]["anyOf"][0] = _named(BASELINES)
    defs["DataSection"]["properties"]["source"] |= _named(SOURCES)
    return {
        "$schema": _DIALECT,
        "title": "llmrec suite, benchmark or suite of conversations",
        "if": {"required": ["benchmark"]},
        "then": {"$ref": "#/$defs/Benchmark"},
        "else": {
            "if": {"required": ["chat"]},
            "then": {"$ref": "#/$defs/ChatSuite"},
            "else": {"$ref": "#/$defs/Suite"},
        },
        "$defs": defs | {"Suite": suite, "Benchmark": benchmark, "ChatSuite": chat},
    }


def _baseline(defs: Schema) -> Schema:
    """Return the schema of a baseline: its name, or a mapping with name and parameters."""
    rules = []
    for name in BASELINES:
        config: type[BaseModel] = lookup(BASELINES, name, "baseline").Config
        result = described(config)
        defs |= result.pop("$defs", {})
        parameters = result["properties"]
        rules.append(
            {
                "if": {"properties": {"name": {"const": name}}},
                "then": {
                    "properties": {"name": {}, "parameters": {"type": "object"}} | parameters,
                    "additionalProperties": False,
                },
            }
        )
    return {
        "description": "A baseline, written as its name, or as a mapping of its name and parameters.",
        "anyOf": [
            _named(BASELINES),
            {"type": "object", "properties": {"name": _named(BASELINES)}, "required": ["name"]},
        ],
        "if": {"type": "object"},
        "then": {"allOf": rules},
    }


# --------------------------------------------------------------------------- parts of a schema


def _section(section: type[BaseModel], defs: Schema) -> Schema:
    """Return the schema of a task's section, including tasks of plug-ins."""
    if section.__name__ not in defs:
        result = described(section)
        defs |= result.pop("$defs", {})
        defs[section.__name__] = result
    properties: Schema = defs[section.__name__]["properties"]
    return properties


def _named(names: Iterable[str]) -> Schema:
    return {"anyOf": [{"type": "string", "enum": list(names)}, _OWN]}


def described(model: type[BaseModel]) -> Schema:
    """Return pydantic's schema with descriptions instead of titles that only repeat the key."""
    result = model.model_json_schema()
    for entry in _objects(result):
        if isinstance(entry.get("title"), str):
            del entry["title"]
    for owner in (result, *result.get("$defs", {}).values()):
        if "description" in owner:
            owner["description"] = " ".join(owner["description"].split())
        for name, key in owner.get("properties", {}).items():
            if "description" in key:
                continue
            if "strategies" in owner["properties"] and name in TaskSection.model_fields:
                # a task changes only the default
                key["description"] = TaskSection.model_fields[name].description
            elif text := _first_sentence(key, result.get("$defs", {})):
                key["description"] = text
    return result


def _objects(value: Any) -> Iterator[Schema]:
    if isinstance(value, dict):
        yield value
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(entry)


def _first_sentence(key: Mapping[str, Any], defs: Mapping[str, Schema]) -> str:
    """Return the first sentence of the docstring of a recipe section."""
    for option in (key, *key.get("anyOf", ())):
        if "$ref" in option:
            text: str = defs[option["$ref"].rpartition("/")[2]].get("description", "")
            return text.split("\n\n")[0]
    return ""
