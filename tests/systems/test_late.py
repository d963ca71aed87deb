"""Late interaction on a tiny model: cached states, positions, training and stored fits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from llmrec.baselines.fits import Storable, fit_key
from llmrec.data.dataset import Dataset, conform_to_schema
from llmrec.data.features import FeatureStore, lock_store
from llmrec.data.split import SplitDataset, split_dataset
from llmrec.errors import ModelError, RecipeError
from llmrec.models.load import load_model
from llmrec.recipe.schema import ModelSection, Split
from llmrec.systems.m6 import segments
from llmrec.systems.m6.late import CANDIDATE, LateInteraction
from llmrec.systems.m6.segments import LowerLayers, PromptPart
from llmrec.types import Item, Probability, Request, Unparsed
from tests.conftest import make_model, make_tokenizer
from tests.contracts.test_predictors import _split
from tests.facts import Facts, raises

LAYERS = 4
TEXTS = ("Liked: Heat.", "Did not like: Jaws.", "Next: Toy Story.", "Liked 1 of 2.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep"), layers=LAYERS)


@pytest.fixture(scope="module")
def data() -> SplitDataset:
    return _split("last_share")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))


def fitted(folder: Path, data: SplitDataset, **settings: Any) -> LateInteraction:
    config = {"model": str(folder), "joint": 2, "rows": 32, "epochs": 2, "learning_rate": 1e-3, **settings}
    model = LateInteraction(LateInteraction.Config(**config), seed=0)
    model.fit(data)
    return model


@pytest.fixture(scope="module")
def model(folder: Path, data: SplitDataset, tmp_path_factory: pytest.TempPathFactory) -> LateInteraction:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return fitted(folder, data)


def requests(data: SplitDataset, count: int = 12) -> list[Request]:
    user = data.users()[0]
    history = data.history(user, "test")
    items = sorted(data.dataset.items)[:count]
    return [Request(id=f"r{item}", user_id=user, item=item, history=history) for item in items]


def test_states_of_a_segment_do_not_depend_on_others(folder: Path) -> None:
    section = ModelSection(name=str(folder), dtype="float32")
    lower, full = LowerLayers(str(folder), section, joint=1), load_model(str(folder), section)
    together = lower.states(TEXTS)
    with torch.no_grad():
        for text, states in zip(TEXTS, together, strict=True):
            out = full(torch.tensor([lower.ids(text)]), output_hidden_states=True)
            assert torch.allclose(states, out.hidden_states[LAYERS - 1][0], atol=1e-5)
    read = lower.read
    assert read == sum(len(lower.ids(text)) for text in TEXTS)
    lower.states(TEXTS)
    assert lower.read == read


# Models with several kinds of layers: without RoPE, with another RoPE base, with a sliding window, without experts.
LAYERED: dict[str, dict[str, Any]] = {
    "SmolLM3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "Gemma3": {"num_hidden_layers": 6, "sliding_window": 8},
    "Qwen3Moe": {"num_hidden_layers": 4, "mlp_only_layers": [3], "num_experts": 2, "num_experts_per_tok": 1}
    | {"moe_intermediate_size": 16},
}


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return tiny random models whose layers are of several kinds."""
    import transformers

    tokenizer, folders = make_tokenizer(), {}
    for name, settings in LAYERED.items():
        config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        # Larger weights than usual, so that attention depends on the token.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6.0)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", ["SmolLM3", "Gemma3"])
def test_joint_layers_keep_their_kind(name: str, layered: dict[str, Path]) -> None:
    section = ModelSection(name=str(layered[name]), dtype="float32")
    full, text = load_model(str(layered[name]), section), " ".join(TEXTS)
    for joint in (1, 3):
        lower = LowerLayers(str(layered[name]), section, joint=joint)
        with torch.no_grad():
            (states,) = lower.states([text])
            result = lower.joint(inputs_embeds=states[None]).last_hidden_state
            expected = full.get_decoder()(torch.tensor([lower.ids(text)])).last_hidden_state
        assert torch.allclose(result, expected, atol=1e-4)


def test_rejects_models_that_cannot_be_cut(layered: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # The last layer has no experts, which depends on its index.
    section = ModelSection(name=str(layered["Qwen3Moe"]), dtype="float32")
    with raises(ModelError, Facts("unsupported", column="joint", says="qwen3_moe")):
        LowerLayers(str(layered["Qwen3Moe"]), section, joint=1)
    # Layers in another order compute something else.
    upper = segments._copy_upper_layers
    monkeypatch.setattr(segments, "_copy_upper_layers", lambda body, layers, *rest: upper(body, layers[::-1], *rest))
    section = ModelSection(name=str(layered["SmolLM3"]), dtype="float32")
    with raises(ModelError, Facts("unsupported", column="joint", says="smollm3")):
        LowerLayers(str(layered["SmolLM3"]), section, joint=2)


def test_cached_equals_uncached_beyond_a_sliding_window(layered: dict[str, Path], data: SplitDataset) -> None:
    model = fitted(layered["Gemma3"], data, joint=3, epochs=1, rows=8)._fitted
    user, candidates = parts(model, data)
    with torch.no_grad():
        cached = model.logits(user, candidates)
        uncached = torch.stack([model.forward([[*user, each]])[0] for each in candidates])
    assert torch.allclose(cached, uncached, atol=1e-4) and cached.std() > 1e-4


def parts(model: Any, data: SplitDataset) -> tuple[list[PromptPart], list[PromptPart]]:
    """Return the parts of a history and of its candidates."""
    questions = requests(data)
    return model.user(questions[0].history), [model.candidate(str(request.item)) for request in questions]


@pytest.mark.parametrize("joint", [0, LAYERS])
def test_cached_equals_uncached(folder: Path, data: SplitDataset, joint: int) -> None:
    model = fitted(folder, data, joint=joint, epochs=1, rows=8)._fitted
    user, candidates = parts(model, data)
    assert model.history >= len(user) - 1 and len(user) > 1
    with torch.no_grad():
        warm = model.logits(user, candidates)
        model.lower.forget([each.text for each in (*user, *candidates)])
        cold = torch.stack([model.forward([[*user, each]])[0] for each in candidates])
    assert torch.allclose(warm, cold, atol=1e-5) and warm.std() > 1e-4


def test_states_are_stored_by_weights_and_layer(folder: Path, data: SplitDataset, tmp_path: Path) -> None:
    quick = {"epochs": 1, "rows": 8}
    first = fitted(folder, data, joint=2, **quick)
    (store,) = (tmp_path / "cache" / "segments").iterdir()
    assert store.name.endswith("-2") and FeatureStore.open(store).width("item") == 128
    read = first._fitted.lower.read
    again = fitted(folder, data, joint=2, **quick)
    assert read > 0 and again._fitted.lower.read == 0
    fitted(folder, data, joint=1, **quick)
    assert len(list((tmp_path / "cache" / "segments").iterdir())) == 2
    questions = requests(data)
    assert first.answer(questions) == again.answer(questions)


def test_damaged_or_busy_store_is_no_error(folder: Path, tmp_path: Path) -> None:
    def kept(text: str) -> tuple[int, int]:
        lower = LowerLayers(str(folder), ModelSection(name=str(folder), dtype="float32"), joint=2)
        return lower.keep([text]), lower.read

    assert [kept(TEXTS[0])[0], kept(TEXTS[1])[0]] == [0, 0]
    assert kept(TEXTS[0]) == (1, 0) and kept(TEXTS[1]) == (1, 0)
    (store,) = (tmp_path / "cache" / "segments").iterdir()
    with lock_store(store):
        assert kept(TEXTS[2])[0] == 0
    assert kept(TEXTS[2])[0] == 0
    (vectors,) = store.glob("*/item-vectors.npy")
    vectors.write_bytes(vectors.read_bytes()[:-8])
    assert kept(TEXTS[0])[0] == 0
    assert kept(TEXTS[0]) == (1, 0)


def test_known_events_are_no_training_targets(folder: Path) -> None:
    data = _split("prefix")
    model = LateInteraction(LateInteraction.Config(model=str(folder), joint=1, rows=10_000), seed=0)
    prompts, _ = model._prompts(data, model._late(model._lower(), data))
    learned, known = (
        Counter(
            f"Next: {data.dataset.titles[event.item_id]}."
            for user in data.users()
            for event in events(user)
            if event.rating is not None
        )
        for events in (data.train_events, data.known_events)
    )
    questions = Counter(prompt[-1].text for prompt in prompts)
    assert known - learned and questions == learned


def test_earlier_ratings_of_the_item_are_hidden(folder: Path) -> None:
    items = [f"i{n}" for n in range(4)]
    rows = [(user, item, rating) for user in ("u1", "u2") for rating in (1.0, 5.0) for item in items]
    frame = pl.DataFrame(rows, ["user_id", "item_id", "rating"], orient="row").with_columns(
        timestamp=pl.int_range(pl.len()).cast(pl.Float64)
    )
    titles = {item: Item(item_id=item, title=f"Title {item}") for item in items}
    data = split_dataset(
        Dataset("repeated", "films", conform_to_schema(frame), titles),
        Split(kind="last_share", valid=0.1, test=0.2),
        seed=0,
    )
    model = LateInteraction(LateInteraction.Config(model=str(folder), joint=1, rows=10_000), seed=0)
    prompts, _ = model._prompts(data, model._late(model._lower(), data))
    assert prompts and all(
        candidate.text.removeprefix("Next: ") not in part.text for *shown, candidate in prompts for part in shown
    )
    model.fit(data)
    history = data.history("u1", "test")
    full = [Request(id=item, user_id="u1", item=item, history=history) for item in items]
    less = [
        replace(request, history=tuple(event for event in history if event.item_id != request.item)) for request in full
    ]
    one, other = ([each.value for each in model.answer(part) if isinstance(each, Probability)] for part in (full, less))
    assert one == pytest.approx(other, abs=1e-6) and len(one) == len(items)


@pytest.mark.slow
def test_only_the_joint_part_learns(folder: Path, data: SplitDataset) -> None:
    section = ModelSection(name=str(folder), dtype="float32")
    model = fitted(folder, data, epochs=8)
    untouched, lower = LowerLayers(str(folder), section, joint=2), model._fitted.lower
    same = zip(lower._body.parameters(), untouched._body.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)
    assert not torch.equal(lower.joint.layers[0].mlp.up_proj.weight, untouched.joint.layers[0].mlp.up_proj.weight)
    prompts, truth = model._prompts(data, model._fitted)
    with torch.no_grad():
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model._fitted.forward(prompts), torch.tensor(truth))
    assert float(loss) < 0.6


def test_requests_are_answered_in_order(model: LateInteraction, data: SplitDataset) -> None:
    questions = requests(data)
    empty = Request(id="none", user_id="u1", history=questions[0].history)
    new = Request(id="new", user_id="unknown", item="unknown", history=())
    answers = model.answer([*questions, empty, new])
    assert [answer.request_id for answer in answers] == [*(request.id for request in questions), "none", "new"]
    assert isinstance(answers[-2], Unparsed)
    assert all(isinstance(each, Probability) and 0 < each.value < 1 for each in [*answers[:-2], answers[-1]])


def test_a_history_is_read_once(model: LateInteraction, data: SplitDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[str]()
    histories = {user: data.history(user, "test") for user in data.users()[:2]}
    seen = {event.item_id for events in histories.values() for event in events}
    questions = [
        Request(id=f"{user} {item}", user_id=user, item=item, history=history)
        for item in sorted(set(data.dataset.items) - seen)[:4]
        for user, history in histories.items()
    ]
    assert len(questions) == 8
    single = {each.request_id: each for request in questions for each in model.answer([request])}
    user_parts = model._fitted.user
    monkeypatch.setattr(model._fitted, "user", lambda events: read.append("") or user_parts(events))
    answers = model.answer(questions)
    assert len(read) == 2 and [each.request_id for each in answers] == [request.id for request in questions]
    for each in answers:
        alone = single[each.request_id]
        assert isinstance(each, Probability) and isinstance(alone, Probability)
        assert each.value == pytest.approx(alone.value, abs=1e-5)


def test_rejects_too_many_joint_layers(folder: Path, data: SplitDataset) -> None:
    for wrong in ({"joint": LAYERS + 1}, {"joint": 3, "layers": 2}):
        with raises(RecipeError, Facts("bad-value", column="joint", says=f"has {LAYERS}")):
            fitted(folder, data, **wrong)
    assert PromptPart("x", CANDIDATE).kind == 3


def test_restored_fit_gives_same_answers(model: LateInteraction, folder: Path, data: SplitDataset) -> None:
    again = LateInteraction(LateInteraction.Config(model=str(folder), joint=2), seed=0)
    again.restore(data, model.state())
    # Padding differs, so sums may differ in their last bits.
    one, other = (
        [answer.value for answer in each.answer(requests(data)) if isinstance(answer, Probability)]
        for each in (model, again)
    )
    assert one == pytest.approx(other, abs=1e-5) and len(set(one)) > 1


def test_fit_key_depends_on_weights(tmp_path: Path, data: SplitDataset) -> None:
    model = LateInteraction(LateInteraction.Config(model=str(make_model(tmp_path / "deep", layers=LAYERS))), seed=0)
    assert isinstance(model, Storable)
    before = fit_key(model, data, 0)
    assert before == fit_key(model, data, 0)
    config = tmp_path / "deep" / "config.json"
    config.write_text(config.read_text("utf-8").replace("{", "{\n", 1), encoding="utf-8")
    assert fit_key(model, data, 0) != before
