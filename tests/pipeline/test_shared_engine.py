"""One engine for a base model and its adapters: on a GPU, if vLLM supports the adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

import llmrec
from llmrec.answer.opening import describe_default_model, open_models
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.recommender import Question
from llmrec.backends.encode import Encoder
from llmrec.backends.fake import FakeBackend
from llmrec.backends.vllm.adapters import Adapter
from llmrec.data.requests import RankRequest
from llmrec.durable import parse_checked_json, write_checked_json
from llmrec.errors import EngineFailure, LlmrecError
from llmrec.models.load import BUNDLE_FILE, load_tokenizer
from llmrec.pipeline import bundle, engines
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.engines import Engines
from llmrec.pipeline.resume import StageTimer
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import dump_recipe, load_recipe, load_stored_recipe
from llmrec.recipe.schema import EvalSection, ModelSection
from llmrec.registry import BACKENDS, import_component
from llmrec.types import Item
from tests.facts import Facts, raises

pytest.importorskip("torch", reason="the train extra is not installed")

PAGE = """
name: shared
data: {source: made-reviews, noun: products}
tasks:
  direct: {strategies: [label], baselines: [random, popularity, item-knn, markov-1]}
train: {steps: 2, batch_tokens: 512}
eval: {arms: [zero-shot, few-shot, tuned], users: 6, batch: 4, bootstrap: 50, candidates: {count: 5}}
"""


REQUEST = RankRequest(
    id="1", user_id="u", history=(), candidates=tuple(Item(item_id=f"i{n}", title=f"Product {n}") for n in range(3))
)


class Adapting(FakeBackend):
    """Replaces vLLM, and records the started engines and the adapters of their requests."""

    name = "vllm"
    started: list[tuple[str, int]]
    used: list[str]
    open = 0
    breaks = False

    def __init__(self, folder: str, encoder: object, *, adapters: Any = (), **options: object) -> None:
        super().__init__()
        type(self).started.append((Path(folder).name, len(adapters)))
        type(self).open += 1
        self.adapter, self.alive = "", [True]

    def adapted(self, adapter: Adapter) -> Self:
        view = type(self).__new__(type(self))
        view.__dict__.update(self.__dict__, adapter=adapter.folder.parent.name)
        return view

    def score(self, *args: Any, **options: Any) -> Any:
        if not self.alive or (self.adapter and type(self).breaks):
            raise EngineFailure("the vLLM engine died; run the same command again to continue", kind="failed")
        type(self).used.append(self.adapter)
        return super().score(*args, **options)

    def close(self) -> None:
        type(self).open -= len(self.alive)
        self.alive.clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Return a function that chooses whether models run on a GPU; vLLM is replaced."""
    Adapting.started, Adapting.used, Adapting.open, Adapting.breaks = [], [], 0, False

    def lookup(table: Any, name: str, what: str) -> Any:
        return Adapting if table is BACKENDS and name == "vllm" else import_component(table, name, what)

    def choose(gpu: bool) -> None:
        for module in ("llmrec.pipeline.engines", "llmrec.answer.checks"):
            monkeypatch.setattr(f"{module}.is_installed", lambda name: True)
        monkeypatch.setattr(engines, "package_versions", lambda: {"llmrec": "0", "vllm": "0.32.0+cpu"})
        monkeypatch.setattr(engines, "import_component", lookup)
        monkeypatch.setattr(engines, "_on_gpu", lambda model: gpu)
        monkeypatch.setattr(engines, "_device", lambda model: "a GPU" if gpu else "cpu")

    return choose


@pytest.fixture(scope="module")
def page(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "shared.yaml"
    file.write_text(f"{PAGE}model: {{name: {llama_folder}, dtype: float32}}\n", encoding="utf-8")
    return file


def test_run_uses_one_engine_for_base_and_adapter_on_gpu(
    device: Callable[[bool], None], page: Path, llama_folder: Path, tmp_path: Path
) -> None:
    device(True)
    done = pipeline.run(load_recipe(str(page)), tmp_path / "r", quiet=True)
    assert Adapting.started == [(llama_folder.name, 1)] and set(Adapting.used) == {"", "r"}
    assert {row["arm"] for row in done.results["rows"]} >= {"zero-shot", "few-shot", "tuned"}
    assert Adapting.open == 0
    # A second run starts nothing. On a CPU, each model has an engine, and answers of the shared engine are not reused.
    pipeline.run(load_recipe(str(page)), tmp_path / "r", quiet=True)
    assert len(Adapting.started) == 1
    Adapting.started = []
    device(False)
    pipeline.run(load_recipe(str(page)), tmp_path / "r", quiet=True)
    assert Adapting.started == [(llama_folder.name, 0), ("merged", 0)]


@pytest.mark.slow
def test_transformers_replace_engine_that_fails_with_adapter(
    device: Callable[[bool], None], page: Path, tmp_path: Path
) -> None:
    device(True)
    Adapting.breaks = True
    done = pipeline.run(load_recipe(str(page)), tmp_path / "r", quiet=True)
    rows = {row["arm"]: row["engine"].partition(":")[0] for row in done.results["rows"] if row["arm"] != "baseline"}
    assert rows == {"zero-shot": "fake", "few-shot": "fake", "tuned": "hf"}
    # The shared engine is closed before transformers load the model.
    assert len(Adapting.started) == 1 and Adapting.open == 0
    # In a service, the base gets an engine again.
    Adapting.started = []
    models = open_models(RecommenderOptions(model=str(tmp_path / "r")), ("tuned", "untuned"))
    for name in ("tuned", "untuned"):
        (result,) = models.answer(Question(model=name), [REQUEST])
        assert len(result.answer.items) == 3  # type: ignore[union-attr]
    models.close()
    assert len(Adapting.started) == 2 and Adapting.open == 0


def tuned(page: Path, folder: Path, *more: str) -> None:
    pipeline.run(load_recipe(str(page), ("eval.arms=[tuned]", "eval.backend=hf", *more)), folder, quiet=True)


@pytest.fixture(scope="module")
def runs(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of one base and catalogue: ``b`` has other templates and another seed."""
    folder = tmp_path_factory.mktemp("runs")
    other = ("tasks.direct.templates=[after-history]", "tasks.direct.strategies=[list]", "seed=3", "train.steps=3")
    for name, more in (("a", ()), ("b", other)):
        tuned(page, folder / name, *more)
    # An engine has one maximum length.
    short = shutil.copytree(folder / "b", folder / "short") / "merged" / BUNDLE_FILE
    write_checked_json(short, {**parse_checked_json(short.read_bytes()), "max_length": 300})
    return folder


def test_service_uses_one_engine_for_model_and_base(
    device: Callable[[bool], None], runs: Path, llama_folder: Path
) -> None:
    device(True)
    for names, started in (
        (("tuned", "untuned"), [(llama_folder.name, 1)]),
        # Merged weights need no adapter.
        (("tuned",), [("merged", 0)]),
    ):
        Adapting.started, Adapting.used = [], []
        models = open_models(RecommenderOptions(model=str(runs / "a"), backend="vllm"), names)
        for name in (*names, *names):
            (result,) = models.answer(Question(model=name), [REQUEST])
            assert len(result.answer.items) == 3  # type: ignore[union-attr]
        assert Adapting.started == started and Adapting.open == 1
        models.close()
        assert Adapting.open == 0
    assert len({model.signature for model in models.opened.values()}) == len(models.opened)


@pytest.mark.slow
def test_service_uses_one_engine_for_several_runs(
    device: Callable[[bool], None], page: Path, runs: Path, llama_folder: Path
) -> None:
    base = llama_folder.name
    tuned(page, runs / "dora", "train.lora.dora=true")
    for gpu, names, started in (
        (True, ("tuned", "b"), [(base, 2)]),
        (True, ("untuned", "b", "tuned"), [(base, 2)]),
        # vLLM does not support one adapter; another model has another maximum length.
        (True, ("tuned", "untuned", "dora"), [(base, 1), ("merged", 0)]),
        (True, ("short", "untuned"), [("merged", 0), (base, 0)]),
        (False, ("tuned", "b"), [("merged", 0), ("merged", 0)]),
    ):
        device(gpu)
        Adapting.started, Adapting.used = [], []
        options = RecommenderOptions(model=str(runs / "a"), backend="vllm", gpu_memory=0.3 if gpu else None)
        models = open_models(options, [str(runs / name) if "tuned" not in name else name for name in names])
        assert tuple(models.opened) == names
        for name in (*names, *names):
            Adapting.used = []
            (result,) = models.answer(Question(model=name, strategy="label"), [REQUEST])
            assert len(result.answer.items) == 3  # type: ignore[union-attr]
            live = started == [(base, 2)] or (started[0] == (base, 1) and name != "dora")
            assert set(Adapting.used) == {{"tuned": "a", "b": "b"}.get(name, "") if live else ""}, (names, name)
        assert Adapting.started == started and Adapting.open == len(started), names
        assert len({model.signature for model in models.opened.values()}) == len(names)
        models.close()
        assert Adapting.open == 0


def test_models_of_several_runs_answer_independently(runs: Path) -> None:
    options: dict[str, Any] = {"backend": "hf", "dtype": "float32"}
    with llmrec.load(str(runs / "a"), models=["tuned", str(runs / "b"), str(runs / "short")], **options) as together:
        assert together.models == ("tuned", "b", "short")
        items = list(together.items)
        question: dict[str, Any] = {"history": items[:3], "candidates": items[5:12]}
        answers = {}
        # Each model answers twice, in turn.
        for name in ("tuned", "b", "tuned", "b"):
            lists = [together.rank(**question, model=name), together.rank(**question, model=name, strategy="label")]
            answers.setdefault(name, lists)
            assert answers[name] == lists
        with raises(LlmrecError, Facts("failed", says="more than the maximum of 300")):
            together.rank(**question, model="short")
        prompts = {name: together._models.prompt(Question(model=name), REQUEST) for name in together.models}
        signatures = {name: together.signature(name) for name in together.models}
    assert answers["tuned"][1] != answers["b"][1] and prompts["tuned"] != prompts["b"] == prompts["short"]
    assert len(set(signatures.values())) == 3
    for name, folder in (("tuned", "a"), ("b", "b")):
        with llmrec.load(str(runs / folder), models=["tuned"], **options) as alone:
            assert answers[name] == [alone.rank(**question), alone.rank(**question, strategy="label")]
            assert prompts[name] == alone._models.prompt(Question(), REQUEST)
    assert describe_default_model(str(runs / "a"), [str(runs / "b")]) == "the default is b"


def test_new_item_is_added_to_all_models(runs: Path) -> None:
    models = open_models(RecommenderOptions(model=str(runs / "a"), backend="hf"), ["tuned", str(runs / "b")])
    before = {card.name: card.signature for card in models.cards()}
    after = {card.name: card.signature for card in models.change_items({"new": Item(item_id="new", title="New")})}
    assert before.keys() == after.keys() == {"tuned", "b"} and not set(before.values()) & set(after.values())
    models.close()


def test_rejects_incompatible_runs(runs: Path, llama_folder: Path, qwen_folder: Path, tmp_path: Path) -> None:
    def altered(name: str, *changes: str) -> str:
        folder = shutil.copytree(runs / "b", tmp_path / name)
        recipe = load_recipe(str(folder / "recipe.yaml"), changes)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        return str(folder)

    base = altered("base", f"model.name={qwen_folder}")
    rows = [f"u{n % 5},k{n % 7},5,{n}" for n in range(35)]
    (table := tmp_path / "table.csv").write_text(
        "\n".join(["user_id,item_id,rating,timestamp", *rows]), encoding="utf-8"
    )
    catalogue = altered("catalogue", f"data={{source: table, path: {table}, noun: products}}")
    unfinished = altered("unfinished")
    shutil.rmtree(Path(unfinished) / "merged")
    codes = Path(altered("codes", "index={scheme: random}"))
    study = build_study(load_stored_recipe(codes))
    assert study.index is not None
    bundle.write(study, codes / "merged")
    study.index.save(codes / "merged" / "index")
    classic = altered("classic", "eval.arms=[]")
    shutil.rmtree(Path(classic) / "merged")
    untuned, again = altered("untuned"), shutil.copytree(runs / "b", tmp_path / "again" / "b")
    a, b = str(runs / "a"), str(runs / "b")
    for model, names, facts in (
        (a, [base], Facts("mismatch", file="base", column="--models", says="base model")),
        (a, [catalogue], Facts("mismatch", file="catalogue", column="--models", says="catalogue")),
        (a, [str(codes)], Facts("mismatch", file="codes", column="--models", says="item codes")),
        (a, [unfinished], Facts("missing-file", file="unfinished", says="llmrec run")),
        (a, [classic], Facts("unsupported", column="--models", says="no language model")),
        (a, [untuned], Facts("duplicate", column="--models", says="rename")),
        (a, [b, str(again)], Facts("duplicate", column="--models", says="'b'")),
        (a, [str(tmp_path / "nowhere")], Facts("unknown-name", column="--models")),
        (str(llama_folder), [b], Facts("unsupported", column="--models", says="give the run folder")),
    ):
        with raises(LlmrecError, facts):
            open_models(RecommenderOptions(model=model, backend="hf"), ["popularity", *names])
    with raises(LlmrecError, Facts("contradiction", column="--models", says="server")):
        open_models(RecommenderOptions(model=a, backend="openai", server_model="m"), [b])


def test_identity_of_shared_engine(device: Callable[[bool], None], llama_folder: Path, tmp_path: Path) -> None:
    device(True)
    section = ModelSection(name=str(llama_folder), dtype="float32")
    encoder = Encoder(load_tokenizer(str(llama_folder), section), max_length=512)
    adapter = Adapter(str(llama_folder), "base", tmp_path / "adapter", "tuned", 8)
    shared = Engines(section, EvalSection(), encoder, 0, StageTimer(), None, adapters=[adapter])
    plain = Engines(section, EvalSection(), encoder, 0, StageTimer(), None)
    for weights in ("base", "tuned"):
        assert shared.identity("vllm", weights) == {**plain.identity("vllm", weights), "adapters": "live"}
        assert shared.identity("hf", weights) == plain.identity("hf", weights)
    assert shared.identity("vllm", "other") == plain.identity("vllm", "other")
    second = Engines(section, EvalSection(), encoder, 0, StageTimer(), None, beside=shared)
    assert second.is_shared("vllm", "tuned") and not plain.is_shared("vllm", "tuned")
    # Another maximum length needs another engine.
    short = Engines(
        section, EvalSection(), Encoder(encoder.tokenizer, max_length=64), 0, StageTimer(), None, beside=shared
    )
    assert not short.is_shared("vllm", "base")
    device(False)
    assert shared.identity("vllm", "tuned") == plain.identity("vllm", "tuned")
