"""Requirements in packages' metadata: which of them an installed version does not meet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^]]*\])?\s*\(?([^;()]*)\)?\s*(?:;(.*))?$")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
_CLAUSE = re.compile(r"\s*(===|==|!=|~=|>=|<=|>|<)\s*([^,\s]+)\s*")


@dataclass(frozen=True)
class Wanted:
    """One requirement: a package by its normalised name, and a specifier such as ``>=5.16,<6`` (may be empty)."""

    name: str
    specifier: str


def normal(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted(texts: Iterable[str], extra: str = "") -> list[Wanted]:
    """Return what applies here of a package's ``Requires-Dist`` lines: of its core, or of one extra.

    Markers are evaluated by ``packaging``. Where that is not installed, a line with a marker other than an extra is
    left out, since it cannot be judged.
    """
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return _wanted_plainly(texts, extra)
    found = []
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        core = marker is None or marker.evaluate({"extra": ""})
        applies = core if not extra else not core and marker is not None and marker.evaluate({"extra": extra})
        if applies:
            found.append(Wanted(normal(requirement.name), str(requirement.specifier)))
    return found


def _wanted_plainly(texts: Iterable[str], extra: str) -> list[Wanted]:
    found = []
    for text in texts:
        match = _REQUIREMENT.match(text)
        if match is None:
            continue
        name, specifier, marker = match.group(1), match.group(2).strip(), (match.group(3) or "").strip()
        of = _EXTRA.fullmatch(marker)
        if (of.group(1) if of else marker) == extra:
            found.append(Wanted(normal(name), specifier))
    return found


def extras(texts: Iterable[str]) -> list[str]:
    """Return the extras that a package declares, in the order of its metadata."""
    return list(dict.fromkeys(name for text in texts for name in _EXTRA.findall(text)))


def misfit(version: str, specifier: str) -> str:
    """Say how a version misses a specifier: ``too old``, ``too new``, ``another version``, or nothing if it fits.

    Local parts are left out of the comparison: ``2.13.0+cpu`` is 2.13.0, built otherwise.
    """
    public = version.partition("+")[0]
    for operator, bound in _CLAUSE.findall(specifier):
        bound = bound.partition("+")[0]
        if _meets(public, operator, bound):
            continue
        if operator in (">=", ">"):
            return "too old"
        if operator in ("<", "<="):
            return "too new"
        return "too old" if _numbers(public) < _numbers(bound) else "too new" if operator != "!=" else "another version"
    return ""


def _meets(version: str, operator: str, bound: str) -> bool:
    try:
        from packaging.specifiers import InvalidSpecifier, SpecifierSet
    except ImportError:
        return _meets_plainly(version, operator, bound)
    try:
        return SpecifierSet(operator + bound).contains(version, prereleases=True)
    except InvalidSpecifier:
        return True


def _meets_plainly(version: str, operator: str, bound: str) -> bool:
    ours, theirs = _numbers(version), _numbers(bound)
    if bound.endswith(".*"):
        same = ours[: len(theirs)] == theirs
        return same if operator == "==" else not same
    width = max(len(ours), len(theirs))
    a, b = (numbers + (0,) * (width - len(numbers)) for numbers in (ours, theirs))
    if operator == "~=":
        return a >= b and ours[: len(theirs) - 1] == theirs[:-1]
    return {">=": a >= b, "<=": a <= b, ">": a > b, "<": a < b, "!=": a != b}.get(operator, a == b)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading whole numbers of a version: ``5.16.0rc1`` is (5, 16, 0)."""
    found = []
    for part in version.split("."):
        match = re.match(r"\d+", part)
        if match is None:
            break
        found.append(int(match.group()))
        if match.group() != part:
            break
    return tuple(found)
