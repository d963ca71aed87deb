"""The best adapter so far by a figure of the validation split, and when it is time to stop."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmrec.durable import loads, replacing, write_json

_TOLD = "step.json"


class Best:
    """Keeps the adapter of the best look."""

    def __init__(
        self,
        folder: Path,
        patience: int | None,
        measure: Callable[[Any], float],
        save: Callable[[Any, Path], None],
    ) -> None:
        """Set up.

        Args:
            folder: Where the adapter is kept; made at the first look.
            patience: Looks without a better figure after which `done` is true; None: never.
            measure: A model -> its figure, higher is better.
            save: Writes a model's adapter into a folder that is there.
        """
        self._folder, self._patience, self._measure, self._save = folder, patience, measure, save
        self.value, self.step, self._since = -math.inf, 0, 0

    def resume(self, looks: Iterable[tuple[int, float]]) -> None:
        """Count the looks of the part of a killed run that is gone on from."""
        self.value, self.step, self._since = -math.inf, 0, 0
        for step, value in looks:
            self._count(step, value)

    def look(self, step: int, model: Any) -> float:
        """Measure a model, and keep its adapter if it is the best so far."""
        value = self._measure(model)
        if self._count(step, value):
            with replacing(self._folder) as draft:
                draft.mkdir()
                self._save(model, draft)
                write_json(draft / _TOLD, {"step": step, "value": value})
        return value

    @property
    def done(self) -> bool:
        """Whether training should end."""
        return self._patience is not None and self._since >= self._patience

    def copy_to(self, folder: Path) -> None:
        """Copy the kept adapter into a folder that is not there yet.

        Raises:
            RuntimeError: If what lies there is of another step: somebody changed it.
        """
        told = loads((self._folder / _TOLD).read_text(encoding="utf-8"))
        if told["step"] != self.step:
            raise RuntimeError(f"{self._folder} holds step {told['step']}, and step {self.step} was the best")
        shutil.copytree(self._folder, folder, ignore=shutil.ignore_patterns(_TOLD))

    def _count(self, step: int, value: float) -> bool:
        better = value > self.value
        if better:
            self.value, self.step, self._since = value, step, 0
        else:
            self._since += 1
        return better
