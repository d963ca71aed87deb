"""Fingerprints: hashes of everything that can change a result, used to decide whether a stored result is valid.

A fingerprint covers the version of llmrec, the settings that affect the stage, the code that makes the result, and the
inputs by content. A setting declares the stages that it affects (`Affects`, `llmrec.recipe.schema`). The code is found
by following the imports of the modules that make the result; a plug-in has its own stamp.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from llmrec import __version__
from llmrec.durable import Json
from llmrec.registry import Table, component_address, plugin_digests

Stage = Literal["data", "index", "tokens", "train", "rows", "engine", "evaluate", "augment"]
"""``data``: tables, splits and related files. ``index``: codes of items. ``tokens``: the base model with the
tokens of an index. ``train``: the adapter. ``rows``: the rows of the report. ``engine``: the engine of a row.
``evaluate``: the figures of a row. ``augment``: generated texts.

A stage also depends on the results of those before it, which enter its fingerprint by content.
"""

_PACKAGE = Path(__file__).resolve().parent
_TYPE_CHECKING_BLOCK = re.compile(rb"^if TYPE_CHECKING:\n(?:[ \t]+[^\n]*\n|\n)+", re.MULTILINE)
_IMPORT = re.compile(rb"^[ \t]*(?:from (llmrec[\w.]*) import (\([^)]*\)|[^\n]*)|import (llmrec[\w.]*))", re.MULTILINE)
_NAME = re.compile(rb"(\w+)(?: as \w+)?")


class Affects:
    """Metadata of a recipe field that names the stages that the field affects.

    On a section it applies to fields that declare none. Without a stage, no result depends on the setting, or the file
    that it names enters by content.

    Args:
        stages: The stages.
        optional: At its default the setting is left out, so that results from before it existed stay valid.
    """

    def __init__(self, *stages: Stage, optional: bool = False) -> None:
        self.stages: frozenset[Stage] = frozenset(stages)
        self.optional = optional


def stage_settings(
    section: BaseModel,
    stage: Stage,
    *,
    unused: Collection[str] = (),
    inherited: Collection[Stage] | None = None,
    at: str = "",
) -> dict[str, Json]:
    """Return the settings of a recipe section that affect a stage, by name.

    Args:
        section: A section, or the whole recipe.
        stage: The stage.
        unused: Dotted keys that this result does not depend on, such as ``eval.shots``.
        inherited: Stages of fields that declare none; by default this one.
        at: Dotted key of the section.
    """
    result: dict[str, Json] = {}
    inherited = (stage,) if inherited is None else inherited
    for name in (*type(section).model_fields, *(section.model_extra or ())):
        key, value = f"{at}.{name}" if at else name, getattr(section, name)
        if key in unused:
            continue
        stages = affected_stages(type(section), name, inherited)
        if isinstance(value, BaseModel):
            if inner := stage_settings(value, stage, unused=unused, inherited=stages, at=key):
                result[name] = inner
        elif stage in stages and not _is_omitted_default(type(section), name, value):
            result[name] = to_jsonable_python(value)
    return result


def affected_stages(section: type[BaseModel], name: str, inherited: Collection[Stage] = ()) -> Collection[Stage]:
    """Return the stages that a field affects, also if a subclass changes the default."""
    declaration = _declaration(section, name)
    return inherited if declaration is None else declaration.stages


def _is_omitted_default(section: type[BaseModel], name: str, value: object) -> bool:
    """Whether an optional setting has its default value."""
    declaration = _declaration(section, name)
    return declaration is not None and declaration.optional and value == section.model_fields[name].default


@cache
def _declaration(section: type[BaseModel], name: str) -> Affects | None:
    for owner in section.__mro__:
        field = getattr(owner, "model_fields", {}).get(name)
        for metadata in field.metadata if field is not None else ():
            if isinstance(metadata, Affects):
                return metadata
    return None


def fingerprint(
    stage: str,
    recipe: BaseModel | None = None,
    /,
    *,
    unused: Collection[str] = (),
    made_by: Iterable[tuple[Table, str]] = (),
    modules: Iterable[str] = (),
    **inputs: Any,
) -> str:
    """Return a fingerprint of 16 hex digits of everything that can change the result of a stage.

    Args:
        stage: The stage; with a recipe one of `Stage`.
        recipe: The recipe, whose settings that affect the stage are covered.
        unused: See `settings`.
        made_by: Names of registry tables, such as ``(BASELINES, "ease")``, whose entries and code are covered.
        modules: Further modules of llmrec whose code makes the result.
        inputs: Everything else that can change the result, files by hash.
    """
    names = list(made_by)
    return digest_of(
        stage=stage,
        llmrec=__version__,
        settings=stage_settings(recipe, cast("Stage", stage), unused=unused) if recipe is not None else None,
        code=code_digest(*sorted({*component_modules(names), *modules})),
        # The registry is left out because it names every component.
        entries=[table[name] for table, name in names if name in table],
        **plugin_digests(names),
        **inputs,
    )


def digest_of(**inputs: Any) -> str:
    """Return a hash of values, 16 hex digits."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------- code


def component_modules(names: Iterable[tuple[Table, str]]) -> set[str]:
    """Return the modules of registered components; plug-ins are not included."""
    return {component_address(table, name).partition(":")[0] for table, name in names if name in table}


@cache
def code_digest(*modules: str) -> str:
    """Return a hash of the source code of modules, and of all llmrec modules that they import."""
    files: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in files and (source := _source_hash_and_imports(name)) is not None:
            files[name], imported = source
            waiting += imported
    result = hashlib.sha256()
    for name, content in sorted(files.items()):
        result.update(name.encode() + content)
    return result.hexdigest()


@cache
def _source_hash_and_imports(module: str) -> tuple[bytes, tuple[str, ...]] | None:
    """Return the hash of a module's source, and the names that it imports; None if it is not a module.

    The package and the registry are left out: they name every public name and every component.
    """
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    if module in {"llmrec", "llmrec.registry"} or not module.startswith("llmrec.") or not path.is_file():
        return None
    content = path.read_bytes()
    imported = list[str]()
    for package, names, plain in _IMPORT.findall(_TYPE_CHECKING_BLOCK.sub(b"", content)):
        base = (package or plain).decode()
        # A name imported from a package may be a module.
        imported += [base, *(f"{base}.{name.decode()}" for name in _NAME.findall(names))]
    return hashlib.sha256(content).digest(), tuple(imported)
