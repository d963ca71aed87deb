"""What `llmrec predict` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """A file of questions, a file of answers, and what answers."""

    requests: Annotated[
        Path, About(names=("--in",), help="Questions: .jsonl, .csv, .tsv or .parquet, each with an 'item'.")
    ]
    out: Annotated[Path, About(help="Answers, in any of these formats.")]
    model: Annotated[str, About(help="A run folder, an exported folder, a model folder or hub name.")]
    family: Annotated[
        str, About(metavar="NAME", help="rating, ctr, explanation, review or stars; default: the only one tuned.")
    ] = "auto"
    items: Annotated[Path | None, About(help="Table of items: item_id, title. Default: the run's own data.")] = None
    template: Annotated[
        str | None, About(metavar="NAME", help="Default: the one that the model was evaluated with.")
    ] = None
    strategy: Annotated[str, About(metavar="auto|NAME", help="How it is asked; docs/strategies.md.")] = "auto"
    backend: Annotated[str, About(choices=("auto", "hf", "vllm", "openai"), help="Engine.")] = "auto"
    dtype: Annotated[str, About(choices=("auto", "float32", "bfloat16", "float16"), help="Of the weights.")] = "auto"
    batch: Annotated[int, About(least=1, help="Questions handed to the engine at a time.")] = 64
    limit: Annotated[int | None, About(least=1, help="Answer the first so many questions only.")] = None
