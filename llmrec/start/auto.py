"""`llmrec auto`: tunes recommenders on validation users within a time budget, and evaluates the best on test users."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrec.answer.opening import best_validated_model
from llmrec.data.dataset import Dataset
from llmrec.data.frames import FRAME_FOLDER, restore_frame_names, write_frame
from llmrec.data.split import SplitDataset, split_validation_users
from llmrec.display import Displayed, Summary
from llmrec.durable import Json, write_json, write_text
from llmrec.ensembles.retrieving import MAX_WEIGHT_USERS
from llmrec.ensembles.weights import MIN_RANKER_CASES
from llmrec.errors import DataError, EngineFailure, is_installed
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline.resume import LOCK_FILE, lock_folder
from llmrec.pipeline.run import Run, run
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import as_recipe, dump_recipe, load_recipe
from llmrec.recipe.schema import AUTO, FusionSection, Recipe
from llmrec.registry import BASELINES, import_component
from llmrec.report.summary import served_model_sentences
from llmrec.report.verdicts import wrap_paragraph
from llmrec.report.wording import format_duration, format_with_interval
from llmrec.results import Choice, Results
from llmrec.start.auto_trial import AT_FILE, CandidateMember, TrialJob, TrialResult, read_trials, trial_key
from llmrec.start.columns import requested_roles
from llmrec.start.init import recipe_name, write_recipe
from llmrec.start.options import AutoOptions
from llmrec.start.page import SCHEMA_FILE
from llmrec.start.plan import BATCH_TOKENS, MIN_TITLED_SHARE, TRAIN_SPEED, installed_encoder
from llmrec.tasks.family import missing_controls

# --------------------------------------------------------------------------- the language model


MODEL_FOLDER = "with-model"
"""Subfolder of the run folder with the run of a tuned language model."""

# Number of validation users, and of test users, on whom the language model is evaluated.
_MODEL_USERS = 200
# With fewer training tokens, a model of 135 M parameters was worse than a Markov chain on all data sets.
_MIN_TRAINING_TOKENS = 1_000_000
# Training tokens per second, and seconds per beam search over the catalogue, by device: measured on two cores;
# estimated for one H100, not measured.
_TRAINING_SPEEDS = {"cpu": TRAIN_SPEED, "cuda": 20_000.0}
_SEARCH_SECONDS = {"cpu": 1.5, "cuda": 0.1}
_START_SECONDS = 60.0
# Largest share of the time budget for the language model.
_MAX_MODEL_SHARE = 0.5


@dataclass(frozen=True)
class FineTuningPlan:
    """Whether and how long to fine-tune a language model.

    Attributes:
        steps: Training steps; 0 for no language model.
        seconds: Time for its training and evaluation.
        message: A line with the decision and its reason.
    """

    steps: int
    seconds: float
    message: str


def _no_fine_tuning(reason: str) -> FineTuningPlan:
    return FineTuningPlan(0, 0.0, f"no language model: {reason}")


def plan_fine_tuning(budget: float, *, titles: bool, device: str | None) -> FineTuningPlan:
    """Decide how much fine-tuning the time budget allows.

    Args:
        budget: The whole budget, in seconds.
        titles: Whether items have titles, which the model reads and writes.
        device: The device of the model; None if the training libraries are not installed.
    """
    if not titles:
        return _no_fine_tuning("the items have no titles")
    if device not in _TRAINING_SPEEDS:
        return _no_fine_tuning("the training libraries are not installed (pip install 'llmrec[train]')")
    asking = _START_SECONDS + 2 * _MODEL_USERS * _SEARCH_SECONDS[device]
    least = asking + _MIN_TRAINING_TOKENS / _TRAINING_SPEEDS[device]
    allowed = budget * _MAX_MODEL_SHARE
    if allowed < least:
        need = format_duration(least / _MAX_MODEL_SHARE)
        return _no_fine_tuning(f"fine-tuning needs a budget of at least {need} on this machine")
    steps = int((allowed - asking) * _TRAINING_SPEEDS[device] / BATCH_TOKENS)
    message = f"the last {format_duration(allowed)} of the budget are reserved for a language model"
    return FineTuningPlan(steps, allowed, message)


def with_language_model(recipe: Recipe, planned: FineTuningPlan) -> Recipe:
    """Add a fine-tuned language model to the ensemble of a recipe."""
    page = recipe.model_dump(mode="json")
    page["train"] = {
        "steps": planned.steps,
        "batch_tokens": BATCH_TOKENS,
        "learning_rate": 1e-3,
        "valid_every": max(1, planned.steps // 8),
        "save_every": max(1, planned.steps // 8),
    }
    page["eval"] |= {
        "arms": ["tuned"],
        "users": _MODEL_USERS,
        "backend": AUTO,
        "fusion": page["eval"]["fusion"] | {"model_users": _MODEL_USERS, "arms": ["tuned"]},
    }
    return as_recipe(page)


def fine_tuning_decision(results: Results) -> tuple[bool, str]:
    """Return whether the fine-tuned model improves the ensemble of baselines on validation users, and a sentence."""
    joined = [row for row in results.rows if row.arm == "tuned" and row.fusion is not None]
    models = {row.predictor for row in results.rows if row.arm == "tuned" and row.fusion is None}
    weights = [(row.fusion.form, part) for row in joined if row.fusion for part in row.fusion.parts]
    if any(form == "alone" and part.name in models and part.weight for form, part in weights):
        return True, "The fine-tuned language model is used: on validation users, no ensemble is better."
    parts = [part for _, part in weights if part.name in models]
    if not parts or parts[0].loss is None:
        return False, "The fine-tuned language model is not used: its weight in the ensemble is 0."
    part = parts[0]
    figure = format_with_interval(part.loss, part.loss_low, part.loss_high, sign=True)
    kept = (part.loss_low or 0.0) > 0
    effect = f"it changes NDCG@10 of the ensemble by {figure} on validation users"
    return kept, f"The fine-tuned language model is {'' if kept else 'not '}used: {effect}."


# --------------------------------------------------------------------------- members of the ensemble


def candidate_members(
    dataset: Dataset, encoder: str | None, *, texts: bool, torch: bool, budget: float
) -> list[CandidateMember]:
    """Return the recommenders to tune on a data set, fastest first.

    Recommenders that are tuned one by one come to use only the last few events, which makes them similar. Variants that
    use the whole history are included as well, because members of an ensemble should differ.

    Args:
        dataset: The data.
        encoder: The available text encoder; None for latent semantic analysis of the texts.
        texts: Whether items have texts; see `has_texts`.
        torch: Whether networks can be trained on this machine.
        budget: The budget of the whole search, in seconds.
    """
    settings: list[tuple[int, CandidateMember]] = []
    for name, entry in BASELINES.items():
        if entry.needs == "torch" and not torch:
            continue
        baseline = import_component(BASELINES, name, "baseline")
        # A baseline that fine-tunes a text encoder needs one.
        if baseline.READS != "events" and not (texts and (encoder or baseline.READS == "texts")):
            continue
        keys = baseline.Config.model_fields
        with_encoder: dict[str, Json] = {"encoder": encoder} if encoder and "encoder" in keys else {}
        quiet: dict[str, Json] = {"quiet": True} if "quiet" in keys else {}
        for setting in baseline.AUTO:
            if len(dataset.items) <= (setting.items or math.inf) and budget >= setting.seconds:
                label = f"{name}, {setting.label}" if setting.label else name
                settings.append(
                    (setting.cost, CandidateMember(label, name, {**with_encoder, **quiet, **setting.fixed}))
                )
    return [part for _, part in sorted(settings, key=lambda setting: setting[0])]


def has_texts(dataset: Dataset) -> bool:
    """Whether most items have a title that is not their id."""
    titled = sum(item.title not in ("", name) for name, item in dataset.items.items())
    return titled > MIN_TITLED_SHARE * len(dataset.items)


# --------------------------------------------------------------------------- the data


TABLE_RECIPE, FIXED_FOLDER = "table.yaml", "fixed"
"""Names in the folder of trials: the recipe from `write_recipe`, and the folder with a corrected copy of the table."""
RECIPE_ENDINGS = (".yaml", ".yml")


def data_recipe(options: AutoOptions, name: str, state: Path, say: Callable[[str], None]) -> Recipe:
    """Return a recipe with the data section only."""
    page = options.table.endswith(RECIPE_ENDINGS)
    base = load_recipe(options.table) if page else _recipe_of_table(options, state, say)
    data = base.data.model_dump(mode="json")
    if not page:
        # Users with few interactions also get recommendations.
        data["filter"] |= {"user_core": 1, "item_core": 1}
    return as_recipe(
        {
            "name": name,
            "seed": base.seed,
            "data": data,
            "tasks": {"sequential": {"strategies": ["search"]}},
            "eval": {"arms": [], "backend": "hf", "users": options.users, "candidates": {"kind": "catalogue"}},
        }
    )


def _recipe_of_table(options: AutoOptions, state: Path, say: Callable[[str], None]) -> Recipe:
    """Return the recipe of `write_recipe` for a table, or for a repaired copy, and report dropped rows."""
    page = state / TABLE_RECIPE
    result = write_recipe(
        options.table,
        items=options.items,
        out=page,
        name=options.name,
        # A row without a rating is still an interaction.
        requested=requested_roles(replace(options, rating=options.rating or "none")),
        mend=state / FIXED_FOLDER / f"{recipe_name(options.name, options.table)}.csv",
        force=True,
        backend="hf",
        query=options.query,
    )
    for note in result.fixes:
        say(note)
    return load_recipe(page)


STATE_FOLDER = "auto"
"""Folder of a run with the trials, the best recipe so far, and the outcome of each recommender."""
_RESERVED = FusionSection().reserved
# The final run has more users than a trial, and its audit fits each recommender again on other held-out data.
_FINISH_FACTOR = 2.0
_MIN_FINISH_SECONDS = 20.0
# Seconds on one core to fit the learned ensembles of a run, per validation case and squared number of members
# (two ensembles of 8 and 11 members on Amazon Toys, 9,706 cases).
_RANKER_SECONDS = 3e-4
# Largest share of the time budget for one first trial.
_MAX_FIRST_SHARE = 0.15
_POLL_SECONDS = 0.2
_LATE_NOTE, _SLOW_NOTE = "its time limit was reached", "one epoch takes longer than the time limit"
# File names in the folder of trials.
_OWN_FILES = frozenset(
    {TABLE_RECIPE, FIXED_FOLDER, SCHEMA_FILE, FRAME_FOLDER, "data.yaml", "best.yaml", "auto.json", "trials", LOCK_FILE}
)


@dataclass
class TunedMember:
    """The result of tuning one recommender.

    Attributes:
        note: Why there are no more; empty if its whole grid was searched.
    """

    part: CandidateMember
    trials: list[TrialResult] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0

    @property
    def best(self) -> TrialResult | None:
        """The best trial; the first one among equals."""
        return max(self.trials, key=lambda trial: trial.value, default=None)

    @property
    def figure(self) -> str:
        """Validation NDCG@10 of the best trial as text."""
        return "–" if self.best is None else f"{self.best.value:.4f}"


TimeAllowance = Callable[[Sequence[TunedMember]], float]


def _time_weight(tried: TunedMember) -> float:
    """Return the weight of a recommender when time is shared, which increases with NDCG."""
    best = tried.best
    return max(best.value, 1e-6) ** 4 if best else 0.0


@dataclass(frozen=True, repr=False)
class Auto(Displayed):
    """The result of `auto`.

    Attributes:
        folder: The run folder, ready to be served.
        run: Its figures.
        tried: Every recommender that was tuned.
        sentence: Which recommender is served and why, with its figure on test users.
        served: The name of that recommender.
        seconds: Wall time of this call.
    """

    folder: Path
    run: Run
    tried: tuple[TunedMember, ...]
    sentence: str
    served: str
    seconds: float

    def _summary(self) -> Summary:
        facts = {"folder": str(self.folder), "report": str(self.run.report), "time": format_duration(self.seconds)}
        rows = [(entry.part.label, entry.figure, str(len(entry.trials)), entry.note) for entry in self.tried]
        header = ("model", "validation NDCG@10", "settings tried", "note")
        return Summary("Recommender made by llmrec.auto", facts, header, rows, "\n".join(wrap_paragraph(self.sentence)))


def build_recommender(
    options: AutoOptions, say: Callable[[str], None] = lambda line: None, *, data: Any = None, items: Any = None
) -> Auto:
    """Build the best recommender for a table within a time budget, and evaluate it on test users.

    Every recommender has one trial with its defaults; then they share the remaining time to search their grids. All
    choices are made by NDCG@10 on validation users; half of these are only for the weights of the ensemble. Test users
    are evaluated once, at the end. A killed call resumes; Ctrl-C ends the search and continues with its best result.

    Args:
        options: The options of the command.
        say: Listener that gets a line for every step.
        data: Interactions as a frame, in place of the table.
        items: Items as a frame, one row per item, in place of the table of items.

    Raises:
        LlmrecError: If the table or the folder cannot be used, or nothing could be fitted.
    """
    began = time.monotonic()
    name, folder = _run_name_and_folder(options)
    state = folder / STATE_FOLDER
    with lock_folder(state, _OWN_FILES.__contains__):
        if data is not None:
            options = replace(options, table=str(write_frame(data, state, "path")))
        if items is not None:
            options = replace(options, items=str(write_frame(items, state, "items")))
        with restore_frame_names(state):
            recipe = data_recipe(options, name, state, say)
        write_text(state / "data.yaml", dump_recipe(recipe))
        split = load_split(recipe.data, recipe.seed)
        say(
            f"{split.dataset.name}: {split.dataset.interactions.height:,} interactions, "
            f"{split.dataset.interactions['user_id'].n_unique():,} users, {len(split.dataset.items):,} items"
        )
        texts = has_texts(split.dataset)
        encoder = installed_encoder() if texts else None
        torch = is_installed("torch")
        parts = candidate_members(split.dataset, encoder, texts=texts, torch=torch, budget=options.seconds)
        planned = (
            _no_fine_tuning("--classic")
            if options.classic
            else plan_fine_tuning(options.seconds, titles=texts, device=_language_model_device())
        )
        say(planned.message)
        weighing = split_validation_users(split, _RESERVED)[1].holdouts("valid")
        cases = min(MAX_WEIGHT_USERS, weighing.frame["user_id"].n_unique())
        deadline = began + options.seconds - planned.seconds
        search = _Search(recipe, split.fingerprint, state, parts, deadline, options.seconds, say, cases=cases)
        try:
            search.first()
            search.rest()
        except KeyboardInterrupt:
            say(
                "stopped: finishing with the results so far; press Ctrl-C again to end immediately; run the same "
                "command to resume"
            )
        chosen = search.chosen(options.users)
        best = search.best(chosen, split)
        count = len(chosen.tasks.present()["sequential"].baselines)
        say(f"fitting and evaluating {count} recommenders and their ensembles")
        result = run(chosen, folder, choice=best)
        results = Results.model_validate(result.results)
        sentence = served_model_sentences(results, "sequential")
        if planned.steps:
            say(f"fine-tuning a language model for {planned.steps} steps")
            try:
                joined = run(with_language_model(chosen, planned), folder / MODEL_FOLDER, choice=best)
            except EngineFailure as failure:
                # The result of the baselines is valid without the language model.
                sentence += f" The fine-tuned language model is not used: {failure.reason}."
            else:
                with_it = Results.model_validate(joined.results)
                kept, reason = fine_tuning_decision(with_it)
                if kept:
                    folder, result = folder / MODEL_FOLDER, joined
                    sentence = served_model_sentences(with_it, "sequential")
                sentence += f" {reason}"
    default = best_validated_model(bundles.read(str(folder)))
    assert default is not None
    auto = Auto(folder, result, tuple(search.tried.values()), sentence, default, time.monotonic() - began)
    write_json(state / "auto.json", auto_record(auto, options))
    return auto


def _format_setting_count(number: int, which: str = "") -> str:
    return f"{number} {which}{'setting' if number == 1 else 'settings'}"


def format_summary(auto: Auto) -> str:
    """Return the text to print: the result, the recommenders, and the next commands."""
    tuned = "The best hyperparameters of each recommender, by NDCG@10 on the validation users for tuning:"
    lines = [*wrap_paragraph(auto.sentence), "", *wrap_paragraph(tuned)]
    for tried in auto.tried:
        count = _format_setting_count(len(tried.trials))
        text = f"{tried.part.label:26} validation NDCG@10 {tried.figure}, {count} tried"
        lines += wrap_paragraph(f"  {text}{f'; {tried.note}' if tried.note else ''}", hang=4)
    lines += [
        "",
        f"{format_duration(auto.seconds)}. Report: {auto.run.report}",
        f"Serve it ({auto.served}): llmrec serve {auto.folder}",
        f"Lists for all users: llmrec rank --model {auto.folder} --all-users --top 10 --to lists.csv",
        f"Lists for a file of requests: llmrec rank --model {auto.folder} --in requests.jsonl --out lists.jsonl",
    ]
    return "\n".join(lines)


def _run_name_and_folder(options: AutoOptions) -> tuple[str, Path]:
    """Return the name and the folder of the run."""
    if options.table.endswith(RECIPE_ENDINGS):
        name = options.name or f"{load_recipe(options.table).name}-auto"
    else:
        name = f"{recipe_name(options.name, options.table)}-auto"
    return name, options.out or Path("runs") / name


def _language_model_device() -> str | None:
    """Return the device for a language model; None if the training libraries are not installed."""
    if not all(map(is_installed, ("torch", "transformers", "trl", "peft"))):
        return None
    from llmrec.models.load import device
    from llmrec.recipe.schema import ModelSection

    return device(ModelSection())


@dataclass
class _Search:
    """Tunes recommenders until a deadline, and reserves time for the final run.

    Attributes:
        cases: The validation users on which the ensembles of the final run are fitted.
    """

    recipe: Recipe
    data: str  # the fingerprint of the split
    state: Path
    parts: Sequence[CandidateMember]
    deadline: float
    budget: float
    say: Callable[[str], None]
    tried: dict[str, TunedMember] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    cases: int = 0

    def first(self) -> None:
        """Run one trial with the defaults of each recommender, cheapest first."""
        every = [TunedMember(part, self._read(part)) for part in self.parts]
        self.tried = {tried.part.label: tried for tried in every}
        untried = [tried for tried in every if not tried.trials]
        self._round(untried, first=True, allowed=lambda waiting: min(self._left(), self.budget * _MAX_FIRST_SHARE))

    def rest(self) -> None:
        """Share the remaining time according to validation results; unused time goes to the other recommenders."""
        able = [tried for tried in self.tried.values() if tried.trials]
        able.sort(key=lambda tried: max(trial.seconds for trial in tried.trials))
        self._round(able, first=False, allowed=self._share)
        # Recommenders that ran out of time continue in unused time; those without a trial come last.
        short = [tried for tried in able if tried.note == _LATE_NOTE]
        self._round(sorted(short, key=_time_weight, reverse=True), first=False, allowed=lambda waiting: self._left())
        late = [tried for tried in self.tried.values() if not tried.trials and tried.note in (_LATE_NOTE, _SLOW_NOTE)]
        self._round(late, first=True, allowed=lambda waiting: self._left() / len(waiting))
        self._round([tried for tried in late if tried.trials], first=False, allowed=self._share)

    def _share(self, waiting: Sequence[TunedMember]) -> float:
        """Return the time for tuning the first of the waiting recommenders, in seconds."""
        equal, promised = 1 / len(waiting), _time_weight(waiting[0]) / sum(map(_time_weight, waiting))
        return self._left() * (0.25 * equal + 0.75 * promised)

    def chosen(self, users: int) -> Recipe:
        """Return the recipe of all recommenders with their best hyperparameters.

        Raises:
            DataError: If no recommender has a trial.
        """
        for tried in self.tried.values():
            # An interrupted recommender has trials that were not yet reported.
            tried.trials = self._read(tried.part)
        if not any(tried.best for tried in self.tried.values()):
            notes = "; ".join(f"{tried.part.label}: {tried.note}" for tried in self.tried.values() if tried.note)
            raise DataError(
                f"no recommender was fitted within the budget ({notes or 'no time'}); increase --budget",
                kind="too-few",
            )
        chosen = self._distinct()
        controls = missing_controls("sequential", [tried.part.baseline for tried, _ in chosen])
        baselines: list[dict[str, Json]] = [{"name": name} for name in controls]
        baselines += [entry for _, entry in chosen]
        recipe = self.recipe.model_dump(mode="json")
        recipe["tasks"]["sequential"]["baselines"] = baselines
        recipe["eval"]["users"] = users
        best = as_recipe(recipe)
        write_text(self.state / "best.yaml", dump_recipe(best))
        return best

    def _distinct(self) -> list[tuple[TunedMember, dict[str, Json]]]:
        """Return the recommenders with their best hyperparameters; the first of several with the same ones."""
        found: list[tuple[TunedMember, dict[str, Json]]] = []
        for tried in self.tried.values():
            if tried.best is not None:
                # `quiet` affects output and is not a hyperparameter
                named = {key: value for key, value in tried.best.parameters.items() if key != "quiet"}
                entry: dict[str, Json] = {"name": tried.part.baseline, **named}
                if all(entry != other for _, other in found):
                    found.append((tried, entry))
        return found

    def best(self, recipe: Recipe, data: SplitDataset) -> Choice:
        """Return the recommender of a recipe with the best trial."""
        baselines = recipe.tasks.present()["sequential"].baselines
        result = [tried.best.value for tried, _ in self._distinct() if tried.best is not None]
        figures = {
            f"sequential/baseline/{entry.label}": value
            for entry, value in zip(baselines[len(baselines) - len(result) :], result, strict=True)
        }
        row = max(figures, key=lambda name: figures[name])
        users = {event.user_id for event in split_validation_users(data, _RESERVED)[0].holdouts("valid")}
        return Choice(row=row, metric="NDCG@10", value=figures[row], users=len(users), figures=figures)

    def _round(self, parts: Sequence[TunedMember], *, first: bool, allowed: TimeAllowance) -> None:
        """Tune recommenders one after another; ``allowed`` returns the seconds for the next one."""
        waiting = list(parts)
        while waiting:
            if self._left() <= 0:
                for tried in waiting:
                    tried.note = "no time left"
                return
            del waiting[: self._try(waiting, first=first, allowed=allowed)]

    def _try(self, waiting: Sequence[TunedMember], *, first: bool, allowed: TimeAllowance) -> int:
        """Tune recommenders in one subprocess until one takes too long or fails; return how many finished."""
        folder = self.state / "trials"
        job = TrialJob(
            recipe=str(self.state / "data.yaml"),
            parts=[entry.part for entry in waiting],
            first=first,
            within=allowed(waiting[-1:]),
            reserved=_RESERVED,
            folder=str(folder),
        )
        log = folder / "log.txt"
        progress = _Progress(folder / AT_FILE, len(waiting))
        known = [len(tried.trials) for tried in waiting]
        with _trial_process(job, log) as child:
            began, may = self.clock(), allowed(waiting)
            while (code := child.poll()) is None and self.clock() - began <= may:
                for index in progress.passed():
                    self._report_trials(waiting[index], known[index], self.clock() - began)
                    began, may = self.clock(), allowed(waiting[index + 1 :])
                time.sleep(_POLL_SECONDS)
        took = self.clock() - began
        for index in progress.passed(done=code == 0):
            self._report_trials(waiting[index], known[index], took)
        if code != 0:
            note = _LATE_NOTE if code is None else f"failed; see {log}"
            self._report_trials(waiting[progress.now], known[progress.now], took, note)
        return min(progress.now + 1, len(waiting))

    def _report_trials(self, tried: TunedMember, known: int, took: float, note: str = "") -> None:
        """Read the trials of a recommender, and report them."""
        tried.trials = self._read(tried.part)
        tried.note = note or ("" if tried.trials else _SLOW_NOTE)
        tried.seconds += took
        figure = f"validation NDCG@10 {tried.figure}" if tried.best else "no result"
        new = tried.trials[known:]
        spent = round(max(took, sum(trial.seconds for trial in new)), 2)
        text = f"{figure}, {_format_setting_count(len(new), 'new ')} tried in {format_duration(spent)}"
        self.say(f"{tried.part.label}: {text}{f'; {tried.note}' if tried.note else ''}")

    def _left(self) -> float:
        """Return the seconds left for tuning."""
        return self.deadline - self.clock() - self._finish_seconds()

    def _finish_seconds(self) -> float:
        """Return the estimated seconds of the final run."""
        able = [tried for tried in self.tried.values() if tried.trials]
        fits = sum(max(trial.seconds for trial in tried.trials) for tried in able)
        has_rankers = self.cases >= MIN_RANKER_CASES and is_installed("lightgbm")
        rankers = _RANKER_SECONDS * self.cases * len(able) ** 2 if has_rankers else 0.0
        return max(_MIN_FINISH_SECONDS, _FINISH_FACTOR * fits + rankers)

    def _read(self, part: CandidateMember) -> list[TrialResult]:
        return read_trials(part.file(self.state / "trials"), self._key(part))

    def _key(self, part: CandidateMember) -> str:
        return trial_key(self.data, part, _RESERVED, self.recipe.seed)


@dataclass
class _Progress:
    """The progress of a subprocess: the index of its current recommender."""

    file: Path
    count: int
    now: int = 0

    def __post_init__(self) -> None:
        self.file.unlink(missing_ok=True)

    def passed(self, *, done: bool = False) -> range:
        """Return the indices of recommenders that finished since the last call."""
        result = self.count if done else json.loads(self.file.read_text()) if self.file.is_file() else 0
        before, self.now = self.now, result
        return range(before, result)


@contextmanager
def _trial_process(job: TrialJob, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run trials in a subprocess, which is killed when the block ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    page = log.with_name("asked.json")
    write_json(page, asdict(job))
    with log.open("ab") as log_file:
        # A separate process group: Ctrl-C reaches only the parent, which ends the search.
        child = subprocess.Popen(
            [sys.executable, "-m", "llmrec.start.auto_trial", str(page)],
            stdout=log_file,
            stderr=log_file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def auto_record(auto: Auto, options: AutoOptions) -> Mapping[str, Any]:
    """Return the content of `auto.json`."""
    return {
        "kind": "auto",
        "table": options.table,
        "budget_seconds": options.seconds,
        "seconds": round(auto.seconds, 1),
        "sentence": auto.sentence,
        "served": auto.served,
        "parts": [
            {
                "label": tried.part.label,
                "baseline": tried.part.baseline,
                "settings": len(tried.trials),
                "validation": tried.best.value if tried.best else None,
                "parameters": tried.best.parameters if tried.best else None,
                "seconds": round(tried.seconds, 1),
                "note": tried.note,
            }
            for tried in auto.tried
        ],
    }
