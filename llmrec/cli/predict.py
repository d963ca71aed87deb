"""The command `llmrec predict`."""

from __future__ import annotations

import typer

from llmrec.answer.predict.options import PredictOptions
from llmrec.cli.console import format_number, show_values


def predict(options: PredictOptions) -> None:
    """Predict ratings, clicks or texts for a file of items.

    Supports ratings, yes/no predictions, explanations and reviews. An interrupted run resumes. Exit code 0: all rows
    processed; 1: some failed, with the reason in the output; 2: nothing was done.

    Example:
        llmrec predict --model runs/quickstart --in pairs.csv --out ratings.csv --family rating
    """
    from llmrec.answer.predict.run import predict_file

    summary = predict_file(options)
    show_values("answers", summary, format_number)
    raise typer.Exit(int(summary["failed"] != 0))
