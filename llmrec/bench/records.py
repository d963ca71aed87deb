"""The frozen records of what suites, benchmarks and suites of conversations write, which the pages read.

As in `llmrec.results`, keys that no record has are ignored, and what later versions added is optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import Field

from llmrec.metrics.multiple import ALPHA, at_most, holm
from llmrec.recipe.schema import Plain
from llmrec.records import DataInfo, Number, Record
from llmrec.results import Fact, Figure, FusionWeights, Pair, Reads

AnyPair = TypeVar("AnyPair", bound=Pair)
Setting = str | bool | int | float | list[float] | list[str] | dict[str, Plain] | None
"""A parameter of a row."""


class Trial(Record):
    """A point of a grid, and its values on the validation split.

    Attributes:
        values: By table.
        value: Of the first table; what results of 0.1 have.
    """

    parameters: dict[str, Setting]
    values: dict[str, Number] = Field(default_factory=dict)
    value: Number = None


class Table(Record):
    """A row's figures under one treatment of the history.

    Attributes:
        n: Number of requests.
        cold: Means over requests whose target has no training interaction, and their number.
        parameters: What was chosen for this table; None: see the row.
        border: Parameters whose value stands at an end of its grid.
        fusion: The weights of a fusion; None for any other row.
    """

    metrics: dict[str, Figure]
    parameters: dict[str, Setting] | None = None
    border: tuple[str, ...] = ()
    fusion: FusionWeights | None = None
    tie_rate: Number = None
    n: int = 0
    cold: dict[str, float] | None = None


class SuiteLine(Record):
    """One row of a suite: a baseline, a tuned model or a mixture.

    Attributes:
        parameters: Of all tables, where they do not say their own: of results of 0.1.
        reads: What it knows items by; None in results of 0.1.
        trials: What was tried on validation, none where there was nothing to choose.
        chosen_by: The metric by which the parameters were chosen.
        fewer_seeds: Whether it is stochastic and was fitted with fewer seeds than the suite has.
        encoder: How a text encoder made its vectors, where it reads texts with one; see `Embedder.record`.
        seconds: By what was done.
    """

    name: str
    baseline: str | None = None
    reads: Reads | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    chosen_by: str = ""
    encoder: dict[str, str] = Field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    fewer_seeds: bool = False
    tables: dict[str, Table]
    seconds: dict[str, float] = Field(default_factory=dict)
    memory_gb: Number = None

    def parameters_of(self, table: str) -> dict[str, Setting]:
        """Return what was chosen for a table."""
        own = self.tables[table].parameters
        return self.parameters if own is None else own


class Size(Record):
    """Size of the data."""

    users: int
    items: int
    interactions: int


class SuiteProtocol(Record):
    """What the rows of a suite share; ``metrics`` end with the one that tables are sorted by."""

    split: str
    task: str = ""
    candidates: str | None = None
    seen: tuple[str, ...] = Field(min_length=1)
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    split_seeds: tuple[int, ...] = ()
    min_history: int = 0
    users: int
    requests: int = 0


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


class SuitePair(Pair):
    """Two rows of a table: the best one, ``a``, against another, ``b``, which is exploratory, or two that are planned.

    Results of earlier versions tell the verdict on the best row alone.

    Attributes:
        items: Where the comparison is on some requests alone: those whose target has no training interaction, with
            intervals clustered by target, or all others.
        n: How many requests these are; 0: there are none, and no figure.
        clusters: How many different targets these have, where they are drawn together.
        slices: Where the difference comes from; of comparisons over all requests of a ranking.
    """

    seen: str
    metric: str = ""
    items: Literal["cold", "warm"] | None = None
    n: int | None = None
    clusters: int | None = None
    slices: tuple[PairSlice, ...] = ()
    a: str = ""
    value: Number = None
    low: Number = None
    high: Number = None


class SuiteResult(Record):
    """The whole of a suite's file.

    Attributes:
        comparisons: The best row with every other: described and not tested.
        pairs: The planned comparisons.
        explored: What was thought of after the test split was seen: described and not tested.
        skipped: Rows of the page that were not run.
        unrun: Planned comparisons with such rows; the others are corrected as if these had been tested too.
    """

    kind: str = "suite"
    suite: str
    description: str = ""
    llmrec: str = ""
    created: str = ""
    command: str = ""
    suite_hash: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Fact] = Field(default_factory=dict)
    data: DataInfo | Size
    protocol: SuiteProtocol
    rows: tuple[SuiteLine, ...]
    comparisons: tuple[SuitePair, ...] = ()
    pairs: tuple[SuitePair, ...] = ()
    explored: tuple[SuitePair, ...] = ()
    skipped: tuple[str, ...] = ()
    unrun: int = 0
    detectable: dict[str, str] = Field(default_factory=dict)
    references: tuple[str, ...] = ()
    seconds: float = 0.0


class BenchmarkLine(Record):
    """One row of a benchmark's table, over all its seeds; ``run`` is empty for a baseline.

    Attributes:
        members: Of an ensemble, the rows of the table that it joins; None in results that do not say.
        tokens_per_request: Of the row itself; an ensemble's members are not counted. So are the next two.
    """

    name: str
    arm: str
    predictor: str = ""
    template: str | None = None
    run: str = ""
    shots: int = 0
    engine: str = ""
    seeds: int = 1
    parse_rate: Number = None
    metrics: dict[str, Figure]
    members: tuple[str, ...] | None = None
    tokens_per_request: float = 0.0
    forwards_per_request: float = 0.0
    seconds_per_request: float = 0.0

    def value(self, metric: str) -> float | None:
        """Return a figure's value; None where it is not defined."""
        return self.metrics[metric].value


class BenchmarkTable(Record):
    """Rows of one family and protocol, best first.

    Attributes:
        against_best_baseline: Exploratory, unless a pair is planned.
        pairs: The planned comparisons of this table, tested as one family with those of all other tables.
        detectable: What these comparisons could have shown.
    """

    task: str
    metric: str
    signature: str
    candidates: str | None = None
    requests: int
    users: int
    rows: tuple[BenchmarkLine, ...]
    best_baseline: str | None = None
    against_best_baseline: tuple[Pair, ...] = ()
    pairs: tuple[Pair, ...] = ()
    detectable: str = ""


class BenchmarkResult(Record):
    """The whole of a benchmark's file."""

    kind: str = "benchmark"
    benchmark: str
    description: str
    llmrec: str = ""
    created: str = ""
    command: str
    benchmark_hash: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Fact] = Field(default_factory=dict)
    seconds: float
    missing: int
    tables: tuple[BenchmarkTable, ...]


class ChatTalk(Record):
    """One conversation of a suite, as figures need it.

    Attributes:
        seed: Of the draw of users.
        hit: The turn whose list held what is wanted, from 1; None: none did.
        tokens: Read and written by a language model.
        calls: How often each tool was called.
        unread: Calls that do not parse.
        outside: Items that were shown and are none of the catalogue.
        named: Lines of the user that name the wanted item, or nearly.
    """

    seed: int
    user: str
    hit: int | None = None
    turns: int
    seconds: float
    tokens: int = 0
    calls: dict[str, int]
    unread: int = 0
    outside: int = 0
    named: int = 0


class ChatLine(Record):
    """One row of a suite of conversations.

    Attributes:
        ranker: The language model that graded the first items of each list; None: the recommender ordered them alone.
        knows: Fields that the users know; none: all.
        users: Different ones, over all seeds.
        metrics: Share of conversations one of whose first lists held what was wanted, by their number.
        turns: Of a conversation.
        turns_to_a_hit: Of those that had one; None: none had.
        parse_rate: Share of calls that parse.
        calls: How often each tool was called.
    """

    name: str
    manager: str
    ranker: str | None = None
    knows: tuple[str, ...] = ()
    conversations: int
    users: int
    metrics: dict[str, Figure]
    turns: float
    turns_to_a_hit: Number = None
    seconds_a_turn: float
    tokens_a_turn: float
    parse_rate: float
    shown_outside_the_catalogue: int
    lines_with_a_wanted_title: int
    calls: dict[str, int]


class ChatPair(Pair):
    """A planned comparison of two rows, on the conversations that both have."""

    conversations: int
    users: int


class ChatResult(Record):
    """The whole of the file of a suite of conversations.

    Attributes:
        metric: What planned comparisons are of.
        fields: Of the items, which can be talked about, and how many items have each.
        users: Of a seed.
        past: Last items that a profile begins with.
    """

    kind: str = "chat"
    chat: str
    description: str = ""
    llmrec: str = ""
    created: str = ""
    command: str = ""
    chat_hash: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Fact] = Field(default_factory=dict)
    recipe: str
    recommender: str
    data: DataInfo
    fields: dict[str, int]
    split: str
    metric: str
    users: int
    seeds: tuple[int, ...]
    turns: int
    k: int
    past: int
    rows: tuple[ChatLine, ...]
    pairs: tuple[ChatPair, ...] = ()
    detectable: str = ""
    seconds: float = 0.0


def retested(tables: Sequence[Sequence[AnyPair]]) -> list[list[AnyPair]]:
    """Return the planned pairs of a file's tables, tested as one family over all of them.

    Earlier versions corrected p in each table by itself and stored nothing else: p before correction is then taken at
    the largest value that it can have had (`at_most`), which errs on the side of no difference, and the intervals stay
    the unadjusted ones that were stored.
    """
    if not any(pair.earlier for table in tables for pair in table):
        return [list(table) for table in tables]
    raw = [at_most([1.0 if pair.p is None else pair.p for pair in table]) for table in tables]
    corrected = iter(holm([p for table in raw for p in table]))
    return [[_with(pair, next(corrected)) for pair in table] for table in tables]


def _with(pair: AnyPair, p: float) -> AnyPair:
    """Return a pair with another corrected p, which can take its verdict away."""
    return pair.model_copy(update={"p": p, "verdict": pair.verdict if p <= ALPHA else "not shown"})
