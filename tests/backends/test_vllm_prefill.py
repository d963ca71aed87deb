"""Scores by prefill requests, as vLLM computes them on a GPU, and adapters on a running engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmrec.backends.vllm.adapters import loadable_rank, required_engine_rank
from llmrec.backends.vllm.backend import EngineRequest, VLLMBackend, plan_requests, sampling_parameters
from llmrec.models.load import load_tokenizer
from llmrec.recipe.schema import ModelSection
from tests.contracts.test_backends import load_hf
from tests.servers.client import question

ROOT = Path(__file__).resolve().parents[2]
TITLES = ("Toy Story", "Toy Story 2", "Toy", "Heat", "Heat (1995)", "Casino (1995)", "Heat", "Fargo")
QUESTIONS = ("Continue the list", "Continue the list of films that this person watched in order", "Another" * 9)
CATALOGUE = [f"{film} {n}" for film in ("Toy Story", "Heat", "Casino") for n in range(4)]


PROMPTS = [question(text, stop="\n") for text in QUESTIONS]


class PrefillEngine:
    """Behaves as vLLM 0.32 and 0.33 with `prompt_logprob_token_ids` in the V2 runner, over a model of transformers.

    Row i of a request scores its ids after prompt token ``prompt_logprob_start + i``; the last prompt token has no row.
    Full blocks are cached when they are scheduled, and at least the last token is computed. A request whose first row
    is in the cache gets no rows.
    """

    def __init__(self, model: Any, *, block: int = 16) -> None:
        self.model, self.block = model, block
        self.cached: set[tuple[int, ...]] = set()
        self.waiting: list[tuple[int, list[int], Any]] = []
        self.requests = self.dropped = self.rows = 0
        cache = SimpleNamespace(block_size=block, num_gpu_blocks=1000)
        self.llm_engine = self
        self.vllm_config = SimpleNamespace(cache_config=cache, use_v2_model_runner=True)

    def enqueue(self, prompts: Sequence[Any], parameters: Sequence[Any], *, lora_request: Any, use_tqdm: bool) -> None:
        for prompt, options in zip(prompts, parameters, strict=True):
            self.waiting.append((self.requests, prompt["prompt_token_ids"], options))
            self.requests += 1

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        done, self.waiting = [self.answer(*each) for each in self.waiting], []
        # vLLM finishes requests in any order.
        return done[::-1]

    def answer(self, number: int, ids: list[int], options: Any) -> Any:
        import numpy as np
        import torch

        settings = SimpleNamespace(max_model_len=512, max_logprobs=128, get_vocab_size=lambda: 10**6)
        options._validate_logprobs(settings)
        hits = 0
        if not options.skip_reading_prefix_cache:
            while (end := hits + self.block) < len(ids) and tuple(ids[:end]) in self.cached:
                hits = end
        self.cached |= {tuple(ids[:end]) for end in range(self.block, len(ids) + 1, self.block)}
        with torch.no_grad():
            table = self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1).numpy()
        scores, rows = None, options.prompt_logprob_token_ids
        if rows is not None:
            start = options.prompt_logprob_start or 0
            assert len(rows) == max(len(ids) - 1 - start, 0), "vLLM refuses another number of rows"
            self.rows += len(rows)
            if hits > start:
                self.dropped += 1
            else:
                values = np.take_along_axis(table[start : len(ids) - 1], np.maximum(rows, 0), axis=1)
                scores = np.where(rows < 0, -np.inf, values).astype(np.float32)
        token = int(table[-1].argmax())
        last = {i: SimpleNamespace(logprob=float(table[-1][i])) for i in {token, *options.logprob_token_ids}}
        return SimpleNamespace(
            request_id=str(number),
            finished=True,
            num_cached_tokens=hits,
            prompt_token_id_logprobs=scores,
            outputs=[SimpleNamespace(token_ids=[token], logprobs=[last])],
        )


def backend_over(folder: Path, block: int = 16) -> tuple[VLLMBackend, PrefillEngine]:
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    hf: Any = load_hf(folder)
    engine = PrefillEngine(hf.model, block=block)
    backend = VLLMBackend.__new__(VLLMBackend)
    backend._vllm, backend.encoder, backend.route = vllm, hf.encoder, "prefill"
    backend._process = SimpleNamespace(watch=SimpleNamespace(run=lambda work: work(Steps())), llm=engine)  # type: ignore[assignment]
    backend._adapter = None
    return backend, engine


class Steps:
    def step(self) -> None: ...


@pytest.mark.parametrize("block", [16, 1])
def test_scores_of_prefills_equal_transformers(llama_folder: Path, block: int) -> None:
    backend, engine = backend_over(llama_folder, block)
    hf = load_hf(llama_folder)
    sets = [TITLES, TITLES[:3], [f"{title} {n}" for title in TITLES[3:6] for n in range(3)]]
    backend.score(PROMPTS, sets)
    # No path requests a node that an earlier path of its prompt has put into the cache.
    assert engine.rows > 0 and engine.dropped == 0
    for closed in (True, False):
        ours, theirs = backend.score(PROMPTS, sets, closed=closed), hf.score(PROMPTS, sets, closed=closed)
        for a, b in zip(ours, theirs, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
            assert (a.tokens, a.prompt_tokens, a.engine) == (b.tokens, b.prompt_tokens, "vllm:prefill")
    labels = backend.score(PROMPTS, [["1", "2", "3"]] * 3, closed=False)
    for a, b in zip(labels, hf.score(PROMPTS, [["1", "2", "3"]] * 3, closed=False), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3) and a.engine == "vllm:one-token"
    # The second time all prompts are in the cache, and with them some rows.
    assert engine.dropped > 0


def test_search_by_prefills_equals_transformers(llama_folder: Path) -> None:
    hf = load_hf(llama_folder)
    for block in (16, 2):
        backend, engine = backend_over(llama_folder, block)
        ours = backend.search(PROMPTS, CATALOGUE, k=4, width=6, exact=True)
        for a, b in zip(ours, hf.search(PROMPTS, CATALOGUE, k=4, width=6, exact=True), strict=True):
            assert a.items == b.items and a.engine == "vllm:prefill"
            assert a.scores == pytest.approx(b.scores, abs=1e-3)
        assert engine.rows > 0


def test_plan_covers_a_tree_by_disjoint_paths() -> None:
    nodes = [(), (1,), (1, 2), (1, 2, 3), (4,), (1, 5)]
    starts, ids = [0, 2, 4, 5, 7, 8, 9], [1, 4, 2, 5, 3, 8, 9, 6, 7]
    requests, entries = plan_requests(nodes, starts, ids, chains=True, limit=9)
    assert requests == [
        EngineRequest((), (1, 2, 3), ((1, 4), (2, 5), (3,), (8, 9))),
        EngineRequest((4,), (), ((6,),)),
        EngineRequest((1, 5), (), ((7,),)),
    ]
    assert entries == list(range(9))
    # A request has a limit of ids; wider nodes are split.
    requests, entries = plan_requests(nodes, starts, ids, chains=True, limit=3)
    assert [len({i for row in ask.targets for i in row}) for ask in requests] == [2, 3, 2, 1, 1]
    assert sorted(entries) == list(range(9))
    wide, entries = plan_requests([()], [0, 5], [1, 2, 3, 4, 5], chains=True, limit=2)
    assert [ask.targets for ask in wide] == [((1, 2),), ((3, 4),), ((5,),)] and entries == [0, 1, 2, 3, 4]
    alone, _ = plan_requests(nodes, starts, ids, chains=False, limit=9)
    assert [ask.text for ask in alone] == nodes and not any(ask.forced for ask in alone)


def test_parameters_are_valid_for_vllm() -> None:
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    model = SimpleNamespace(max_model_len=64, max_logprobs=128, get_vocab_size=lambda: 100)
    ask = EngineRequest((1, 2, 3), (4, 5), ((4, 6), (5,), (7, 8, 9)))
    options = sampling_parameters(vllm, ask, prefill=True)
    options._validate_logprobs(model)
    # Text and forced tokens form the prompt: rows for its tokens 3 and 4, as vLLM's input processor counts.
    assert len(options.prompt_logprob_token_ids) == len(ask.text + ask.forced) - 1 - options.prompt_logprob_start == 2
    assert options.prompt_logprob_token_ids.tolist() == [[4, 6], [5, -1]]
    assert not options.skip_reading_prefix_cache
    assert (options.logprob_token_ids, options.max_tokens, options.extra_args) == ([7, 8, 9], 1, None)
    forced = sampling_parameters(vllm, ask, prefill=False)
    forced._validate_logprobs(model)
    assert forced.prompt_logprob_token_ids is None and forced.extra_args == {"llmrec_forced": [4, 5]}
    assert (forced.logprob_token_ids, forced.max_tokens) == ([4, 6, 5, 7, 8, 9], 3)


def adapter_of(folder: Path, target: Path, *, merge: bool = False, **options: Any) -> Path:
    """Save an adapter with random weights; with ``merge``, also save the merged model, and return its folder."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    adapted.save_pretrained(target)
    merged = target.with_name(f"{target.name}-merged")
    if merge:
        adapted.merge_and_unload().save_pretrained(merged)
        load_tokenizer(str(folder), ModelSection(name=str(folder))).save_pretrained(merged)
    return merged


def test_live_rank_of_adapters(llama_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    for name, options, rank in (
        ("plain", {}, 4),
        ("rslora", {"use_rslora": True}, 4),
        ("dora", {"use_dora": True}, None),
        ("tokens", {"trainable_token_indices": [1, 2]}, None),
        ("saved", {"modules_to_save": ["norm"]}, None),
    ):
        adapter_of(llama_folder, tmp_path / name, **options)
        assert loadable_rank(tmp_path / name) == rank, name
    weights = load_file(tmp_path / "rslora" / "adapter_model.safetensors")
    head = {name.replace("model.layers.0.self_attn.q_proj", "lm_head"): value for name, value in weights.items()}
    save_file(head, tmp_path / "rslora" / "adapter_model.safetensors")
    assert loadable_rank(tmp_path / "rslora") is None
    save_file(weights, tmp_path / "rslora" / "adapter_model.safetensors")
    save_file({}, tmp_path / "rslora" / "rating_head.safetensors")
    assert loadable_rank(tmp_path / "rslora") is None
    (tmp_path / "plain" / "soft_prompt.json").write_text("{}")
    assert loadable_rank(tmp_path / "plain") is None
    assert loadable_rank(tmp_path / "missing") is None
    assert [required_engine_rank(rank) for rank in (1, 8, 9, 300)] == [8, 8, 16, 320]


@pytest.mark.slow
@pytest.mark.vllm
def test_v2_runner_equals_transformers(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    merged = adapter_of(llama_folder, tmp_path / "adapter", merge=True)
    requests = {
        "folder": str(llama_folder),
        "adapters": [str(tmp_path / "adapter")],
        "prompts": list(QUESTIONS),
        "candidates": [list(TITLES)] * 3,
        "catalogue": CATALOGUE,
    }
    (tmp_path / "in.json").write_text(json.dumps(requests))
    files = [str(tmp_path / name) for name in ("in.json", "out.json")]
    command = [sys.executable, "-m", "tests.backends.interpreted", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["v2"] and results["engine"] == "vllm:prefill"
    hf, tuned = load_hf(llama_folder), load_hf(merged)
    expected = hf.score(PROMPTS, [TITLES] * 3)
    for name in ("first", "again"):
        for ours, theirs in zip(results[name], expected, strict=True):
            assert ours == pytest.approx(theirs.logprobs, abs=1e-3), name
    (planned, sent, _), (planned_again, sent_again, _) = results["first_counted"], results["again_counted"]
    # Nothing is dropped the first time; the second time rows are in the cache and are requested by node.
    assert planned == planned_again == sent < sent_again
    for ours, theirs in zip(results["labels"], hf.score(PROMPTS, [["1", "2", "3"]] * 3, closed=False), strict=True):
        assert ours == pytest.approx(theirs.logprobs, abs=1e-3)
    for (items, scores), best in zip(results["searches"], hf.search(PROMPTS, CATALOGUE, k=4, width=6), strict=True):
        assert items == list(best.items) and scores == pytest.approx(best.scores, abs=1e-3)
    for ours, theirs, base in zip(results["adapted"][0], tuned.score(PROMPTS, [TITLES] * 3), expected, strict=True):
        assert ours == pytest.approx(theirs.logprobs, abs=2e-3)
        assert ours != pytest.approx(base.logprobs, abs=0.1)
    for texts, engine in zip(results["texts"], (hf, tuned), strict=True):
        assert texts == [done.text for done in engine.generate(PROMPTS, max_tokens=8)]
