"""The command that writes a recipe for a table: `llmrec init`."""

from __future__ import annotations

from llmrec.cli.common import App
from llmrec.cli.options import takes
from llmrec.cli.show.console import say, tell
from llmrec.start.init.options import InitOptions

app = App()


@app.command()
@takes(InitOptions)
def init(options: InitOptions) -> None:
    """Write a recipe for a table of interactions.

    It says which column was taken for what, and why.
    """
    from llmrec.start.init import start

    made = start.init(
        options.table,
        items=options.items,
        query=options.query,
        out=options.out,
        name=options.name,
        asked=options.asked,
        mend=options.mend,
        force=options.force,
    )
    tell(recipe=made.recipe, found=made.found, then=made.then)
    say(made.told)
