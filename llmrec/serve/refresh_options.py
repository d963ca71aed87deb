"""What `llmrec refresh` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """A model, and what has happened since it was tuned."""

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
