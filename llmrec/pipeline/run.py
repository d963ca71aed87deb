"""Runs the stages of a recipe in order, and reuses stages whose inputs are unchanged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrec import processes
from llmrec.backends.cache import AnswerStore
from llmrec.backends.encode import Encoder
from llmrec.backends.vllm.adapters import loadable_adapters
from llmrec.backends.vllm.backend import prepare_environment
from llmrec.data.frames import temporary_frame_folder, with_frames
from llmrec.data.split import SplitDataset
from llmrec.data.stats import basket_warning, statistics
from llmrec.display import Displayed, Summary, format_name_list
from llmrec.durable import replace_atomically, write_text
from llmrec.ensembles import stored
from llmrec.errors import EngineFailure, RecipeError
from llmrec.models.load import (
    describe_source,
    device,
    load_tokenizer,
    model_folder_hash,
    resolve_model_folder,
    silence_libraries,
)
from llmrec.pipeline import audit, index_report
from llmrec.pipeline.augmenting import FEATURES, augment, check_text_store
from llmrec.pipeline.comparing import check_planned_models
from llmrec.pipeline.engines import Engines, check_encoder_decoder_engine, dtype_name
from llmrec.pipeline.evaluation import Evaluation, ResultRow, WeightsByArm
from llmrec.pipeline.fusing import fuse_runs
from llmrec.pipeline.indexing import extend_base_model
from llmrec.pipeline.preflight import build_checked_study, check_recipe
from llmrec.pipeline.results import WrittenResults, cutoff_warning, overwrite_warning, write_results
from llmrec.pipeline.resume import RUN_FILES, StageTimer, lock_folder
from llmrec.pipeline.runs import start_model_folder, teacher_model_folder
from llmrec.pipeline.study import Study, build_study, leak_warning, resolve_run_folder
from llmrec.pipeline.training import reusable_training, train_stage
from llmrec.pipeline.weighing import stored_ranking_ensembles
from llmrec.progress import Progress, log_line
from llmrec.recipe.load import Overrides, as_recipe, dump_recipe, import_stored_plugins, recipe_hash
from llmrec.recipe.paths import name_searched_folders
from llmrec.recipe.schema import Recipe
from llmrec.report import page
from llmrec.results import LANGUAGE_MODEL_ARMS, Arm, Choice, Results, StoredResults, Unevaluated
from llmrec.terminal import set_command_folder
from llmrec.train import trackers

log = logging.getLogger(__name__)

ANSWERS = "answers.sqlite"
"""The answer cache in a run folder."""

StoredTraining = dict[str, Any]
"""A training record, the content of ``train.json``."""


@dataclass(frozen=True, repr=False)
class Run(Displayed):
    """A finished run.

    Attributes:
        folder: The run folder.
        results: The content of ``results.json``.
        rows: Its rows in the same order, with metrics by request.
        report: Path of the HTML page.
    """

    folder: Path
    results: dict[str, Any]
    rows: Sequence[ResultRow]
    report: Path

    def _summary(self) -> Summary:
        result = Results.model_validate(self.results)._summary()
        where = {"folder": str(self.folder), "report": str(self.report)}
        return replace(result, title=f"Run {self.results['recipe'].get('name', '')!r}", facts={**where, **result.facts})


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    out: Path | str | Mapping[str, Any] | None = None,
    *,
    overrides: Overrides = (),
    data: Any = None,
    items: Any = None,
    quiet: bool = False,
    may_train: bool = True,
    before: Callable[[Session], None] | None = None,
    choice: Choice | None = None,
) -> Run:
    """Run a whole recipe and return its results.

    The stages: generated texts, if the recipe has them (`llmrec.pipeline.augmenting`); data and base model
    (`open_session`); plan, train and merge (`llmrec.pipeline.training`); baselines, then language-model rows
    (`llmrec.pipeline.evaluation`); results, audit, report.

    Args:
        recipe: A recipe of `llmrec.load_recipe`, the path of a recipe file, or its sections as a mapping.
        out: The run folder; ``runs/<name>`` by default. A mapping in its place is read as ``overrides``.
        overrides: Changed keys, such as ``{"train.steps": 5}``.
        data: Interactions as a frame, in place of ``data.path``; see `llmrec.data.frames.with_frames`.
        items: Items as a frame, one row per item, in place of ``data.items``.
        quiet: Show no progress bars.
        may_train: Train if the folder has no adapter of this recipe; if false, that is an error, and no texts are
            generated either.
        before: Called when all inputs are read, before training and evaluation.
        choice: The row to serve if no validation users are left for the selection. If given, the best row is also
            served for a run with a language model; otherwise such a run serves that model.

    Raises:
        RecipeError: If the tuned setting has no adapter and ``may_train`` is off.
        EngineFailure: If no engine could answer some rows; raised after the report, which names them, is written.
    """
    if isinstance(out, Mapping):
        overrides, out = out, None
    processes.check_single_process("llmrec run")
    recipe = as_recipe(recipe, overrides)
    folder = resolve_run_folder(recipe, Path(out) if out is not None else None)
    with lock_folder(folder, RUN_FILES):
        set_command_folder(folder)
        recipe = with_frames(recipe, folder, data, items)
        if warning := overwrite_warning(folder / "results.json", "recipe_hash", recipe_hash(recipe)):
            log.warning("%s", warning)
        if recipe.augment is not None and may_train:
            check_text_store(recipe, folder / FEATURES)
            augment(recipe, folder / FEATURES, quiet=quiet)
        session = open_session(recipe, folder, quiet=quiet)
        if before is not None:
            before(session)
        trains = may_train and "tuned" in recipe.eval.arms
        training = session.train() if trains else session.tuned(folder)
        evaluation = session.evaluation()
        rows = evaluation.baselines()
        if session.model is not None:
            with session.asking(training, folder) as (weights, engines):
                rows += evaluation.arms(weights, engines, rows)
        if session.model is None or choice is not None:
            choice = evaluation.choice(rows) or choice
        written = session.write(rows, training, tuple(evaluation.missing.values()), choice)
        with Progress("audit", None, quiet=quiet):
            session.audit(written)
        with Progress("report", None, quiet=quiet):
            done = Run(folder, StoredResults(written.results), rows, page.write_report(folder)["html"])
    if evaluation.failures:
        raise _incomplete_run_error(done, evaluation.failures)
    return done


def _incomplete_run_error(done: Run, failures: Sequence[EngineFailure]) -> EngineFailure:
    missing, first = len(done.results["unevaluated"]), failures[0]
    return EngineFailure(
        f"{'. '.join(map(str, failures))}. {missing} of {missing + len(done.rows)} models were not evaluated, as "
        f"marked in {done.report}; run the same command again to evaluate the missing models",
        kind=first.kind,
        at=first.location,
        column=first.column,
    )


@dataclass(frozen=True, repr=False)
class Checked(Displayed):
    """The result of `check`.

    Attributes:
        cases: The number of held-out cases by family.
        statistics: Statistics of the data and its split, as printed by `llmrec data`.
        warnings: Warnings about profiles that name held-out items, and about baskets divided by the split.
    """

    cases: Mapping[str, int]
    statistics: Mapping[str, object]
    warnings: tuple[str, ...]

    def _summary(self) -> Summary:
        cases = format_name_list(f"{family} {count:,}" for family, count in self.cases.items())
        facts = {"held-out cases": cases, "warnings": str(len(self.warnings))}
        statistics = [(name, str(value)) for name, value in self.statistics.items()]
        return Summary("The recipe can be run", facts, ("data", "value"), statistics)


def check(
    recipe: Recipe | str | Path | Mapping[str, Any], overrides: Overrides = (), *, data: Any = None, items: Any = None
) -> Checked:
    """Check the recipe, its data, component names and model, without loading weights or creating a run folder.

    Args:
        recipe: See `run`.
        overrides: See `run`.
        data: See `run`.
        items: See `run`.

    Raises:
        DataError: If the data cannot be used.
        ModelError: If the model is missing, or its configuration or tokenizer cannot be opened.
        RecipeError: If the recipe cannot be used.
        MissingExtra: If a package that it needs is not installed.
    """
    with temporary_frame_folder() as (folder, _):
        study = build_checked_study(with_frames(as_recipe(recipe, overrides), folder, data, items))
    warnings = [leak_warning(table, result) for table in study.tables if (result := study.leaks(table))]
    warnings += [cut for table in study.tables if (cut := basket_warning(table))]
    warnings += [wide] if (wide := cutoff_warning(study)) else []
    cases = {family: len(study.cases(family)) for family in study.tasks}
    return Checked(cases, statistics(study.data), tuple(warnings))


def train(
    recipe: Recipe, out: Path | None = None, *, quiet: bool = False, data: SplitDataset | None = None
) -> StoredTraining:
    """Train the model of a recipe, and return the training record.

    In several processes (torchrun), the first one writes the folder and the others read its results. ``data`` are the
    data if already loaded.
    """
    folder = resolve_run_folder(recipe, out)
    if processes.process_count() > 1:
        return _train_together(recipe, folder, quiet=quiet, data=data)
    with lock_folder(folder, RUN_FILES):
        set_command_folder(folder)
        return open_session(recipe, folder, quiet=quiet, data=data, trains=True).train()


def _train_together(recipe: Recipe, folder: Path, *, quiet: bool, data: SplitDataset | None) -> StoredTraining:
    check_recipe(recipe, asks=True)
    from llmrec.train.world import connect_processes

    with connect_processes(device(recipe.model)) as world:
        if not world.first:
            world.wait()
            return _read_only_session(recipe, folder, data).train()
        with lock_folder(folder, RUN_FILES):
            set_command_folder(folder)
            session = open_session(recipe, folder, quiet=quiet, data=data, trains=True)
            world.wait()
            return session.train()


def as_folder(run: Run | str | Path) -> Path:
    """Return the folder of a run."""
    return Path(run) if isinstance(run, str | Path) else run.folder


def fuse(runs: Sequence[Run | str | Path], out: str | Path) -> Run:
    """Build ensembles of the models of several finished runs, with weights fitted on validation users.

    Args:
        runs: Finished runs, or their folders.
        out: The folder to write.

    Raises:
        DataError: If a run is not finished or has other data or cases, or no rows can be joined.
    """
    folder = Path(out)
    written = fuse_runs([as_folder(run) for run in runs], folder)
    return Run(folder, StoredResults(written.results), written.rows, page.write_report(folder)["html"])


def report(folder: Path) -> Path:
    """Write the report of a run folder and return the path of its HTML page.

    It shows stored results, so plug-ins that cannot be imported are not an error.
    """
    try:
        import_stored_plugins(folder)
    except RecipeError as error:
        log.warning("%s", error)
    return page.write_report(folder)["html"]


@dataclass(frozen=True)
class OpenedModel:
    """The language model of a recipe.

    Attributes:
        encoder: Its tokenizer.
        base: The folder of the model before training.
        start: The folder that training continues from; differs from ``base`` if the recipe names a run
        (``train.start``).
        teacher: The folder of the teacher model, if the recipe names a run (``train.teacher``).
    """

    encoder: Encoder
    base: str
    start: str
    teacher: str | None = None


@dataclass(frozen=True)
class Session:
    """An open run: its study, folder, stage times and, if needed, language model."""

    study: Study
    model: OpenedModel | None
    folder: Path
    budget: StageTimer
    quiet: bool

    @property
    def encoder(self) -> Encoder:
        """Tokenizer of the model."""
        return self._required_model.encoder

    @property
    def base(self) -> str:
        """Folder of the model before training."""
        return self._required_model.base

    @property
    def start(self) -> str:
        """Folder of the model that training starts from."""
        return self._required_model.start

    @property
    def _required_model(self) -> OpenedModel:
        assert self.model is not None, "the recipe does not use a language model"
        return self.model

    def trained(self) -> StoredTraining | None:
        """Return the training record of this recipe in the folder; None if there is none."""
        return reusable_training(self.study, self.model.start, self.folder) if self.model else None

    def tuned(self, home: Path) -> StoredTraining | None:
        """Return the training record of this recipe in a run folder; None if no tuned model is evaluated."""
        if "tuned" not in self.study.recipe.eval.arms:
            return None
        result = reusable_training(self.study, self.start, home)
        if result is None:
            raise RecipeError(
                f"{home} has no adapter of this recipe, which evaluating the tuned model needs; run `llmrec train` "
                "first, or set 'eval.arms=[zero-shot, few-shot]'",
                kind="missing-file",
                at=home,
                column="eval.arms",
            )
        return result

    def train(self) -> StoredTraining:
        """Train the model, or reuse the stored adapter."""
        teacher = self._required_model.teacher
        return train_stage(
            self.study, self.encoder, self.start, self.folder, self.budget, teacher=teacher, quiet=self.quiet
        )

    def evaluation(self) -> Evaluation:
        """Return the evaluation of the recipe's models, which stores results in the folder."""
        encoder = self.model.encoder if self.model else None
        return Evaluation(self.study, encoder, self.folder, self.budget, quiet=self.quiet)

    def write(
        self,
        rows: Sequence[ResultRow],
        training: StoredTraining | None,
        missing: tuple[Unevaluated, ...],
        choice: Choice | None,
    ) -> WrittenResults:
        """Write models, comparisons and ``results.json``, and send metrics to experiment trackers; see `run`."""
        fusions = stored_ranking_ensembles(self.study, [row.figures for row in rows])
        stored.write_ensembles(self.folder, stored.StoredEnsembles(fusions, choice))
        with Progress("comparisons", None, quiet=self.quiet):
            written = write_results(
                self.study, rows, training, self._model_info(), self.budget, self.folder, missing, choice
            )
        steps = int(training["steps"]) if training is not None else 0
        trackers.log_evaluation_metrics(
            trackers.selected_trackers(self.study.recipe.train), _metric_values(rows), self.folder, step=steps
        )
        return written

    @contextmanager
    def asking(
        self, training: StoredTraining | None, home: Path, *, remembers: bool = True
    ) -> Iterator[tuple[WeightsByArm, Engines]]:
        """Open the base and the tuned model, and engines with the answer cache of the folder.

        ``home`` is the run folder with the training; a shard takes answers that are stored there. ``remembers`` opens
        the cache.
        """
        recipe, model = self.study.recipe, self._required_model
        further = home / ANSWERS if home != self.folder else None
        store = AnswerStore(self.folder / ANSWERS, further) if remembers else None
        weights: dict[Arm, tuple[str, str]] = {}
        for arm in _sort_arms_by_model(recipe.eval.arms):
            if arm != "tuned" or training is None:
                weights[arm] = model.base, model_folder_hash(model.base)
            else:
                weights[arm] = str(home / "merged"), training["merged_sha256"]
        adapters = []
        if training is not None and len(set(weights.values())) > 1 and recipe.train.start is None:
            adapters = loadable_adapters(
                *weights[_sort_arms_by_model(recipe.eval.arms)[0]], home / "adapter", *weights["tuned"][1:]
            )
        engines = Engines(recipe.model, recipe.eval, model.encoder, recipe.seed, self.budget, store, adapters=adapters)
        try:
            yield weights, engines
        finally:
            engines.close()
            if store is not None:
                store.close()

    def _model_info(self) -> Mapping[str, str]:
        """Return the description of the evaluated language model; empty if there is none."""
        recipe = self.study.recipe
        if self.model is None:
            return {}
        if recipe.eval.server is not None:
            # Needs at most the tokenizer of the model folder.
            return {"name": recipe.eval.server.model, "folder": recipe.eval.server.where, "dtype": "as served"}
        return {"name": recipe.model.name, "folder": Path(self.model.base).name, "dtype": dtype_name(recipe.model)}

    def audit(self, written: WrittenResults) -> None:
        """Check the run for test leakage; a run with a leak gets no report."""
        kept = self.folder / "audit-baselines.json"
        checks = list(audit.run_checks(self.study, written.results, written.predictions, kept=kept))
        audit.write(self.folder, checks, of=written.sha256)
        for check in checks:
            if check.verdict == "leak":
                log.warning("audit: %s: %s", check.name, check.found)


def open_session(
    recipe: Recipe, folder: Path, *, quiet: bool = False, data: SplitDataset | None = None, trains: bool = False
) -> Session:
    """Build the study, open the model, and write the resolved recipe, candidates and index to the run folder.

    Args:
        recipe: The recipe. Without ``eval.arms`` it evaluates classic recommenders and needs no language model.
        folder: The run folder.
        quiet: Show no progress bars.
        data: The data if already loaded; by default that of the recipe.
        trains: Whether the model is trained, regardless of the evaluated settings.
    """
    asks = bool(recipe.eval.arms) or trains
    check_recipe(recipe, asks=asks)
    prepare_environment()
    if asks:
        silence_libraries()
    budget = StageTimer(quiet=quiet)
    folder.mkdir(parents=True, exist_ok=True)
    with budget.stage("data"):
        study = build_study(recipe, data)
        check_planned_models(study)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        if study.candidates is not None:
            with replace_atomically(folder / "candidates" / f"{recipe.eval.split}.parquet") as draft:
                study.candidates.save(draft)
        if study.aligned is not None:
            with replace_atomically(folder / "candidates" / f"alignment-{recipe.eval.split}.parquet") as draft:
                study.aligned.save(draft)
        index_report.write_run_index(study, folder)
    return Session(study, _open_model(study, folder, budget) if asks else None, folder, budget, quiet)


def _read_only_session(recipe: Recipe, folder: Path, data: SplitDataset | None) -> Session:
    """Open a session in a folder that another process uses, without writing to it."""
    silence_libraries()
    budget, study = StageTimer(quiet=True), build_study(recipe, data)
    return Session(study, _open_model(study, folder, budget), folder, budget, quiet=True)


def _open_model(study: Study, folder: Path, budget: StageTimer) -> OpenedModel:
    recipe = study.recipe
    with budget.stage("model"):
        with name_searched_folders(recipe):
            base = resolve_model_folder(recipe.model, seed=recipe.seed)
        if recipe.eval.server is None:
            name, source = recipe.model.name, describe_source(recipe.model, base)
            log_line(f"model: {name}, weights: {source}, precision: {dtype_name(recipe.model)}")
        check_encoder_decoder_engine(base, recipe.model, recipe.eval)
        start = extend_base_model(
            base, recipe.model, recipe.index, study.index, study.data, folder, seed=recipe.seed, held=study.held
        )
        # Untrained item tokens would take probability from words of titles.
        base = base if study.untuned_without_codes() else start
        encoder = Encoder(load_tokenizer(start, recipe.model), max_length=recipe.model.max_length)
        with name_searched_folders(recipe):
            # Report a missing teacher before looking for a stored training, which depends on the teacher.
            teacher = teacher_model_folder(study, encoder, folder)
            return OpenedModel(encoder, base, start_model_folder(study, encoder, start, folder), teacher)


def _metric_values(rows: Sequence[ResultRow]) -> dict[str, float]:
    """Return all metrics of the finished models, by name."""
    metrics = {f"{row.figures.id}/{name}": metric for row in rows for name, metric in row.figures.metrics.items()}
    return {name: metric.value for name, metric in metrics.items() if metric.value is not None}


def _sort_arms_by_model(arms: Sequence[str]) -> list[Arm]:
    """Sort settings so that the engine of the base model starts only once."""
    return [arm for arm in LANGUAGE_MODEL_ARMS if arm in arms]
