"""The best adapter so far by a figure of the validation split, and when it is time to stop."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmrec.durable import refuse_link, replacing
from llmrec.errors import LlmrecError
from llmrec.train.checkpoint import steps_of


class Best:
    """Keeps the adapter of the best look, and those that were the best at a checkpoint that training may resume from.

    A look that is repeated after a kill may find another figure, as sums on a GPU are not the same twice. So the
    adapter that was the best at a checkpoint must outlive every better one that was found after this checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        patience: int | None,
        measure: Callable[[Any], float],
        save: Callable[[Any, Path], None],
        checkpoints: Path,
    ) -> None:
        """Set up.

        Args:
            folder: Where adapters are kept, each in a folder named by its step.
            patience: Looks without a better figure after which `done` is true; None: never.
            measure: A model -> its figure, higher is better.
            save: Writes a model's adapter into a folder that is there.
            checkpoints: Where the checkpoints are.
        """
        self._folder, self._patience, self._measure, self._save = folder, patience, measure, save
        self._checkpoints = checkpoints
        # Step and figure of each look that was the best so far.
        self._found: list[tuple[int, float]] = []
        self._since = 0

    @property
    def step(self) -> int:
        """The step of the best look."""
        return self._found[-1][0] if self._found else 0

    def resume(self, looks: Iterable[tuple[int, float]]) -> None:
        """Count the looks of the part of a killed run that is gone on from; of these an adapter must be there."""
        self._found, self._since = [], 0
        for step, value in looks:
            self._count(step, value)
        while self._found and not (self._folder / str(self.step)).is_dir():
            self._found.pop()
        self._tidy()

    def look(self, step: int, model: Any) -> float:
        """Measure a model, and keep its adapter if it is the best so far."""
        value = self._measure(model)
        if self._count(step, value):
            with replacing(self._folder / str(step)) as draft:
                draft.mkdir()
                self._save(model, draft)
            self._tidy()
        return value

    def saved(self, checkpoint: Path) -> None:
        """Forget adapters that are no longer needed, after a checkpoint was sealed and old ones were removed."""
        self._tidy()

    @property
    def done(self) -> bool:
        """Whether training should end."""
        return self._patience is not None and self._since >= self._patience

    def copy_to(self, folder: Path) -> None:
        """Copy the kept adapter into a folder that is not there yet.

        Raises:
            LlmrecError: If it was removed.
        """
        kept = self._folder / str(self.step)
        if not kept.is_dir():
            raise LlmrecError(
                f"{kept}, the adapter of the best look, is not there; remove {self._checkpoints} and train again",
                kind="missing-file",
                at=kept,
            )
        shutil.copytree(kept, folder)

    def _count(self, step: int, value: float) -> bool:
        better = value > (self._found[-1][1] if self._found else -math.inf)
        if better:
            self._found.append((step, value))
            self._since = 0
        else:
            self._since += 1
        return better

    def _tidy(self) -> None:
        """Remove what no checkpoint that is there can be resumed with, and what a kill left half-written."""
        steps = [step for step, _ in self._found]
        needed = {next((step for step in reversed(steps) if step <= at), 0) for at in steps_of(self._checkpoints)}
        kept = {str(step) for step in {*needed, self.step}} if steps else set()
        refuse_link(self._folder)
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else ():
            if path.name not in kept and re.fullmatch(r"[0-9]+|\.[0-9]+\.llmrec\.draft", path.name):
                shutil.rmtree(path)
