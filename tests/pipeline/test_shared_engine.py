"""One engine for a base model and the adapters on it: on a GPU, and where vLLM supports the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from llmrec.answer.opening import open_models
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.recommender import Question
from llmrec.backends.encode import Encoder
from llmrec.backends.fake import FakeBackend
from llmrec.backends.vllm.adapters import Adapter
from llmrec.data.requests import RankRequest
from llmrec.errors import EngineFailure
from llmrec.models.load import load_tokenizer
from llmrec.pipeline import engines
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.engines import Engines
from llmrec.pipeline.resume import Budget
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import EvalSection, ModelSection
from llmrec.registry import BACKENDS
from llmrec.registry import lookup as looked_up
from llmrec.types import Item

pytest.importorskip("torch", reason="the train extra is not installed")

PAGE = """
name: shared
data: {source: made-reviews, noun: products}
tasks:
  direct: {strategies: [label]}
train: {steps: 2, batch_tokens: 512}
eval: {arms: [zero-shot, few-shot, tuned], users: 6, batch: 4, bootstrap: 50, candidates: {count: 5}}
"""


REQUEST = RankRequest(
    id="1", user_id="u", history=(), candidates=tuple(Item(item_id=f"i{n}", title=f"Product {n}") for n in range(3))
)


class Adapting(FakeBackend):
    """Stands in the place of vLLM; keeps which engines were started, and with which adapters they were asked."""

    name = "vllm"
    started: list[tuple[str, int]]
    asked: list[str]
    open = 0
    breaks = False

    def __init__(self, folder: str, encoder: object, *, adapters: Any = (), **options: object) -> None:
        super().__init__()
        type(self).started.append((Path(folder).name, len(adapters)))
        type(self).open += 1
        self.adapter, self.alive = "", [True]

    def adapted(self, adapter: Adapter) -> Self:
        view = type(self).__new__(type(self))
        view.__dict__.update(self.__dict__, adapter=adapter.folder.name)
        return view

    def score(self, *args: Any, **options: Any) -> Any:
        if not self.alive or (self.adapter and type(self).breaks):
            raise EngineFailure("the vLLM engine died; run the same command again to continue", kind="failed")
        type(self).asked.append(self.adapter)
        return super().score(*args, **options)

    def close(self) -> None:
        type(self).open -= len(self.alive)
        self.alive.clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Return what chooses whether models run on a GPU; vLLM is made up."""
    Adapting.started, Adapting.asked, Adapting.open, Adapting.breaks = [], [], 0, False

    def lookup(table: Any, name: str, what: str) -> Any:
        return Adapting if table is BACKENDS and name == "vllm" else looked_up(table, name, what)

    def choose(gpu: bool) -> None:
        monkeypatch.setattr(engines, "installed", lambda name: True)
        monkeypatch.setattr(engines, "versions", lambda: {"llmrec": "0", "vllm": "0.32.0+cpu"})
        monkeypatch.setattr(engines, "lookup", lookup)
        monkeypatch.setattr(engines, "_on_gpu", lambda model: gpu)
        monkeypatch.setattr(engines, "_device", lambda model: "a GPU" if gpu else "cpu")

    return choose


@pytest.fixture(scope="module")
def page(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "shared.yaml"
    file.write_text(f"{PAGE}model: {{name: {llama_folder}, dtype: float32}}\n", encoding="utf-8")
    return file


def test_a_run_asks_base_and_adapter_through_one_engine_on_a_gpu(
    device: Callable[[bool], None], page: Path, llama_folder: Path, tmp_path: Path
) -> None:
    base = llama_folder.name
    for name, gpu, more, started in (
        ("gpu", True, (), [(base, 1)]),
        # Slower on a CPU than merged weights.
        ("cpu", False, (), [(base, 0), ("merged", 0)]),
        # Not supported by vLLM.
        ("dora", True, ("train.lora.dora=true",), [(base, 0), ("merged", 0)]),
    ):
        device(gpu)
        Adapting.started, Adapting.asked = [], []
        made = pipeline.run(load_recipe(str(page), more), tmp_path / name, quiet=True)
        assert Adapting.started == started, name
        assert set(Adapting.asked) == ({"", "adapter"} if name == "gpu" else {""})
        assert {row["arm"] for row in made.results["rows"]} >= {"zero-shot", "few-shot", "tuned"}
        assert Adapting.open == 0
    # Nothing is started again, and the answers of the one are not those of the other.
    Adapting.started = []
    device(True)
    pipeline.run(load_recipe(str(page)), tmp_path / "gpu", quiet=True)
    assert Adapting.started == []
    device(False)
    pipeline.run(load_recipe(str(page)), tmp_path / "gpu", quiet=True)
    assert len(Adapting.started) == 2


def test_transformers_answer_for_an_adapter_that_the_engine_breaks_at(
    device: Callable[[bool], None], page: Path, tmp_path: Path
) -> None:
    device(True)
    Adapting.breaks = True
    made = pipeline.run(load_recipe(str(page)), tmp_path / "r", quiet=True)
    rows = {row["arm"]: row["engine"].partition(":")[0] for row in made.results["rows"] if row["arm"] != "baseline"}
    assert rows == {"zero-shot": "fake", "few-shot": "fake", "tuned": "hf"}
    # The shared engine is closed before transformers load the model.
    assert len(Adapting.started) == 1 and Adapting.open == 0
    # In a service, the base gets an engine again.
    Adapting.started = []
    models = open_models(RecommenderOptions(model=str(tmp_path / "r")), ("tuned", "untuned"))
    for name in ("tuned", "untuned"):
        (found,) = models.answer(Question(model=name), [REQUEST])
        assert len(found.answer.items) == 3  # type: ignore[union-attr]
    models.close()
    assert len(Adapting.started) == 2 and Adapting.open == 0


def test_a_service_opens_one_engine_for_the_model_of_a_run_and_its_base(
    device: Callable[[bool], None], page: Path, llama_folder: Path, tmp_path: Path
) -> None:
    device(True)
    pipeline.run(load_recipe(str(page)), tmp_path / "r", quiet=True)
    for names, started in (
        (("tuned", "untuned"), [(llama_folder.name, 1)]),
        # Merged weights need no adapter.
        (("tuned",), [("merged", 0)]),
    ):
        Adapting.started, Adapting.asked = [], []
        models = open_models(RecommenderOptions(model=str(tmp_path / "r"), backend="vllm"), names)
        for name in (*names, *names):
            (found,) = models.answer(Question(model=name), [REQUEST])
            assert len(found.answer.items) == 3  # type: ignore[union-attr]
        assert Adapting.started == started and Adapting.open == 1
        models.close()
        assert Adapting.open == 0
    assert len({model.signature for model in models.opened.values()}) == len(models.opened)


def test_identities_say_how_an_adapter_is_put_on(
    device: Callable[[bool], None], llama_folder: Path, tmp_path: Path
) -> None:
    device(True)
    section = ModelSection(name=str(llama_folder), dtype="float32")
    encoder = Encoder(load_tokenizer(str(llama_folder), section), max_length=512)
    adapter = Adapter(str(llama_folder), "base", tmp_path / "adapter", "tuned", 8)
    shared = Engines(section, EvalSection(), encoder, 0, Budget(), None, adapters=[adapter])
    plain = Engines(section, EvalSection(), encoder, 0, Budget(), None)
    for weights in ("base", "tuned"):
        assert shared.identity("vllm", weights) == {**plain.identity("vllm", weights), "adapters": "live"}
        assert shared.identity("hf", weights) == plain.identity("hf", weights)
    assert shared.identity("vllm", "other") == plain.identity("vllm", "other")
    beside = Engines(section, EvalSection(), encoder, 0, Budget(), None, beside=shared)
    assert beside.is_shared("vllm", "tuned") and not plain.is_shared("vllm", "tuned")
    # Another window is another engine.
    short = Engines(section, EvalSection(), Encoder(encoder.tokenizer, max_length=64), 0, Budget(), None, beside=shared)
    assert not short.is_shared("vllm", "base")
    device(False)
    assert shared.identity("vllm", "tuned") == plain.identity("vllm", "tuned")
