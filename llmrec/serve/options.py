"""Options of `llmrec serve` and `llmrec refresh`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import BatchSize, ModelOptions, OptionHelp


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """Options of `llmrec serve`."""

    model: Annotated[
        str,
        OptionHelp(
            argument=True, metavar="MODEL", help="Run folder, exported folder, model folder or Hugging Face model name."
        ),
    ]
    models: Annotated[
        tuple[str, ...],
        OptionHelp(
            names=("--models",),
            metavar="NAME",
            help="Model to serve: tuned, untuned, a baseline, another model in the report, or the folder of another "
            "run. Repeatable; the first model is the default.",
        ),
    ] = ()
    host: Annotated[
        str, OptionHelp(help="Address to listen on. 0.0.0.0 listens on all interfaces and requires --keys.")
    ] = "127.0.0.1"
    port: Annotated[int, OptionHelp(least=0, help="Port. 0 selects a free one.")] = 8000
    store: Annotated[
        str | None,
        OptionHelp(
            metavar="FILE|URL",
            help="Storage for new interactions and catalogue changes: a SQLite file or postgresql://... Default: "
            "service.sqlite in the model folder.",
        ),
    ] = None
    keys: Annotated[Path | None, OptionHelp(help="File of API keys, created with llmrec serve-key.")] = None
    per_minute: Annotated[
        int | None, OptionHelp(least=1, help="Rate limit per API key or client address, in requests per minute.")
    ] = None
    rules: Annotated[
        Path | None,
        OptionHelp(help="YAML or JSON file of business rules that apply to every request, see docs/serving.md."),
    ] = None
    batch: BatchSize = 32
    window: Annotated[
        int, OptionHelp(least=0, help="Maximum time to wait for further requests of a batch, in milliseconds.")
    ] = 5
    room: Annotated[
        int, OptionHelp(least=1, help="Maximum number of queued requests. Further requests get HTTP status 429.")
    ] = 256
    timeout: Annotated[int, OptionHelp(least=1, help="Request timeout, in seconds.")] = 60
    body_limit: Annotated[int, OptionHelp(least=1024, help="Maximum size of a request body, in bytes.")] = 1 << 20
    mcp: Annotated[bool, OptionHelp(help="Also serve the Model Context Protocol (MCP) at /mcp.")] = False


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """Options of `llmrec refresh`."""

    model: Annotated[
        str, OptionHelp(argument=True, metavar="MODEL", help="Run folder, or the output folder of an earlier refresh.")
    ]
    events: Annotated[
        str | None,
        OptionHelp(
            metavar="FILE|STORE",
            help="New interactions: a table, or the storage of a service (file or postgresql://...).",
        ),
    ] = None
    items: Annotated[Path | None, OptionHelp(help="Table of new items with item_id, title and fields.")] = None
    out: Annotated[
        Path | None,
        OptionHelp(
            metavar="FOLDER", help="Output folder. Default: the folder of an earlier refresh, updated in place."
        ),
    ] = None
    train: Annotated[
        int | None,
        OptionHelp(least=1, metavar="STEPS", help="Number of further training steps, on all interactions."),
    ] = None
    server: Annotated[
        str | None,
        OptionHelp(
            metavar="URL", help="URL of the service that serves the output folder, to make it reload the models."
        ),
    ] = None
    key_env: Annotated[
        str | None,
        OptionHelp(metavar="VARIABLE", help="With --server: environment variable that holds an admin API key."),
    ] = None
