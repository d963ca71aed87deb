"""Settings of comparisons: suites of predictors under one protocol, benchmarks of recipes, and suites of conversations.

Like recipes they are YAML files, frozen and closed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmrec.recipe.schema import DataSection, Name, Positive, Resamples, Section, Seed, Value


class SuiteRow(Section):
    """One row of a suite: a baseline, a fine-tuned language model of a recipe, or an ensemble of other rows."""

    baseline: str | None = None
    parameters: dict[str, Value] = Field(default={}, description="of the baseline; they stay as they are")
    tune: bool = Field(True, description="choose among the baseline's declared grid on validation")
    grid: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(
        default={}, description="values of the baseline's parameters to choose among, in place of its declared ones"
    )
    recipe: str | None = Field(None, description="a recipe page; its model is tuned on the suite's data and searched")
    overrides: tuple[str, ...] = Field((), description="recipe: changed keys, such as index.scheme=random")
    depth: Positive = Field(100, description="recipe: items that the search finds; the others tie behind them")
    fuse: tuple[str, ...] = Field(
        (), description="names of rows above, joined with weights from validation users that chose nothing else"
    )
    ranker: bool = Field(True, description="fuse: a learned ranker takes part in the choice of the form")
    name: str = Field("", description="empty: the baseline's or the recipe's name, or those of the members")
    seeds: Positive | None = Field(
        None, description="only the first so many of the suite's seeds, for what is slow to train; None: all of them"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> SuiteRow:
        kinds = [name for name in ("baseline", "recipe", "fuse") if getattr(self, name)]
        if len(kinds) != 1:
            raise ValueError(f"rows: each row has one of baseline, recipe and fuse; this one has {kinds or 'none'}")
        if len(self.fuse) == 1:
            raise ValueError(f"rows: a fusion joins two rows or more; this one has {self.fuse[0]} alone")
        if twice := sorted(set(self.grid) & set(self.parameters)):
            raise ValueError(
                f"rows: {twice[0]} stands under parameters, which stay as they are, and under grid; drop one"
            )
        if self.grid and not (self.baseline and self.tune):
            raise ValueError("rows: a grid belongs to a row with a baseline that is tuned; drop it")
        return self

    @property
    def label(self) -> str:
        """The name of the row in tables and files."""
        stem = (self.recipe or "").rpartition("/")[2].removesuffix(".yaml")
        return self.name or self.baseline or stem or "+".join(self.fuse)


class DiversitySection(Section):
    """Similarity of two items of a list, for ILD: words of a field, or text vectors."""

    field: str | None = Field(None, description="item field with words, such as genres")
    encoder: str | None = Field(None, description="text encoder of titles and fields, such as all-MiniLM-L6-v2")

    @model_validator(mode="after")
    def _one_of_both(self) -> DiversitySection:
        if (self.field is None) == (self.encoder is None):
            raise ValueError("diversity: write one of field and encoder")
        return self


class PartialPair(Section):
    """Two rows on some of the requests."""

    rows: tuple[str, str] = Field(description="the first less the second")
    items: Literal["cold", "warm"] = Field(
        description="requests whose target has no training interaction, or all others"
    )


AnyPair = tuple[str, str] | PartialPair


class Suite(Section):
    """A protocol with its data and rows: full ranking of the catalogue, or held-out items rated or judged yes or no."""

    task: Literal["ranking", "rating", "ctr"] = Field("ranking", description="ctr: will the user like the item")
    suite: Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    plugins: str | None = Field(None, description="folder beside this page with modules of plug-ins; docs/plugins.md")
    data: DataSection
    split: Literal["valid", "test"] = "test"
    seen: tuple[Literal["excluded", "included"], ...] = Field(
        ("excluded", "included"),
        min_length=1,
        description="whether items of the history can be ranked; first: headline",
    )
    cutoffs: tuple[Positive, ...] = Field((5, 10), min_length=1)
    liked: float | None = Field(None, description="ctr: lowest rating that is a yes; None: three quarters up the scale")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="of the chosen point, where it has any chance")
    split_seeds: tuple[Seed, ...] = Field((0,), min_length=1, description="tie rules of the split; several: a range")
    diversity: DiversitySection | None = Field(None, description="ranking: how ILD compares items; None: no ILD")
    bootstrap: Resamples = 2000
    users: Positive | None = Field(None, description="evaluated users, the first in seeded order; None: all")
    reserved: float = Field(
        0.5, gt=0, lt=1, description="share of validation users that weigh fusions and choose no parameter or epoch"
    )
    min_history: int = Field(0, ge=0, description="leave out requests of users with fewer known events")
    rows: tuple[SuiteRow, ...] = Field(min_length=1)
    pairs: tuple[AnyPair, ...] = Field(
        (),
        description="planned comparisons: names of rows, is the first better than the second in every table; with "
        "{rows, items} on cold or warm items alone",
    )
    explored: tuple[AnyPair, ...] = Field(
        (), description="comparisons that were thought of after the test split was seen: described, not tested"
    )
    skip: tuple[str, ...] = Field(
        (), description="names of rows that are left out, with those that join them; the results say so"
    )
    references: tuple[str, ...] = Field((), description="names of eval/references files to print beside")

    @property
    def skipped(self) -> tuple[str, ...]:
        """The rows that are skipped: those of ``skip``, and ensembles with one of them."""
        results: list[str] = []
        for row in self.rows:
            if row.label in self.skip or any(part in results for part in row.fuse):
                results.append(row.label)
        return tuple(results)

    def seeds_of(self, row: SuiteRow) -> tuple[int, ...]:
        """Return the seeds of a stochastic row; an ensemble has as many as each of its members."""
        own = [item.seeds for item in (row, *(other for other in self.rows if other.label in row.fuse))]
        return self.seeds[: min((many for many in own if many is not None), default=None)]

    @model_validator(mode="after")
    def _rows_agree(self) -> Suite:
        known: set[str] = set()
        for row in self.rows:
            if self.task != "ranking" and row.recipe:
                raise ValueError(f"rows: {row.label} ranks the catalogue, which is the task ranking, not {self.task}")
            for part in row.fuse:
                if part not in known:
                    raise ValueError(f"rows: {row.label} joins {part!r}, which is no row above it; write it before")
            if row.label in known:
                raise ValueError(f"rows: two rows are called {row.label!r}; give one another name")
            known.add(row.label)
        if (missing := next((name for name in self.skip if name not in known), None)) is not None:
            raise ValueError(f"skip: there is no row {missing!r}; the rows are {', '.join(sorted(known))}")
        if len(self.skipped) == len(self.rows):
            raise ValueError("skip: no row is left; name fewer")
        for asked in (*self.pairs, *self.explored):
            pair = names_of(asked)
            if pair is not asked and self.task != "ranking":
                raise ValueError(f"pairs: items belongs to the task ranking, not {self.task}; write two names alone")
            if (missing := next((name for name in pair if name not in known), None)) is not None:
                raise ValueError(f"pairs: there is no row {missing!r}; the rows are {', '.join(sorted(known))}")
        return self


def names_of(pair: AnyPair) -> tuple[str, str]:
    """Return the names of the two rows of a comparison."""
    return pair.rows if isinstance(pair, PartialPair) else pair


class BenchmarkRun(Section):
    """Runs of one recipe: one for each point of a grid, and each seed."""

    name: Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", description="its label in tables")
    recipe: str = Field("", description="a recipe page; empty: the benchmark's own")
    overrides: tuple[str, ...] = Field((), description="changed keys, such as eval.arms=[zero-shot]")
    start: str = Field(
        "", description="a run above, whose tuned model of the same seed this one continues: its train.start"
    )
    teacher: str = Field("", description="a run above, whose tuned model of the same seed teaches: train.teacher.run")
    grid: dict[str, tuple[Any, ...]] = Field(
        default={}, description="keys of the recipe with lists of values: every combination is a run"
    )
    seeds: tuple[int, ...] = Field(
        (), description="values of train.seed, over which figures are averaged; empty: the recipe's own"
    )


class Benchmark(Section):
    """Recipes compared on the same cases: models, examples, strategies and templates, with their cost."""

    benchmark: Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    recipe: str = Field("", description="a recipe page for runs that name none")
    overrides: tuple[str, ...] = Field((), description="changed keys of every run")
    runs: tuple[BenchmarkRun, ...] = Field(min_length=1)
    bootstrap: Resamples = 2000
    pairs: tuple[tuple[str, str], ...] = Field(
        (), description="planned comparisons: names of rows as the page has them, is the first better than the second"
    )

    @model_validator(mode="after")
    def _runs_agree(self) -> Benchmark:
        names = [run.name for run in self.runs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"runs: two runs are called {name!r}; give one another name")
        above: dict[str, BenchmarkRun] = {}
        for run in self.runs:
            # Without seeds a run uses the recipe's seed.
            own: set[int | None] = set(run.seeds) or {None}
            for name, what in ((run.start, "starts from"), (run.teacher, "is taught by")):
                first = above.get(name)
                if name and (first is None or first.grid or (first.seeds and not own <= set(first.seeds))):
                    raise ValueError(
                        f"runs: {run.name!r} {what} {name!r}, which has to be a run above it, without a grid and with "
                        "the same seeds"
                    )
            above[run.name] = run
            if not (run.recipe or self.recipe):
                raise ValueError(
                    f"runs: {run.name!r} names no recipe, and neither does the benchmark; write one of both"
                )
            for key, values in run.grid.items():
                if not values:
                    raise ValueError(f"runs: grid of {run.name!r}: {key} has no values; list some, or drop the key")
        return self


class ChatRow(Section):
    """One row of a suite of conversations: the dialogue manager, and the simulated users."""

    manager: str = Field(
        min_length=1,
        description="rules; history: the recommender's next list, whatever was said; random: any legal call, whatever "
        "was said; or a language model by folder or name",
    )
    ranker: str | None = Field(
        None,
        min_length=1,
        description="a language model by folder or name that grades the first items of each list; its order and the "
        "recommender's are joined; None: the recommender alone",
    )
    name: str = Field("", description="empty: the manager's, and the ranker's")
    users: Positive | None = Field(None, description="only the first of the suite's, such as for a language model")
    knows: tuple[str, ...] = Field((), description="fields of items that these users know and speak of; empty: all")

    @property
    def label(self) -> str:
        """The name of the row in tables and files."""
        return self.name or (self.manager if self.ranker is None else f"{self.manager}, graded by {self.ranker}")


class ChatSuite(Section):
    """Conversations of simulated users with several managers over one catalogue and one recommender."""

    chat: Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    recipe: str = Field(description="a recipe page: its data, its seed, and what it says of the recommender")
    overrides: tuple[str, ...] = Field((), description="changed keys of the recipe")
    recommender: str = Field("item-knn", description="a classic recommender, which learns from the training part")
    items: str | None = Field(
        None, description="table of items with what can be talked about: item_id, title, fields; None: the recipe's own"
    )
    split: Literal["valid", "test"] = Field("test", description="whose held-out items users want")
    users: Positive = Field(200, description="users of a seed, drawn by a hash")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="of who is drawn, and of how they say it")
    turns: Positive = Field(5, description="turns of a conversation, at most")
    # The list length of managers that choose it.
    k: int = Field(5, ge=5, le=50, description="items of a list of rules and of history; the others show five at most")
    past: int = Field(40, ge=0, le=90, description="last items of a user's history that the profile begins with")
    liked: float | None = Field(
        None, description="lowest rating of a liked item; None: three quarters up the scale, or all without ratings"
    )
    bootstrap: Resamples = 2000
    rows: tuple[ChatRow, ...] = Field(min_length=1)
    pairs: tuple[tuple[str, str], ...] = Field(
        (), description="planned comparisons: names of rows, is the first better than the second on the users of both"
    )

    @model_validator(mode="after")
    def _rows_agree(self) -> ChatSuite:
        names = [row.label for row in self.rows]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"rows: two rows are called {twice!r}; give one another name")
        for pair in self.pairs:
            if (missing := next((name for name in pair if name not in names), None)) is not None:
                raise ValueError(f"pairs: there is no row {missing!r}; the rows are {', '.join(names)}")
        return self
