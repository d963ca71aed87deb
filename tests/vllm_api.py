"""Check that a vLLM has everything that llmrec uses of it, from the source of both; neither is imported.

``python -m tests.vllm_api [WHEEL OR FOLDER ...]`` prints what is missing; without arguments it checks the installed
vLLM. Keywords, imports and environment variables are read from the code of llmrec, attributes from `ATTRIBUTES`.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

Source = Callable[[str], str | None]
"""Returns the text of a module of vLLM by its path, such as ``vllm/sampling_params.py``; None: there is none."""


@dataclass(frozen=True)
class Use:
    """One thing of vLLM that llmrec uses.

    Attributes:
        file: The module that must have it.
        owner: Its class; empty: the module.
        name: Its name.
        parameters: Parameters that it must accept.
    """

    file: str
    owner: str
    name: str
    parameters: tuple[str, ...] = ()


LLM, ENGINE = "vllm/entrypoints/llm.py", "vllm/v1/engine/llm_engine.py"
CORE, CONFIG, OUTPUTS = "vllm/v1/engine/core_client.py", "vllm/config", "vllm/outputs.py"

ATTRIBUTES = (
    Use(LLM, "LLM", "enqueue", ("prompts", "sampling_params", "use_tqdm", "lora_request")),
    Use(LLM, "LLM", "llm_engine"),
    Use(ENGINE, "LLMEngine", "step"),
    Use(ENGINE, "LLMEngine", "has_unfinished_requests"),
    Use(ENGINE, "LLMEngine", "engine_core"),
    Use(ENGINE, "LLMEngine", "vllm_config"),
    Use(f"{CONFIG}/vllm.py", "VllmConfig", "cache_config"),
    Use(f"{CONFIG}/vllm.py", "VllmConfig", "use_v2_model_runner"),
    Use(f"{CONFIG}/cache.py", "CacheConfig", "block_size"),
    Use(f"{CONFIG}/cache.py", "CacheConfig", "num_gpu_blocks"),
    Use(CORE, "MPClient", "shutdown", ("timeout",)),
    Use(CORE, "MPClient", "resources"),
    Use(CORE, "MPClient", "utility_results"),
    Use(CORE, "SyncMPClient", "outputs_queue"),
    Use(CORE, "BackgroundResources", "engine_manager"),
    Use("vllm/v1/engine/utils.py", "CoreEngineProcManager", "processes"),
    Use("vllm/platforms/interface.py", "Platform", "is_cpu"),
    Use(OUTPUTS, "RequestOutput", "request_id"),
    Use(OUTPUTS, "RequestOutput", "outputs"),
    Use(OUTPUTS, "RequestOutput", "finished"),
    Use(OUTPUTS, "RequestOutput", "num_cached_tokens"),
    Use(OUTPUTS, "RequestOutput", "prompt_token_id_logprobs"),
    Use(OUTPUTS, "CompletionOutput", "token_ids"),
    Use(OUTPUTS, "CompletionOutput", "logprobs"),
    Use("vllm/logprobs.py", "Logprob", "logprob"),
    Use("vllm/sampling_params.py", "SamplingParams", "extra_args"),
)
"""Attributes and methods that the code reads from vLLM's objects, by the class that has them."""

# Calls by name, and the classes whose fields or parameters their keywords are.
CALLS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "LLM": ((LLM, "LLM"), ("vllm/engine/arg_utils.py", "EngineArgs")),
    "SamplingParams": (("vllm/sampling_params.py", "SamplingParams"),),
    "LoRARequest": (("vllm/lora/request.py", "LoRARequest"),),
}
# A class of llmrec whose fields are keywords of `LLM`.
OPTIONS = "_Options"
VARIABLE = re.compile(r"VLLM_[A-Z0-9_]+")
# Folders with environment variables; docker/ has the server's key, which vLLM's command reads.
FOLDERS = ("llmrec", "docker")


def installed() -> Path | None:
    """Return the folder that holds the installed package, without importing it."""
    found = importlib.util.find_spec("vllm")
    return None if found is None or found.origin is None else Path(found.origin).parent.parent


def source_of(place: Path) -> Source:
    """Return the modules of a wheel, or of a folder with an unpacked one."""
    if place.is_dir():
        return lambda name: (place / name).read_text(encoding="utf-8") if (place / name).is_file() else None
    wheel = zipfile.ZipFile(place)
    names = set(wheel.namelist())
    return lambda name: wheel.read(name).decode() if name in names else None


@cache
def used(root: Path = ROOT) -> tuple[dict[str, set[str]], set[tuple[str, str]], set[str]]:
    """Return what llmrec's code uses: keywords by call, imports as (module, name), and environment variables."""
    keywords: dict[str, set[str]] = {name: set() for name in CALLS}
    imports: set[tuple[str, str]] = set()
    for path in sorted((root / "llmrec").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "vllm" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in CALLS:
                    keywords[called] |= {keyword.arg for keyword in node.keywords if keyword.arg}
                elif called == "require" and node.args and isinstance(node.args[0], ast.Constant):
                    name = str(node.args[0].value)
                    imports |= {(name, "")} if name.split(".")[0] == "vllm" else set()
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
                call = node.value
                if getattr(call.func, "id", "") == "require" and isinstance(call.args[0], ast.Constant):
                    name = str(call.args[0].value)
                    imports |= {(name, node.attr)} if name.split(".")[0] == "vllm" else set()
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                imports |= {(str(node.module), alias.name) for alias in node.names}
            elif isinstance(node, ast.ClassDef) and node.name == OPTIONS:
                keywords["LLM"] |= {
                    field.target.id
                    for field in node.body
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                }
    texts = [
        path.read_text(encoding="utf-8")
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*"))
        if path.is_file() and path.suffix in {".py", ".yaml", ".cpu", ".cuda"}
    ]
    return keywords, imports, {name for text in texts for name in VARIABLE.findall(text)}


def missing(source: Source, root: Path = ROOT) -> list[str]:
    """Return what llmrec uses and a vLLM does not have, one line each; empty if it has everything."""
    keywords, imports, variables = used(root)
    faults = []
    for called, names in keywords.items():
        known = {name for file, owner in CALLS[called] for name in _accepted(source, file, owner)}
        faults += [f"{called}({name}=...): no such parameter" for name in sorted(names - known)]
    for module, name in sorted(imports):
        path = module.replace(".", "/")
        text = source(f"{path}.py") or source(f"{path}/__init__.py")
        if text is None:
            faults.append(f"{module}: no such module")
        elif name and not re.search(rf"\b{name}\b", text):
            faults.append(f"{module}.{name}: no such name")
    known_variables = source("vllm/envs.py") or ""
    faults += [f"{name}: no such environment variable" for name in sorted(variables) if name not in known_variables]
    faults += [
        f"{use.owner}.{use.name}{list(use.parameters) or ''}: not in {use.file}"
        for use in ATTRIBUTES
        if not _has(source, use)
    ]
    return faults


def _has(source: Source, use: Use) -> bool:
    owner = _class(source, use.file, use.owner)
    if owner is None:
        return False
    for member in owner.body:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and member.name == use.name:
            return set(use.parameters) <= {argument.arg for argument in _arguments(member)}
    return not use.parameters and use.name in _members(owner)


def _accepted(source: Source, file: str, name: str) -> set[str]:
    """Return the parameters of a class: its annotated fields, and the arguments of its ``__init__``."""
    owner = _class(source, file, name)
    if owner is None:
        return set()
    makers = [member for member in owner.body if isinstance(member, ast.FunctionDef) and member.name == "__init__"]
    fields = {
        member.target.id
        for member in owner.body
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name)
    }
    return fields | {argument.arg for maker in makers for argument in _arguments(maker)}


def _class(source: Source, file: str, name: str) -> ast.ClassDef | None:
    return next((node for node in _classes(source(file) or "") if node.name == name), None)


@cache
def _classes(text: str) -> list[ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _members(owner: ast.ClassDef) -> set[str]:
    """Return the names of a class: fields, methods, and attributes that its methods set on ``self``."""
    return {name for node in ast.walk(owner) for name in _names(node)}


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    for target in [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", []):
        if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
            yield target.attr
        elif isinstance(target, ast.Name) and isinstance(node, ast.AnnAssign | ast.Assign):
            yield target.id


def main(arguments: list[str]) -> int:
    """Check the named wheels and folders, or the installed vLLM; return the exit status."""
    own = installed()
    places = [Path(argument) for argument in arguments] or ([] if own is None else [own])
    failed = not places
    for place in places:
        faults = missing(source_of(place))
        failed |= bool(faults)
        print(f"{place.name}: {'has everything that llmrec uses' if not faults else f'lacks {len(faults)}'}")  # noqa: T201
        for fault in faults:
            print(f"  {fault}")  # noqa: T201
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
