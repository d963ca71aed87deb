"""The command `llmrec fuse`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmrec.answer.options import OptionHelp
from llmrec.cli.console import show_run_results


@dataclass(frozen=True, kw_only=True)
class FuseOptions:
    """Options of `llmrec fuse`."""

    runs: Annotated[
        tuple[Path, ...],
        OptionHelp(argument=True, metavar="RUN...", help="Folders of finished runs, evaluated on the same test cases."),
    ]
    out: Annotated[Path, OptionHelp(metavar="FOLDER", help="Output folder.")]


def fuse(options: FuseOptions) -> None:
    """Build ensembles from the models of finished runs.

    Weights are fitted on validation users; no model is run again. Each task gets an ensemble of the models that use
    interactions only, one that adds text-based models, and one that adds language models. All are compared with the
    single models.

    Example:
        llmrec fuse runs/quickstart runs/baselines --out runs/ensemble
    """
    from llmrec.pipeline import run as pipeline

    show_run_results(pipeline.fuse(options.runs, options.out))
