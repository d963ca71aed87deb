"""`llmrec schema`: the keys of pages, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from llmrec.cli.common import App
from llmrec.cli.show.console import say, tell, written

app = App()


@app.command()
def schema(
    kind: Annotated[
        Literal["recipe", "suite"], typer.Argument(help="Of which pages; suites and benchmarks have one.")
    ] = "recipe",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The file to write; by default it is printed.")
    ] = None,
) -> None:
    """Write the JSON schema of recipes or of suites.

    Editors complete keys and names by it, and mark mistakes.
    """
    from llmrec.cli.show.page_schema import schema_text
    from llmrec.durable import write_text

    text = schema_text(kind)
    if out is None:
        tell(schema=json.loads(text))
        say(text.rstrip())
        return
    write_text(out, text)
    written({"schema": out})
