"""The alignment task in complete runs: results, candidates, audit, and start of the item tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from llmrec.baselines.factors import ALS
from llmrec.errors import RecipeError
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.indexing import extend_base_model
from llmrec.pipeline.leaks import audit_alignment, audit_questions, audit_training_rows
from llmrec.pipeline.study import Study, build_study
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.tasks.alignment import AlignmentTask
from llmrec.types import Case, Request, Segment
from tests.facts import Facts, raises
from tests.pipeline.test_audit import prompts_with, rows_with, with_task

pytest.importorskip("trl", reason="the train extra is not installed")

SMALL = (
    *("data={source: made-reviews, noun: products}", "index={scheme: token}", "tasks.alignment.held_out=0.5"),
    *("train.steps=3", "train.batch_tokens=512", "train.valid_rows=4", "train.lora.top_layers=1", "eval.users=6"),
    *("eval.candidates.count=5", "eval.bootstrap=50", "eval.backend=fake", "eval.scorer=fake"),
    "eval.arms=[zero-shot, few-shot, tuned]",
)


def recipe(model: Path | str, *more: str) -> Recipe:
    page = "recipes/movielens-100k/align-semantic.yaml"
    return load_recipe(page, [f"model.name={model}", "model.dtype=float32", *SMALL, *more])


@pytest.fixture(scope="module")
def study() -> Study:
    return build_study(recipe("none"))


def test_training_seed_does_not_change_held_out_items(study: Study) -> None:
    other = build_study(recipe("none", "train.seed=5"))
    task = other.training_tasks["alignment"]
    assert isinstance(task, AlignmentTask) and task.held == study.held == other.held
    rows = list(islice(task.examples("train"), 500))
    assert rows != list(islice(study.training_tasks["alignment"].examples("train"), 500))
    assert not {item for row in rows for _, item in row.pairs} & task.held.items


def test_rejects_trained_template_with_code_and_title() -> None:
    with raises(RecipeError, Facts("contradiction", column="tasks.sequential.templates", says="titled-codes")):
        build_study(recipe("none", "tasks.sequential.templates=[next-code, titled-codes]"))
    build_study(recipe("none", "tasks.sequential.templates=[titled-codes]", "train.without=[sequential]"))


@pytest.fixture(scope="module")
def done(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, pipeline.Run]:
    chosen = recipe(llama_folder)
    return chosen, pipeline.run(chosen, tmp_path_factory.mktemp("run") / "r", quiet=True)


def test_every_arm_is_evaluated_in_both_directions(done: tuple[Recipe, pipeline.Run]) -> None:
    rows = [row for row in done[1].results["rows"] if row["task"] == "alignment"]
    assert {(row["arm"], row["predictor"], row["template"]) for row in rows} == {
        ("baseline", "random", None),
        *((arm, "likelihood", f"alignment/{name}") for arm in ("zero-shot", "few-shot", "tuned")
          for name in ("code-to-title", "text-to-code")),
    }  # fmt: skip
    for row in rows:
        assert row["n"] == row["users"] == 6 and row["parse_rate"] == 1
        assert "|cand:held-out-items-5|" in row["metrics"]["HR@1"]["signature"]
        assert row["metrics"]["HR@1"]["low"] is not None and "NDCG@10" in row["metrics"]
    assert {row["inputs"] for row in rows} >= {
        "the candidates",
        "code of the item",
        "text of the item, 2 solved examples",
    }
    assert done[1].results["headline"]["alignment"] == "NDCG@10"
    assert done[1].results["training"]["rows"]["alignment"] > 0


def test_files_and_report_describe_candidates(done: tuple[Recipe, pipeline.Run]) -> None:
    run, results = done[1], done[1].results
    path = run.folder / "candidates" / "alignment-test.parquet"
    sets, digest = dict(pl.read_parquet(path).iter_rows()), results["candidates"]["alignment"]["digest"]
    assert digest in str(pq.read_schema(path).metadata)
    described = {"digest": digest, "count": 5, "kind": "held-out-items", "ceiling": None}
    assert results["candidates"]["alignment"] == described
    assert results["candidates"]["main"]["digest"] != digest
    assert {row["candidates"] for row in results["rows"] if row["task"] == "alignment"} == {digest}
    page = (run.folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "### Item IDs and item texts" in page and "random HR@1 is 0.200" in page
    answers = pl.read_parquet(run.folder / "predictions.parquet").filter(pl.col("task") == "alignment")
    for request, truth in answers.select("request_id", "truth").iter_rows():
        assert truth in sets[request]
    shown = [each for each in results["examples"] if each["task"] == "alignment"]
    titles = {item.title for item in build_study(done[0]).data.dataset.items.values()}
    assert shown and all(each["truth"] in titles for each in shown)


def test_audit_of_run_has_no_leaks(done: tuple[Recipe, pipeline.Run]) -> None:
    audit = json.loads((done[1].folder / "audit.json").read_text(encoding="utf-8"))
    checks = {check["name"]: check for check in audit["checks"]}
    assert audit["leaks"] == 0
    for name in ("training rows", "few-shot examples"):
        assert checks[f"held-out items in {name} of alignment"]["found"].startswith("none in ")
    assert checks["alignment candidates"]["found"] == "none in 6 sets"
    assert checks["questions of alignment"]["verdict"] == "clean"


def test_token_of_held_out_item_does_not_start_from_its_title(llama_folder: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    session = pipeline.open_session(recipe(llama_folder), tmp_path / "a", quiet=True)
    held, index = session.study.held, session.study.index
    assert held is not None and index is not None and held.items

    def rows(folder: str) -> dict[str, Any]:
        table = safetensors.load_file(Path(folder) / "model.safetensors")["model.embed_tokens.weight"]
        ids = {item: session.encoder.tokenizer.convert_tokens_to_ids(pieces[0]) for item, pieces in index.codes.items()}
        return {item: table[row] for item, row in ids.items()}

    renamed = {
        item: replace(entry, title="A different name") if item in held.items else entry
        for item, entry in session.study.data.dataset.items.items()
    }
    data = replace(session.study.data, dataset=replace(session.study.data.dataset, items=renamed))
    chosen = recipe(llama_folder)
    bases = [
        extend_base_model(
            str(llama_folder), chosen.model, chosen.index, index, data, tmp_path / name, seed=0, held=items
        )
        for name, items in (("b", held), ("c", None))
    ]
    before, hidden, shown = rows(session.base), rows(bases[0]), rows(bases[1])
    assert all(np.array_equal(before[item], hidden[item]) for item in held.items)
    assert any(not np.array_equal(before[item], shown[item]) for item in held.items)


def test_tokens_can_start_from_vectors_of_a_recommender(llama_folder: Path, tmp_path: Path) -> None:
    """Items of the same users get similar rows; an item without training interactions starts at random."""
    pytest.importorskip("implicit")
    safetensors = pytest.importorskip("safetensors.numpy")
    starts = {}
    for start in ("collaborative", "random"):
        changed = [f"model.name={llama_folder}", "model.dtype=float32", SMALL[0], f"index.tokens={start}"]
        chosen = load_recipe("recipes/movielens-100k/item-tokens.yaml", changed)
        session = pipeline.open_session(chosen, tmp_path / start, quiet=True)
        index = session.study.index
        assert index is not None
        table = safetensors.load_file(Path(session.base) / "model.safetensors")["model.embed_tokens.weight"]
        ids = {item: session.encoder.tokenizer.convert_tokens_to_ids(code[0]) for item, code in index.codes.items()}
        starts[start] = {item: table[row] for item, row in ids.items()}
    model = ALS(seed=chosen.seed)
    model.fit(session.study.data)
    known = model.item_vectors()
    assert 2 < len(known) <= len(starts["random"])
    items = sorted(known)

    def similarities(vectors: Any) -> Any:
        rows = np.stack([vectors[item] for item in items]).astype(float)
        rows -= rows.mean(axis=0)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows @ rows.T)[np.triu_indices(len(items), 1)]

    correlations = [np.corrcoef(similarities(known), similarities(each))[0, 1] for each in starts.values()]
    assert correlations[0] > 0.3 > correlations[1]


# --------------------------------------------------------------------------- planted leaks


def leaking(study: Study) -> list[str]:
    return [check.name for check in audit_alignment(study, 60) if check.verdict == "leak"]


def test_audit_finds_planted_leaks(study: Study) -> None:
    assert study.held is not None and study.index is not None
    task, item, valid = study.tasks["alignment"], study.held.test[0], study.held.valid[0]
    assert leaking(study) == []
    title, code = study.data.dataset.items[item].title, study.index.encode(item)
    both = rows_with(
        study, "alignment", lambda row: replace(row, answer=(Segment("item", title), Segment("target", code)))
    )
    assert leaking(both) == ["held-out items in training rows of alignment"]
    declared = rows_with(study, "alignment", lambda row: replace(row, pairs=(("", item),)))
    assert leaking(declared) == ["held-out items in training rows of alignment"]
    alone = rows_with(study, "alignment", lambda row: replace(row, answer=(Segment("target", code),)))
    assert leaking(alone) == []

    def changed(change: Callable[[Case], dict[str, Any]]) -> Study:
        def cases(split: Any) -> list[Case]:
            first, *rest = task.cases(split)
            return [replace(first, request=replace(first.request, **change(first))), *rest]

        return with_task(study, "alignment", cases=cases)

    for wrong in (
        changed(lambda case: {"candidates": [c for c in case.request.candidates or () if c != case.truth]}),
        changed(lambda case: {"candidates": [*(case.request.candidates or ()), (case.request.candidates or ())[0]]}),
        changed(lambda case: {"candidates": [*(case.request.candidates or ()), valid]}),
        changed(lambda case: {"item": case.truth}),
    ):
        assert leaking(wrong) == ["alignment candidates"]


def test_audit_checks_questions_in_the_expected_form(study: Study) -> None:
    task: Any = study.tasks["alignment"]
    truth = {case.request.id: str(case.truth) for case in task.cases("test")}
    assert audit_questions(study, "alignment").verdict == "clean" and study.index is not None
    forms: dict[bool, Any] = {True: study.index.encode, False: lambda item: study.data.dataset.items[item].title}
    for name in ("code-to-title", "text-to-code"):

        def hint(request: Request, template: str, name: str = name) -> str:
            return str(forms[name == "text-to-code"](truth[request.id])) if template == name else ""

        check = audit_questions(prompts_with(study, "alignment", hint), "alignment")
        assert check.verdict == "leak" and f"alignment/{name} shows the answer" in check.examples[0]


# --------------------------------------------------------------------------- recipes


def test_rejects_recipe_without_codes() -> None:
    with raises(RecipeError, Facts("contradiction", column="tasks.alignment", says="index: {scheme: semantic}")):
        recipe("none", "index=null")
    with raises(RecipeError, Facts("contradiction", column="index.scheme", says=("'title'", "such as semantic"))):
        recipe("none", "index={scheme: title}")


def test_alignment_keeps_its_candidates_in_catalogue_runs() -> None:
    study = build_study(recipe("none", "eval.candidates.kind=catalogue", "tasks.sequential.strategies=[search]"))
    assert study.candidates is None and study.sets("sequential") is None
    assert study.sets("alignment") is study.aligned is not None
    cases: list[Case] = study.cases("alignment")
    assert all(len(case.request.candidates or ()) == 5 for case in cases)


def test_model_card_shows_question(done: tuple[Recipe, pipeline.Run]) -> None:
    """Cards show a prompt about invented items."""
    from llmrec.exports.card_facts import example_prompt
    from llmrec.pipeline import bundle

    stored = bundle.read(str(done[1].folder))
    sections = {"alignment": stored.tasks.present()["alignment"]}
    sample = example_prompt(sections, stored.templates, noun="products", scale=None, seed=0, index=stored.index)
    assert sample.family == "alignment" and sample.candidates == ()
    (turn,) = sample.prompt.messages
    assert turn.text.startswith("Each of these products has a code.") and "<item_" in turn.text


@pytest.mark.parametrize(
    ("name", "form"), [("titles-to-code", "title"), ("titles-to-code", "code"), ("continue-codes", "code")]
)
def test_audit_checks_the_forms_of_a_template(name: str, form: str) -> None:
    study = build_study(recipe("none", f"tasks.sequential.templates=[{name}]", "tasks.alignment=null"))
    index = study.index
    assert index is not None
    assert (
        audit_questions(study, "sequential").verdict == audit_training_rows(study, "sequential", 60).verdict == "clean"
    )

    def written(item: str) -> str:
        return index.encode(item) if form == "code" else study.data.dataset.items[item].title

    held, hint = study.data.holdouts("test")[0], Segment("item", written(study.data.holdouts("test")[0].item_id))
    shown = rows_with(study, "sequential", lambda row: replace(row, user_id=held.user_id, answer=(hint, *row.answer)))
    assert audit_training_rows(shown, "sequential", 60).verdict == "leak"
    truth = {case.request.id: str(case.truth) for case in study.cases("sequential")}
    shown = prompts_with(study, "sequential", lambda request, _: written(truth[request.id]))
    assert audit_questions(shown, "sequential").verdict == "leak"
