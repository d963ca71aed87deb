"""The command `llmrec compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrec.cli.common import App
from llmrec.cli.show.console import say, show

app = App()


@app.command()
def compress(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder whose answers are labels.")],
    target_ms: Annotated[
        float, typer.Option("--target-ms", min=0, help="Milliseconds that 20 candidates may take here.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder of the export.")],
    users: Annotated[int, typer.Option("--users", min=1, help="Validation users that decide.")] = 50,
    depths: Annotated[
        list[int] | None, typer.Option("--depth", min=1, help="Layers to answer behind; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Export the best smaller version that is fast enough.

    A tuned model is measured at several depths and in several dtypes. Writes RUN/compress.json. Exit code 1: none is
    fast enough, and nothing was exported.
    """
    from llmrec.systems.m6.compress.compress import compress as compressed

    found = compressed(run, out, target_ms=target_ms, users=users, depths=tuple(depths or ()), force=force)
    lines = {
        f"{row.layers} layers, {row.dtype}": f"{found.metric} {row.quality}, {row.ms:.0f} ms, {row.mb:.0f} MB"
        + (", Pareto" if row.pareto else "")
        for row in found.rows
    }
    show("20 candidates", lines, told={"compressed": found})
    if found.chosen is None:
        say(f"none takes {target_ms:g} ms or less, and nothing was exported")
        raise typer.Exit(1)
    say(f"exported: {out}, {found.chosen.layers} layers, {found.chosen.dtype}")
