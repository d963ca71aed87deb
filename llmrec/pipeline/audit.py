"""The audit of a run: which checks there are (`examine`), and what they found, written to ``audit.json``.

Training rows, examples and prompts are checked in `llmrec.pipeline.leaks.rows`, those of the alignment task in
`llmrec.pipeline.leaks.alignment`; the split, candidates, answers and fitted models in
`llmrec.pipeline.leaks.checks`.
`llmrec.pipeline.probes` looks for what may explain a figure besides skill.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from llmrec import __version__
from llmrec.backends.encode import Encoder
from llmrec.baselines.parameters import Hashes, hashes_of
from llmrec.durable import sha256_of, write_checked
from llmrec.errors import LlmrecError
from llmrec.machine import versions
from llmrec.models.load import load_model, load_tokenizer, quiet_libraries, resolve
from llmrec.pipeline import probes
from llmrec.pipeline.leaks import alignment as leaks_alignment
from llmrec.pipeline.leaks import checks as leaks
from llmrec.pipeline.leaks import rows as leaks_rows
from llmrec.pipeline.leaks.checks import Check
from llmrec.pipeline.resume import key_of, locked, read_stage
from llmrec.pipeline.row_specs import asks
from llmrec.pipeline.study import Study, build_study
from llmrec.pipeline.tuning.rejecting import close
from llmrec.recipe.load import load_stored
from llmrec.registry import BASELINES, stamps
from llmrec.report import page
from llmrec.report.audit import AuditLine, LeakError, lines_of
from llmrec.report.results import Made, content_of, fix_for, refuse_other_answers, results_of
from llmrec.tasks.family import family_of

log = logging.getLogger(__name__)

FILE = "audit.json"
# What fitting a baseline depends on besides this package.
_FITTING = ("numpy", "scipy", "torch", "implicit", "polars")
# Rows of a family that are looked at where nothing was trained.
_UNTRAINED = 100


def audit(folder: Path, *, memory: bool = False) -> list[Check]:
    """Audit a finished run from its folder, write ``audit.json``, and bring its report up to it.

    The pages of a run that leaks say so and hold no figure; any other gets them with what was found.

    Args:
        folder: The run folder.
        memory: Also ask the untuned model for the catalogue, which loads it.

    Raises:
        LlmrecError: If the folder holds no finished run, or a file of it is damaged.
    """
    recipe, stored = folder / "recipe.yaml", folder / "results.json"
    # On a disk that is read-only nothing can be locked and nothing is written.
    writable = os.access(folder, os.W_OK)
    if not recipe.is_file() or not stored.is_file():
        raise LlmrecError(
            f"{folder} holds no finished run (recipe.yaml and results.json); finish it with `llmrec run`",
            kind="missing-file",
            at=folder,
        )
    with locked(folder) if writable else nullcontext():
        results = content_of(folder)
        refuse_other_answers(folder, results_of(results, source=str(stored), fix=fix_for(folder)).files)
        predictions = _predictions(folder)
        study = build_study(load_stored(folder))
        checks = list(examine(study, results, predictions))
        if memory:
            checks.append(_memory(study))
        if writable:
            lines = write(folder, checks, of=sha256_of(stored))
            with suppress(LeakError):
                page.write(folder, Made(results, predictions, lines))
    if not writable:
        log.warning("%s cannot be written to, so audit.json and the report stay as they are", folder)
    return checks


def _predictions(folder: Path) -> pl.DataFrame:
    """Read the answers of a run.

    Raises:
        LlmrecError: If they cannot be read.
    """
    path = folder / "predictions.parquet"
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise LlmrecError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}). {fix_for(folder)}", kind="damaged", at=path
        ) from error


def examine(
    study: Study, results: Mapping[str, Any], predictions: pl.DataFrame, *, kept: Path | None = None
) -> Iterator[Check]:
    """Yield every check that needs no model.

    Args:
        study: The run's.
        results: Its ``results.json``.
        predictions: Its ``predictions.parquet``.
        kept: File of what is known of its baselines, which take long to fit; None: they are fitted again.
    """
    split = study.recipe.eval.split
    for data in filter(None, (study.data, study.reviews)):
        yield leaks.training_interactions(data)
        yield leaks.profiles(data)
    training = results.get("training")
    for family in study.tasks:
        if family in study.shares:
            yield leaks_rows.training_rows(study, family, _rows_of(training, family))
            yield leaks_rows.rows_drawn_again(study, family, _rows_of(training, family))
            if split == "test" and study.recipe.train.valid_rows:
                yield leaks_rows.validation_rows_drawn_again(study, family)
        yield leaks_rows.questions(study, family)
        if asks(study.recipe, family, "few-shot"):
            yield leaks_rows.shots(study, family)
            yield leaks_rows.shots_drawn_again(study, family)
        if (positions := leaks_rows.positions_drawn_again(study, family)) is not None:
            yield positions
    # Rows that reject what the start of training finds were made with its weights.
    close()
    yield from leaks.candidate_sets(study)
    yield from leaks_alignment.checks(study, _rows_of(training, "alignment"))
    yield from leaks.stored_rows(results["rows"], predictions, study)
    yield _baselines(study, kept) if kept is not None else leaks.baselines(study)
    for found in (leaks.item_index(study), leaks.feature_texts(study)):
        if found is not None:
            yield found
    yield probes.id_arithmetic(study.data, split)
    if study.index is not None:
        yield probes.code_arithmetic(study.index, study.data, split)
    yield probes.duplicate_items(study.data)
    if any(family_of(family).ranks_for_users for family in study.tasks):
        yield probes.duplicate_users(study.data, split)


def _baselines(study: Study, kept: Path) -> Check:
    """Return what is known of the same baselines on the same data, or find it out."""
    used = {family: study.task_data(family) for family in study.tasks}
    key = key_of(
        llmrec=__version__,
        packages={name: version for name, version in versions().items() if name in _FITTING},
        baselines={family: [each.label for each in study.baselines(family)] for family in used},
        **({"stores": stores} if (stores := _stores(study)) else {}),
        **stamps((BASELINES, each.name) for family in used for each in study.baselines(family)),
        data={family: data.fingerprint for family, data in used.items()},
        cases={family: [case.request.id for case in study.cases(family)] for family in used},
        candidates={family: sets.digest for family in used if (sets := study.sets(family)) is not None},
        split=study.recipe.eval.split,
        seed=study.recipe.seed,
        redrawn=leaks.REDRAWN,
    )
    stored = read_stage(kept, key, _check_of)
    if stored is None:
        stored = {"key": key, "check": asdict(leaks.baselines(study))}
        write_checked(kept, stored)
    return _check_of(stored)


def _check_of(stored: Mapping[str, Any]) -> Check:
    found = stored["check"]
    return Check(**{**found, "examples": tuple(found["examples"])})


def _stores(study: Study) -> list[Hashes]:
    asked = [each for family in study.tasks for each in study.baselines(family)]
    return [read for each in asked if (read := hashes_of(each.name, each.parameters))]


def write(folder: Path, checks: Sequence[Check], *, of: str) -> tuple[AuditLine, ...]:
    """Write ``audit.json``, the checks and how many of them are leaks; return them as the report shows them.

    Args:
        folder: The run folder.
        checks: What was found.
        of: The sha256 of its ``results.json``, so that the report never shows the audit of others.
    """
    found = [asdict(check) for check in checks]
    leaks = sum(check.verdict == "leak" for check in checks)
    write_checked(folder / FILE, {"results_sha256": of, "leaks": leaks, "checks": found})
    return lines_of(found)


def _rows_of(training: Mapping[str, Any] | None, family: str) -> int:
    """Return how many rows training drew from a family's stream, those that were too long included."""
    if training is None:
        return _UNTRAINED
    return int(training["rows"].get(family, 0)) + int(training.get("dropped", {}).get(family, 0))


def _memory(study: Study) -> Check:
    from llmrec.backends.hf.backend import HFBackend

    quiet_libraries()
    section = study.recipe.model
    base = resolve(section, seed=study.recipe.seed)
    backend = HFBackend(
        load_model(base, section), Encoder(load_tokenizer(base, section), max_length=section.max_length)
    )
    try:
        return probes.memorisation(backend, study.data, seed=study.recipe.seed)
    finally:
        backend.close()
