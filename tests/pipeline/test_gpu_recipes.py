"""The recipes of recipes/gpu on synthetic data, with tiny models of the same architectures."""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.gpu.recipes import RESULT, estimates
from llmrec.cli import estimate
from llmrec.cli.estimate import Speed
from llmrec.pipeline import run as pipeline
from llmrec.recipe.load import load_recipe
from llmrec.resources import resource
from tests.command import llmrec
from tests.conftest import shared
from tests.encoders import tiny_encoder
from tests.invariant.tokenizer_families import tokenizer_of
from tests.review_files import records, write

pytest.importorskip("trl", reason="the train extra is not installed")

FOLDER = resource("recipes") / "gpu"
PEOPLE, FILMS = 24, 30
TOKENIZERS = {"qwen3": "qwen", "llama-3": "llama-3", "gemma-3": "gemma", "t5": "t5"}


@dataclass(frozen=True)
class Small:
    """Changes that make a recipe small.

    Attributes:
        model: The architecture of the model; None if the recipe trains a new model.
        data: The synthetic source that replaces the published one.
        keys: Further overrides.
    """

    model: str | None
    data: str
    keys: tuple[str, ...] = ()


SASREC = "{name: sasrec, max_len: 200, dim: 64, layers: 2, dropout: 0.2, learning_rate: 0.001, epochs: 1}"
RANKED = ("eval.beams=4", "train.judge={users: 3, patience: 4}")
FILM_KEYS = (*RANKED, f"tasks.sequential.baselines=[random, popularity, item-knn, markov-1, {SASREC}]")
CODES = ("index.semantic.rqvae={hidden: [16], dim: 8, epochs: 2}", "index.semantic.codes=8")
ALIGNED = (*RANKED, *CODES, "tasks.alignment.held_out=0.5", "eval.candidates.count=3")
SMALL: Mapping[str, Small] = {
    "qwen3-4b": Small("qwen3", "films", FILM_KEYS),
    "qwen3-4b-24gb": Small("qwen3", "films", FILM_KEYS),
    "tallrec": Small("llama-3", "films-100k", ("train.examples=8",)),
    "p5": Small("t5", "reviews", ("eval.candidates.count=4", "eval.users=14")),
    "tiger": Small(None, "products", (*RANKED, *CODES)),
    "lc-rec": Small("qwen3", "products", ALIGNED),
    "minionerec": Small("qwen3", "products", (*ALIGNED, "train.reward.group=4")),
    "kar": Small("qwen3-words", "films", ("augment.max_tokens=8",)),
}
COMMON = ("model.dtype=float32", "eval.users=4", "eval.bootstrap=20", "eval.backend=hf")
STEPS = ("train.steps=2", "train.batch_tokens=4096", "train.valid_rows=3", "train.valid_every=1", "train.save_every=1")


def films(folder: Path) -> Path:
    """Write ml-1m.zip in the format of GroupLens."""
    dice = random.Random(5)
    seen = [(user, film) for user in range(1, PEOPLE + 1) for film in dice.sample(range(1, FILMS + 1), 18)]
    ratings = [f"{user}::{film}::{dice.randint(1, 5)}::{978_300_000 + 60 * n}" for n, (user, film) in enumerate(seen)]
    movies = [f"{n}::Film {n} ({1960 + n})::{('Drama', 'Comedy|Crime')[n % 2]}" for n in range(1, FILMS + 1)]
    people = [f"{n}::{'MF'[n % 2]}::25::{n % 21}::12345" for n in range(1, PEOPLE + 1)]
    with zipfile.ZipFile(folder / "ml-1m.zip", "w") as archive:
        for name, lines in (("ratings", ratings), ("movies", movies), ("users", people)):
            archive.writestr(f"ml-1m/{name}.dat", "".join(f"{line}\n" for line in lines).encode("latin-1"))
    return folder / "ml-1m.zip"


def films_100k(folder: Path) -> Path:
    """Write u.data, u.item and u.user in the format of GroupLens."""
    dice = random.Random(6)
    pairs = [(user, film) for user in range(1, PEOPLE + 1) for film in dice.sample(range(1, FILMS + 1), 18)]
    rated = [f"{u}\t{i}\t{dice.randint(1, 5)}\t{880_000_000 + 60 * n}\n" for n, (u, i) in enumerate(pairs)]
    flags = "|".join("1" if n in (5, 8) else "0" for n in range(19))
    texts = {
        "u.data": "".join(rated),
        "u.item": "".join(f"{n}|Film {n} ({1960 + n})|01-Jan-1995||http://x/|{flags}\n" for n in range(1, FILMS + 1)),
        "u.user": "".join(f"{n}|{20 + n}|{'MF'[n % 2]}|writer|12345\n" for n in range(1, PEOPLE + 1)),
    }
    return _written(folder / "ml-100k", texts)


def products(folder: Path) -> Path:
    """Write sequences and titles in the format of S3-Rec."""
    dice = random.Random(7)
    lines = [f"u{n} {' '.join(f'i{i}' for i in dice.sample(range(FILMS), 9))}\n" for n in range(PEOPLE)]
    titles = [f"i{n}\tCream {n}\tSkin|Face {n % 3}\n" for n in range(FILMS)]
    texts = {"sequences.txt": "".join(lines), "items.tsv": "item_id\ttitle\tcategories\n" + "".join(titles)}
    return _written(folder / "amazon14_beauty", texts)


def _written(folder: Path, texts: Mapping[str, str]) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def tiny(folder: Path, kind: str) -> None:
    """Save a random model of an architecture with a tokenizer of its family."""
    import torch
    import transformers as hub

    tokenizer = tokenizer_of(TOKENIZERS[kind])
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": len(tokenizer), **shape, **ids}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "t5":
            paired = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
            config = hub.T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **paired, **ids)
            model: Any = hub.T5ForConditionalGeneration(config)
        elif kind == "gemma-3":
            model = hub.Gemma3ForCausalLM(hub.Gemma3TextConfig(sliding_window=64, **heads))
        elif kind == "llama-3":
            model = hub.LlamaForCausalLM(hub.LlamaConfig(tie_word_embeddings=False, **heads))
        else:
            model = hub.Qwen3ForCausalLM(hub.Qwen3Config(tie_word_embeddings=True, **heads))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return the synthetic files by source."""
    folder = tmp_path_factory.mktemp("published")
    reviews = write(folder / "reviews_Beauty_5.json.gz", records())
    return {
        "films": films(folder),
        "films-100k": films_100k(folder),
        "products": products(folder),
        "reviews": reviews,
    }


@pytest.fixture(scope="session")
def models(qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return folders of tiny models by architecture; vLLM can run qwen3-words."""
    folders = {
        kind: shared(tmp_path_factory, f"gpu-{kind}", lambda folder, kind=kind: tiny(folder, kind))
        for kind in TOKENIZERS
    }
    return {**folders, "qwen3-words": qwen_folder}


def overrides(
    name: str, sources: Mapping[str, Path], models: Mapping[str, Path], *more: str, model: str | None = None
) -> list[str]:
    """Return the keys that make a recipe small."""
    small = SMALL[name]
    chosen = model or small.model
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    keys = [f"data.path={sources[small.data]}", *COMMON, *(STEPS if "tuned" in recipe.eval.arms else ()), *small.keys]
    if chosen is not None:
        keys.append(f"model.name={models[chosen]}")
    if recipe.train.micro_tokens is not None:
        keys.append("train.micro_tokens=1024")
    if recipe.index is not None and recipe.index.scheme == "semantic":
        keys.append(f"index.semantic.encoder={tiny_encoder()}")
    if recipe.augment is not None:
        keys.append(f"augment.encoder={tiny_encoder()}")
    return [*keys, *more]


def test_every_recipe_has_a_test() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SMALL)
    for path in FOLDER.glob("*.yaml"):
        assert load_recipe(path).name == f"gpu-{path.stem}" and "Not run yet" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("minionerec", "qwen3-4b-24gb")])
def test_recipe_is_planned_and_estimated_without_weights(
    name: str,
    sources: Mapping[str, Path],
    models: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "measure_speed", lambda *_: Speed(read=1e-3, head=1e-4, write=1e-2, train=3e-3))
    monkeypatch.setattr("llmrec.models.load.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)
    page, keys = str(FOLDER / f"{name}.yaml"), overrides(name, sources, models)
    # `augment` estimates recipes with generated texts.
    command = "augment" if load_recipe(page).augment else "check"
    done = llmrec(command, page, "--dry-run", *keys)
    assert done.returncode == 0, done.stderr
    if name == "lc-rec":
        # Qwen3's chat template closes the thinking block before the answer.
        assert "<think>\n\n</think>" in done.stdout
    assert re.search(r"memory +[\d.]+ GiB" if command == "check" else r"tokens", done.stdout), done.stdout


def test_benchmark_page_shows_recipe(tmp_path: Path) -> None:
    page = (resource("recipes").parent / "docs" / "benchmark.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(name: gpu-qwen3-4b\n.*?)```", page, re.DOTALL)
    (tmp_path / "shown.yaml").write_text(shown, encoding="utf-8")
    recipe = load_recipe(FOLDER / "qwen3-4b.yaml").model_dump()
    assert load_recipe(tmp_path / "shown.yaml").model_dump() == recipe | {"description": ""}


ARCHITECTURES = [("qwen3-4b", "gemma-3"), ("qwen3-4b", "llama-3")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), [*((name, None) for name in SMALL), *ARCHITECTURES])
def test_recipe_runs_from_data_to_report(
    name: str,
    model: str | None,
    sources: Mapping[str, Path],
    models: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "minionerec":
        start = load_recipe(FOLDER / "lc-rec.yaml", overrides("lc-rec", sources, models))
        pipeline.train(start, tmp_path / "runs" / "gpu-lc-rec", quiet=True)
    if name == "kar":
        control = llmrec("augment", str(FOLDER / "kar.yaml"), "--without-model", *overrides(name, sources, models))
        assert control.returncode == 0, control.stderr
    recipe = load_recipe(FOLDER / f"{name}.yaml", overrides(name, sources, models, model=model))
    done = pipeline.run(recipe, tmp_path / "runs" / recipe.name, quiet=True)
    rows = {row["id"]: row for row in done.results["rows"]}
    assert done.report.is_file() and all(row["metrics"] for row in rows.values())
    for arm in recipe.eval.arms:
        assert any(row["arm"] == arm for row in rows.values()), (arm, list(rows))
    audit = json.loads((done.folder / "audit.json").read_text("utf-8"))
    assert not [check for check in audit["checks"] if check["verdict"] == "leak"]


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_writes_texts_of_kar(
    sources: Mapping[str, Path], models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm", reason="no vLLM is installed")
    monkeypatch.chdir(tmp_path)
    keys = overrides("kar", sources, models, "eval.backend=vllm", "augment.limit=4")
    # A new process: the engine keeps the streams of the process that starts it.
    done = llmrec("augment", str(FOLDER / "kar.yaml"), "--json", *keys)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "gpu-kar" / "features").is_dir()


def test_stored_estimates_are_current() -> None:
    assert json.loads(RESULT.read_text(encoding="utf-8"))["recipes"] == estimates()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-4b", "tallrec", "p5", "tiger", "lc-rec"])
def test_recipe_trains_in_two_processes(
    name: str, sources: Mapping[str, Path], models: Mapping[str, Path], tmp_path: Path
) -> None:
    command = ["train", str(FOLDER / f"{name}.yaml"), *overrides(name, sources, models), "--out", str(tmp_path / "run")]
    done = llmrec(*command, "--launch", "2", "--json")
    assert done.returncode == 0, done.stderr
    training = json.loads(done.stdout)["training"]
    assert (training["processes"], training["steps"]) == (2, 2)
