"""Dry runs: prompts and tokens of a recipe, with an estimate of time and memory, without loading weights."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil

from llmrec.backends.encode import Encoder
from llmrec.cli.console import format_minutes, say, show_prompts, show_values
from llmrec.cli.prompts import training_prompts_by_task
from llmrec.errors import LlmrecError, ModelError, require
from llmrec.models.load import device, dtype, load_config, resolve_model_folder
from llmrec.models.memory import CpuMemory, count_weights, estimate_cpu_memory, free_gpu_bytes, training_step_bytes
from llmrec.models.traits import is_encoder_decoder
from llmrec.pipeline.row_specs import is_arm_evaluated
from llmrec.pipeline.run import Session
from llmrec.pipeline.study import Study, encoder_of
from llmrec.pipeline.training import plan_training
from llmrec.recipe.schema import ModelSection, TrainSection
from llmrec.results import arm_name
from llmrec.strategies.counting import count_prompts
from llmrec.types import Request

# --------------------------------------------------------------------------- speed measurement
# A few layers of a model with random weights are timed for at most `MAX_PROBE_SECONDS`. On a CPU, one thread computes
# and its processor time is measured, so that a busy machine gives about the same result as an idle one; all threads of
# torch are assumed to share the work. On a GPU, wall time is measured.


MAX_PROBE_SECONDS = 10.0
"""Time limit of a probe, not counting the first repetition of each measurement."""
# Maximum number of weights in the timed layers, and maximum vocabulary: more would only take longer.
_MAX_WEIGHTS, _MAX_VOCABULARY = 3e8, 2048
_MAX_LAYERS, _REPEATS = 4, 3


@dataclass(frozen=True)
class _Shapes:
    """The numbers of examples and tokens in the timed calls for prefill and decoding.

    ``states`` are the positions whose logits are computed.
    """

    read: tuple[int, int]
    written: tuple[int, int]
    states: int


# On a GPU, small inputs would measure only kernel launches; real batches have thousands of tokens.
_SHAPES = {"cpu": _Shapes((2, 192), (32, 1), 64), "cuda": _Shapes((16, 512), (32, 1), 8192)}


@dataclass(frozen=True)
class Speed:
    """Seconds per token on this machine, if nothing else runs.

    Attributes:
        read: A token of a prompt, through all layers.
        head: A position whose logits over the vocabulary are computed.
        write: A token of an answer, in a batch of 32 answers, without the head.
        train: A token of a training step, forward and backward, without the head.
    """

    read: float
    head: float
    write: float
    train: float


def measure_speed(config: Any, model: ModelSection, train: TrainSection) -> Speed:
    """Time a few layers of a model with random weights, and extrapolate to all of its layers.

    Args:
        config: The model's configuration.
        model: Its device and dtype.
        train: Its training method: which weights are trained, and in how many layers.

    Raises:
        ModelError: If a model with a few of its layers cannot be built or run.
    """
    try:
        return _time_layers(config, model, train)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"layers of a {config.model_type} cannot be timed separately ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}), so the run time is unknown; try train.steps=5 eval.users=5, and "
            "see the report",
            kind="unsupported",
            at=model.name,
            column="model.name",
        ) from error


def _time_layers(config: Any, model: ModelSection, train: TrainSection) -> Speed:
    torch = require("torch", "train")
    until = time.monotonic() + MAX_PROBE_SECONDS
    text = config.get_text_config()
    layers, width, vocabulary = int(text.num_hidden_layers), int(text.hidden_size), int(text.vocab_size)
    few_layers = min(_MAX_LAYERS, layers, max(1, int(_MAX_WEIGHTS // (12 * width**2))))
    device_name = device(model)
    small = _build_few_layers(config, few_layers).to(device=device_name, dtype=dtype(model))
    clock, shapes = _Clock(device_name, until), _SHAPES[device_name]
    states = torch.ones(shapes.states, width, dtype=dtype(model), device=device_name)
    table = torch.full((vocabulary, width), 0.01, dtype=dtype(model), device=device_name)
    threads = torch.get_num_threads()
    # Threads that wait for each other spin, which would count as processor time.
    torch.set_num_threads(1 if device_name == "cpu" else threads)
    try:
        with torch.no_grad():
            small.eval()
            read = clock(lambda: _last_hidden_states(small, shapes.read)) / math.prod(shapes.read)
            write = clock(lambda: _last_hidden_states(small, shapes.written)) / math.prod(shapes.written)
            head = clock(lambda: (states @ table.T).float().logsumexp(-1)) / len(states)
        learning = _make_trainable(small, train)
        step = clock(lambda: _last_hidden_states(learning, shapes.read).float().sum().backward()) / math.prod(
            shapes.read
        )
    finally:
        torch.set_num_threads(threads)
    scale = layers / few_layers
    top = layers if train.method == "full" else min(layers, train.lora.top_layers or layers)
    again = read if train.gradient_checkpointing else 0.0
    return Speed(
        read=read * scale,
        head=head,
        write=write * scale,
        train=(read * (layers - top) + (step + again) * top) * scale / layers,
    )


class _Clock:
    """Times a call several times and keeps the shortest, since the first allocates memory."""

    def __init__(self, device_name: str, until: float) -> None:
        self._torch, self._gpu, self._until = require("torch", "train"), device_name == "cuda", until
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


def _build_few_layers(config: Any, layers: int) -> Any:
    """Return a model with random weights, this configuration, fewer layers and a small vocabulary."""
    torch = require("torch", "train")
    small = copy.deepcopy(config)
    text = small.get_text_config()
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer"):
        if getattr(text, name, None) is not None:
            setattr(text, name, layers)
    if getattr(text, "layer_types", None):
        # Some configurations derive the types of layers from their number.
        with suppress(AttributeError):
            text.layer_types = list(text.layer_types)[:layers]
    text.vocab_size = min(_MAX_VOCABULARY, int(text.vocab_size))
    for entry in (small, text):
        entry.pad_token_id, entry.bos_token_id, entry.eos_token_id = 0, 0, 0
    # Layers are created on the CPU; saving the random state of GPUs would open a context on each.
    with torch.random.fork_rng(devices=[]):
        return require("transformers", "train").AutoModel.from_config(small)


def _make_trainable(body: Any, train: TrainSection) -> Any:
    """Return the layers with their trainable weights: adapters, or all weights."""
    if train.method == "full":
        return body.requires_grad_(True).train()
    peft, lora = require("peft", "train"), train.lora
    targets: Any = list(lora.targets) or "all-linear"
    config = peft.LoraConfig(r=lora.rank, target_modules=targets, use_dora=lora.dora)
    return peft.get_peft_model(body, config).train()


def _last_hidden_states(body: Any, shape: tuple[int, int]) -> Any:
    """Return the last hidden states of the timed layers."""
    torch = require("torch", "train")
    rows, tokens = shape
    ids = torch.ones(rows, tokens, dtype=torch.long, device=next(body.parameters()).device)
    if not is_encoder_decoder(body.config):
        return body(input_ids=ids, use_cache=False).last_hidden_state
    half = max(tokens // 2, 1)
    return body(input_ids=ids[:, :half], decoder_input_ids=ids[:, :half], use_cache=False).last_hidden_state


# --------------------------------------------------------------------------- work of an evaluation


_SAMPLE_SIZE = 24
# Block size of the prefix caches of engines, in tokens.
_BLOCK_TOKENS = 16
# Answer tokens by strategy; other strategies count one token.
_ANSWER_TOKENS = {
    "likelihood": 0,
    "likelihood-prior": 0,
    "search": 0,
    "head": 0,
    "parsed": 3,
    "yes-no": 2,
    "parsed-yes-no": 3,
    "list": 60,
    "text": 30,
}


@dataclass(frozen=True)
class TokenWork:
    """Number of tokens to process for requests.

    Attributes:
        asked: Tokens in all prompts, as a server counts and bills them.
        read: Of these and of scored continuations, the tokens that are not in a cached prefix.
        scored: Positions whose logits are computed without generating a token.
        written: Tokens in all answers.
    """

    asked: float = 0.0
    read: float = 0.0
    scored: float = 0.0
    written: float = 0.0

    def __add__(self, other: TokenWork) -> TokenWork:
        """Return the sum of two token counts."""
        return TokenWork(
            self.asked + other.asked, self.read + other.read, self.scored + other.scored, self.written + other.written
        )

    def times(self, count: float) -> TokenWork:
        """Return the token counts multiplied by ``count``."""
        return TokenWork(self.asked * count, self.read * count, self.scored * count, self.written * count)

    @property
    def tokens(self) -> int:
        """Number of tokens of prompts, continuations and answers."""
        return round(self.asked + self.written)


class ReadPrefixes:
    """The prefixes of prompts that were already read, in blocks."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def new(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt are not cached, and add the prompt to the cache."""
        key, fresh = 0, 0
        for start in range(0, len(ids) - _BLOCK_TOKENS + 1, _BLOCK_TOKENS):
            key = hash((key, *ids[start : start + _BLOCK_TOKENS]))
            fresh += key not in self._known
            self._known.add(key)
        return max(fresh * _BLOCK_TOKENS + len(ids) % _BLOCK_TOKENS, 1)


def estimate_eval_work(study: Study, encoder: Encoder) -> dict[str, TokenWork]:
    """Estimate the number of tokens for zero-shot, few-shot and tuned evaluation from a sample of prompts."""
    totals: dict[str, TokenWork] = {}
    for arm in study.recipe.eval.arms:
        shots = study.recipe.eval.shots.k if arm == "few-shot" else 0
        seen, total = ReadPrefixes(), TokenWork()
        for family in (family for family in study.tasks if is_arm_evaluated(study.recipe, family, arm)):
            cases = study.cases(family)
            sample = cases[:_SAMPLE_SIZE]
            for template in study.eval_templates(family):
                strategies = study.section(family).strategies
                for strategy in study.tasks[family].asked_by(template, strategies, tuned=arm == "tuned"):
                    used = sum(
                        (
                            _request_work(study, family, encoder, c.request, template.name, shots, strategy, seen)
                            for c in sample
                        ),
                        TokenWork(),
                    )
                    total += used.times(len(cases) / max(len(sample), 1))
        totals[arm] = total
    return totals


def _request_work(
    study: Study,
    family: str,
    encoder: Encoder,
    request: Request,
    template: str,
    shots: int,
    strategy: str,
    seen: ReadPrefixes,
) -> TokenWork:
    """Return the token counts of one request."""
    task, section = study.tasks[family], study.recipe.eval
    plan = count_prompts(strategy, len(request.candidates or ()), section) if request.candidates else None
    if plan is not None:
        shown = (request.candidates or ())[: plan.size]
        parts = [replace(request, candidates=entry) for entry in (shown, shown[::-1])]
        first, turned = (encoder.prompt(task.prompt(p, template=template, shots=shots, want=plan.want)) for p in parts)
        again = max(len(first) - _shared_prefix_length(first, turned), 1)
        read = seen.new(first) + (plan.prompts - 1) * again
        return TokenWork(plan.prompts * len(first), read, plan.prompts)
    ids = encoder.prompt(task.prompt(request, template=template, shots=shots))
    if strategy == "two-step":
        # The second prompt contains the answer to the first, of at most its maximum length.
        second = section.permutations * (len(ids) + task.profile_tokens)
        first_step = encoder.prompt(task.profile_prompt(request))
        return TokenWork(
            len(first_step) + second, seen.new(first_step) + second, section.permutations, task.profile_tokens
        )
    continued = 0
    if strategy in ("likelihood", "likelihood-prior"):
        continued = sum(len(encoder.piece(text)) + 1 for text in task.continuations(request, template=template))
    if strategy == "search":
        continued = section.beams * len(encoder.piece(task.continuations(request, template=template)[0]))
    written = _ANSWER_TOKENS.get(strategy, 1)
    return TokenWork(len(ids) + continued, seen.new(ids) + continued, continued, written)


def _shared_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two prompts in whole blocks."""
    count = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return count // _BLOCK_TOKENS * _BLOCK_TOKENS


GPU_CONTEXT_BYTES = 0.8 * 2**30
"""GPU memory of a process before any tensor, plus room for logits; a guess, not verified on a GPU."""
# Seconds to start a vLLM engine, and to load a model with transformers.
_START_SECONDS = {"vllm": 45.0, "hf": 3.0, "openai": 0.0, "fake": 0.0}


def plan_training_counts(study: Study, encoder: Encoder, folder: str) -> dict[str, int | dict[str, int]]:
    """Return planned steps, examples by task and tokens; ``folder`` has the configuration of the base model."""
    planned = plan_training(study, encoder, paired=is_encoder_decoder(load_config(folder, study.recipe.model)))
    return {
        "steps": len(planned.steps),
        "rows": dict(planned.rows),
        "dropped_rows": dict(planned.dropped),
        "tokens": sum(step.tokens for step in planned.steps),
        "padded_tokens": sum(step.padded_tokens for step in planned.steps),
        "target_tokens": sum(step.targets for step in planned.steps),
        "validation_tokens": sum(len(row.ids) for rows in planned.valid.values() for row in rows),
    }


@dataclass(frozen=True)
class Estimate:
    """The estimated totals of a run.

    Attributes:
        parameters: Number of weights of the model.
        train_tokens: Tokens of all planned steps.
        eval_work: The work of each evaluated row, by setting.
        train_seconds: Estimated time of training, validation losses included.
        eval_seconds: Estimated time of evaluation, engine starts included, by setting; empty if a server answers.
        memory_gb: Peak of training: on a CPU the present memory of the process, with data and libraries, plus what
            training adds; on a GPU the memory of the GPU alone.
        free_gb: Free memory of the GPU; None on a CPU.
        cost: Cost of the tokens that a server reads and writes, in the currency of its prices; None without prices.
        cpu: CPU memory of training and merging; None if nothing is trained.
    """

    parameters: int
    train_tokens: int
    eval_work: dict[str, TokenWork]
    train_seconds: float
    eval_seconds: dict[str, float]
    memory_gb: float
    cost: float | None
    free_gb: float | None = None
    cpu: CpuMemory | None = None


def estimate_run(study: Study, encoder: Encoder, folder: str, rows: Mapping[str, Any]) -> Estimate:
    """Estimate time and memory from counted tokens and a speed measurement on this machine.

    ``rows`` is the result of `plan_training_counts`; empty if nothing is trained.
    """
    recipe = study.recipe
    config = load_config(folder, recipe.model)
    work = estimate_eval_work(study, encoder)
    parameters, _, _ = count_weights(config, recipe.train)
    if recipe.eval.backend == "openai" and not rows:
        # The speed of a server is unknown, and nothing is computed on this machine.
        return Estimate(parameters, 0, work, 0.0, {}, _used_memory_gib(), _server_cost(study, work))
    speed = measure_speed(config, recipe.model, recipe.train)
    looks = 2 + recipe.train.steps // recipe.train.valid_every
    # For each target, the logits are computed once in the forward pass and twice in the backward pass.
    training = rows.get("padded_tokens", 0) * speed.train + rows.get("target_tokens", 0) * 3 * speed.head
    training += looks * rows.get("validation_tokens", 0) * speed.read if rows else 0.0
    # With backend auto, vLLM is used if it is installed.
    start = _START_SECONDS.get(recipe.eval.backend, _START_SECONDS["vllm"]) + _START_SECONDS["hf"]
    seconds = {
        arm: entry.read * speed.read + entry.scored * speed.head + entry.written * (speed.write + speed.head) + start
        for arm, entry in work.items()
    }
    taken, free = training_step_bytes(config, recipe.model, recipe.train), None
    on_gpu = device(recipe.model) == "cuda"
    if on_gpu:
        taken, free = taken + GPU_CONTEXT_BYTES, round(free_gpu_bytes() / 2**30, 1)
    return Estimate(
        parameters=parameters,
        train_tokens=rows.get("tokens", 0),
        eval_work=work,
        train_seconds=training,
        eval_seconds={} if recipe.eval.backend == "openai" else seconds,
        memory_gb=round((0.0 if on_gpu else _used_memory_gib()) + taken / 2**30, 1),
        free_gb=free,
        cost=_server_cost(study, work),
        cpu=estimate_cpu_memory(folder, config, recipe.model, recipe.train) if rows else None,
    )


def _used_memory_gib() -> float:
    """Return the memory used by this process, in GiB."""
    return round(float(psutil.Process().memory_info().rss) / 2**30, 1)


def _server_cost(study: Study, work: Mapping[str, TokenWork]) -> float | None:
    """Return the cost of the tokens on a server, if the recipe has prices."""
    server = study.recipe.eval.server
    if study.recipe.eval.backend != "openai" or server is None or not (server.price_in or server.price_out):
        return None
    return sum(entry.asked * server.price_in + entry.written * server.price_out for entry in work.values()) / 1e6


# --------------------------------------------------------------------------- output

MIN_LARGE_INTERACTIONS = 1_000_000
"""Number of interactions from which a run prints its estimate before it starts."""


def show_dry_run(study: Study) -> None:
    """Print rendered prompts, training examples, and an estimate of time and memory."""
    base = resolve_model_folder(study.recipe.model, seed=study.recipe.seed)
    encoder = encoder_of(study, base)
    show_prompts(training_prompts_by_task(study, encoder))
    show_estimate(study, encoder, base)


def show_estimate_if_costly(session: Session) -> None:
    """Print the estimate before a run that is long or uses a paid server."""
    recipe = session.study.recipe
    if session.model is None:
        return
    if recipe.eval.backend == "openai" or len(session.study.data.dataset.interactions) >= MIN_LARGE_INTERACTIONS:
        try:
            show_estimate(session.study, session.encoder, session.base)
        except LlmrecError as error:
            say(f"no estimate: {error}")


def show_estimate(study: Study, encoder: Encoder, base: str) -> None:
    """Print training examples, prompts, and an estimate of time, memory and server tokens."""
    rows = plan_training_counts(study, encoder, base) if "tuned" in study.recipe.eval.arms else {}
    if rows:
        show_values("training rows", rows, json.dumps)
    result = estimate_run(study, encoder, base, rows)
    arms = {
        f"{arm_name(arm)} evaluation": f"{work.tokens:,} tokens"
        + (f", {result.eval_seconds[arm]:.0f} s" if result.eval_seconds else "")
        for arm, work in result.eval_work.items()
    }
    lines = {
        "parameters": f"{result.parameters:,}",
        "training": f"{result.train_tokens:,} tokens, {result.train_seconds:.0f} s",
        **arms,
        "total time": format_minutes(result.train_seconds + sum(result.eval_seconds.values())),
        "memory": f"{result.memory_gb} GiB" + _describe_gpu_memory(result.memory_gb, result.free_gb),
    }
    if result.cpu is not None:
        lines["CPU memory"] = result.cpu.text
    if study.recipe.eval.backend == "openai":
        total = sum(result.eval_work.values(), TokenWork())
        cost = "" if result.cost is None else f", cost {result.cost:.2f} with the prices of eval.server"
        lines["server"] = f"{total.asked:,.0f} prompt tokens and {total.written:,.0f} completion tokens{cost}"
    show_values("estimate", lines, record={"estimate": result})


def _describe_gpu_memory(needed: float, free: float | None) -> str:
    """Compare an estimate with the free GPU memory, as text; empty if there is no GPU."""
    if free is None:
        return ""
    fix = "set train.micro_tokens or train.gradient_checkpointing=true, or train.method=qlora"
    return f" of the GPU, {free} GiB free" + (f": too little; {fix}" if needed > free else "")
