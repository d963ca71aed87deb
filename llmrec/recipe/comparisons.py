"""Settings of benchmarks: suites of models under one protocol, benchmarks of recipes, suites of conversations.

Like recipes they are YAML files, frozen and closed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmrec.recipe.schema import DataSection, Name, Positive, Resamples, Section, Seed, Value


class SuiteRow(Section):
    """A model of a suite: a baseline, the fine-tuned model of a recipe, or an ensemble of earlier models."""

    baseline: str | None = Field(None, description="Name of a baseline.")
    parameters: dict[str, Value] = Field(default={}, description="Fixed parameters of the baseline.")
    tune: bool = Field(True, description="Search the baseline's hyperparameter grid on the validation split.")
    grid: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(
        default={}, description="Grid of parameter values to search. Empty: the default grid of the baseline."
    )
    recipe: str | None = Field(
        None, description="Recipe of a model, trained on the suite's data, that ranks the catalogue."
    )
    overrides: tuple[str, ...] = Field((), description="With `recipe`: overridden keys, such as `index.scheme=random`.")
    depth: Positive = Field(
        100, description="With `recipe`: number of ranked items per request. All other items share the next rank."
    )
    fuse: tuple[str, ...] = Field(
        (),
        description="Ensemble of models listed earlier in the suite, with weights fitted on reserved validation users.",
    )
    ranker: bool = Field(True, description="With `fuse`: also try a learned ranker for the ensemble.")
    name: str = Field("", description="Name in tables. Empty: the name of the baseline, recipe or members.")
    seeds: Positive | None = Field(
        None, description="Number of the suite's seeds to use, for models that are slow to train. Unset: all."
    )

    @model_validator(mode="after")
    def _check_kind(self) -> SuiteRow:
        kinds = [name for name in ("baseline", "recipe", "fuse") if getattr(self, name)]
        if len(kinds) != 1:
            raise ValueError(f"rows: each row needs one of baseline, recipe and fuse; this one has {kinds or 'none'}")
        if len(self.fuse) == 1:
            raise ValueError(f"rows: an ensemble has at least two members, but this one has only {self.fuse[0]}")
        if repeated := sorted(set(self.grid) & set(self.parameters)):
            raise ValueError(f"rows: {repeated[0]} is set in both parameters and grid; keep one of them")
        if self.grid and not (self.baseline and self.tune):
            raise ValueError("rows: a grid requires a baseline with tune: true; drop the grid")
        return self

    @property
    def label(self) -> str:
        """Name of the model in tables and files."""
        stem = (self.recipe or "").rpartition("/")[2].removesuffix(".yaml")
        return self.name or self.baseline or stem or "+".join(self.fuse)


class DiversitySection(Section):
    """Item similarity for intra-list diversity: words of a field, or text embeddings."""

    field: str | None = Field(None, description="Item field whose words are compared, such as genres.")
    encoder: str | None = Field(None, description="Text encoder of titles and fields, such as `all-MiniLM-L6-v2`.")

    @model_validator(mode="after")
    def _check_source(self) -> DiversitySection:
        if (self.field is None) == (self.encoder is None):
            raise ValueError("diversity: set either field or encoder")
        return self


class PartialPair(Section):
    """A comparison on a part of the requests."""

    rows: tuple[str, str] = Field(description="The two models; the difference is first minus second.")
    items: Literal["cold", "warm"] = Field(
        description="`cold`: requests whose target has no training interaction; `warm`: all others."
    )


AnyPair = tuple[str, str] | PartialPair


class Suite(Section):
    """Models evaluated with one protocol on one data set."""

    task: Literal["ranking", "rating", "ctr"] = Field(
        "ranking", description="Ranking of the catalogue, rating prediction, or like (yes/no) prediction."
    )
    suite: Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the suite.")
    description: str = Field("", description="Description for the results page.")
    plugins: str | None = Field(None, description="Folder with modules of plug-ins, see docs/extend.md.")
    data: DataSection = Field(description="Data, as in a recipe.")
    split: Literal["valid", "test"] = Field("test", description="Evaluated split.")
    seen: tuple[Literal["excluded", "included"], ...] = Field(
        ("excluded", "included"),
        min_length=1,
        description="Whether history items can be recommended. The first value defines the main result.",
    )
    cutoffs: tuple[Positive, ...] = Field((5, 10), min_length=1, description="Cut-offs k of the metrics.")
    liked: float | None = Field(
        None,
        description="`ctr`: lowest rating that counts as a yes. Unset: the value at three quarters of the rating "
        "scale.",
    )
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="Random seeds of stochastic models.")
    split_seeds: tuple[Seed, ...] = Field(
        (0,),
        min_length=1,
        description="Random seeds of the split (order of equal timestamps). With several seeds, results are ranges.",
    )
    diversity: DiversitySection | None = Field(
        None, description="`ranking`: item similarity for intra-list diversity (ILD). Unset: no ILD."
    )
    bootstrap: Resamples = Field(2000, description="Number of bootstrap resamples.")
    users: Positive | None = Field(None, description="Number of evaluated users. Unset: all.")
    reserved: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of validation users for fitting ensemble weights; the others are for selecting "
        "hyperparameters and epochs.",
    )
    min_history: int = Field(0, ge=0, description="Minimum history length of evaluated requests.")
    rows: tuple[SuiteRow, ...] = Field(min_length=1, description="Models to compare.")
    pairs: tuple[AnyPair, ...] = Field(
        (),
        description="Planned comparisons with significance tests: is the first model better? `{rows: [A, B], items: "
        "cold}` compares on cold-start items only.",
    )
    explored: tuple[AnyPair, ...] = Field(
        (), description="Comparisons chosen after seeing test results; reported without a significance test."
    )
    skip: tuple[str, ...] = Field((), description="Models to skip. Ensembles that contain them are skipped too.")
    references: tuple[str, ...] = Field(
        (), description="Names of files in eval/references with published results to print."
    )

    @property
    def skipped(self) -> tuple[str, ...]:
        """Models to skip: those in ``skip``, and ensembles that contain one of them."""
        results: list[str] = []
        for row in self.rows:
            if row.label in self.skip or any(part in results for part in row.fuse):
                results.append(row.label)
        return tuple(results)

    def seeds_of(self, row: SuiteRow) -> tuple[int, ...]:
        """Return the seeds of a stochastic model; an ensemble has the seeds of its members."""
        counts = [item.seeds for item in (row, *(other for other in self.rows if other.label in row.fuse))]
        return self.seeds[: min((many for many in counts if many is not None), default=None)]

    @model_validator(mode="after")
    def _check_rows(self) -> Suite:
        known: set[str] = set()
        for row in self.rows:
            if self.task != "ranking" and row.recipe:
                raise ValueError(f"rows: {row.label} ranks the catalogue; use task: ranking, not {self.task}")
            for part in row.fuse:
                if part not in known:
                    raise ValueError(f"rows: {row.label} has the member {part!r}, but no earlier model has this name")
            if row.label in known:
                raise ValueError(f"rows: two models are called {row.label!r}; rename one")
            known.add(row.label)
        if (missing := next((name for name in self.skip if name not in known), None)) is not None:
            raise ValueError(f"skip: there is no model {missing!r}; the models are {', '.join(sorted(known))}")
        if len(self.skipped) == len(self.rows):
            raise ValueError("skip: all models are skipped; skip fewer")
        for entry in (*self.pairs, *self.explored):
            pair = compared_names(entry)
            if pair is not entry and self.task != "ranking":
                raise ValueError(
                    f"pairs: the key items requires task: ranking, not {self.task}; write only the two names"
                )
            if (missing := next((name for name in pair if name not in known), None)) is not None:
                raise ValueError(f"pairs: there is no model {missing!r}; the models are {', '.join(sorted(known))}")
        return self


def compared_names(pair: AnyPair) -> tuple[str, str]:
    """Return the names of the two models of a comparison."""
    return pair.rows if isinstance(pair, PartialPair) else pair


class BenchmarkRun(Section):
    """Runs of one recipe: one for each combination of a grid and each seed."""

    name: Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", description="Name in tables.")
    recipe: str = Field("", description="Recipe. Empty: the recipe of the benchmark.")
    overrides: tuple[str, ...] = Field((), description="Overridden keys, such as `eval.arms=[zero-shot]`.")
    start: str = Field(
        "", description="Earlier run whose fine-tuned model with the same seed is trained further (`train.start`)."
    )
    teacher: str = Field(
        "", description="Earlier run whose fine-tuned model with the same seed is the teacher (`train.teacher.run`)."
    )
    grid: dict[str, tuple[Any, ...]] = Field(
        default={}, description="Lists of values for recipe keys. Every combination is a run."
    )
    seeds: tuple[int, ...] = Field((), description="Values of `train.seed` to average over. Empty: the recipe's seed.")


class Benchmark(Section):
    """Runs of recipes compared on the same cases, with their cost."""

    benchmark: Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the benchmark.")
    description: str = Field("", description="Description for the results page.")
    recipe: str = Field("", description="Default recipe for runs that name none.")
    overrides: tuple[str, ...] = Field((), description="Recipe keys overridden in every run.")
    runs: tuple[BenchmarkRun, ...] = Field(min_length=1, description="Runs to compare.")
    bootstrap: Resamples = Field(2000, description="Number of bootstrap resamples.")
    pairs: tuple[tuple[str, str], ...] = Field(
        (),
        description="Planned comparisons: pairs of model names as they appear in the results. Each tests whether "
        "the first model is better than the second.",
    )

    @model_validator(mode="after")
    def _check_runs(self) -> Benchmark:
        names = [run.name for run in self.runs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"runs: two runs are called {name!r}; rename one")
        above: dict[str, BenchmarkRun] = {}
        for run in self.runs:
            # Without seeds, a run uses the seed of the recipe.
            seeds: set[int | None] = set(run.seeds) or {None}
            for name, what in ((run.start, "starts from"), (run.teacher, "is distilled from")):
                first = above.get(name)
                if name and (first is None or first.grid or (first.seeds and not seeds <= set(first.seeds))):
                    raise ValueError(
                        f"runs: {run.name!r} {what} {name!r}, which must be an earlier run, without a grid and with "
                        "the same seeds"
                    )
            above[run.name] = run
            if not (run.recipe or self.recipe):
                raise ValueError(f"runs: {run.name!r} has no recipe, and neither has the benchmark; add a recipe")
            for key, values in run.grid.items():
                if not values:
                    raise ValueError(f"runs: grid of {run.name!r}: {key} has no values; add some, or drop the key")
        return self


class ChatRow(Section):
    """A system of a suite of conversations: the dialogue manager, the ranker and the simulated users."""

    manager: str = Field(
        min_length=1,
        description="Dialogue manager: `rules`; `history` (ignores messages); `random` (random valid calls); or a "
        "language model.",
    )
    ranker: str | None = Field(
        None,
        min_length=1,
        description="Language model that grades the top items. The two rankings are combined. Unset: only the "
        "recommender ranks.",
    )
    name: str = Field("", description="Name in tables. Empty: the names of manager and ranker.")
    users: Positive | None = Field(None, description="Number of the suite's users to use. Unset: all.")
    knows: tuple[str, ...] = Field((), description="Item fields that the simulated users know. Empty: all.")

    @property
    def label(self) -> str:
        """Name of the system in tables and files."""
        return self.name or (self.manager if self.ranker is None else f"{self.manager}, graded by {self.ranker}")


class ChatSuite(Section):
    """Conversations of simulated users with several dialogue managers. Experimental, see docs/experimental.md."""

    chat: Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the suite.")
    description: str = Field("", description="Description for the results page.")
    recipe: str = Field(description="Recipe with the data, the seed and settings of the recommender.")
    overrides: tuple[str, ...] = Field((), description="Overridden keys of the recipe.")
    recommender: str = Field("item-knn", description="Baseline that recommends, fitted on the training split.")
    items: str | None = Field(
        None, description="Item table with the fields used in conversations. Unset: the items in the recipe."
    )
    split: Literal["valid", "test"] = Field("test", description="Split with the target items of the simulated users.")
    users: Positive = Field(200, description="Number of users per seed.")
    seeds: tuple[Seed, ...] = Field(
        (0, 1, 2), min_length=1, description="Random seeds of user sampling and simulation."
    )
    turns: Positive = Field(5, description="Maximum number of turns per conversation.")
    # List length for managers that can choose it.
    k: int = Field(
        5,
        ge=5,
        le=50,
        description="Number of items per list of the managers `rules` and `history`. Other managers show at most five.",
    )
    past: int = Field(40, ge=0, le=90, description="Number of latest history items in the initial profile.")
    liked: float | None = Field(
        None,
        description="Lowest rating of a liked item. Unset: the value at three quarters of the scale; without ratings, "
        "all items are liked.",
    )
    bootstrap: Resamples = Field(2000, description="Number of bootstrap resamples.")
    rows: tuple[ChatRow, ...] = Field(min_length=1, description="Systems to compare.")
    pairs: tuple[tuple[str, str], ...] = Field(
        (), description="Planned comparisons: is the first system better than the second on their common users?"
    )

    @model_validator(mode="after")
    def _check_rows(self) -> ChatSuite:
        names = [row.label for row in self.rows]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"rows: two rows are called {repeated!r}; rename one")
        for pair in self.pairs:
            if (missing := next((name for name in pair if name not in names), None)) is not None:
                raise ValueError(f"pairs: there is no model {missing!r}; the models are {', '.join(names)}")
        return self
