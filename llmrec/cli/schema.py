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
from llmrec.cli.console import say, show_written_files, store_facts
from llmrec.durable import write_text
from llmrec.prompts.template import load_templates
from llmrec.recipe.comparisons import Benchmark, ChatSuite, Suite
from llmrec.recipe.schema import Recipe, TaskSection, TasksSection
from llmrec.registry import BASELINES, SOURCES, TASKS, import_component
from llmrec.tasks.family import families

Schema: TypeAlias = MutableMapping[str, Any]
PageKind = Literal["recipe", "suite"]

_DIALECT = "http://json-schema.org/draft-07/schema#"
# A custom name is a path or module:attribute, which cannot be listed.
_CUSTOM_NAME = {"type": "string", "pattern": r"[:/.\\]"}


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
    show_written_files({"schema": options.out})


def schema_text(kind: PageKind) -> str:
    """Return the JSON schema of recipes, or the one of suites and benchmarks."""
    return json.dumps({"recipe": _recipe_schema, "suite": _suite_schema}[kind](), ensure_ascii=False, indent=1) + "\n"


def _recipe_schema() -> Schema:
    result = model_schema(Recipe)
    defs = result["$defs"]
    for name, family in families().items():
        section = _section_properties(family.section, defs)
        section["strategies"]["items"] = _name_schema(family.strategies)
        section["baselines"]["items"] = {"$ref": "#/$defs/Baseline"}
        templates = load_templates(name, family.prompts)
        sets = dict.fromkeys(entry for template in templates.values() for entry in template.sets)
        for key in ("templates", "eval_templates"):
            section[key]["items"] = _name_schema([*templates, *sets])
    tasks = defs["TasksSection"]
    tasks["additionalProperties"] = False
    further = {name: {"type": "object"} for name in TASKS if name not in TasksSection.model_fields}
    tasks["properties"] |= further
    defs["DataSection"]["properties"]["source"] |= _name_schema(SOURCES)
    defs["Baseline"] = _baseline_schema(defs)
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


def _suite_schema() -> Schema:
    suite, benchmark, chat = model_schema(Suite), model_schema(Benchmark), model_schema(ChatSuite)
    defs = suite.pop("$defs") | benchmark.pop("$defs") | chat.pop("$defs")
    defs["SuiteRow"]["properties"]["baseline"]["anyOf"][0] = _name_schema(BASELINES)
    defs["DataSection"]["properties"]["source"] |= _name_schema(SOURCES)
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


def _baseline_schema(defs: Schema) -> Schema:
    """Return the schema of a baseline: its name, or a mapping with name and parameters."""
    rules = []
    for name in BASELINES:
        config: type[BaseModel] = import_component(BASELINES, name, "baseline").Config
        result = model_schema(config)
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
            _name_schema(BASELINES),
            {"type": "object", "properties": {"name": _name_schema(BASELINES)}, "required": ["name"]},
        ],
        "if": {"type": "object"},
        "then": {"allOf": rules},
    }


# --------------------------------------------------------------------------- parts of a schema


def _section_properties(section: type[BaseModel], defs: Schema) -> Schema:
    """Return the schema of a task's section, including tasks of plug-ins."""
    if section.__name__ not in defs:
        result = model_schema(section)
        defs |= result.pop("$defs", {})
        defs[section.__name__] = result
    properties: Schema = defs[section.__name__]["properties"]
    return properties


def _name_schema(names: Iterable[str]) -> Schema:
    return {"anyOf": [{"type": "string", "enum": list(names)}, _CUSTOM_NAME]}


def model_schema(model: type[BaseModel]) -> Schema:
    """Return pydantic's schema with descriptions instead of titles that only repeat the key."""
    result = model.model_json_schema()
    for entry in _iterate_objects(result):
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


def _iterate_objects(value: Any) -> Iterator[Schema]:
    if isinstance(value, dict):
        yield value
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _iterate_objects(entry)


def _first_sentence(key: Mapping[str, Any], defs: Mapping[str, Schema]) -> str:
    """Return the first sentence of the docstring of a recipe section."""
    for option in (key, *key.get("anyOf", ())):
        if "$ref" in option:
            text: str = defs[option["$ref"].rpartition("/")[2]].get("description", "")
            return text.split("\n\n")[0]
    return ""
