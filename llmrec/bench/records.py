"""The stored result of a benchmark, which pages read.

A page of any kind (``suite``, ``benchmark`` or ``chat``) writes this record: rows are models, each with its figures in
one or more tables. As in `llmrec.results`, unknown keys are ignored and unset fields are not written.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from llmrec.recipe.schema import Plain
from llmrec.records import DataInfo, Number, Record
from llmrec.registry import is_lower_better
from llmrec.results import Fact, Figure, FusionWeights, Pair, Reads

ParameterValue = str | bool | int | float | list[float] | list[str] | dict[str, Plain] | None
"""The value of a row's parameter."""


class Trial(Record):
    """A hyperparameter setting with its validation values by table."""

    parameters: dict[str, ParameterValue]
    values: dict[str, Number] = Field(default_factory=dict)


class RowFigures(Record):
    """The results of a model in one table.

    Attributes:
        n: Number of requests.
        cold: Means over requests whose target has no training interactions, and their number.
        parameters: The parameters chosen for this table.
        border: Parameters whose value is at an end of its grid.
        fusion: The weights of an ensemble; None for other rows.
        members: The rows of the table that are members of an ensemble.
        tokens_per_request: Tokens without those of an ensemble's members, like the next two.
    """

    metrics: dict[str, Figure]
    n: int = 0
    parse_rate: Number = None
    tie_rate: Number = None
    cold: dict[str, float] | None = None
    parameters: dict[str, ParameterValue] = Field(default_factory=dict)
    border: tuple[str, ...] = ()
    fusion: FusionWeights | None = None
    members: tuple[str, ...] = ()
    tokens_per_request: float = 0.0
    forwards_per_request: float = 0.0
    seconds_per_request: float = 0.0

    def value(self, metric: str) -> float | None:
        """Return the value of a metric; None if it is undefined."""
        return self.metrics[metric].value


class Dialogues(Record):
    """The conversations of a system.

    Attributes:
        manager: The dialogue manager, which chooses the tools.
        ranker: The language model that reranked the first items of each list; None for the recommender's order.
        knows: Fields that the users know; empty for all.
        conversations: Number of conversations.
        users: Number of different users over all seeds.
        turns: Mean turns of a conversation.
        turns_to_a_hit: Mean turns to a hit of those with one; None without hits.
        calls: Number of calls by tool.
    """

    manager: str
    ranker: str | None = None
    knows: tuple[str, ...] = ()
    conversations: int
    users: int
    turns: float
    turns_to_a_hit: Number = None
    seconds_a_turn: float
    tokens_a_turn: float
    shown_outside_the_catalogue: int
    lines_with_a_wanted_title: int
    calls: dict[str, int]


class BenchmarkRow(Record):
    """A model with its results over all seeds.

    Attributes:
        reads: The data of items that it reads.
        trials: Trials on validation; a single one if the hyperparameters are fixed.
        chosen_by: The metric by which the parameters were chosen.
        encoder: Settings of its text encoder, if it reads texts with one; see `Embedder.record`.
        seeds: Number of training seeds.
        fewer_seeds: Whether it is stochastic and was fitted with fewer seeds than the page has.
        arm: The setting of a row of a recipe, such as ``tuned``.
        run: Its run; empty for a baseline, which every run has.
        tables: Its figures by table.
        seconds: Seconds by stage.
        dialogues: Statistics of a row of conversations.
    """

    name: str
    baseline: str | None = None
    reads: Reads | None = None
    trials: tuple[Trial, ...] = ()
    chosen_by: str = ""
    encoder: dict[str, str] = Field(default_factory=dict)
    seeds: int = 1
    fewer_seeds: bool = False
    arm: str = ""
    predictor: str = ""
    template: str | None = None
    run: str = ""
    shots: int = 0
    engine: str = ""
    tables: dict[str, RowFigures]
    seconds: dict[str, float] = Field(default_factory=dict)
    memory_gb: Number = None
    dialogues: Dialogues | None = None


class BenchmarkTable(Record):
    """Comparable models, measured on the same requests under the same protocol.

    Attributes:
        name: Unique name: the treatment of the history of a full ranking, or the task.
        metric: The metric of comparisons.
        metrics: The metrics that the page shows.
        signature: Signature of ``metric``, if all rows share it.
        candidates: Hash of the candidate sets, if any.
        best_baseline: The row that language models are compared with; None if the best row is compared with all.
        detectable: The sentence on detectable differences.
    """

    name: str
    task: str
    metric: str
    metrics: tuple[str, ...]
    signature: str = ""
    candidates: str | None = None
    requests: int = 0
    users: int = 0
    best_baseline: str | None = None
    detectable: str = ""


class PairSlice(Record):
    """A planned comparison on a subset of its requests; exploratory, with an unadjusted 95 % interval.

    Attributes:
        name: See `llmrec.evaluate.slices.target_slices`.
        n: Number of requests.
        clusters: Number of different targets, if resampled by target.
    """

    name: str
    n: int
    clusters: int | None = None
    value: Number = None
    low: Number = None
    high: Number = None


class BenchmarkPair(Pair):
    """The comparison of two models in a table.

    Attributes:
        table: Name of the table.
        items: The subset of requests, if any: those whose target has no training interactions, with intervals
            clustered by target, or all others.
        n: Number of requests, if not all of the table; 0 for none, and no figure.
        users: Number of users, if not all of the table.
        clusters: Number of different targets, if resampled by target.
        slices: The difference by slice, for comparisons over all requests of a ranking.
    """

    table: str
    metric: str
    items: Literal["cold", "warm"] | None = None
    n: int | None = None
    users: int | None = None
    clusters: int | None = None
    slices: tuple[PairSlice, ...] = ()
    value: Number = None
    low: Number = None
    high: Number = None


class BenchmarkProtocol(Record):
    """The evaluation protocol that all models share.

    Attributes:
        users: Number of evaluated users; for conversations per seed.
        fields: Fields of items that can be talked about, and the number of items with each.
        past: Number of latest items at the start of a simulated user's profile.
    """

    split: str
    candidates: str | None = None
    seeds: tuple[int, ...] = ()
    split_seeds: tuple[int, ...] = ()
    min_history: int = 0
    users: int = 0
    requests: int = 0
    recipe: str = ""
    recommender: str = ""
    fields: dict[str, int] = Field(default_factory=dict)
    turns: int = 0
    k: int = 0
    past: int = 0


class BenchmarkResult(Record):
    """The stored result of a benchmark.

    Attributes:
        kind: Kind of its page.
        commit: The commit of the checkout that computed it; empty if llmrec did not run from one.
        hash: Hash of its page.
        data: The data; None if runs may differ in it.
        pairs: The planned comparisons, tested as one family over all tables.
        comparisons: Exploratory: the best row with every other, or language models with the best baseline.
        explored: Exploratory: comparisons conceived after the test split was seen.
        missing: Number of runs to come.
        skipped: Rows of the page that were not run.
        unrun: Number of planned comparisons with such rows; the correction counts them as tested.
        references: Pages of published figures.
    """

    kind: Literal["suite", "benchmark", "chat"]
    benchmark: str
    description: str = ""
    llmrec: str = ""
    created: str = ""
    command: str = ""
    commit: str = ""
    hash: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Fact] = Field(default_factory=dict)
    data: DataInfo | None = None
    protocol: BenchmarkProtocol | None = None
    tables: tuple[BenchmarkTable, ...] = Field(min_length=1)
    rows: tuple[BenchmarkRow, ...] = Field(min_length=1)
    pairs: tuple[BenchmarkPair, ...] = ()
    comparisons: tuple[BenchmarkPair, ...] = ()
    explored: tuple[BenchmarkPair, ...] = ()
    missing: int = 0
    skipped: tuple[str, ...] = ()
    unrun: int = 0
    references: tuple[str, ...] = ()
    seconds: float = 0.0

    def standings(self, table: BenchmarkTable) -> list[tuple[BenchmarkRow, RowFigures]]:
        """Return the models of a table with their results, best first."""
        results = [(row, row.tables[table.name]) for row in self.rows if table.name in row.tables]
        return sorted(results, key=lambda entry: sort_key(entry[1].value(table.metric), table.metric))

    def best_on_validation(self, table: BenchmarkTable, reads: Reads | None) -> set[str]:
        """Return the best single models on validation, of those with a validation value; several if they are equal.

        Args:
            table: A table of this result.
            reads: What the model may read at most, in the order of `Reads`; None: interactions only.
        """
        order = get_args(Reads)
        limit = order.index(reads or order[0])
        known = {
            row.name: min(sort_key(trial.values[table.name], row.chosen_by) for trial in row.trials)
            for row in self.rows
            if row.trials
            and table.name in row.tables
            and row.tables[table.name].fusion is None
            and order.index(row.reads or order[0]) <= limit
            and all(table.name in trial.values for trial in row.trials)
        }
        return {name for name, value in known.items() if value == min(known.values())}


def sort_key(value: float | None, metric: str) -> tuple[bool, float]:
    """Return the sort key of a value: best first, None last."""
    return (True, 0.0) if value is None else (False, value if is_lower_better(metric) else -value)
