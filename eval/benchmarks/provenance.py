"""The provenance of benchmark results: what every script records, and what a committed result lacks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from llmrec.machine import commit_hash, machine_facts, package_versions

EXCEPTIONS = "eval/provenance.yaml"
"""The committed results that lack a part, by reason."""
# At the start of the process, because a script that writes its results step by step changes the checkout itself.
_COMMIT = commit_hash()


def provenance() -> dict[str, Any]:
    """Return the machine, package versions, the commit at the start, and the seconds since the process started."""
    duration = round(time.time() - psutil.Process().create_time(), 1)
    return {"machine": machine_facts(), "versions": package_versions(), "commit": _COMMIT, "duration": duration}


_PARTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "command": lambda result: result.get("command"),
    # A plus sign marks uncommitted changes.
    "commit": lambda result: result.get("commit") and not str(result["commit"]).endswith("+"),
    "duration": lambda result: result.get("duration") or result.get("seconds"),
    "machine": lambda result: result.get("machine"),
    "version": lambda result: result.get("llmrec") or result.get("versions", {}).get("llmrec"),
}


def lacking(result: Mapping[str, Any], root: Path) -> set[str]:
    """Return the parts of the provenance that a result lacks; `EXCEPTIONS` explains them."""
    missing = {name for name, find in _PARTS.items() if not find(result)}
    return missing if _exists(result, root) else {*missing, "script"}


def _exists(result: Mapping[str, Any], root: Path) -> bool:
    """Return whether the recipes, benchmark files and scripts that a result's command names are in a checkout."""
    command = str(result.get("command", ""))
    pages = re.findall(r"\b(?:recipes|eval/suites)/[\w./-]+\.yaml", command)
    modules = (name.replace(".", "/") for name in re.findall(r"\beval\.benchmarks\.([\w.]+)", command))
    known = yaml.safe_load((root / "eval" / "benchmarks" / "commands.yaml").read_text(encoding="utf-8"))
    return (
        all((root / page).exists() for page in pages)
        and all(
            any((root / f"eval/benchmarks/{name}{end}").exists() for end in (".py", "/__main__.py")) for name in modules
        )
        and set(re.findall(r"\bNAME=([\w-]+)", command)) <= known.keys()
    )
