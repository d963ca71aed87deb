"""Compares one vLLM engine with a LoRA adapter and two engines with base and merged weights, on this machine.

Run by ``make bench NAME=adapters``. The adapter is trained for a few steps, so that its answers are words. Both
variants answer the same prompts of MovieLens-100K with base and adapter, alternately. ``eval/results/adapters.json``
contains the seconds of starts, texts and scores, and the agreement of adapter and merged weights.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval.benchmarks.provenance import provenance
from llmrec.backends.encode import Encoder
from llmrec.backends.vllm.adapters import Adapter, live_rank
from llmrec.backends.vllm.backend import VLLMBackend, prepare_environment
from llmrec.durable import write_json
from llmrec.models.load import load_model, load_tokenizer, quiet_libraries, resolve
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_recipe

PROMPTS, TOKENS, ROUNDS, STEPS = 16, 32, 2, 8


def train(folder: str, model: Any, texts: list[str], home: Path) -> None:
    """Train an adapter on texts, and write it and the merged weights."""
    import peft
    import torch

    torch.manual_seed(0)
    base = load_model(folder, model, dtype=torch.float32)
    tokenizer = load_tokenizer(folder, model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted: Any = peft.get_peft_model(
        base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=5e-4)
    for step in range(STEPS):
        ids = torch.tensor([tokenizer.encode(texts[step % len(texts)])[:256]])
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(home / "adapter")
    adapted.merge_and_unload().to(torch.float32).save_pretrained(home / "merged")
    tokenizer.save_pretrained(home / "merged")


def main(target: Path) -> None:
    """Measure and write."""
    prepare_environment()
    quiet_libraries()
    recipe = load_recipe(
        "recipes/movielens-100k/four-tasks.yaml", ["reviews=null", "tasks={sequential: {templates: [continue-list]}}"]
    )
    study = build_study(recipe)
    folder, task = resolve(recipe.model), study.tasks["sequential"]
    encoder = Encoder(load_tokenizer(folder, recipe.model), max_length=recipe.model.max_length)
    cases = study.cases("sequential")[:PROMPTS]
    prompts = [task.prompt(case.request, template="continue-list") for case in cases]
    titles = [task.continuations(case.request, template="continue-list") for case in cases]
    seconds: dict[str, dict[str, list[float]]] = {}
    answers: dict[str, Any] = {}

    @contextmanager
    def timed(way: str, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds.setdefault(way, {}).setdefault(what, []).append(time.perf_counter() - begin)

    def ask(way: str, of: str, backend: VLLMBackend) -> None:
        with timed(way, f"texts_of_{of}"):
            texts = [done.text for done in backend.generate(prompts, max_tokens=TOKENS)]
        with timed(way, f"scores_of_{of}"):
            scores = [value for found in backend.score(prompts, titles) for value in found.logprobs]
        answers[way, of] = texts, scores

    def start(way: str, place: str, **options: Any) -> VLLMBackend:
        with timed(way, "starts"):
            return VLLMBackend(place, encoder, dtype="bfloat16", **options)

    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        texts = [
            " ".join(segment.text for message in prompt.messages for segment in message.segments) for prompt in prompts
        ]
        train(folder, recipe.model, texts, home)
        rank = live_rank(home / "adapter")
        assert rank is not None
        adapter = Adapter(folder, "", home / "adapter", "adapter", rank)
        for _ in range(ROUNDS):
            shared = start("one_engine", folder, adapters=[adapter])
            ask("one_engine", "base", shared)
            ask("one_engine", "adapter", shared.adapted(adapter))
            shared.close()
            for of, place in (("base", folder), ("adapter", str(home / "merged"))):
                alone = start("two_engines", place)
                ask("two_engines", of, alone)
                alone.close()
    # A round of two engines has two starts.
    totals = {way: sum(map(sum, found.values())) / ROUNDS for way, found in seconds.items()}
    result = {
        "command": "make bench NAME=adapters",
        "model": recipe.model.name,
        "prompts": PROMPTS,
        "tokens_a_text": TOKENS,
        "candidates": 20,
        "rounds": ROUNDS,
        "rank": rank,
        "dtype": "bfloat16",
        "seconds": {
            way: {what: round(sum(found) / ROUNDS, 2) for what, found in rows.items()} for way, rows in seconds.items()
        },
        "seconds_in_all": {way: round(total, 2) for way, total in totals.items()},
        "times_as_long": {
            what: round(sum(seconds["one_engine"][what]) / sum(seconds["two_engines"][what]), 2)
            for what in seconds["one_engine"]
        },
        "agreement": {
            of: agreement(answers["one_engine", of], answers["two_engines", of]) for of in ("base", "adapter")
        },
        **provenance(),
    }
    write_json(target, result)
    sys.stdout.write(f"{result['seconds']}\n{result['times_as_long']}\n{result['agreement']}\n")


def agreement(ours: Any, theirs: Any) -> dict[str, float]:
    """Return the share of equal texts, and the mean and largest difference of log-probabilities in nats."""
    gaps = [abs(a - b) for a, b in zip(ours[1], theirs[1], strict=True)]
    equal = sum(a == b for a, b in zip(ours[0], theirs[0], strict=True))
    return {
        "equal_texts": equal / len(ours[0]),
        "mean_difference": round(statistics.mean(gaps), 5),
        "largest_difference": round(max(gaps), 5),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
