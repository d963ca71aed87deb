"""The rows of finished runs, read back with every value of every request: for ensembles and comparisons of runs."""

from __future__ import annotations

from pathlib import Path

from llmrec.durable import checked
from llmrec.errors import DataError
from llmrec.pipeline.evaluation import ResultRow, row_of
from llmrec.report.results import content_of, fix_for, results_of
from llmrec.results import Results, Row


def finished(run: Path) -> Results:
    """Return the results of a run folder that holds its rows too.

    Raises:
        DataError: If it is not finished, or its results cannot be read.
    """
    path = run / "results.json"
    if not path.is_file() or not (run / "rows").is_dir():
        raise DataError(
            f"{run} is no finished run: it has no results.json with rows/ beside it; run its recipe",
            kind="missing-file",
            at=run,
        )
    return results_of(content_of(run), source=str(path), fix=fix_for(run))


def stored_row(run: Path, figures: Row) -> ResultRow:
    """Return a row of a run folder as it was stored.

    Args:
        run: The folder.
        figures: The row, as the results have it.

    Raises:
        DataError: If its file is missing or cannot be read.
    """
    path = run / "rows" / (figures.id.replace("/", ".") + ".json")
    if not path.is_file():
        raise DataError(f"{path} is missing; run the recipe of {run} again", kind="missing-file", at=path)
    try:
        return row_of(checked(path.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}); run the recipe of {run} again", kind="damaged", at=path
        ) from error
