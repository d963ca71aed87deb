"""Cache sizes of vLLM engines on the CPU, and errors of engines that do not start; no real engine is started."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from llmrec.backends.vllm import backend, supervise
from llmrec.backends.vllm.backend import VLLMBackend, Workload
from llmrec.errors import EngineFailure
from llmrec.machine import NodeMemory
from tests.facts import Facts, raises

GIB, MIB = 2**30, 2**20
LONGEST = 1024
# SmolLM2-135M in bfloat16: 30 layers, 3 heads, each with 64 keys and 64 values.
TOKEN, WEIGHTS = 2 * 30 * 3 * 64 * 2, 270 * 10**6
LEAST = TOKEN * 32 * 34


def small(tokens: int = 64 * 300) -> Workload:
    return Workload(tokens=tokens, token_bytes=TOKEN, weights=WEIGHTS)


@pytest.mark.parametrize(
    ("tokens", "free", "first"),
    [
        (64 * 300, 20 * GIB, 64 * 300 * TOKEN),  # the workload
        (64 * 1024, 20 * GIB, GIB),  # the upper limit
        (10, 20 * GIB, LEAST),  # one request of the longest
        (64 * 300, GIB, GIB - WEIGHTS - GIB // 2),  # the free memory
        (64 * 300, 10 * MIB, LEAST),  # the minimum of vLLM
    ],
)
def test_cache_holds_the_largest_batch_if_there_is_room(tokens: int, free: int, first: int) -> None:
    sizes = list(small(tokens).sizes(LONGEST, free))
    assert sizes[0] == first and sizes[-1] == LEAST
    assert all(after == max(LEAST, before // 2) for before, after in itertools.pairwise(sizes))


def test_larger_models_get_larger_caches() -> None:
    seven = Workload(tokens=64 * 2048, token_bytes=131_072, weights=14 * 10**9)
    assert seven.needed(2048) == 14 * 10**9
    assert Workload(tokens=64 * 500, token_bytes=131_072, weights=14 * 10**9).needed(2048) == 64 * 500 * 131_072


class Machine:
    """A machine whose vLLM engines start with some cache sizes.

    Attributes:
        tried: The cache sizes of all attempts.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, starts: Callable[[int], bool], free: int, cpu: bool = True
    ) -> None:
        self.tried: list[int] = []
        self._starts = starts
        platform = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: cpu))
        gpu = SimpleNamespace(mem_get_info=lambda index: (16 * GIB, 80 * GIB))
        modules = {"vllm": SimpleNamespace(LLM=self._llm), "torch": SimpleNamespace(cuda=gpu)}
        monkeypatch.setattr(backend, "prepare_environment", lambda: None)
        monkeypatch.setattr(backend, "require", lambda name, extra: modules.get(name) or platform)
        monkeypatch.setattr(
            backend, "read_node_memory", lambda: NodeMemory(name="NUMA node 0", total=10 * GIB, free=free)
        )
        monkeypatch.setattr(supervise, "_start_guard", lambda: None)
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)

    def _llm(self, folder: str, **options: Any) -> object:
        self.tried.append(options.get("kv_cache_memory_bytes", 0))
        if self._starts(self.tried[-1]):
            return SimpleNamespace()
        raise RuntimeError("Engine core initialization failed. See root cause above.")


def start(workload: Workload | None = None) -> VLLMBackend:
    encoder: Any = SimpleNamespace(max_length=LONGEST)
    return VLLMBackend("folder", encoder, dtype="bfloat16", workload=workload or small())


def test_start_without_enough_memory_is_retried_with_half_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, starts=lambda size: size < 100 * MIB, free=GIB)
    start()
    assert machine.tried == list(small().sizes(LONGEST, GIB))[: len(machine.tried)]
    assert len(machine.tried) > 1 and machine.tried[-1] < 100 * MIB <= machine.tried[-2]


def test_failed_start_names_needed_and_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, starts=lambda size: False, free=GIB)
    with raises(
        EngineFailure,
        Facts(
            "exhausted",
            "folder",
            column="eval.backend",
            says=("0.02 GiB of KV cache", "0.25 GiB of weights", "1.00 of 10.00 GiB free", "eval.backend=hf"),
        ),
    ):
        start()
    assert machine.tried[-1] == LEAST


def test_no_start_without_room_for_the_smallest_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, starts=lambda size: True, free=200 * MIB)
    with raises(EngineFailure, Facts("exhausted", says="NUMA node 0 has 0.20 of 10.00 GiB free")):
        start()
    assert machine.tried == []


def test_error_is_read_from_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, starts=lambda size: False, free=9 * GIB)
    error = "Worker failed with error 'No kernel for this; processor. Install another', please check the stack trace"
    monkeypatch.setattr(backend.terminal, "last_library_error", lambda: error)
    with raises(EngineFailure, Facts("failed", says="on folder: No kernel for this, processor (it requested")):
        start()


def test_one_retry_if_memory_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, starts=lambda size: False, free=9 * GIB)
    with raises(EngineFailure, Facts("failed", says=("Engine core initialization failed", "eval.backend=hf"))):
        start()
    assert len(machine.tried) == 2


def test_cache_size_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, starts=lambda size: False, free=9 * GIB)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "6")
    says = ("requested 6 GiB of KV cache", "NUMA node 0 has 9.00 of 10.00 GiB free")
    with raises(EngineFailure, Facts("failed", column="eval.backend", says=says)):
        start()
    assert machine.tried == [0]


def test_failed_start_on_a_gpu_names_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, starts=lambda size: False, free=9 * GIB, cpu=False)
    says = ("requested 19% of the memory", "the GPU has 16.00 of 80.00 GiB free", "eval.gpu_memory")
    with raises(EngineFailure, Facts("failed", column="eval.backend", says=says)):
        start()
    assert machine.tried == [0]
