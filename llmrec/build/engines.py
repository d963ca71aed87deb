"""Starts and stops model engines, one model at a time."""

from __future__ import annotations

import logging

from llmrec.backends.encode import Encoder
from llmrec.backends.models import dtype, load_model, release_memory
from llmrec.build.stages import Budget
from llmrec.errors import MissingExtra
from llmrec.recipe import EvalSection, ModelSection
from llmrec.registry import BACKENDS, lookup
from llmrec.types import Backend

log = logging.getLogger(__name__)

# Strategies whose continuations are long texts; everything else reads one label or generates.
LIKELIHOOD = frozenset({"likelihood"})


class Engines:
    """Hands out backends for a model folder; asking for another engine closes the one before.

    Args:
        model: The recipe's model section.
        section: The recipe's eval section.
        encoder: Tokenizer and chat template, shared by every engine.
        seed: Engine seed.
        budget: Where start-up time is booked.
    """

    def __init__(self, model: ModelSection, section: EvalSection, encoder: Encoder, seed: int, budget: Budget) -> None:
        self._model, self._section, self._encoder = model, section, encoder
        self._seed, self._budget = seed, budget
        self._open: tuple[str, str, Backend] | None = None

    def engine_for(self, strategy: str) -> str:
        """Return the engine's name for a strategy, as the recipe and this machine decide.

        Title likelihoods under ``scorer: auto`` run on hf on the CPU, where one masked forward a user is faster
        than vLLM's one request a candidate, and on the evaluation backend on a GPU.
        """
        section = self._section
        if strategy not in LIKELIHOOD:
            return section.backend
        if section.scorer != "auto":
            return section.scorer
        return "hf" if section.backend == "vllm" and not _has_gpu() else section.backend

    def get(self, engine: str, folder: str) -> Backend:
        """Return an open backend over a model folder."""
        if self._open is not None and self._open[:2] == (engine, folder):
            return self._open[2]
        self.close()
        with self._budget.stage(f"start {engine}"):
            backend = self._start(engine, folder)
        self._open = (engine, folder, backend)
        return backend

    def close(self) -> None:
        """Close the open engine, if any."""
        if self._open is not None:
            self._open[2].close()
            self._open = None
            release_memory()

    def _start(self, engine: str, folder: str) -> Backend:
        if engine == "fake":
            fake: Backend = lookup(BACKENDS, "fake", "backend")()
            return fake
        if engine == "vllm":
            try:
                started: Backend = lookup(BACKENDS, "vllm", "backend")(
                    folder,
                    self._encoder,
                    dtype=dtype_name(self._model),
                    seed=self._seed,
                    trust_remote_code=self._model.trust_remote_code,
                )
                return started
            except MissingExtra as error:
                raise MissingExtra(f"{error} Or set eval.backend=hf, which needs no vLLM.") from error
        model = load_model(folder, self._model)
        if _has_gpu():
            model = model.to("cuda")
        loaded: Backend = lookup(BACKENDS, "hf", "backend")(model, self._encoder)
        return loaded


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def dtype_name(model: ModelSection) -> str:
    """Return the dtype's name as vLLM and the records write it."""
    return str(dtype(model)).removeprefix("torch.")
