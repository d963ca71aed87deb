"""The command `llmrec compress`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmrec.answer.options import About
from llmrec.cli.console import say, show


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """A run, the time that its answers may take, and the folder of the export."""

    run: Annotated[Path, About(argument=True, metavar="RUN", help="A finished run folder whose answers are labels.")]
    target_ms: Annotated[float, About(least=0, help="Milliseconds that 20 candidates may take here.")]
    out: Annotated[Path, About(metavar="FOLDER", help="The folder of the export.")]
    users: Annotated[int, About(least=1, help="Validation users that decide.")] = 50
    depths: Annotated[
        tuple[int, ...], About(names=("--depth",), least=1, help="Layers to answer behind; may be repeated.")
    ] = ()
    force: Annotated[bool, About(help="Replace an earlier export.")] = False


def compress(options: CompressOptions) -> None:
    """Export the best smaller version that is fast enough.

    A tuned model is measured at several depths and in several dtypes. Writes RUN/compress.json. Exit code 1: none is
    fast enough, and nothing was exported.
    """
    from llmrec.systems.m6.compress import compress as compressing

    made = compressing.compress(
        options.run,
        options.out,
        target_ms=options.target_ms,
        users=options.users,
        depths=options.depths,
        force=options.force,
    )
    lines = {
        f"{row.layers} layers, {row.dtype}": f"{made.metric} {row.quality}, {row.ms:.0f} ms, {row.mb:.0f} MB"
        + (", Pareto" if row.pareto else "")
        for row in made.rows
    }
    show("20 candidates", lines, record={"compressed": made})
    if made.chosen is None:
        say(f"none takes {options.target_ms:g} ms or less, and nothing was exported")
        raise typer.Exit(1)
    say(f"exported: {options.out}, {made.chosen.layers} layers, {made.chosen.dtype}")
