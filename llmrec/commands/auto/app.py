"""The command that searches within a budget: `llmrec auto`."""

from __future__ import annotations

import typer

from llmrec.commands.auto.options import AutoOptions
from llmrec.commands.options import takes
from llmrec.commands.show.console import say

app = typer.Typer(rich_markup_mode=None)


@app.command()
@takes(AutoOptions)
def auto(options: AutoOptions) -> None:
    """From a table to a recommender that is ready to serve, within a budget of time: tuned, joined, measured."""
    from llmrec.commands.auto import run as autos

    made = autos.auto(options, say=(lambda line: None) if options.quiet else say)
    say(autos.told(made))
