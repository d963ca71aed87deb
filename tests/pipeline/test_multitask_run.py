"""Mixtures, untrained tasks, and training in two stages, on tiny random models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmrec.errors import LlmrecError, RecipeError
from llmrec.exports.export import export
from llmrec.pipeline import run as pipeline
from llmrec.pipeline import runs
from llmrec.pipeline.study import Study, build_study, encoder_of
from llmrec.pipeline.training import plan_training, training_key
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.report.plots import loss_plot
from llmrec.report.results import read_results
from llmrec.train.steps import TrainingPlan
from tests.conftest import make_model
from tests.facts import Facts, raises
from tests.review_files import records, write

pytest.importorskip("llmrec.bench", reason="the extension is not there")


pytest.importorskip("trl", reason="the train extra is not installed")

ROWS = (
    "data={source: made-reviews, noun: products}",
    *("tasks={rating: {strategies: [expected]}, sequential: {}, direct: {strategies: [label]}}", "eval.users=4"),
    *("eval.candidates.count=5", "eval.bootstrap=50", "eval.backend=hf", "eval.arms=[zero-shot, tuned]"),
    *("train.steps=2", "train.batch_tokens=512", "train.valid_rows=6", "train.lora.top_layers=1", "eval.fusion={}"),
)


def recipe(folder: Path | str, *more: str) -> Recipe:
    named = ["reviews=null", f"model.name={folder}", "model.dtype=float32", *ROWS, *more]
    return load_recipe("recipes/movielens-100k/four-tasks.yaml", named)


def planned(study: Study, folder: Path) -> TrainingPlan:
    return plan_training(study, encoder_of(study, str(folder)))


def share_of_ratings(study: Study, plan: TrainingPlan, folder: Path) -> float:
    """Return the share of planned tokens in rows without candidates."""
    decode = encoder_of(study, str(folder)).tokenizer.decode
    spent = {True: 0, False: 0}
    for step in plan.steps:
        for row in step.rows:
            spent["Candidates:" in decode(list(row.ids))] += len(row.ids)
    return spent[False] / sum(spent.values())


# --------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (["train.only=[rating]", "train.without=[direct]"], ["train.without", "train.only", "drop one"]),
        (["train.only=[ratings]"], ["train.only", "did you mean 'rating'", "rating, sequential, direct"]),
        (["train.without=[explanation]"], ["train.without", "no task 'explanation'"]),
        (["train.without=[rating, sequential, direct]"], ["train.without", "no task is left"]),
        (["train.only=[direct]", "tasks.direct.weight=0"], ["train.only", "tasks.direct.weight"]),
        (["train.mixture_limit=5"], ["train.mixture_limit", "train.mixture=weights"]),
    ],
)
def test_rejects_invalid_choices(keys: list[str], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe("m", *keys)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_only_and_without_select_trained_tasks() -> None:
    assert recipe("m").trained() == {"rating": 1.0, "sequential": 1.0, "direct": 1.0}
    assert recipe("m", "train.only=[direct, rating]").trained() == {"rating": 1.0, "direct": 1.0}
    assert recipe("m", "train.without=[direct]", "tasks.rating.weight=0").trained() == {"sequential": 1.0}


def test_rating_head_allows_untrained_tasks() -> None:
    head = ("tasks.rating.strategies=[head, expected]", "tasks.rating.head={alpha: 0.5}")
    assert recipe("m", *head, "train.only=[rating]").trained() == {"rating": 1.0}
    for more in ((), ("train.without=[rating]",)):
        with raises(RecipeError, Facts("contradiction", column="tasks.rating.head", says="train.only=[rating]")):
            recipe("m", *head, *more)


# --------------------------------------------------------------------------- what is planned


def test_plan_has_rows_of_trained_tasks_and_validates_all(llama_folder: Path) -> None:
    every = {"rating", "sequential", "direct"}
    for key, trained, valid in (
        ("train.only=[rating]", {"rating"}, every),
        ("train.without=[rating]", {"sequential", "direct"}, every),
        ("tasks.direct.weight=0", {"rating", "sequential"}, {"rating", "sequential"}),
    ):
        plan = planned(build_study(recipe(llama_folder, key)), llama_folder)
        assert set(plan.rows) == trained and all(plan.rows.values()), key
        assert set(plan.valid) == valid and all(plan.valid.values()), key


def test_plan_follows_mixture(llama_folder: Path) -> None:
    """Only every tenth rating is present, so the tasks differ in size."""
    sizes = ("train.steps=8", "train.batch_tokens=3000", "train.max_row_tokens=1000")
    keys = ("tasks.sequential=null", "tasks.direct.templates=[after-history]", "tasks.rating.weight=7", *sizes)
    shares: dict[str, dict[str, float]] = {}
    for mixture in ("weights", "equal", "proportional", "temperature"):
        study = build_study(recipe(llama_folder, *keys, f"train.mixture={mixture}"))
        train = study.data.train
        few = train["rating"].scatter([n for n in range(len(train)) if n % 10], None)
        sized = build_study(study.recipe, replace(study.data, train=train.with_columns(rating=few)))
        study = replace(study, tasks=sized.tasks, trained=study.tasks)
        rated, known = len(few.drop_nulls()), len(few)
        shares[mixture] = dict(study.shares)
        expected = shares[mixture]["rating"] / sum(shares[mixture].values())
        share = share_of_ratings(study, planned(study, llama_folder), llama_folder)
        assert share == pytest.approx(expected, abs=0.06), mixture
    assert shares["weights"] == {"rating": 7.0, "direct": 1.0}
    assert shares["equal"] == {"rating": 0.5, "direct": 0.5}
    assert shares["proportional"]["rating"] == pytest.approx(rated / (rated + known))
    assert shares["temperature"]["rating"] == pytest.approx(rated**0.5 / (rated**0.5 + known**0.5))


def test_training_sizes_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    rows = records()
    for row in rows[::2]:
        row["summary"] = ""
    path = write(tmp_path / "reviews.jsonl.gz", rows)
    more = [f"data.path={path}", "eval.candidates.count=3"]
    study = build_study(load_recipe("recipes/multitask/families.yaml", more))
    users, count = study.data.users(), len(study.data.train)
    for family in ("rating", "sequential", "direct", "stars"):
        assert study.training_size(family) == count, family
    kept = {(row["reviewerID"], row["asin"]) for row in rows if row["summary"]}
    headlines = sum((user, event.item_id) in kept for user in users for event in study.data.train_events(user))
    assert 0 < headlines < count and study.training_size("review") == headlines
    pool = build_study(load_recipe("recipes/multitask/families.yaml", [*more, "train.examples=9"]))
    assert {pool.training_size(family) for family in pool.tasks} == {9}


# --------------------------------------------------------------------------- an untrained task


def test_untrained_task_is_evaluated_and_marked(llama_folder: Path, tmp_path: Path) -> None:
    done = pipeline.run(recipe(llama_folder, "train.without=[rating]"), tmp_path / "r", quiet=True)
    rows = {row["id"]: row for row in done.results["rows"]}
    untrained = rows["rating/tuned/expected/list-ratings"]
    assert untrained["n"] > 0 and untrained["inputs"].endswith("trained only on other tasks")
    assert "other tasks" not in rows["rating/zero-shot/expected/list-ratings"]["inputs"]
    assert "other tasks" not in rows["direct/tuned/label/after-history"]["inputs"]
    assert any("was not trained on" in note and "rating" in note for note in done.results["notes"])
    training = done.results["training"]
    assert set(training["rows"]) == set(training["shares"]) == {"sequential", "direct"}
    lines = [json.loads(line) for line in (done.folder / "train_log.jsonl").read_text("utf-8").splitlines()]
    assert set(lines[-1]["valid_loss"]) == {"rating", "sequential", "direct"}
    # The report has one curve per task and one of the training.
    series = loss_plot(read_results(done.folder))["series"]
    assert [each["kind"] for each in series] == ["train", "valid", "valid", "valid"]
    assert len({each["name"] for each in series}) == 4 and all(len(each["y"]) == 2 for each in series)
    audit = json.loads((done.folder / "audit.json").read_text("utf-8"))
    assert not any("training rows of rating" in check["name"] for check in audit["checks"])


# --------------------------------------------------------------------------- two stages

STAGE = ("train.steps=2", "eval.arms=[zero-shot, tuned]", "tasks.sequential=null")


@pytest.fixture(scope="module")
def stage_one(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage") / "one"
    pipeline.train(recipe(llama_folder, "tasks.direct=null"), folder, quiet=True)
    return folder


@pytest.mark.slow
def test_training_starts_from_another_run(stage_one: Path, llama_folder: Path, tmp_path: Path) -> None:
    """With a learning rate near zero, the result is the model of the first stage."""
    still = recipe(llama_folder, *STAGE, f"train.start={stage_one}", "train.learning_rate=1e-30")
    done = pipeline.run(still, tmp_path / "two", quiet=True)
    one, two, base = (
        load_file(folder / "model.safetensors")
        for folder in (stage_one / "merged", done.folder / "merged", llama_folder)
    )
    assert all(two[name].allclose(one[name], atol=1e-6) for name in one)
    assert any(not two[name].allclose(base[name], atol=1e-5) for name in base)
    assert any("continued from the fine-tuned model" in note for note in done.results["notes"])
    # The other arms use the base model.
    alone = pipeline.run(recipe(llama_folder, *STAGE, "eval.arms=[zero-shot]"), tmp_path / "alone", quiet=True)
    zero = "rating/zero-shot/expected/list-ratings"
    one_row, other = (next(row for row in run.results["rows"] if row["id"] == zero) for run in (done, alone))
    assert one_row["metrics"] == other["metrics"]
    exported = export(done.folder, tmp_path / "out", check_users=0)
    weights = load_file(exported.folder / "model.safetensors")
    assert all(weights[name].allclose(two[name], atol=1e-6) for name in two)
    with raises(LlmrecError, Facts("unsupported", column="--adapter-only", says="train.start")):
        export(done.folder, tmp_path / "adapter", check_users=0, adapter_only=True)


def test_training_key_depends_on_start_but_not_on_its_path(stage_one: Path, llama_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(stage_one, moved)
    sessions = [
        pipeline.open_session(recipe(llama_folder, *STAGE, *more), tmp_path / "two", quiet=True)
        for more in ((), (f"train.start={stage_one}",), (f"train.start={moved}",))
    ]
    keys = [training_key(session.study, session.start) for session in sessions]
    assert keys[0] != keys[1] == keys[2]
    assert {session.base for session in sessions} == {str(llama_folder)}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("train.start=nowhere", ["train.start", "is not a run folder"]),
        ("data.split.kind=global_time", ["train.start", "held out here"]),
        ("index={scheme: random}", ["train.start", "no index", "random"]),
        ("model.revision=abc", ["train.start", "model.revision"]),
    ],
)
def test_rejects_start_that_does_not_fit(
    change: str, parts: list[str], stage_one: Path, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        pipeline.open_session(
            recipe(llama_folder, *STAGE, f"train.start={stage_one}", change), tmp_path / "r", quiet=True
        )
    assert all(part in str(caught.value) for part in parts), caught.value


def test_rejects_changed_unfinished_or_same_folder_as_start(
    stage_one: Path, llama_folder: Path, tmp_path: Path
) -> None:
    def opened(start: Path) -> None:
        pipeline.open_session(recipe(llama_folder, *STAGE, f"train.start={start}"), tmp_path / "r", quiet=True)

    altered, unfinished = tmp_path / "altered", tmp_path / "unfinished"
    for folder in (altered, unfinished):
        shutil.copytree(stage_one, folder)
    (unfinished / "train.json").unlink()
    (altered / "merged" / "generation_config.json").write_text("{}", encoding="utf-8")
    with raises(RecipeError, Facts("missing-file", "train.json", column="train.start", says="`llmrec train`")):
        opened(unfinished)
    with raises(RecipeError, Facts("damaged", altered / "merged", column="train.start", says="`llmrec train`")):
        opened(altered)
    (tmp_path / "r").mkdir(exist_ok=True)
    with raises(RecipeError, Facts("contradiction", tmp_path / "r", column="train.start", says="--out")):
        opened(tmp_path / "r")


def test_rejects_start_with_other_tokenizer(stage_one: Path, tmp_path: Path) -> None:
    """The model folder has changed since the first stage."""
    other = make_model(tmp_path / "m")
    moved = tmp_path / "one"
    shutil.copytree(stage_one, moved)
    page = (moved / "recipe.yaml").read_text("utf-8")
    known = load_recipe(moved / "recipe.yaml").model.name
    (moved / "recipe.yaml").write_text(page.replace(known, str(other)), "utf-8")
    pipeline.open_session(recipe(other, *STAGE, f"train.start={moved}"), tmp_path / "r", quiet=True)
    config = json.loads((other / "tokenizer.json").read_text("utf-8"))
    config["model"]["merges"] = config["model"]["merges"][:-5]
    (other / "tokenizer.json").write_text(json.dumps(config), "utf-8")
    with raises(RecipeError, Facts("mismatch", moved / "merged", column="train.start", says="model.name")):
        pipeline.open_session(recipe(other, *STAGE, f"train.start={moved}"), tmp_path / "r", quiet=True)


@pytest.mark.slow
def test_rejects_start_with_other_codes(llama_folder: Path, tmp_path: Path) -> None:
    coded = (*STAGE[:2], "tasks={sequential: {templates: [continue-codes]}}")
    numbers = recipe(llama_folder, *coded, "index={scheme: sequential}")
    pipeline.train(numbers, tmp_path / "numbers", quiet=True)
    start = f"train.start={tmp_path / 'numbers'}"
    other = recipe(llama_folder, *coded, "index={scheme: sequential, first: 2001}", start)
    with raises(RecipeError, Facts("mismatch", "numbers", column="train.start", says=("index.scheme=title",))):
        pipeline.open_session(other, tmp_path / "r", quiet=True)


def test_start_compares_tables_by_resolved_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\n", encoding="utf-8")
    (tmp_path / "y.csv").write_text("user_id,item_id,timestamp\n", encoding="utf-8")
    (tmp_path / "link.csv").symlink_to(tmp_path / "x.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path))

    def of(path: str, kind: str = "leave_one_out") -> Recipe:
        return recipe("m", f"data={{source: table, path: {path}, split: {{kind: {kind}}}}}", "tasks={sequential: {}}")

    for path in ("x.csv", "./x.csv", str(tmp_path / "x.csv"), "link.csv"):
        runs._check_same_holdouts(of("x.csv"), of(path), Path("one"))
        with raises(RecipeError, Facts("mismatch", "one", column="train.start")):
            runs._check_same_holdouts(of("x.csv", "last_share"), of(path), Path("one"))
    runs._check_same_holdouts(of("x.csv", "last_share"), of("y.csv"), Path("one"))


def test_alignment_items_must_be_held_out_in_both_stages() -> None:
    keys = ("index={scheme: token}", "tasks={sequential: {}, alignment: {held_out: 0.2}}")
    one, same, without, seeded = (
        recipe("m", *keys, *more)
        for more in ((), (), ("tasks.alignment=null",), ("seed=1", "data.source=movielens-100k"))
    )
    runs._check_same_holdouts(one, same, Path("one"))
    for first in (without, seeded):
        with raises(RecipeError, Facts("mismatch", "one", column="train.start", says="tasks.alignment.held_out")):
            runs._check_same_holdouts(first, one, Path("one"))
