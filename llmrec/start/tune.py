"""`llmrec tune`: hyperparameter search in which each trial is a run evaluated on validation users."""

from __future__ import annotations

import io
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.data.cells import write_rows
from llmrec.data.frames import FRAME_FOLDER, with_frames
from llmrec.display import Displayed, Summary
from llmrec.durable import Json, write_json, write_text
from llmrec.errors import LlmrecError, RecipeError, require
from llmrec.fingerprint import digest_of
from llmrec.pipeline.resume import LOCK_FILE, lock_folder
from llmrec.pipeline.run import run
from llmrec.recipe.load import as_recipe, dump_recipe, format_overrides, recipe_hash
from llmrec.recipe.pages import format_yaml_value, parse_yaml_value
from llmrec.recipe.schema import Recipe
from llmrec.registry import is_lower_better
from llmrec.report.verdicts import wrap_paragraph
from llmrec.report.wording import format_duration
from llmrec.start.options import TuneOptions, budget_seconds
from llmrec.tasks.family import family_of

if TYPE_CHECKING:
    import optuna


# --------------------------------------------------------------------------- the space, such as KEY=1e-4..1e-3


# A range is searched on a log scale if its ends differ by at least this factor.
_LOG_SCALE_FACTOR = 10


@dataclass(frozen=True)
class SearchSpace:
    """The values to search for one key.

    Attributes:
        key: The dotted key, as in overrides.
        values: The values of a list; empty for a range.
        low: The lower end of a range; an integer if both ends are.
        high: The upper end.
    """

    key: str
    values: tuple[Json, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def log(self) -> bool:
        """Whether the range is searched on a log scale."""
        return self.low > 0 and self.high / self.low >= _LOG_SCALE_FACTOR

    def suggest(self, trial: optuna.Trial) -> Json:
        """Return a value suggested by Optuna."""
        if self.values:
            return self.value(trial.suggest_categorical(self.key, [format_yaml_value(value) for value in self.values]))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.key, self.low, self.high, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def parameter(self, value: Json) -> Json | None:
        """Return a value as stored in Optuna's trials; None if it is not in this search space."""
        if self.values:
            # Strings, since Optuna does not accept lists and does not distinguish 1 from True.
            return format_yaml_value(value) if value in self.values else None
        able = isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        return value if able else None

    def value(self, parameter: Json) -> Json:
        """Return the key's value for a parameter of a trial."""
        result: Json = parse_yaml_value(str(parameter), self.key) if self.values else parameter
        return result


def parse_spaces(texts: Sequence[str]) -> tuple[SearchSpace, ...]:
    """Parse the values of ``--over``.

    Raises:
        RecipeError: If a value is malformed, or a key is given twice.
    """
    result = tuple(map(_parse_space, texts))
    if not result:
        raise RecipeError(
            "nothing to search: give a key and its values, such as --over train.learning_rate=1e-4..1e-3",
            kind="missing-key",
            column="--over",
        )
    keys = [space.key for space in result]
    if len(set(keys)) < len(keys):
        raise RecipeError(f"--over: a key is repeated: {', '.join(keys)}", kind="duplicate", column="--over")
    return result


def grid_points(searched: Sequence[SearchSpace]) -> list[dict[str, Json]] | None:
    """Return all hyperparameter combinations if every search space is a list; otherwise None."""
    if any(not space.values for space in searched):
        return None
    keys = [space.key for space in searched]
    return [dict(zip(keys, point, strict=True)) for point in product(*(space.values for space in searched))]


def _parse_space(text: str) -> SearchSpace:
    key, sign, values = text.partition("=")
    key, values = key.strip(), values.strip()
    if not sign or not key or not values:
        raise _malformed_space_error(text)
    low, dots, high = values.partition("..")
    if dots:
        ends = _parse_number(low, key), _parse_number(high, key)
        if ends[0] is None or ends[1] is None or not ends[0] < ends[1]:
            raise _malformed_space_error(text)
        if isinstance(ends[0], int) and isinstance(ends[1], int):
            return SearchSpace(key, (), ends[0], ends[1])
        return SearchSpace(key, (), float(ends[0]), float(ends[1]))
    listed = parse_yaml_value(f"[{values}]", key)
    if not isinstance(listed, list) or not listed or any(isinstance(value, dict) for value in listed):
        raise _malformed_space_error(text)
    if any(isinstance(value, list) for value in listed):
        return SearchSpace(key, tuple(listed))
    return SearchSpace(key, tuple(dict.fromkeys(map(_number_or_value, listed))))


def _parse_number(text: str, key: str) -> int | float | None:
    result = _number_or_value(parse_yaml_value(text, key))
    return result if isinstance(result, int | float) and not isinstance(result, bool) else None


def _number_or_value(value: Json) -> Json:
    """Convert a number that YAML reads as a string, such as 1e-4."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _malformed_space_error(text: str) -> RecipeError:
    return RecipeError(
        f"--over {text!r} is not of the form KEY=LOW..HIGH or KEY=A,B,C, such as train.learning_rate=1e-4..1e-3",
        kind="bad-value",
        column="--over",
    )


log = logging.getLogger(__name__)

_JOURNAL, _BEST, _RECORD, _TABLE, _TRIALS = "study.jsonl", "best.yaml", "tune.json", "trials.csv", "trials"
_OWN_FILES = frozenset({_JOURNAL, f"{_JOURNAL}.lock", _BEST, _RECORD, _TABLE, _TRIALS, FRAME_FOLDER, LOCK_FILE})
# Subfolders of a trial that contain weights.
_WEIGHT_FOLDERS = ("merged", "checkpoints", "base", "best", "adapter")
# The search ends after this number of failures without a success.
_MAX_INITIAL_FAILURES = 3
_STUDY_NAME = "llmrec"


@dataclass(frozen=True, repr=False)
class TuneResult(Displayed):
    """The result of `tune`.

    Attributes:
        recipe: The path of the best recipe.
        metric: ``FAMILY/METRIC``, measured on validation users.
        best: Its figure.
        first: The figure of the unchanged recipe, if its values are in the search space and the trial succeeded.
        chosen: The best values by key.
        trials: Number of trials.
        failed: Number of failed trials.
        seconds: Wall time of this call.
    """

    recipe: Path
    metric: str
    best: float
    first: float | None
    chosen: dict[str, Json]
    trials: int
    failed: int
    seconds: float

    def _summary(self) -> Summary:
        facts = {
            self.metric: f"{self.best:.4f} on validation users",
            "of the unchanged recipe": "" if self.first is None else f"{self.first:.4f}",
            "trials": f"{self.trials}, {self.failed} of them failed" if self.failed else str(self.trials),
            "recipe": str(self.recipe),
            "time": format_duration(self.seconds),
        }
        values = [(key, str(value)) for key, value in self.chosen.items()]
        known = {name: text for name, text in facts.items() if text}
        return Summary("Best recipe found by llmrec.tune", known, ("key", "value"), values)


def search_hyperparameters(
    options: TuneOptions,
    say: Callable[[str], None] = log.info,
    *,
    recipe: Recipe | None = None,
    data: Any = None,
    items: Any = None,
) -> TuneResult:
    """Run a recipe with values of a search space, evaluate each on validation users, and write the best recipe.

    The recipe's own values are the first trial if they are in the space. A space of only lists is searched as a grid,
    in order; with a range, Optuna's TPE samples. The test split is not used. Every trial is kept; the same command
    resumes a killed search, also within a trial.

    Args:
        options: The options of the command.
        say: Listener that gets a line for every trial.
        recipe: A recipe in place of the file in the options.
        data: Interactions as a frame, in place of ``data.path``.
        items: Items as a frame, one row per item, in place of ``data.items``.

    Raises:
        MissingExtra: If Optuna is not installed.
        RecipeError: If a key, a value or the metric cannot be used, or the folder holds another search.
        LlmrecError: If the first trials all fail.
    """
    require("optuna", "tune")
    began = time.monotonic()
    budget = budget_seconds(options.budget)
    result = parse_spaces(options.over)
    page: Recipe | str = recipe or options.recipe
    base = as_recipe(page, options.overrides)
    for space in result:
        value = space.values[0] if space.values else space.low
        as_recipe(page, [*options.overrides, *format_overrides({space.key: value})])
    family, metric = _select_metric(base, options.metric)
    out = options.out or Path("runs") / f"{base.name}-tune"
    with lock_folder(out, _OWN_FILES.__contains__):
        if data is not None or items is not None:
            page = with_frames(as_recipe(page), out, data, items)
            base = as_recipe(page, options.overrides)
        study = _open_study(out, base, result, f"{family}/{metric}")
        _resume_study(study, result, base)
        search = _Search(options, page, out, result, family, metric, say)
        while (reason := search.over(study, began, budget)) is None:
            search.trial(study)
        say(reason)
        return search.written(study, base, time.monotonic() - began)


def format_summary(result: TuneResult) -> str:
    """Return the result as text to print."""
    values = ", ".join(format_overrides(result.chosen))
    first = "" if result.first is None else f"; unchanged recipe: {result.first:.4f}"
    broken = f", {result.failed} of them failed" if result.failed else ""
    verdict = (
        f"best of {result.trials} trials{broken}: {result.metric} {result.best:.4f} on validation users with {values}"
        f"{first}"
    )
    last = f"{format_duration(result.seconds)}. Its recipe, with the test split again: llmrec run {result.recipe}"
    return "\n".join([*wrap_paragraph(verdict), last])


def _select_metric(recipe: Recipe, requested: str | None) -> tuple[str, str]:
    families = recipe.tasks.present()
    family, _, metric = (requested or next(iter(families))).partition("/")
    if family not in families:
        raise RecipeError(
            f"--metric {requested!r}: the recipe has the tasks {', '.join(families)}; use TASK or TASK/METRIC",
            kind="unknown-name",
            column="--metric",
        )
    return family, metric or family_of(family).headline_at(recipe.eval.cutoffs)


def _open_study(out: Path, base: Recipe, searched: Sequence[SearchSpace], metric: str) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=_STUDY_NAME,
        storage=JournalStorage(JournalFileBackend(str(out / _JOURNAL))),
        sampler=optuna.samplers.TPESampler(seed=base.seed),
        direction="minimize" if is_lower_better(metric.partition("/")[2]) else "maximize",
        load_if_exists=True,
    )
    mark = digest_of(recipe=recipe_hash(base), spaces=[repr(space) for space in searched], metric=metric)
    known = study.user_attrs.get("of")
    if known is None:
        study.set_user_attr("of", mark)
    elif known != mark:
        raise RecipeError.at(
            out,
            "mismatch",
            " contains a search with another recipe, other values or another metric; choose another --out, or "
            "remove the folder",
            "--out",
        )
    return study


def _resume_study(study: optuna.Study, searched: Sequence[SearchSpace], base: Recipe) -> None:
    """Resume an interrupted search, or start a new one with the recipe's own values."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"again": True})
    if study.trials:
        return
    initial = {space.key: space.parameter(_recipe_value(base, space.key)) for space in searched}
    known = [] if None in initial.values() else [initial]
    points = [
        {space.key: space.parameter(point[space.key]) for space in searched} for point in grid_points(searched) or ()
    ]
    for point in [*known, *(point for point in points if point not in known)]:
        study.enqueue_trial(point)


def _recipe_value(recipe: Recipe, key: str) -> Json:
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    result: Json = value
    return result


@dataclass(frozen=True)
class _Search:
    options: TuneOptions
    page: Recipe | str
    out: Path
    spaces: tuple[SearchSpace, ...]
    family: str
    metric: str
    say: Callable[[str], None]

    def over(self, study: optuna.Study, began: float, budget: float) -> str | None:
        """Return why the search ends; None if another trial begins."""
        from optuna.trial import TrialState

        trials = [trial for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.FAIL)]
        seconds = [trial.user_attrs["seconds"] for trial in trials if "seconds" in trial.user_attrs]
        waiting = study.get_trials(states=(TrialState.WAITING,))
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        broken = [trial.user_attrs["error"] for trial in trials if "error" in trial.user_attrs]
        if len(broken) >= _MAX_INITIAL_FAILURES and not complete:
            raise LlmrecError(f"the first {len(broken)} trials failed, the last with: {broken[-1]}", kind="failed")
        if self.options.trials is not None and len(complete) + len(broken) >= self.options.trials:
            return f"{self.options.trials} trials are done"
        if grid_points(self.spaces) is not None and trials and not waiting:
            return "all settings were tried"
        spent = time.monotonic() - began
        if complete and spent + max(seconds, default=0.0) > budget:
            return f"another trial would exceed the budget ({format_duration(spent)} of {format_duration(budget)} used)"
        return None

    def trial(self, study: optuna.Study) -> None:
        """Run a trial, and report its result or failure to Optuna."""
        from optuna.trial import TrialState

        trial = study.ask()
        point = {space.key: space.suggest(trial) for space in self.spaces}
        shown = ", ".join(format_overrides(point))
        begin = time.monotonic()
        try:
            value, question = self._evaluate(point)
        except LlmrecError as error:
            if error.column == "--metric":
                raise
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=TrialState.FAIL)
            self.say(f"trial {trial.number}: {shown} failed: {error}")
            return
        trial.set_user_attr("seconds", time.monotonic() - begin)
        self._same(study, question, shown)
        study.tell(trial, value)
        self.say(
            f"trial {trial.number}: {shown}: {self.family}/{self.metric} {value:.4f} in "
            f"{format_duration(time.monotonic() - begin)}; best {study.best_value:.4f}"
        )
        self._tidy(self._folder(study.best_params))

    def written(self, study: optuna.Study, base: Recipe, seconds: float) -> TuneResult:
        """Write the best recipe, the record and the table of trials."""
        from optuna.trial import TrialState

        complete = study.get_trials(states=(TrialState.COMPLETE,))
        failed = [trial for trial in study.trials if "error" in trial.user_attrs]
        if not complete:
            raise LlmrecError(
                f"no trial succeeded; the last failed with: {failed[-1].user_attrs['error']}", kind="failed"
            )
        best = study.best_trial
        chosen = self._values_by_key(best.params)
        recipe = as_recipe(self.page, [*self.options.overrides, *format_overrides(chosen)])
        head = (
            f"# The best of {len(complete)} trials of `llmrec tune`: {self.family}/{self.metric} {best.value:.4f} on "
            "validation users.\n"
        )
        write_text(self.out / _BEST, head + dump_recipe(recipe))
        rows = [
            {"trial": trial.number, **self._values_by_key(trial.params), "value": trial.value, **trial.user_attrs}
            for trial in sorted([*complete, *failed], key=lambda trial: trial.number)
        ]
        write_text(
            self.out / _TABLE,
            _format_csv(rows, ["trial", *(space.key for space in self.spaces), "value", "seconds", "error"]),
        )
        initial = {space.key: space.parameter(_recipe_value(base, space.key)) for space in self.spaces}
        first = next((trial.value for trial in complete if trial.params == initial), None)
        record = {
            "kind": "tune",
            "recipe": self.options.recipe,
            "metric": f"{self.family}/{self.metric}",
            "best": best.value,
            "chosen": chosen,
            "first": first,
            "trials": rows,
        }
        write_json(self.out / _RECORD, record)
        return TuneResult(
            recipe=self.out / _BEST,
            metric=f"{self.family}/{self.metric}",
            best=float(best.value or 0.0),
            first=first,
            chosen=chosen,
            trials=len(complete) + len(failed),
            failed=len(failed),
            seconds=seconds,
        )

    def _same(self, study: optuna.Study, question: dict[str, Json], shown: str) -> None:
        """Reject trials that are evaluated on different test cases, because the easiest would win."""
        first = study.user_attrs.get("question")
        if first is None:
            study.set_user_attr("question", question)
            return
        other = [name for name, value in question.items() if value != first[name]]
        if other:
            raise RecipeError(
                f"--over: the trial with {shown} was evaluated with another {' and another '.join(other)} than the "
                "first trial, so the two are not comparable; search keys of the model, and set keys of the "
                "evaluation with --set",
                kind="mismatch",
                column="--over",
            )

    def _evaluate(self, point: dict[str, Json]) -> tuple[float, dict[str, Json]]:
        """Evaluate hyperparameters on validation users, by the best result of the task.

        Returns:
            The figure, and a description of the question that was evaluated.
        """
        overrides = [*self.options.overrides, *format_overrides(point), "eval.split=valid"]
        recipe = as_recipe(self.page, overrides)
        if "tuned" in recipe.eval.arms:
            recipe = as_recipe(self.page, [*overrides, "eval.arms=[tuned]"])
        params = {space.key: space.parameter(point[space.key]) for space in self.spaces}
        result = run(recipe, self._folder(params))
        rows = [row for row in result.results["rows"] if row["task"] == self.family]
        models = [row for row in rows if row["arm"] != "baseline"]
        known = [row for row in models or rows if row["metrics"].get(self.metric, {}).get("value") is not None]
        if not known:
            raise RecipeError(
                f"--metric: no model of {self.family} has the metric {self.metric}; choose one of "
                f"{', '.join(sorted({name for row in rows for name in row['metrics']}))}",
                kind="unknown-name",
                column="--metric",
            )
        best = (min if is_lower_better(self.metric) else max)(
            known, key=lambda row: row["metrics"][self.metric]["value"]
        )
        data = result.results["data"][result.results["tables"][self.family]]
        return float(best["metrics"][self.metric]["value"]), {
            "split": data["split_fingerprint"],
            "candidate set": best["candidates"],
            "number of cases": best["n"],
            "metric signature": best["metrics"][self.metric]["signature"],
        }

    def _folder(self, params: Mapping[str, Any]) -> Path:
        return self.out / _TRIALS / digest_of(**params)

    def _tidy(self, best: Path) -> None:
        """Remove the weights of all trials but the best."""
        for folder in (self.out / _TRIALS).iterdir():
            if folder != best and folder.is_dir() and not folder.is_symlink():
                for name in _WEIGHT_FOLDERS:
                    if (folder / name).is_dir() and not (folder / name).is_symlink():
                        shutil.rmtree(folder / name)

    def _values_by_key(self, params: Mapping[str, Any]) -> dict[str, Json]:
        return {space.key: space.value(params[space.key]) for space in self.spaces}


def _format_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    write_rows(text, columns, ([row.get(name) for name in columns] for row in rows))
    return text.getvalue()
