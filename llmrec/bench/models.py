"""Fits the models of a benchmark that are not baselines: fine-tuned models of recipes, and ensembles."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrec.backends.cache import AnswerStore
from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.parameters import InputHashes, input_hashes, weights_hash
from llmrec.baselines.tune import CTR_METRIC, RANKING_METRIC, RATING_METRIC, ChosenSetting, Trial, TuningResult
from llmrec.baselines.validation import ranking_cases, rating_cases
from llmrec.data.split import SplitDataset, liked_threshold, scale_of, split_validation_users
from llmrec.durable import sha256_of
from llmrec.ensembles.blend import PredictionEnsemble
from llmrec.ensembles.cells import ScoreScale
from llmrec.ensembles.context import ContextFeatures
from llmrec.ensembles.members import baseline_reads, baseline_score_scale, combined_reads
from llmrec.ensembles.rankers import CatalogueEnsemble, CatalogueMember
from llmrec.ensembles.weights import EnsembleTrial
from llmrec.errors import RecipeError
from llmrec.evaluate.lists import ListMetricData
from llmrec.index.semantic import item_fields, item_vectors
from llmrec.metrics.beyond import ItemContents
from llmrec.models.text_encoder import text_embedder
from llmrec.pipeline.engines import Engines
from llmrec.pipeline.run import open_session
from llmrec.prompts.template import load_templates
from llmrec.recipe.comparisons import Suite, SuiteRow
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe, SemanticIndex
from llmrec.registry import BASELINES, TASKS, import_component, plugin_digests, task_name_in_recipes
from llmrec.results import Reads
from llmrec.strategies.asking import Prompting
from llmrec.strategies.catalogue import CatalogueRanker, SearchedCatalogue
from llmrec.tasks.family import Family, family_of
from llmrec.types import Case, CatalogueScorer, Probability, Ranking, Rating

log = logging.getLogger(__name__)

# Number of random validation cases on which an ensemble is fitted; each has some hundred candidates.
_MAX_WEIGHING_CASES = 20_000


def _recipe_inputs(recipe: Recipe) -> Mapping[str, Any]:
    """Return the recipe settings and file hashes that determine a cached result."""
    families = recipe.tasks.present()
    templates = {name: load_templates(name, family_of(name).prompts, *recipe.prompts) for name in families}
    index = recipe.index
    path = Path(index.path) if index is not None and index.path else None
    return {
        "recipe": recipe.model_dump(mode="json"),
        "templates": {name: sorted(entry.sha for entry in entries.values()) for name, entries in templates.items()},
        "model": weights_hash(recipe.model.name) if recipe.model.shape is None else None,
        "encoders": [weights_hash(recipe.encoder), weights_hash(index.semantic.encoder) if index is not None else None],
        "index": sha256_of(path) if path is not None and path.is_file() else None,
        **plugin_digests([(TASKS, task_name_in_recipes(name)) for name in families]),
    }


def _form_parameters(tried: EnsembleTrial | None) -> dict[str, Any]:
    """Return the type of an ensemble as parameters for its record."""
    assert tried is not None
    return {"form": tried.form, "of": tried.name}


def suite_family(suite: Suite) -> Family:
    """Return the task of a benchmark; full ranking predicts the next item."""
    return family_of("sequential" if suite.task == "ranking" else suite.task)


@dataclass
class Models:
    """Fits models; members of ensembles are fitted once per split and seed, and kept until the benchmark ends.

    Attributes:
        suite: The suite.
        folder: Folder of models and their rankings, from which a killed suite resumes.
        chosen: Parameters of finished rows, by label and table.
        earlier: Seconds that earlier calls spent on models and fits that this one reuses.
    """

    suite: Suite
    folder: Path
    chosen: dict[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    earlier: float = 0.0
    _fitted: dict[tuple[str, str, int], list[Any]] = field(default_factory=dict)
    _backgrounds: dict[str, ListMetricData] = field(default_factory=dict)
    _split: dict[str, tuple[SplitDataset, SplitDataset]] = field(default_factory=dict)

    def fit(self, row: SuiteRow, data: SplitDataset, seed: int, table: str, parameters: Mapping[str, Any]) -> Any:
        """Return the fitted model for an entry of the benchmark.

        Args:
            row: The row.
            data: The split to fit it on.
            seed: Seed of the row, and of the members of an ensemble.
            table: The table of its figures; members of an ensemble have the parameters chosen for it.
            parameters: The chosen parameters; for an ensemble the keys ``form`` and ``of``.
        """
        if row.fuse:
            form = EnsembleTrial(parameters["form"], parameters["of"], 0.0)
            return self._fused(row, data, seed, table, only=form)
        known = self._fitted.get((row.label, data.fingerprint, seed), [])
        if row.baseline is None:
            model = known[0] if known else self._tuned(row, self.choosing(data), seed)
        else:
            model = fit_baseline(row.baseline, parameters, self.choosing(data), seed=seed, like=known)
            self.earlier += model.recalled
        self.keep(row, data, seed, model)
        return model

    def keep(self, row: SuiteRow, data: SplitDataset, seed: int, model: Any) -> None:
        """Keep a fitted model in memory if an ensemble needs it later."""
        if any(row.label in other.fuse for other in self.suite.rows):
            known = self._fitted.setdefault((row.label, data.fingerprint, seed), [])
            if not any(model is entry for entry in known):
                known.append(model)

    def choose(self, row: SuiteRow, data: SplitDataset, tables: Sequence[str]) -> TuningResult:
        """Select the type and the weights of an ensemble on validation users."""
        if row.fuse:
            return self._choose_ensemble(row, data, tables)
        only = ChosenSetting(dict(self._recipe(row)[1]))
        return TuningResult(choices=dict.fromkeys(tables, only), trials=(), metric="nothing to choose")

    def inputs(self, row: SuiteRow) -> Any:
        """Return additional inputs of a model's cache key."""
        if row.recipe:
            return _recipe_inputs(self._recipe(row)[0])
        if row.baseline is not None:
            return [*self.read(row), *plugin_digests([(BASELINES, row.baseline)]).values()]
        return [[member.model_dump(mode="json"), self.inputs(member)] for member in self.members(row)]

    def members(self, row: SuiteRow) -> list[SuiteRow]:
        """Return the rows that an ensemble combines; empty for other rows."""
        return [self._row_by_label(label) for label in row.fuse]

    def read(self, row: SuiteRow) -> list[InputHashes]:
        """Return hashes of the files that a baseline reads in addition to the data."""
        values = [
            (name, value) for name, many in row.grid.items() for value in many if not isinstance(value, int | float)
        ]
        every = [row.parameters, *({**row.parameters, name: value} for name, value in values)]
        return [result for entry in every if (result := input_hashes(str(row.baseline), entry))]

    def reads(self, row: SuiteRow) -> Reads:
        """Return which item data a model (or any member of an ensemble) reads."""
        if row.fuse:
            return combined_reads([self.reads(member) for member in self.members(row)])
        if row.baseline is not None:
            return baseline_reads(row.baseline, row.parameters)
        recipe = self._recipe(row)[0]
        if recipe.model.shape is None:
            return "language model"
        # Trained from scratch: item embeddings are initialised from text vectors or at random.
        return "texts" if recipe.index is None or recipe.index.tokens == "vectors" else "events"

    def stochastic(self, row: SuiteRow) -> bool:
        """Whether the result of a model depends on the seed."""
        if row.baseline is not None:
            return bool(import_component(BASELINES, row.baseline, "baseline").stochastic)
        return not row.fuse or any(map(self.stochastic, self.members(row)))

    def choosing(self, data: SplitDataset) -> SplitDataset:
        """Return a split with only the validation users for selecting hyperparameters and epochs."""
        if not any(row.fuse for row in self.suite.rows):
            return data
        return self._validation_halves(data)[0]

    def _validation_halves(self, data: SplitDataset) -> tuple[SplitDataset, SplitDataset]:
        """Return two splits: with the validation users for hyperparameters, and for ensemble weights."""
        if data.fingerprint not in self._split:
            self._split[data.fingerprint] = split_validation_users(data, self.suite.reserved)
        return self._split[data.fingerprint]

    def background(self, data: SplitDataset) -> ListMetricData:
        """Return the training data from which list metrics are computed, for one split.

        Raises:
            LlmrecError: If no item has the field of the suite's ``diversity``, or its text encoder is missing.
        """
        if data.fingerprint not in self._backgrounds:
            diversity = self.suite.diversity
            result = ListMetricData.of(data, field=diversity.field if diversity else None)
            if diversity is not None and diversity.encoder is not None:
                items = [data.dataset.items[item] for item in result.items]
                vectors = item_vectors(items, item_fields(items, SemanticIndex()), text_embedder(diversity.encoder))
                result = replace(result, contents=ItemContents(vectors=vectors, source=diversity.encoder))
            self._backgrounds[data.fingerprint] = result
        return self._backgrounds[data.fingerprint]

    # ----------------------------------------------------------------------- ensembles and recipes

    def _row_by_label(self, label: str) -> SuiteRow:
        return next(row for row in self.suite.rows if row.label == label)

    def _choose_ensemble(self, row: SuiteRow, data: SplitDataset, tables: Sequence[str]) -> TuningResult:
        """Fit all types of ensemble for each table of results."""
        choices, trials = {}, []
        metric = {Ranking: RANKING_METRIC, Rating: RATING_METRIC, Probability: CTR_METRIC}[
            suite_family(self.suite).answer
        ]
        for table in tables:
            model = self._fused(row, data, self.suite.seeds[0], table, ablate=table == tables[0])
            trials += [Trial(_form_parameters(entry), {table: abs(entry.value)}) for entry in model.tried]
            choices[table] = ChosenSetting(_form_parameters(model.chosen), model=model)
        return TuningResult(choices=choices, trials=tuple(trials), metric=metric)

    def _fused(
        self,
        row: SuiteRow,
        data: SplitDataset,
        seed: int,
        table: str,
        *,
        ablate: bool = False,
        only: EnsembleTrial | None = None,
    ) -> CatalogueEnsemble | PredictionEnsemble:
        """Return a fitted ensemble of models.

        Where items of the history can be ranked, the ensemble weighs them itself. So its members have the parameters
        chosen for other items, if there is a table of these.

        Args:
            row: The ensemble.
            data: The split.
            seed: Seed of its members.
            table: Its table.
            ablate: See `CatalogueEnsemble.fit`.
            only: The chosen form; None to choose it.

        Raises:
            RecipeError: If a member is an ensemble.
        """
        models = {}
        of = "excluded" if suite_family(self.suite).answer is Ranking and "excluded" in self.suite.seen else table
        for label in row.fuse:
            part = self._row_by_label(label)
            if part.fuse:
                raise RecipeError(
                    f"suite {self.suite.suite}: {row.label} has the ensemble {label} as a member; list its members "
                    "instead",
                    kind="unsupported",
                    column="rows.fuse",
                )
            # A deterministic member is fitted once for all seeds.
            fitted_with = seed if self.stochastic(part) else self.suite.seeds[0]
            models[label] = self.fit(part, data, fitted_with, of, self.chosen[label][of])
        weighing = self._validation_halves(data)[1]
        if suite_family(self.suite).answer is Ranking:
            parts = [CatalogueMember(label, model, self._score_kind(label)) for label, model in models.items()]
            result: CatalogueEnsemble | PredictionEnsemble = CatalogueEnsemble(
                row.label, parts, filtered=table == "excluded", context=ContextFeatures(data), learns=row.ranker
            )
            result.fit(ranking_cases(weighing, _MAX_WEIGHING_CASES), ablate=ablate, only=only)
        else:
            result = PredictionEnsemble(
                row.label, list(models.items()), predicts_probability=suite_family(self.suite).answer is Probability
            )
            result.fit(self._rating_cases(weighing), ablate=ablate, only=only)
        log.info("%s, %s: %s", row.label, table, result.fitted)
        return result

    def _score_kind(self, label: str) -> ScoreScale:
        """Return how an ensemble must convert a model's scores."""
        name = self._row_by_label(label).baseline
        return "beams" if name is None else baseline_score_scale(name)

    def _rating_cases(self, data: SplitDataset) -> list[Case]:
        """Return the validation ratings as cases; for CTR tasks with 1 or 0 as true answer."""
        cases = rating_cases(data)
        if suite_family(self.suite).answer is Rating:
            return cases
        least = liked_threshold(scale_of(data), self.suite.liked)
        return [replace(case, truth=float(float(case.truth) >= least)) for case in cases]

    def _recipe(self, row: SuiteRow) -> tuple[Recipe, dict[str, str | int]]:
        """Return the recipe of a model, and its keys for display in tables."""
        recipe = load_recipe(str(row.recipe), row.overrides)
        if recipe.tasks.sequential is None:
            raise RecipeError(
                f"{row.recipe}: a suite ranks the catalogue with tasks.sequential, which this recipe lacks; add this "
                "task",
                kind="missing-key",
                at=str(row.recipe),
                column="tasks.sequential",
            )
        shown: dict[str, str | int] = {
            "model": recipe.model.name if recipe.model.shape is None else "from scratch",
            "index": recipe.index.scheme if recipe.index else "title",
            "steps": recipe.train.steps,
        }
        return recipe, shown

    def _tuned(self, row: SuiteRow, data: SplitDataset, seed: int) -> CatalogueScorer:
        """Fine-tune the model of a recipe on the data of the benchmark, or reuse an earlier one, and open it."""
        recipe = self._recipe(row)[0].model_copy(update={"seed": seed, "data": self.suite.data})
        section = recipe.eval.model_copy(update={"arms": ("tuned",), "backend": "hf", "scorer": "hf"})
        recipe = recipe.model_copy(update={"eval": section})
        folder = self.folder / "models" / f"{row.label}-{seed}-{data.fingerprint[:8]}"
        session = open_session(recipe, folder, data=data)
        reused = session.trained()
        training = reused or session.train()
        self.earlier += training["seconds" if reused else "seconds_before"]
        store = AnswerStore(folder / "answers.sqlite")
        engines = Engines(recipe.model, recipe.eval, session.encoder, seed, session.budget, store)
        backend = engines.get("hf", str(folder / "merged"), training["merged_sha256"])
        task = session.study.tasks["sequential"]
        asker = Prompting(backend=backend, task=task, template=task.eval_templates[0], batch=recipe.eval.batch)
        return SearchedCatalogue(row.label, CatalogueRanker(asker, beams=row.depth, seen=True), task.catalogue)
