"""Tunes recommenders in a subprocess that can be killed at any time; each trial is stored when it ends.

``python -m llmrec.start.auto_trial JOB.json`` reads a `TrialJob` and writes the trials, one file per recommender.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.durable import Json, write_checked_json, write_json
from llmrec.fingerprint import fingerprint
from llmrec.pipeline.resume import read_stage
from llmrec.registry import BASELINES, import_component

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

AT_FILE = "at.json"
SEEN_EXCLUDED = "excluded"
"""Rankings exclude seen items, as a served recommender does."""


# Minimum number of epochs before early stopping, and the seconds from which an epoch counts as long.
_MIN_EPOCHS, _LONG_EPOCH_SECONDS = 15, 10.0


@dataclass(frozen=True)
class CandidateMember:
    """A recommender to tune, which may become a member of the ensemble.

    Attributes:
        label: Its name in files and messages.
        baseline: Its name in the registry.
        fixed: Parameters that are not tuned.
    """

    label: str
    baseline: str
    fixed: Mapping[str, Json] = field(default_factory=dict)

    def file(self, folder: Path) -> Path:
        """Return the file of its trials in a folder."""
        return folder / (self.label.replace(", ", "-").replace(" ", "-") + ".json")


@dataclass(frozen=True)
class TrialJob:
    """The input of the tuning subprocess.

    Attributes:
        parts: The recommenders, tuned one after another.
        first: Whether each gets only its first trial, with the defaults.
        within: Seconds for a first trial; a network whose epochs are too slow for that is skipped.
        reserved: Share of validation users that are only for the weights of the ensemble.
        folder: The folder of the trials, and of the file `AT_FILE` with the index of the current recommender.
    """

    recipe: str
    parts: list[CandidateMember]
    first: bool
    within: float
    reserved: float
    folder: str


@dataclass(frozen=True)
class TrialResult:
    """A trial: hyperparameters, validation NDCG@10, and seconds of fitting and evaluation."""

    parameters: dict[str, Json]
    value: float
    seconds: float


def read_trials(out: Path, key: str) -> list[TrialResult]:
    """Read the trials in a file; an empty list if they belong to other data or another version."""
    stored = read_stage(out, key, _parse_trials)
    return _parse_trials(stored) if stored else []


def _parse_trials(stored: Mapping[str, Any]) -> list[TrialResult]:
    return [TrialResult(**entry) for entry in stored["trials"]]


def trial_key(data: str, part: CandidateMember, reserved: float, seed: int) -> str:
    """Return the cache key of trials; ``data`` is the fingerprint of the split."""
    made_by = [(BASELINES, part.baseline)]
    return fingerprint("trials", made_by=made_by, data=data, fixed=dict(part.fixed), reserved=reserved, seed=seed)


def run_trials(job: TrialJob) -> None:
    """Evaluate the hyperparameter settings of each recommender."""
    from llmrec.data.split import split_validation_users
    from llmrec.pipeline.study import load_split
    from llmrec.recipe.load import load_recipe

    recipe = load_recipe(job.recipe)
    data = load_split(recipe.data, recipe.seed)
    choosing, _ = split_validation_users(data, job.reserved)
    for index, part in enumerate(job.parts):
        out = part.file(Path(job.folder))
        write_json(out.with_name(AT_FILE), index)
        key = trial_key(data.fingerprint, part, job.reserved, recipe.seed)
        known = read_trials(out, key)
        if not (job.first and (known or _is_too_slow(part, choosing, recipe.seed, out, key, job.within))):
            _tune_member(part, choosing, recipe.seed, out, key, known, first=job.first)


def _is_too_slow(part: CandidateMember, data: SplitDataset, seed: int, out: Path, key: str, within: float) -> bool:
    """Whether a network is too slow for the available time, given the measured seconds of one epoch."""
    from llmrec.baselines.parameters import create_baseline

    fields = import_component(BASELINES, part.baseline, "baseline").Config.model_fields
    if not {"epochs", "patience"} <= fields.keys():
        return False

    def epoch() -> float:
        begin = time.monotonic()
        create_baseline(part.baseline, {**part.fixed, "epochs": 1}, seed=seed).fit(data)
        return time.monotonic() - begin

    file = out.with_suffix(".epoch.json")
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if known.get("key") != key:
        # The first epoch in a process includes imports, which matters if an epoch is short.
        seconds = epoch()
        known = {"key": key, "seconds": seconds if seconds > _LONG_EPOCH_SECONDS else min(seconds, epoch())}
        write_json(file, known)
    epochs = min(_MIN_EPOCHS, int(fields["epochs"].default))
    return float(known["seconds"]) * epochs > within


def _tune_member(
    part: CandidateMember, data: SplitDataset, seed: int, out: Path, key: str, known: list[TrialResult], *, first: bool
) -> None:
    from llmrec.baselines.base import Catalogue
    from llmrec.baselines.item_texts import text_vectors
    from llmrec.baselines.tune import Trial, tune

    baseline = import_component(BASELINES, part.baseline, "baseline")
    grid = {name: values for name, values in baseline.GRID.items() if name not in part.fixed}
    fixed = {name: (value,) for name, value in part.fixed.items()}
    if first:
        defaults = baseline.Config(**part.fixed).model_dump()
        grid = {name: (defaults[name],) for name in grid}
    if baseline.READS == "texts":
        # Compute the text vectors first, so that the first trial does not include their cost.
        text_vectors(data, Catalogue.of(data).ids, baseline.Config(**part.fixed))
    before = time.monotonic()

    def keep(trials: Sequence[Trial]) -> None:
        nonlocal before
        now = time.monotonic()
        for trial in trials[len(known) :]:
            known.append(TrialResult(dict(trial.parameters), trial.values[SEEN_EXCLUDED], now - before))
        before = now
        write_checked_json(out, {"key": key, "trials": [asdict(entry) for entry in known]})

    earlier = [Trial(entry.parameters, {SEEN_EXCLUDED: entry.value}) for entry in known]
    tune(part.baseline, data, seed=seed, tables=(SEEN_EXCLUDED,), grid=grid | fixed, known=earlier, kept=keep)


if __name__ == "__main__":
    _job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run_trials(TrialJob(**{**_job, "parts": [CandidateMember(**part) for part in _job["parts"]]}))
