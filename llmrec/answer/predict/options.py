"""The options of `llmrec predict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import BatchSize, ModelOptions, OptionHelp, Template
from llmrec.recipe.shared import BATCH


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelOptions):
    """Input file, output file and model of `llmrec predict`."""

    requests: Annotated[
        Path, OptionHelp(names=("--in",), help="Input file (.jsonl, .csv, .tsv or .parquet), with one item per row.")
    ]
    out: Annotated[Path | None, OptionHelp(help="Output file, in any of the input formats.")] = None
    to: Annotated[
        str | None,
        OptionHelp(
            metavar="URL",
            help="Database for the table predictions, instead of --out: .db, sqlite:///FILE, duckdb:///FILE or "
            "postgresql://...",
        ),
    ] = None
    family: Annotated[
        str,
        OptionHelp(
            metavar="NAME",
            help="Task: rating, ctr, explanation, review or stars. Default: the trained task, if there is only one.",
        ),
    ] = "auto"
    template: Template = None
    strategy: Annotated[
        str, OptionHelp(metavar="auto|NAME", help="Prediction method, see docs/ranking-methods.md.")
    ] = "auto"
    batch: BatchSize = BATCH
    limit: Annotated[int | None, OptionHelp(least=1, help="Process only the first N rows.")] = None
    restart: Annotated[bool, OptionHelp(help="Overwrite an output file that was changed, or an existing table.")] = (
        False
    )
