"""The commands of a service: `llmrec serve`, `llmrec refresh` and `llmrec serve-key`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import format_number, say, show_values, store_facts
from llmrec.serve.options import RefreshOptions, ServeOptions


def serve(options: ServeOptions) -> None:
    """Serve recommendations over HTTP, with a web page.

    Ranking, ratings, explanations and reranking, with business rules. Listens on this machine only, unless --host is
    set; see docs/serving.md.

    Example:
        llmrec serve runs/quickstart --port 8000
    """
    from llmrec.serve.run import serve

    serve(options)


def refresh(options: RefreshOptions) -> None:
    """Add new interactions and items to a served model.

    No request is dropped. Baselines learn from all interactions; --train also continues the fine-tuning of the language
    model.

    Example:
        llmrec refresh runs/orders-auto --events new_orders.csv --out shop-v2
    """
    from llmrec.serve.refresh import refresh

    show_values("refreshed", refresh(options), format_number)


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """Options of `llmrec serve-key`: a key file and a key."""

    file: Annotated[
        Path, OptionHelp(argument=True, metavar="FILE", help="File of API keys. It is created if it does not exist.")
    ]
    name: Annotated[str, OptionHelp(argument=True, metavar="NAME", help="Name of the key in logs and rate limits.")]
    admin: Annotated[bool, OptionHelp(help="Allow the key to change the catalogue and erase users.")] = False
    revoke: Annotated[bool, OptionHelp(help="Revoke the key of this name.")] = False


def serve_key(options: KeyOptions) -> None:
    """Create or revoke an API key for llmrec serve.

    Pass the file to llmrec serve --keys FILE; a running service reloads it.

    Example:
        llmrec serve-key keys.json shop
    """
    from llmrec.serve import keys

    if options.revoke:
        keys.revoke_key(options.file, options.name)
        store_facts(name=options.name, revoked=True)
        say(f"{options.name}: revoked")
        return
    key = keys.create_key(options.file, options.name, admin=options.admin)
    store_facts(name=options.name, key=key)
    say(key)
