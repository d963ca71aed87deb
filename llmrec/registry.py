"""The registry: maps names in recipes to components, without importing them.

Values are ``module:attribute``, imported on first use. A recipe may also use names of `llmrec.plugins`: an installed
entry point, or ``module:attribute`` itself.

The tables contain the core. A package with a module ``entries`` is an extension and adds the tables of that module to
those of the same name here (`with_extension_entries`), so deleting its folder removes its names.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from llmrec import plugins
from llmrec.durable import Json
from llmrec.entries import BaselineEntry, Command, MetricDirection, MetricEntry, MetricKind, StrategyEntry
from llmrec.errors import LlmrecError, RecipeError, did_you_mean

log = logging.getLogger(__name__)

_Entry = TypeVar("_Entry")
Table = Mapping[str, str] | Mapping[str, BaselineEntry] | Mapping[str, StrategyEntry]
"""A table of components: addresses, or entries with an address."""


@cache
def _extension_modules() -> tuple[ModuleType, ...]:
    root = Path(__file__).parent
    files = sorted([*root.glob("*/entries.py"), *root.glob("systems/*/entries.py")])
    return tuple(import_module(".".join((root.name, *file.relative_to(root).with_suffix("").parts))) for file in files)


def with_extension_entries(table: str, core: Mapping[str, _Entry]) -> Mapping[str, _Entry]:
    """Return a table of components with the entries that extensions add."""
    entries = dict(core)
    for module in _extension_modules():
        entries.update(getattr(module, table, {}))
    return entries


# Descriptions of published data sets by name: each file adds a source.
DATA_SETS: Mapping[str, Path] = {
    page.stem: page for page in sorted((Path(__file__).parent / "data" / "sets").glob("*.yaml"))
}

SOURCES: Mapping[str, str] = {
    **dict.fromkeys(DATA_SETS, "llmrec.data.sets.published:load_published"),
    "mind": "llmrec.data.sets.mind:load_mind",
    "sequences": "llmrec.data.sets.sequences:load_sequences",
    "samples": "llmrec.data.sets.samples:load_samples",
    "made-reviews": "llmrec.data.sets.table:load_made_reviews",
    "amazon-reviews": "llmrec.data.sets.reviews:load_amazon_reviews",
    "explanations": "llmrec.data.sets.table:load_explanations",
    "table": "llmrec.data.sets.table:load_table",
}

INDEXES: Mapping[str, str] = {
    "title": "llmrec.index.titles:Titles",
    "random": "llmrec.index.numbers:RandomNumbers",
    "sequential": "llmrec.index.numbers:SequentialNumbers",
    "token": "llmrec.index.numbers:ItemTokens",
    "collaborative": "llmrec.index.collaborative:Collaborative",
    "semantic": "llmrec.index.semantic:Semantic",
    "category": "llmrec.index.category:Category",
    "external": "llmrec.index.external:External",
}

# `llmrec.tasks.family.Family` records, in display order.
TASKS: Mapping[str, str] = {
    "rating": "llmrec.tasks.rating:FAMILY",
    "sequential": "llmrec.tasks.sequential:FAMILY",
    "direct": "llmrec.tasks.direct:FAMILY",
    "explanation": "llmrec.tasks.explanation:FAMILY",
    "alignment": "llmrec.tasks.alignment:FAMILY",
    "ctr": "llmrec.tasks.ctr:FAMILY",
    "review": "llmrec.tasks.review:REVIEW",
    "stars": "llmrec.tasks.review:STARS",
}

BACKENDS: Mapping[str, str] = {
    "vllm": "llmrec.backends.vllm.backend:VLLMBackend",
    "hf": "llmrec.backends.hf.backend:HFBackend",
    "openai": "llmrec.backends.server.backend:OpenAIBackend",
    "fake": "llmrec.backends.fake:FakeBackend",
}

# The first entry of a task is its default.
STRATEGIES = with_extension_entries(
    "STRATEGIES",
    {
        "label": StrategyEntry(
            "llmrec.strategies.rounds:label_ranker", ("direct",), keys=("permutations",), positional=True
        ),
        "list": StrategyEntry("llmrec.strategies.rounds:ListRanker", ("direct",)),
        "permutation": StrategyEntry(
            "llmrec.strategies.rounds:permutation_ranker",
            ("direct",),
            keys=("permutations", "depth"),
            positional=True,
        ),
        "window": StrategyEntry(
            "llmrec.strategies.rounds:window_ranker",
            ("direct",),
            keys=("permutations", "window", "window_step"),
            positional=True,
        ),
        "pairwise": StrategyEntry("llmrec.strategies.rounds:pairwise_ranker", ("direct",), keys=("depth", "all_pairs")),
        "setwise": StrategyEntry(
            "llmrec.strategies.rounds:setwise_ranker",
            ("direct",),
            keys=("permutations", "depth", "set_size"),
            positional=True,
        ),
        "pointwise-yes": StrategyEntry("llmrec.strategies.pointwise:YesRanker", ("direct",)),
        "two-step": StrategyEntry("llmrec.strategies.profiled:TwoStepRanker", ("direct",), keys=("permutations",)),
        "likelihood": StrategyEntry(
            "llmrec.strategies.pointwise:LikelihoodRanker", ("sequential", "direct", "alignment")
        ),
        "likelihood-prior": StrategyEntry(
            "llmrec.strategies.pointwise:PriorRanker", ("sequential",), keys=("prior_weight",)
        ),
        "search": StrategyEntry(
            "llmrec.strategies.catalogue:CatalogueRanker", ("sequential",), keys=("beams", "exact")
        ),
        "expected": StrategyEntry("llmrec.strategies.raters:ExpectedRater", ("rating", "stars")),
        "parsed": StrategyEntry("llmrec.strategies.raters:ParsedRater", ("rating", "stars")),
        "head": StrategyEntry("llmrec.strategies.raters:HeadRater", ("rating",)),
        "text": StrategyEntry("llmrec.strategies.raters:TextGenerator", ("explanation", "review")),
        "yes-no": StrategyEntry("llmrec.strategies.raters:YesNoJudge", ("ctr",)),
        "parsed-yes-no": StrategyEntry("llmrec.strategies.raters:ParsedYesNoJudge", ("ctr",)),
    },
)

# Tasks whose baselines rank items for users, and tasks whose baselines predict ratings.
_RANKED = ("sequential", "direct")
_RATED = ("rating", "stars")

# In the order of tables and messages.
BASELINES = with_extension_entries(
    "BASELINES",
    {
        "random": BaselineEntry("llmrec.baselines.popular:Random", (*_RANKED, "alignment")),
        "popularity": BaselineEntry("llmrec.baselines.popular:Popularity", _RANKED),
        "recent-popularity": BaselineEntry("llmrec.baselines.popular:RecentPopularity", _RANKED),
        "item-knn": BaselineEntry("llmrec.baselines.knn:ItemKNN", _RANKED),
        "rp3beta": BaselineEntry("llmrec.baselines.knn:RP3Beta", _RANKED),
        "markov-1": BaselineEntry("llmrec.baselines.markov:FirstOrder", _RANKED),
        "markov": BaselineEntry("llmrec.baselines.markov:Markov", _RANKED),
        "markov-cooccurrence": BaselineEntry("llmrec.baselines.markov:MarkovCooccurrence", _RANKED),
        "transitions": BaselineEntry("llmrec.baselines.transitions:Transitions", _RANKED),
        "transitions-text": BaselineEntry("llmrec.baselines.transitions:TransitionsText", _RANKED),
        "content": BaselineEntry("llmrec.baselines.content:Content", _RANKED),
        "ease": BaselineEntry("llmrec.baselines.ease:EASE", _RANKED),
        "als": BaselineEntry("llmrec.baselines.factors:ALS", _RANKED, needs="implicit"),
        "bpr": BaselineEntry("llmrec.baselines.factors:BPR", _RANKED, needs="implicit"),
        "gru4rec": BaselineEntry("llmrec.baselines.gru4rec:GRU4Rec", _RANKED, needs="torch"),
        "llm-sequence": BaselineEntry("llmrec.baselines.llm_sequence:LLMSequence", _RANKED, needs="torch"),
        "sasrec": BaselineEntry("llmrec.baselines.sasrec:SASRec", _RANKED, needs="torch"),
        "sasrec-text": BaselineEntry("llmrec.baselines.sasrec_text:SASRecText", _RANKED, needs="torch"),
        "transitions-tuned": BaselineEntry("llmrec.baselines.pairs:TransitionsTuned", _RANKED, needs="torch"),
        "global-mean": BaselineEntry("llmrec.baselines.rating:GlobalMean", _RATED),
        "user-mean": BaselineEntry("llmrec.baselines.rating:UserMean", _RATED),
        "item-mean": BaselineEntry("llmrec.baselines.rating:ItemMean", _RATED),
        "user-item-bias": BaselineEntry("llmrec.baselines.rating:UserItemBias", _RATED),
        "mf": BaselineEntry("llmrec.baselines.mf:MF", _RATED),
        "svd": BaselineEntry("llmrec.baselines.mf:SVD", _RATED),
        "like-ratio": BaselineEntry("llmrec.baselines.ctr:LikeRatio", ("ctr",)),
        "logistic": BaselineEntry("llmrec.baselines.ctr:Logistic", ("ctr",)),
        "frequent-text": BaselineEntry("llmrec.baselines.text:FrequentText", ("explanation", "review")),
        "nearest-text": BaselineEntry("llmrec.baselines.text:NearestText", ("explanation", "review")),
        "first-sentence": BaselineEntry("llmrec.baselines.text:FirstSentence", ("review",)),
        "text-ridge": BaselineEntry("llmrec.baselines.text:TextRidge", ("stars",)),
    },
)

# In the order of tables.
_METRICS = with_extension_entries(
    "METRICS",
    {
        "HR": MetricEntry(
            kind="ranking",
            about="share of requests whose target (or any relevant item) is among the first k",
            function="llmrec.metrics.ranking:hit_rate",
            several="llmrec.metrics.multi_target:hit_rate",
            cut=True,
        ),
        "Recall": MetricEntry(
            kind="ranking",
            about="relevant items among the first k, divided by all relevant items",
            several="llmrec.metrics.multi_target:recall",
            cut=True,
        ),
        "Precision": MetricEntry(
            kind="ranking",
            about="relevant items among the first k, divided by k",
            function="llmrec.metrics.ranking:precision",
            several="llmrec.metrics.multi_target:precision",
            cut=True,
            least=2,
            full=True,
            compared=False,
        ),
        "NDCG": MetricEntry(
            kind="ranking",
            about="discounted cumulative gain of the first k, divided by that of the ideal list",
            function="llmrec.metrics.ranking:ndcg",
            several="llmrec.metrics.multi_target:ndcg",
            cut=True,
            least=2,
        ),
        "MRR": MetricEntry(
            kind="ranking",
            about="mean of 1 / rank of the first relevant item",
            function="llmrec.metrics.ranking:reciprocal_rank",
            several="llmrec.metrics.multi_target:reciprocal_rank",
            both=True,
        ),
        "MAP": MetricEntry(
            kind="ranking",
            about="mean precision at the ranks of the relevant items",
            function="llmrec.metrics.ranking:average_precision",
            several="llmrec.metrics.multi_target:average_precision",
            cut=True,
            least=2,
            both=True,
            full=True,
            compared=False,
        ),
        "RankAUC": MetricEntry(
            kind="ranking",
            about="share of the other items that are ranked below the target",
            function="llmrec.metrics.ranking:auc",
            full=True,
            compared=False,
        ),
        "Novelty": MetricEntry(
            kind="lists",
            about="mean self-information of the listed items in bits",
            function="llmrec.metrics.beyond:novelty",
            cut=True,
            how="bits",
        ),
        "ILD": MetricEntry(
            kind="lists",
            about="intra-list diversity: mean distance between the items of a list",
            function="llmrec.metrics.beyond:diversity",
            cut=True,
            least=2,
        ),
        "Exposure": MetricEntry(
            kind="lists",
            about="share of list positions with cold-start items",
            function="llmrec.metrics.beyond:cold_exposure",
            cut=True,
        ),
        "Serendipity": MetricEntry(
            kind="lists",
            about="share of a list that is relevant and not listed by popularity",
            function="llmrec.metrics.beyond:serendipity",
            cut=True,
            how="against-popularity",
        ),
        "Coverage": MetricEntry(
            kind="lists",
            about="share of the catalogue that appears in at least one list",
            function="llmrec.metrics.beyond:coverage",
            cut=True,
            unit="all",
            compared=False,
        ),
        "Gini": MetricEntry(
            kind="lists",
            about="inequality of how often items are listed",
            function="llmrec.metrics.beyond:gini",
            cut=True,
            unit="all",
            compared=False,
            lower=True,
        ),
        "ColdItems": MetricEntry(
            kind="lists",
            about="number of different cold-start items in all lists",
            function="llmrec.metrics.beyond:cold_shown",
            cut=True,
            unit="all",
            compared=False,
        ),
        "PopularityLift": MetricEntry(
            kind="lists",
            about="popularity of the listed items relative to the histories of their users",
            function="llmrec.metrics.beyond:popularity_lift",
            cut=True,
            unit="all",
            compared=False,
            lower=True,
        ),
        "RMSE": MetricEntry(
            kind="rating",
            about="root of the mean squared error",
            function="llmrec.metrics.rating:squared_error",
            root=True,
            lower=True,
        ),
        "MAE": MetricEntry(
            kind="rating",
            about="mean absolute error",
            function="llmrec.metrics.rating:absolute_error",
            lower=True,
        ),
        "LikedAUC": MetricEntry(
            kind="rating",
            about="probability that a liked item is predicted above one that is not",
            function="llmrec.metrics.rating:liked_auc",
            unit="all",
            compared=False,
        ),
        "AUC": MetricEntry(
            kind="probability",
            about="probability that a yes outscores a no over all answers",
            function="llmrec.metrics.probability:pooled_auc",
            unit="all",
        ),
        "GAUC": MetricEntry(
            kind="probability",
            about="AUC within each user, averaged over users",
            function="llmrec.metrics.probability:grouped_auc",
            unit="user",
            how="users-alike",
        ),
        "LogLoss": MetricEntry(
            kind="probability",
            about="mean negative log-probability of the truth",
            function="llmrec.metrics.probability:log_loss",
            lower=True,
            how="clip-1e-15",
        ),
        "ECE": MetricEntry(
            kind="probability",
            about="expected calibration error over ten bins of equal mass",
            function="llmrec.metrics.probability:calibration_error",
            unit="all",
            compared=False,
            lower=True,
            how="mass-10",
        ),
        **{
            name: MetricEntry(
                kind="text",
                about=f"{name} F-measure",
                function="llmrec.metrics.text:rouge_of",
                words="rouge-score-nostem",
                fixed={"name": name},
            )
            for name in ("ROUGE-1", "ROUGE-2", "ROUGE-L")
        },
        "BLEU-4": MetricEntry(
            kind="text",
            about="corpus BLEU of 1- to 4-grams",
            function="llmrec.metrics.text:bleu4_statistic",
            unit="all",
            compared=False,
            words="sacrebleu-13a-exp",
        ),
        **{
            f"Distinct-{n}": MetricEntry(
                kind="text",
                about=f"different {n}-grams over all {n}-grams of all texts",
                function="llmrec.metrics.text:distinct_n",
                unit="all",
                compared=False,
                words="words-lower",
                fixed={"n": n},
            )
            for n in (1, 2)
        },
        "USR": MetricEntry(
            kind="text",
            about="unique sentence ratio: different texts over all texts",
            function="llmrec.metrics.explained:unique_sentences",
            unit="all",
            compared=False,
            words="words-lower",
        ),
        "CopyRate": MetricEntry(
            kind="text",
            about="share of texts that copy a training text",
            function="llmrec.metrics.explained:copy_rate",
            compared=False,
            lower=True,
            words="words-lower",
        ),
        "FMR": MetricEntry(
            kind="text",
            about="feature matching ratio: share of texts that contain the feature of their reference",
            function="llmrec.metrics.explained:match_rate",
            compared=False,
            words="words-lower",
        ),
        "FCR": MetricEntry(
            kind="text",
            about="feature coverage ratio: share of all features that appear in at least one text",
            function="llmrec.metrics.explained:coverage_rate",
            unit="all",
            compared=False,
            words="words-lower",
        ),
        "DIV": MetricEntry(
            kind="text",
            about="number of features shared by two texts, averaged over all pairs",
            function="llmrec.metrics.explained:shared_features",
            unit="all",
            compared=False,
            lower=True,
            words="words-lower",
        ),
        "Hallucination": MetricEntry(
            kind="text",
            about="share of the features in the texts that no training review of the item supports",
            function="llmrec.metrics.explained:hallucination_rate",
            unit="all",
            compared=False,
            lower=True,
            words="words-lower",
        ),
    },
)


def _installed_metrics() -> dict[str, MetricEntry]:
    """Return the metrics of installed packages; an invalid one is left out with a warning."""
    result: dict[str, MetricEntry] = {}
    for name in plugins.installed_plugins("metrics"):
        try:
            # Names of built-in metrics are rejected when the recipe is read.
            if name not in _METRICS:
                result[name] = plugins.import_plugin("metrics", name)
        except RecipeError as error:
            log.warning("the metric %s is not computed: %s", name, error)
    return result


METRICS: dict[str, MetricEntry] = {**_METRICS, **_installed_metrics()}
"""The metrics by name, without a cut-off: built-in ones, then those of installed packages."""

TABLES: Mapping[str, Table] = {
    "baselines": BASELINES,
    "strategies": STRATEGIES,
    "tasks": TASKS,
    "indexes": INDEXES,
    "sources": SOURCES,
    "backends": BACKENDS,
}
"""The tables of components that recipes name, by kind of plug-in."""

BUILT_IN: Mapping[str, Collection[str]] = {**TABLES, "metrics": _METRICS}
"""The built-in names by kind of plug-in; see `llmrec.plugins.KINDS`."""

# Names in recipes of tasks defined by plug-ins, by family name.
_PLUGIN_TASK_NAMES: dict[str, str] = {}


def import_component(table: Table, name: str, what: str, *, key: str | None = None) -> Any:
    """Import a built-in component or plug-in by its name; ``key`` is the recipe key that names it.

    Raises:
        RecipeError: If the name is unknown, with the closest one; or as `llmrec.plugins.import_plugin`.
    """
    if name in table:
        return import_attribute(component_address(table, name))
    group = _plugin_group(table)
    result = plugins.import_plugin(group, name) if group else None
    if result is None:
        known = sorted({*table, *(plugins.installed_plugins(group) if group else ())})
        raise RecipeError(
            f"unknown {what} {name[:80]!r}{did_you_mean(name, known)}; known: {', '.join(known)}",
            kind="unknown-name",
            column=key or what,
        )
    return result


def is_plugin(table: Table, name: str) -> bool:
    """Whether a name refers to a plug-in of the given kind."""
    return name not in table and (plugins.is_address(name) or name in plugins.installed_plugins(_plugin_group(table)))


def plugin_digest(table: Table, name: str) -> str:
    """Return a hash of a plug-in's code; empty for a built-in component."""
    return plugins.package_digest(_plugin_group(table), name) if is_plugin(table, name) else ""


def plugin_digests(named: Iterable[tuple[Table, str]]) -> dict[str, dict[str, str]]:
    """Return hashes of the plug-ins among some names, for cache keys."""
    result = {name: code for table, name in named if (code := plugin_digest(table, name))}
    return {"plugins": result} if result else {}


def _plugin_group(table: Table) -> str:
    return next((group for group, item in TABLES.items() if item is table), "")


# --------------------------------------------------------------------------- commands

PANELS = ("Start", "Train and evaluate", "Serve", "Data", "Advanced")
"""The headings of ``llmrec --help``, in order."""

COMMANDS = with_extension_entries(
    "COMMANDS",
    {
        "doctor": Command(
            "llmrec.cli.doctor:doctor", "Start", "Check the installation, hardware, model access and data."
        ),
        "check": Command("llmrec.cli.check:check", "Train and evaluate", "Validate a recipe, its data and its model."),
        "run": Command(
            "llmrec.cli.run:run",
            "Train and evaluate",
            "Run a recipe: prepare data, train, evaluate, report.",
            resumes=True,
        ),
        "train": Command(
            "llmrec.cli.train:train",
            "Train and evaluate",
            "Fine-tune the model of a recipe without evaluating it.",
            resumes=True,
        ),
        "eval": Command(
            "llmrec.cli.eval:evaluate",
            "Train and evaluate",
            "Evaluate a recipe without training, or run a suite.",
            resumes=True,
        ),
        "report": Command(
            "llmrec.cli.report:report", "Train and evaluate", "Rebuild the report of a run from its results."
        ),
        "audit": Command("llmrec.cli.audit:audit", "Train and evaluate", "Check a run for data leakage."),
        "score": Command(
            "llmrec.cli.score:score_files", "Train and evaluate", "Compute ranking metrics for lists of any system."
        ),
        "rank": Command(
            "llmrec.cli.rank:rank", "Serve", "Rank items for a file of requests, or for every user.", resumes=True
        ),
        "predict": Command(
            "llmrec.cli.predict:predict", "Serve", "Predict ratings, clicks or texts for a file of items.", resumes=True
        ),
        "export": Command(
            "llmrec.cli.export:export", "Serve", "Export a fine-tuned model with a model card.", resumes=True
        ),
        "data": Command("llmrec.cli.data:data", "Data", "Print statistics of a recipe's data and its split."),
        "prompts": Command(
            "llmrec.cli.prompts:prompts", "Data", "Show the prompt templates and rendered prompts of a recipe."
        ),
        "index": Command("llmrec.cli.index:index", "Data", "Build the item IDs of a recipe and show examples."),
        "augment": Command(
            "llmrec.cli.augment:augment",
            "Data",
            "Generate texts of users and items with a language model.",
            resumes=True,
        ),
        "features": Command(
            "llmrec.cli.features:COMMANDS", "Data", "Manage feature stores: texts and their embeddings."
        ),
        "fuse": Command(
            "llmrec.cli.fuse:fuse", "Advanced", "Build ensembles from the models of finished runs.", resumes=True
        ),
        "tune-encoder": Command(
            "llmrec.cli.tune_encoder:tune_encoder",
            "Advanced",
            "Fine-tune a text encoder on a recipe's interactions.",
        ),
        "schema": Command(
            "llmrec.cli.schema:schema", "Advanced", "Write the JSON schema of recipes or suites for editors."
        ),
    },
)

FUNCTIONS: Mapping[str, str] = with_extension_entries("FUNCTIONS", {})
"""Public Python functions of extensions, by name."""

HOOKS: Mapping[str, str] = with_extension_entries("HOOKS", {})
"""Functions of extensions that commands of the core call, by name."""

# Error messages if an extension with a hook is missing.
_HOOK_FEATURES = {
    "run-page": "suites and benchmarks",
    "check-page": "suites and benchmarks",
    "shards": "--shard and --ray",
    "rank-on-ray": "--ray",
    "recipe-on-ray": "--ray",
}


def import_attribute(target: str) -> Any:
    """Import the attribute named by ``module:attribute``."""
    module, name = target.split(":")
    return getattr(import_module(module), name)


def extension_hook(name: str) -> Any:
    """Import a function of an extension for a command of the core.

    Raises:
        LlmrecError: If no extension has it.
    """
    if name not in HOOKS:
        raise LlmrecError(f"this installation of llmrec does not support {_HOOK_FEATURES[name]}", kind="unsupported")
    return import_attribute(HOOKS[name])


def component_address(table: Table, name: str) -> str:
    """Return the ``module:attribute`` address of a built-in component."""
    entry = table[name]
    return entry if isinstance(entry, str) else entry.address


def components_for_family(
    table: Mapping[str, BaselineEntry] | Mapping[str, StrategyEntry], family: str
) -> tuple[str, ...]:
    """Return the names of components that support a task, in the order of the table."""
    return tuple(name for name, entry in table.items() if family in entry.families)


# --------------------------------------------------------------------------- metrics


def find_metric(name: str) -> MetricEntry | None:
    """Return the entry of a metric by its full name, such as ``NDCG@10``; None if unknown."""
    base, at, k = name.partition("@")
    entry = METRICS.get(base)
    if entry is None or (at and not (k.isascii() and k.isdecimal() and k[0] != "0")):
        return None
    return entry if entry.both or entry.cut == bool(at) else None


def metric_modules() -> tuple[str, ...]:
    """Return the modules of all metrics, for fingerprints of results."""
    addresses = [item for entry in METRICS.values() for item in (entry.function, entry.several) if item]
    return tuple(sorted({address.partition(":")[0] for address in addresses}))


def is_lower_better(metric: str) -> bool:
    """Whether lower values of a metric are better."""
    entry = find_metric(metric)
    return entry is not None and entry.lower


def metric_direction(metric: str) -> MetricDirection:
    """Return ``higher`` or ``lower``: which values of a metric are better."""
    return "lower" if is_lower_better(metric) else "higher"


def compared_metrics(kind: MetricKind) -> tuple[str, ...]:
    """Return the metrics by which models with a type of answer are compared, without cut-offs."""
    return tuple(name for name, entry in METRICS.items() if entry.kind == kind and entry.compared)


def mean_metric(metric: str) -> str:
    """Return a metric that is a mean over requests: the given metric, or a similar one."""
    entry = find_metric(metric)
    if entry is None or entry.unit == "request":
        return metric
    return next(name for name in compared_metrics(entry.kind) if METRICS[name].unit == "request")


# --------------------------------------------------------------------------- tasks


def import_family(name: str) -> Any:
    """Import and register a task by its family name or its name in a recipe.

    Raises:
        RecipeError: See `import_component`; also if a plug-in has the name of another family.
    """
    if name in TASKS:
        return import_component(TASKS, name, "task")
    written = _PLUGIN_TASK_NAMES.get(name, name)
    result = import_component(TASKS, written, "task")
    other = result.name if result.name in TASKS else _PLUGIN_TASK_NAMES.setdefault(result.name, written)
    if other != written:
        raise RecipeError(
            f"the task families {written!r} and {other!r} have the same name, {result.name!r}; rename one of them",
            kind="duplicate",
        )
    return result


def is_family(name: str) -> bool:
    """Whether a task with this family name is built in, installed, or defined by a recipe."""
    return name in TASKS or name in _PLUGIN_TASK_NAMES or name in plugins.installed_plugins("tasks")


def task_name_in_recipes(family: str) -> str:
    """Return the name of a task in recipes."""
    return _PLUGIN_TASK_NAMES.get(family, family)


def family_names() -> tuple[str, ...]:
    """Return the family names of all tasks, built-in tasks first."""
    return (*TASKS, *(name for name in _PLUGIN_TASK_NAMES if name not in TASKS))


# --------------------------------------------------------------------------- strategies


def strategy_eval_options(strategy: str, section: object) -> dict[str, Json]:
    """Return the options of a strategy in the recipe section ``eval``, by name."""
    return {key: getattr(section, key) for key in strategy_eval_keys(strategy)}


def strategy_eval_keys(strategy: str) -> tuple[str, ...]:
    """Return the keys in the section ``eval`` that a strategy reads; plug-ins list them in ``keys``."""
    if is_plugin(STRATEGIES, strategy):
        return tuple(getattr(import_component(STRATEGIES, strategy, "strategy"), "keys", ()))
    return STRATEGIES[strategy].keys if strategy in STRATEGIES else ()


def is_positional(strategy: str) -> bool:
    """Whether a strategy depends on the order of candidates; plug-ins say so in ``positional``."""
    if is_plugin(STRATEGIES, strategy):
        return bool(getattr(import_component(STRATEGIES, strategy, "strategy"), "positional", False))
    return strategy in STRATEGIES and STRATEGIES[strategy].positional
