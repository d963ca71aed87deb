"""The options of a recommender: each option is defined only here, with its help and default.

The command line derives its options from these fields (`llmrec.cli.options`); Python passes them by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args

from llmrec.recipe.shared import BATCH, BEAMS, DTYPE, EXACT, Dtype

TUNED, UNTUNED, PLAIN = "tuned", "untuned", "model"
"""Names of language models: the fine-tuned model of a run, its base model, and a model that was not fine-tuned here.

Baselines and ensembles have their names in the report."""


@dataclass(frozen=True, kw_only=True)
class OptionHelp:
    """The help of an option, and which values are allowed.

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


BatchSize = Annotated[int, OptionHelp(least=1, help="Number of requests sent to the model at a time.")]
Template = Annotated[
    str | None, OptionHelp(metavar="NAME", help="Prompt template. Default: the template used in the evaluation.")
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of every command that opens a model: the model, the items, and the engine."""

    model: Annotated[str, OptionHelp(help="Run folder, exported folder, model folder or Hugging Face model name.")]
    items: Annotated[
        Path | None,
        OptionHelp(help="Table of items with item_id, title and further fields. Default: the items of the run."),
    ] = None
    noun: Annotated[
        str | None, OptionHelp(metavar="PLURAL", help="Plural noun for items in prompts, such as films.")
    ] = None
    backend: Annotated[
        str,
        OptionHelp(
            choices=("auto", "vllm", "hf", "openai"),
            help="Inference engine. auto: the faster engine on this machine; openai: a server with an "
            "OpenAI-compatible API.",
        ),
    ] = "auto"
    server_url: Annotated[
        tuple[str, ...],
        OptionHelp(
            names=("--server-url",),
            metavar="URL",
            help="With --backend openai: base URL of the server, ending in /v1. Repeat the option for several servers "
            "of the same model.",
        ),
    ] = ()
    server_model: Annotated[
        str | None, OptionHelp(metavar="NAME", help="With --backend openai: the model name on the server.")
    ] = None
    server_key_env: Annotated[
        str | None,
        OptionHelp(metavar="VARIABLE", help="With --backend openai: environment variable that holds the API key."),
    ] = None
    gpu_memory: Annotated[
        float | None,
        OptionHelp(metavar="SHARE", help="vLLM: fraction of GPU memory to use, such as 0.5. Default: the free memory."),
    ] = None
    tensor_parallel: Annotated[
        int, OptionHelp(least=1, metavar="N", help="vLLM: number of GPUs for tensor parallelism.")
    ] = 1
    enforce_eager: Annotated[
        bool, OptionHelp(help="vLLM on a GPU: disable CUDA graphs and compilation. Starts sooner, answers more slowly.")
    ] = False
    dtype: Annotated[str, OptionHelp(choices=get_args(Dtype), help="Data type of the model weights.")] = DTYPE

    def recommender(self, **changes: Any) -> RecommenderOptions:
        """Return these options as `RecommenderOptions`, with the given changes."""
        return RecommenderOptions(**{field.name: getattr(self, field.name) for field in fields(ModelOptions)} | changes)

    def given(self, names: Iterable[str]) -> list[str]:
        """Return which of the named options differ from their defaults."""
        defaults = {option.name: option.default for option in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]


@dataclass(frozen=True, kw_only=True)
class RecommenderOptions(ModelOptions):
    """Options that define a model and how it ranks, without input and output files."""

    task: Annotated[
        str, OptionHelp(metavar="auto|sequential|direct", help="Task whose prompts are used for ranking.")
    ] = "auto"
    template: Template = None
    candidates: Annotated[
        str,
        OptionHelp(
            choices=("file", "all"),
            help="Items to rank. file: the candidates of each request; all: the whole catalogue, except items in the "
            "history.",
        ),
    ] = "file"
    strategy: Annotated[str, OptionHelp(metavar="auto|NAME", help="Ranking method, see docs/ranking-methods.md.")] = (
        "auto"
    )
    beams: Annotated[
        int, OptionHelp(least=1, help="With --candidates all: beam width and number of returned items.")
    ] = BEAMS
    exact: Annotated[bool, OptionHelp(help="With --candidates all: continue the search until the result is exact.")] = (
        EXACT
    )
    settings: Annotated[
        tuple[str, ...],
        OptionHelp(
            names=("--set",),
            metavar="KEY=VALUE",
            help="Setting of the ranking method as KEY=VALUE, such as eval.permutations=3. Repeatable.",
        ),
    ] = ()
    retrieve: Annotated[
        str | None,
        OptionHelp(metavar="NAME", help="Baseline that retrieves candidates for requests without candidates."),
    ] = None
    k: Annotated[int, OptionHelp(least=1, help="With --retrieve: number of candidates per request.")] = 20
    fuse: Annotated[
        str,
        OptionHelp(
            choices=("none", "model", "baselines"),
            help="Rank with an ensemble. model: the model and the run's baselines; baselines: the run's baselines "
            "only.",
        ),
    ] = "none"
    rationale: Annotated[
        int, OptionHelp(metavar="N", least=0, help="Also generate explanations for the first N items of each list.")
    ] = 0
    top: Annotated[
        int | None, OptionHelp(least=1, help="Number of ranked items to return per request. Default: all.")
    ] = None
    batch: BatchSize = BATCH
    max_length: Annotated[
        int | None,
        OptionHelp(least=16, help="Maximum length of prompt and answer, in tokens. Default: as in training."),
    ] = None

    @property
    def ranks_catalogue(self) -> bool:
        """Whether the whole catalogue is ranked."""
        return self.candidates == "all"
