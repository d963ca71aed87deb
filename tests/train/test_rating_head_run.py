"""A recipe with a rating head from data to table: which rows there are, what is kept, exported and refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the train extra is not installed")

from llmrec.errors import ErrorKind, RecipeError
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.exports.export import export
from llmrec.models.load import weights_stamp
from llmrec.models.rating_head import CONFIG, WEIGHTS, load_head
from llmrec.pipeline import run as pipeline
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.tasks.family import family_of
from llmrec.types import Answer, Case, Rating, Request, Unparsed
from tests.facts import Facts, raises

SMALL = (
    "data={source: made-reviews, noun: products, split: {kind: last_share}}",
    "reviews=null",
    "model.dtype=float32",
    "train={steps: 6, batch_tokens: 512, valid_rows: 4, valid_every: 3, save_every: 3, learning_rate: 0.01, "
    "lora: {rank: 4, alpha: 8}}",
    "tasks={rating: {templates: [list-ratings], strategies: [head, expected, parsed], head: {alpha: 0.5}}}",
    "eval={users: 6, backend: hf, bootstrap: 50, arms: [zero-shot, few-shot, tuned], shots: {k: 1}}",
)


def recipe(folder: Path | str, *more: str) -> Recipe:
    return load_recipe("recipes/movielens-100k/four-tasks.yaml", [f"model.name={folder}", *SMALL, *more])


@pytest.fixture(scope="module")
def ran(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Run:
    return pipeline.run(recipe(llama_folder), tmp_path_factory.mktemp("head") / "run", quiet=True)


def test_the_tuned_arm_is_asked_by_its_head_and_the_base_model_by_the_others(ran: pipeline.Run) -> None:
    rows = {(row["arm"], row["predictor"]): row for row in ran.results["rows"] if row["arm"] != "baseline"}
    assert set(rows) == {
        *(("zero-shot", name) for name in ("expected", "parsed")),
        *(("few-shot", name) for name in ("expected", "parsed")),
        ("tuned", "head"),
    }
    head = rows["tuned", "head"]
    assert (head["engine"], head["parse_rate"], head["fallbacks"]) == ("hf:head", 1.0, 0)
    # Random weights write no numbers: the user's mean stands in, and the table says how often.
    parsed = rows["zero-shot", "parsed"]
    assert parsed["fallbacks"] == round((1 - parsed["parse_rate"]) * parsed["n"])
    assert any("base model has no head" in note for note in ran.results["notes"])
    pairs = {(each["a"], each["b"]) for each in ran.results["comparisons"]}
    own = head["id"]
    assert {(own, rows["zero-shot", name]["id"]) for name in ("expected", "parsed")} <= pairs
    assert (own, "rating/baseline/user-item-bias") in pairs
    for row in ran.results["rows"]:
        assert set(row["metrics"]) == {"RMSE", "MAE", "LikedAUC"}
        assert "|how:from-4|" in row["metrics"]["LikedAUC"]["signature"]
    page = ran.report.read_text(encoding="utf-8")
    assert "LikedAUC" in page and "base model has no head" in page


def test_the_head_lies_with_the_weights_and_counts_in_their_hash(ran: pipeline.Run) -> None:
    folder, training = ran.folder, ran.results["training"]
    adapter, merged = load_head(folder / "adapter"), load_head(folder / "merged")
    assert adapter is not None and merged is not None
    assert (folder / "adapter" / WEIGHTS).read_bytes() == (folder / "merged" / WEIGHTS).read_bytes()
    told = json.loads((folder / "merged" / CONFIG).read_text(encoding="utf-8"))
    assert told == {"values": [1.0, 2.0, 3.0, 4.0, 5.0], "alpha": 0.5, "width": 128}
    assert training["merged_sha256"] == weights_stamp(str(folder / "merged"))
    assert training["target_tokens"] > training["steps"]


def test_a_second_run_trains_nothing_and_a_changed_head_is_noticed(
    ran: pipeline.Run, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError("it trained again")

    monkeypatch.setattr("llmrec.pipeline.training._train", refused)
    again = pipeline.run(recipe(llama_folder), ran.folder, quiet=True)
    assert [row["metrics"] for row in again.results["rows"]] == [row["metrics"] for row in ran.results["rows"]]
    # What counts as liked is a matter of evaluation alone.
    pipeline.run(recipe(llama_folder, "tasks.rating.liked=5"), ran.folder, quiet=True)
    with pytest.raises(AssertionError):
        pipeline.run(recipe(llama_folder, "tasks.rating.head.alpha=1"), ran.folder, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_has_the_head(ran: pipeline.Run, llama_folder: Path, tmp_path: Path, dtype: str) -> None:
    pipeline.run(recipe(llama_folder), ran.folder, quiet=True)
    export(ran.folder, tmp_path / "model", check_users=0, dtype=dtype)
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == (ran.folder / "merged" / WEIGHTS).read_bytes()
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert f"  {WEIGHTS}\n" in (tmp_path / "model" / "SHA256SUMS").read_text(encoding="utf-8")
    export(ran.folder, tmp_path / "adapter", check_users=0, adapter_only=True)
    assert (tmp_path / "adapter" / CONFIG).is_file()


@pytest.mark.parametrize(
    ("change", "kind", "key", "says"),
    [
        (["eval.backend=vllm"], "contradiction", None, ("'vllm'", "set eval.backend=hf")),
        (["eval.backend=fake"], "contradiction", None, ("'fake'", "set eval.backend=hf")),
        (["tasks.rating.head=null"], "contradiction", None, "the strategy 'head'"),
        (["tasks.rating.strategies=[expected]"], "contradiction", None, "the strategy 'head'"),
        (["tasks.sequential={}"], "contradiction", None, "set the weight of sequential to 0"),
        (["tasks.rating.weight=0", "eval.arms=[zero-shot]"], "contradiction", None, "give rating a weight"),
        (["tasks.rating.head.alpha=2"], "bad-value", "tasks.rating.head.alpha", ()),
    ],
)
def test_what_has_no_meaning_is_refused(
    change: Sequence[str], kind: ErrorKind, key: str | None, says: str | tuple[str, ...]
) -> None:
    with raises(RecipeError, Facts(kind, column=key, says=says)):
        recipe("any", *change)


def test_tasks_that_are_only_evaluated_may_stand_beside_a_head() -> None:
    assert recipe("any", "tasks.sequential={weight: 0}").tasks.sequential is not None


class Said:
    """Answers that are there already."""

    name = "said"

    def __init__(self, *answers: Answer) -> None:
        self._answers = answers

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return list(self._answers)


def test_liked_items_above_others_with_a_fallback_among_them() -> None:
    truths = [5.0, 4.0, 3.0, 1.0]
    cases = [Case(request=Request(id=f"r{k}", user_id=f"u{k}", item="i"), truth=t) for k, t in enumerate(truths)]
    said = [Rating(request_id=f"r{k}", value=v) for k, v in enumerate([4.5, 3.0, 3.5])]
    protocol = EvalProtocol(split="x", candidates="full", cutoffs=(1,), resamples=20, seed=0, catalogue=9, liked=4.0)
    predictor = Said(*said, Unparsed(request_id="r3", reason="no number"))
    found = evaluate(
        predictor,
        cases,
        name="rating",
        kind=family_of("rating").answer,
        protocol=protocol,
        fallback=lambda request: 3.0,
    )
    # Of 2 x 2 pairs, 4.5 stands above both, 3.0 below 3.5 and level with the fallback.
    assert found.figures.metrics["LikedAUC"].value == pytest.approx((2 + 0 + 0.5) / 4)
    assert (found.figures.fallbacks, found.figures.parse_rate) == (1, 0.75)
    alike = evaluate(Said(said[0]), cases[:1], name="rating", kind=family_of("rating").answer, protocol=protocol)
    assert alike.figures.metrics["LikedAUC"].value is None
