"""The options of `llmrec rank`: the recommender and the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

from llmrec.answer.options import PLAIN, TUNED, OptionHelp, RecommenderOptions
from llmrec.answer.rank.outputs import summary_path
from llmrec.errors import RecipeError
from llmrec.recipe.shared import Form


@dataclass(frozen=True, kw_only=True)
class RankOptions(RecommenderOptions):
    """Options of `llmrec rank`: the file of requests, the file of rankings, and the model."""

    model: Annotated[str, OptionHelp(help="Run folder, exported folder, model folder or Hugging Face model name.")] = ""
    baseline: Annotated[
        str | None,
        OptionHelp(
            metavar="NAME", help="Rank with this baseline instead of --model, see docs/baselines-and-ensembles.md."
        ),
    ] = None
    recipe: Annotated[
        str | None,
        OptionHelp(
            metavar="FILE", help="With --baseline: recipe or run folder with the training data and the parameters."
        ),
    ] = None
    requests: Annotated[
        Path | None,
        OptionHelp(
            names=("--in",),
            help="Requests: .jsonl, .csv, .tsv (also with .gz) or .parquet, see docs/batch-inference-and-export.md.",
        ),
    ] = None
    out: Annotated[
        Path | None, OptionHelp(help="Output file, in any of the formats of --in; - for standard output.")
    ] = None
    form: Annotated[
        str,
        OptionHelp(
            choices=("auto", *get_args(Form)),
            help="Output format. records: one record per request; long: one row per ranked item; trec: a TREC run; "
            "recbole: an .inter file; rectools: one row per ranked item, with RecTools columns; auto: from the file "
            "name of --out.",
        ),
    ] = "auto"
    all_users: Annotated[bool, OptionHelp(help="Rank the whole catalogue for every user of the run's data.")] = False
    to: Annotated[
        str | None,
        OptionHelp(
            metavar="FILE|URL",
            help="Database for the table recommendations, instead of --out: .db, sqlite:///FILE, duckdb:///FILE or "
            "postgresql://...; with --all-users also a file: .parquet, .csv, .jsonl, .run or .inter.",
        ),
    ] = None
    by: Annotated[
        str | None,
        OptionHelp(
            metavar="NAME", help="Model in the run folder: tuned, untuned, a baseline, or another model in the report."
        ),
    ] = None
    limit: Annotated[int | None, OptionHelp(least=1, help="Rank only the first N requests.")] = None
    shard: Annotated[
        str | None, OptionHelp(metavar="I/N", help="Rank only shard I of N; combine the shards with llmrec merge.")
    ] = None
    ray: Annotated[
        str | None,
        OptionHelp(metavar="local|HOST:PORT", help="Rank all shards on a Ray cluster, then merge them."),
    ] = None
    actors: Annotated[
        int | None,
        OptionHelp(
            least=1,
            help="With --ray: number of processes, each with its own copy of the model. Default: as many as fit.",
        ),
    ] = None
    cpus: Annotated[float, OptionHelp(help="With --ray: logical CPUs per process.")] = 1.0
    gpus: Annotated[
        float | None, OptionHelp(help="With --ray: GPUs per process. Default: 1 if the cluster has GPUs.")
    ] = None
    shards: Annotated[
        int | None,
        OptionHelp(
            least=1, help="With --ray: number of shards. Default: as many as exist already, otherwise four per process."
        ),
    ] = None
    restart: Annotated[
        bool,
        OptionHelp(
            help="Discard partial results of an earlier run, and overwrite an output file that was changed or an "
            "existing table."
        ),
    ] = False

    @property
    def source(self) -> Path:
        """Path of the requests."""
        return _require_option(self.requests, "--in", "the file of requests")

    @property
    def target(self) -> Path:
        """Path of the rankings."""
        return _require_option(self.out, "--out", "the output file of rankings")

    @property
    def layout(self) -> Form:
        """Format of the file of rankings."""
        from llmrec.data.ranked import resolve_form

        return resolve_form(self.target, self.form)

    @property
    def bare(self) -> bool:
        """Whether requests may lack candidates, which are then retrieved."""
        return self.ranks_catalogue or self.retrieve is not None or self.baseline is not None or self.named is not None

    @property
    def named(self) -> str | None:
        """Name of the model that ranks, if it is not the language model of the folder."""
        return None if self.by in (TUNED, PLAIN) else self.by

    @property
    def tag(self) -> str:
        """Name of the model in a TREC run, without spaces."""
        return (self.baseline or self.named or "llmrec").replace(" ", "-")

    @property
    def parts(self) -> Path:
        """Folder of finished parts."""
        return self.target.with_name(self.target.name + ".parts")

    @property
    def summary(self) -> Path:
        """Path of the summary."""
        return summary_path(self.target)


CLUSTER_OPTIONS = ("actors", "cpus", "gpus", "shards")
"""Options of the cluster."""


def check_cluster_options(options: RankOptions) -> None:
    """Reject cluster options if no cluster is used."""
    if options.ray is None and (unused := options.given(CLUSTER_OPTIONS)):
        raise RecipeError(
            f"--{unused[0]} configures a Ray cluster, but --ray is missing; add --ray, or drop --{unused[0]}",
            kind="contradiction",
            column=f"--{unused[0]}",
        )


def _require_option(value: Path | None, option: str, what: str) -> Path:
    if value is None:
        raise RecipeError(
            f"{option} is missing: give {what}, or rank for every user with --all-users --to FILE",
            kind="missing-key",
            column=option,
        )
    return value
