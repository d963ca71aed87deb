"""The commands of a service: `llmrec serve`, `llmrec refresh` and `llmrec serve-key`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About
from llmrec.cli.console import say, short, show, store_facts
from llmrec.serve.options import RefreshOptions, ServeOptions


def serve(options: ServeOptions) -> None:
    """Serve a model over HTTP, with a page to look at.

    Rank, rate, explain, rerank, and what a shop needs. It listens on this machine alone; docs/serve.md has the
    endpoints, keys, rules and containers.
    """
    from llmrec.serve.run import serve

    serve(options)


def refresh(options: RefreshOptions) -> None:
    """Add new events and items to a folder that is served.

    No request is dropped. Statistics and neighbours learn from all events; --train goes on training the model as well.
    """
    from llmrec.serve.refresh import refresh

    show("refreshed", refresh(options), short)


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """A file of keys, and one of them."""

    file: Annotated[
        Path, About(argument=True, metavar="FILE", help="The file of keys, which is made where it is not there.")
    ]
    name: Annotated[str, About(argument=True, metavar="NAME", help="What the key is called in logs and limits.")]
    admin: Annotated[bool, About(help="It may change the catalogue and erase users.")] = False
    revoke: Annotated[bool, About(help="Take the key of this name back.")] = False


def serve_key(options: KeyOptions) -> None:
    """Make an API key for `llmrec serve`, or revoke one.

    They are in the file of `llmrec serve --keys FILE`; a running service notices.
    """
    from llmrec.serve import keys

    if options.revoke:
        keys.revoke(options.file, options.name)
        store_facts(name=options.name, revoked=True)
        say(f"{options.name}: taken back")
        return
    key = keys.new_key(options.file, options.name, admin=options.admin)
    store_facts(name=options.name, key=key)
    say(key)
