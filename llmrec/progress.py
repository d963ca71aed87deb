"""Progress bars: they stand on the error stream, and one switch hides them all."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET = "LLMREC_QUIET"
"""In the environment, so that processes which are started know it too: no bars, and nothing that libraries mention."""


def bars(*texts: str, left: str = "left", quiet: bool = False, piped: bool = True, transient: bool = False) -> Progress:
    """Return a line of progress for each task that is added: its description, a bar, counts and times.

    Args:
        texts: Columns after the counts, such as ``"loss {task.fields[loss]}"``.
        left: What stands before the time that remains.
        quiet: Show nothing.
        piped: Show the last state where the error stream is no terminal.
        transient: Take the line away at the end.
    """
    # rich takes a tenth of a second to import, which commands that show no bar need not spend.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *map(TextColumn, texts),
        TimeElapsedColumn(),
        TextColumn(left),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet or QUIET in os.environ or not (piped or sys.stderr.isatty()),
        transient=transient,
    )
