"""The command `llmrec compress`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import say, show_values


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Options of `llmrec compress`."""

    run: Annotated[
        Path, OptionHelp(argument=True, metavar="RUN", help="Folder of a finished run whose model predicts labels.")
    ]
    target_ms: Annotated[
        float, OptionHelp(least=0, help="Maximum latency of scoring 20 candidates on this machine, in milliseconds.")
    ]
    out: Annotated[Path, OptionHelp(metavar="FOLDER", help="Output folder of the export.")]
    users: Annotated[int, OptionHelp(least=1, help="Number of validation users to evaluate on.")] = 50
    depths: Annotated[
        tuple[int, ...], OptionHelp(names=("--depth",), least=1, help="Number of layers to keep. Repeatable.")
    ] = ()
    force: Annotated[bool, OptionHelp(help="Overwrite an earlier export.")] = False


def compress(options: CompressOptions) -> None:
    """Export the best model below a latency limit.

    Measures the fine-tuned model with fewer layers and other data types. Writes RUN/compress.json. Exit code 1 if no
    version is fast enough; nothing is exported then.

    Example:
        llmrec compress runs/labels --target-ms 100 --out films-small
    """
    from llmrec.systems.m6.compress import compress as compressing

    result = compressing.compress_model(
        options.run,
        options.out,
        target_ms=options.target_ms,
        users=options.users,
        depths=options.depths,
        force=options.force,
    )
    lines = {
        f"{row.layers} layers, {row.dtype}": f"{result.metric} {row.quality}, {row.ms:.0f} ms, {row.mb:.0f} MB"
        + (", Pareto" if row.pareto else "")
        for row in result.rows
    }
    show_values("20 candidates", lines, record={"compressed": result})
    if result.chosen is None:
        say(f"no compressed model takes at most {options.target_ms:g} ms, so nothing was exported")
        raise typer.Exit(1)
    say(f"exported: {options.out}, {result.chosen.layers} layers, {result.chosen.dtype}")
