"""Opens the models of a run, an exported folder or a pretrained model, by name; see `open_models`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrec.answer.checks import read_bundle
from llmrec.answer.classic import FittedBaseline, training_data
from llmrec.answer.ensemble import Ensemble
from llmrec.answer.known import Items, read_catalogue
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.listing import COLD_START_NOTE
from llmrec.answer.options import PLAIN, TUNED, UNTUNED, RecommenderOptions
from llmrec.answer.recommender import (
    POPULAR,
    RANK,
    SIMILAR,
    AnnotatedAnswer,
    Card,
    Question,
    Reasons,
    Recommender,
    check_verb,
    match_model_name,
)
from llmrec.answer.strategy import items_only_data, ranking_families_of
from llmrec.backends.vllm.adapters import Adapter, loadable_adapters
from llmrec.backends.vllm.backend import free_gpu_share
from llmrec.baselines.fits import fit_or_restore
from llmrec.baselines.parameters import create_baseline, input_hashes
from llmrec.baselines.retrieve import check_retriever
from llmrec.data.assemble import digest_items, read_items
from llmrec.data.requests import RankRequest
from llmrec.data.split import SplitDataset
from llmrec.display import Displayed, Summary
from llmrec.ensembles import stored
from llmrec.ensembles.carried import INTERACTIONS_FILE
from llmrec.ensembles.members import ENSEMBLE_NAMES, member_training_data
from llmrec.errors import DataError, LlmrecError, RecipeError, did_you_mean
from llmrec.models.load import model_folder_hash, resolve_model_folder
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline.bundle import Bundle
from llmrec.pipeline.study import load_tables, with_text_baseline
from llmrec.recipe.load import load_stored_recipe
from llmrec.recipe.schema import BaselineSection, Recipe, TasksSection
from llmrec.registry import BASELINES, import_component, is_plugin
from llmrec.tasks.family import families, is_family_supported
from llmrec.types import Item

POPULARITY = "popularity"
"""The model for cold-start users."""
_SIMILARITY_BASELINES: Mapping[str, str] = {"interactions": "item-knn", "text": "content"}


@dataclass(repr=False)
class Models(Displayed):
    """A set of open models by name, with a common catalogue.

    Attributes:
        opened: The models by name, the default first.
        items: The catalogue; `change_items` changes it.
        data: The training data of baselines, if any.
        scale: The lowest and highest rating, if ratings are predicted.
        blank: Data without interactions.
    """

    opened: dict[str, Recommender]
    items: Items
    data: SplitDataset | None
    scale: tuple[float, float] | None
    blank: SplitDataset
    _similar: dict[str, Recommender] = field(default_factory=dict)
    _languages: Mapping[str, LanguageModel] = field(default_factory=dict)
    # A signature covers the whole catalogue, so it is computed only once per state of the catalogue.
    _cards: dict[str, Card] = field(default_factory=dict)

    def _summary(self) -> Summary:
        rows = [(model.name, model.kind, ", ".join(model.verbs)) for model in self.opened.values()]
        return Summary(f"Models over {len(self.items):,} items", header=("model", "kind", "answers"), rows=rows)

    def get(self, name: str | None = None) -> Recommender:
        """Return a model by name; the default model if None."""
        if name is None:
            return next(iter(self.opened.values()))
        known = match_model_name(name, self.opened)
        if known is None:
            raise RecipeError(
                f"there is no model {name!r}{did_you_mean(name, self.opened)}; there are {', '.join(self.opened)}",
                kind="unknown-name",
                column="model",
            )
        return self.opened[known]

    @property
    def popular(self) -> Recommender | None:
        """The model that recommends popular items to cold-start users; None without data."""
        return None if self.data is None else self._kept(POPULARITY)

    def similar(self, by: str) -> Recommender:
        """Return the model that finds similar items.

        Args:
            by: ``interactions`` or ``text``.
        """
        if self.data is None and not (by == "text" and self.items):
            raise DataError(
                f"similar by {by}: this model has no interactions or items; serve the run, or an export made with "
                "--with-interactions, or give a table with --items and use by=text",
                kind="unsupported",
                column="by",
            )
        return self._kept(_SIMILARITY_BASELINES[by])

    def model_for(self, question: Question) -> Recommender:
        """Return the model that answers a question.

        Raises:
            LlmrecError: If no model has that name, or it does not answer the verb.
        """
        if question.verb == SIMILAR:
            return self.similar(str(question.model))
        if question.verb == POPULAR and (popular := self.popular) is not None:
            return popular
        model = self.get(question.model)
        check_verb(model, RANK if question.verb == POPULAR else question.verb)
        return model

    def answer(
        self,
        question: Question,
        requests: Sequence[RankRequest],
        listener: Callable[[str], None] | None = None,
    ) -> list[AnnotatedAnswer]:
        """Answer the same question for several requests, in order; see `Recommender.answer`.

        Raises:
            LlmrecError: If no model answers the question.
        """
        model = self.model_for(question)
        lists = question.verb in (SIMILAR, POPULAR)
        answers = model.answer(requests, replace(question, verb=RANK) if lists else question, listener)
        if question.verb == POPULAR and self.popular is not None:
            return [replace(item, cold=True, notes=(*item.notes, COLD_START_NOTE)) for item in answers]
        return answers

    def prompt(self, question: Question, request: RankRequest) -> str | None:
        """Return the prompt of a request; None if the model is not a language model or rendering fails."""
        model = self.get(question.model)
        try:
            return model.prompt(request, question) if isinstance(model, LanguageModel) else None
        except LlmrecError:
            return None

    def reasons(
        self, question: Question, requests: Sequence[RankRequest], lists: Sequence[AnnotatedAnswer], first: int
    ) -> list[Reasons]:
        """Return explanations for the first items of lists; if there are none, a note says why."""
        model = self.get(question.model)
        if not isinstance(model, LanguageModel | Ensemble):
            note = f"{model.name} is neither a language model nor an ensemble, so it cannot explain its rankings"
            return [Reasons(notes=[note]) for _ in requests]
        try:
            return model.reasons(requests, lists, question, first)
        except LlmrecError as error:
            return [Reasons(notes=[str(error)]) for _ in requests]

    def cards(self) -> tuple[Card, ...]:
        """Return descriptions of all models, the default model first."""
        return tuple(self.card(model) for model in self.opened.values())

    def card(self, model: Recommender) -> Card:
        """Return the description of a model."""
        if model.name not in self._cards:
            self._cards[model.name] = Card(
                name=model.name,
                kind=model.kind,
                signature=model.signature,
                verbs=tuple(model.verbs),
                strategies=tuple(model.strategies),
            )
        return self._cards[model.name]

    def change_items(self, put: Mapping[str, Item], removed: Sequence[str] = ()) -> tuple[Card, ...]:
        """Add, replace and remove items of the catalogue, and return the descriptions of all models."""
        self.items.change(put, removed)
        for model in self._languages.values():
            model.changed()
        # Text similarity is computed again for new items.
        self._similar.pop(_SIMILARITY_BASELINES["text"], None)
        self._cards.clear()
        return self.cards()

    def close(self) -> None:
        """Stop the engines."""
        for model in self._languages.values():
            model.close()

    def _kept(self, name: str) -> Recommender:
        known = match_model_name(name, self.opened)
        if known is not None and name != _SIMILARITY_BASELINES["text"]:
            return self.opened[known]
        if name not in self._similar:
            # text similarity needs no interactions
            data = self.data or self.blank
            self._similar[name] = _fit_baseline(BaselineSection(name=name), data, self.items, seed=data.seed)
        return self._similar[name]


def open_models(options: RecommenderOptions, names: Sequence[str] = ()) -> Models:
    """Open a run or exported folder, and return its models.

    Args:
        options: ``model`` names a run, an exported folder, or a model; the rest configures a language model.
        names: The models, the default first: `TUNED`, `UNTUNED`, `PLAIN`, a model of the run's report, a baseline, or
            the folder of another run, whose tuned model gets the name of the folder. Default: the model chosen on
            validation users, if the run has no language model or was made by `auto`; the language model, the ensembles
            of the run, and the baselines of its recipe that are fitted in seconds.

    Raises:
        LlmrecError: If a model cannot be opened, or a name is unknown.
    """
    base_options = replace(options, candidates="file", top=None, rationale=0, fuse="none")
    bundle = read_bundle(base_options)
    fusions = _stored_ensembles(bundle)
    languages = _open_language_models(base_options, bundle, names, fusions) if bundle.weights else {}
    base = languages.get(language_model_name(bundle))
    items = Items((base.items if base else read_catalogue(bundle, options.items)[0]) or {})
    data = training_data(bundle, "--models") if _has_interactions(bundle) else None
    models = Models(
        opened={},
        items=items,
        data=data,
        scale=bundle.rating_scale,
        blank=items_only_data(bundle, items),
        _languages=languages,
    )
    finder = _select_retriever(models, fusions)
    for name, model in languages.items():
        model.items, model.name, model.finder = items, name, finder
    for name in dict.fromkeys(names or default_model_names(bundle, items)):
        opened = _open_model(name, options, models, bundle, fusions, base, finder)
        models.opened[opened.name] = opened
    return models


def _open_language_models(
    options: RecommenderOptions, bundle: Bundle, names: Sequence[str], fusions: Mapping[str, stored.StoredEnsemble]
) -> dict[str, LanguageModel]:
    """Return the language model of a folder and other requested models by name, if possible on one GPU engine."""
    base_name, runs = language_model_name(bundle), _read_other_runs(options, names)
    base = {UNTUNED: _base_model_bundle(bundle)} if UNTUNED in names else {}
    if runs:
        together = [bundle, *runs.values()]
        _check_equal("base model", {str(item.run): model_folder_hash(_pretrained_folder(item)) for item in together})
        _check_equal("item codes", {str(item.run): item.index and item.index.digest for item in together})
    needs_bundle = not {base_name, *fusions}.isdisjoint(names)
    tuned = [*([bundle] if needs_bundle else []), *runs.values()]
    adapters = _shared_engine_adapters(tuned, _base_model_bundle(bundle)) if len(tuned) + len(base) > 1 else []
    if len(adapters) + len(base) == 1:
        # A single model is served with merged weights.
        adapters = []

    def opened(options: RecommenderOptions) -> dict[str, LanguageModel]:
        first = LanguageModel.open(options, bundle=bundle, ranks=False, adapters=adapters)
        others = {
            name: LanguageModel.open(replace(options, model=str(other.run)), bundle=other, ranks=False, peer=first)
            for name, other in {**runs, **base}.items()
        }
        return {base_name: first, **others}

    models = opened(options)
    if runs:
        _check_equal("catalogue", {str(item.bundle.run): digest_items(item.items or {}) for item in models.values()})
    requested = [model for name, model in models.items() if name != base_name or needs_bundle]
    shared = [model for model in requested if model.engines.is_shared("vllm", model.weights)]
    engines = len(requested) - max(0, len(shared) - 1)
    if engines > 1 and options.gpu_memory is None and options.backend != "hf" and models[base_name].on_gpu:
        # Otherwise the first engine takes all free GPU memory.
        models = opened(replace(options, gpu_memory=free_gpu_share(options.tensor_parallel) / engines))
    return models


def _read_other_runs(options: RecommenderOptions, names: Sequence[str]) -> dict[str, Bundle]:
    """Return the fine-tuned models of other runs, by name."""
    runs: dict[str, Bundle] = {}
    for folder in dict.fromkeys(names):
        name = _run_model_name(folder)
        if name is None:
            continue
        if options.backend == "openai":
            raise RecipeError(
                f"--models {folder}: a server (--backend openai) has one model; serve this run separately",
                kind="contradiction",
                column="--models",
            )
        if name in runs or name in _reserved_names():
            raise RecipeError(
                f"--models {folder}: {name!r} is the name of another model; rename the folder",
                kind="duplicate",
                column="--models",
            )
        runs[name] = read_bundle(replace(options, model=folder))
        if not runs[name].weights:
            raise RecipeError(
                f"--models {folder}: this run has no language model (eval.arms is empty); serve it separately",
                kind="unsupported",
                column="--models",
            )
    return runs


def _run_model_name(name: str) -> str | None:
    """Return the model name of another run, given its folder; None if it is not the folder of a run."""
    folder = Path(name).expanduser()
    if name in _reserved_names() or not (folder / "recipe.yaml").is_file():
        return None
    return folder.absolute().name


def _reserved_names() -> set[str]:
    return {TUNED, UNTUNED, PLAIN, *ENSEMBLE_NAMES.values(), *BASELINES}


def _check_equal(what: str, values: Mapping[str, object]) -> None:
    """Reject models that differ in a property."""
    (served, expected), *others = values.items()
    for folder, value in others:
        if value != expected:
            raise RecipeError(
                f"--models: {folder} and {served} do not have the same {what}, so one service cannot use both; "
                "serve them separately",
                kind="mismatch",
                at=folder,
                column="--models",
            )


def _shared_engine_adapters(tuned: Sequence[Bundle], base: Bundle) -> list[Adapter]:
    """Return the adapters that vLLM can apply to the base model in one engine."""
    stamp = model_folder_hash(base.folder)
    return [
        adapter
        for bundle in tuned
        if bundle.run is not None
        and load_stored_recipe(bundle.run).train.start is None
        # An engine has one context length, and the embeddings of added tokens may differ.
        and bundle.model.max_length == base.model.max_length
        and model_folder_hash(_base_model_bundle(bundle).folder) == stamp
        for adapter in loadable_adapters(base.folder, stamp, bundle.run / "adapter", model_folder_hash(bundle.folder))
    ]


def default_model_names(bundle: Bundle, items: Mapping[str, Item] | None = None) -> list[str]:
    """Return the names of the models that are opened by default, without opening them; the default model is first.

    Args:
        bundle: The model.
        items: The catalogue; without it the text-similarity recommender, which a run adds at the end, is missing.
    """
    first = [best_validated_model(bundle), language_model_name(bundle)]
    return list(
        dict.fromkeys([*filter(None, first), *_stored_ensembles(bundle), *_fast_baseline_names(bundle, items or {})])
    )


def describe_default_model(folder: str, names: Sequence[str] = ()) -> str:
    """Return a sentence about the default model.

    Args:
        folder: See `open_models`.
        names: See `open_models`.
    """
    bundle = bundles.read(folder)
    default, choice = best_validated_model(bundle), stored.read_ensembles(bundle.source_folder).choice
    if names or default is None or choice is None or not choice.users:
        first = (names or default_model_names(bundle))[0]
        return f"the default is {_run_model_name(first) or first}"
    return (
        f"the default is {default}, the best of {len(choice.figures)} on {choice.users:,} validation users "
        f"({choice.metric} {choice.value:.4f})"
    )


def best_validated_model(bundle: Bundle) -> str | None:
    """Return the model that was best on the validation users; None if the language model is the default."""
    choice = stored.read_ensembles(bundle.source_folder).choice
    if choice is None or not _has_interactions(bundle):
        return None
    return stored.served_model_name(choice, _stored_ensembles(bundle), language_model_name(bundle))


def language_model_name(bundle: Bundle) -> str:
    """Return the name of the language model; empty if there is none."""
    return "" if not bundle.weights else TUNED if bundle.tuned else PLAIN


def _stored_ensembles(bundle: Bundle) -> dict[str, stored.StoredEnsemble]:
    """Return the ensembles that can answer requests, by name."""
    if not _has_interactions(bundle):
        return {}
    arm = TUNED if bundle.tuned else "zero-shot"
    return stored.ensembles_by_name(
        stored.read_ensembles(bundle.source_folder).fusions, ranking_families_of(bundle), arm
    )


def _open_model(
    name: str,
    options: RecommenderOptions,
    models: Models,
    bundle: Bundle,
    fusions: Mapping[str, stored.StoredEnsemble],
    base: LanguageModel | None,
    finder: Recommender | None,
) -> Recommender:
    """Open a model of a folder; ``base`` is the language model of the folder, if any."""
    if (language := models._languages.get(_run_model_name(name) or name)) is not None:
        return language
    # An ensemble can be named by its name or by its id in the report.
    fusion = next((key for key, fused in fusions.items() if name in (key, fused.id)), None)
    if fusion is not None and models.data is not None:
        asks_model = any(part.baseline is None for part in fusions[fusion].parts)
        return Ensemble(fusions[fusion], models.data, models.items, fusion, base if asks_model else None, finder)
    section = _find_baseline_section(bundle.tasks, name)
    if (section.name in BASELINES or is_plugin(BASELINES, section.name)) and models.data is not None:
        return _fit_baseline(section, models.data, models.items, seed=bundle.seed, reserved=reserved_fraction(bundle))
    languages = [base.name, *([UNTUNED] if bundle.run else [])] if base is not None else []
    has = [*languages, *fusions]
    more = " and the baselines of docs/baselines-and-ensembles.md" if models.data is not None else ""
    raise RecipeError(
        f"{options.model} has no model {name!r}{did_you_mean(name, [*has, *BASELINES])}; it has {', '.join(has)}{more}",
        kind="unknown-name",
        column="--models",
    )


def open_baselines(recipe: Recipe, names: Sequence[str], items: Path | None = None) -> Models:
    """Open baselines on the data of a recipe, without a run or a language model.

    Args:
        recipe: The recipe with the training data, and with the parameters in its families.
        names: Baselines that rank, the default first, by name or label in tables.
        items: A table of items that takes precedence over those of the data.

    Raises:
        LlmrecError: If the data cannot be read, or a baseline is unknown.
    """
    chosen = [_find_baseline_section(recipe.tasks, name) for name in names]
    for item in chosen:
        if "(" in item.name:
            rows = dict.fromkeys(
                baseline.label for part in recipe.tasks.present().values() for baseline in part.baselines
            )
            raise RecipeError(
                f"--baseline: the recipe has no baseline {item.name!r}; its baselines are {', '.join(rows)}",
                kind="unknown-name",
                column="--baseline",
            )
        check_retriever(item.name, "--baseline")
    data = load_tables(recipe)[0]
    known = Items(data.dataset.items if items is None else read_items(items))
    models = Models(opened={}, items=known, data=data, scale=data.dataset.rating_scale, blank=data)
    fusion = recipe.eval.fusion
    for item in chosen:
        models.opened[item.label] = _fit_baseline(
            item, data, known, seed=recipe.seed, reserved=fusion.reserved if fusion.controls else 0.0
        )
    return models


def _has_interactions(bundle: Bundle) -> bool:
    """Whether there are interactions for fitting baselines."""
    return bundle.run is not None or (Path(bundle.folder) / INTERACTIONS_FILE).is_file()


def reserved_fraction(bundle: Bundle) -> float:
    """Return the fraction of validation users reserved for ensemble weights and not used for early stopping."""
    if bundle.run is None:
        # An exported folder has no interactions of these users.
        return 0.0
    fusion = load_stored_recipe(bundle.run).eval.fusion
    return fusion.reserved if fusion.controls else 0.0


def _fast_baseline_names(bundle: Bundle, items: Mapping[str, Item]) -> list[str]:
    """Return the names of baselines that are fitted in seconds."""
    if not _has_interactions(bundle):
        return []
    results: list[BaselineSection] = []
    for family in ranking_families_of(bundle):
        methods = {result.name for result in results}
        baselines = with_text_baseline(bundle.tasks.present()[family].baselines, items)
        results += [baseline for baseline in baselines if baseline.name not in methods]
    trained = {
        result.name
        for result in results
        if "epochs" in import_component(BASELINES, result.name, "baseline").Config.model_fields
    }
    cheap = [result.label for result in results if result.name != "random" and result.name not in trained]
    return list(dict.fromkeys([match_model_name(POPULARITY, cheap) or POPULARITY, *cheap]))


def _find_baseline_section(tasks: TasksSection, name: str) -> BaselineSection:
    """Return a baseline by name, with the parameters of the first task that has it."""
    for section in tasks.present().values():
        labels = {baseline.label: baseline for baseline in section.baselines}
        if (result := match_model_name(name, labels)) is not None:
            return labels[result]
    return BaselineSection(name=name)


def _fit_baseline(
    section: BaselineSection,
    data: SplitDataset,
    items: Mapping[str, Item],
    *,
    seed: int,
    reserved: float = 0.0,
    model: Any = None,
) -> FittedBaseline:
    """Return a baseline fitted as in its run, with texts of the current catalogue; ``model`` replaces a new one.

    The fraction ``reserved`` of validation users is not used for early stopping.
    """
    name, parameters = section.name, section.parameters
    # A given class need not be in the registry; it is then treated as a ranking baseline.
    known = model is None or name in BASELINES
    if name == _SIMILARITY_BASELINES["text"]:
        # Removed items that have interactions keep their texts; `FittedBaseline` lists only items of the catalogue.
        data = replace(data, dataset=replace(data.dataset, items={**data.dataset.items, **items}))
    model = create_baseline(name, parameters, seed=seed) if model is None else model
    model = fit_or_restore(model, member_training_data(name, data, reserved) if reserved else data, seed=seed)
    family = prediction_family(name) if known else None
    read = input_hashes(name, parameters) if known else {}
    fingerprint = {"baseline": name, "parameters": dict(parameters), "seed": seed, "read": read}
    return FittedBaseline(section.label, model, data, items, family, fingerprint)


def prediction_family(name: str) -> str | None:
    """Return the task of a baseline that predicts ratings or clicks; None if the baseline ranks."""
    about = (item for item in families().values() if not item.answers_with_items)
    return next((item.name for item in about if is_family_supported(item, BASELINES, name, silent=False)), None)


def open_fitted_baseline(section: BaselineSection, data: SplitDataset, *, seed: int, model: Any = None) -> Models:
    """Fit a baseline on data in memory.

    Args:
        section: The baseline with its parameters.
        data: Its training data, whose items are the catalogue.
        seed: The seed of the fit.
        model: The baseline, to be fitted; None: a new one.
    """
    items = Items(data.dataset.items)
    opened = _fit_baseline(section, data, items, seed=seed, model=model)
    scale = data.dataset.rating_scale
    return Models(opened={opened.name: opened}, items=items, data=data, scale=scale, blank=data)


def _select_retriever(models: Models, fusions: Mapping[str, stored.StoredEnsemble]) -> Recommender | None:
    """Return the retriever for language models without beam search: an ensemble of baselines, or item-kNN."""
    if models.data is None:
        return None
    alone = {name: fused for name, fused in fusions.items() if fused.arm == "baseline"}
    if alone:
        name, widest = max(alone.items(), key=lambda entry: len(entry[1].parts))
        return Ensemble(widest, models.data, models.items, name)
    return models.similar("interactions")


def _base_model_bundle(bundle: Bundle) -> Bundle:
    """Return the base model of a run, with the prompts of the fine-tuned model."""
    # The run stores the base model if tokens were added to it.
    resized = None if bundle.run is None else bundle.run / "base"
    folder = str(resized) if resized is not None and resized.is_dir() else _pretrained_folder(bundle)
    model = bundle.model.model_copy(update={"name": folder})
    return replace(bundle, folder=folder, model=model, tuned=False)


def _pretrained_folder(bundle: Bundle) -> str:
    """Return the folder of the pretrained model from which a run started."""
    if bundle.run is None:
        raise RecipeError(
            f"--models: {bundle.folder} does not record its base model; give the run folder",
            kind="unsupported",
            column="--models",
        )
    recipe = load_stored_recipe(bundle.run)
    return resolve_model_folder(recipe.model, seed=recipe.seed)
