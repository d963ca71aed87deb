"""Name tables: what a recipe may say, and the attribute that answers to it.

Values are ``module:attribute``, imported when first used. Beside these names a recipe may say those of
`llmrec.plugins`: an installed entry point, or ``module:attribute`` itself.

The tables list the core. A package with a module ``entries`` is an extension and adds the tables of that module to
those of the same name here (`extended`), so deleting its folder removes its names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from llmrec import plugins
from llmrec.command import Command
from llmrec.durable import Json
from llmrec.errors import LlmrecError, RecipeError, did_you_mean

_Entry = TypeVar("_Entry")


@cache
def _extensions() -> tuple[ModuleType, ...]:
    root = Path(__file__).parent
    files = sorted([*root.glob("*/entries.py"), *root.glob("systems/*/entries.py")])
    return tuple(import_module(".".join((root.name, *file.relative_to(root).with_suffix("").parts))) for file in files)


def extended(table: str, core: Mapping[str, _Entry]) -> Mapping[str, _Entry]:
    """Return a table of the core with the entries that extensions have in their tables of the same name."""
    entries = dict(core)
    for module in _extensions():
        entries.update(getattr(module, table, {}))
    return entries


# Pages of published data sets, by name: a file more is a source more.
SETS: Mapping[str, Path] = {
    page.stem: page for page in sorted((Path(__file__).parent / "data" / "sets").glob("*.yaml"))
}

SOURCES: Mapping[str, str] = {
    **dict.fromkeys(SETS, "llmrec.data.sets.published:published"),
    "mind": "llmrec.data.sets.mind:mind",
    "sequences": "llmrec.data.sets.sequences:sequences",
    "samples": "llmrec.data.sets.samples:samples",
    "made-reviews": "llmrec.data.sets.table:made_reviews",
    "amazon-reviews": "llmrec.data.sets.reviews:amazon_reviews",
    "explanations": "llmrec.data.sets.table:explanations",
    "table": "llmrec.data.sets.table:table",
}

INDEXES: Mapping[str, str] = {
    "title": "llmrec.index.titles:Titles",
    "random": "llmrec.index.numbers:RandomNumbers",
    "sequential": "llmrec.index.numbers:SequentialNumbers",
    "token": "llmrec.index.numbers:OwnTokens",
    "collaborative": "llmrec.index.collaborative:Collaborative",
    "semantic": "llmrec.index.semantic:Semantic",
    "category": "llmrec.index.category:Category",
    "external": "llmrec.index.external:External",
}

# Each is a `llmrec.tasks.family.Family`, in the order of tables.
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

STRATEGIES = extended(
    "STRATEGIES",
    {
        "likelihood": "llmrec.strategies.pointwise:LikelihoodRanker",
        "likelihood-prior": "llmrec.strategies.pointwise:PriorRanker",
        "search": "llmrec.strategies.catalogue:CatalogueRanker",
        "label": "llmrec.strategies.listwise:label_ranker",
        "list": "llmrec.strategies.listwise:ListRanker",
        "permutation": "llmrec.strategies.listwise:permutation_ranker",
        "window": "llmrec.strategies.windows:window_ranker",
        "pairwise": "llmrec.strategies.pairs:pairwise_ranker",
        "setwise": "llmrec.strategies.sets:setwise_ranker",
        "pointwise-yes": "llmrec.strategies.pointwise:YesRanker",
        "two-step": "llmrec.strategies.profiled:TwoStepRanker",
        "expected": "llmrec.strategies.raters:ExpectedRater",
        "parsed": "llmrec.strategies.raters:ParsedRater",
        "head": "llmrec.strategies.raters:HeadRater",
        "text": "llmrec.strategies.raters:Writer",
        "yes-no": "llmrec.strategies.raters:YesNoJudge",
        "parsed-yes-no": "llmrec.strategies.raters:ParsedYesNoJudge",
    },
)

BASELINES = extended(
    "BASELINES",
    {
        "random": "llmrec.baselines.popular:Random",
        "popularity": "llmrec.baselines.popular:Popularity",
        "recent-popularity": "llmrec.baselines.popular:RecentPopularity",
        "item-knn": "llmrec.baselines.knn:ItemKNN",
        "rp3beta": "llmrec.baselines.knn:RP3Beta",
        "markov": "llmrec.baselines.markov:Markov",
        "markov-1": "llmrec.baselines.markov:FirstOrder",
        "markov-cooccurrence": "llmrec.baselines.markov:MarkovCooccurrence",
        "transitions": "llmrec.baselines.transitions:Transitions",
        "transitions-text": "llmrec.baselines.transitions:TransitionsText",
        "transitions-tuned": "llmrec.baselines.towers.pairs:TransitionsTuned",
        "content": "llmrec.baselines.content:Content",
        "ease": "llmrec.baselines.ease:EASE",
        "als": "llmrec.baselines.factors:ALS",
        "bpr": "llmrec.baselines.factors:BPR",
        "gru4rec": "llmrec.baselines.gru4rec:GRU4Rec",
        "sasrec": "llmrec.baselines.sasrec:SASRec",
        "tower": "llmrec.baselines.towers.tower:Tower",
        "tuned-tower": "llmrec.baselines.towers.tower:TunedTower",
        "state-tower": "llmrec.baselines.towers.states:StateTower",
        "text-matcher": "llmrec.baselines.towers.matcher:TextMatcher",
        "global-mean": "llmrec.baselines.rating:GlobalMean",
        "user-mean": "llmrec.baselines.rating:UserMean",
        "item-mean": "llmrec.baselines.rating:ItemMean",
        "user-item-bias": "llmrec.baselines.rating:UserItemBias",
        "mf": "llmrec.baselines.mf:MF",
        "svd": "llmrec.baselines.mf:SVD",
        "like-ratio": "llmrec.baselines.yes_no:LikeRatio",
        "logistic": "llmrec.baselines.yes_no:Logistic",
        "din": "llmrec.baselines.ctr.din:DIN",
        "deepfm": "llmrec.baselines.ctr.deepfm:DeepFM",
        "dcn": "llmrec.baselines.ctr.dcn:DCN",
        "autoint": "llmrec.baselines.ctr.autoint:AutoInt",
        "late-interaction": "llmrec.baselines.late:LateInteraction",
        "frequent-text": "llmrec.baselines.text:FrequentText",
        "nearest-text": "llmrec.baselines.text:NearestText",
        "first-sentence": "llmrec.baselines.text:FirstSentence",
        "text-ridge": "llmrec.baselines.text:TextRidge",
    },
)

# The keys of the recipe's eval section that a strategy is handed, as keyword arguments of the same names.
STRATEGY_KEYS: Mapping[str, tuple[str, ...]] = {
    "search": ("beams", "exact"),
    "likelihood-prior": ("prior_weight",),
    "label": ("permutations",),
    "permutation": ("permutations", "depth"),
    "window": ("permutations", "window", "window_step"),
    "pairwise": ("depth", "all_pairs"),
    "setwise": ("permutations", "depth", "set_size"),
    "two-step": ("permutations",),
}
# Those whose answer depends on where a candidate stands; `eval.debias` is for them.
POSITIONAL = ("label", "permutation", "window", "setwise")


TABLES: Mapping[str, Mapping[str, str]] = {
    "baselines": BASELINES,
    "strategies": STRATEGIES,
    "tasks": TASKS,
    "indexes": INDEXES,
    "sources": SOURCES,
    "backends": BACKENDS,
}
"""By kind of plug-in; see `llmrec.plugins.KINDS`."""

# Families that are plug-ins, by their own names: what recipes write for them.
_FURTHER: dict[str, str] = {}


def lookup(table: Mapping[str, str], name: str, what: str, *, key: str | None = None) -> Any:
    """Import what a name stands for: a built-in one of a table, or a plug-in of its kind; ``key`` is where it stands.

    Raises:
        RecipeError: If there is none of that name, with the closest one; or as `llmrec.plugins.find`.
    """
    if name in table:
        return attribute(table[name])
    group = _group(table)
    found = plugins.find(group, name) if group else None
    if found is None:
        known = sorted({*table, *(plugins.installed(group) if group else ())})
        raise RecipeError(
            f"unknown {what} {name[:80]!r}{did_you_mean(name, known)}; known: {', '.join(known)}",
            kind="unknown-name",
            column=key or what,
        )
    return found


def is_plugin(table: Mapping[str, str], name: str) -> bool:
    """Whether a name is of the form of a plug-in's, or an installed one of the table's kind."""
    return name not in table and (plugins.is_address(name) or name in plugins.installed(_group(table)))


def stamp(table: Mapping[str, str], name: str) -> str:
    """Return a hash of a plug-in's code; empty for a built-in name, whose code goes by the version of llmrec."""
    return plugins.stamp(_group(table), name) if is_plugin(table, name) else ""


def stamps(named: Iterable[tuple[Mapping[str, str], str]]) -> dict[str, dict[str, str]]:
    """Return the hashes of those of some names that are plug-ins, for the key of what they make; empty without any."""
    found = {name: code for table, name in named if (code := stamp(table, name))}
    return {"plugins": found} if found else {}


def _group(table: Mapping[str, str]) -> str:
    return next((group for group, each in TABLES.items() if each is table), "")


# --------------------------------------------------------------------------- commands

PANELS = ("Start", "Train and evaluate", "Serve", "Data", "Advanced")
"""The headings of ``llmrec --help``, in order."""

COMMANDS = extended(
    "COMMANDS",
    {
        "doctor": Command("llmrec.cli.doctor:doctor", "Start", "Check versions, hardware, model and data."),
        "check": Command(
            "llmrec.cli.check:check", "Train and evaluate", "Check a recipe, its data and its model without weights."
        ),
        "run": Command(
            "llmrec.cli.run:run",
            "Train and evaluate",
            "Run a recipe end to end: data, training, evaluation, report.",
            resumes=True,
        ),
        "train": Command(
            "llmrec.cli.train:train",
            "Train and evaluate",
            "Train and merge only; `run` and `eval` reuse the result.",
            resumes=True,
        ),
        "eval": Command(
            "llmrec.cli.eval:evaluate",
            "Train and evaluate",
            "Evaluate a recipe without training, or run a suite.",
            resumes=True,
        ),
        "report": Command(
            "llmrec.cli.report:report", "Train and evaluate", "Write the report of a run again from its results."
        ),
        "audit": Command(
            "llmrec.cli.audit:audit", "Train and evaluate", "Look for held-out data where it must not be."
        ),
        "score": Command("llmrec.cli.score:score_files", "Train and evaluate", "Measure ranked lists of any system."),
        "rank": Command(
            "llmrec.cli.rank:rank", "Serve", "Rank items for a file of requests, or for every user.", resumes=True
        ),
        "predict": Command(
            "llmrec.cli.predict:predict", "Serve", "Answer a file of questions about one item each.", resumes=True
        ),
        "export": Command(
            "llmrec.cli.export:export", "Serve", "Write a tuned model as a folder that stands alone.", resumes=True
        ),
        "data": Command("llmrec.cli.data:data", "Data", "Print statistics of a recipe's data and its split."),
        "prompts": Command("llmrec.cli.prompts:prompts", "Data", "Show the prompts of a recipe as a model reads them."),
        "index": Command("llmrec.cli.index:index", "Data", "Build a recipe's item index and show its codes."),
        "augment": Command(
            "llmrec.cli.augment:augment", "Data", "Have a language model write texts of users and items.", resumes=True
        ),
        "features": Command(
            "llmrec.cli.features:COMMANDS", "Data", "Manage stores of texts that a language model wrote."
        ),
        "fuse": Command(
            "llmrec.cli.fuse:fuse", "Advanced", "Combine the rows of finished runs into ensembles.", resumes=True
        ),
        "tune-encoder": Command(
            "llmrec.cli.tune_encoder:tune_encoder",
            "Advanced",
            "Fine-tune a text encoder on a recipe's interactions.",
        ),
        "schema": Command("llmrec.cli.schema:schema", "Advanced", "Write the JSON schema of recipes or of suites."),
    },
)

FUNCTIONS: Mapping[str, str] = extended("FUNCTIONS", {})
"""Functions of extensions that the package offers to Python, by name."""

HOOKS: Mapping[str, str] = extended("HOOKS", {})
"""What commands of the core call of extensions, by name."""

# What is said where the extension of a hook is not there.
_OF_EXTENSIONS = {
    "run-page": "suites and benchmarks",
    "check-page": "suites and benchmarks",
    "shards": "--shard and --ray",
    "rank-on-ray": "--ray",
    "recipe-on-ray": "--ray",
}


def attribute(target: str) -> Any:
    """Import ``module:attribute``."""
    module, name = target.split(":")
    return getattr(import_module(module), name)


def hook(name: str) -> Any:
    """Import what an extension does for a command of the core.

    Raises:
        LlmrecError: If no extension does it.
    """
    if name not in HOOKS:
        raise LlmrecError(f"this installation of llmrec lacks what {_OF_EXTENSIONS[name]} need", kind="unsupported")
    return attribute(HOOKS[name])


# --------------------------------------------------------------------------- families


def open_family(name: str) -> Any:
    """Import the record of a family, by its own name or what a recipe writes; from then on it goes by its own.

    Raises:
        RecipeError: As `lookup`; or if a plug-in has the name of another family.
    """
    if name in TASKS:
        return lookup(TASKS, name, "task")
    written = _FURTHER.get(name, name)
    found = lookup(TASKS, written, "task")
    other = found.name if found.name in TASKS else _FURTHER.setdefault(found.name, written)
    if other != written:
        raise RecipeError(
            f"the task family {written!r} calls itself {found.name!r}, as {other!r} does; give its Family another name",
            kind="duplicate",
        )
    return found


def is_family(name: str) -> bool:
    """Whether a family is known by this name: a built-in or installed one, or one that a recipe of this process has."""
    return name in TASKS or name in _FURTHER or name in plugins.installed("tasks")


def written(family: str) -> str:
    """Return what recipes write for a family."""
    return _FURTHER.get(family, family)


def family_names() -> tuple[str, ...]:
    """Return the names of all families that recipes of this process may have, built-in ones first."""
    return (*TASKS, *(name for name in _FURTHER if name not in TASKS))


# --------------------------------------------------------------------------- strategies


def options_of(strategy: str, section: object) -> dict[str, Json]:
    """Return what a strategy is handed of an eval section, by name."""
    return {key: getattr(section, key) for key in keys_of(strategy)}


def keys_of(strategy: str) -> tuple[str, ...]:
    """Return the keys of the eval section that a strategy takes; a plug-in has them in its attribute ``keys``."""
    if is_plugin(STRATEGIES, strategy):
        return tuple(getattr(lookup(STRATEGIES, strategy, "strategy"), "keys", ()))
    return STRATEGY_KEYS.get(strategy, ())


def is_positional(strategy: str) -> bool:
    """Whether a strategy's answer depends on where a candidate stands; a plug-in says so in ``positional``."""
    if is_plugin(STRATEGIES, strategy):
        return bool(getattr(lookup(STRATEGIES, strategy, "strategy"), "positional", False))
    return strategy in POSITIONAL
