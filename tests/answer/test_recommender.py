"""`LanguageModel`: the results of `llmrec rank` in Python, batches, stores, threads and options."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmrec.answer import language_model, opening
from llmrec.answer.checks import engine_section
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.opening import open_models
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.rank.run import rank_file
from llmrec.answer.recommender import AnnotatedAnswer
from llmrec.data.requests import RankRequest
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline import engines
from llmrec.pipeline.resume import StageTimer
from llmrec.types import Ranking, Unparsed
from tests.answer.rank_cases import items_csv, jsonl, lines, options, records
from tests.facts import Facts, raises

pytest.importorskip("torch", reason="the train extra is not installed")


def plain(model: Path, folder: Path, **changes: Any) -> RecommenderOptions:
    values: dict[str, Any] = {"items": items_csv(folder), "backend": "hf", "dtype": "float32", "batch": 3}
    return RecommenderOptions(model=str(model), **values | changes)


def read(recommender: LanguageModel, requests: Sequence[dict[str, Any]]) -> list[RankRequest | Unparsed]:
    return [recommender.read(each, row) for row, each in enumerate(requests, start=1)]


def kept(result: AnnotatedAnswer) -> tuple[Any, ...]:
    answer = result.answer
    assert isinstance(answer, Ranking), answer
    return answer.items, result.titles, result.notes, result.reasons.texts


@pytest.mark.parametrize("changes", [
    {}, {"strategy": "label", "settings": ("permutations=2",), "top": 2, "rationale": 3}, {"strategy": "two-step"},
    {"candidates": "all", "beams": 4, "rationale": 1},
], ids=["candidates", "label with rationales", "two-step", "catalogue"])  # fmt: skip
def test_call_equals_file(llama_folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    unknown = {"id": "gone", "history": ["nowhere"], "candidates": ["1"] if changes else ["nowhere"]}
    requests = [*records(4), unknown]
    chosen = options(
        llama_folder, jsonl(tmp_path / "in.jsonl", requests), tmp_path / "o.jsonl", items=items_csv(tmp_path), **changes
    )
    rank_file(chosen)
    with LanguageModel.open(chosen) as recommender:
        answers = recommender.rank(read(recommender, requests))
    for row, result in zip(lines(chosen.out), answers, strict=True):
        answer = result.answer
        assert row["error"] == (answer.reason if isinstance(answer, Unparsed) else None)
        assert row["items"] == list(answer.items if isinstance(answer, Ranking) else ())
        assert row["scores"] == list(answer.scores if isinstance(answer, Ranking) else ())
        assert (row["titles"], row["notes"]) == (list(result.titles), list(result.notes))
        assert (row["rationale"], row["profile"]) == (result.reasons.texts, result.profile)
        assert row["forwards"] == answer.cost.forwards
        assert len(row["rationale"]) == min(changes.get("rationale", 0), len(row["items"]))


def test_batch_size_and_bad_requests_do_not_matter(llama_folder: Path, tmp_path: Path) -> None:
    records_: list[dict[str, Any]] = [*records(5), {"id": "long", "history": [{"title": "x y " * 70}] * 20}]
    records_[5]["candidates"] = ["1", "2"]
    with LanguageModel.open(plain(llama_folder, tmp_path, max_length=400)) as recommender:
        requests = read(recommender, [*records_, {"candidates": []}, {"candidates": ["nowhere"]}, {"id": 1.5}])
        bare = RankRequest(id="bare", candidates=())
        together = recommender.rank([*requests, bare, requests[0]])
        alone = [recommender.rank([request])[0] for request in requests[:6]]
        counted: list[int] = []
        assert recommender.rank([], advance=counted.append) == [] and sum(counted) == 0
        recommender.rank([*requests, bare], advance=counted.append)
        assert sum(counted) == len(requests) + 1
    reasons = [result.answer.reason for result in together if isinstance(result.answer, Unparsed)]
    assert [isinstance(result.answer, Unparsed) for result in together] == [False] * 5 + [True] * 5 + [False]
    expected = ("400", "is empty", "nowhere", "id is a number", "no 'candidates'")
    assert all(part in reason for reason, part in zip(reasons, expected, strict=True)), reasons
    for one, other in zip([*together[:5], together[-1]], [*alone[:5], alone[0]], strict=True):
        assert kept(one) == kept(other)
        assert isinstance(one.answer, Ranking) and isinstance(other.answer, Ranking)
        assert one.answer.scores == pytest.approx(other.answer.scores, abs=1e-3)
    assert isinstance(alone[5].answer, Unparsed) and alone[5].answer.reason == reasons[0]


def test_candidates_are_ignored_for_whole_catalogue(llama_folder: Path, tmp_path: Path) -> None:
    settings = plain(llama_folder, tmp_path)
    with LanguageModel.open(settings) as recommender:
        request = recommender.read({"history": ["1"], "candidates": ["2", "3"]})
    assert isinstance(request, RankRequest)
    with LanguageModel.open(replace(settings, candidates="all", beams=5)) as recommender:
        bare = recommender.read({"history": ["1"]})
        first, second = recommender.rank([request, bare])
    assert kept(first)[:2] == kept(second)[:2] and len(kept(first)[0]) == 5
    assert first.notes == ("candidates: ignored, since all items are ranked",) and second.notes == ()


def test_ids_need_items(tuned: Path) -> None:
    settings = RecommenderOptions(model=str(tuned / "merged"), backend="hf", dtype="float32", task="direct")
    with LanguageModel.open(settings) as recommender:
        named, titled = read(
            recommender, [{"id": "a", "history": ["17"], "candidates": [{"title": "Heat"}]},
                          {"id": "b", "history": [{"title": "Jaws"}], "candidates": [{"title": "Heat"}]}]
        )  # fmt: skip
        first, second = recommender.rank([named, titled])
    assert isinstance(first.answer, Unparsed) and first.answer.request_id == "a"
    assert first.answer.reason.startswith("the request names the item '17', but ")
    assert kept(second)[0] == ("Heat",)


def test_answers_are_stored_only_on_request(llama_folder: Path, tmp_path: Path) -> None:
    settings, store = plain(llama_folder, tmp_path), tmp_path / "kept" / "answers.sqlite"
    before = sorted(tmp_path.rglob("*"))
    answers, stages = [], []
    for path in (None, store, store):
        budget = StageTimer()
        with LanguageModel.open(settings, store=path, budget=budget) as recommender:
            answers.append([kept(result) for result in recommender.rank(read(recommender, records(3)))])
        stages.append("start hf" in budget.stages)
        assert store.exists() == (path is not None)
        assert path is not None or sorted(tmp_path.rglob("*")) == before
    assert answers[0] == answers[1] == answers[2]
    assert stages == [True, True, False]


def test_concurrent_requests(llama_folder: Path, tmp_path: Path) -> None:
    with LanguageModel.open(plain(llama_folder, tmp_path), store=tmp_path / "a.sqlite") as recommender:
        requests = read(recommender, records(8))
        with ThreadPoolExecutor(4) as pool:
            threaded = list(pool.map(lambda request: kept(recommender.rank([request])[0]), requests))
        assert threaded == [kept(result) for result in recommender.rank(requests)]


def test_closed_recommender_raises(llama_folder: Path, tmp_path: Path) -> None:
    recommender = LanguageModel.open(plain(llama_folder, tmp_path))
    request = recommender.read({"candidates": ["1", "2"]})
    recommender.close()
    recommender.close()
    with raises(LlmrecError, Facts("closed")):
        recommender.rank([request])


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"batch": 0}, Facts("bad-value", column="--batch", says="less than 1")),
        ({"dtype": "float8"}, Facts("unknown-name", column="--dtype", says="known: auto, float32, bfloat16, float16")),
        ({"candidates": "al"}, Facts("unknown-name", column="--candidates", says="did you mean 'all'")),
        ({"backend": "hf", "gpu_memory": 0.5}, Facts("contradiction", column="--gpu-memory", says="--backend vllm")),
        ({"backend": "openai", "enforce_eager": True}, Facts("contradiction", column="--enforce-eager", says="openai")),
    ],
)
def test_invalid_options_are_refused(changes: dict[str, Any], facts: Facts) -> None:
    with raises(RecipeError, facts):
        LanguageModel.open(RecommenderOptions(model="nowhere", **changes))


def test_vllm_options(llama_folder: Path, tmp_path: Path) -> None:
    settings = {"gpu_memory": 0.4, "tensor_parallel": 2, "enforce_eager": True}
    section = engine_section(RecommenderOptions(model="m", **settings))  # type: ignore[arg-type]
    assert section.backend == "auto" and {name: getattr(section, name) for name in settings} == settings
    for value in (0.0, 2.0):
        with raises(RecipeError, Facts("bad-value", column="--gpu-memory", says="--gpu-memory")):
            LanguageModel.open(plain(llama_folder, tmp_path, backend="auto", gpu_memory=value))
    # There is no second GPU, and no silent fallback to the CPU.
    with raises(RecipeError, Facts("unsupported", column="eval.tensor_parallel", says=("--tensor-parallel", "0 GPUs"))):
        LanguageModel.open(plain(llama_folder, tmp_path, backend="auto", tensor_parallel=2))


def test_two_language_models_share_a_gpu(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "free_gpu_share", lambda gpus: 0.8 / gpus)
    plain = RecommenderOptions(model=str(tuned))

    def shares(names: tuple[str, ...], options: RecommenderOptions = plain) -> list[float | None]:
        models = open_models(options, names)
        models.close()
        return [model.options.gpu_memory for model in models.opened.values() if isinstance(model, LanguageModel)]

    assert shares(("tuned", "untuned")) == [None, None]
    monkeypatch.setattr(language_model, "on_gpu", lambda options, bundle: True)
    assert shares(("tuned", "untuned")) == [0.4, 0.4]
    assert shares(("tuned",)) == [None]
    assert shares(("tuned", "untuned"), replace(plain, gpu_memory=0.3)) == [0.3, 0.3]
    assert shares(("tuned", "untuned"), replace(plain, backend="hf")) == [None, None]
    # One engine for both uses all free memory.
    monkeypatch.setattr(engines.Engines, "is_shared", lambda self, engine, weights: engine == "vllm")
    assert shares(("tuned", "untuned")) == [None, None]


def test_failed_open_leaves_no_files(llama_folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(llama_folder, tmp_path / "model")
    with raises(LlmrecError, Facts("missing-key", column="--items")):
        LanguageModel.open(
            RecommenderOptions(model=str(copied), candidates="all", backend="hf"), store=tmp_path / "a.sqlite"
        )
    assert not (tmp_path / "a.sqlite").exists()
