"""Which test files a change can affect: ``make test CHANGED=1`` runs these.

``python -m tests.affected`` compares the working tree with the commit where its branch left ``main``, and prints the
test files that depend on a changed file. When in doubt, it includes a test:

- an import counts anywhere, also inside a function, and so does the full name of a module in a string;
- an entry of a table of names (``"markov": "llmrec.baselines.markov:Markov"``) counts where its key is written;
- a glob pattern of code files (`*/entries.py`) counts as an import of each match;
- a fixture of a ``conftest.py`` counts where its name is written;
- a file that is not Python counts where its name, or the name of a folder that contains it, is written. A file that
  is named nowhere affects every test, and so does pyproject.toml.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("llmrec", "tests", "eval", "docs")
WORD = re.compile(r"[\w.-]*\w")
CALLED = {"COMMANDS": "{}()", "FUNCTIONS": "llmrec.{}"}
"""How callers write the names in some tables."""
CLI = "llmrec.cli.main"
COMMAND = re.compile(r"\bllmrec ([\w-]+)")
MODULE = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)*(?::\w+)?")


@dataclass
class Source:
    """What a file, or one fixture of a ``conftest.py``, refers to."""

    modules: set[str] = field(default_factory=set)
    """Full names of modules and of names in them."""
    words: set[str] = field(default_factory=set)
    """Strings and their words, such as names of files, folders and table entries."""
    names: set[str] = field(default_factory=set)
    """Parameters and variables, such as names of fixtures."""
    tables: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Modules by the short names that tables in this file give them."""


def _constants(nodes: Iterable[ast.expr | None]) -> list[object]:
    return [node.value if isinstance(node, ast.Constant) else None for node in nodes]


def read(nodes: Iterable[ast.AST], *, words: bool = True) -> Source:
    """Return what a part of a Python file refers to; without ``words``, strings count only as a whole."""
    source = Source()
    passed: set[int] = set()
    called: dict[int, str] = {}
    queue = deque(nodes)
    while queue:
        node = queue.popleft()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        queue.extend(ast.iter_child_nodes(node))
        match node:
            case ast.Expr(value=ast.Constant() as docstring):
                passed.add(id(docstring))
            case ast.Import(names=names):
                source.modules |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), names=names):
                source.modules |= {module, *(f"{module}.{alias.name}" for alias in names)}
            case ast.Assign(targets=[ast.Name(id=table)]) | ast.AnnAssign(target=ast.Name(id=table)) if table in CALLED:
                called |= {id(each): CALLED[table] for each in ast.walk(node) if isinstance(each, ast.Dict)}
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    # The value is the name of a module, or a call whose first argument is one.
                    value = value.args[0] if isinstance(value, ast.Call) and value.args else value
                    name, module = _constants((key, value))
                    if isinstance(name, str) and isinstance(module, str) and MODULE.fullmatch(module):
                        source.tables[called.get(id(node), "{}").format(name)].add(module.partition(":")[0])
                        passed |= {id(key), id(value)}
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                texts = _constants(elements)
                # A separate process: python -m llmrec.
                source.modules |= {f"{b}.__main__" for a, b in pairwise(texts) if a == "-m"}
            case ast.Constant(value=str(text)) if id(node) not in passed:
                source.words.add(text)
                if words:
                    source.words |= {*WORD.findall(text), *(f"{name}()" for name in (text, *COMMAND.findall(text)))}
                source.modules |= {name.partition(":")[0] for name in MODULE.findall(text) if "." in name}
                source.modules |= {f"{name}.__main__" for name in re.findall(r"-m ([\w.]+)", text)}
            case ast.Attribute(value=ast.Name(id=name), attr=word) if name in PACKAGES:
                source.modules.add(f"{name}.{word}")
            case ast.arg(arg=word) | ast.Name(id=word):
                source.names.add(word)
    return source


class Tree:
    """What the Python files of a checkout refer to."""

    def __init__(self, root: Path, files: Iterable[str]) -> None:
        """Read files, given as paths below ``root``; removed files count as empty."""
        self.paths: dict[str, str] = {}
        self.sources: dict[str, Source] = {}
        self.fixtures: dict[str, list[str]] = {}
        """Full names of the definitions, by the name of the fixture."""
        for file in files:
            if file.endswith(".py") and file.partition("/")[0] in PACKAGES:
                name = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
                self.paths[name] = file
                path = root / file
                body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
                if path.name == "conftest.py":
                    for node in [node for node in body if isinstance(node, ast.FunctionDef) and not _always(node)]:
                        self.sources[f"{name}.{node.name}"] = read([node])
                        self.fixtures.setdefault(node.name, []).append(f"{name}.{node.name}")
                        body.remove(node)
                # Sentences in the package are messages, so only whole strings count.
                self.sources[name] = read(body, words=not _in_package(name))
                if path.name == "__init__.py":
                    # Lazily imported names: callers write them with the name of the package.
                    tables = self.sources[name].tables
                    self.sources[name].tables = {f"{name}.{key}": modules for key, modules in tables.items()}
        for name, source in self.sources.items():
            for pattern in [text for text in source.words if "*" in text and text.endswith(".py")]:
                # The package uses such patterns to hash code, not to import it.
                if not (_in_package(name) and pattern.endswith("*.py")):
                    source.modules |= {module for module, file in self.paths.items() if Path(file).match(pattern)}

    def reached(self, test: str) -> set[str]:
        """Return the modules that a test module reaches, itself included."""
        reached: set[str] = set()
        words: set[str] = set()
        names: set[str] = set()
        tables: dict[str, set[str]] = defaultdict(set)
        folders = [test.rsplit(".", depth)[0] for depth in range(1, test.count(".") + 1)]
        queue = {test, *(f"{folder}.conftest" for folder in folders)} & self.sources.keys()
        while queue:
            module = queue.pop()
            reached.add(module)
            source = self.sources[module]
            new = set(source.modules)
            for name, modules in source.tables.items():
                tables[name] |= modules
                new |= modules if name in words and not name.endswith("()") else set()
            # In the package, only the words of the recipe's sections count: they hold the defaults.
            written = set() if _in_package(module) and not module.startswith("llmrec.recipe.") else source.words
            for word in (written | source.modules) - words:
                new |= tables.get(word, set()) if not word.endswith("()") else set()
            words |= written | source.modules
            for name in source.names - names if module.startswith("tests.") else ():
                new.update(self.fixtures.get(name, ()))
            if CLI in reached:
                new.update(*(modules for name, modules in tables.items() if name.endswith("()") and name in words))
            queue |= {above for name in new for above in _above(name) if above in self.sources} - reached
        return reached


def _always(node: ast.FunctionDef) -> bool:
    """Whether a function of a ``conftest.py`` runs for every test below it."""
    return node.name.startswith("pytest_") or any("autouse" in ast.unparse(each) for each in node.decorator_list)


def _in_package(module: str) -> bool:
    return module.partition(".")[0] == "llmrec"


def _above(name: str) -> Iterator[str]:
    """Yield a full name and its parent packages, which an import also runs."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def affected(root: Path, files: Iterable[str], changed: Iterable[str]) -> list[str]:
    """Return the test files among ``files`` that any of the ``changed`` files can affect; all are below ``root``."""
    changed = set(changed)
    tree = Tree(root, {*files, *changed})
    tests = {name: path for name, path in tree.paths.items() if name.rpartition(".")[2].startswith("test_")}
    tests = {name: path for name, path in tests.items() if (root / path).is_file()}
    differing = {name for name, path in tree.paths.items() if path in changed}
    for path in sorted(changed - set(tree.paths.values())):
        # Outside of the package, it names only pages and recipes that its messages recommend.
        held = path.startswith(("llmrec/", "prompts/"))
        names = {path, *Path(path).parts} - {"llmrec", "tests", "eval"}
        readers = {
            name for name, source in tree.sources.items() if names & source.words if held or not _in_package(name)
        }
        if not readers or path == "pyproject.toml":
            return sorted(tests.values())
        differing |= readers
    return sorted(path for name, path in tests.items() if tree.reached(name) & differing)


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.split("\0") if line]


def changed_files() -> list[str]:
    """Return the files that differ from where the current branch left main; on main, the uncommitted changes."""
    (base,) = _git("merge-base", "main", "HEAD")
    return [*_git("diff", "--name-only", "--no-renames", "-z", base.strip()), *_new_files()]


def _new_files() -> list[str]:
    return _git("ls-files", "--others", "--exclude-standard", "-z")


if __name__ == "__main__":
    for test in affected(ROOT, [*_git("ls-files", "-z"), *_new_files()], changed_files()):
        sys.stdout.write(test + "\n")
