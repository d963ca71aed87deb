"""The records of registry tables whose names need more than the address of their code. Nothing is imported for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class BaselineEntry:
    """A baseline, by its name in `llmrec.registry.BASELINES`. All else that others must know of it, its class says.

    Attributes:
        address: Address of its class, ``module:attribute``.
        families: Task families that it answers.
        needs: The package of the extra ``baselines`` that it imports; empty: none.
    """

    address: str
    families: tuple[str, ...]
    needs: str = ""


@dataclass(frozen=True)
class StrategyEntry:
    """A strategy, by its name in `llmrec.registry.STRATEGIES`.

    Attributes:
        address: Address of its class, or of a function that makes it.
        families: Task families that it answers.
        keys: Keys of the recipe's ``eval`` section that it is given, as keyword arguments of the same names.
        positional: Its answer depends on the position of a candidate in the prompt; ``eval.debias`` is for these.
    """

    address: str
    families: tuple[str, ...]
    keys: tuple[str, ...] = ()
    positional: bool = False


Kind = Literal["ranking", "lists", "rating", "probability", "text"]
"""What a metric measures: where the target is ranked, whole lists, ratings, yes/no probabilities or texts."""


Better = Literal["higher", "lower"]
"""Which figures of a metric are better."""


@dataclass(frozen=True, kw_only=True)
class MetricEntry:
    """A metric, by its name in `llmrec.registry.METRICS`, without its cut-off.

    Its function is called with those of the kind's inputs that its parameters name; a metric is left out where one of
    them is None. The inputs are

    - ranking: ``greater``, ``tied``, ``pool``, see `llmrec.metrics.ranking`;
    - lists: ``lists``, ``items``, ``counts``, ``users``, ``cold_counts``, ``contents``, ``expected``, ``targets``,
      ``owners``, ``histories``, see `llmrec.evaluate.lists`;
    - rating: ``predicted``, ``truth``, ``liked``, ``owners``;
    - probability: ``probabilities``, ``labels``, ``owners``;
    - text: ``texts``, ``references``, ``rouge``, ``background``, ``named``, ``owners``;

    and ``k``, the cut-off. It returns an array with a value per request, whose mean is the figure; a number, which gets
    no interval; a `llmrec.metrics.stats.Statistic` over users; or a `llmrec.metrics.stats.Taken`.

    Attributes:
        kind: What it measures.
        about: What it says, in one line.
        function: Address of its function; empty: it is taken only where several items are relevant.
        several: Address of its function over a `llmrec.metrics.multi_target.Judged` and a cut-off, for several
            relevant items.
        lower: Lower is better.
        unit: What its figure is a mean over: requests, or users; ``all``: it is no mean.
        compared: Rows are compared by it.
        root: The figure is the root of the mean.
        cut: It is taken at cut-offs.
        least: The smallest cut-off that it is taken at.
        both: Its name is valid with and without a cut-off.
        full: It is taken only where the whole catalogue is ranked.
        how: What sets its figures apart, for signatures.
        words: How texts are cut into words, for signatures.
        fixed: Further arguments of the function.
    """

    kind: Kind
    about: str
    function: str = ""
    several: str = ""
    lower: bool = False
    unit: Literal["request", "user", "all"] = "request"
    compared: bool = True
    root: bool = False
    cut: bool = False
    least: int = 1
    both: bool = False
    full: bool = False
    how: str | None = None
    words: str | None = None
    fixed: Mapping[str, object] = field(default_factory=dict)


# ----------------------------------------------------------------------------
# What the registry says of a command of the program.


@dataclass(frozen=True)
class Command:
    """A command: its function, and what is known of it before that is imported.

    Attributes:
        target: ``module:function`` of one options record, or a mapping of names to such functions; see
            `llmrec.cli.options.takes`.
        panel: The heading that ``llmrec --help`` lists it under.
        help: The first line of the function's docstring.
        resumes: Whether the same command goes on where it was stopped.
        serves: Whether it runs until it is stopped, so that its libraries write to the error stream.
    """

    target: str
    panel: str
    help: str
    resumes: bool = False
    serves: bool = False
