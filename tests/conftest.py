"""Tiny models and tokenizers that tests create; nothing is downloaded."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from jinja2 import Environment

from llmrec.progress import QUIET
from llmrec.recipe.schema import ModelSection

# No deadline, because a busy machine must not fail a property.
settings.register_profile("llmrec", deadline=None, max_examples=100 if os.environ.get("LLMREC_SLOW") == "1" else 10)
settings.load_profile("llmrec")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests do not store or reuse fitted baselines.
os.environ["LLMREC_FITS"] = "off"
# Waiting threads yield their core: on a busy machine, spinning costs ten times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# In GiB: two engines at a time fit into a small machine.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# `make test` runs two processes; the models of the tests are too small for two threads each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("POLARS_MAX_THREADS", "1")


def _has_room(folder: Path) -> bool:
    """Return whether a folder has room for the files of all tests and allows execution."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return False
    return shutil.disk_usage(folder).free > 8 * 2**30 and not os.statvfs(folder).f_flag & os.ST_NOEXEC


# Tests flush files thousands of times, which is slow on a disk but fast in memory.
if _has_room(Path("/dev/shm")):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")


# Log levels before any command ran: a module fixture may run a command before a test begins.
_LEVELS = {logger: logger.level for logger in map(logging.getLogger, (None, "llmrec", "llmrec.progress"))}


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a real PostgreSQL server, which listens on a socket in a temporary folder."""
    pgserver = pytest.importorskip("pgserver")
    pytest.importorskip("adbc_driver_postgresql.dbapi")
    with pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete") as running:
        yield running.get_uri()


@pytest.fixture(autouse=True)
def _levels() -> Iterator[None]:
    """Reset what a command sets for its process: log levels, and whether progress bars are hidden."""
    for logger, level in _LEVELS.items():
        logger.setLevel(level)
    yield
    for logger, level in _LEVELS.items():
        logger.setLevel(level)
    os.environ.pop(QUIET, None)


def asks_for_gpu(marks: str) -> bool:
    """Return whether a marker expression, as in ``-m "gpu and not vllm"``, selects GPU tests."""
    return re.search(r"(?<!\bnot )\bgpu\b", marks) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU before torch is imported, unless GPU tests are selected.

    All other tests compare with CPU results, and start several engines at a time.
    """
    if not asks_for_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests if no GPU is visible."""
    if item.get_closest_marker("gpu"):
        from llmrec.machine import has_cuda

        if not has_cuda():
            pytest.skip("no GPU is visible: pytest -m gpu, on a machine with one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with engines first, so that no process waits for another's engine at the end; skip slow tests."""
    if os.environ.get("LLMREC_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: make test-all"))
    engines = {item.path for item in items if item.get_closest_marker("vllm")}
    items.sort(key=lambda item: item.path not in engines)


@pytest.fixture(scope="module", autouse=True)
def _left_alone() -> None:
    """Exclude the millions of objects of imported modules from later garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Undo the freeze, so that libraries do not report leaked objects when the process ends."""
    gc.unfreeze()


_compile = cache(Environment.compile)


def _compiled(self: Environment, source: Any, *options: Any, **more: Any) -> Any:
    """Compile each template once: libraries write a model card with every checkpoint, which takes half of its time."""
    once = self.shared and isinstance(source, str)
    return (_compile if once else _compile.__wrapped__)(self, source, *options, **more)


Environment.compile = _compiled  # type: ignore[assignment]


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "Continue the list of films that this person watched in order Toy Story Heat Fargo Casino Alien Brazil Jaws Rocky "
    "Answer with one number from 1 to 5 rating title letter system user assistant kitchen quiet easy clean because"
)


def make_tokenizer() -> Any:
    """Train a byte-level BPE tokenizer on a few words; it can write any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([WORDS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def make_model(folder: Path, kind: str = "llama", *, layers: int = 2, seed: int = 0) -> Path:
    """Save a random model (head_dim 64, which vLLM's CPU kernels need) with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**shape))
    # Larger weights than the usual init: answers then differ clearly between prompts.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def section(folder: Path | str, dtype: Any = "float32") -> ModelSection:
    """Return the section of a model in a folder."""
    return ModelSection(name=str(folder), dtype=dtype)


def opened(folder: Path | str) -> tuple[Any, Any]:
    """Return the model in a folder, and its encoder."""
    from llmrec.models.load import load_model

    return load_model(str(folder), section(folder)), encoder_of(folder)


def encoder_of(folder: Path | str, max_length: int = 256) -> Any:
    """Return the encoder of the model in a folder."""
    from llmrec.backends.encode import Encoder
    from llmrec.models.load import load_tokenizer

    return Encoder(load_tokenizer(str(folder), section(folder)), max_length=max_length)


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the processes of a session share: the first caller makes it, the others wait."""
    base = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder, made = base / "shared" / name, base / "shared" / f"{name}.made"
    folder.parent.mkdir(exist_ok=True)
    with (base / "shared" / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "llama", make_model)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "qwen", lambda folder: make_model(folder, "qwen", seed=1))


@pytest.fixture(scope="session")
def trained_run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was trained for two steps, with weighted ensembles; a test that changes it needs a copy."""
    from llmrec.pipeline import run as pipeline
    from llmrec.recipe.load import load_recipe
    from tests.answer.rank_cases import TRAINED

    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={llama_folder}", *TRAINED])
    return shared(tmp_path_factory, "trained", lambda folder: pipeline.run(recipe, folder, quiet=True))


@pytest.fixture(scope="session")
def ranker_run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run like `trained_run` whose ensembles are learned rankers."""
    pytest.importorskip("lightgbm", reason="the ranker extra is not installed")
    from llmrec.pipeline import run as pipeline
    from llmrec.recipe.load import load_recipe
    from tests.answer.rank_cases import TRAINED
    from tests.planted import changes

    def make(folder: Path) -> None:
        own = [f"model.name={llama_folder}", *TRAINED, *changes(folder.with_name("planted"))]
        pipeline.run(load_recipe("recipes/movielens-100k/four-tasks.yaml", own), folder, quiet=True)

    return shared(tmp_path_factory, "ranker", make)


@pytest.fixture(scope="module")
def plain(llama_folder: Path) -> Any:
    """Return an untuned toy model, opened as `llmrec rank` opens one."""
    from llmrec.pipeline import bundle
    from llmrec.recipe.schema import ModelSection

    return bundle.read(str(llama_folder), ModelSection(name=str(llama_folder), dtype="float32"))


@pytest.fixture(scope="module")
def encoder(plain: Any) -> Any:
    """Return the toy model's tokenizer."""
    from llmrec.backends.encode import Encoder
    from llmrec.models.load import load_tokenizer

    return Encoder(load_tokenizer(plain.folder, plain.model), max_length=plain.model.max_length)
