"""The frozen records of results.json: evaluation makes them, the report reads them.

Everything in them is untrusted text or a number. Keys that no record has are ignored, and what later versions added is
optional, so that results of any version can be read.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

Arm = Literal["zero-shot", "few-shot", "tuned", "baseline"]
Verdict = Literal["shown", "not shown", "contradicted"]
Better = Literal["higher", "lower"]

_LOWER = re.compile(r"RMSE|MAE|LogLoss|ECE|DIV|Hallucination|CopyRate|(Gini|PopularityLift)@[1-9]\d*")


def better(metric: str) -> Better:
    """Say whether higher or lower figures of a metric are better."""
    return "lower" if lower(metric) else "higher"


def lower(metric: str) -> bool:
    """Say whether lower figures of a metric are better."""
    return _LOWER.fullmatch(metric) is not None


def _finite(value: object) -> object:
    """Turn NaN and the infinities, which JSON cannot hold, into None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Record(BaseModel):
    """Frozen base; keys that it does not have are ignored, so that results may grow."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Metric(Record):
    """One number with its 95 % interval and the protocol it was measured under, or why there is none."""

    value: Number
    low: Number = None
    high: Number = None
    signature: str
    undefined: str = ""


class Cost(Record):
    """Work of one row: wall-clock seconds, tokens and model calls; 0 calls in results that do not say."""

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
    """A row's figures over some of its cases."""

    name: str
    n: int
    users: int | None = None
    small: bool = False
    metrics: dict[str, Metric] = {}


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


class Trend(Record):
    """Rank correlation of the target's position with its rank; p is corrected for all rows that were tested."""

    rho: Number
    p: Number
    prefers: Literal["early", "late"] | None = None


class Reliability(Record):
    """Answers with about the same P(yes): their mean, and the share of them whose truth is yes."""

    n: int
    said: Number
    so: Number


class Row(Record):
    """One predictor on one task.

    Attributes:
        candidates: Hash of the candidate sets that it ranked, if it ranked any.
        users: Number of users whose requests it answered; None in results that do not say.
    """

    id: str
    task: str
    arm: Arm
    predictor: str
    template: str | None = None
    template_use: str | None = None
    shots: int = 0
    engine: str
    n: int
    parse_rate: Number = None
    tie_rate: Number = None
    metrics: dict[str, Metric]
    cost: Cost = Cost()
    inputs: str = ""
    failures: tuple[Failure, ...] = ()
    candidates: str | None = None
    users: int | None = None
    slices: tuple[SliceOfRow, ...] = ()
    by_position: tuple[AtPosition, ...] = ()
    position_trend: Trend | None = None
    reliability: tuple[Reliability, ...] = ()


class Comparison(Record):
    """A paired difference a - b on one metric."""

    task: str
    metric: str
    a: str
    b: str
    value: Number
    low: Number
    high: Number
    p: Number
    verdict: Verdict
    detectable: Number = None


class LogLine(Record):
    """One logged optimiser step; losses are nats a target token."""

    step: int
    loss: Number = None
    learning_rate: Number = None
    tokens_per_second: Number = None
    valid_loss: dict[str, Number] | None = None


class Training(Record):
    """What was tuned, and how it went."""

    method: str
    steps: int
    tokens: int
    target_tokens: int
    seconds: Number
    tokens_per_second: Number
    rows: dict[str, int] = {}
    log: tuple[LogLine, ...] = ()
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    adapter_sha256: str | None = None

    @property
    def validated(self) -> tuple[str, ...]:
        """Tasks with a validation loss in the log."""
        return tuple(dict.fromkeys(task for line in self.log for task in line.valid_loss or {}))


class DataInfo(Record):
    """One data set as it was used."""

    name: str
    users: int
    items: int
    interactions: int
    density: Number = None
    train: int
    valid: int
    test: int
    fingerprint: str
    split_fingerprint: str
    split: str
    noun: str = "items"
    made: bool = False
    derived: str = ""


class Candidates(Record):
    """Stored candidate sets, told apart by their digest."""

    digest: str
    count: int
    kind: str
    ceiling: float | None = None


class Stage(Record):
    """Wall-clock seconds of one stage."""

    stage: str
    seconds: float


class Shown(Record):
    """One prompt with its answer, kept for reading."""

    task: str
    arm: str
    predictor: str
    template: str | None = None
    prompt: str
    raw: str | None = None
    parsed: Any = None
    truth: Any = None


class User(Record):
    """Whose request it was; the name is empty where there is none."""

    id: str
    name: str = ""


class Product(Record):
    """What a text is about: an item with its further fields."""

    id: str
    title: str
    fields: dict[str, str] = {}


class Told(Record):
    """Something that a question can tell beside user and item, and the templates that do."""

    name: str
    text: str
    by: tuple[str, ...] = ()


class Written(Record):
    """The text that a row wrote; None where its answer could not be read, with the reason and the raw answer."""

    text: str | None
    error: str = ""
    raw: str = ""


class Sample(Record):
    """One request whose answer is a text, with the true one and those of the rows, by row id."""

    task: str
    request_id: str
    user: User
    item: Product
    told: tuple[Told, ...] = ()
    truth: str
    answers: dict[str, Written]


class SetAside(Record):
    """Users of a table who are not asked about, and why."""

    data: str
    said: str
    users: tuple[str, ...] = ()


class Results(Record):
    """The whole of results.json."""

    llmrec: str
    created: str
    recipe: dict[str, Any]
    recipe_hash: str
    command: str = ""
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    seed: int = 0
    data: dict[str, DataInfo | None]
    candidates: dict[str, Candidates | None] = {}
    training: Training | None = None
    rows: tuple[Row, ...]
    headline: dict[str, str]
    comparisons: tuple[Comparison, ...] = ()
    detectable: dict[str, str] = {}
    budget: tuple[Stage, ...] = ()
    seconds: Number = None
    examples: tuple[Shown, ...] = ()
    texts: tuple[Sample, ...] = ()
    set_aside: tuple[SetAside, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the recipe calls itself."""
        return str(self.recipe.get("name") or "Report")

    @property
    def model_name(self) -> str | None:
        """The model that the recipe names, if it names one."""
        section = self.recipe.get("model")
        found = section.get("name") if isinstance(section, dict) else None
        return str(found) if found else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order in which they first appear."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    def row(self, row_id: str) -> Row:
        """Return one row; `check` has made sure that every comparison names existing ones."""
        return next(row for row in self.rows if row.id == row_id)

    def standings(self, task: str) -> tuple[Row, ...]:
        """Return a task's rows, best headline value first and rows without one last."""
        metric = self.headline[task]

        def key(row: Row) -> tuple[bool, float, str]:
            value = row.metrics[metric].value if metric in row.metrics else None
            if value is None:
                return (True, 0.0, row.id)
            return (False, value if lower(metric) else -value, row.id)

        return tuple(sorted((row for row in self.rows if row.task == task), key=key))

    def metrics(self, task: str) -> tuple[str, ...]:
        """Return a task's metric names, the headline one first."""
        names = dict.fromkeys(name for row in self.rows if row.task == task for name in row.metrics)
        return (self.headline[task], *(name for name in names if name != self.headline[task]))

    def best(self, task: str, metric: str) -> float | None:
        """Return the best value of a metric among a task's rows."""
        found = [row.metrics[metric].value for row in self.rows if row.task == task and metric in row.metrics]
        values = [value for value in found if value is not None]
        if not values:
            return None
        return min(values) if lower(metric) else max(values)

    def data_of(self, task: str) -> DataInfo | None:
        """Return the data that a task was measured on: reviews, where given, for explanations."""
        reviews = self.data.get("reviews") if task == "explanation" else None
        return reviews or self.data.get("main")


def mended(value: Any) -> Any:
    """Replace lone surrogates, which no file can hold, in every string of a JSON value."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, dict):
        return {mended(key): mended(entry) for key, entry in value.items()}
    return [mended(entry) for entry in value] if isinstance(value, list) else value
