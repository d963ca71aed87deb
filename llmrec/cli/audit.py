"""The command `llmrec audit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmrec.answer.options import About
from llmrec.cli.console import say, store_facts

_MARKS = {"clean": "✓", "notice": "·", "leak": "✗"}


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """A run, and whether its model is asked as well."""

    folder: Annotated[Path, About(argument=True, metavar="RUN", help="A run folder, such as runs/quickstart.")]
    memory: Annotated[bool, About(help="Also ask the untuned model for the catalogue; loads it.")] = False


def audit(options: AuditOptions) -> None:
    """Look for held-out data where it must not be.

    And for what else may explain a figure. Exit code 1 on a leak.
    """
    from llmrec.pipeline import audit as audits

    checks = audits.audit(options.folder, memory=options.memory)
    store_facts(checks=checks)
    for check in checks:
        say(f"{_MARKS[check.verdict]} {check.name}: {check.found}")
        for example in check.examples:
            say(f"    {example}")
    if any(check.verdict == "leak" for check in checks):
        raise typer.Exit(1)
