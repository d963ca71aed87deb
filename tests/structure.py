"""Checks the structure of the package and ARCHITECTURE.md: ``make lint`` runs it.

import-linter checks the layers; this module compares them with the page.

``python -m tests.structure`` prints every violation and the counts, and exits with code 1 if there is a violation.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from llmrec.registry import TASKS

ROOT = Path(__file__).resolve().parent.parent

ABOVE = {
    *("answer", "bench", "chat", "cli", "cluster", "exports", "pipeline", "report", "serve", "start", "systems"),
    *("baselines", "strategies", "train"),
}
"""Code that must not compare names of families or types of their sections: `Family` and `Task` have the differences."""


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the modules of a checkout's package by dotted name."""
    known = {}
    for path in sorted((root / "llmrec").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        known[name.removesuffix(".__init__")] = path
    return known


def imported(tree: ast.AST, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Yield what a module imports from the package, at any level, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in known else node.module), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return a cycle of imports, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def folder_graph(graph: dict[str, set[str]], known: dict[str, Path]) -> dict[str, set[str]]:
    """Return which folders of the package import which; a subfolder is separate from its parent."""
    folder = {name: name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in known.items()}
    # Modules at the top level are either used by every folder or compose folders.
    folders = sorted(set(folder.values()) - {"llmrec"})
    return {
        each: {folder[other] for name in known if folder[name] == each for other in graph[name]} - {each, "llmrec"}
        for each in folders
    }


def _words(node: ast.expr) -> set[str]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def compared(tree: ast.AST, text: str) -> Iterator[tuple[int, str]]:
    """Yield comparisons with a family's name, or with the type of its section, as (line, source)."""
    families = set(TASKS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            if any(_words(side) & families for side in (node.left, *node.comparators)):
                source = ast.get_source_segment(text, node) or ""
                # A column or a role may have the name of a family; the compared expression tells them apart.
                if re.search(r"\b(family|families|task|tasks)\b", source):
                    yield node.lineno, source
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            source = ast.get_source_segment(text, node) or ""
            if re.search(r"\b[A-Z]\w+Section\b", source) and "Prompt" not in source:
                yield node.lineno, source


def without_kind(trees: dict[str, ast.Module]) -> Iterator[tuple[str, int, str]]:
    """Yield code that creates an `LlmrecError` without a kind, as (module, line, source)."""
    errors = {("llmrec.errors", "LlmrecError")}
    # Names of classes in a module, which it defines or imports.
    names: dict[str, dict[str, tuple[str, str]]] = {
        module: {
            **{node.name: (module, node.name) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)},
            **{
                alias.asname or alias.name: (node.module, alias.name)
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module
                for alias in node.names
            },
        }
        for module, tree in trees.items()
    }
    bases = {
        (module, node.name): {names[module].get(base.id) for base in node.bases if isinstance(base, ast.Name)}
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    while more := {name for name, above in bases.items() if above & errors} - errors:
        errors |= more
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call | ast.Raise):
                continue
            made = node.func if isinstance(node, ast.Call) else node.exc
            told = isinstance(node, ast.Call) and any(word.arg == "kind" for word in node.keywords)
            if isinstance(made, ast.Name) and names[module].get(made.id) in errors and not told:
                yield module, node.lineno, ast.unparse(node)


def stale(page: str, known: dict[str, Path], trees: dict[str, ast.Module]) -> Iterator[str]:
    """Yield what ARCHITECTURE.md names but no code defines: ``folder/name.py``, with or without ``:Class.function``."""
    for module, function in re.findall(r"`((?:\w+/)*\w+\.py)(?::([\w.]+))?`", page):
        if (ROOT / module).is_file():
            continue
        name = ".".join(("llmrec", *Path(module).with_suffix("").parts)).removesuffix(".__init__")
        if name not in known:
            yield f"ARCHITECTURE.md: there is no {module}"
            continue
        node: ast.AST | None = trees[name]
        for part in function.split(".") if function else ():
            inside = ast.iter_child_nodes(node) if node else ()
            node = next((each for each in inside if getattr(each, "name", None) == part), None)
        if node is None:
            yield f"ARCHITECTURE.md: {module} has no {function}"


def layers() -> tuple[str, str]:
    """Return the layers of ARCHITECTURE.md, and those that import-linter checks."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## Layers")[2]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (checked,) = [each for each in settings["tool"]["importlinter"]["contracts"] if each["type"] == "layers"]
    # Parentheses allow a layer to be missing: extensions can be removed.
    return page.split("```")[1].strip(), re.sub(r"llmrec\.|[()]", "", "\n".join(checked["layers"]))


def breaches() -> tuple[list[str], str]:
    """Return the violations, one line each, and the counts in one line."""
    known = modules()
    problems: list[str] = []
    graph: dict[str, set[str]] = {}
    trees: dict[str, ast.Module] = {}
    lines = 0
    for name, path in known.items():
        text = path.read_text(encoding="utf-8")
        tree = trees[name] = ast.parse(text)
        lines += len(text.splitlines())
        where = path.relative_to(ROOT).as_posix()
        if where.split("/")[1].removesuffix(".py") in ABOVE:
            problems += [f"{where}:{line}: {said!r} tells families apart" for line, said in compared(tree, text)]
        # The package itself imports its two public functions lazily.
        graph[name] = {other for other, _ in imported(tree, known) if other in known} - {name, "llmrec"}
    graph["llmrec"] = set()
    problems += [
        f"{known[name].relative_to(ROOT).as_posix()}:{line}: {said[:60]!r} has no kind"
        for name, line, said in without_kind(trees)
    ]
    problems += stale((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), known, trees)
    written, checked = layers()
    if written != checked:
        problems.append("ARCHITECTURE.md: its layers are not those of pyproject.toml")
    problems += [f"import circle: {', '.join(group)}" for group in circles(graph)]
    problems += [f"folder circle: {', '.join(group)}" for group in circles(folder_graph(graph, known))]
    return problems, f"{len(known)} modules, {lines} lines"


if __name__ == "__main__":
    found, counts = breaches()
    for problem in found:
        sys.stdout.write(problem + "\n")
    sys.stdout.write(counts + "\n")
    sys.exit(bool(found))
