"""The command `llmrec auto`."""

from __future__ import annotations

from llmrec.cli.common import App
from llmrec.cli.options import takes
from llmrec.cli.show.console import say, tell
from llmrec.progress import note
from llmrec.start.auto.options import AutoOptions

app = App()


@app.command()
@takes(AutoOptions)
def auto(options: AutoOptions) -> None:
    """Build a recommender from a table within a time budget.

    Recommenders are tuned, joined and measured; the best one is ready to serve.
    """
    from llmrec.start.auto import run as autos

    made = autos.auto(options, say=note)
    tell(**autos.record(made, options))
    say(autos.told(made))
