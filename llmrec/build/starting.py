"""Where training starts: the base model, or the tuned model of another run: public data first, then own data."""

from __future__ import annotations

from pathlib import Path

from llmrec.backends.encode import Encoder
from llmrec.backends.models import load_tokenizer
from llmrec.build.finished import Source, open_run
from llmrec.build.indexing import stored_index
from llmrec.build.study import Study
from llmrec.errors import LlmrecError, RecipeError
from llmrec.recipe import DataSection, Recipe

# What the models of two stages must have in common; the rest may differ between them.
_MODEL = ("name", "shape", "revision", "whole_words")


def start_of(study: Study, encoder: Encoder, base: str, folder: Path) -> str:
    """Return the folder that training starts from: ``base``, or the merged model of the run in ``train.start``.

    Args:
        study: The study.
        encoder: The tokenizer of its base model, with the tokens of its index.
        base: Folder of that model.
        folder: The run folder.

    Raises:
        RecipeError: If that run is not finished, reads or writes tokens otherwise, or may have learned from what this
            one holds out.
    """
    if study.recipe.train.start is None:
        return base
    run = Path(study.recipe.train.start).expanduser()
    if run.resolve() == folder.resolve():
        raise RecipeError(f"train.start: {run} is this run's own folder; give this run another one with --out or name")
    source = earlier(run)
    _same_model(source.recipe, study.recipe, run)
    _nothing_seen(source.recipe, study.recipe, run)
    merged = run / "merged"
    if Encoder(load_tokenizer(str(merged), study.recipe.model), max_length=1).digest != encoder.digest:
        raise RecipeError(
            f"train.start: the tokenizer of {merged} is not that of model.name {study.recipe.model.name} with the "
            "tokens of this recipe's index, so the same text would be other tokens; train both stages from one model "
            "with one index"
        )
    _same_index(source, study, run)
    return str(merged)


def earlier(run: Path) -> Source:
    """Open the run of ``train.start``.

    Raises:
        RecipeError: If it is no finished run, or its merged model is not what its training left.
    """
    try:
        source = open_run(run)
    except LlmrecError as error:
        raise RecipeError(f"train.start: {error}") from error
    if source.merged is None:
        raise RecipeError(
            f"train.start: {run / 'merged'} is not what training left there; make it again with `llmrec train` of that "
            "run's recipe"
        )
    return source


def _same_model(first: Recipe, second: Recipe, run: Path) -> None:
    for key in _MODEL:
        ours, theirs = (getattr(recipe.model, key) for recipe in (second, first))
        if ours != theirs:
            raise RecipeError(
                f"train.start: {run} was tuned with model.{key} {theirs!r} and this recipe has {ours!r}; its other "
                "arms would be of another model; give both the same"
            )


def _same_index(source: Source, study: Study, run: Path) -> None:
    """Refuse codes that mean other items; titles say themselves what they mean."""
    theirs, ours = source.recipe.index, study.recipe.index
    if (theirs and theirs.scheme) != (ours and ours.scheme):
        raise RecipeError(
            f"train.start: {run} was tuned with {f'index.scheme={theirs.scheme}' if theirs else 'no index'}, and this "
            f"recipe has {f'index.scheme={ours.scheme}' if ours else 'none'}; give both the same"
        )
    if theirs is None or study.index is None or (theirs.scheme == "title" and theirs.ids == "text"):
        return
    known = stored_index(run / "merged", theirs.scheme)
    if known is None or known.digest != study.index.digest:
        raise RecipeError(
            f"train.start: {run} was tuned on codes of other items than this recipe's index gives, so what it learned "
            "of a code would be told of another item; write items as titles (index.scheme=title, or no index), or use "
            "the same data, index and seed in both stages"
        )


def _nothing_seen(first: Recipe, second: Recipe, run: Path) -> None:
    """Refuse a first stage on the same table that held out other interactions, or other items of alignment."""
    for theirs in filter(None, (first.data, first.reviews)):
        for ours in filter(None, (second.data, second.reviews)):
            same = (theirs.source, theirs.path) == (ours.source, ours.path)
            if same and (_held(theirs), first.seed) != (_held(ours), second.seed):
                raise RecipeError(
                    f"train.start: {run} was trained on {ours.path or ours.source} too, with another filter, split or "
                    "seed, so it may have learned what is held out here; give both stages the same"
                )
    codes = (first.tasks.alignment, second.tasks.alignment)
    if codes[1] is not None and second.index == first.index and second.index is not None:
        told = codes[0].held_out if codes[0] is not None else None
        if told != codes[1].held_out or first.seed != second.seed:
            raise RecipeError(
                f"train.start: {run} did not hold out the items that tasks.alignment asks about here; give both stages "
                "the same tasks.alignment.held_out and seed"
            )


def _held(section: DataSection) -> object:
    """Return what decides which interactions are held out."""
    return section.model_dump(exclude={"noun", "rating_scale"})
