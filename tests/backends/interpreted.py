"""vLLM's V2 model runner on a CPU: its Triton kernels are interpreted, so that the route of GPUs runs without one.

``python -m tests.backends.interpreted IN OUT`` answers the questions of a JSON file, and writes what was computed. It
is a process of its own, since Triton reads its mode when it is imported. On a CPU vLLM takes this runner only if Triton
has a back end for CPUs; interpreted kernels need none, so one is named.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    # The engine's process would not see the named back end.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def name_a_backend() -> None:
    """Let vLLM find a Triton for CPUs."""
    from triton.backends import backends

    backends.clear()
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Score candidates, once more for the drop of cached rows, search a catalogue, and write a text."""
    from llmrec.backends.encode import Encoder
    from llmrec.backends.vllm.adapters import Adapter
    from llmrec.backends.vllm.backend import VLLMBackend, Workload
    from llmrec.models.load import load_tokenizer
    from llmrec.recipe.schema import ModelSection
    from llmrec.types import Message, Prompt, Segment

    folder = asked["folder"]
    encoder = Encoder(load_tokenizer(folder, ModelSection(name=folder)), max_length=512)
    adapters = [Adapter(folder, "", Path(path), path, 8) for path in asked["adapters"]]
    backend = VLLMBackend(
        folder,
        encoder,
        dtype="float32",
        route="prefill",
        workload=Workload(tokens=2**12, token_bytes=2**10, weights=2**20),
        adapters=adapters,
    )
    prompts = [Prompt(messages=(Message("user", (Segment("text", text),)),), stop="\n") for text in asked["prompts"]]
    read, counted = backend._read, []

    def counting(*given: Any) -> Any:
        answers = read(*given)
        counted.append([len(given[0]), answers.requests, answers.tokens])
        return answers

    backend._read = counting  # type: ignore[method-assign]
    result: dict[str, Any] = {"second": backend._llm().llm_engine.vllm_config.use_v2_model_runner}
    for name in ("first", "again"):
        result[name] = [list(scores.logprobs) for scores in backend.score(prompts, asked["candidates"])]
        # What was dropped is read again within the first reading, which ends last.
        result[f"{name}_counted"] = counted[-1]
    # An adapted backend is a copy, and must not read through this one.
    del backend._read
    result["engine"] = backend.score(prompts[:1], asked["candidates"][:1])[0].engine
    result["labels"] = [
        list(scores.logprobs) for scores in backend.score(prompts, [["1", "2", "3"]] * len(prompts), closed=False)
    ]
    result["found"] = [
        [list(found.items), list(found.scores)] for found in backend.search(prompts, asked["catalogue"], k=4, width=6)
    ]
    result["adapted"] = [
        [list(scores.logprobs) for scores in backend.adapted(adapter).score(prompts, asked["candidates"])]
        for adapter in adapters
    ]
    result["texts"] = [
        [done.text for done in other.generate(prompts, max_tokens=8)]
        for other in (backend, *map(backend.adapted, adapters))
    ]
    return result


def main(source: str, target: str) -> None:
    """Answer the questions of a file."""
    os.environ.update(ENVIRONMENT)
    name_a_backend()
    asked = json.loads(Path(source).read_text(encoding="utf-8"))
    Path(target).write_text(json.dumps(answer(asked)), encoding="utf-8")
    # The engine runs in this process, whose end is the orderly one.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
