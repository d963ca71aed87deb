"""Records of results.json, written by the evaluation and read by the report.

All values are untrusted texts or numbers. Unknown keys are ignored, and fields added later are optional.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, JsonValue

from llmrec.display import Displayed, Summary, format_name_list
from llmrec.records import (
    Calibration,
    Candidates,
    ColdStartItem,
    DataInfo,
    ExamplePrompt,
    ExampleUser,
    ExcludedUsers,
    Number,
    Record,
    Reliability,
    Sample,
    Stage,
    TextExample,
    Training,
)
from llmrec.registry import is_lower_better

Arm = Literal["zero-shot", "few-shot", "tuned", "baseline"]
LANGUAGE_MODEL_ARMS: tuple[Arm, ...] = ("zero-shot", "few-shot", "tuned")
"""The settings of a language model, those of the base model first."""


def arm_name(arm: str) -> str:
    """Return the name of a setting in tables; ``tuned`` is shown as ``fine-tuned``."""
    return "fine-tuned" if arm == "tuned" else arm


Verdict = Literal["shown", "not shown", "contradicted"]

Reads = Literal["events", "texts", "language model"]
"""The item inputs of a model: interactions only; texts through a frozen encoder; or a language model whose pretrained
weights were fine-tuned on these data."""

Fact = str | int | float | None
"""The value of a machine fact."""


class Figure(Record):
    """A number with its 95 % interval, or the reason why it is undefined.

    Attributes:
        signature: The protocol that it was measured under.
        sd: Standard deviation over training seeds.
        range: Range over the tie rules of the split.
    """

    value: Number
    low: Number = None
    high: Number = None
    signature: str = ""
    undefined: str = ""
    sd: Number = None
    range: tuple[float, float] | None = None


class Metric(Figure):
    """A metric of a model, with the protocol by which it was measured."""

    signature: str


class Cost(Record):
    """The cost of a model's answers: wall-clock seconds, tokens and model calls."""

    seconds: Number = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    forwards: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens processed per second; None for a model without tokens."""
        tokens = self.prompt_tokens + self.completion_tokens
        return tokens / self.seconds if tokens and self.seconds else None


class Failure(Record):
    """An answer that could not be parsed."""

    request_id: str
    reason: str
    raw: str | None = None


class SliceOfRow(Record):
    """Results of a model on a subset of the test cases.

    Attributes:
        name: Name, such as ``item:cold-below-5`` or ``history:5-9``.
        users: Number of users.
        small: Whether there are too few cases for a conclusion.
        metrics: Figures; empty for a slice without cases.
    """

    name: str
    n: int
    users: int | None = None
    small: bool = False
    metrics: dict[str, Metric] = Field(default_factory=dict)


class PositionResult(Record):
    """Results of the requests whose target is at the same position of the candidate list.

    Attributes:
        hit: HR@1 over them.
        rank: Mean rank of the target; a missing target counts as last.
        rank_sd: Standard deviation of these ranks; None for a single request.
    """

    position: int
    n: int
    hit: Number
    rank: Number
    rank_sd: Number = None


class PositionBias(Record):
    """Position bias: dependence of the target's rank on its candidate position (Kruskal-Wallis).

    Positions are categories, so that a preference for the labels H and Q is detected as well as one for the first
    positions.

    Attributes:
        share: Share of the variance of the target's rank explained by position: the statistic over n - 1.
        chance: The expected share without bias.
        rho: Rank correlation of position and rank; above 0 early targets are ranked better.
        p: Permutation p-value, corrected for all tested rows.
    """

    share: Number
    chance: Number
    rho: Number
    p: Number


class Rates(Record):
    """Rates of certain properties of answers, such as invalid or copied texts.

    Attributes:
        fallbacks: Number of ratings that could not be parsed and were replaced by a fallback.
        users_left_out: Number of users without both a yes and a no, whom GAUC excludes.
        truth_copy_rate: CopyRate of the true texts.
        truth_hallucination_rate: Hallucination of the true texts.
        features_asked: Number of requests with a feature that their text should name.
        features_named: Number of features that the texts name.
        seen: For full ranking, whether items of the history could be ranked.
        pool: For full ranking, the mean number of rankable items.
    """

    fallbacks: int | None = None
    users_left_out: int | None = None
    reliability: tuple[Reliability, ...] = ()
    truth_copy_rate: Number = None
    truth_hallucination_rate: Number = None
    features_asked: int | None = None
    features_named: int | None = None
    seen: str | None = None
    pool: Number = None


class AnswerResults(Record):
    """Results that every model has, for rankings, ratings, probabilities and texts.

    Attributes:
        n: Number of requests.
        tie_rate: Share of requests whose target ties with another item, or whose answer equals another.
        failures: The first answers that could not be parsed.
    """

    n: int
    parse_rate: Number = None
    tie_rate: Number = None
    metrics: dict[str, Metric]
    cost: Cost = Cost()
    failures: tuple[Failure, ...] = ()


# The order of keys in files follows the bases from last to first.
class ModelResults(Rates, AnswerResults):
    """All results of a model on one task."""

    calibration: Calibration | None = None


class Setting(Record):
    """What identifies a model in a run: setting, task, strategy and template."""

    id: str
    task: str
    arm: Arm
    predictor: str
    template: str | None = None
    template_use: str | None = None
    shots: int = 0

    @property
    def label(self) -> str:
        """Label of the model within its task, such as ``fine-tuned · likelihood · continue-list``."""
        parts = [] if self.arm == "baseline" else [arm_name(self.arm)]
        return " · ".join([*parts, self.predictor, *([self.template.rpartition("/")[2]] if self.template else [])])


class Unevaluated(Setting):
    """A model that no engine could evaluate; the same command evaluates it when it is run again.

    Attributes:
        reason: Why it was not evaluated.
    """

    reason: str


class QuerySettings(Setting):
    """How a model was queried: its predictor, prompt and candidates.

    Attributes:
        candidates: Hash of the ranked candidate sets, if any.
    """

    engine: str
    inputs: str = ""
    candidates: str | None = None


class PartWeight(Record):
    """The weight of an ensemble member, with 95 % confidence limits over users.

    Attributes:
        loss: Loss of the cross-fitted validation figure without the member; see
            `llmrec.ensembles.weights.MemberAblation`. None if the ensemble has a single member.
        loss_low: Lower 95 % limit over users.
        loss_high: Upper 95 % limit over users.
    """

    name: str
    weight: Number
    low: Number = None
    high: Number = None
    loss: Number = None
    loss_low: Number = None
    loss_high: Number = None


class FeatureGain(Record):
    """A feature of a learned ranker, and its share in the total gain of the trees."""

    name: str
    gain: Number


class StoredTrees(Record):
    """The trees of a learned ranker in compressed form, with the order of features."""

    text: str
    features: tuple[str, ...]


class FusionWeights(Record):
    """The fitted weights of an ensemble.

    Attributes:
        form: ``ranker``, ``logit``, ``pool`` or ``alone``; see `llmrec.ensembles.rankers`.
        parts: One per member; of a ranker its share in the gain.
        repeat: Log weight of items of the history; None if none can be ranked.
        features: Of a ranker, the features with the largest gain first.
        trees: Of a ranker; benchmark results leave it out.
        base: A ranker to whose score those of the members are added, with its weight ``scale``.
    """

    form: str
    parts: tuple[PartWeight, ...]
    repeat: Number = None
    features: tuple[FeatureGain, ...] = ()
    trees: StoredTrees | None = None
    base: FusionWeights | None = None
    scale: Number = None


class Choice(Record):
    """The model that is served by default: the best on validation users, chosen without test users.

    Attributes:
        row: Its id.
        metric: The metric of the choice.
        value: Its figure on validation users; for an ensemble the cross-fitted one.
        users: Number of validation users, who chose no parameter of any row.
        figures: Figures of all eligible rows by id.
    """

    row: str
    metric: str
    value: float
    users: int
    figures: dict[str, float] = Field(default_factory=dict)


class Row(ModelResults, QuerySettings):
    """A model evaluated on one task.

    Attributes:
        users: Number of users; None if unknown.
        reads: Its item inputs; None if unknown.
        fusion: The weights of an ensemble; None for other rows.
    """

    users: int | None = None
    reads: Reads | None = None
    fusion: FusionWeights | None = None
    slices: tuple[SliceOfRow, ...] = ()
    by_position: tuple[PositionResult, ...] = ()
    position_bias: PositionBias | None = None

    @property
    def alone(self) -> str | None:
        """The only member that an ensemble uses, if it uses only one; None for other models."""
        if self.fusion is None or self.fusion.form != "alone":
            return None
        return next((part.name for part in self.fusion.parts if part.weight), None)

    def differs(self, other: Row) -> bool:
        """Whether two models may rank differently."""
        ends = [(row.arm, row.template, row.alone or row.predictor) for row in (self, other)]
        return ends[0] != ends[1]

    @property
    def method(self) -> str:
        """Name of the predictor, without baseline parameters."""
        return self.predictor.partition("(")[0]

    def shown(self, metric: str) -> tuple[str, str, str]:
        """Return the name of a metric, its value and its confidence interval, as table cells."""
        result = self.metrics.get(metric)
        if result is None or result.value is None:
            return metric, "–", ""
        known = result.low is not None and result.high is not None
        return metric, f"{result.value:.3f}", f"[{result.low:.3f}, {result.high:.3f}]" if known else ""


class Prediction(Record):
    """A model's answer to one request, as stored in predictions.parquet; see docs/datasets-and-output-files.md.

    Fields with a default are None in files of older versions, and where they do not apply.

    Attributes:
        parsed: The parsed answer, as JSON.
        rank: Expected rank of the target; None if it is missing or nothing was ranked.
        error: Why the answer could not be parsed; None if it could.
        above: Number of items that score strictly higher than the target; the pool for a missing target.
        tied: Number of items with the target's score, including the target; 0 for a missing target.
        pool: Number of candidates of the request, or size of the catalogue.
        value: The rating or P(yes) that is measured, or the fallback of an unparsed answer.
        copied: Whether the text is a copy of a training text.
        feature: The feature that the text should name.
        feature_named: Whether the text names it.
        features: The features of training texts that it names.
        unsupported: Number of these that no training text of the item names.
        truth_copied: As ``copied``, for the true text.
        truth_features: Number of features that the true text names.
        truth_unsupported: As ``unsupported``, for the true text.
        forwards: Model calls.
    """

    request_id: str
    user_id: str
    truth: str
    parsed: str
    raw: str | None
    prompt_hash: str | None
    rank: float | None = None
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    above: int | None = None
    tied: int | None = None
    pool: int | None = None
    value: Number = None
    copied: bool | None = None
    feature: str | None = None
    feature_named: bool | None = None
    features: tuple[str, ...] | None = None
    unsupported: int | None = None
    truth_copied: bool | None = None
    truth_features: int | None = None
    truth_unsupported: int | None = None
    forwards: int | None = None


class Pair(Record):
    """The difference a - b between two models on the same cases, planned or exploratory.

    Attributes:
        low: Lower end of the interval: for a planned comparison at the level of its Holm step, ``level``, else at an
            unadjusted 95 %.
        high: Upper end.
        level: Coverage of the interval; None for 95 %.
        p: Corrected p-value over its family; None for an exploratory comparison.
        p_raw: p-value before correction.
        verdict: The verdict; None for an exploratory comparison.
        detectable: The smallest true difference that is detected with a power of 80 %.
    """

    a: str
    b: str
    value: Number
    low: Number
    high: Number
    level: Number = None
    p: Number = None
    p_raw: Number = None
    verdict: Verdict | None = None
    detectable: Number = None


class ComparedMetric(Record):
    """The task and metric of a model comparison."""

    task: str
    metric: str


class Comparison(Pair, ComparedMetric):
    """The difference a - b between two models in one metric of a task."""


class Results(Displayed, Record):
    """The content of results.json."""

    llmrec: str
    created: str
    command: str = ""
    recipe: dict[str, JsonValue]
    recipe_hash: str
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Fact] = Field(default_factory=dict)
    model: dict[str, str] = Field(default_factory=dict)
    data: dict[str, DataInfo | None]
    tables: dict[str, str] = Field(default_factory=dict)
    candidates: dict[str, Candidates | None] = Field(default_factory=dict)
    training: Training | None = None
    rows: tuple[Row, ...]
    unevaluated: tuple[Unevaluated, ...] = ()
    headline: dict[str, str]
    comparisons: tuple[Comparison, ...] = ()
    choice: Choice | None = None
    detectable: dict[str, str] = Field(default_factory=dict)
    budget: tuple[Stage, ...] = ()
    seconds: Number = None
    examples: tuple[ExamplePrompt, ...] = ()
    texts: tuple[Sample, ...] = ()
    gallery: tuple[TextExample, ...] = ()
    newcomers: tuple[ColdStartItem, ...] = ()
    example: ExampleUser | None = None
    set_aside: tuple[ExcludedUsers, ...] = ()
    notes: tuple[str, ...] = ()
    files: dict[str, str] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return str(self.recipe.get("name") or "Report")

    @property
    def has_language_model(self) -> bool:
        """Whether a language model was evaluated, alone or in an ensemble."""
        return any(row.arm != "baseline" for row in self.rows)

    @property
    def model_name(self) -> str | None:
        """Name of the language model, if any."""
        section = self.recipe.get("model") if self.has_language_model else None
        return (str(section.get("name") or "") or None) if isinstance(section, dict) else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order in which they first appear."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    def row(self, row_id: str) -> Row:
        """Return a model by its row id; `llmrec.report.results` has verified the ids in comparisons."""
        return next(row for row in self.rows if row.id == row_id)

    def members(self, row: Row) -> tuple[Row, ...]:
        """Return the members of an ensemble; empty for other models."""
        names = [part.name for part in row.fusion.parts] if row.fusion else []
        results = []
        for name in names:
            known = [
                item
                for item in self.rows
                if item.task == row.task
                and item.fusion is None
                and name in (item.predictor, item.id.partition("/")[2])
                and (item.arm == "baseline" or row.arm in (item.arm, "baseline"))
            ]
            # Several settings and templates may share a strategy: an ensemble has members with its own setting and
            # template.
            known.sort(key=lambda each: (each.arm, each.template, each.shots) != (row.arm, row.template, row.shots))
            results += known[:1]
        return tuple(results)

    def standings(self, task: str) -> tuple[Row, ...]:
        """Return the models of a task, best value of the main metric first, and models without a value last."""
        metric = self.headline[task]

        def key(row: Row) -> tuple[bool, float, str]:
            value = row.metrics[metric].value if metric in row.metrics else None
            if value is None:
                return (True, 0.0, row.id)
            return (False, value if is_lower_better(metric) else -value, row.id)

        return tuple(sorted((row for row in self.rows if row.task == task), key=key))

    def kinds(self, task: str) -> tuple[tuple[Reads | None, tuple[Row, ...]], ...]:
        """Return the models of a task, grouped by the item data that they read.

        One group under None if this is unknown or the same for all rows.
        """
        rows = self.standings(task)
        results = [(kind, tuple(row for row in rows if row.reads == kind)) for kind in get_args(Reads)]
        results = [(kind, group) for kind, group in results if group]
        complete = sum(len(group) for _, group in results) == len(rows) and len(results) > 1
        return tuple(results) if complete else ((None, rows),)

    def missing(self, task: str) -> tuple[Unevaluated, ...]:
        """Return the models of a task that were not evaluated."""
        return tuple(row for row in self.unevaluated if row.task == task)

    def metrics(self, task: str) -> tuple[str, ...]:
        """Return the metric names of a task, main metric first."""
        names = dict.fromkeys(name for row in self.rows if row.task == task for name in row.metrics)
        return (self.headline[task], *(name for name in names if name != self.headline[task]))

    def best(self, task: str, metric: str) -> float | None:
        """Return the best value of a metric among the models of a task."""
        results = [row.metrics[metric].value for row in self.rows if row.task == task and metric in row.metrics]
        values = [value for value in results if value is not None]
        if not values:
            return None
        return min(values) if is_lower_better(metric) else max(values)

    def data_of(self, task: str) -> DataInfo | None:
        """Return the data set on which a task was measured."""
        return self.data.get(self.tables.get(task, "main")) or self.data.get("main")

    def _summary(self) -> Summary:
        rows = [row for task in self.tasks for row in self.standings(task)]
        cells = [(row.task, row.label, *row.shown(self.headline[row.task])) for row in rows]
        users = sorted({row.users for row in rows if row.users is not None})
        facts = {
            "model": self.model_name or "none",
            "tasks": format_name_list(self.tasks),
            "users": " or ".join(f"{user:,}" for user in users),
            "llmrec": self.llmrec,
        }
        header = ("task", "model", "metric", "value", "95 % interval")
        return Summary(f"Results of {self.name!r}", {name: text for name, text in facts.items() if text}, header, cells)


class StoredResults(Displayed, dict[str, Any]):
    """The content of results.json as dictionaries and lists; see `Results` and docs/datasets-and-output-files.md."""

    def _summary(self) -> Summary:
        return Results.model_validate(self)._summary()
