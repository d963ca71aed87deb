"""The command `llmrec audit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import say, store_facts

_MARKS = {"clean": "✓", "notice": "·", "leak": "✗"}


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Options of `llmrec audit`."""

    folder: Annotated[Path, OptionHelp(argument=True, metavar="RUN", help="Run folder, such as runs/quickstart.")]
    memory: Annotated[
        bool, OptionHelp(help="Also test whether the untuned model has memorised the catalogue. Loads the model.")
    ] = False


def audit(options: AuditOptions) -> None:
    """Check a run for data leakage.

    Also reports other facts that may explain a result, such as popular targets. Exit code 1 if there is a leak.

    Example:
        llmrec audit runs/quickstart
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
