"""One object from requests to answers: what `llmrec rank` writes, asked again and again, whatever stands beside it."""

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
from llmrec.answer.recommender import Answered
from llmrec.data.requests import RankRequest
from llmrec.errors import LlmrecError, RecipeError
from llmrec.pipeline import engines
from llmrec.pipeline.resume import Budget
from llmrec.types import Ranking, Unparsed
from tests.answer.rank_cases import items_csv, jsonl, lines, make_run, options, records
from tests.facts import Facts, raises

pytest.importorskip("torch", reason="the train extra is not installed")


@pytest.fixture(scope="module")
def run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(llama_folder, tmp_path_factory.mktemp("run"))


def plain(model: Path, folder: Path, **changes: Any) -> RecommenderOptions:
    values: dict[str, Any] = {"items": items_csv(folder), "backend": "hf", "dtype": "float32", "batch": 3}
    return RecommenderOptions(model=str(model), **values | changes)


def read(recommender: LanguageModel, found: Sequence[dict[str, Any]]) -> list[RankRequest | Unparsed]:
    return [recommender.read(each, row) for row, each in enumerate(found, start=1)]


def kept(found: Answered) -> tuple[Any, ...]:
    answer = found.answer
    assert isinstance(answer, Ranking), answer
    return answer.items, found.titles, found.notes, found.reasons.texts


# --------------------------------------------------------------------------- what the command writes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "label", "settings": ("permutations=2",), "top": 2, "rationale": 3},
        {"strategy": "two-step"},
        {"candidates": "all", "beams": 4, "rationale": 1},
    ],
    ids=["candidates", "label with rationales", "two-step", "catalogue"],
)
def test_a_file_and_a_call_give_the_same(llama_folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    asked = [*records(4), {"id": "gone", "history": ["nowhere"], "candidates": ["nowhere"] if not changes else ["1"]}]
    chosen = options(
        llama_folder, jsonl(tmp_path / "in.jsonl", asked), tmp_path / "o.jsonl", items=items_csv(tmp_path), **changes
    )
    rank_file(chosen)
    with LanguageModel.open(chosen) as recommender:
        answers = recommender.rank(read(recommender, asked))
    for row, found in zip(lines(chosen.out), answers, strict=True):
        answer = found.answer
        assert row["error"] == (answer.reason if isinstance(answer, Unparsed) else None)
        assert row["items"] == list(answer.items if isinstance(answer, Ranking) else ())
        assert row["scores"] == list(answer.scores if isinstance(answer, Ranking) else ())
        assert (row["titles"], row["notes"]) == (list(found.titles), list(found.notes))
        assert (row["rationale"], row["profile"]) == (found.reasons.texts, found.profile)
        assert row["forwards"] == answer.cost.forwards


def test_candidates_are_retrieved_in_a_call_too(run: Path) -> None:
    asked = RecommenderOptions(
        model=str(run), retrieve="item-knn", k=4, task="direct", backend="hf", dtype="float32", top=3
    )
    with LanguageModel.open(asked) as recommender:
        assert recommender.items is not None
        every = sorted(recommender.items)
        known, own, none, bad = recommender.rank(
            read(recommender, [{"history": every[:2]}, {"candidates": every[:3]}, {"history": every}, {"history": 1}])
        )
    assert (known.retrieved, own.retrieved) == (4, 0)
    assert len(kept(known)[0]) == 3 and not set(kept(known)[0]) & set(every[:2])
    assert sorted(kept(own)[0]) == every[:3]
    assert isinstance(none.answer, Unparsed) and "no item is left to retrieve" in none.answer.reason
    assert isinstance(bad.answer, Unparsed) and "'history' is a number" in bad.answer.reason


# --------------------------------------------------------------------------- asked many times


def test_batches_of_any_size_and_bad_neighbours_change_nothing(llama_folder: Path, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [*records(5), {"id": "long", "history": [{"title": "x y " * 70}] * 20}]
    asked[5]["candidates"] = ["1", "2"]
    with LanguageModel.open(plain(llama_folder, tmp_path, max_length=400)) as recommender:
        requests = read(recommender, [*asked, {"candidates": []}, {"candidates": ["nowhere"]}, {"id": 1.5}])
        bare = RankRequest(id="bare", candidates=())
        together = recommender.rank([*requests, bare, requests[0]])
        alone = [recommender.rank([request])[0] for request in requests[:6]]
        counted: list[int] = []
        assert recommender.rank([], advance=counted.append) == [] and sum(counted) == 0
        recommender.rank([*requests, bare], advance=counted.append)
        assert sum(counted) == len(requests) + 1
    reasons = [found.answer.reason for found in together if isinstance(found.answer, Unparsed)]
    assert [isinstance(found.answer, Unparsed) for found in together] == [False] * 5 + [True] * 5 + [False]
    said = ("400", "is empty", "nowhere", "id is a number", "no 'candidates'")
    assert all(part in reason for reason, part in zip(reasons, said, strict=True)), reasons
    for one, other in zip([*together[:5], together[-1]], [*alone[:5], alone[0]], strict=True):
        assert kept(one) == kept(other)
        assert isinstance(one.answer, Ranking) and isinstance(other.answer, Ranking)
        assert one.answer.scores == pytest.approx(other.answer.scores, abs=1e-3)
    assert isinstance(alone[5].answer, Unparsed) and alone[5].answer.reason == reasons[0]


def test_candidates_where_the_catalogue_is_ranked_are_left_aside(llama_folder: Path, tmp_path: Path) -> None:
    given = plain(llama_folder, tmp_path)
    with LanguageModel.open(given) as recommender:
        request = recommender.read({"history": ["1"], "candidates": ["2", "3"]})
    assert isinstance(request, RankRequest)
    with LanguageModel.open(replace(given, candidates="all", beams=5)) as recommender:
        bare = recommender.read({"history": ["1"]})
        first, second = recommender.rank([request, bare])
    assert kept(first)[:2] == kept(second)[:2] and len(kept(first)[0]) == 5
    assert first.notes == ("candidates: ignored, since all items are ranked",) and second.notes == ()


def test_ids_fail_where_no_item_is_known(run: Path) -> None:
    asked = RecommenderOptions(model=str(run / "merged"), backend="hf", dtype="float32", task="direct")
    with LanguageModel.open(asked) as recommender:
        named, titled = read(
            recommender, [{"id": "a", "history": ["17"], "candidates": [{"title": "Heat"}]},
                          {"id": "b", "history": [{"title": "Jaws"}], "candidates": [{"title": "Heat"}]}]
        )  # fmt: skip
        first, second = recommender.rank([named, titled])
    assert isinstance(first.answer, Unparsed) and first.answer.request_id == "a"
    assert first.answer.reason.startswith("the request names the item '17', but ")
    assert kept(second)[0] == ("Heat",)


# --------------------------------------------------------------------------- the store, threads, the end


def test_answers_are_remembered_only_where_told(llama_folder: Path, tmp_path: Path) -> None:
    given, store = plain(llama_folder, tmp_path), tmp_path / "kept" / "answers.sqlite"
    before = sorted(tmp_path.rglob("*"))
    answers, stages = [], []
    for place in (None, store, store):
        budget = Budget()
        with LanguageModel.open(given, store=place, budget=budget) as recommender:
            answers.append([kept(found) for found in recommender.rank(read(recommender, records(3)))])
        stages.append("start hf" in budget.stages)
        assert store.exists() == (place is not None)
        assert place is not None or sorted(tmp_path.rglob("*")) == before
    assert answers[0] == answers[1] == answers[2]
    assert stages == [True, True, False]


def test_threads_are_answered_one_after_another(llama_folder: Path, tmp_path: Path) -> None:
    with LanguageModel.open(plain(llama_folder, tmp_path), store=tmp_path / "a.sqlite") as recommender:
        requests = read(recommender, records(8))
        with ThreadPoolExecutor(4) as pool:
            threaded = list(pool.map(lambda request: kept(recommender.rank([request])[0]), requests))
        assert threaded == [kept(found) for found in recommender.rank(requests)]


def test_a_closed_recommender_loads_nothing_anew(llama_folder: Path, tmp_path: Path) -> None:
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
        ({"max_length": 15}, Facts("bad-value", column="--max-length", says="less than 16")),
        ({"rationale": -1}, Facts("bad-value", column="--rationale", says="less than 0")),
        ({"dtype": "float8"}, Facts("unknown-name", column="--dtype", says="known: auto, float32, bfloat16, float16")),
        ({"candidates": "al"}, Facts("unknown-name", column="--candidates", says="did you mean 'all'")),
        ({"backend": "hf", "gpu_memory": 0.5}, Facts("contradiction", column="--gpu-memory", says="--backend vllm")),
        ({"backend": "hf", "tensor_parallel": 2}, Facts("contradiction", column="--tensor-parallel", says="is hf")),
        ({"backend": "openai", "enforce_eager": True}, Facts("contradiction", column="--enforce-eager", says="openai")),
    ],
)
def test_options_are_checked_without_a_command_line(changes: dict[str, Any], facts: Facts) -> None:
    with raises(RecipeError, facts):
        LanguageModel.open(RecommenderOptions(model="nowhere", **changes))


def test_options_of_vllm_are_those_of_an_evaluation(llama_folder: Path, tmp_path: Path) -> None:
    asked = {"gpu_memory": 0.4, "tensor_parallel": 2, "enforce_eager": True}
    section = engine_section(RecommenderOptions(model="m", **asked))  # type: ignore[arg-type]
    assert section.backend == "auto" and {name: getattr(section, name) for name in asked} == asked
    for value in (0.0, 2.0):
        with raises(RecipeError, Facts("bad-value", column="--gpu-memory", says="--gpu-memory")):
            LanguageModel.open(plain(llama_folder, tmp_path, backend="auto", gpu_memory=value))
    # There is no second GPU, and the CPU is not taken without a word.
    with raises(RecipeError, Facts("unsupported", column="eval.tensor_parallel", says=("--tensor-parallel", "0 GPUs"))):
        LanguageModel.open(plain(llama_folder, tmp_path, backend="auto", tensor_parallel=2))


def test_two_language_models_share_a_gpu(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "free_share", lambda gpus: 0.8 / gpus)
    plain = RecommenderOptions(model=str(run))

    def shares(names: tuple[str, ...], options: RecommenderOptions = plain) -> list[float | None]:
        models = open_models(options, names)
        models.close()
        return [model.options.gpu_memory for model in models.opened.values() if isinstance(model, LanguageModel)]

    assert shares(("tuned", "untuned")) == [None, None]
    monkeypatch.setattr(language_model, "on_gpu", lambda options, bundle: True)
    assert shares(("tuned", "untuned")) == [0.4, 0.4]
    assert shares(("tuned",)) == [None] and shares(("untuned", "popularity")) == [None]
    assert shares(("tuned", "untuned"), replace(plain, gpu_memory=0.3)) == [0.3, 0.3]
    assert shares(("tuned", "untuned"), replace(plain, backend="hf")) == [None, None]
    # One engine for both takes all that is free.
    monkeypatch.setattr(engines.Engines, "is_shared", lambda self, engine, weights: engine == "vllm")
    assert shares(("tuned", "untuned")) == [None, None]


def test_a_recommender_that_fails_to_open_leaves_nothing(llama_folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(llama_folder, tmp_path / "model")
    with raises(LlmrecError, Facts("missing-key", column="--items")):
        LanguageModel.open(
            RecommenderOptions(model=str(copied), candidates="all", backend="hf"), store=tmp_path / "a.sqlite"
        )
    assert not (tmp_path / "a.sqlite").exists()
