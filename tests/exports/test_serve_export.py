"""Exported folders behind vLLM: the engine, and a real `vllm serve`, answer what transformers answers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmrec.backends.encode import Encoder
from llmrec.exports import agreement, export
from llmrec.models.load import load_model, load_tokenizer
from llmrec.pipeline.study import Study
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import ModelSection
from llmrec.types import Backend, Prompt
from tests.servers.real import await_health, end, environment, free_port

pytest.importorskip("trl", reason="the train extra is not installed")

SMALL = (
    "eval.fusion={}",
    "data={source: made-reviews, noun: products}",
    "reviews=null",
    "model.dtype=float32",
    "model.max_length=1024",
    "train={steps: 2, batch_tokens: 512, valid_rows: 0, learning_rate: 0.001, warmup: 0}",
    "train.lora={rank: 4, top_layers: 4}",
    "tasks.rating=null",
    "tasks.explanation=null",
    "tasks.sequential={templates: [continue-list], history: 5}",
    "tasks.direct={templates: [after-history], strategies: [label]}",
    "eval={backend: hf, candidates: {count: 5}}",
)
# Nats. Two engines in float32 sum in another order: 1e-4 was seen, on titles of SmolLM2.
TOLERANCE = 1e-3
COUNT = 20


@dataclass(frozen=True)
class Exported:
    """A run's export with the questions that both sides are asked: half lists to continue, half choices."""

    folder: Path
    study: Study
    encoder: Encoder
    prompts: tuple[Prompt, ...]
    candidates: tuple[tuple[str, ...], ...]

    def hf(self) -> Backend:
        from llmrec.backends.hf.backend import HFBackend

        return HFBackend(load_model(str(self.folder), _section(self.folder)), self.encoder)


def exported(model: str, folder: Path) -> Exported:
    """Tune for two steps, export in float32, and render questions about validation cases."""
    from llmrec.pipeline import run as pipeline

    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [*SMALL, f"model.name={model}"])
    pipeline.train(recipe, folder / "run", quiet=True)
    out = folder / "films"
    done = export.export(folder / "run", out, dtype="float32", check_users=2)
    assert done.agreement is not None and done.agreement.logit < 1e-3
    study = agreement.on_validation(recipe, COUNT // 2)
    encoder = Encoder(load_tokenizer(str(out), _section(out)), max_length=1024)
    prompts, candidates = [], []
    for family, task in study.tasks.items():
        (name,) = (template.name for template in study.eval_templates(family))
        for case in study.cases(family):
            prompts.append(task.prompt(case.request, template=name))
            candidates.append(task.continuations(case.request, template=name))
    return Exported(out, study, encoder, tuple(prompts), tuple(candidates))


def _section(folder: Path) -> ModelSection:
    return ModelSection(name=str(folder), dtype="float32", max_length=1024)


def furthest(one: Sequence[Sequence[float]], two: Sequence[Sequence[float]]) -> float:
    return max(abs(a - b) for first, second in zip(one, two, strict=True) for a, b in zip(first, second, strict=True))


# --------------------------------------------------------------------------- the engine


@pytest.mark.slow
@pytest.mark.vllm
def test_the_engine_answers_like_transformers(
    qwen_folder: Path, tmp_path: Path, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from llmrec.backends.vllm.backend import VLLMBackend

    made = exported(str(qwen_folder), tmp_path)
    hf, engine = made.hf(), VLLMBackend(str(made.folder), made.encoder, dtype="float32")
    try:
        texts = [done.text for done in engine.generate(made.prompts, max_tokens=12)]
        scores = [found.logprobs for found in engine.score(made.prompts, made.candidates)]
    finally:
        engine.close()
    assert len(texts) == COUNT and len(set(texts)) > 5
    assert texts == [done.text for done in hf.generate(made.prompts, max_tokens=12)]
    apart = furthest(scores, [found.logprobs for found in hf.score(made.prompts, made.candidates)])
    with capsys.disabled():
        sys.stdout.write(f"\n[tiny model, engine: furthest log-probability {apart:.1e} nats]")
    assert apart < TOLERANCE


# --------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    address: str
    made: Exported

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def _blocks(folder: Path) -> list[str]:
    return re.findall(r"```sh\n(.*?)\n```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The command of the card, on an export of SmolLM2, with what a small CPU machine needs."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from llmrec.backends.vllm.backend import prepare_environment

    made = exported(ModelSection().name, tmp_path_factory.mktemp("smollm2"))
    prepare_environment()
    (command,) = (block for block in _blocks(made.folder) if block.startswith("vllm serve"))
    program, *words = shlex.split(command)
    port = free_port()
    words += ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    log, address = made.folder.parent / "server.log", f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(program)), *words],
            cwd=made.folder.parent,
            env=environment(made.folder.parent),
            stdout=output,
            stderr=subprocess.STDOUT,
            # The engine is a child of its own: all of them end together.
            start_new_session=True,
        )
    try:
        await_health(process, f"{address}/health", log)
        yield Server(address, made)
    finally:
        end(process)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.vllm
def test_the_server_answers_the_request_of_the_card(server: Server) -> None:
    import torch

    (request,) = (block for block in _blocks(server.made.folder) if block.startswith("curl"))
    words = shlex.split(request.replace("\\\n", " "))
    body = json.loads(words[words.index("-d") + 1])
    path = next(word for word in words if word.startswith("http")).partition("8000")[2]
    assert path == "/v1/chat/completions"
    (choice,) = server.post(path, body)["choices"]
    model, tokenizer = load_model(str(server.made.folder), _section(server.made.folder)), server.made.encoder.tokenizer
    text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=False)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected
    assert choice["message"]["content"] == expected


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.vllm
def test_the_server_answers_like_transformers(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    made, hf = server.made, server.made.hf()
    ids = [made.encoder.prompt(prompt) for prompt in made.prompts]
    stops = {prompt.stop for prompt in made.prompts}
    texts: dict[int, str] = {}
    for stop in stops:
        chosen = [n for n, prompt in enumerate(made.prompts) if prompt.stop == stop]
        body = {"model": "films", "prompt": [ids[n] for n in chosen], "temperature": 0, "max_tokens": 12}
        answers = server.post("/v1/completions", body | ({"stop": [stop]} if stop else {}))["choices"]
        texts |= {chosen[choice["index"]]: choice["text"] for choice in answers}
    assert len(texts) == COUNT and len(stops) == 2 and len(set(texts.values())) > 5
    assert [texts[n] for n in range(COUNT)] == [done.text for done in hf.generate(made.prompts, max_tokens=12)]
    some = [0, COUNT // 4, COUNT // 2, 3 * COUNT // 4]
    theirs = [_logprobs(server, made, n) for n in some]
    ours = [hf.score([made.prompts[n]], [made.candidates[n]])[0].logprobs for n in some]
    apart = furthest(theirs, ours)
    with capsys.disabled():
        sys.stdout.write(f"\n[SmolLM2, server: furthest log-probability {apart:.1e} nats]")
    assert apart < TOLERANCE


def _logprobs(server: Server, made: Exported, n: int) -> list[float]:
    """Ask a server for the log-probability of each candidate of a prompt, end of answer included."""
    ids = made.encoder.prompt(made.prompts[n])
    tails = made.encoder.continuations(made.prompts[n], ids, made.candidates[n], closed=True)
    body = {"model": "films", "prompt": [[*ids, *tail] for tail in tails], "temperature": 0}
    answers = server.post("/v1/completions", body | {"max_tokens": 1, "echo": True, "logprobs": 1})["choices"]
    rows = {choice["index"]: choice["logprobs"]["token_logprobs"] for choice in answers}
    return [sum(rows[k][len(ids) : len(ids) + len(tail)]) for k, tail in enumerate(tails)]
