"""The command `llmrec auto`."""

from __future__ import annotations

from llmrec.commands.auto.options import AutoOptions
from llmrec.commands.common import App
from llmrec.commands.options import takes
from llmrec.commands.show.console import say, tell
from llmrec.progress import note

app = App()


@app.command()
@takes(AutoOptions)
def auto(options: AutoOptions) -> None:
    """From a table to a recommender that is ready to serve, within a budget of time: tuned, joined, measured."""
    from llmrec.commands.auto import run as autos

    made = autos.auto(options, say=note)
    tell(**autos.record(made, options))
    say(autos.told(made))
