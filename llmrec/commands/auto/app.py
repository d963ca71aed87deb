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
    """Build a recommender from a table within a time budget.

    Recommenders are tuned, joined and measured; the best one is ready to serve.
    """
    from llmrec.commands.auto import run as autos

    made = autos.auto(options, say=note)
    tell(**autos.record(made, options))
    say(autos.told(made))
