"""The options of `llmrec predict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About, BatchSize, ModelOptions, Template
from llmrec.recipe.shared import BATCH


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelOptions):
    """A file of questions, a file of answers, and what answers."""

    requests: Annotated[
        Path, About(names=("--in",), help="Questions: .jsonl, .csv, .tsv or .parquet, each with an 'item'.")
    ]
    out: Annotated[Path, About(help="Answers, in any of these formats.")]
    family: Annotated[
        str, About(metavar="NAME", help="rating, ctr, explanation, review or stars; default: the only one tuned.")
    ] = "auto"
    template: Template = None
    strategy: Annotated[str, About(metavar="auto|NAME", help="Method; docs/ranking-methods.md lists them.")] = "auto"
    batch: BatchSize = BATCH
    limit: Annotated[int | None, About(least=1, help="Answer the first so many questions only.")] = None
