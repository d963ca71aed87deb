"""The command `llmrec predict`."""

from __future__ import annotations

import typer

from llmrec.answer.predict.options import PredictOptions
from llmrec.cli.console import short, show


def predict(options: PredictOptions) -> None:
    """Answer a file of questions about one item each.

    Ratings, yes or no, explanations, reviews. A killed call resumes where it was. Exit code 0: every line answered; 1:
    some failed, and say why; 2: nothing done.
    """
    from llmrec.answer.predict.run import predict_file

    summary = predict_file(options)
    show("answers", summary, short)
    raise typer.Exit(int(summary["failed"] != 0))
