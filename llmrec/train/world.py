"""Training in several processes: kind of parallelism, synchronisation and shared values.

Each optimiser step is divided among them (`llmrec.train.steps.Step.split`), and its loss by the targets of the whole
step, so that the gradient equals that of a single process. Only the first process writes the run folder, logs and
trackers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from llmrec import processes
from llmrec.errors import LlmrecError, RecipeError
from llmrec.progress import log_line
from llmrec.recipe.schema import TrainSection

SHARDED = "FSDP"
"""accelerate's name for sharding weights among processes."""
# One process reads data, validates and merges while the others wait; the launcher ends all if one fails.
_CONNECTION_TIMEOUT = timedelta(days=1)
# Messages of gloo and NCCL for a lost connection.
_LOST_CONNECTION = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|Socket")


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train a model together.

    Attributes:
        rank: Index of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints for all processes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has reached this point."""
        self.agree(0)

    def agree(self, value: int) -> int:
        """Return the value of the first process, in all processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=PartialState().device)
        # A sum completes only when all processes take part; with a broadcast, the first one would not wait.
        torch.distributed.all_reduce(tensor.mul_(self.first))
        return int(tensor)

    def total(self, value: float, device: Any) -> float:
        """Return the sum of a value over all processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(tensor)
        return float(tensor)


def current_world() -> World:
    """Return the processes connected by `connect_processes`, or a single process.

    Raises:
        RecipeError: If a launcher started several that are not connected: gradients would not be summed.
    """
    if torch.distributed.is_initialized():
        return World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    processes.check_single_process("this training")
    return World()


@contextmanager
def connect_processes(device: str) -> Iterator[World]:
    """Connect the processes that a launcher has started, using accelerate.

    Raises:
        RecipeError: If they do not match the settings.
        LlmrecError: If one of them has ended while another waits for it.
    """
    kind = requested_parallelism(device)
    if kind == "no":
        yield World()
        return
    try:
        if not torch.distributed.is_initialized():
            PartialState._reset_state()  # state of an earlier training in this process
        state = PartialState(cpu=device == "cpu", timeout=_CONNECTION_TIMEOUT)
        if state.num_processes != processes.process_count():
            raise _parallelism_error(f"{processes.process_count()} processes", f"{state.num_processes}")
        if kind != SHARDED:  # sharding begins when the trainer is created, which compares again
            check_parallelism(kind, state.distributed_type.value)
        yield current_world()
        torch.distributed.destroy_process_group()
    except RuntimeError as error:
        if processes.process_count() > 1 and _LOST_CONNECTION.search(f"{type(error).__name__} {error}"):
            raise processes.lost_process_error(processes.process_count()) from error
        raise


def requested_parallelism(device: str) -> str:
    """Return the kind of parallelism that the launcher requests, as named by accelerate; ``"no"`` for one process.

    Raises:
        RecipeError: If it is not supported by llmrec, or accelerate would silently ignore it.
    """
    _check_accelerate_settings()
    sharded = _is_enabled("ACCELERATE_USE_FSDP")
    if sharded and device == "cpu":
        raise RecipeError(
            "FSDP is requested on a CPU, where accelerate uses MULTI_CPU instead and every process would hold the "
            "whole model; train on GPUs, or unset ACCELERATE_USE_FSDP",
            kind="unsupported",
        )
    count = processes.process_count()
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        if count > 1:
            raise RecipeError(
                f"the environment sets {count} processes (WORLD_SIZE) but not the rank of this process (RANK, "
                "LOCAL_RANK), so each process would train separately; start the processes with `llmrec train RECIPE "
                "--launch N`, torchrun or accelerate launch",
                kind="unsupported",
            )
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
            raise RecipeError(
                "accelerate launch starts only one process on a CPU without mpirun, although several are requested; "
                "use `llmrec train RECIPE --launch N` or torchrun",
                kind="unsupported",
            )
        return "no"
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and local > gpus:
        raise RecipeError(
            f"{local} processes were started on a machine with {gpus} GPU{'' if gpus == 1 else 's'}, and each needs "
            "one; start fewer, or set model.device=cpu",
            kind="unsupported",
        )
    return "MULTI_CPU" if device == "cpu" else SHARDED if sharded else "MULTI_GPU"


def _check_accelerate_settings() -> None:
    """Reject accelerate settings that llmrec does not support."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("", "no"):
        raise RecipeError(
            f"accelerate has mixed_precision: {precision}, but llmrec uses model.dtype; set mixed_precision: 'no' in "
            "accelerate's configuration, and model.dtype in the recipe",
            kind="contradiction",
            column="model.dtype",
        )
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _is_enabled(f"ACCELERATE_USE_{name}"):
            raise RecipeError(
                f"accelerate is set to {name}, which llmrec does not support; choose MULTI_GPU or FSDP",
                kind="unsupported",
            )


def _is_enabled(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


def check_sharding_settings(plugin: Any, section: TrainSection, *, plain: bool, scaled: bool = False) -> None:
    """Reject settings incompatible with FSDP.

    ``scaled``: products are in float16, whose gradients are scaled. ``plain``: only adapters or weights of the model
    are trained, no rating head or whole-word embeddings.

    Raises:
        RecipeError: If the settings or the kind of training do not support sharding.
    """
    if scaled:
        raise RecipeError(
            "FSDP needs GPUs with bfloat16; set model.dtype=float32, or train with MULTI_GPU",
            kind="unsupported",
            column="model.dtype",
        )
    if section.torch_compile or section.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise RecipeError(
            "FSDP needs torch's AdamW and no torch.compile; remove train.optim and train.torch_compile, or "
            "train with MULTI_GPU",
            kind="unsupported",
            column="train.optim",
        )
    if plugin.fsdp_version != 2 or "FULL" not in str(plugin.state_dict_type) or plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "FSDP needs fsdp_version: 2, fsdp_state_dict_type: FULL_STATE_DICT and fsdp_cpu_ram_efficient_loading: "
            "false in accelerate's configuration, as in docs/scaling.md; sharded checkpoints contain pickled "
            "metadata, which llmrec never reads",
            kind="unsupported",
        )
    if not plain or section.judge or section.prune or section.method not in ("lora", "full"):
        raise RecipeError(
            "FSDP trains adapters (train.method=lora) or all weights (full), without train.judge, train.prune, a "
            "rating head, whole-word embeddings or a quantised base; drop these, or train with MULTI_GPU",
            kind="unsupported",
            column="train.method",
        )


def check_parallelism(requested: str, obtained: str) -> None:
    """Reject a kind of parallelism other than the requested one, see `requested_parallelism`."""
    if requested.lower() != obtained.lower():
        raise _parallelism_error(requested, obtained)


def _parallelism_error(requested: str, obtained: str) -> RecipeError:
    return RecipeError(
        f"training on {requested} was requested, but accelerate has {obtained}; compare its configuration and the "
        "environment (WORLD_SIZE, LOCAL_RANK, ACCELERATE_*) with docs/scaling.md",
        kind="mismatch",
    )


def log_parallelism(world: World, kind: str) -> None:
    """Log the number of processes and the kind of parallelism."""
    if world.size > 1:
        backend = torch.distributed.get_backend()
        log_line(f"training: {world.size} processes, {kind} ({backend})")


def check_same_inputs(world: World, digest: str, what: str) -> None:
    """Reject training if the inputs of a process differ from the inputs of the first.

    Raises:
        LlmrecError: If their hexadecimal digests differ; the message names them as ``what``.
    """
    own_number = int(digest[:15], 16)
    if world.agree(own_number) != own_number:
        raise LlmrecError(
            f"training: process {world.rank} of {world.size} has different {what} than the first process; give all "
            "processes the same data, recipe, model and version of llmrec",
            kind="mismatch",
        )


def run_in_wrapped_forward(
    model: torch.nn.Module, compute: Callable[[Any, Mapping[str, Any]], Any], inputs: Mapping[str, Any]
) -> Any:
    """Run a computation within the forward pass of the module that wraps a model.

    DDP prepares the sum of gradients in its forward pass, and FSDP2 gathers weights in that of the outermost module.
    Losses call the decoder and the head separately, so for one call they replace the model's forward method.
    ``compute`` gets the unwrapped model and the inputs, at least one.
    """
    inner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    if inner is model and not isinstance(model, torch.distributed.fsdp.FSDPModule):
        return compute(model, inputs)
    before = inner.__dict__.get("forward")

    def put_back() -> None:
        inner.__dict__.pop("forward", None)
        if before is not None:
            inner.forward = before

    def once(**forwarded: Any) -> Any:
        put_back()  # the computation may call the whole model
        return compute(inner, forwarded)

    inner.forward = once
    try:
        return model(**inputs)
    finally:
        put_back()
