"""Measures the size and structure of one or several checkouts of llmrec.

``python -m eval.benchmarks.structure NAME=FOLDER... --out eval/results/structure.json`` reads each checkout's files and
runs none of its code. Counts of lines include blank lines, comments and docstrings. ``core_lines`` are those outside of
the extensions, ``any`` counts parameters and attributes of this type, ``parameters`` is the longest list of a function,
and ``folder_circles`` the number of folders in import circles, where a subfolder is not its parent. What ``--out`` has
under ``counted`` was counted by hand or by other commands, and is kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path

from tests.structure import circles, folder_graph, imported, modules

EXTENSIONS = ("systems", "serve", "chat", "start", "bench", "cluster")


def lines(folder: Path, pattern: str = "*.py") -> int:
    """Return the number of lines of all files below a folder that match a pattern."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob(pattern))


def measured(root: Path) -> dict[str, int]:
    """Return the figures of one checkout by name."""
    known = modules(root)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in known.items()}
    # The package imports its public names when they are first asked for, which makes no circle.
    graph = {
        name: {other for other, _ in imported(tree, known) if other in known} - {name, "llmrec"}
        if name != "llmrec"
        else set()
        for name, tree in trees.items()
    }
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    annotations = [
        annotation
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.arg | ast.AnnAssign) and (annotation := node.annotation) is not None
    ]
    package = root / "llmrec"
    total = lines(package)
    schema = json.loads((root / "docs" / "schema" / "recipe.json").read_text(encoding="utf-8"))
    commands = re.split(r"^## ", (root / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        "modules": len(known),
        "lines": total,
        "core_lines": total - sum(lines(package / name) for name in EXTENSIONS),
        "parameters": max(len(function.args.args) + len(function.args.kwonlyargs) for function in functions),
        "any": sum(ast.unparse(annotation) == "Any" for annotation in annotations),
        "module_circles": len(circles(graph)),
        "folder_circles": sum(map(len, circles(folder_graph(graph, known)))),
        "recipe_keys": sum(len(part.get("properties", ())) for part in (schema, *schema["$defs"].values())),
        "flags": sum(len(set(re.findall(r"`(--[a-z][\w-]*)", command)) - {"--help"}) for command in commands),
        "make_targets": len(
            re.findall(r"^[a-z][\w-]*:", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        ),
        "test_lines": lines(root / "tests"),
        "benchmark_lines": lines(root / "eval"),
        "documentation_words": sum(
            len(page.read_text(encoding="utf-8").split())
            for page in [root / "README.md", *(root / "docs").rglob("*.md")]
        ),
    }


def main() -> None:
    """Measure the checkouts named on the command line, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkouts", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {name: measured(Path(folder)) for name, _, folder in (text.partition("=") for text in options.checkouts)}
    sys.stdout.write(f"{'':40}" + "".join(f"{name:>14}" for name in results) + "\n")
    for figure in next(iter(results.values())):
        sys.stdout.write(f"{figure:40}" + "".join(f"{result[figure]:>14,}" for result in results.values()) + "\n")
    if options.out:
        kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        page = {"command": f"python -m eval.benchmarks.structure {' '.join(f'{name}=FOLDER' for name in results)}"}
        page |= {"checkouts": results, "counted": kept.get("counted", {})}
        options.out.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
