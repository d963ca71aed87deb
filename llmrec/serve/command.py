"""The commands of a service: `llmrec serve`, `llmrec refresh` and `llmrec serve-key`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrec.cli.common import App
from llmrec.cli.options import takes
from llmrec.cli.show.console import say, short, show, tell
from llmrec.serve.options import ServeOptions
from llmrec.serve.refresh_options import RefreshOptions

app = App()


@app.command()
@takes(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Serve a model over HTTP, with a page to look at.

    Rank, rate, explain, rerank, and what a shop needs. It listens on this machine alone; docs/serve.md has the
    endpoints, keys, rules and containers.
    """
    from llmrec.serve.run import serve

    serve(options)


@app.command()
@takes(RefreshOptions)
def refresh(options: RefreshOptions) -> None:
    """Add new events and items to a folder that is served.

    No request is dropped. Statistics and neighbours learn from all events; --train goes on training the model as well.
    """
    from llmrec.serve.refresh import refresh

    show("refreshed", refresh(options), short)


@app.command("serve-key")
def serve_key(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file of keys, which is made where it is not there.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is called in logs and limits.")],
    admin: Annotated[bool, typer.Option("--admin", help="It may change the catalogue and erase users.")] = False,
    revoke: Annotated[bool, typer.Option("--revoke", help="Take the key of this name back.")] = False,
) -> None:
    """Make an API key for `llmrec serve`, or revoke one.

    They are in the file of `llmrec serve --keys FILE`; a running service notices.
    """
    from llmrec.serve import keys

    if revoke:
        keys.revoke(file, name)
        tell(name=name, revoked=True)
        say(f"{name}: taken back")
        return
    key = keys.new_key(file, name, admin=admin)
    tell(name=name, key=key)
    say(key)
