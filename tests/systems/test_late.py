"""Late interaction on a tiny model: cached equals uncached, places restart, what is trained, what is kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from llmrec.baselines.fits import Storable, fit_key
from llmrec.data.dataset import Dataset, conform
from llmrec.data.features import FeatureStore, writing
from llmrec.data.split import SplitDataset, split
from llmrec.errors import ModelError, RecipeError
from llmrec.models.load import load_model
from llmrec.recipe.schema import ModelSection, Split
from llmrec.systems.m6 import segments
from llmrec.systems.m6.late import CANDIDATE, LateInteraction
from llmrec.systems.m6.segments import Lower, Part
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
    made = LateInteraction(LateInteraction.Config(**config), seed=0)
    made.fit(data)
    return made


def requests(data: SplitDataset, count: int = 12) -> list[Request]:
    user = data.users()[0]
    history = data.history(user, "test")
    items = sorted(data.dataset.items)[:count]
    return [Request(id=f"r{item}", user_id=user, item=item, history=history) for item in items]


def test_a_segments_states_are_those_of_its_text_alone_with_places_from_0(folder: Path) -> None:
    section = ModelSection(name=str(folder), dtype="float32")
    lower, whole = Lower(str(folder), section, joint=1), load_model(str(folder), section)
    together = lower.states(TEXTS)
    with torch.no_grad():
        for text, states in zip(TEXTS, together, strict=True):
            out = whole(torch.tensor([lower.ids(text)]), output_hidden_states=True)
            assert torch.allclose(states, out.hidden_states[LAYERS - 1][0], atol=1e-5)
    read = lower.read
    assert read == sum(len(lower.ids(text)) for text in TEXTS)
    lower.states(TEXTS)
    assert lower.read == read


def test_one_segment_through_both_parts_is_the_model(folder: Path) -> None:
    section = ModelSection(name=str(folder), dtype="float32")
    lower, whole = Lower(str(folder), section, joint=2), load_model(str(folder), section)
    with torch.no_grad():
        (states,) = lower.states(TEXTS[:1])
        found = lower.joint(inputs_embeds=states[None]).last_hidden_state
        expected = whole.get_decoder()(torch.tensor([lower.ids(TEXTS[0])])).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-4)


# Layers that differ by their place: without positions, with another base of them, with a sliding window.
LAYERED: dict[str, dict[str, Any]] = {
    "SmolLM3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "Exaone4": {"num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 4},
    "Gemma3": {"num_hidden_layers": 6, "sliding_window": 8},
    "Olmo3": {"num_hidden_layers": 4, "sliding_window": 8},
    "Qwen3Moe": {
        "num_hidden_layers": 4,
        "mlp_only_layers": [3],
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
    },
}


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models of architectures whose layers are of several kinds."""
    import transformers

    tokenizer, made = make_tokenizer(), {}
    for name, own in LAYERED.items():
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
            **own,
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        # Larger weights than the usual init: attention then looks at some tokens more than at others.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6.0)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.mark.parametrize("name", ["SmolLM3", "Exaone4", "Gemma3", "Olmo3"])
def test_joint_layers_keep_the_kind_that_they_have_in_the_model(name: str, layered: dict[str, Path]) -> None:
    section = ModelSection(name=str(layered[name]), dtype="float32")
    whole, text = load_model(str(layered[name]), section), " ".join(TEXTS)
    for joint in (1, 3):
        lower = Lower(str(layered[name]), section, joint=joint)
        with torch.no_grad():
            (states,) = lower.states([text])
            found = lower.joint(inputs_embeds=states[None]).last_hidden_state
            expected = whole.get_decoder()(torch.tensor([lower.ids(text)])).last_hidden_state
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_model_that_cannot_be_cut_is_refused(layered: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # The last layer alone has no experts, by its number and not by a value for each layer.
    section = ModelSection(name=str(layered["Qwen3Moe"]), dtype="float32")
    with raises(ModelError, Facts("unsupported", column="joint", says="qwen3_moe")):
        Lower(str(layered["Qwen3Moe"]), section, joint=1)
    # Layers that load and compute something else.
    upper = segments._upper
    monkeypatch.setattr(segments, "_upper", lambda body, layers, *rest: upper(body, layers[::-1], *rest))
    section = ModelSection(name=str(layered["SmolLM3"]), dtype="float32")
    with raises(ModelError, Facts("unsupported", column="joint", says="smollm3")):
        Lower(str(layered["SmolLM3"]), section, joint=2)


@pytest.mark.parametrize("name", ["SmolLM3", "Exaone4", "Gemma3"])
def test_cached_equals_uncached_beyond_a_sliding_window(
    name: str, layered: dict[str, Path], data: SplitDataset
) -> None:
    model = fitted(layered[name], data, joint=3)._fitted
    asked = requests(data)
    user, candidates = model.user(asked[0].history), [model.candidate(str(request.item)) for request in asked]
    with torch.no_grad():
        cached = model.logits(user, candidates)
        whole = torch.stack([model.forward([[*user, each]])[0] for each in candidates])
    assert torch.allclose(cached, whole, atol=1e-4) and cached.std() > 1e-4


@pytest.mark.parametrize("joint", [0, 2, LAYERS])
def test_cached_equals_uncached(folder: Path, data: SplitDataset, joint: int) -> None:
    model = fitted(folder, data, joint=joint)._fitted
    asked = requests(data)
    user = model.user(asked[0].history)
    candidates = [model.candidate(str(request.item)) for request in asked]
    assert model.history >= len(user) - 1 and len(user) > 1
    with torch.no_grad():
        warm = model.logits(user, candidates)
        model.lower.forget([each.text for each in (*user, *candidates)])
        cold = torch.stack([model.forward([[*user, each]])[0] for each in candidates])
    assert torch.allclose(warm, cold, atol=1e-5) and warm.std() > 1e-4


def test_states_are_kept_beside_the_weights_stamp_and_layer(folder: Path, data: SplitDataset, tmp_path: Path) -> None:
    first = fitted(folder, data, joint=2)
    (store,) = (tmp_path / "cache" / "segments").iterdir()
    assert store.name.endswith("-2") and FeatureStore.open(store).width("item") == 128
    read = first._fitted.lower.read
    again = fitted(folder, data, joint=2)
    assert read > 0 and again._fitted.lower.read == 0
    fitted(folder, data, joint=1)
    assert len(list((tmp_path / "cache" / "segments").iterdir())) == 2
    asked = requests(data)
    assert first.answer(asked) == again.answer(asked)


def test_a_store_is_added_to_and_one_that_is_damaged_or_busy_stops_nothing(folder: Path, tmp_path: Path) -> None:
    def kept(text: str) -> tuple[int, int]:
        lower = Lower(str(folder), ModelSection(name=str(folder), dtype="float32"), joint=2)
        return lower.keep([text]), lower.read

    assert [kept(TEXTS[0])[0], kept(TEXTS[1])[0]] == [0, 0]
    assert kept(TEXTS[0]) == (1, 0) and kept(TEXTS[1]) == (1, 0)
    (store,) = (tmp_path / "cache" / "segments").iterdir()
    with writing(store):
        assert kept(TEXTS[2])[0] == 0
    assert kept(TEXTS[2])[0] == 0
    (vectors,) = store.glob("*/item-vectors.npy")
    vectors.write_bytes(vectors.read_bytes()[:-8])
    assert kept(TEXTS[0])[0] == 0
    assert kept(TEXTS[0]) == (1, 0)


def test_what_is_history_alone_is_never_asked_about(folder: Path) -> None:
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
    asked = Counter(prompt[-1].text for prompt in prompts)
    assert known - learned and asked == learned


def test_an_earlier_rating_of_the_item_that_is_asked_about_is_not_shown(folder: Path) -> None:
    items = [f"i{n}" for n in range(4)]
    rows = [(user, item, rating) for user in ("u1", "u2") for rating in (1.0, 5.0) for item in items]
    frame = pl.DataFrame(rows, ["user_id", "item_id", "rating"], orient="row").with_columns(
        timestamp=pl.int_range(pl.len()).cast(pl.Float64)
    )
    titles = {item: Item(item_id=item, title=f"Title {item}") for item in items}
    data = split(
        Dataset("repeated", "films", conform(frame), titles), Split(kind="last_share", valid=0.1, test=0.2), seed=0
    )
    model = LateInteraction(LateInteraction.Config(model=str(folder), joint=1, rows=10_000), seed=0)
    prompts, _ = model._prompts(data, model._late(model._lower(), data))
    assert prompts and all(
        candidate.text.removeprefix("Next: ") not in part.text for *shown, candidate in prompts for part in shown
    )
    model.fit(data)
    history = data.history("u1", "test")
    own = [Request(id=item, user_id="u1", item=item, history=history) for item in items]
    apart = [
        replace(request, history=tuple(event for event in history if event.item_id != request.item)) for request in own
    ]
    found = [
        [answer.value for answer in model.answer(asked) if isinstance(answer, Probability)] for asked in (own, apart)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6) and len(found[0]) == len(items)


@pytest.mark.slow
def test_only_the_joint_part_is_trained_and_it_learns(folder: Path, data: SplitDataset) -> None:
    section = ModelSection(name=str(folder), dtype="float32")
    model = fitted(folder, data, epochs=8)
    untouched, lower = Lower(str(folder), section, joint=2), model._fitted.lower
    same = zip(lower._body.parameters(), untouched._body.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)
    assert not torch.equal(lower.joint.layers[0].mlp.up_proj.weight, untouched.joint.layers[0].mlp.up_proj.weight)
    prompts, truth = model._prompts(data, model._fitted)
    with torch.no_grad():
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model._fitted.forward(prompts), torch.tensor(truth))
    assert float(loss) < 0.6


def test_every_request_is_answered_in_order(folder: Path, data: SplitDataset) -> None:
    asked = requests(data)
    model, nothing = fitted(folder, data), Request(id="none", user_id="u1", history=asked[0].history)
    new = Request(id="new", user_id="nobody", item="unknown", history=())
    found = model.answer([*asked, nothing, new])
    assert [answer.request_id for answer in found] == [*(request.id for request in asked), "none", "new"]
    assert isinstance(found[-2], Unparsed)
    assert all(isinstance(each, Probability) and 0 < each.value < 1 for each in [*found[:-2], found[-1]])


def test_a_history_is_read_once_wherever_its_questions_stand(
    folder: Path, data: SplitDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = fitted(folder, data), list[str]()
    histories = {user: data.history(user, "test") for user in data.users()[:2]}
    seen = {event.item_id for events in histories.values() for event in events}
    asked = [
        Request(id=f"{user} {item}", user_id=user, item=item, history=history)
        for item in sorted(set(data.dataset.items) - seen)[:4]
        for user, history in histories.items()
    ]
    assert len(asked) == 8
    apart = {each.request_id: each for request in asked for each in model.answer([request])}
    whole = model._fitted.user
    monkeypatch.setattr(model._fitted, "user", lambda events: read.append("") or whole(events))
    found = model.answer(asked)
    assert len(read) == 2 and [each.request_id for each in found] == [request.id for request in asked]
    for each in found:
        alone = apart[each.request_id]
        assert isinstance(each, Probability) and isinstance(alone, Probability)
        assert each.value == pytest.approx(alone.value, abs=1e-5)


def test_more_joint_layers_than_there_are_is_refused(folder: Path, data: SplitDataset) -> None:
    for wrong in ({"joint": LAYERS + 1}, {"joint": 3, "layers": 2}):
        with raises(RecipeError, Facts("bad-value", column="joint", says=f"has {LAYERS}")):
            fitted(folder, data, **wrong)
    assert Part("x", CANDIDATE).kind == 3


def test_a_kept_fit_answers_the_same(folder: Path, data: SplitDataset) -> None:
    made, again = fitted(folder, data), LateInteraction(LateInteraction.Config(model=str(folder), joint=2), seed=0)
    again.restore(data, made.state())
    # Texts that are read together are padded alike, so that sums differ in their last bits.
    asked = [
        [answer.value for answer in each.answer(requests(data)) if isinstance(answer, Probability)]
        for each in (made, again)
    ]
    assert asked[0] == pytest.approx(asked[1], abs=1e-5) and len(set(asked[0])) > 1


def test_other_weights_make_another_fit(tmp_path: Path, data: SplitDataset) -> None:
    model = LateInteraction(LateInteraction.Config(model=str(make_model(tmp_path / "deep", layers=LAYERS))), seed=0)
    assert isinstance(model, Storable)
    before = fit_key(model, data, 0)
    assert before == fit_key(model, data, 0)
    config = tmp_path / "deep" / "config.json"
    config.write_text(config.read_text("utf-8").replace("{", "{\n", 1), encoding="utf-8")
    assert fit_key(model, data, 0) != before
