"""Options of `llmrec serve` and `llmrec refresh`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About, BatchSize, ModelOptions


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """A model, and the configuration of its service."""

    model: Annotated[
        str, About(argument=True, metavar="MODEL", help="A run folder, an exported folder, a model folder or hub name.")
    ]
    models: Annotated[
        tuple[str, ...],
        About(
            names=("--models",),
            metavar="NAME",
            help="What answers, the default first; repeatable: tuned, untuned, a report row, a baseline, another run.",
        ),
    ] = ()
    host: Annotated[str, About(help="Address to listen at; 0.0.0.0 for all, which takes --keys.")] = "127.0.0.1"
    port: Annotated[int, About(least=0, help="Port; 0 takes a free one.")] = 8000
    store: Annotated[
        str | None,
        About(metavar="FILE|URL", help="Events and changed items: a file, or postgresql://...; RUN/service.sqlite."),
    ] = None
    keys: Annotated[Path | None, About(help="File of API keys, made by `llmrec serve-key`.")] = None
    per_minute: Annotated[int | None, About(least=1, help="Requests of one key or address in a minute.")] = None
    rules: Annotated[Path | None, About(help="YAML or JSON file of rules that always stand; see docs/serve.md.")] = None
    batch: BatchSize = 32
    window: Annotated[int, About(least=0, help="Milliseconds that a question waits for others.")] = 5
    room: Annotated[int, About(least=1, help="Questions that may wait; more are refused with 429.")] = 256
    timeout: Annotated[int, About(least=1, help="Seconds that a question may take.")] = 60
    body_limit: Annotated[int, About(least=1024, help="Bytes of a body.")] = 1 << 20
    mcp: Annotated[bool, About(help="Offer the verbs to agents as well, at /mcp.")] = False


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """A model, and the events and items since its training."""

    model: Annotated[
        str, About(argument=True, metavar="MODEL", help="A run folder, or a folder that was refreshed before.")
    ]
    events: Annotated[
        str | None,
        About(metavar="FILE|STORE", help="New events: a table, or the store of a service (file or postgresql://)."),
    ] = None
    items: Annotated[Path | None, About(help="Table of new items: item_id, title and fields.")] = None
    out: Annotated[
        Path | None, About(metavar="FOLDER", help="The folder to write; a refreshed one is renewed in its place.")
    ] = None
    train: Annotated[
        int | None, About(least=1, metavar="STEPS", help="Also go on training for so many steps, on all events.")
    ] = None
    server: Annotated[
        str | None, About(metavar="URL", help="Tell a service that serves the folder to read it anew.")
    ] = None
    key_env: Annotated[
        str | None, About(metavar="VARIABLE", help="With --server: the environment variable that holds an admin key.")
    ] = None
