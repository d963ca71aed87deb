"""Generated texts of a recipe: prompts and the data in them, resume after a kill, and the use of texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.answer.known import profile_lookup, read_catalogue, read_known_entities, with_stored_data
from llmrec.augment import stores
from llmrec.augment.texts import item_prompts, text_template, user_prompts
from llmrec.backends.cache import CachedBackend
from llmrec.baselines.parameters import create_baseline, feature_store_hashes
from llmrec.data.features import Features, FeatureStore, Provenance, publish
from llmrec.errors import DataError, RecipeError
from llmrec.pipeline import augmenting, preflight
from llmrec.pipeline import bundle as bundles
from llmrec.pipeline import run as pipeline
from llmrec.pipeline.leaks import Check, audit_feature_texts
from llmrec.pipeline.study import build_study, load_tables
from llmrec.recipe.load import as_recipe
from llmrec.types import Event, Request
from tests.augment_recipe import augmenting_recipe
from tests.facts import Facts, raises

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def written(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return six texts of users and items; copy their folder to write to it."""
    folder = tmp_path_factory.mktemp("written") / "store"
    return augmenting.augment(augmenting_recipe(llama_folder), folder, quiet=True)


@pytest.fixture(scope="module")
def complete(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of all users and items; copy it to write to it."""
    folder = tmp_path_factory.mktemp("complete") / "store"
    return augmenting.augment(augmenting_recipe(llama_folder, limit=None), folder, quiet=True).folder


def test_texts_of_users_read_only_the_training_events(llama_folder: Path) -> None:
    result = augmenting_recipe(llama_folder, history=3)
    data, _ = load_tables(result, None)
    assert result.augment is not None
    for each in user_prompts(data, result.augment, 0):
        known = {(each.id, event.item_id) for event in data.known_events(each.id)}
        assert each.seen <= known and len(each.seen) == min(3, len(known)) and not each.seen & data.held_out
        output = each.prompt.messages[-1].text
        later = {data.dataset.titles[event.item_id] for event in data.train_events(each.id)}
        shown = {data.dataset.titles[item] for _, item in each.seen}
        assert all(title in output for title in shown) and not any(title in output for title in later - shown)
        assert "taste" in output
    assert all(not each.seen for each in item_prompts(data, result.augment, 0))
    assert len(item_prompts(data, result.augment, 0)) == 6


def test_provenance_and_estimate_of_texts(llama_folder: Path, written: Any) -> None:
    done, store = written, FeatureStore.open(written.folder)
    data, _ = load_tables(augmenting_recipe(llama_folder), None)
    assert store.kinds == ("user", "item") and done.texts["item"] == len(store.ids("item")) > 0
    assert done.cost.completion_tokens > 0 and done.cost.prompt_tokens > 0
    assert store.provenance("user").split == data.readable and store.provenance("item").split == ""
    assert store.provenance("user").generator["decoding"] == "greedy"
    assert store.seen("user") and not store.seen("item")
    assert FeatureStore.open(done.folder, split=data.readable).kinds == store.kinds
    result = augmenting_recipe(llama_folder)
    planned = augmenting.plan_texts(result)
    assert result.augment is not None
    output = augmenting.estimate_cost(planned, result.augment)
    assert (
        output["users"].startswith("6 texts")
        and "at most 24 completion tokens" in output["users"]
        and "minutes" in output["time"]
    )


def test_corrections_and_deletions_are_kept(llama_folder: Path, written: Any, tmp_path: Path) -> None:
    result = augmenting_recipe(llama_folder)
    folder = Path(shutil.copytree(written.folder, tmp_path / "store"))
    first, second = FeatureStore.open(folder).ids("item")[:2]
    stores.edit_text(folder, "item", first, "another text")
    gone = FeatureStore.open(folder).ids("user")[0]
    stores.forget_user(folder, gone)
    again = augmenting.augment(result, tmp_path / "store", quiet=True)
    store = FeatureStore.open(again.folder)
    assert store.texts("item", [first]) == {first: "another text"} and gone not in store.ids("user")
    assert again.cost.prompt_tokens == 0 and not list(folder.glob("answers.sqlite*"))
    more = augmenting.augment(augmenting_recipe(llama_folder, factors=["price"]), tmp_path / "store", quiet=True)
    assert (
        more.cost.prompt_tokens > 0 and FeatureStore.open(more.folder).texts("item", [first])[first] != "another text"
    )
    assert FeatureStore.open(more.folder).dtype == "float32"
    augmenting.augment(
        augmenting_recipe(llama_folder, factors=["price"], dtype="float16"), tmp_path / "store", quiet=True
    )
    assert FeatureStore.open(more.folder).dtype == "float16"
    assert second in store.ids("item")


def test_other_titles_change_the_texts(llama_folder: Path, tmp_path: Path) -> None:
    """Ids and interactions are the same, but the titles in the prompts differ."""
    columns = {"user": "u", "item": "i", "rating": "r", "time": "t", "title": "name"}
    events = [(f"u{user}", f"i{(user + step) % 11}", 1 + step % 5, step) for user in range(6) for step in range(9)]

    def written(title: str) -> FeatureStore:
        rows = [f"{user},{item},{rating},{time},{title} {item}" for user, item, rating, time in events]
        (tmp_path / "table.csv").write_text("\n".join(["u,i,r,t,name", *rows]), encoding="utf-8")
        base = augmenting_recipe(llama_folder)
        data = base.data.model_copy(update={"source": "table", "path": str(tmp_path / "table.csv")})
        result = base.model_copy(
            update={"data": data.model_copy(update={"columns": data.columns.model_validate(columns)})}
        )
        return FeatureStore.open(augmenting.augment(result, tmp_path / "store", quiet=True).folder)

    first, again, other = written("Red book"), written("Red book"), written("Blue film")
    assert first.provenance("item") == again.provenance("item") != other.provenance("item")
    assert first.provenance("user") == again.provenance("user") != other.provenance("user")


def test_resume_after_kill_generates_nothing_twice(
    llama_folder: Path, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, calls = augmenting_recipe(llama_folder), []
    plain = CachedBackend.generate

    def counted(self: CachedBackend, prompts: Any, *, max_tokens: int) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, prompts, max_tokens=max_tokens)

    with monkeypatch.context() as patch:
        patch.setattr(CachedBackend, "generate", counted)
        with pytest.raises(KeyboardInterrupt):
            augmenting.augment(result, tmp_path / "killed", quiet=True)
    assert not (tmp_path / "killed" / "current").exists()
    again = augmenting.augment(result, tmp_path / "killed", quiet=True)
    one, other = FeatureStore.open(written.folder), FeatureStore.open(again.folder)
    for kind in one.kinds:
        assert one.texts(kind, one.ids(kind)) == other.texts(kind, other.ids(kind))
    # If all answers are stored, no engine is started.
    shutil.rmtree(llama_folder / "none", ignore_errors=True)
    monkeypatch.setattr("llmrec.pipeline.engines.load_model", lambda *_, **__: pytest.fail("an engine was started"))
    assert augmenting.augment(result, tmp_path / "killed", quiet=True).texts == again.texts


def test_rejects_missing_section_and_unknown_template(llama_folder: Path, tmp_path: Path) -> None:
    bare = augmenting_recipe(llama_folder).model_copy(update={"augment": None})
    with raises(RecipeError, Facts("missing-key", column="augment")):
        augmenting.plan_texts(bare)
    with raises(RecipeError, Facts("unknown-name", column="augment.users", says="user-reasoning")):
        augmenting.plan_texts(augmenting_recipe(llama_folder, users="user-reasonin"))
    with pytest.raises(RecipeError, match="no template is set"):
        augmenting_recipe(llama_folder, users=None, items=None)
    assert text_template("item", "item-facts").shape == "chat"


def test_control_without_a_model(llama_folder: Path, tmp_path: Path) -> None:
    result = augmenting_recipe(llama_folder)
    done = augmenting.build_reference_store(result, tmp_path / "control")
    store, (data, request) = FeatureStore.open(done.folder), augmenting.collect_prompts(result)
    assert store.kinds == ("user", "item") and not store.texts("user", store.ids("user"))
    assert store.ids("item") == sorted(each.id for each in request["item"])
    assert len(store.ids("item")) < len(data.dataset.items)
    # Each taste vector covers all events in the prompt, including those of items without a prompt.
    whole = augmenting.build_reference_store(augmenting_recipe(llama_folder, limit=None), tmp_path / "whole").folder
    every = FeatureStore.open(whole)
    assert every.ids("item") == sorted(data.dataset.items)
    mixed = 0
    for each in request["user"]:
        assert store.seen_by("user")[each.id] == each.seen
        events = [event for event in data.known_events(each.id) if (each.id, event.item_id) in each.seen]
        vectors = every.get("item", [event.item_id for event in events])[0]
        liked = np.array([(event.rating or 0) >= 4 for event in events])
        parts = [vectors[yes].mean(axis=0) if yes.any() else np.zeros(vectors.shape[1]) for yes in (liked, ~liked)]
        assert np.allclose(store.get("user", [each.id])[0][0], parts[0] - parts[1], atol=1e-5)
        mixed += bool(liked.any() and not liked.all())
    assert mixed
    assert store.provenance("user").split == data.readable and store.provenance("user").generator == {}
    # Without ratings, the taste vector is the mean of all item vectors.
    two = Features("item", ["a", "b"], np.array([[1.0, 3.0], [3.0, 5.0]]), Provenance(system="x"))
    unrated = [Event(item_id="a"), Event(item_id="b")]
    assert augmenting._user_preference_vector(data, unrated, two, {"a": 0, "b": 1}, None).tolist() == [2.0, 4.0]


def test_content_neighbours_reject_leaking_texts(tmp_path: Path) -> None:
    result = as_recipe({"name": "x", "data": {"source": "made-reviews"}, "tasks": {"sequential": {}}})
    data, _ = load_tables(result, None)
    items = sorted(data.dataset.items)
    vectors = np.random.default_rng(0).normal(size=(len(items), 8)).astype(np.float32)
    publish(tmp_path / "clean", [Features("item", items, vectors, Provenance(system="x"))])
    model = create_baseline("content", {"encoder": f"store:{tmp_path / 'clean'}"}, seed=0)
    model.fit(data)
    user = data.users()[0]
    assert len(model.scores([Request(id="r", user_id=user, history=data.train_events(user))])[0]) == len(items)
    held = min(data.held_out)
    publish(
        tmp_path / "leak", [Features("item", items, vectors, Provenance(system="x"), seen={held[1]: frozenset({held})})]
    )
    with raises(DataError, Facts("leak", says="held-out")):
        create_baseline("content", {"encoder": f"store:{tmp_path / 'leak'}"}, seed=0).fit(data)


def test_changed_store_changes_the_row(tmp_path: Path) -> None:
    def stored(scale: float) -> dict[str, str]:
        users = Features("user", ["u0", "u1"], scale * np.eye(2), Provenance(system="x"), texts=["a", "b"])
        publish(tmp_path / "store", [users])
        return feature_store_hashes("deepfm", {"features": str(tmp_path / "store")})

    first = stored(1.0)
    assert stored(1.0) == first and stored(2.0) != first
    assert feature_store_hashes("logistic", {"features": "ids"}) == {}
    with raises(DataError, Facts("missing-file")):
        feature_store_hashes("content", {"encoder": f"store:{tmp_path / 'none'}"})


def test_audit_checks_events_seen_by_features(tmp_path: Path) -> None:
    def check(seen: dict[str, frozenset[tuple[str, str]]]) -> Check | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        items = [f"u{n}" for n in range(3)]
        publish(folder, [Features("user", items, np.eye(3), Provenance(system="x"), seen=seen)])
        made = as_recipe(
            {
                "name": "x",
                "data": {"source": "made-reviews"},
                "tasks": {
                    "ctr": {"baselines": ["like-ratio", "logistic", {"name": "deepfm", "features": str(folder)}]}
                },
                "eval": {"arms": []},
            }
        )
        return audit_feature_texts(build_study(made))

    plain = as_recipe({"name": "x", "data": {"source": "made-reviews"}, "tasks": {"ctr": {}}, "eval": {"arms": []}})
    study = build_study(plain)
    assert audit_feature_texts(study) is None
    learned = next(iter(study.data.train.select("user_id", "item_id").iter_rows()))
    result = check({"u0": frozenset({learned})})
    assert result is not None and result.verdict == "clean" and result.figures["training_rows_seen"] == 1
    leaked = check({"u0": frozenset({min(study.data.held_out)})})
    assert leaked is not None and leaked.verdict == "leak"


def test_run_writes_features_and_reuses_them(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "run"
    host = {"name": "deepfm", "features": str(folder / "features"), "epochs": 1}
    result = augmenting_recipe(llama_folder, limit=None, max_tokens=2)
    plain = {"name": "deepfm", "epochs": 1}
    tasks = {"ctr": {"baselines": ["like-ratio", "logistic", plain, host]}}
    values = result.model_dump(mode="json") | {"tasks": tasks, "eval": {"arms": [], "backend": "hf", "users": 20}}
    first = pipeline.run(values, folder, quiet=True)
    version = (folder / "features" / "current").read_text()
    assert any(row["predictor"].startswith("deepfm(") for row in first.results["rows"])
    assert any(check["name"].startswith("generated texts") for check in _audit(folder))
    # The texts for a few requests, and the recommender's answers with and without them.
    store, shown = FeatureStore.open(folder / "features"), first.results["gallery"]
    for each in shown:
        assert each["profile"] == store.texts("user", [each["user"]["id"]]).get(each["user"]["id"], "")
        assert len(each["answers"]) == 2 and each["read"] and each["truth"] in ("0", "1")
    assert shown and any(len(set(each["answers"].values())) == 2 for each in shown)
    again = pipeline.run(values, folder, quiet=True)
    assert (folder / "features" / "current").read_text() == version
    assert again.results["rows"] == first.results["rows"]


def _audit(folder: Path) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads((folder / "audit.json").read_text(encoding="utf-8"))["checks"]
    return result


def test_prompts_show_generated_texts(llama_folder: Path, complete: Path, tmp_path: Path) -> None:
    result = augmenting_recipe(llama_folder, limit=None)
    store = Path(shutil.copytree(complete, tmp_path / "store"))
    items = {each: f"is number {n}" for n, each in enumerate(FeatureStore.open(store).ids("item"))}
    for item, text in items.items():
        stores.edit_text(store, "item", item, text)
    shown = as_recipe(result.model_dump(), {"data.texts.path": str(store), "tasks": {"sequential": {}}})
    study = build_study(shown)
    assert {each: item.fields["about"] for each, item in study.data.dataset.items.items()} == items
    # The prompts are the same: no text is generated from another generated text.
    _, before = augmenting.collect_prompts(result)
    _, after = augmenting.collect_prompts(shown)
    assert before == after


def test_answering_shows_generated_texts(llama_folder: Path, complete: Path, tmp_path: Path) -> None:
    result = augmenting_recipe(llama_folder, limit=None)
    store = Path(shutil.copytree(complete, tmp_path / "store"))
    user, other = FeatureStore.open(store).ids("user")[:2]
    (item,) = FeatureStore.open(store).ids("item")[:1]
    stores.edit_text(store, "user", user, "likes quiet things")
    stores.edit_text(store, "item", item, "a quiet thing")
    changes = {"data.texts.path": str(store), "augment": None, "eval.arms": [], "name": "shown"}
    run = pipeline.run(as_recipe(result.model_dump(), changes), tmp_path / "run", quiet=True).folder
    known = read_known_entities(str(run), None)
    assert known.items[item].fields["about"] == "a quiet thing" and store in known.features
    assert read_catalogue(bundles.read(str(run)), None)[0] == known.items
    profiles = profile_lookup(str(run))
    request = {"user_id": user, "history": []}
    stored = known.histories.of_user
    answer, is_known = with_stored_data(request, stored, known.items, profiles)
    assert answer["profile"] == "likes quiet things" == known.profile(user) and answer["history"] == [] and is_known
    assert with_stored_data({**request, "profile": ""}, stored, known.items, profiles) == (answer, True)
    for other_request in ({**request, "profile": "mine"}, {**request, "user_id": "unknown"}, {"history": []}):
        assert with_stored_data(other_request, stored, known.items, profiles) == (other_request, False)
    # An erased user disappears at once, also from stores that are open.
    stores.forget_user(store, user)
    assert known.profile(user) is None and known.profile(other) and known.profile(None) is None


def test_rejects_another_store_in_prompts(llama_folder: Path, tmp_path: Path) -> None:
    result = as_recipe(augmenting_recipe(llama_folder).model_dump(), {"data.texts.path": str(tmp_path / "elsewhere")})
    with raises(RecipeError, Facts("contradiction", column="data.texts.path", says=str(tmp_path / "run" / "features"))):
        pipeline.run(result, tmp_path / "run", quiet=True)
    # The preflight check accepts a store that the run itself writes before reading it.
    later = as_recipe(result.model_dump(), {"data.texts.path": "runs/toy/features", "name": "toy"})
    assert preflight._without_unwritten_texts(later).data.texts is None
    with raises(RecipeError, Facts("contradiction", column="data.texts.path")):
        preflight.build_checked_study(result)
