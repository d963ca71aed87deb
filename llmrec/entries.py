"""Types of the entries in `llmrec.registry`; imports none of the registered components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class BaselineEntry:
    """Registers a baseline under its name in `llmrec.registry.BASELINES`; its class defines everything else.

    Attributes:
        address: Address of its class, ``module:attribute``.
        families: Task families that it supports.
        needs: The package of the extra ``baselines`` that it imports; empty for none.
    """

    address: str
    families: tuple[str, ...]
    needs: str = ""


@dataclass(frozen=True)
class StrategyEntry:
    """Registers a scoring or ranking strategy under its name in `llmrec.registry.STRATEGIES`.

    Attributes:
        address: Address of its class, or of a factory function.
        families: Task families that it supports.
        keys: Keys of the recipe's ``eval`` section that it takes as keyword arguments of the same names.
        positional: Whether its answer depends on the position of a candidate in the prompt; ``eval.debias`` applies
            only to these.
    """

    address: str
    families: tuple[str, ...]
    keys: tuple[str, ...] = ()
    positional: bool = False


MetricKind = Literal["ranking", "lists", "rating", "probability", "text"]
"""The input of a metric: ranks of targets, lists, ratings, yes/no probabilities or texts."""


MetricDirection = Literal["higher", "lower"]
"""Whether higher or lower figures of a metric are better."""


@dataclass(frozen=True, kw_only=True)
class MetricEntry:
    """Registers a metric under its name in `llmrec.registry.METRICS`, without cut-off.

    Its function is called with the inputs of the kind that its parameters name; a metric is omitted if one of them is
    None. The inputs are

    - ranking: ``greater``, ``tied``, ``pool``, see `llmrec.metrics.ranking`;
    - lists: ``lists``, ``items``, ``counts``, ``users``, ``cold_counts``, ``contents``, ``expected``, ``targets``,
      ``owners``, ``histories``, see `llmrec.evaluate.lists`;
    - rating: ``predicted``, ``truth``, ``liked``, ``owners``;
    - probability: ``probabilities``, ``labels``, ``owners``;
    - text: ``texts``, ``references``, ``rouge``, ``background``, ``named``, ``owners``;

    and ``k``, the cut-off. It returns an array with a value per request, whose mean is the figure; a number, which gets
    no interval; a `llmrec.metrics.stats.Statistic` over users; or a `llmrec.metrics.stats.MetricValues`.

    Attributes:
        kind: The kind of its input.
        about: Its description in one line.
        function: Address of its function; empty if it requires several relevant items.
        several: Address of its function over a `llmrec.metrics.multi_target.RelevantRanks` and a cut-off, for several
            relevant items.
        lower: Whether lower is better.
        unit: The units that its figure is a mean over, requests or users; ``all`` if it is not a mean.
        compared: Whether models are compared by it.
        root: Whether the figure is the root of the mean.
        cut: Whether it has cut-offs.
        least: Its smallest cut-off.
        both: Whether its name is valid with and without a cut-off.
        full: Whether it requires full ranking.
        how: Further details of its figures, for signatures.
        words: The tokenisation of texts, for signatures.
        fixed: Further arguments of the function.
    """

    kind: MetricKind
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


@dataclass(frozen=True)
class Command:
    """Registers a command: its function, and what is needed before the function is imported.

    Attributes:
        target: ``module:function`` of one options record, or a mapping of names to such functions; see
            `llmrec.cli.options.expand_options`.
        panel: Its heading in ``llmrec --help``.
        help: The first line of the function's docstring.
        resumes: Whether the same command resumes where it was stopped.
        serves: Whether it runs until it is stopped, so that its libraries write to stderr.
    """

    target: str
    panel: str
    help: str
    resumes: bool = False
    serves: bool = False
