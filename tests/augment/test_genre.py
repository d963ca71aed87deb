"""Parts of GENRE: topics from a closed list, synthetic items for users with few events, and both in sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.augment import stores
from llmrec.augment.texts import extract_text, parse_synthetic_item, user_prompts
from llmrec.backends.cache import CachedBackend
from llmrec.baselines.parameters import create_baseline, feature_store_hashes
from llmrec.data.features import Features, FeatureStore, Provenance, publish
from llmrec.errors import DataError
from llmrec.pipeline import augmenting
from llmrec.pipeline.study import load_tables
from llmrec.recipe.schema import AugmentSection
from llmrec.types import Completion, Event, Request
from tests.augment_recipe import augmenting_recipe
from tests.facts import Facts, raises

TOPICS = ("sound", "battery life", "price")


def test_topics_outside_the_list_are_removed() -> None:
    section = AugmentSection(topics=TOPICS)
    output = "They like the Price, and long battery-life; also colours and soundness."
    assert extract_text("user", output, section) == "battery life, price"
    assert extract_text("user", "Nothing of it.", section) == ""
    assert extract_text("item", "a  text", section) == "a text"


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ('{"title": "Educated", "description": "A memoir."}', "Educated. A memoir"),
        ('Sure! {"title": "Educated", "description": ""} Enjoy', "Educated"),
        ('"Educated": a memoir.\nAnd another', 'Educated": a memoir.'),
        ('{"title": "Educated", "desc', '{"title": "Educated", "desc'),
        ("\n\n", ""),
    ],
)
def test_reads_a_synthetic_item(text: str, title: str) -> None:
    assert parse_synthetic_item(text) == title


def test_synthetic_items_only_for_users_with_few_events(llama_folder: Path) -> None:
    result = augmenting_recipe(llama_folder, synthetic="cold-item", cold=5, limit=None)
    data, _ = load_tables(result, None)
    assert result.augment is not None
    request = user_prompts(data, result.augment, 0, kind="synthetic")
    few = {user for user in data.users() if 0 < len(data.known_events(user)) <= 5}
    assert 0 < len(few) < len(data.users()) and {each.id for each in request} == few
    assert all(each.seen and not each.seen & data.held_out for each in request)


def test_chain_of_texts_makes_no_interaction(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def generate(self: CachedBackend, prompts: Any, *, max_tokens: int) -> list[Completion]:
        texts = [prompt.messages[-1].text for prompt in prompts]
        shown.extend(texts)
        output = ["Price, and poetry" if "these topics" in text else '{"title": "An Invented Thing"}' for text in texts]
        return [Completion(text=text, prompt_tokens=1, completion_tokens=1) for text in output]

    monkeypatch.setattr(CachedBackend, "generate", generate)
    result = augmenting_recipe(
        llama_folder, users="user-topics", items=None, topics=TOPICS, synthetic="cold-item", cold=5, limit=None
    )
    before, _ = load_tables(result, None)
    done = augmenting.augment(result, tmp_path / "store", quiet=True)
    store, (after, _) = FeatureStore.open(done.folder), load_tables(result, None)
    assert store.kinds == ("user", "synthetic")
    cold = store.ids("synthetic")
    assert set(store.texts("user", store.ids("user")).values()) == {"price"}
    assert set(store.texts("synthetic", cold).values()) == {"An Invented Thing"}
    request = [text for text in shown if "these topics" not in text]
    assert len(request) == len(cold) and all("The person likes: price." in text for text in request)
    assert store.provenance("synthetic").generator["synthetic"] is True
    assert store.provenance("synthetic").split == before.readable
    # No item, event or candidate was added, and no held-out data was used.
    assert after.fingerprint == before.fingerprint
    assert not any("Invented" in item.title for item in after.dataset.items.values())
    assert not store.seen("synthetic") & after.held_out
    assert stores.edit_text(done.folder, "user", cold[0], "sound") == ("synthetic",)
    gone = stores.forget_user(done.folder, cold[0])
    assert gone.text and cold[0] not in FeatureStore.open(done.folder).ids("synthetic")


def _synthetic(folder: Path, user: str, vector: np.ndarray, **more: Any) -> None:
    result = Provenance(system="x", encoder={"stamp": "s"})
    publish(
        folder, [Features("synthetic", [user, "other"], np.stack([vector, -vector]), result, texts=["a", "b"], **more)]
    )


def test_synthetic_item_precedes_few_events(tmp_path: Path) -> None:
    data, _ = load_tables(augmenting_recipe(tmp_path), None)
    items = sorted(data.dataset.items)
    vectors = np.random.default_rng(0).normal(size=(len(items), 8)).astype(np.float32)
    publish(tmp_path / "items", [Features("item", items, vectors, Provenance(system="x", encoder={"stamp": "s"}))])
    user = data.users()[0]
    _synthetic(tmp_path / "made", user, vectors[3])
    keys = {"encoder": f"store:{tmp_path / 'items'}", "whitening": 0.0, "decay": 0.5, "cold": 2}
    plain, cold = (
        create_baseline("content", keys, seed=0),
        create_baseline("content", keys | {"synthetic": str(tmp_path / "made")}, seed=0),
    )
    plain.fit(data)
    cold.fit(data)

    def scores(model: Any, who: str, *history: str) -> np.ndarray:
        request = Request(id="r", user_id=who, history=tuple(Event(item_id=item) for item in history))
        return np.asarray(model.scores([request])[0])

    assert int(np.argmax(scores(cold, user))) == 3
    one = items[5:6]
    # Equal to a history in which the copied item precedes the event.
    assert np.allclose(scores(cold, user, *one), scores(plain, user, items[3], *one), atol=1e-5)
    many = items[5:8]
    assert np.array_equal(scores(cold, user, *many), scores(plain, user, *many))
    assert np.array_equal(scores(cold, "unknown", *one), scores(plain, "unknown", *one))
    assert set(feature_store_hashes("content", keys | {"synthetic": str(tmp_path / "made")})) == {
        str(tmp_path / "items"),
        str(tmp_path / "made"),
    }


def test_rejects_leaks_and_other_encoders(tmp_path: Path) -> None:
    data, _ = load_tables(augmenting_recipe(tmp_path), None)
    held = min(data.held_out)
    _synthetic(tmp_path / "leak", held[0], np.ones(8), seen={held[0]: frozenset({held})})
    with raises(DataError, Facts("leak", says="held-out")):
        create_baseline("content", {"synthetic": str(tmp_path / "leak")}, seed=0).fit(data)
    _synthetic(tmp_path / "made", held[0], np.ones(8))
    with raises(DataError, Facts("mismatch", says="another encoder")):
        create_baseline("content", {"synthetic": str(tmp_path / "made")}, seed=0).fit(data)
    publish(tmp_path / "users", [Features("user", ["a"], np.ones((1, 8)), Provenance(system="x"))])
    with raises(DataError, Facts("missing-value", says="augment.synthetic")):
        create_baseline("content", {"synthetic": str(tmp_path / "users")}, seed=0).fit(data)
