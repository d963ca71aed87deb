"""vLLM's V2 model runner on a CPU with interpreted Triton kernels: the code path of GPUs, without a GPU.

``python -m tests.backends.interpreted IN OUT`` answers the requests of a JSON file, and writes the results. It is a
separate process, since Triton reads its mode when it is imported. On a CPU vLLM uses this runner only if Triton has a
CPU backend; interpreted kernels need none, so a fake one is registered.
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
    # A separate engine process would not have the fake backend.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def register_backend() -> None:
    """Register a fake Triton backend for CPUs."""
    from triton.backends import backends

    backends.clear()
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Score candidates twice (the second time cached rows are dropped), search a catalogue, and generate texts."""
    from llmrec.backends.encode import Encoder
    from llmrec.backends.vllm.adapters import Adapter
    from llmrec.backends.vllm.backend import VLLMBackend, Workload
    from llmrec.models.load import load_tokenizer
    from llmrec.recipe.schema import ModelSection
    from llmrec.types import Message, Prompt, Segment

    folder = request["folder"]
    encoder = Encoder(load_tokenizer(folder, ModelSection(name=folder)), max_length=512)
    adapters = [Adapter(folder, "", Path(path), path, 8) for path in request["adapters"]]
    backend = VLLMBackend(
        folder,
        encoder,
        dtype="float32",
        route="prefill",
        workload=Workload(tokens=2**12, token_bytes=2**10, weights=2**20),
        adapters=adapters,
    )
    prompts = [Prompt(messages=(Message("user", (Segment("text", text),)),), stop="\n") for text in request["prompts"]]
    read, counts = backend._read, []

    def counting(*args: Any) -> Any:
        answers = read(*args)
        counts.append([len(args[0]), answers.requests, answers.tokens])
        return answers

    backend._read = counting  # type: ignore[method-assign]
    result: dict[str, Any] = {"v2": backend._llm().llm_engine.vllm_config.use_v2_model_runner}
    for name in ("first", "again"):
        result[name] = [list(scores.logprobs) for scores in backend.score(prompts, request["candidates"])]
        # Dropped rows are requested again within the first call, which ends last.
        result[f"{name}_counted"] = counts[-1]
    # An adapted backend is a copy, and must not use this wrapper.
    del backend._read
    result["engine"] = backend.score(prompts[:1], request["candidates"][:1])[0].engine
    result["labels"] = [
        list(scores.logprobs) for scores in backend.score(prompts, [["1", "2", "3"]] * len(prompts), closed=False)
    ]
    result["searches"] = [
        [list(each.items), list(each.scores)] for each in backend.search(prompts, request["catalogue"], k=4, width=6)
    ]
    result["adapted"] = [
        [list(scores.logprobs) for scores in backend.adapted(adapter).score(prompts, request["candidates"])]
        for adapter in adapters
    ]
    result["texts"] = [
        [done.text for done in other.generate(prompts, max_tokens=8)]
        for other in (backend, *map(backend.adapted, adapters))
    ]
    return result


def main(source: str, target: str) -> None:
    """Answer the requests of a file."""
    os.environ.update(ENVIRONMENT)
    register_backend()
    request = json.loads(Path(source).read_text(encoding="utf-8"))
    Path(target).write_text(json.dumps(answer(request)), encoding="utf-8")
    # The engine runs in this process and would block its exit.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
