"""The command `llmrec tune`."""

from __future__ import annotations

from llmrec.commands.common import App
from llmrec.commands.options import takes
from llmrec.commands.show.console import say, tell
from llmrec.commands.tune.options import TuneOptions
from llmrec.progress import note

app = App()


@app.command()
@takes(TuneOptions)
def tune(options: TuneOptions) -> None:
    """Search a recipe's settings on the validation split.

    Within a budget of time; the best settings are written as a recipe.
    """
    from llmrec.commands.tune.run import told, tune

    found = tune(options, say=note)
    tell(**vars(found))
    say(told(found))
