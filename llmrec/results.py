"""The frozen records of results.json: evaluation makes them, the report reads them.

All in them is untrusted text or a number. Keys that no record has are ignored, and what was added later is optional.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, JsonValue

from llmrec.display import Displayed, Summary, listed
from llmrec.records import (
    Calibration,
    Candidates,
    DataInfo,
    ExampleUser,
    Exhibit,
    Newcomer,
    Number,
    Record,
    Reliability,
    Sample,
    SetAside,
    Shown,
    Stage,
    Training,
)
from llmrec.registry import lower

Arm = Literal["zero-shot", "few-shot", "tuned", "baseline"]
Verdict = Literal["shown", "not shown", "contradicted"]

Reads = Literal["events", "texts", "language model"]
"""What a row knows items by: events of users alone; texts too, through a fixed encoder that learned nothing from these
data; or through a language model whose pretrained weights were tuned on them."""

Fact = str | int | float | None
"""One fact of a machine."""


class Figure(Record):
    """One number with its 95 % interval, or why there is none.

    Attributes:
        signature: The protocol that it was measured under.
        sd: Over training seeds.
        range: Over the tie rules of the split.
    """

    value: Number
    low: Number = None
    high: Number = None
    signature: str = ""
    undefined: str = ""
    sd: Number = None
    range: tuple[float, float] | None = None


class Metric(Figure):
    """A figure of a row of results.json, which always says under what protocol it was measured."""

    signature: str


class Cost(Record):
    """Work of one row: wall-clock seconds, tokens and model calls."""

    seconds: Number = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    forwards: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens read and written a second; None for a predictor that uses no tokens."""
        tokens = self.prompt_tokens + self.completion_tokens
        return tokens / self.seconds if tokens and self.seconds else None


class Failure(Record):
    """One answer that could not be read."""

    request_id: str
    reason: str
    raw: str | None = None


class SliceOfRow(Record):
    """A row's figures over some of its cases.

    Attributes:
        name: Such as ``item:cold-below-5`` or ``history:5-9``.
        users: Number of their users.
        small: Whether the cases are too few to say much.
        metrics: Empty for a slice without cases.
    """

    name: str
    n: int
    users: int | None = None
    small: bool = False
    metrics: dict[str, Metric] = Field(default_factory=dict)


class AtPosition(Record):
    """The requests whose target stands at one place of the candidate list, from 1.

    Attributes:
        hit: HR@1 over them.
        rank: Mean rank of the target; one that an answer leaves out counts as last.
        rank_sd: Standard deviation of these ranks; None for a single request.
    """

    position: int
    n: int
    hit: Number
    rank: Number
    rank_sd: Number = None


class PositionBias(Record):
    """How far the rank of the target depends on where it stands among its candidates (Kruskal-Wallis).

    Positions count as categories, so that a row that likes the labels H and Q shows as clearly as one that likes the
    first places.

    Attributes:
        share: Of the variance of the target's rank, what its position explains: the statistic over n - 1.
        chance: The share that a row without a bias has on average.
        rho: Rank correlation of position and rank, for the direction: above 0 early targets are ranked better.
        p: By permutation, corrected for all rows that were tested.
    """

    share: Number
    chance: Number
    rho: Number
    p: Number


class Rates(Record):
    """What answers of one kind have beside their metrics.

    Attributes:
        fallbacks: Ratings that could not be read, in whose place a fallback stands.
        users_left_out: Users who have not both a yes and a no, whom GAUC leaves out.
        truth_copy_rate: CopyRate of the true texts.
        truth_hallucination_rate: Hallucination of the true texts.
        features_asked: Requests with a feature that their text should name.
        features_named: Features that the texts name.
        seen: Of a ranking of the catalogue: whether items of the history could be ranked.
        pool: Of the same: mean number of items that could be ranked.
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


class Answered(Record):
    """What all answers have.

    Attributes:
        n: Number of requests.
        tie_rate: Share of requests whose target ties with another item, or whose answer is that of another.
        failures: The first answers that could not be read.
    """

    n: int
    parse_rate: Number = None
    tie_rate: Number = None
    metrics: dict[str, Metric]
    cost: Cost = Cost()
    failures: tuple[Failure, ...] = ()


# Bases from the last to the first give the order of keys in files.
class Measured(Rates, Answered):
    """What a predictor's answers to the requests of one task come to."""

    calibration: Calibration | None = None


class Setting(Record):
    """Which row it is: who answers what, and how it is asked."""

    id: str
    task: str
    arm: Arm
    predictor: str
    template: str | None = None
    template_use: str | None = None
    shots: int = 0

    @property
    def label(self) -> str:
        """What distinguishes the row from others of its task, such as ``tuned · likelihood · continue-list``."""
        parts = [] if self.arm == "baseline" else [self.arm]
        return " · ".join([*parts, self.predictor, *([self.template.rpartition("/")[2]] if self.template else [])])


class Unevaluated(Setting):
    """A row that no engine could answer; the same command evaluates it when it is run again.

    Attributes:
        reason: Why there is no figure.
    """

    reason: str


class Asked(Setting):
    """What answered a row, and what it was given.

    Attributes:
        candidates: Hash of the candidate sets that it ranked, if it ranked any.
    """

    engine: str
    inputs: str = ""
    candidates: str | None = None


class PartWeight(Record):
    """The weight of a part of a fusion, with 95 % limits over users where it has any.

    Attributes:
        loss: What the cross-fitted validation figure loses without the part; see
            `llmrec.ensembles.weights.Without`. None where the fusion is one part alone.
        loss_low: Its 95 % limit over users.
        loss_high: As ``loss_low``.
    """

    name: str
    weight: Number
    low: Number = None
    high: Number = None
    loss: Number = None
    loss_low: Number = None
    loss_high: Number = None


class FusionWeights(Record):
    """What a fusion was fitted to, in a suite with the first seed.

    Attributes:
        form: ``logit``, ``pool`` or ``alone``; see `llmrec.ensembles.rankers`.
        parts: One a part.
        repeat: Logarithm of what an item of the history is worth beside another; None where none can be ranked.
    """

    form: str
    parts: tuple[PartWeight, ...]
    repeat: Number = None


class Choice(Record):
    """The row that is served where nobody says which: the best one on validation users; test users had no say in it.

    Attributes:
        row: Its id.
        metric: That decided.
        value: Its figure on validation users; of a fusion the cross-fitted one.
        users: Validation users, who chose no parameter of any row.
        figures: Of all rows that could have been chosen, by id.
    """

    row: str
    metric: str
    value: float
    users: int
    figures: dict[str, float] = Field(default_factory=dict)


class Row(Measured, Asked):
    """One predictor on one task.

    Attributes:
        users: Number of users whose requests it answered; None in results that do not say.
        reads: What it knows items by; None in results that do not say.
        fusion: The weights of a fusion; None for any other row.
    """

    users: int | None = None
    reads: Reads | None = None
    fusion: FusionWeights | None = None
    slices: tuple[SliceOfRow, ...] = ()
    by_position: tuple[AtPosition, ...] = ()
    position_bias: PositionBias | None = None

    @property
    def alone(self) -> str | None:
        """The part that a fusion is, where only one has a weight that counts; None of any other row."""
        if self.fusion is None or self.fusion.form != "alone":
            return None
        return next((part.name for part in self.fusion.parts if part.weight), None)

    def differs(self, other: Row) -> bool:
        """Whether it may have other lists than another row: a fusion that is one part alone has those of the part."""
        ends = [(row.arm, row.template, row.alone or row.predictor) for row in (self, other)]
        return ends[0] != ends[1]

    @property
    def method(self) -> str:
        """The predictor without the parameters that a recipe sets of a baseline."""
        return self.predictor.partition("(")[0]

    def shown(self, metric: str) -> tuple[str, str, str]:
        """Return the name of a metric, its value and its interval as cells of a table."""
        result = self.metrics.get(metric)
        if result is None or result.value is None:
            return metric, "–", ""
        known = result.low is not None and result.high is not None
        return metric, f"{result.value:.3f}", f"[{result.low:.3f}, {result.high:.3f}]" if known else ""


class Prediction(Record):
    """One request of a row, as predictions.parquet holds it; docs/results.md has the columns.

    What has a default is None in rows of before it was stored, and where it does not bear on the answer.

    Attributes:
        parsed: What was read, as JSON.
        rank: Expected rank of the target; None where it was left out, or nothing was ranked.
        error: Why the answer could not be read; None where it could.
        above: Items that score strictly higher than the target; the pool for one that was left out.
        tied: Items with the target's score, the target included; 0 for one that was left out.
        pool: The candidates of the request; without candidates the catalogue.
        value: The rating or P(yes) that is measured, what stands in for an unread answer included.
        copied: Whether the text is a training text again.
        feature: The feature that the text should name.
        feature_named: Whether it does.
        features: The features of training texts that it names.
        unsupported: How many of these no training text of the item holds.
        truth_copied: As ``copied``, of the true text.
        truth_features: How many features the true text names.
        truth_unsupported: As ``unsupported``, of the true text.
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
    """A paired difference a - b, planned or exploratory.

    Attributes:
        low: Lower end of the interval: of a planned comparison at the level of its own Holm step, ``level``, else at an
            unadjusted 95 %.
        high: Upper end.
        level: Coverage of the interval; None: 95 %.
        p: Corrected for all pairs that it was tested with; None for an exploratory comparison.
        p_raw: Before correction.
        verdict: None for an exploratory comparison, which makes no claim.
        detectable: The smallest true difference that would be found in 80 of 100 repetitions.
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


class Compared(Record):
    """What a pair of rows is compared on."""

    task: str
    metric: str


class Comparison(Pair, Compared):
    """A paired difference a - b on one metric of a task."""


class Results(Displayed, Record):
    """The whole of results.json."""

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
    examples: tuple[Shown, ...] = ()
    texts: tuple[Sample, ...] = ()
    gallery: tuple[Exhibit, ...] = ()
    newcomers: tuple[Newcomer, ...] = ()
    example: ExampleUser | None = None
    set_aside: tuple[SetAside, ...] = ()
    notes: tuple[str, ...] = ()
    files: dict[str, str] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the recipe calls itself."""
        return str(self.recipe.get("name") or "Report")

    @property
    def model_name(self) -> str | None:
        """The language model that was asked, if any was."""
        section = self.recipe.get("model") if any(row.arm != "baseline" for row in self.rows) else None
        return (str(section.get("name") or "") or None) if isinstance(section, dict) else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order in which they first appear."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    def row(self, row_id: str) -> Row:
        """Return one row; `check` has made sure that every comparison names existing ones."""
        return next(row for row in self.rows if row.id == row_id)

    def members(self, row: Row) -> tuple[Row, ...]:
        """Return the rows that an ensemble joins; none of any other row."""
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
            # Several settings and templates may share a strategy: an ensemble joins those of its own.
            known.sort(key=lambda each: (each.arm, each.template, each.shots) != (row.arm, row.template, row.shots))
            results += known[:1]
        return tuple(results)

    def standings(self, task: str) -> tuple[Row, ...]:
        """Return a task's rows, best headline value first and rows without one last."""
        metric = self.headline[task]

        def key(row: Row) -> tuple[bool, float, str]:
            value = row.metrics[metric].value if metric in row.metrics else None
            if value is None:
                return (True, 0.0, row.id)
            return (False, value if lower(metric) else -value, row.id)

        return tuple(sorted((row for row in self.rows if row.task == task), key=key))

    def kinds(self, task: str) -> tuple[tuple[Reads | None, tuple[Row, ...]], ...]:
        """Return a task's rows by what they know items by, each kind as `standings` orders it.

        One group under None where no row says, or all know items by the same.
        """
        rows = self.standings(task)
        results = [(kind, tuple(row for row in rows if row.reads == kind)) for kind in get_args(Reads)]
        results = [(kind, own) for kind, own in results if own]
        whole = sum(len(own) for _, own in results) == len(rows) and len(results) > 1
        return tuple(results) if whole else ((None, rows),)

    def missing(self, task: str) -> tuple[Unevaluated, ...]:
        """Return a task's rows that were not evaluated."""
        return tuple(row for row in self.unevaluated if row.task == task)

    def metrics(self, task: str) -> tuple[str, ...]:
        """Return a task's metric names, the headline one first."""
        names = dict.fromkeys(name for row in self.rows if row.task == task for name in row.metrics)
        return (self.headline[task], *(name for name in names if name != self.headline[task]))

    def best(self, task: str, metric: str) -> float | None:
        """Return the best value of a metric among a task's rows."""
        results = [row.metrics[metric].value for row in self.rows if row.task == task and metric in row.metrics]
        values = [value for value in results if value is not None]
        if not values:
            return None
        return min(values) if lower(metric) else max(values)

    def data_of(self, task: str) -> DataInfo | None:
        """Return the data that a task was measured on."""
        return self.data.get(self.tables.get(task, "main")) or self.data.get("main")

    def _summary(self) -> Summary:
        rows = [row for task in self.tasks for row in self.standings(task)]
        cells = [(row.task, row.label, *row.shown(self.headline[row.task])) for row in rows]
        users = sorted({row.users for row in rows if row.users is not None})
        facts = {
            "model": self.model_name or "none",
            "tasks": listed(self.tasks),
            "users": " or ".join(f"{user:,}" for user in users),
            "llmrec": self.llmrec,
        }
        header = ("task", "model", "metric", "value", "95 % interval")
        return Summary(f"Results of {self.name!r}", {name: text for name, text in facts.items() if text}, header, cells)


class StoredResults(Displayed, dict[str, Any]):
    """What results.json holds, as dictionaries and lists; see `Results` and docs/results.md."""

    def _summary(self) -> Summary:
        return Results.model_validate(self)._summary()
