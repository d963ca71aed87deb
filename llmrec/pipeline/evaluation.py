"""The evaluation stage: evaluates baselines, language models and ensembles on the same test cases."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from llmrec.backends.cache import CachedBackend
from llmrec.backends.encode import Encoder
from llmrec.baselines.fits import fit_baseline
from llmrec.baselines.rating import UserMean
from llmrec.display import Displayed, Summary
from llmrec.durable import Json, write_checked_json
from llmrec.ensembles.members import (
    ENSEMBLE_NAMES,
    RANDOM_BASELINE,
    PrecomputedMember,
    baseline_reads,
    baseline_score_scale,
    combined_reads,
    describe_ensemble_fit,
    ensemble_weights_record,
    fit_ensemble,
    restore_answers,
    serialise_answer,
)
from llmrec.ensembles.rankers import ListEnsemble
from llmrec.ensembles.stored import choose_served_model
from llmrec.errors import BackendError, EngineFailure, LlmrecError
from llmrec.evaluate.predictor import EvaluationResult, evaluate, explanation_reference
from llmrec.fingerprint import fingerprint
from llmrec.metrics.explained import ExplanationReference
from llmrec.pipeline.engines import TREE_STRATEGIES, Engines
from llmrec.pipeline.objectives import checkpoint_selection_users
from llmrec.pipeline.resume import StageTimer, read_stage
from llmrec.pipeline.row_specs import (
    RowSpec,
    baseline_file_hashes,
    describe_inputs,
    encoder_stamp,
    protocol_of,
    registry_entries,
    specs_for_arm,
    strategy_settings,
    unused_settings,
)
from llmrec.pipeline.study import Study
from llmrec.pipeline.weighing import EnsembleUsers, ensemble_includes_model, ensemble_kinds, fit_task_ensemble
from llmrec.progress import BatchProgress, Progress
from llmrec.recipe.schema import BaselineSection
from llmrec.records import Calibration, ExamplePrompt, Shard
from llmrec.registry import METRICS, is_positional, metric_modules, strategy_eval_options
from llmrec.results import Arm, Choice, FusionWeights, Prediction, Reads, Row, Unevaluated
from llmrec.strategies.asking import MultiPromptStrategy, Prompting, Strategy, create_strategy
from llmrec.strategies.counting import count_prompts
from llmrec.strategies.raters import CalibratedPredictor
from llmrec.tasks.family import family_of
from llmrec.types import Case, Predictor, Prompt, Rating, Request

log = logging.getLogger(__name__)

WeightsByArm = Mapping[Arm, tuple[str, str]]
"""The model folder and the hash of its weights, by setting."""

_EXAMPLES = 2
# Number of prompts to tokenise to size the engine's cache, and tokens to reserve per answer.
_SAMPLE, _ANSWER = 16, 128


@dataclass(frozen=True, repr=False)
class ResultRow(Displayed):
    """An evaluated model, with the data for the report, comparisons and ensembles.

    Attributes:
        figures: Its entry in ``results.json``.
        values: Metrics by request.
        records: Answers by request.
        examples: Prompts with their answers.
        weighing: Answers for the validation users that weigh ensembles, by request id.
        validation: For an ensemble, its cross-fitted metric on the cases of these users, by request id.
        key: Its fingerprint.
        looked_at: Validation users that some choice for the model was based on, and which must not weigh it.
    """

    figures: Row
    values: Mapping[str, NDArray[np.float64]]
    records: Sequence[Prediction] = ()
    examples: Sequence[ExamplePrompt] = ()
    weighing: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)
    key: str = ""
    looked_at: frozenset[str] = frozenset()

    def _summary(self) -> Summary:
        result = self.figures
        header = ("metric", "value", "95 % interval")
        title = f"{result.task}: {result.label}, {result.n:,} requests"
        return Summary(title, {}, header, [result.shown(name) for name in result.metrics])


class Evaluation:
    """Evaluates the models of a study; stored results with the same fingerprint are reused."""

    def __init__(
        self, study: Study, encoder: Encoder | None, folder: Path, budget: StageTimer, *, quiet: bool = False
    ) -> None:
        self._study, self._encoder, self._folder, self._budget = study, encoder, folder, budget
        self._quiet = quiet
        self._fitted: dict[tuple[int, str, str], Any] = {}
        self._backgrounds: dict[str, ExplanationReference] = {}
        self._weighing = EnsembleUsers(study)
        self.missing: dict[str, Unevaluated] = {}
        """Rows that no engine could answer, by id; see `arms`."""
        self.failures: list[EngineFailure] = []
        """The failures of these engines."""

    def baselines(self) -> list[ResultRow]:
        """Fit and evaluate the baselines of every task, and their ensembles."""
        rows = []
        with self._budget.stage("baselines"):
            for family in self._study.tasks:
                baselines = [self._evaluate_baseline(family, baseline) for baseline in self._study.baselines(family)]
                rows += baselines
                for kind in ensemble_kinds(self._study, family):
                    parts = [row for row in baselines if combined_reads([row.figures.reads, kind]) == kind]
                    rows += self._evaluate_ensemble(
                        RowSpec(baselines[0].figures.task, "baseline", ENSEMBLE_NAMES[kind]), parts
                    )
        return rows

    def _evaluate_baseline(self, family: str, baseline: BaselineSection) -> ResultRow:
        spec = RowSpec(self._study.tasks[family].family, "baseline", baseline.label)
        key = self.key(spec, "numpy", None)
        if (stored := self._kept(spec, key)) is not None:
            return stored
        data, options = self._study.task_data(family), self._study.tasks[family].baseline_options
        shared = (id(data), baseline.label, str(options))
        if shared not in self._fitted:
            # Tasks that read the same data share a fitted baseline.
            self._fitted[shared] = fit_baseline(
                baseline.name,
                {**baseline.parameters, **options},
                self._weighing.choosing(baseline.name, data),
                seed=self._study.recipe.seed,
                where=f"tasks.{family}.baselines",
            )
            # A reused fit keeps its original cost.
            self._budget.add("baselines", self._fitted[shared].recalled)
        model = self._fitted[shared]
        predictor = self._calibrate_predictor(family, model)
        looked_at = frozenset(getattr(model, "looked_at", ())) | self._calibration_users(family)
        weighing = self._ensemble_weight_answers(spec, predictor)
        result = evaluate(predictor, self._study.cases(family), **self._evaluation_arguments(family))
        reads = baseline_reads(baseline.name, baseline.parameters)
        return self._keep(
            spec,
            key,
            _with_calibration_curve(result, predictor, self._calibrating(spec.family)),
            "numpy",
            reads,
            weighing=weighing,
            looked_at=looked_at,
        )

    def arms(self, weights: WeightsByArm, engines: Engines, baselines: Sequence[ResultRow] = ()) -> list[ResultRow]:
        """Evaluate language models; models that share an engine are evaluated consecutively.

        A row whose engine fails is listed in ``missing``, and a later call evaluates it. ``baselines`` are the rows of
        `baselines`, which are joined with language-model rows if the recipe says so.
        """
        controls = {
            family: [row for row in baselines if row.figures.task == family and row.figures.fusion is None]
            for family in self._study.tasks
        }
        rows: dict[str, ResultRow] = {}
        failed: dict[str, EngineFailure] = {}
        planned = self._plan_language_models(weights, engines)
        for spec, engine, folder, digest in planned:
            alike = [other for other, *where in planned if where == [engine, folder, digest]]
            try:
                rows[spec.id] = self._answered(spec, engines, folder, digest, alike, failed)
            except EngineFailure as failure:
                self.failures += [] if failure in self.failures else [failure]
                failed[engines.engine_for(spec.predictor, folder)] = failure
                self.missing[spec.id] = Unevaluated(**spec.fields, reason=failure.reason)
        results = []
        specs = [spec for arm in weights for spec in specs_for_arm(self._study, arm)]
        for index, spec in enumerate(specs):
            # An ensemble follows the language model that it contains.
            model = specs[index - 1].id if spec.joins else spec.id
            if model in self.missing:
                self.missing[spec.id] = Unevaluated(**spec.fields, reason=self.missing[model].reason)
            elif spec.joins:
                results += self._evaluate_ensemble(spec, [*controls[spec.family], rows[model]])
            else:
                results.append(rows[model])
        return results

    def choice(self, rows: Sequence[ResultRow]) -> Choice | None:
        """Return the model that ranks best on validation users, which will be served."""
        ranks = [family for family in self._study.tasks if family_of(family).ranks_for_users]
        return choose_served_model(rows, {family: self._weighing.cases(family) for family in ranks})

    def _answered(
        self,
        spec: RowSpec,
        engines: Engines,
        folder: str,
        digest: str,
        alike: Sequence[RowSpec],
        failed: Mapping[str, EngineFailure],
    ) -> ResultRow:
        """Return the stored result of any permitted engine, or evaluate the model on the first engine.

        ``alike`` are the rows of the same engine and model. Engines in ``failed`` are not tried again.
        """
        choices = engines.choices(spec.predictor, folder)
        for engine in choices:
            kept = self._kept(spec, self.key(spec, engine, engines.identity(engine, digest)))
            if kept is not None:
                return kept
        if choices[0] in failed:
            raise failed[choices[0]]
        backend = engines.get(choices[0], folder, digest, lambda: self._largest_batch_tokens(alike, backend))
        recalled = backend.recalled_seconds
        with self._budget.stage(spec.arm), self._progress_bar(spec, self._questions(spec)) as bar:
            while True:
                replaced = backend.replaced
                strategy = self._build_strategy(spec, backend, bar.advance)
                predictor = self._calibrate_predictor(spec.family, strategy)
                # The cost includes cases that an interrupted run answered, but not calibration cases or starting the
                # engine, which is a separate stage.
                before = backend.recalled_seconds - backend.start_seconds
                result = evaluate(predictor, self._study.cases(spec.family), **self._evaluation_arguments(spec.family))
                result = _with_added_seconds(result, backend.recalled_seconds - backend.start_seconds - before)
                examples = self._example_prompts(spec, strategy, result)
                weighing = self._ensemble_weight_answers(spec, predictor)
                if backend.replaced == replaced:
                    break
                # A result never mixes answers of two engines.
                bar.restart()
        # Answers of an interrupted run keep their original cost.
        self._budget.add(spec.arm, backend.recalled_seconds - recalled)
        engine = engines.engine_for(spec.predictor, folder)
        looked_at = self._calibration_users(spec.family)
        if spec.arm == "tuned" and self._study.recipe.train.judge is not None:
            looked_at |= checkpoint_selection_users(self._study)
        return self._keep(
            spec,
            self.key(spec, engine, engines.identity(engine, digest)),
            _with_calibration_curve(result, predictor, self._calibrating(spec.family)),
            strategy.engine,
            "language model",
            examples=examples,
            weighing=weighing,
            looked_at=looked_at,
        )

    def _largest_batch_tokens(self, specs: Sequence[RowSpec], backend: CachedBackend) -> int:
        """Return the number of tokens in the largest batch, estimated from the prompts with the longest histories."""
        section, most = self._study.recipe.eval, 0
        for spec in specs:
            strategy = self._build_strategy(spec, backend, lambda done: None)
            prompt = strategy.first_prompt if isinstance(strategy, MultiPromptStrategy) else strategy.asker.prompt
            cases = sorted(self._study.cases(spec.family), key=lambda case: -len(case.request.history))[:_SAMPLE]
            longest = max((self._tokens(prompt(case.request)) for case in cases), default=0)
            # A search reserves an eighth of the cache for prompts, and each order of candidates is a separate prompt.
            times = (
                8 if spec.predictor in TREE_STRATEGIES else section.permutations if is_positional(spec.predictor) else 1
            )
            most = max(most, times * (longest + _ANSWER))
        return section.batch * most

    def _tokens(self, prompt: Prompt) -> int:
        assert self._encoder is not None
        try:
            return len(self._encoder.prompt(prompt))
        except BackendError:  # too long, which is reported as an error of the request
            return self._encoder.max_length

    def _plan_language_models(self, weights: WeightsByArm, engines: Engines) -> list[tuple[RowSpec, str, str, str]]:
        """Return the language models to evaluate, each with its engine, model folder and hash of the weights."""
        specs = [(spec, arm) for arm in weights for spec in specs_for_arm(self._study, arm)]
        planned = [
            (spec, engines.engine_for(spec.predictor, weights[arm][0]), *weights[arm])
            for spec, arm in specs
            if not spec.joins
        ]
        # Start each engine once per model, or once for models that share it; hf runs first, since a vLLM process keeps
        # its memory.
        return sorted(
            planned,
            key=lambda p: (engines.is_shared(p[1], p[3]), list(weights.values()).index(p[2:]), p[1] == "vllm"),
        )

    def _evaluate_ensemble(self, spec: RowSpec, parts: Sequence[ResultRow]) -> list[ResultRow]:
        """Fit and evaluate an ensemble; returns a list with the result, or an empty list without validation users."""
        cases = self._weighing.cases(spec.family, model=spec.arm != "baseline")
        able = [row for row in parts if all(case.request.id in row.weighing for case in cases)]
        if not cases or len(able) < 2:
            return []
        key = fingerprint(
            "ensemble",
            modules=(fit_ensemble.__module__,),
            row=spec.id,
            parts=[row.key for row in able],
            cases=[case.request.id for case in cases],
        )

        if (stored := self._kept(spec, key)) is not None:
            return [stored]
        try:
            members, every = [ensemble_member(row) for row in able], self._weighing.cases(spec.family)
            model = fit_task_ensemble(self._study, spec.family, spec.predictor, members, cases, every)
            result = evaluate(model, self._study.cases(spec.family), **self._evaluation_arguments(spec.family))
        except LlmrecError as error:
            if error.kind not in ("too-few", "leak"):
                raise
            log.warning("%s: cannot be evaluated: %s", spec.id, error)
            return []
        validation = model.validation if isinstance(model, ListEnsemble) else {}
        row = self._keep(
            spec,
            key,
            result,
            "numpy",
            combined_reads([row.figures.reads for row in able]),
            inputs=describe_ensemble_fit(able, cases),
            fusion=ensemble_weights_record(model),
            validation=validation,
        )
        return [row]

    # ------------------------------------------------------------------------- shards

    def shards_key(self, weights: WeightsByArm, engines: Engines) -> str:
        """Return the fingerprint of an evaluation in shards."""
        planned, recipe = self._plan_language_models(weights, engines), self._study.recipe
        rows = [self.key(spec, engine, engines.identity(engine, digest)) for spec, engine, _, digest in planned]
        return fingerprint("evaluate", recipe, rows=rows, batch=recipe.eval.batch)

    def ask(
        self, weights: WeightsByArm, engines: Engines, shard: Shard, report: Callable[[float], None] = lambda _: None
    ) -> None:
        """Evaluate language models on one shard of all test cases.

        Every row gets complete batches of its cases, so that batches are the same as in a single process. Cached
        answers are not computed again. ``report`` is called with the finished fraction of all requests.
        """
        batch = self._study.recipe.eval.batch
        planned = [
            (item, [shard.share(requests, batch) for requests in self._questions(item[0])])
            for item in self._plan_language_models(weights, engines)
        ]
        total, done = sum(len(requests) for _, shares in planned for requests in shares), 0
        for (spec, engine, folder, digest), shares in planned:
            backend = engines.get(engine, folder, digest)
            with self._budget.stage(spec.arm), self._progress_bar(spec, shares) as bar:

                def advance(requests: int, bar: Progress = bar) -> None:
                    nonlocal done
                    bar.advance(requests)
                    done += requests
                    report(min(1.0, done / total))

                predictor = self._build_strategy(spec, backend, advance)
                for requests in filter(None, shares):
                    predictor.answer(requests)

    # ------------------------------------------------------------------------- stored results

    def _kept(self, spec: RowSpec, key: str) -> ResultRow | None:
        """Return the stored result with a fingerprint, or None."""
        stored = read_stage(row_path(self._folder, spec.id), key, restore_row)
        if stored is None:
            return None
        log.info("evaluation: reusing %s", spec.id)
        return restore_row(stored)

    def _keep(
        self,
        spec: RowSpec,
        key: str,
        result: EvaluationResult,
        engine: str,
        reads: Reads,
        *,
        inputs: str | None = None,
        fusion: FusionWeights | None = None,
        examples: Sequence[ExamplePrompt] = (),
        weighing: Mapping[str, Any] | None = None,
        validation: Mapping[str, float] | None = None,
        looked_at: frozenset[str] = frozenset(),
    ) -> ResultRow:
        """Store a result; see `ResultRow`."""
        figures = Row(
            **spec.fields,
            engine=engine,
            reads=reads,
            inputs=inputs or describe_inputs(spec, self._study),
            candidates=self._study.sets_digest(spec.family),
            **({"fusion": fusion} if fusion else {}),
            **result.figures.as_json(),
        )
        stored = {
            "key": key,
            "figures": figures.as_json(),
            "values": {metric: [float(v) for v in values] for metric, values in result.values.items()},
            "records": [record.as_json() for record in result.records],
            "examples": [example.as_json() for example in examples],
            "weighing": dict(weighing or {}),
            "validation": dict(validation or {}),
            "looked_at": sorted(looked_at),
        }
        write_checked_json(row_path(self._folder, spec.id), stored)
        return restore_row(stored)

    def key(self, spec: RowSpec, engine: str, identity: Mapping[str, Any] | None) -> str:
        """Return the fingerprint of a result."""
        study, recipe, model = self._study, self._study.recipe, spec.template is not None
        return fingerprint(
            "evaluate",
            recipe,
            unused=unused_settings(spec, study),
            made_by=registry_entries(spec, study),
            modules=(evaluate.__module__, *metric_modules()),
            metrics=dict(METRICS),
            row=spec.id,
            template=spec.template.sha if spec.template else None,
            engine=engine,
            # Includes weights, versions, device and dtype, since answers differ between CPU and GPU.
            identity=identity,
            data=study.task_data(spec.family).fingerprint,
            noun=study.task_data(spec.family).dataset.noun,
            candidates=study.sets_digest(spec.family),
            index=study.index.digest if study.index and model else None,
            asking=strategy_settings(spec.predictor, recipe.eval) if model else None,
            profile=study.tasks[spec.family].profile_template.sha if spec.predictor == "two-step" else None,
            cases=[case.request.id for case in self._study.cases(spec.family)],
            weighing=[case.request.id for case in self._ensemble_weight_cases(spec)],
            encoder=encoder_stamp(spec, study),
            files=baseline_file_hashes(spec, study),
        )

    # ------------------------------------------------------------------------- models and measurement

    def _ensemble_weight_cases(self, spec: RowSpec) -> list[Case]:
        """Return the validation cases for ensemble weights, if the model is a member of an ensemble."""
        if spec.template is not None and not ensemble_includes_model(
            self._study, spec.family, spec.arm, spec.predictor
        ):
            return []
        return (
            self._weighing.cases(spec.family, model=spec.template is not None)
            if spec.predictor != RANDOM_BASELINE
            else []
        )

    def _ensemble_weight_answers(self, spec: RowSpec, predictor: Predictor) -> dict[str, Json]:
        """Return a model's answers for the validation users reserved for ensemble weights, by request id."""
        requests = [case.request for case in self._ensemble_weight_cases(spec)]
        return {item.request_id: serialise_answer(item) for item in predictor.answer(requests)} if requests else {}

    def _build_strategy(self, spec: RowSpec, backend: Any, advance: Callable[[int], None]) -> Strategy:
        """Return the strategy of a model."""
        assert spec.template is not None
        task, eval_section = self._study.tasks[spec.family], self._study.recipe.eval
        asker = Prompting(
            backend=backend,
            task=task,
            template=spec.template.name,
            shots=spec.shots,
            batch=eval_section.batch,
            advance=advance,
        )
        options = strategy_eval_options(spec.predictor, eval_section) | dict(task.strategy_options)
        measured = eval_section.debias == "measured" and is_positional(spec.predictor)
        training = {"training": task.questions(eval_section.debias_questions)} if measured else {}
        return create_strategy(spec.predictor, asker, **options, **training)

    def _calibrate_predictor(self, family: str, predictor: Predictor) -> Predictor:
        """Return a predictor that is calibrated on validation cases, if the task requires calibration."""
        if not self._study.tasks[family].calibrates:
            return predictor
        return CalibratedPredictor(predictor, self._calibrating(family))

    def _evaluation_arguments(self, family: str) -> dict[str, Any]:
        """Return the keyword arguments of `evaluate`."""
        kind = family_of(family)
        return {
            "name": family,
            "kind": kind.answer,
            "protocol": protocol_of(self._study, family),
            "fallback": self._rating_fallback if kind.answer is Rating else None,
            "background": self._explanation_reference(family) if kind.grounded else None,
        }

    def _explanation_reference(self, family: str) -> ExplanationReference:
        """Return the training texts and features with which generated explanations are compared."""
        if family not in self._backgrounds:
            self._backgrounds[family] = explanation_reference(self._study.task_data(family))
        return self._backgrounds[family]

    def _calibrating(self, family: str) -> list[Case]:
        """Return the validation cases on which a task's probabilities are calibrated."""
        return self._study.cases(family, "valid") if self._study.tasks[family].calibrates else []

    def _calibration_users(self, family: str) -> frozenset[str]:
        return frozenset(case.request.user_id for case in self._calibrating(family))

    @cached_property
    def _rating_fallback(self) -> Callable[[Request], float]:
        """Function that maps a request to its user's mean rating, a fallback for invalid answers."""
        means = UserMean()
        means.fit(self._study.data)
        return lambda request: cast("Rating", means.answer([request])[0]).value

    def _example_prompts(
        self, spec: RowSpec, predictor: Strategy, result: EvaluationResult
    ) -> tuple[ExamplePrompt, ...]:
        """Return the first prompts of a model with their answers, for the report."""
        assert spec.template is not None
        first = predictor.first_prompt if isinstance(predictor, MultiPromptStrategy) else predictor.asker.prompt
        shown = []
        for case, record in zip(self._study.cases(spec.family)[:_EXAMPLES], result.records, strict=False):
            prompt = first(case.request)
            shown.append(
                ExamplePrompt(
                    task=spec.family,
                    arm=spec.arm,
                    predictor=spec.predictor,
                    template=spec.template.id,
                    prompt=self._encoder.text(prompt) if self._encoder else "",
                    raw=record.raw or "",
                    parsed=_format_answer(record, self._study),
                    truth=_format_truth(str(case.truth), spec.family, self._study),
                )
            )
        return tuple(shown)

    def _questions(self, spec: RowSpec) -> list[list[Request]]:
        """Return the requests that a model answers, one list per call: calibration, test, and ensemble weights."""
        parts = self._calibrating(spec.family), self._study.cases(spec.family), self._ensemble_weight_cases(spec)
        return [[case.request for case in cases] for cases in parts]

    def _progress_bar(self, spec: RowSpec, parts: Sequence[Sequence[Request]]) -> BatchProgress:
        """Return a progress bar for answering these requests, counted in candidates if they have any."""
        requests, section = [request for part in parts for request in part], self._study.recipe.eval
        sizes = [len(request.candidates or ()) for request in requests]
        counted = count_prompts(spec.predictor, max(sizes, default=0), section)
        return BatchProgress(
            spec.id,
            sizes if any(sizes) else [1] * len(requests),
            batch=section.batch,
            prompts=max(1, counted.prompts) if counted else 1,
            unit="candidates" if any(sizes) else "requests",
            quiet=self._quiet,
        )


def _with_added_seconds(result: EvaluationResult, seconds: float) -> EvaluationResult:
    """Return results with seconds added to their cost."""
    cost = result.figures.cost.model_copy(update={"seconds": (result.figures.cost.seconds or 0.0) + seconds})
    return replace(result, figures=result.figures.model_copy(update={"cost": cost}))


def _with_calibration_curve(result: EvaluationResult, predictor: Predictor, cases: Sequence[Case]) -> EvaluationResult:
    """Return results with the calibration curve of the predictor, if it is calibrated."""
    if not isinstance(predictor, CalibratedPredictor):
        return result
    curve = Calibration(n=len(cases), **asdict(predictor.curve))
    return replace(result, figures=result.figures.model_copy(update={"calibration": curve}))


def row_path(run: Path, row_id: str) -> Path:
    """Return the file with the stored result of a model in a run folder."""
    return run / "rows" / (row_id.replace("/", ".") + ".json")


def restore_row(stored: Mapping[str, Any]) -> ResultRow:
    """Restore a result from its stored form."""
    return ResultRow(
        Row.model_validate(stored["figures"]),
        {metric: np.array(numbers, dtype=np.float64) for metric, numbers in stored["values"].items()},
        [Prediction.model_validate(record) for record in stored["records"]],
        [ExamplePrompt.model_validate(example) for example in stored["examples"]],
        stored["weighing"],
        stored["validation"],
        stored["key"],
        frozenset(stored["looked_at"]),
    )


def ensemble_member(row: ResultRow) -> PrecomputedMember:
    """Return an evaluated model as a member of an ensemble."""
    name = row.figures.predictor
    kind = baseline_score_scale(name.partition("(")[0]) if row.figures.template is None else "logits"
    answers = restore_answers(row.weighing, row.records)
    return PrecomputedMember(name, row.figures.reads or "events", kind, answers, row.looked_at)


def _format_truth(item: str, family: str, study: Study) -> str:
    items = study.task_data(family).dataset.items
    return items[item].title if family_of(family).answers_with_items and item in items else item


def _format_answer(record: Prediction, study: Study) -> str:
    """Return the titles of the first three ranked items, or another answer as text."""
    parsed = json.loads(record.parsed)
    if isinstance(parsed, dict):
        items = study.data.dataset.items
        top = [items[item].title if item in items else item for item in parsed["items"][:3]]
        return f"rank of the target {record.rank}; first: {'; '.join(top)}"
    return "" if parsed is None else str(parsed)
