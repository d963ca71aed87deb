"""The options of a recommender: the single definition of each option, its help and its default.

The command line derives its options from these fields (`llmrec.cli.options`); Python passes them by name.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args

from llmrec.recipe.shared import BATCH, BEAMS, DTYPE, EXACT, Dtype

TUNED, UNTUNED, PLAIN = "tuned", "untuned", "model"
"""Names of language models: the one that a run fine-tuned, its base model, and one that was not fine-tuned here.

Classic recommenders and ensembles have the names of their rows in the report."""


@dataclass(frozen=True, kw_only=True)
class About:
    """The help of an option and the constraints on its value.

    Attributes:
        help: One line of help.
        names: The names on the command line; by default the field's.
        metavar: The placeholder of a value.
        choices: All allowed values.
        least: The minimum.
        most: The maximum.
        argument: Whether it is positional.
    """

    help: str
    names: tuple[str, ...] = ()
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    argument: bool = False


BatchSize = Annotated[int, About(least=1, help="Requests handed to the engine at a time.")]
Template = Annotated[str | None, About(metavar="NAME", help="Default: the one that the model was evaluated with.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, its items, and the engine of a language model: what every command that opens a model takes."""

    model: Annotated[str, About(help="A run folder, an exported folder, a model folder or hub name.")]
    items: Annotated[
        Path | None, About(help="Table of items: item_id, title, fields. Default: the run's own data.")
    ] = None
    noun: Annotated[str | None, About(metavar="PLURAL", help="What prompts call the items.")] = None
    backend: Annotated[
        str,
        About(
            choices=("auto", "vllm", "hf", "openai"),
            help="Engine; auto: the faster one here; openai: a server.",
        ),
    ] = "auto"
    server_url: Annotated[
        tuple[str, ...],
        About(
            names=("--server-url",),
            metavar="URL",
            help="With --backend openai: the address as far as /v1; repeatable: servers of one model.",
        ),
    ] = ()
    server_model: Annotated[str | None, About(metavar="NAME", help="The name that the server knows its model by.")] = (
        None
    )
    server_key_env: Annotated[
        str | None, About(metavar="VARIABLE", help="The environment variable that holds the server's key.")
    ] = None
    gpu_memory: Annotated[
        float | None,
        About(metavar="SHARE", help="vllm: share of the GPU's memory, such as 0.5; default: what is free."),
    ] = None
    tensor_parallel: Annotated[
        int, About(least=1, metavar="N", help="vllm: GPUs that share every layer of the model.")
    ] = 1
    enforce_eager: Annotated[
        bool, About(help="vllm on a GPU: compile nothing; starts sooner, answers more slowly.")
    ] = False
    dtype: Annotated[str, About(choices=get_args(Dtype), help="Of a language model's weights.")] = DTYPE

    def recommender(self, **changes: Any) -> RecommenderOptions:
        """Return these options with others of a recommender."""
        return RecommenderOptions(**{field.name: getattr(self, field.name) for field in fields(ModelOptions)} | changes)


@dataclass(frozen=True, kw_only=True)
class RecommenderOptions(ModelOptions):
    """A model and its configuration for ranking, without the source of requests or the destination of answers."""

    task: Annotated[str, About(metavar="auto|sequential|direct", help="Which family asks.")] = "auto"
    template: Template = None
    candidates: Annotated[
        str,
        About(
            choices=("file", "all"), help="Which items are ranked: each request's own, or all that its history lacks."
        ),
    ] = "file"
    strategy: Annotated[str, About(metavar="auto|NAME", help="Ranking method; docs/ranking-methods.md lists them.")] = (
        "auto"
    )
    beams: Annotated[
        int, About(least=1, help="With --candidates all: prefixes kept of each request, and items returned.")
    ] = BEAMS
    exact: Annotated[bool, About(help="With --candidates all: search until no other item can be better.")] = EXACT
    settings: Annotated[
        tuple[str, ...],
        About(names=("--set",), metavar="KEY=VALUE", help="What the strategy takes, such as eval.permutations=3."),
    ] = ()
    retrieve: Annotated[
        str | None, About(metavar="NAME", help="A recommender that finds candidates for requests without.")
    ] = None
    k: Annotated[int, About(least=1, help="With --retrieve: candidates a request.")] = 20
    fuse: Annotated[
        str,
        About(
            choices=("none", "model", "baselines"),
            help="Join the model with the run's baselines, or rank by those alone, as the run weighed them.",
        ),
    ] = "none"
    rationale: Annotated[int, About(metavar="N", least=0, help="Also say why, for the first N items.")] = 0
    top: Annotated[int | None, About(least=1, help="Keep the first so many; default: all.")] = None
    batch: BatchSize = BATCH
    max_length: Annotated[
        int | None, About(least=16, help="Longest prompt with answer in tokens; default: as tuned.")
    ] = None

    @property
    def whole(self) -> bool:
        """Whether the whole catalogue is ranked."""
        return self.candidates == "all"
