"""The command `llmrec tune`."""

from __future__ import annotations

from llmrec.cli.common import App
from llmrec.cli.options import takes
from llmrec.cli.show.console import say, tell
from llmrec.progress import note
from llmrec.start.tune.options import TuneOptions

app = App()


@app.command()
@takes(TuneOptions)
def tune(options: TuneOptions) -> None:
    """Search a recipe's settings on the validation split.

    Within a budget of time; the best settings are written as a recipe.
    """
    from llmrec.start.tune.run import told, tune

    found = tune(options, say=note)
    tell(**vars(found))
    say(told(found))
