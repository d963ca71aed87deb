"""Opens finished runs: verified weights, models to continue from or to distil, and stored results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.backends.encode import Encoder
from llmrec.data.sets.table import resolve_data_paths
from llmrec.durable import parse_checked_json, parse_json
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.models.load import load_tokenizer, model_folder_hash, weights_sha256
from llmrec.pipeline.evaluation import ResultRow, restore_row, row_path
from llmrec.pipeline.indexing import load_stored_index
from llmrec.pipeline.study import Study
from llmrec.recipe.load import load_stored_recipe
from llmrec.recipe.schema import DataSection, Recipe
from llmrec.report.results import parse_results, read_results_json, rewrite_advice
from llmrec.results import Results, Row

# Keys of a data section that name files.
_PATH_KEYS = ("path", "items", "users", "files", "facts", "texts")


@dataclass(frozen=True)
class TrainedRun:
    """A run folder with a verified adapter; ``merged`` is the dtype of its merged model, if there is one."""

    folder: Path
    recipe: Recipe
    record: Mapping[str, Any]
    merged: str | None


def open_run(run: Path) -> TrainedRun:
    """Open a run folder and verify that its adapter matches its training record."""
    if not (run / "recipe.yaml").is_file():
        raise LlmrecError(
            f"{run} is not a run folder (recipe.yaml is missing); give one such as runs/quickstart",
            kind="missing-file",
            at=run,
        )
    recipe = load_stored_recipe(run)
    path = run / "train.json"
    try:
        record = parse_checked_json(path.read_bytes())
        recorded, method, steps = str(record["adapter_sha256"]), str(record["method"]), int(record["steps"])
    except FileNotFoundError:
        raise LlmrecError(
            f"{run} has no finished training (train.json); finish the training with `llmrec train` first",
            kind="missing-file",
            at=path,
        ) from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise LlmrecError(
            f"{path} is not a valid training record ({error!r}); train again with `llmrec train`",
            kind="damaged",
            at=path,
        ) from error
    # Early stopping may have ended training before the planned steps.
    ended = recipe.train.judge is not None and "judged" in record and 0 < steps <= recipe.train.steps
    if method != recipe.train.method or (steps != recipe.train.steps and not ended):
        raise LlmrecError(
            f"{run / 'recipe.yaml'} has {recipe.train.method} and {recipe.train.steps} steps, but {path} records "
            f"{method} and {steps}: another recipe used this folder after training; run the trained recipe again",
            kind="mismatch",
            at=path,
            column="train",
        )
    result = weights_sha256(run / "adapter")
    if result != recorded:
        raise LlmrecError(
            f"the weights in {run / 'adapter'} have the sha256 {result}, but {path} records {recorded}; restore the "
            "files of the training, or train again with `llmrec train`",
            kind="damaged",
            at=run / "adapter",
        )
    return TrainedRun(run, recipe, record, _unchanged_merged_dtype(run / "merged", record))


def _unchanged_merged_dtype(merged: Path, record: Mapping[str, Any]) -> str | None:
    """Return the dtype of a merged model if it has not changed since training; otherwise None."""
    if not (merged / "config.json").is_file() or record.get("merged_sha256") != model_folder_hash(str(merged)):
        return None
    config = parse_json((merged / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype"))


# Model settings that must be equal in consecutive training runs.
_MODEL_KEYS = ("name", "shape", "revision", "whole_words")


def start_model_folder(study: Study, encoder: Encoder, base: str, folder: Path) -> str:
    """Return the folder of the model from which training starts: ``base``, or the merged model of ``train.start``.

    ``encoder`` is the tokenizer of the base model, with the tokens of its index.
    """
    start = study.recipe.train.start
    return (
        base if start is None else _merged_model_folder(study, encoder, Path(start), folder, "train.start", _MODEL_KEYS)
    )


def teacher_model_folder(study: Study, encoder: Encoder, folder: Path) -> str | None:
    """Return the merged model of ``train.teacher``; None if it is not set."""
    teacher = study.recipe.train.teacher
    return (
        None
        if teacher is None
        else _merged_model_folder(study, encoder, Path(teacher.run), folder, "train.teacher", ())
    )


def check_earlier_runs(recipe: Recipe) -> None:
    """Reject earlier runs that are missing or may have been trained on interactions that this recipe holds out."""
    teacher = recipe.train.teacher
    for key, run in (("train.start", recipe.train.start), ("train.teacher", teacher.run if teacher else None)):
        if run is not None and "tuned" in recipe.eval.arms:
            _check_same_holdouts(open_earlier_run(Path(run).expanduser(), key).recipe, recipe, Path(run), key)


def _merged_model_folder(
    study: Study, encoder: Encoder, run: Path, folder: Path, key: str, alike: Sequence[str]
) -> str:
    """Return the merged model of an earlier run, after checking that its model settings match."""
    run = run.expanduser()
    if run.resolve() == folder.resolve():
        raise RecipeError(
            f"{key}: {run} is the folder of this run itself; choose another folder with --out, or another name",
            kind="contradiction",
            at=run,
            column=key,
        )
    source = open_earlier_run(run, key)
    _check_same_model(source.recipe, study.recipe, run, key, alike)
    _check_same_holdouts(source.recipe, study.recipe, run, key)
    merged = run / "merged"
    if Encoder(load_tokenizer(str(merged), study.recipe.model), max_length=1).digest != encoder.digest:
        raise RecipeError(
            f"{key}: the tokenizer of {merged} differs from the tokenizer of model.name {study.recipe.model.name} "
            "with the tokens of this recipe's index; use the same model and index in both runs",
            kind="mismatch",
            at=merged,
            column=key,
        )
    _check_same_index(source, study, run, key)
    return str(merged)


def open_earlier_run(run: Path, key: str = "train.start") -> TrainedRun:
    """Open the earlier run that a recipe names in ``key``."""
    try:
        source = open_run(run)
    except LlmrecError as error:
        raise RecipeError(f"{key}: {error}", kind=error.kind, at=error.location, column=key) from error
    if source.merged is None:
        raise RecipeError(
            f"{key}: {run / 'merged'} does not match the record of its training; run `llmrec train` with the recipe "
            "of that run again",
            kind="damaged",
            at=run / "merged",
            column=key,
        )
    return source


def _check_same_model(first: Recipe, second: Recipe, run: Path, key: str, alike: Sequence[str]) -> None:
    for name in alike:
        ours, theirs = (getattr(recipe.model, name) for recipe in (second, first))
        if ours != theirs:
            raise RecipeError(
                f"{key}: {run} was tuned with model.{name} {theirs!r}, but this recipe has {ours!r}; use the same "
                "model in both runs",
                kind="mismatch",
                at=run,
                column=key,
            )


def _check_same_index(source: TrainedRun, study: Study, run: Path, key: str) -> None:
    """Reject an earlier run whose item codes differ."""
    theirs, ours = source.recipe.index, study.recipe.index
    if (theirs and theirs.scheme) != (ours and ours.scheme):
        raise RecipeError(
            f"{key}: {run} was tuned with {f'index.scheme={theirs.scheme}' if theirs else 'no index'}, but this "
            f"recipe has {f'index.scheme={ours.scheme}' if ours else 'no index'}; use the same index in both runs",
            kind="mismatch",
            at=run,
            column=key,
        )
    if theirs is None or study.index is None or (theirs.scheme == "title" and theirs.ids == "text"):
        return
    known = load_stored_index(run / "merged", theirs.scheme)
    if known is None or known.digest != study.index.digest:
        raise RecipeError(
            f"{key}: in {run}, item codes stand for other items than in this recipe; write items as titles "
            "(index.scheme=title, or no index), or use the same data, index and seed in both runs",
            kind="mismatch",
            at=run,
            column=key,
        )


def _check_same_holdouts(first: Recipe, second: Recipe, run: Path, key: str = "train.start") -> None:
    """Reject an earlier run on the same data with other held-out interactions or items."""
    for theirs in filter(None, (first.data, first.reviews)):
        for ours in filter(None, (second.data, second.reviews)):
            one, other = _holdout_settings(theirs), _holdout_settings(ours)
            same = (one["source"], one["path"]) == (other["source"], other["path"])
            if same and (one, first.seed) != (other, second.seed):
                raise RecipeError(
                    f"{key}: {run} was trained on {ours.path or ours.source} with another filter, split or seed, so "
                    "it may have seen interactions held out here; use the same in both runs",
                    kind="mismatch",
                    at=run,
                    column=key,
                )
    codes = (first.tasks.alignment, second.tasks.alignment)
    if codes[1] is not None and second.index == first.index and second.index is not None:
        held_out = codes[0].held_out if codes[0] is not None else None
        if held_out != codes[1].held_out or first.seed != second.seed:
            raise RecipeError(
                f"{key}: {run} did not hold out the items that tasks.alignment evaluates here; use the same "
                "tasks.alignment.held_out and seed in both runs",
                kind="mismatch",
                at=run,
                column=key,
            )


def _holdout_settings(section: DataSection) -> Mapping[str, object]:
    """Return the settings that determine the held-out interactions, with resolved paths."""
    settings = resolve_data_paths(section).model_dump(exclude={"noun", "rating_scale"})
    return settings | {key: _resolve_paths(settings[key]) for key in _PATH_KEYS}


def _resolve_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _resolve_paths(item) for key, item in value.items()}
    path = Path(value).expanduser() if isinstance(value, str) else None
    return str(path.resolve()) if path is not None and path.exists() else value


# --------------------------------------------------------------------------- stored results


def read_finished_results(run: Path) -> Results:
    """Return the results of a run folder, after checking that its stored answers exist."""
    path = run / "results.json"
    if not path.is_file() or not (run / "rows").is_dir():
        raise DataError(
            f"{run} is not a finished run, since results.json or rows/ is missing; run its recipe",
            kind="missing-file",
            at=run,
        )
    return parse_results(read_results_json(run), source=str(path), fix=rewrite_advice(run))


def read_stored_row(run: Path, figures: Row) -> ResultRow:
    """Return the stored result of a model in a run folder, by its entry in the results."""
    path = row_path(run, figures.id)
    if not path.is_file():
        raise DataError(f"{path} is missing; run the recipe of {run} again", kind="missing-file", at=path)
    try:
        return restore_row(parse_checked_json(path.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}); run the recipe of {run} again", kind="damaged", at=path
        ) from error
