"""Tunes recommenders in a process of its own, which may be killed at any time: every trial is in a file at once.

``python -m llmrec.start.auto_trial ASKED.json`` reads what `Asked` holds and writes trials, one file a recommender.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.durable import Json, write_checked, write_json
from llmrec.fingerprint import fingerprint
from llmrec.pipeline.resume import read_stage
from llmrec.registry import BASELINES

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

TABLE = "excluded"
"""Rankings leave out what the user has had, as a recommender that is served does."""


# Epochs that a network takes at least before validation stops it, and seconds of one that is long.
_EPOCHS, _LONG = 15, 10.0


@dataclass(frozen=True)
class Tuning:
    """One recommender, and where its trials go.

    Attributes:
        baseline: Name in the registry.
        fixed: Parameters that are not tuned.
        out: The file of the trials.
    """

    baseline: str
    fixed: dict[str, Json]
    out: str


@dataclass(frozen=True)
class Asked:
    """What is tuned.

    Attributes:
        recipe: Of the data.
        parts: One after another.
        first: Of each only the first trial, at the defaults.
        within: Seconds that a first trial may take; a network whose epochs are too slow for that is not begun.
        reserved: Share of validation users that weigh the fusion and choose nothing.
        at: A file that holds which of the parts is at work.
    """

    recipe: str
    parts: list[Tuning]
    first: bool
    within: float
    reserved: float
    at: str


@dataclass(frozen=True)
class Done:
    """A trial: parameters, NDCG@10 on validation, and what fitting and asking took.

    Attributes:
        seconds: Of the trial.
    """

    parameters: dict[str, Json]
    value: float
    seconds: float


def done(out: Path, key: str) -> list[Done]:
    """Return the trials in a file; none where it is of other data or another version."""
    stored = read_stage(out, key, _trials)
    return _trials(stored) if stored else []


def _trials(stored: Mapping[str, Any]) -> list[Done]:
    return [Done(**entry) for entry in stored["trials"]]


def trial_key(data: str, baseline: str, fixed: dict[str, Json], reserved: float) -> str:
    """Return the fingerprint of trials; ``data`` is that of the split."""
    return fingerprint("trials", made_by=[(BASELINES, baseline)], data=data, fixed=fixed, reserved=reserved)


def search(asked: Asked) -> None:
    """Try points of each part until its grid is exhausted; one of each where that is asked."""
    from llmrec.data.split import halves
    from llmrec.pipeline.study import load_split
    from llmrec.recipe.load import load_recipe

    recipe = load_recipe(asked.recipe)
    data = load_split(recipe.data, recipe.seed)
    choosing, _ = halves(data, asked.reserved)
    for index, part in enumerate(asked.parts):
        write_json(Path(asked.at), index)
        key = trial_key(data.fingerprint, part.baseline, part.fixed, asked.reserved)
        known = done(Path(part.out), key)
        if not (asked.first and (known or _slow(part, choosing, recipe.seed, key, asked.within))):
            _tune(part, choosing, recipe.seed, key, known, first=asked.first)


def _slow(part: Tuning, data: SplitDataset, seed: int, key: str, within: float) -> bool:
    """Whether a network cannot be trained in the time, from the seconds of one epoch, which are measured once."""
    from llmrec.baselines.parameters import make
    from llmrec.registry import BASELINES, lookup

    fields = lookup(BASELINES, part.baseline, "baseline").Config.model_fields
    if not {"epochs", "patience"} <= fields.keys():
        return False

    def epoch() -> float:
        begin = time.monotonic()
        make(part.baseline, {**part.fixed, "epochs": 1}, seed=seed).fit(data)
        return time.monotonic() - begin

    file = Path(part.out).with_suffix(".epoch.json")
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if known.get("key") != key:
        # The first one of a process has imports in it, which count where an epoch is short.
        seconds = epoch()
        known = {"key": key, "seconds": seconds if seconds > _LONG else min(seconds, epoch())}
        write_json(file, known)
    epochs = min(_EPOCHS, int(fields["epochs"].default))
    return float(known["seconds"]) * epochs > within


def _tune(part: Tuning, data: SplitDataset, seed: int, key: str, known: list[Done], *, first: bool) -> None:
    from llmrec.baselines.base import Catalogue
    from llmrec.baselines.item_texts import text_vectors
    from llmrec.baselines.tune import Trial, tune
    from llmrec.registry import BASELINES, lookup

    made = lookup(BASELINES, part.baseline, "baseline")
    grid = {name: values for name, values in made.GRID.items() if name not in part.fixed}
    fixed = {name: (value,) for name, value in part.fixed.items()}
    if first:
        defaults = made.Config(**part.fixed).model_dump()
        grid = {name: (defaults[name],) for name in grid}
    if made.READS == "texts":
        # Vectors of texts are kept from here on: the first trial is not to look dearer than others will be.
        text_vectors(data, Catalogue.of(data).ids, made.Config(**part.fixed))
    before = time.monotonic()

    def keep(trials: Sequence[Trial]) -> None:
        nonlocal before
        now = time.monotonic()
        for trial in trials[len(known) :]:
            known.append(Done(dict(trial.parameters), trial.values[TABLE], now - before))
        before = now
        write_checked(Path(part.out), {"key": key, "trials": [asdict(entry) for entry in known]})

    earlier = [Trial(entry.parameters, {TABLE: entry.value}) for entry in known]
    tune(part.baseline, data, seed=seed, tables=(TABLE,), grid=grid | fixed, known=earlier, kept=keep)


if __name__ == "__main__":
    _asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    search(Asked(**{**_asked, "parts": [Tuning(**part) for part in _asked["parts"]]}))
