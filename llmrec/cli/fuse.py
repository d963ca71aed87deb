"""The command `llmrec fuse`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import About
from llmrec.cli.console import finish


@dataclass(frozen=True, kw_only=True)
class FuseOptions:
    """Runs, and the folder of their ensembles."""

    runs: Annotated[tuple[Path, ...], About(argument=True, metavar="RUN...", help="Finished runs over the same cases.")]
    out: Annotated[Path, About(metavar="FOLDER", help="The folder to write.")]


def fuse(options: FuseOptions) -> None:
    """Combine the rows of finished runs into ensembles.

    Weights come from users of the validation split. Nothing is asked again. Each family gets the fusion of rows that
    know events alone, of those that read texts too, and of all with the language models, beside the rows themselves and
    compared with them.
    """
    from llmrec.pipeline import run as pipeline

    finish(pipeline.fuse(options.runs, options.out))
