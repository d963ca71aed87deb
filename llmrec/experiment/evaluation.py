"""The evaluation stage: baselines and language-model arms over the same cases, row by row, each row kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec import __version__
from llmrec.backends.encode import Encoder
from llmrec.baselines.parameters import make
from llmrec.baselines.rating import UserMean
from llmrec.data.split import SplitDataset
from llmrec.durable import Json, write_json
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import Evaluated, evaluate
from llmrec.experiment.engines import Engines
from llmrec.experiment.resume import Bar, Budget, key_of, read_stage
from llmrec.experiment.study import Study
from llmrec.metrics.explained import Background, background
from llmrec.prompts.template import Template
from llmrec.recipe.schema import (
    BaselineSection,
    CandidateSection,
    EvalSection,
)
from llmrec.records import Shown
from llmrec.registry import POSITIONAL, STRATEGIES, lookup, options_of
from llmrec.results import Arm, Calibration, Prediction, Row
from llmrec.strategies.asking import AsksFirst, Prompting, Strategy
from llmrec.strategies.raters import Calibrated
from llmrec.tasks.family import family_of
from llmrec.tasks.fewshot import BY_TEXT
from llmrec.tasks.held_items import KIND as HELD_ITEMS
from llmrec.tasks.pool import NEGATIVES
from llmrec.types import Case, Predictor, Rating, Request

log = logging.getLogger(__name__)

_EXAMPLES = 2


@dataclass(frozen=True)
class Made:
    """A row as it was made: what answered, and prompts to show."""

    found: Evaluated
    engine: str
    examples: tuple[Shown, ...] = ()


@dataclass(frozen=True)
class RowSpec:
    """One row to be: which arm, how it asks, and of which model."""

    family: str
    arm: Arm
    predictor: str
    template: Template | None = None
    shots: int = 0

    @property
    def id(self) -> str:
        """A name that is unique in a run."""
        parts = [self.family, self.arm, self.predictor]
        return "/".join([*parts, self.template.name] if self.template else parts)


@dataclass(frozen=True)
class ResultRow:
    """A finished row with what the report and the comparisons need."""

    figures: Row
    values: Mapping[str, NDArray[np.float64]]
    records: Sequence[Prediction] = ()
    examples: Sequence[Shown] = ()


def specs_of(study: Study, arm: Arm) -> Iterator[RowSpec]:
    """Yield the rows that a study's arm will have."""
    for family, task in study.tasks.items():
        section = study.section(family)
        if arm == "baseline":
            yield from (RowSpec(task.family, arm, baseline.label) for baseline in section.baselines)
            continue
        if arm == "tuned" and section.weight == 0:
            continue
        for template in study.eval_templates(family):
            for strategy in task.asked_by(template, section.strategies, tuned=arm == "tuned"):
                yield RowSpec(
                    task.family, arm, strategy, template, study.recipe.eval.shots.k if arm == "few-shot" else 0
                )


class Evaluation:
    """Evaluates a study's rows, reusing those that an earlier run finished from the same inputs."""

    def __init__(
        self, study: Study, encoder: Encoder | None, folder: Path, budget: Budget, *, quiet: bool = False
    ) -> None:
        self._study, self._encoder, self._folder, self._budget = study, encoder, folder, budget
        self._cases = {family: study.cases(family) for family in study.tasks}
        self._quiet = quiet
        self._fitted: dict[tuple[int, str, str], Any] = {}
        self._backgrounds: dict[str, Background] = {}

    def baselines(self) -> list[ResultRow]:
        """Fit and evaluate every family's classic predictors."""
        rows = []
        with self._budget.stage("baselines"):
            for family in self._study.tasks:
                for baseline in self._study.section(family).baselines:
                    spec = RowSpec(self._study.tasks[family].family, "baseline", baseline.label)
                    rows.append(self._row(spec, "numpy", None, partial(self._baseline, spec, baseline)))
        return rows

    def arms(self, weights: Mapping[Arm, tuple[str, str]], engines: Engines) -> list[ResultRow]:
        """Evaluate language-model arms; rows of one model and one engine run one after the other.

        Args:
            weights: For each arm its model folder and the hash that stands for the weights in it.
            engines: Where backends come from.
        """
        planned = [
            (spec, engines.engine_for(spec.predictor), *weights[arm])
            for arm in weights
            for spec in specs_of(self._study, arm)
        ]
        # One engine start per model and engine: hf first, since a vLLM process would keep its memory.
        order = sorted(planned, key=lambda p: (list(weights.values()).index(p[2:]), p[1] == "vllm"))
        rows = {}
        for spec, engine, folder, digest in order:

            def make(spec: RowSpec = spec, engine: str = engine, folder: str = folder, digest: str = digest) -> Made:
                backend = engines.get(engine, folder, digest)
                before = backend.recalled_seconds
                with self._budget.stage(spec.arm), self._progress(spec) as advance:
                    made = self._ask(spec, backend, advance)
                # What a killed run had answered already costs what it cost then.
                self._budget.add(spec.arm, backend.recalled_seconds - before)
                return made

            rows[spec.id] = self._row(spec, engine, engines.identity(engine, digest), make)
        return [rows[spec.id] for spec, *_ in planned]

    def _row(
        self, spec: RowSpec, engine: str, identity: Mapping[str, Any] | None, make: Callable[[], Made]
    ) -> ResultRow:
        """Return a stored row with the same key, or make it and store it.

        Args:
            spec: Of the row.
            engine: What answers.
            identity: See `Engines.identity`; None for a baseline.
            make: Makes it.
        """
        path = self._folder / "rows" / (spec.id.replace("/", ".") + ".json")
        key = self._key(spec, engine, identity)
        stored = read_stage(path, key)
        if stored is None:
            made = make()
            found = made.found
            figures = Row(
                id=spec.id,
                task=spec.family,
                arm=spec.arm,
                predictor=spec.predictor,
                template=spec.template.id if spec.template else None,
                template_use=spec.template.use if spec.template else None,
                shots=spec.shots,
                engine=made.engine,
                inputs=_inputs(spec, self._study) + _left_out(spec, self._study),
                candidates=self._digest(spec.family),
                **found.figures.as_json(),
            )
            stored = {
                "key": key,
                "figures": figures.as_json(),
                "values": {metric: [float(v) for v in values] for metric, values in found.values.items()},
                "records": [record.as_json() for record in found.records],
                "examples": [example.as_json() for example in made.examples],
            }
            write_json(path, stored)
        else:
            log.info("evaluation: reusing row %s", spec.id)
        return ResultRow(
            Row.model_validate(stored["figures"]),
            {metric: np.array(numbers) for metric, numbers in stored["values"].items()},
            [Prediction.model_validate(record) for record in stored["records"]],
            [Shown.model_validate(example) for example in stored["examples"]],
        )

    def _key(self, spec: RowSpec, engine: str, identity: Mapping[str, Any] | None) -> str:
        study, recipe = self._study, self._study.recipe
        return key_of(
            llmrec=__version__,
            row=spec.id,
            template=spec.template.sha if spec.template else None,
            shots=recipe.eval.shots.model_dump() if spec.shots else None,
            engine=engine,
            # Weights, versions, device and dtype: what was answered on a processor is not what a GPU says.
            identity=identity,
            data=study.task_data(spec.family).fingerprint,
            candidates=self._digest(spec.family),
            section=study.section(spec.family).model_dump(
                exclude={"weight", "strategies", "baselines", "templates", "head"}
            ),
            index=study.index.digest if study.index and spec.template else None,
            noun=study.task_data(spec.family).dataset.noun,
            split=recipe.eval.split,
            asking=asking_of(spec.predictor, recipe.eval) if spec.template else None,
            profile=_profile(study, spec.family) if spec.predictor == "two-step" else None,
            cutoffs=recipe.eval.cutoffs,
            bootstrap=recipe.eval.bootstrap,
            cases=[case.request.id for case in self._cases[spec.family]],
            seed=recipe.seed,
            # Rows of before a column was stored have nothing to put there.
            columns=sorted(Prediction.model_fields),
            **_nearness(spec, study),
            **_drawing(spec, recipe.eval),
        )

    def _digest(self, family: str) -> str | None:
        """Return the hash of the candidate sets that a family ranks."""
        sets = self._study.sets(family)
        return sets.digest if sets is not None else None

    def _baseline(self, spec: RowSpec, baseline: BaselineSection) -> Made:
        seed, options = self._study.recipe.seed, self._study.tasks[spec.family].baseline_options
        data = self._study.task_data(spec.family)
        key = (id(data), spec.predictor, str(options))
        if key not in self._fitted:
            # Families that read the same data share it.
            where = f"tasks.{spec.family}.baselines"
            predictor = make(baseline.name, {**baseline.parameters, **options}, seed=seed, where=where)
            predictor.fit(data)
            self._fitted[key] = predictor
        return Made(self._evaluate(spec, self._fitted[key]), "numpy")

    def _ask(self, spec: RowSpec, backend: Any, advance: Callable[[int], None]) -> Made:
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
        options = options_of(spec.predictor, eval_section) | dict(task.strategy_options)
        measured = eval_section.debias == "measured" and spec.predictor in POSITIONAL
        asked = {"training": task.questions(eval_section.debias_questions)} if measured else {}
        predictor: Strategy = lookup(STRATEGIES, spec.predictor, "strategy")(asker, **options, **asked)
        found = self._evaluate(spec, predictor, backend)
        return Made(found, predictor.engine, self._examples(spec, predictor, found))

    def _evaluate(self, spec: RowSpec, predictor: Predictor, backend: Any = None) -> Evaluated:
        family = family_of(spec.family)
        fallback = self._user_mean() if family.answer is Rating else None
        cases = self._calibrating(spec.family)
        calibrated = Calibrated(predictor, cases) if cases else None
        # A row costs what its own cases cost, also where a killed run had answered them; those of calibration are none.
        # The engine's start, which falls into the first row that asks it anything, is a stage of its own.
        before = backend.recalled_seconds - backend.start_seconds if backend is not None else 0.0
        found = evaluate(
            calibrated or predictor,
            self._cases[spec.family],
            name=spec.family,
            kind=family.answer,
            protocol=self.protocol(spec.family),
            fallback=fallback,
            background=self._background(spec.family) if family.grounded else None,
        )
        figures = found.figures
        if backend is not None:
            spent = (figures.cost.seconds or 0.0) + backend.recalled_seconds - backend.start_seconds - before
            figures = figures.model_copy(update={"cost": figures.cost.model_copy(update={"seconds": spent})})
        if calibrated is not None:
            curve = Calibration(n=len(cases), **asdict(calibrated.curve))
            figures = figures.model_copy(update={"calibration": curve})
        return replace(found, figures=figures)

    def _background(self, family: str) -> Background:
        """What texts are held against; features where the interactions have a column of them."""
        if family not in self._backgrounds:
            self._backgrounds[family] = background_of(self._study.task_data(family))
        return self._backgrounds[family]

    def _calibrating(self, family: str) -> list[Case]:
        """Return the cases of the validation split that a family's probabilities are put right on."""
        return self._study.cases(family, "valid") if self._study.tasks[family].calibrates else []

    def protocol(self, family: str) -> EvalProtocol:
        """Return the protocol of a family's table."""
        return protocol_of(self._study, family)

    def _user_mean(self) -> Callable[[Request], float]:
        means = UserMean()
        means.fit(self._study.data)

        def fallback(request: Request) -> float:
            (answer,) = means.answer([request])
            assert isinstance(answer, Rating)
            return answer.value

        return fallback

    def _examples(self, spec: RowSpec, predictor: Strategy, found: Evaluated) -> tuple[Shown, ...]:
        """Render the first prompts of a row, as they were asked, with their answers, for the report."""
        assert spec.template is not None
        first = predictor.first_prompt if isinstance(predictor, AsksFirst) else predictor.asker.prompt
        shown = []
        for case, record in zip(self._cases[spec.family][:_EXAMPLES], found.records, strict=False):
            prompt = first(case.request)
            shown.append(
                Shown(
                    task=spec.family,
                    arm=spec.arm,
                    predictor=spec.predictor,
                    template=spec.template.id,
                    prompt=self._encoder.text(prompt) if self._encoder else "",
                    raw=record.raw or "",
                    parsed=_readable(record, self._study),
                    truth=_title(str(case.truth), spec.family, self._study),
                )
            )
        return tuple(shown)

    def _progress(self, spec: RowSpec) -> Bar:
        total = len(self._cases[spec.family]) + len(self._calibrating(spec.family))
        return Bar(spec.id, total, quiet=self._quiet)


def _profile(study: Study, family: str) -> str:
    """Return the hash of the words of a two-step ranking's first step."""
    return study.tasks[family].profile_template.sha


def _nearness(spec: RowSpec, study: Study) -> dict[str, str]:
    """Return what says which items read alike, where that decides what a prompt shows."""
    near = spec.shots and study.recipe.eval.shots.choice in BY_TEXT
    relevant = spec.template is not None and study.section(spec.family).past == "relevant"
    return {"encoder": study.recipe.encoder} if near or relevant else {}


def _drawing(spec: RowSpec, section: EvalSection) -> dict[str, int]:
    """Return what says how negatives are drawn, where solved examples or questions about positions show any."""
    measured = section.debias == "measured" and spec.predictor in POSITIONAL
    shows = family_of(spec.family).lists and spec.template is not None and (spec.shots or measured)
    return {"negatives": NEGATIVES} if shows else {}


def asking_of(strategy: str, section: EvalSection) -> dict[str, Json]:
    """Return every key of the eval section that can change a strategy's answers, with its value."""
    measured = strategy in POSITIONAL and section.debias != "none"
    more = {"debias": section.debias, "debias_questions": section.debias_questions} if measured else {}
    return options_of(strategy, section) | more


def protocol_of(study: Study, family: str) -> EvalProtocol:
    """Return the protocol of a family's table."""
    recipe, data, task = study.recipe, study.task_data(family), study.tasks[family]
    return EvalProtocol(
        split=f"{data.kind}/{recipe.eval.split}",
        candidates=_candidates(recipe.eval.candidates, family),
        cutoffs=recipe.eval.cutoffs,
        resamples=recipe.eval.bootstrap,
        seed=recipe.seed,
        catalogue=len(data.dataset.items),
        users=task.users_kind,
        liked=task.liked_from,
    )


def background_of(data: SplitDataset) -> Background:
    """Return the training texts of a split, and the features of its pairs where its interactions have a column."""
    columns = ["user_id", "item_id", "feature"]
    features: dict[tuple[str, str], str] | None = None
    if "feature" in data.train.columns:
        parts = (data.train, data.valid, data.test)
        rows = (row for part in parts for row in part.select(columns).drop_nulls().iter_rows())
        features = {(user, item): feature for user, item, feature in rows}
    told = list(data.train.select("user_id", "item_id", "text").iter_rows())
    # Where a text is one sentence of a review, the rest of it supports features and can be copied too.
    reviews = ((user, item, data.dataset.reviews.get((user, item))) for user, item, _ in told)
    told += [(user, item, review.text) for user, item, review in reviews if review is not None]
    users, items, texts = zip(*told, strict=True)
    return background(users, items, texts, features)


def _candidates(sets: CandidateSection, family: str) -> str:
    if family_of(family).candidates == "items":
        return f"{HELD_ITEMS}-{sets.count}"
    kind = f"retrieved-{sets.retriever}" if sets.kind == "retrieved" else sets.kind
    return "full" if kind == "catalogue" else f"{kind}-{sets.count}"


def _left_out(spec: RowSpec, study: Study) -> str:
    return "; trained on other families alone" if spec.arm == "tuned" and spec.family not in study.shares else ""


def _inputs(spec: RowSpec, study: Study) -> str:
    task = study.tasks[spec.family]
    fitted = "; scaled by answers to the validation split" if task.calibrates else ""
    if spec.template is not None:
        return task.shows(spec.template, spec.shots) + fitted
    if family_of(spec.family).candidates == "items":
        return "the candidates"
    return f"training interactions and the request's history{fitted}"


def _title(item: str, family: str, study: Study) -> str:
    items = study.task_data(family).dataset.items
    return items[item].title if family_of(family).answers_with_items and item in items else item


def _readable(record: Prediction, study: Study) -> str:
    """Name the first three ranked items by title; other answers as they are."""
    parsed = json.loads(record.parsed)
    if isinstance(parsed, dict):
        items = study.data.dataset.items
        top = [items[item].title if item in items else item for item in parsed["items"][:3]]
        return f"rank of the target {record.rank}; first: {'; '.join(top)}"
    return "" if parsed is None else str(parsed)
