"""Name tables: what a recipe may say, and the attribute that answers to it.

A plug-in is one more entry here. Values are ``module:attribute``, imported when first used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from llmrec.errors import RecipeError, did_you_mean

SOURCES: Mapping[str, str] = {
    "movielens-100k": "llmrec.data.sources.table:movielens_100k",
    "movielens-small": "llmrec.data.sources.table:movielens_small",
    "movielens-1m": "llmrec.data.sources.published:movielens_1m",
    "movielens-10m": "llmrec.data.sources.published:movielens_10m",
    "movielens-20m": "llmrec.data.sources.published:movielens_20m",
    "movielens-25m": "llmrec.data.sources.published:movielens_25m",
    "movielens-32m": "llmrec.data.sources.published:movielens_32m",
    "movielens-latest": "llmrec.data.sources.published:movielens_latest",
    "amazon-2014": "llmrec.data.sources.amazon:amazon_2014",
    "amazon-2018": "llmrec.data.sources.amazon:amazon_2018",
    "amazon-2023": "llmrec.data.sources.amazon:amazon_2023",
    "steam": "llmrec.data.sources.published:steam",
    "yelp": "llmrec.data.sources.published:yelp",
    "goodreads": "llmrec.data.sources.published:goodreads",
    "lastfm-2k": "llmrec.data.sources.published:lastfm_2k",
    "lastfm-1k": "llmrec.data.sources.published:lastfm_1k",
    "mind": "llmrec.data.sources.mind:mind",
    "sequences": "llmrec.data.sources.sequences:sequences",
    "samples": "llmrec.data.sources.samples:samples",
    "made-reviews": "llmrec.data.sources.made:made_reviews",
    "amazon-reviews": "llmrec.data.sources.reviews:amazon_reviews",
    "explanations": "llmrec.data.sources.table:explanations",
    "table": "llmrec.data.sources.table:table",
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

TASKS: Mapping[str, str] = {
    "rating": "llmrec.tasks.rating:RatingTask",
    "sequential": "llmrec.tasks.sequential:SequentialTask",
    "direct": "llmrec.tasks.direct:DirectTask",
    "explanation": "llmrec.tasks.explanation:ExplanationTask",
    "alignment": "llmrec.tasks.alignment:AlignmentTask",
    "ctr": "llmrec.tasks.ctr:CtrTask",
    "review": "llmrec.tasks.review:ReviewTask",
    "stars": "llmrec.tasks.review:ReviewTask",
}

BACKENDS: Mapping[str, str] = {
    "vllm": "llmrec.backends.vllm.backend:VLLMBackend",
    "hf": "llmrec.backends.hf.backend:HFBackend",
    "openai": "llmrec.backends.server.backend:OpenAIBackend",
    "fake": "llmrec.backends.fake:FakeBackend",
}

STRATEGIES: Mapping[str, str] = {
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
}

BASELINES: Mapping[str, str] = {
    "random": "llmrec.baselines.popular:Random",
    "popularity": "llmrec.baselines.popular:Popularity",
    "recent-popularity": "llmrec.baselines.popular:RecentPopularity",
    "item-knn": "llmrec.baselines.knn:ItemKNN",
    "markov": "llmrec.baselines.markov:Markov",
    "markov-1": "llmrec.baselines.markov:FirstOrder",
    "markov-cooccurrence": "llmrec.baselines.markov:MarkovCooccurrence",
    "ease": "llmrec.baselines.ease:EASE",
    "als": "llmrec.baselines.factors:ALS",
    "bpr": "llmrec.baselines.factors:BPR",
    "gru4rec": "llmrec.baselines.gru4rec:GRU4Rec",
    "sasrec": "llmrec.baselines.sasrec:SASRec",
    "global-mean": "llmrec.baselines.rating:GlobalMean",
    "user-mean": "llmrec.baselines.rating:UserMean",
    "item-mean": "llmrec.baselines.rating:ItemMean",
    "user-item-bias": "llmrec.baselines.rating:UserItemBias",
    "mf": "llmrec.baselines.mf:MF",
    "svd": "llmrec.baselines.mf:SVD",
    "like-ratio": "llmrec.baselines.yes_no:LikeRatio",
    "logistic": "llmrec.baselines.yes_no:Logistic",
    "frequent-text": "llmrec.baselines.text:FrequentText",
    "nearest-text": "llmrec.baselines.text:NearestText",
}

# What answers which family; a pair outside these tables has no meaning.
FAMILY_STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "rating": ("expected", "parsed", "head"),
    "sequential": ("likelihood", "likelihood-prior", "search"),
    "direct": (
        *("label", "list", "permutation", "window", "pairwise", "setwise", "pointwise-yes", "two-step"),
        "likelihood",
    ),
    "explanation": ("text",),
    "alignment": ("likelihood",),
    "ctr": ("yes-no", "parsed-yes-no"),
    "review": ("text",),
    "stars": ("expected", "parsed"),
}
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
_RANKERS = (
    *("random", "popularity", "recent-popularity", "item-knn", "markov-1", "markov", "markov-cooccurrence"),
    *("ease", "als", "bpr", "gru4rec", "sasrec"),
)
FAMILY_BASELINES: Mapping[str, tuple[str, ...]] = {
    "rating": ("global-mean", "user-mean", "item-mean", "user-item-bias", "mf", "svd"),
    "sequential": _RANKERS,
    "direct": _RANKERS,
    "explanation": ("frequent-text", "nearest-text"),
    "alignment": ("random",),
    "ctr": ("like-ratio", "logistic"),
    "review": ("frequent-text", "nearest-text"),
    "stars": ("global-mean", "user-mean", "item-mean", "user-item-bias", "mf", "svd"),
}
# What every table of a family must hold beside a language model: each takes seconds, and without them a figure means
# nothing. Stronger ones (EASE, SASRec) are in the suites and can be named in any recipe.
CONTROLS: Mapping[str, tuple[str, ...]] = {
    "rating": ("global-mean", "user-mean", "item-mean", "user-item-bias"),
    "sequential": ("random", "popularity", "item-knn", "markov-1"),
    "direct": ("random", "popularity", "item-knn", "markov-1"),
    "explanation": ("frequent-text",),
    "alignment": ("random",),
    "ctr": ("like-ratio",),
    "review": ("frequent-text",),
    "stars": ("global-mean", "user-mean", "item-mean", "user-item-bias"),
}


def lookup(table: Mapping[str, str], name: str, what: str) -> Any:
    """Import what a name stands for.

    Raises:
        RecipeError: If the table has no such name; the message suggests the closest one.
    """
    if name not in table:
        raise RecipeError(f"unknown {what} {name!r}{did_you_mean(name, table)}; known: {', '.join(sorted(table))}")
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)


def options_of(strategy: str, section: object) -> dict[str, Any]:
    """Return what a strategy is handed of an eval section, by name."""
    return {key: getattr(section, key) for key in STRATEGY_KEYS.get(strategy, ())}


def check_names(family: str, strategies: Sequence[str], baselines: Sequence[str]) -> None:
    """Check that a family's strategies and baselines exist and answer that family, and that no control is missing.

    Raises:
        RecipeError: If one does not, or a control is missing; the message lists those that do, or are.
    """
    for kind, names, known, table in (
        ("strategies", strategies, FAMILY_STRATEGIES[family], STRATEGIES),
        ("baselines", baselines, FAMILY_BASELINES[family], BASELINES),
    ):
        for name in names:
            if name in known:
                continue
            why = "does not answer this family" if name in table else f"is unknown{did_you_mean(name, known)}"
            raise RecipeError(f"tasks.{family}.{kind}: {name!r} {why}; choose from {', '.join(known)}")
    lacking = missing_controls(family, baselines)
    if lacking:
        raise RecipeError(
            f"tasks.{family}.baselines: the controls {', '.join(lacking)} must stand in the same table, or its figures "
            "mean nothing; add them, or leave the key out for the default"
        )


def missing_controls(family: str, baselines: Sequence[str]) -> list[str]:
    """Return the compulsory controls of a family that are not among its baselines."""
    return [name for name in CONTROLS[family] if name not in baselines]
