"""Models that rank a file of requests: a language model, or a baseline on the data of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from llmrec.answer.checks import with_resolved_engine
from llmrec.answer.known import Histories, KnownEntities
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.listing import ListSpec
from llmrec.answer.loaded import Loaded
from llmrec.answer.opening import Models, default_model_names, language_model_name, open_baselines, open_models
from llmrec.answer.options import ModelOptions, RecommenderOptions
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.recommender import AnnotatedAnswer, Closeable
from llmrec.data.requests import RankRequest, request_identity
from llmrec.ensembles.members import ENSEMBLE_NAMES
from llmrec.errors import DataError, LlmrecError, RecipeError
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline.resume import StageTimer
from llmrec.recipe.load import load_recipe, load_stored_recipe
from llmrec.types import Item, Unparsed

# Options that also apply to baselines; all others configure a language model.
_BASELINE_OPTIONS = ("items", "candidates", "settings", "top", "batch")
# Options to rank with the language model of a folder, and to open it.
_RANK_OPTIONS = ("task", "template", "strategy", "beams", "exact", "settings", "retrieve", "k", "fuse")
_OPEN_OPTIONS = (*(field.name for field in fields(ModelOptions) if field.name not in ("model", "items")), "max_length")


def with_resolved_model(options: RankOptions) -> RankOptions:
    """Return options in which ``by`` names the model.

    Without ``--by`` it is the default of the folder, or the language model if an option configures one.

    Raises:
        LlmrecError: If an option is incompatible with the model, or the folder cannot be opened.
    """
    if options.baseline is not None:
        if options.by is not None:
            raise RecipeError(
                "--by selects a model of the --model folder, and --baseline uses no folder; drop one of these options",
                kind="contradiction",
                column="--by",
            )
        return options
    _check_model_option(options)
    bundle = bundles.read(options.model)
    base = language_model_name(bundle)
    changed = _changed_options(options, _RANK_OPTIONS)
    by = options.by or (base if base and (changed or options.rationale) else default_model_names(bundle)[0])
    if not bundle.weights:
        changed += _changed_options(options, _OPEN_OPTIONS)
    if by != base and changed:
        ranks = f"--by selects {by!r}" if base else f"{options.model} has no language model and ranks with {by}"
        raise RecipeError(
            f"{changed[0]} configures a language model, but {ranks}; drop {changed[0]}",
            kind="contradiction",
            column=changed[0],
        )
    return replace(options, by=by)


def open_ranker(options: RankOptions, *, store: Path | None, budget: StageTimer) -> Ranker:
    """Open the model that ranks.

    Args:
        options: Options with a model or a baseline.
        store: The answer cache of a language model; None: no cache.
        budget: The recorder of seconds per stage.

    Raises:
        LlmrecError: If an option, a file or the model cannot be used.
    """
    options = with_resolved_model(options)
    if options.baseline is not None or options.named is not None:
        return _NamedRanker(options, open_recommender(options), budget)
    return LanguageModel.open(options, store=store, budget=budget)


def open_recommender(options: RankOptions) -> Loaded:
    """Open the model for use from Python: a baseline on the data of a recipe, or a model of a folder.

    Raises:
        LlmrecError: If it cannot be opened.
    """
    if options.baseline is not None:
        models = _open_baseline_models(options)
        assert models.data is not None
        known = KnownEntities(models.items, Histories.of(models.data.dataset, models.data.seed))
        return Loaded(RecommenderOptions(model=str(options.recipe)), models, known)
    _check_model_option(options)
    given = RecommenderOptions(**{option.name: getattr(options, option.name) for option in fields(RecommenderOptions)})
    model_options = with_resolved_engine(given)
    return Loaded(
        model_options, open_models(model_options, [options.by or default_model_names(bundles.read(options.model))[0]])
    )


def _changed_options(options: RankOptions, names: Iterable[str]) -> list[str]:
    """Return the given options that differ from their defaults, as written on the command line."""
    return ["--set" if name == "settings" else f"--{name.replace('_', '-')}" for name in options.given(names)]


def _check_model_option(options: RankOptions) -> None:
    """Reject options without a model, or with both a recipe and a model."""
    if options.recipe is not None:
        fix = "drop --recipe or --model" if options.model else "add --baseline"
        raise RecipeError(
            f"--recipe requires --baseline NAME; {fix}",
            kind="contradiction",
            column="--recipe",
        )
    if not options.model:
        raise RecipeError(
            "no model is given; use --model, or --baseline with --recipe",
            kind="missing-key",
            column="--model",
        )


def _open_baseline_models(options: RankOptions) -> Models:
    """Fit a baseline on the data of a recipe."""
    names = (field.name for field in fields(RecommenderOptions) if field.name not in _BASELINE_OPTIONS)
    if changed := _changed_options(options, names):
        more = "; --top sets the number of items" if changed[0] == "--k" else ""
        raise RecipeError(
            f"{changed[0]} configures a language model, but --baseline does not use one; drop one of these "
            f"options{more}",
            kind="contradiction",
            column=changed[0],
        )
    if options.recipe is None:
        raise RecipeError(
            "--baseline needs training data; give a recipe or a run folder with --recipe",
            kind="missing-key",
            column="--recipe",
        )
    source = Path(options.recipe)
    if options.baseline in ENSEMBLE_NAMES.values():
        if not source.is_dir():
            raise RecipeError(
                f"--baseline {options.baseline!r} needs the ensemble weights of a run; give its folder with --recipe",
                kind="unsupported",
                column="--recipe",
            )
        return open_models(RecommenderOptions(model=str(source), items=options.items), [str(options.baseline)])
    read = load_stored_recipe if source.is_dir() else load_recipe
    recipe = read(source, options.settings)
    return open_baselines(recipe, [str(options.baseline)], options.items)


class _NamedRanker(Closeable):
    """Ranks with a named model: the candidates, or the whole catalogue if a request has none.

    A request without a history gets the stored history of its user, or the most popular items if the user is
    unknown, as in a service.
    """

    def __init__(self, options: RankOptions, loaded: Loaded, budget: StageTimer) -> None:
        self.budget, self._options, self._loaded = budget, options, loaded

    @property
    def items(self) -> Mapping[str, Item]:
        return self._loaded.items

    @property
    def identity(self) -> dict[str, object]:
        options, signature = self._options, self._loaded.signature()
        known = {"signature": signature, "whole": options.ranks_catalogue, "top": options.top, "batch": options.batch}
        return {**known, "rationale": options.rationale} if options.rationale else known

    @property
    def described(self) -> Mapping[str, object]:
        options, signature = self._options, self._loaded.signature()
        if options.baseline is None:
            reasons = options.rationale > 0
            return {"model": options.model, "by": self._loaded.models[0], "signature": signature, "rationales": reasons}
        named = {"baseline": options.baseline, "signature": signature, "recipe": options.recipe}
        return {**named, "data": self._loaded.data_name}

    @property
    def histories(self) -> str:
        return self._loaded.histories

    def read(self, record: Mapping[str, object], row: int = 1) -> RankRequest | Unparsed:
        whole = self._options.ranks_catalogue or record.get("candidates") is None
        try:
            return self._loaded.read(record, row, whole=whole)
        except DataError as error:
            return Unparsed(request_id=request_identity(record, row)[0] or str(row), reason=str(error))

    def untitled(self, record: Mapping[str, object]) -> str:
        # All items of the data have a title.
        return ""

    def rank(
        self,
        requests: Sequence[RankRequest | Unparsed],
        *,
        advance: Callable[[int], None] = lambda done: None,
        part: int | None = None,
    ) -> list[AnnotatedAnswer]:
        valid = [request for request in requests if isinstance(request, RankRequest)]
        lists = iter(self._loaded.lists(valid, ListSpec(k=self._options.top), rationale=self._options.rationale))
        answers = [
            _to_annotated_answer(request, next(lists) if isinstance(request, RankRequest) else None)
            for request in requests
        ]
        advance(len(requests))
        return answers

    def close(self) -> None:
        self._loaded.close()


def _to_annotated_answer(
    request: RankRequest | Unparsed, answer: AnnotatedAnswer | LlmrecError | None
) -> AnnotatedAnswer:
    if isinstance(request, Unparsed):
        return AnnotatedAnswer(answer=request)
    if isinstance(answer, LlmrecError):
        return AnnotatedAnswer(answer=Unparsed(request_id=request.id, reason=str(answer)), notes=request.notes)
    assert answer is not None
    return answer


Ranker = LanguageModel | _NamedRanker
"""A model that ranks a file of requests: a language model configured by the options, or a named model."""
