"""How fast this machine computes a model: a few of its layers, with random weights, timed for at most `SECONDS`.

On a processor one thread computes, its own processor time is the clock, and all of torch's threads are taken to share
the work: what other programs take away is not in it, so that a busy machine gives about the figure of an idle one. On a
GPU the clock is the wall's.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llmrec.errors import ModelError, require
from llmrec.models.load import device, dtype
from llmrec.models.traits import is_paired
from llmrec.recipe.schema import ModelSection, TrainSection

SECONDS = 10.0
"""A probe takes no longer, but for its first repetition of each measurement."""
# Weights of the layers that are made, and the largest vocabulary: both only cost time here.
_WEIGHTS, _VOCABULARY = 3e8, 2048
_LAYERS, _REPEATS = 4, 3


@dataclass(frozen=True)
class _Shapes:
    """Rows and tokens of one timed call: prompts as they are read, and answers as they are written side by side.

    ``states`` are the positions whose logits are computed.
    """

    read: tuple[int, int]
    written: tuple[int, int]
    states: int


# A GPU that is asked for little is timed by its launches: what runs there holds thousands of tokens at a time.
_SHAPES = {"cpu": _Shapes((2, 192), (32, 1), 64), "cuda": _Shapes((16, 512), (32, 1), 8192)}


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine while nothing else runs.

    Attributes:
        read: A token of a prompt, through all layers.
        head: A position whose logits over the vocabulary are computed.
        write: A token of an answer, of 32 answers at a time, without the head.
        train: A token of a training step, forward and backward, without the head.
    """

    read: float
    head: float
    write: float
    train: float


def measured(config: Any, model: ModelSection, train: TrainSection) -> Speed:
    """Time a few layers of a model with random weights, and scale them to all of its layers.

    Args:
        config: The model's configuration.
        model: Where and in which dtype it is computed.
        train: How it is trained: which weights learn, and in how many layers.

    Raises:
        ModelError: If a few of its layers cannot be made, or do not compute alone.
    """
    try:
        return _timed(config, model, train)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"layers of a {config.model_type} cannot be timed alone ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}), so its time cannot be estimated; run it with train.steps=5 and "
            "eval.users=5, and see the budget",
            kind="unsupported",
            at=model.name,
            column="model.name",
        ) from error


def _timed(config: Any, model: ModelSection, train: TrainSection) -> Speed:
    torch = require("torch", "train")
    until = time.monotonic() + SECONDS
    text = config.get_text_config()
    layers, width, vocabulary = int(text.num_hidden_layers), int(text.hidden_size), int(text.vocab_size)
    made = min(_LAYERS, layers, max(1, int(_WEIGHTS // (12 * width**2))))
    place = device(model)
    small = _few_layers(config, made).to(device=place, dtype=dtype(model))
    clock, shapes = _Clock(place, until), _SHAPES[place]
    states = torch.ones(shapes.states, width, dtype=dtype(model), device=place)
    table = torch.full((vocabulary, width), 0.01, dtype=dtype(model), device=place)
    threads = torch.get_num_threads()
    # Threads that wait for each other spin, which would count as work.
    torch.set_num_threads(1 if place == "cpu" else threads)
    try:
        return _scaled(small, states, table, clock, shapes, train, layers / made, layers)
    finally:
        torch.set_num_threads(threads)


def _scaled(
    small: Any,
    states: Any,
    table: Any,
    clock: _Clock,
    shapes: _Shapes,
    train: TrainSection,
    whole: float,
    layers: int,
) -> Speed:
    """Time each kind of work; ``whole`` is how many times the layers that are timed go into the ``layers`` of all."""
    torch = require("torch", "train")
    with torch.no_grad():
        small.eval()
        read = clock(lambda: _forward(small, shapes.read)) / math.prod(shapes.read)
        write = clock(lambda: _forward(small, shapes.written)) / math.prod(shapes.written)
        head = clock(lambda: (states @ table.T).float().logsumexp(-1)) / len(states)
    learning = _learning(small, train)
    step = clock(lambda: _forward(learning, shapes.read).float().sum().backward()) / math.prod(shapes.read)
    top = layers if train.method == "full" else min(layers, train.lora.top_layers or layers)
    again = read if train.gradient_checkpointing else 0.0
    return Speed(
        read=read * whole,
        head=head,
        write=write * whole,
        train=(read * (layers - top) + (step + again) * top) * whole / layers,
    )


class _Clock:
    """Times a call a few times and keeps the shortest: the first one allocates, and others may be disturbed."""

    def __init__(self, place: str, until: float) -> None:
        self._torch, self._gpu, self._until = require("torch", "train"), place == "cuda", until
        self._share = 1.0 if self._gpu else 1.0 / self._torch.get_num_threads()

    def __call__(self, call: Callable[[], object]) -> float:
        times: list[float] = []
        for _ in range(_REPEATS):
            if times and time.monotonic() > self._until:
                break
            begin = self._now()
            call()
            times.append(self._now() - begin)
        return max(min(times), 1e-9) * self._share

    def _now(self) -> float:
        if self._gpu:
            self._torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def _few_layers(config: Any, layers: int) -> Any:
    """Return the body of a model of this configuration with fewer layers and a small vocabulary, from scratch."""
    torch = require("torch", "train")
    small = copy.deepcopy(config)
    text = small.get_text_config()
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer"):
        if getattr(text, name, None) is not None:
            setattr(text, name, layers)
    if getattr(text, "layer_types", None):
        # Some configurations count them from the layers.
        with suppress(AttributeError):
            text.layer_types = list(text.layer_types)[:layers]
    text.vocab_size = min(_VOCABULARY, int(text.vocab_size))
    for each in (small, text):
        each.pad_token_id, each.bos_token_id, each.eos_token_id = 0, 0, 0
    # The layers are made on the CPU; keeping the generators of GPUs would open a context on each of them.
    with torch.random.fork_rng(devices=[]):
        return require("transformers", "train").AutoModel.from_config(small)


def _learning(body: Any, train: TrainSection) -> Any:
    """Return the layers with what a step of training changes of them: adapters, or every weight."""
    if train.method == "full":
        return body.requires_grad_(True).train()
    peft, lora = require("peft", "train"), train.lora
    targets: Any = list(lora.targets) or "all-linear"
    config = peft.LoraConfig(r=lora.rank, target_modules=targets, use_dora=lora.dora)
    return peft.get_peft_model(body, config).train()


def _forward(body: Any, shape: tuple[int, int]) -> Any:
    """Return the last states of rows of tokens; of an encoder-decoder half of each row is read by either half."""
    torch = require("torch", "train")
    rows, tokens = shape
    ids = torch.ones(rows, tokens, dtype=torch.long, device=next(body.parameters()).device)
    if not is_paired(body.config):
        return body(input_ids=ids, use_cache=False).last_hidden_state
    half = max(tokens // 2, 1)
    return body(input_ids=ids[:, :half], decoder_input_ids=ids[:, :half], use_cache=False).last_hidden_state
