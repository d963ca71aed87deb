"""Pointers into committed results, and arithmetic expressions of them.

A pointer is ``FILE:path``: FILE is ``eval/results/FILE.json``, or with ``references/`` before it
``eval/references/FILE.yaml``. A path has keys separated by ``/``; a key with a space or a slash is in brackets. List
entries are selected by content, never by index: ``rows[name=sasrec]``, ``pairs[a=items & seen=excluded]`` (values are
compared as text, an inner key is written ``metrics.n``). ``*`` is every entry. An object with a ``value`` is replaced
by it.

    generative-beauty:rows[name=items]/tables/excluded/metrics/HR@5
    cold:warm/[HR@10, 1 reserved]

Expressions of pointers and numbers may have ``+ - * /``, surrounded by spaces, and parentheses. Functions: ``abs(x)``;
``min max sum mean count`` of a pointer, which may have several values; ``chance(k, n)``, the exact NDCG@k of a random
order of n candidates with one target; ``t(a , b)`` (with a space before the comma), the paired t statistic of two
pointers with the same number of values, such as training seeds. An expression of numbers only is not a source.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import yaml

TOKEN = re.compile(
    r"\s*(?:(?P<call>abs|min|max|sum|mean|count|chance|t)\(|(?P<number>\d+(?:\.\d+)?)(?=[\s),]|$)"
    r"|(?P<sign>[-+*/(),])(?=\s|\(|$|\)|\w|\[)|(?P<pointer>[\w./-]+:(?:\[[^\]]*\]|[^\s()\[\]])+))"
)
STEP = re.compile(r"\[(?P<inside>[^\]]*)\]|(?P<key>[^/\[\]]+)|/")


class PointerError(Exception):
    """An invalid pointer or expression."""


class Results:
    """The committed results of a checkout, each read once."""

    def __init__(self, root: Path) -> None:
        """Take the root of the checkout."""
        self.root = root
        self.file = functools.cache(self._file)

    def _file(self, name: str) -> Any:
        file = f"eval/{name}.yaml" if name.startswith("references/") else f"eval/results/{name}.json"
        path = self.root / file
        if not path.exists():
            raise PointerError(f"there is no {file}")
        # JSON is YAML, but the JSON parser is a hundred times faster.
        text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)

    def find(self, pointer: str) -> list[Decimal]:
        """Return the numbers of a pointer, in order."""
        return [_number(entry, pointer) for entry in self._entries(pointer)]

    def entry(self, pointer: str) -> dict[str, Any]:
        """Return the single object of a pointer.

        Raises:
            PointerError: If there is none, if there are several, or if it is not an object.
        """
        entries = self._entries(pointer)
        if len(entries) != 1 or not isinstance(entries[0], dict):
            raise PointerError(f"{pointer} leads to {len(entries)} values")
        return entries[0]

    def _entries(self, pointer: str) -> list[Any]:
        name, _, path = pointer.partition(":")
        entries = [self.file(name)]
        for match in STEP.finditer(path):
            if match["key"] is not None:
                entries = [inner for entry in entries for inner in _enter(entry, match["key"], pointer)]
            elif match["inside"] is not None:
                entries = [inner for entry in entries for inner in _select(entry, match["inside"], pointer)]
        return entries

    def value(self, text: str) -> Decimal:
        """Evaluate an expression.

        Raises:
            PointerError: If it cannot be parsed, or a pointer has no value or several.
        """
        tokens = list(_tokens(text))
        if not any(kind == "pointer" or (kind, token) == ("call", "chance") for kind, token in tokens):
            raise PointerError(f"{text!r} names no result")
        with localcontext(prec=40):
            reader = _Reader(tokens, self.find, text)
            value = reader.sum()
            reader.end()
        return value


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while text[position:].strip():
        match = TOKEN.match(text, position)
        if match is None:
            raise PointerError(f"cannot read {text[position:].strip()!r} in {text!r}")
        kind = str(match.lastgroup)
        yield kind, match[kind]
        position = match.end()


class _Reader:
    """Parser of sums, products, parentheses and functions."""

    def __init__(self, tokens: list[tuple[str, str]], find: Callable[[str], list[Decimal]], text: str) -> None:
        self.tokens = tokens
        self.find = find
        self.text = text

    def _next(self) -> tuple[str, str]:
        return self.tokens.pop(0) if self.tokens else ("end", "")

    def _expect(self, sign: str) -> None:
        if self._next() != ("sign", sign):
            raise PointerError(f"{sign!r} is missing in {self.text!r}")

    def end(self) -> None:
        if self.tokens:
            raise PointerError(f"{self.tokens[0][1]!r} is one too many in {self.text!r}")

    def sum(self) -> Decimal:
        value = self._product()
        while self.tokens and self.tokens[0] in {("sign", "+"), ("sign", "-")}:
            sign = self._next()[1]
            value = value + self._product() if sign == "+" else value - self._product()
        return value

    def _product(self) -> Decimal:
        value = self._one()
        while self.tokens and self.tokens[0] in {("sign", "*"), ("sign", "/")}:
            sign = self._next()[1]
            value = value * self._one() if sign == "*" else value / self._one()
        return value

    def _one(self) -> Decimal:
        kind, token = self._next()
        if kind == "number":
            return Decimal(token)
        if kind == "pointer":
            values = self.find(token)
            if len(values) != 1:
                raise PointerError(f"{token} leads to {len(values)} values")
            return values[0]
        if (kind, token) == ("sign", "("):
            value = self.sum()
            self._expect(")")
            return value
        if kind != "call":
            raise PointerError(f"a pointer is missing in {self.text!r}")
        value = self._call(token)
        self._expect(")")
        return value

    def _call(self, name: str) -> Decimal:
        if name == "abs":
            return abs(self.sum())
        if name == "chance":
            cutoff = self.sum()
            self._expect(",")
            return chance(int(cutoff), int(self.sum()))
        values = self._values(name)
        if name == "t":
            self._expect(",")
            return paired_t(values, self._values(name))
        if name == "count":
            return Decimal(len(values))
        if not values:
            raise PointerError(f"{name}() has no values: {self.text!r}")
        if name == "mean":
            return sum(values, Decimal(0)) / len(values)
        return {"min": min, "max": max, "sum": sum}[name](values)  # type: ignore[operator,no-any-return]

    def _values(self, name: str) -> list[Decimal]:
        kind, token = self._next()
        if kind != "pointer":
            raise PointerError(f"{name}() takes a pointer: {self.text!r}")
        return self.find(token)


def paired_t(a: list[Decimal], b: list[Decimal]) -> Decimal:
    """Return the mean difference of pairs over its standard error.

    Raises:
        PointerError: If there are fewer than two pairs, the numbers of values differ, or all differences are equal.
    """
    if len(a) != len(b) or len(a) < 2:
        raise PointerError(f"t() takes pairs: there are {len(a)} and {len(b)} values")
    differences = [first - second for first, second in zip(a, b, strict=True)]
    mean = sum(differences, Decimal(0)) / len(differences)
    square = sum(((difference - mean) ** 2 for difference in differences), Decimal(0)) / (len(differences) - 1)
    if square == 0:
        raise PointerError("t() is undefined: all differences are equal")
    return mean / (square / len(differences)).sqrt()


def chance(cutoff: int, candidates: int) -> Decimal:
    """Return the exact NDCG@cutoff of a random order with one target among a number of candidates."""
    ranks = range(2, min(cutoff, candidates) + 2)
    gains = (Decimal(2).ln() / Decimal(rank).ln() for rank in ranks)
    return sum(gains, Decimal(0)) / candidates


def _enter(value: Any, key: str, pointer: str) -> list[Any]:
    if key == "*":
        return list(value.values()) if isinstance(value, dict) else list(value)
    if not isinstance(value, dict) or key not in value:
        known = ", ".join(map(str, value)) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise PointerError(f"{pointer} leads to nothing: no {key!r} in {known[:200]}")
    return [value[key]]


def _select(value: Any, inside: str, pointer: str) -> list[Any]:
    if "=" not in inside or isinstance(value, dict):
        return _enter(value, inside, pointer)
    if not isinstance(value, list):
        raise PointerError(f"{pointer} leads to nothing: [{inside}] asks for a list")
    conditions = [condition.strip().partition("=")[::2] for condition in inside.split(" & ")]
    matches = [entry for entry in value if all(str(_inner(entry, key)) == expected for key, expected in conditions)]
    if not matches:
        raise PointerError(f"{pointer} leads to nothing: no entry has {inside}")
    return matches


def _inner(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _number(value: Any, pointer: str) -> Decimal:
    if isinstance(value, dict) and "value" in value:
        value = value["value"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PointerError(f"{pointer} leads to no number")
    return Decimal(str(value))
