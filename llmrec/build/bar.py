"""One line of progress for a row of answers."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """One progress line a row."""

    def __init__(self, name: str, total: int, *, quiet: bool) -> None:
        self._progress = Progress(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            disable=quiet,
        )
        self._bar = self._progress.add_task(name, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda done: self._progress.advance(self._bar, done)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
