"""The frozen record of a benchmark's result, which the pages read.

A page of any kind (``suite``, ``benchmark`` or ``chat``) writes this one record: rows are models, each with its figures
in one table or several. As in `llmrec.results`, unknown keys are ignored, and what is not set is not written.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmrec.recipe.schema import Plain
from llmrec.records import DataInfo, Number, Record
from llmrec.registry import lower
from llmrec.results import Fact, Figure, FusionWeights, Pair, Reads

Setting = str | bool | int | float | list[float] | list[str] | dict[str, Plain] | None
"""A parameter of a row."""


class Trial(Record):
    """A point of a grid, and its values on the validation split by table."""

    parameters: dict[str, Setting]
    values: dict[str, Number] = Field(default_factory=dict)


class RowFigures(Record):
    """A row's figures in one table.

    Attributes:
        n: Number of requests.
        cold: Means over requests whose target has no training interaction, and their number.
        parameters: What was chosen for this table.
        border: Parameters whose value is at an end of its grid.
        fusion: The weights of an ensemble; None for any other row.
        members: Of an ensemble, the rows of the table that it joins.
        tokens_per_request: Of the row itself, without an ensemble's members, like the next two.
    """

    metrics: dict[str, Figure]
    n: int = 0
    parse_rate: Number = None
    tie_rate: Number = None
    cold: dict[str, float] | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    border: tuple[str, ...] = ()
    fusion: FusionWeights | None = None
    members: tuple[str, ...] = ()
    tokens_per_request: float = 0.0
    forwards_per_request: float = 0.0
    seconds_per_request: float = 0.0

    def value(self, metric: str) -> float | None:
        """Return a figure's value; None where it is undefined."""
        return self.metrics[metric].value


class Dialogues(Record):
    """The conversations of a row.

    Attributes:
        manager: What chooses the tools.
        ranker: The language model that graded the first items of each list; None: the recommender ordered them alone.
        knows: Fields that the users know; none: all.
        conversations: How many there are.
        users: Different ones, over all seeds.
        turns: Of a conversation.
        turns_to_a_hit: Of those that had one; None: none had.
        calls: How often each tool was called.
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
    """One model, over all its seeds.

    Attributes:
        reads: What it knows items by.
        trials: What was tried on validation; empty where there was nothing to choose.
        chosen_by: The metric by which the parameters were chosen.
        encoder: How a text encoder made its vectors, where it reads texts with one; see `Embedder.record`.
        seeds: Number of training seeds.
        fewer_seeds: Whether it is stochastic and was fitted with fewer seeds than the page has.
        arm: The setting of a row of a recipe, such as ``tuned``.
        run: The run that it is a row of; empty for a baseline, which every run has.
        tables: Its figures by table.
        seconds: By stage.
        dialogues: Of a row of conversations.
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
    """Rows that were measured on the same requests under the same protocol, and so may be compared.

    Attributes:
        name: Unique in the file: the treatment of the history of a full ranking, or the task.
        metric: What rows are compared by.
        metrics: What the page shows.
        signature: Of the metric that rows are compared by, where all rows share it.
        candidates: Hash of the candidate sets, if there are any.
        best_baseline: The row that language models are compared with; None where the best row is compared with all.
        detectable: What the comparisons could have detected.
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
    """A planned comparison over some of its requests: exploratory, with an unadjusted 95 % interval.

    Attributes:
        name: See `llmrec.evaluate.slices.target_slices`.
        n: Number of requests.
        clusters: Number of different targets, where these are drawn together.
    """

    name: str
    n: int
    clusters: int | None = None
    value: Number = None
    low: Number = None
    high: Number = None


class BenchmarkPair(Pair):
    """Two rows of a table, compared by its metric.

    Attributes:
        table: Its name.
        items: Where the comparison is on some requests alone: those whose target has no training interaction, with
            intervals clustered by target, or all others.
        n: Number of requests, where these are not all of the table; 0: there are none, and no figure.
        users: Number of users, where these are not all of the table.
        clusters: Number of different targets, where they are drawn together.
        slices: Where the difference comes from; of comparisons over all requests of a ranking.
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


class Size(Record):
    """Size of the data."""

    users: int
    items: int
    interactions: int


class BenchmarkProtocol(Record):
    """What all rows share.

    Attributes:
        users: Evaluated users; of conversations those of a seed.
        fields: Of the items that can be talked about, and how many items have each.
        past: Last items that a simulated user's profile begins with.
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
    """The whole of a benchmark's file.

    Attributes:
        kind: Of its page.
        hash: Of its page.
        data: None where runs may differ in it.
        pairs: The planned comparisons, tested as one family over all tables.
        comparisons: Described and not tested: the best row with every other, or language models with the best baseline.
        explored: What was thought of after the test split was seen: described and not tested.
        missing: Runs that are still to come.
        skipped: Rows of the page that were not run.
        unrun: Planned comparisons with such rows; the others are corrected as if these had been tested too.
        references: Pages of published figures.
        notes: What else a reader must know.
    """

    kind: Literal["suite", "benchmark", "chat"]
    benchmark: str
    description: str = ""
    llmrec: str = ""
    created: str = ""
    command: str = ""
    hash: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Fact] = Field(default_factory=dict)
    data: DataInfo | Size | None = None
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
    notes: tuple[str, ...] = ()

    def standings(self, table: BenchmarkTable) -> list[tuple[BenchmarkRow, RowFigures]]:
        """Return the rows of a table with their figures there, the best first and undefined ones last."""
        results = [(row, row.tables[table.name]) for row in self.rows if table.name in row.tables]
        return sorted(results, key=lambda entry: place(entry[1].value(table.metric), table.metric))


def place(value: float | None, metric: str) -> tuple[bool, float]:
    """Return the sort key of a figure: best first, None last."""
    return (True, 0.0) if value is None else (False, value if lower(metric) else -value)
