"""The small part of Jinja that prompt templates may use: whitelisted on the syntax tree, then compiled.

Variables, one attribute deep; ``if`` with comparisons, ``and``, ``or``, ``not``; one level of ``for`` over a list
variable with ``loop.first``, ``loop.last``, ``loop.index``. There are no calls, filters, arithmetic or nested loops,
so a template can neither reach outside its values nor run for long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from jinja2 import StrictUndefined, Template, TemplateError, Undefined, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmrec.errors import RecipeError
from llmrec.prompts.values import Record

FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\uf8ff\U000f0000-\U0010ffff]")
"""Characters that no template may hold: control and line separators, surrogates, private use."""

_DEPTH_LIMIT = 24
_LOOP = ("first", "last", "index")
_STATEMENTS = (nodes.Output, nodes.TemplateData, nodes.If, nodes.For)
_EXPRESSIONS = (nodes.Name, nodes.Getattr, nodes.Const, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not)


class Refused(Exception):
    """A construct outside the grammar, at a line of the template text."""

    def __init__(self, line: int, construct: str) -> None:
        super().__init__(construct)
        self.line = line
        self.construct = construct


@dataclass(frozen=True)
class Compiled:
    """A template text that keeps to the grammar, with the variables that it mentions."""

    names: frozenset[str]
    source: str

    @cached_property
    def template(self) -> Template:
        """What renders it; compiled when it is first asked for, since most of the shipped ones are only checked."""
        return _ENVIRONMENT.from_string(self.source)

    @cached_property
    def _plain(self) -> tuple[str | tuple[str, str], ...] | None:
        """Texts, and fields of variables; None where there is more than that."""
        found: list[str | tuple[str, str]] = []
        for node in _ENVIRONMENT.parse(self.source).body:
            for piece in node.nodes if isinstance(node, nodes.Output) else (node,):
                if isinstance(piece, nodes.TemplateData):
                    found.append(piece.data)
                elif isinstance(piece, nodes.Getattr) and isinstance(piece.node, nodes.Name):
                    found.append((piece.node.name, piece.attr))
                else:
                    return None
        return tuple(found)

    def rendered(self, values: Mapping[str, object]) -> Iterator[str]:
        """Yield the text in pieces.

        Args:
            values: Of every variable, wrapped by a `Ledger`.

        Raises:
            TemplateError, RecipeError, TypeError, ValueError: If a value does not do.
        """
        plain = self._plain
        if plain is None or not all(isinstance(values[piece[0]], Record) for piece in plain if type(piece) is tuple):
            yield from self.template.generate(values)
            return
        # Most leads and targets, one for each step of a list: a context of Jinja would cost more than the text.
        for piece in plain:
            yield piece if isinstance(piece, str) else str(_finalize(getattr(values[piece[0]], piece[1])))


def _finalize(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, list) or (callable(value) and not isinstance(value, Undefined)):
        raise RecipeError(
            "a list or record cannot be shown whole; loop over it, or name one of its fields", kind="bad-value"
        )
    return value


class _Sandbox(ImmutableSandboxedEnvironment):
    def getattr(self, obj: object, attribute: str) -> object:
        # Nothing but data can be reached there, and the grammar knows no name that begins with an underscore.
        return getattr(obj, attribute) if type(obj) is Record else super().getattr(obj, attribute)


_ENVIRONMENT = _Sandbox(
    undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_finalize, cache_size=0
)
_ENVIRONMENT.globals.clear()
_ENVIRONMENT.filters.clear()
_ENVIRONMENT.tests.clear()


@lru_cache(maxsize=1024)
def compiled(source: str) -> Compiled:
    """Check a template text against the grammar.

    Raises:
        Refused: If it holds anything else; naming the line and the construct.
    """
    names: set[str] = set()
    try:
        for node in _ENVIRONMENT.parse(source).body:
            _walk(node, 0, None, names)
        return Compiled(frozenset(names), source)
    except TemplateError as error:
        raise Refused(getattr(error, "lineno", None) or 1, str(error.message)) from None
    except (RecursionError, ValueError, MemoryError, OverflowError, SyntaxError):
        raise Refused(1, "an expression too deep or a number too long to read") from None


def _walk(node: nodes.Node, depth: int, bound: str | None, names: set[str]) -> None:
    """Refuse whatever is not on the whitelist, and collect free variables; ``bound`` is the loop's own name."""
    if depth > _DEPTH_LIMIT:
        raise Refused(node.lineno, f"more than {_DEPTH_LIMIT} levels of nesting")
    if not isinstance(node, _STATEMENTS + _EXPRESSIONS):
        raise Refused(node.lineno, f"{type(node).__name__.lower()} is not in the grammar")
    if isinstance(node, nodes.Const) and isinstance(node.value, str) and FORBIDDEN.search(node.value):
        raise Refused(node.lineno, "a control or private-use character")
    if isinstance(node, nodes.Getattr):
        _walk_attribute(node, bound, names)
    elif isinstance(node, nodes.Name):
        if node.name == "loop":
            raise Refused(node.lineno, "loop stands alone; use loop.first, loop.last or loop.index inside a for")
        if node.name != bound:
            names.add(node.name)
    elif isinstance(node, nodes.For):
        _walk_for(node, depth, bound, names)
    else:
        for child in node.iter_child_nodes():
            _walk(child, depth + 1, bound, names)


def _walk_attribute(node: nodes.Getattr, bound: str | None, names: set[str]) -> None:
    owner = node.node
    if not isinstance(owner, nodes.Name):
        raise Refused(node.lineno, f"attribute {node.attr!r} of something that is no plain variable")
    if node.attr.startswith("_"):
        raise Refused(node.lineno, f"attribute {node.attr!r} starts with an underscore")
    if owner.name == "loop":
        if bound is None or node.attr not in _LOOP:
            raise Refused(node.lineno, f"loop.{node.attr}; inside a for there are loop.first, loop.last and loop.index")
    elif owner.name != bound:
        names.add(owner.name)


def _walk_for(node: nodes.For, depth: int, bound: str | None, names: set[str]) -> None:
    if bound is not None:
        raise Refused(node.lineno, "a for inside a for")
    if node.recursive or node.test is not None:
        raise Refused(node.lineno, "a recursive or filtered for; put an if inside it")
    if not isinstance(node.iter, nodes.Name) or not isinstance(node.target, nodes.Name):
        raise Refused(node.lineno, "a for over something that is no plain list variable")
    if node.target.name == "loop":
        # Jinja refuses it when it compiles, which is done when the text is first rendered.
        raise Refused(node.lineno, "a loop variable of the name loop, which is the loop itself")
    _walk(node.iter, depth + 1, None, names)
    for child in node.body:
        _walk(child, depth + 1, node.target.name, names)
    for child in node.else_:
        _walk(child, depth + 1, None, names)
