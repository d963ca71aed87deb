"""Complete runs over item codes on a tiny model, and rankings with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from llmrec.answer.rank.run import rank_file
from llmrec.data.split import SplitDataset
from llmrec.errors import LlmrecError, RecipeError
from llmrec.exports.export import export
from llmrec.index.numbers import SequentialNumbers
from llmrec.index.table import ItemIndex
from llmrec.pipeline import leaks
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import IndexSection, Recipe
from llmrec.registry import INDEXES
from llmrec.report import index_summary
from tests.answer import rank_cases
from tests.facts import Facts, raises

pytest.importorskip("trl", reason="the train extra is not installed")

SMALL = (
    *("data={source: made-reviews, noun: products}", "train.steps=3", "train.batch_tokens=512", "train.valid_rows=4"),
    *("train.lora.top_layers=1", "eval.users=6", "eval.candidates.count=5", "eval.bootstrap=50", "eval.backend=hf"),
)
TREE = "index={scheme: collaborative, collaborative: {clusters: 3, leaf: 8}}"
MEANING = "index={scheme: semantic, semantic: {levels: 2, codes: 6}}"


def recipe(model: Path, *more: str) -> Recipe:
    page = "recipes/movielens-100k/index-title.yaml"
    return load_recipe(page, [f"model.name={model}", "model.dtype=float32", *SMALL, *more])


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(
    scope="module",
    params=[
        MEANING,
        *(
            pytest.param(index, marks=pytest.mark.slow)
            for index in (TREE, "index={scheme: title}", "index={scheme: token}")
        ),
    ],
)
def done(
    request: pytest.FixtureRequest, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, pipeline.Run]:
    chosen = recipe(llama_folder, request.param)
    return chosen, pipeline.run(chosen, tmp_path_factory.mktemp("run") / "r", quiet=True)


def answers(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "predictions.parquet").filter(pl.col("row_id").str.contains("tuned"))


def test_run_asks_and_answers_in_codes(done: tuple[Recipe, pipeline.Run]) -> None:
    chosen, run = done
    study = build_study(chosen)
    assert study.index is not None
    results = answers(run.folder)
    assert len(results) == 6 and results["error"].null_count() == 6
    (row,) = [row for row in run.results["rows"] if row["arm"] == "tuned"]
    assert row["template"] == "sequential/continue-codes"
    (shown,) = {line for line in run.results["examples"][0]["prompt"].splitlines() if "code" in line}
    assert "the code of one" in shown
    codes = {study.index.encode(item) for item in study.index.codes}
    listed = run.results["examples"][0]["prompt"].rpartition("assistant\n")[2].splitlines()
    assert listed and set(listed) <= codes
    # The report shows neighbours in the index.
    near = index_summary.read_neighbours(run.folder)
    part = run.report.read_text("utf-8").partition('<section id="neighbours"')[2].partition("</section>")[0]
    assert (
        bool(near) is (study.index.scheme in ("collaborative", "semantic")) and part.count("<article") == len(near) <= 6
    )


def test_audit_of_run_over_codes_has_no_leaks(done: tuple[Recipe, pipeline.Run]) -> None:
    audit = json.loads((done[1].folder / "audit.json").read_text())
    checks = {check["name"]: check for check in audit["checks"]}
    gate = checks["item index that learned from held-out interactions"]
    assert gate["verdict"] == "clean" and "stay the same" in gate["found"]
    assert "code arithmetic" in checks and audit["leaks"] == 0


def test_second_run_changes_no_weights(done: tuple[Recipe, pipeline.Run]) -> None:
    chosen, run = done
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.safetensors")}
    again = pipeline.run(chosen, run.folder, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.safetensors")} == before
    assert again.results["rows"] == run.results["rows"]


def test_run_with_leaking_index_has_no_results(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaking(SequentialNumbers):
        @staticmethod
        def build(section: IndexSection, data: SplitDataset, *, seed: int, embed: Any = None) -> ItemIndex:
            """Number items in the order of complete histories, like the files of P5."""
            rows = data.dataset.interactions.sort("user_id", "timestamp")
            order = rows["item_id"].unique(maintain_order=True).to_list()
            return ItemIndex("sequential", {item: (str(n),) for n, item in enumerate(order, 1001)})

    monkeypatch.setitem(INDEXES, "sequential", "test_index_runs:Leaking")  # type: ignore[arg-type]
    monkeypatch.setattr("test_index_runs.Leaking", Leaking, raising=False)
    chosen = recipe(llama_folder, "index={scheme: sequential}", "eval.arms=[zero-shot]")
    with raises(LlmrecError, Facts("leak", "audit.json", says="this run leaks held-out data")):
        pipeline.run(chosen, tmp_path / "r", quiet=True)
    results = json.loads((tmp_path / "r" / "audit.json").read_text())
    (leak,) = [check for check in results["checks"] if check["verdict"] == "leak"]
    assert leak["name"] == "item index that learned from held-out interactions" and results["leaks"] == 1
    assert "codes depend on held-out interactions" in leak["found"]
    page = (tmp_path / "r" / "report" / "index.html").read_text()
    assert "This run leaks held-out data, so its report has no results." in page


def test_audit_cannot_test_codes_from_a_file(llama_folder: Path, tmp_path: Path) -> None:
    plain = build_study(recipe(llama_folder, "index={scheme: random}"))
    assert plain.index is not None
    (tmp_path / "codes.json").write_text(json.dumps({item: [n, 0] for n, item in enumerate(plain.index.codes)}))
    study = build_study(recipe(llama_folder, f"index={{scheme: external, path: {tmp_path}/codes.json}}"))
    check = leaks.audit_item_index(study)
    assert check is not None and check.verdict == "notice" and "not tested" in check.found
    assert leaks.audit_item_index(replace(study, index=None)) is None


def test_run_folder_removes_tokens_of_another_index(llama_folder: Path, tmp_path: Path) -> None:
    pipeline.open_session(recipe(llama_folder, "index={scheme: token}"), tmp_path / "r", quiet=True)
    assert (tmp_path / "r" / "base.json").is_file() and (tmp_path / "r" / "base").is_dir()
    pipeline.open_session(recipe(llama_folder, "index={scheme: random}"), tmp_path / "r", quiet=True)
    assert not (tmp_path / "r" / "base.json").exists() and not (tmp_path / "r" / "base").exists()


def test_rejects_template_of_codes_without_index(llama_folder: Path) -> None:
    with raises(RecipeError, Facts("unsupported", "sequential/continue-codes", says="index: {scheme: semantic}")):
        build_study(recipe(llama_folder, "index=null"))


def test_run_over_catalogue(llama_folder: Path, tmp_path: Path) -> None:
    catalogue = ("eval.candidates={kind: catalogue}", "tasks.sequential.strategies=[search]", "eval.beams=5")
    run = pipeline.run(recipe(llama_folder, TREE, *catalogue, "eval.arms=[zero-shot]"), tmp_path / "r", quiet=True)
    (row,) = [row for row in run.results["rows"] if row["arm"] != "baseline"]
    assert row["engine"] == "hf:tree" and row["candidates"] is None
    assert {figure["signature"].split("|cand:")[1].split("|")[0] for figure in row["metrics"].values()} == {"full"}
    assert not (tmp_path / "r" / "candidates").exists()
    for _, parsed in answers_of(tmp_path / "r", "zero-shot"):
        assert len(parsed["items"]) == 5 == len(set(parsed["items"]))
    for wrong, says in (
        ("tasks.sequential.strategies=[likelihood]", "strategies: [search]"),
        ("eval.candidates={kind: uniform, count: 5}", "eval.candidates.kind=catalogue"),
    ):
        with raises(RecipeError, Facts("contradiction", column="tasks.sequential.strategies", says=says)):
            recipe(llama_folder, TREE, *catalogue, wrong)
    # Without a language model the strategies do not matter.
    recipe(llama_folder, TREE, catalogue[0], "eval.arms=[]")


def answers_of(folder: Path, arm: str) -> list[tuple[str, Any]]:
    rows = pl.read_parquet(folder / "predictions.parquet").filter(pl.col("row_id").str.contains(arm))
    return [(request, json.loads(parsed)) for request, parsed in rows.select("request_id", "parsed").iter_rows()]


# --------------------------------------------------------------------------- rankings with the run


def ranked(
    model: Path, tmp_path: Path, items: Path | None, rows: list[dict[str, Any]], **more: Any
) -> list[dict[str, Any]]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = {"items": items, "batch": 8, "restart": True, **more}
    rank_file(rank_cases.options(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", **more))
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_new_items_are_ranked_if_the_scheme_encodes_them(done: tuple[Recipe, pipeline.Run], tmp_path: Path) -> None:
    chosen, run = done
    known = sorted(build_study(chosen).data.dataset.items)[:4]
    new = {"item_id": "new-1", "title": "A kettle that sings"}
    rows = [
        {"id": "known", "history": known[:2], "candidates": known[2:]},
        {"id": "new", "history": known[:2], "candidates": [*known[2:], new]},
        {"id": "again", "history": [new, known[0]], "candidates": known[2:]},
    ]
    results = {row["request_id"]: row for row in ranked(run.folder, tmp_path, None, rows)}
    assert sorted(results["known"]["items"]) == known[2:]
    assert chosen.index is not None
    if chosen.index.scheme == "token":
        assert "one token per item" in results["new"]["error"] and "one token per item" in results["again"]["error"]
    else:
        assert sorted(results["new"]["items"]) == sorted([*known[2:], "new-1"])
        assert sorted(results["again"]["items"]) == known[2:]


def test_title_is_not_mistaken_for_an_id(done: tuple[Recipe, pipeline.Run], tmp_path: Path) -> None:
    chosen, run = done
    assert chosen.index is not None
    if chosen.index.scheme == "token":
        pytest.skip("new items have no token")
    known = sorted(build_study(chosen).data.dataset.items)
    # A title that is the id of another item.
    rows = [{"id": "t", "history": known[:2], "candidates": [known[2], {"title": known[3]}]}]
    (by_title,) = ranked(run.folder, tmp_path, None, rows)
    plain = [{"id": "t", "history": known[:2], "candidates": [known[2], known[3]]}]
    (tmp_path / "b").mkdir()
    (other,) = ranked(run.folder, tmp_path / "b", None, plain)
    scores = [dict(zip(each["items"], each["scores"], strict=True))[known[3]] for each in (by_title, other)]
    assert abs(scores[0] - scores[1]) > 1e-3


def test_known_items_need_no_text_encoder(
    done: tuple[Recipe, pipeline.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmrec.pipeline import indexing

    chosen, run = done
    monkeypatch.setattr(indexing, "text_embedder", lambda name: pytest.fail("the text encoder was opened"))
    known = sorted(build_study(recipe(Path(chosen.model.name), "index={scheme: random}")).data.dataset.items)
    (result,) = ranked(run.folder, tmp_path, None, [{"id": "k", "history": known[:3]}], candidates="all", beams=4)
    assert len(result["items"]) == 4


def test_catalogue_is_ranked_for_a_history(done: tuple[Recipe, pipeline.Run], tmp_path: Path) -> None:
    chosen, run = done
    study = build_study(chosen)
    known = sorted(study.data.dataset.items)
    rows = [
        {"id": "warm", "history": known[:3]},
        {"id": "cold", "history": [], "candidates": ["ignored"]},
        {"id": "all but two", "history": known[2:]},
        {"id": "broken", "history": 7},
    ]
    lists = ranked(run.folder, tmp_path, None, rows, candidates="all", beams=6, exact=True)
    results = {row["request_id"]: row for row in lists}
    for name, history in (("warm", known[:3]), ("cold", []), ("all but two", known[2:])):
        items = results[name]["items"]
        assert len(items) == len(set(items)) == min(6, len(known) - len(history))
        assert not set(items) & set(history) and set(items) <= set(known)
        assert results[name]["scores"] == sorted(results[name]["scores"], reverse=True)
    assert any("ignored" in note for note in results["cold"]["notes"])
    assert "'history' is" in results["broken"]["error"]
    # An exact list equals the ranking by scores of all items.
    (tmp_path / "one").mkdir()
    pool = [item for item in known if item not in known[:3]]
    one = ranked(run.folder, tmp_path / "one", None, [{"id": "w", "history": known[:3], "candidates": pool}])
    assert one[0]["items"][:6] == results["warm"]["items"]
    assert one[0]["scores"][:6] == pytest.approx(results["warm"]["scores"], abs=1e-3)


def test_export_contains_codes_and_answers_alike(done: tuple[Recipe, pipeline.Run], tmp_path: Path) -> None:
    chosen, run = done
    assert chosen.index is not None
    exported = export(run.folder, tmp_path / "model", with_items=False, check_users=2)
    assert exported.agreement is not None and exported.agreement.logit < 1e-3
    assert (tmp_path / "model" / "index").is_dir() == (chosen.index.scheme != "title")
    items = build_study(chosen).data.dataset.items
    known = sorted(items)[:4]
    titled = [{"item_id": item, "title": items[item].title} for item in known]
    rows = [{"id": "r", "history": titled[:2], "candidates": titled[2:]}]
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
    one, two = ranked(run.folder, tmp_path / "a", None, rows), ranked(tmp_path / "model", tmp_path / "b", None, rows)
    assert one[0]["items"] == two[0]["items"] and one[0]["scores"] == pytest.approx(two[0]["scores"], abs=1e-3)
    if chosen.index.scheme != "title":
        with raises(LlmrecError, Facts("unsupported", column="--adapter-only")):
            export(run.folder, tmp_path / "adapter", check_users=0, adapter_only=True)


def test_untuned_arms_use_titles_and_tuned_arm_uses_item_tokens(llama_folder: Path, tmp_path: Path) -> None:
    chosen = recipe(
        llama_folder,
        "index={scheme: token}",
        # The index does not contain the items of the second table.
        "reviews={source: made-reviews}",
        "tasks={sequential: {templates: [bare-codes], untuned_templates: [continue-list], history: 5, window: 6}, "
        "explanation: {users: 4, max_tokens: 4, arms: [tuned]}}",
        "train.softmax=items",
        "eval.arms=[zero-shot, few-shot, tuned]",
        "eval.shots.k=1",
    )
    session = pipeline.open_session(chosen, tmp_path / "s", quiet=True)
    # Titles are read by the base model, without untrained rows of item tokens.
    assert session.base == str(llama_folder) and session.start == str(tmp_path / "s" / "base")
    run = pipeline.run(chosen, tmp_path / "r", quiet=True)
    templates = {
        row["arm"]: row["template"] for row in run.results["rows"] if row["template"] and row["task"] == "sequential"
    }
    assert templates == {
        "zero-shot": "sequential/continue-list",
        "few-shot": "sequential/continue-list",
        "tuned": "sequential/bare-codes",
    }
    results = answers(run.folder)
    assert len(results) == results["error"].null_count() == 6 + 4
    zero, tuned = (
        next(row["id"] for row in run.results["rows"] if row["arm"] == arm) for arm in ("zero-shot", "tuned")
    )
    planned = {(each["a"], each["b"]) for each in run.results["comparisons"] if each.get("verdict")}
    assert (tuned, zero) in planned


def test_rejects_item_softmax_without_item_tokens(llama_folder: Path, tmp_path: Path) -> None:
    chosen = recipe(llama_folder, "tasks={sequential: {templates: [continue-list]}}", "train.softmax=items")
    with raises(RecipeError, Facts("contradiction", column="train.softmax", says="scheme: token")):
        pipeline.run(chosen, tmp_path / "r", quiet=True)
