"""A rating head is trained as it says: losses by hand, states under any padding, weights that are kept and resumed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.errors import ModelError
from llmrec.models.load import load_model, load_tokenizer, weights_stamp
from llmrec.models.rating_head import (
    CONFIG,
    WEIGHTS,
    HeadShape,
    RatingHead,
    copy_head,
    last_states,
    load_head,
    new_head,
    save_head,
    standardise,
)
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.tasks.rating import Scale
from llmrec.train import lora, sft
from llmrec.train.batches import Classes, plan
from llmrec.train.heads import HeadLoss, attach
from llmrec.train.loss import label_loss, packed_loss
from llmrec.train.packing import stack, tree
from llmrec.train.steps import Step
from llmrec.types import Example, Message, Segment
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises

FIVE = Scale((1.0, 2.0, 3.0, 4.0, 5.0), ("1", "2", "3", "4", "5"))
TEN = Scale(tuple(map(float, range(11))), tuple(map(str, range(11))))
QUESTION = (Message("user", (Segment("text", "Answer with one number"),)),)


def example(number: int, *ratings: str, chat: bool = False) -> Example:
    """Return a row that rates films; a chat row has one rating and closes its turn."""
    lines = [(Segment("item", f"Heat {number + k}: "), Segment("target", f"{r}\n")) for k, r in enumerate(ratings)]
    return Example(
        id=str(number),
        user_id="u",
        task="rating",
        template="rating/x",
        messages=QUESTION,
        answer=(Segment("target", ratings[0]),) if chat else tuple(segment for line in lines for segment in line),
        ends_turn=chat,
    )


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_tokenizer(), max_length=256)


def head_of(alpha: float, width: int = 8, seed: int = 3) -> RatingHead:
    made = new_head(HeadShape(values=FIVE.values, alpha=alpha, width=width), [1, 2, 3, 4, 5])
    torch.manual_seed(seed)
    torch.nn.init.normal_(made.linear.weight)
    return made


# ------------------------------------------------------------------ rows


def test_classes_stand_where_ratings_begin(encoder: Encoder) -> None:
    row = encoder.row(example(7, "4", "1", "5"))
    made = Classes(encoder, FIVE).row(row)
    assert made is not None and made.ids == row.ids
    places = [place for place, label in enumerate(made.labels) if label != IGNORED]
    assert [made.labels[place] for place in places] == [3, 0, 4]
    assert [encoder.tokenizer.decode([row.ids[place]]) for place in places] == ["4", "1", "5"]
    # What is read is the state of the token before: where a prompt that asks for this rating ends.
    for place, number in zip(places, ("7", "8", "9"), strict=True):
        assert encoder.tokenizer.decode(list(row.ids[:place])).endswith(f"Heat {number}: ")


def test_a_chat_row_has_one_class_after_its_prompt(encoder: Encoder) -> None:
    made = Classes(encoder, TEN).row(encoder.row(example(0, "10", chat=True)))
    assert made is not None and made.targets == 1
    assert made.labels[len(encoder.chat(QUESTION))] == 10


@pytest.mark.parametrize(("kept", "wanted"), [(0, None), (1, None), (2, [10])])
def test_half_a_rating_bears_no_loss(encoder: Encoder, kept: int, wanted: list[int] | None) -> None:
    row = encoder.row(example(3, "10"))
    start = next(place for place, label in enumerate(row.labels) if label != IGNORED)
    assert encoder.tokenizer.decode(list(row.ids[start : start + 2])) == "10"
    cut = TokenRow(row.ids[: start + kept], row.labels[: start + kept])
    made = Classes(encoder, TEN).row(cut)
    assert (made and [label for label in made.labels if label != IGNORED]) == wanted


def test_targets_are_counted(encoder: Encoder) -> None:
    classes = Classes(encoder, FIVE)
    rows = [row for n, marks in enumerate(("55", "1", "353")) if (row := classes.row(encoder.row(example(n, *marks))))]
    assert classes.counts(rows) == [1, 0, 2, 0, 3]


# ------------------------------------------------------------------ the head and its loss


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_new_head_says_what_training_says_on_average(alpha: float) -> None:
    counts = [10, 20, 30, 25, 15]
    head = new_head(HeadShape(values=FIVE.values, alpha=alpha, width=8), counts)
    mean = sum(n * value for n, value in zip(counts, FIVE.values, strict=True)) / 100
    assert head.linear.out_features == (1 if alpha == 0 else 5)
    assert head.ratings(torch.randn(4, 8)) == pytest.approx([mean] * 4, abs=0.02 if alpha else 1e-6)


def by_hand(head: RatingHead, states: Any, classes: list[int]) -> tuple[float, float]:
    """Return cross-entropy and squared error, summed, in plain Python."""
    cross = error = 0.0
    for state, place in zip(states.tolist(), classes, strict=True):
        rows = zip(head.linear.weight.tolist(), head.linear.bias.tolist(), strict=True)
        outputs = [sum(w * x for w, x in zip(weights, state, strict=True)) + bias for weights, bias in rows]
        if len(outputs) == 1:
            error += (outputs[0] - FIVE.values[place]) ** 2
            continue
        weights = [math.exp(each) for each in outputs]
        cross -= math.log(weights[place] / sum(weights))
        rating = sum(w * v for w, v in zip(weights, FIVE.values, strict=True)) / sum(weights)
        error += (rating - FIVE.values[place]) ** 2
    return cross, error


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_the_loss_is_the_weighted_sum_of_both(alpha: float) -> None:
    torch.manual_seed(0)
    head, states, classes = head_of(alpha), torch.randn(6, 8), [0, 4, 2, 3, 3, 1]
    cross, error = by_hand(head, states, classes)
    found = float(HeadLoss(head)(states, torch.tensor(classes)).detach())
    assert found == pytest.approx(alpha * cross + (1 - alpha) * error, rel=1e-6)
    if alpha == 1:
        assert found == pytest.approx(cross, rel=1e-6)
    if alpha == 0:
        assert found == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_ratings_stay_within_the_scale(alpha: float) -> None:
    head = head_of(alpha)
    with torch.no_grad():
        head.linear.weight.mul_(100.0)
    states = torch.cat([torch.randn(50, 8) * 1e4, torch.zeros(1, 8)])
    found = head.ratings(states)
    assert all(math.isfinite(value) and 1.0 <= value <= 5.0 for value in found)
    assert len(set(found)) > 1


def test_states_are_standardised_dimension_by_dimension() -> None:
    head, states = head_of(0.0), torch.randn(400, 8) * torch.tensor([100.0, 1, 1, 1, 1, 1, 0.1, 0]) + 7
    before = head.outputs((states - states.mean(0)) / torch.cat([states.std(0, correction=0)[:7], torch.ones(1)]))
    standardise(head, states)
    found = head.outputs(states)
    assert torch.allclose(found, before, atol=1e-4)
    # A dimension that never varied is not blown up by what it is later.
    assert torch.isfinite(head.outputs(states + 0.01)).all()


def test_a_head_does_not_round_to_bfloat16() -> None:
    head, states = head_of(0.0), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head.outputs(states)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, head.outputs(states))


# ------------------------------------------------------------------ states


@pytest.mark.parametrize("kind", ["llama_folder", "qwen_folder"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_not_read(kind: str, side: str, request: pytest.FixtureRequest) -> None:
    model = load_model(str(request.getfixturevalue(kind)), ModelSection(name="x", dtype="float32")).eval()
    texts = [[5, 9, 30, 12, 44, 7], [8, 21], [17]]
    ids, mask = torch.full((3, 6), 3), torch.zeros(3, 6, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(6 - len(text), 6) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    with torch.no_grad():
        found = last_states(model, ids, mask)
        for state, text in zip(found, texts, strict=True):
            plain = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0, -1]
            assert torch.allclose(state, plain, atol=1e-4)
        assert not torch.allclose(found[1], found[2], atol=1e-2)


def test_packed_rows_have_the_loss_of_plain_ones(llama_folder: Path, encoder: Encoder) -> None:
    model = load_model(str(llama_folder), ModelSection(name="x", dtype="float32")).eval()
    classes = Classes(encoder, FIVE)
    rows = [row for n in range(4) if (row := classes.row(encoder.row(example(n, *"4152"[: n + 1]))))]
    loss = HeadLoss(head_of(0.5, width=128))
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            one, n = label_loss(model, torch.tensor([row.ids]), torch.tensor([row.labels]), loss)
            total, count = total + float(one), count + n
        stacked = stack([tree(rows)], 0)
        packed = {name: torch.from_numpy(each) for name, each in asdict(stacked).items()}
        both, together = packed_loss(model, packed, loss)
    assert count == together == 10
    assert float(both) == pytest.approx(total, rel=1e-5)


# ------------------------------------------------------------------ training


def run(folder: Path, out: Path, *, alpha: float = 0.5, frozen: bool = False, **settings: Any) -> tuple[Any, Any, Any]:
    """Train for 12 steps on rows whose rating follows from their number; return the record, model and head."""
    section = ModelSection(name=str(folder), dtype="float32")
    values = {"steps": 12, "batch_tokens": 256, "learning_rate": 1e-2, "valid_every": 6, "save_every": 4, **settings}
    train = TrainSection(**values)
    encoder = Encoder(load_tokenizer(str(folder), section), max_length=256)
    classes = Classes(encoder, FIVE)
    rows = [row for k in range(480) if (row := classes.row(encoder.row(example(k % 3, str(1 + 2 * (k % 3))))))]
    torch.manual_seed(0)
    model = lora.load_trainable(str(folder), section, train)
    planned: list[Step] = plan(iter(rows), steps=train.steps, batch_tokens=256, seed=0)
    counts = classes.counts(row for step in planned for row in step.rows)
    head = attach(model, FIVE, alpha=alpha, counts=counts, frozen=frozen)
    done = sft.train(
        model,
        encoder,
        planned,
        {"rating": rows[:6]},
        train,
        folder=out,
        seed=0,
        quiet=True,
        loss=sft.LossInputs(head=head),
    )
    return done, model, head


@pytest.mark.parametrize(
    "alpha", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_it_learns_whatever_the_loss(llama_folder: Path, tmp_path: Path, alpha: float) -> None:
    done, _, _ = run(llama_folder, tmp_path, alpha=alpha, steps=40, learning_rate=5e-3)
    valid = [record["valid_loss"]["rating"] for record in done.log if record["valid_loss"]]
    assert valid[-1] < 0.5 * valid[0]
    # Three ratings in equal numbers: before training, the mean's squared error and the entropy of the shares.
    start = {0.0: 8 / 3, 0.5: (8 / 3 + math.log(3)) / 2, 1.0: math.log(3)}[alpha]
    assert valid[0] == pytest.approx(start, abs=0.1)


def test_gradients_reach_the_adapter_and_the_head(llama_folder: Path, tmp_path: Path) -> None:
    _, model, head = run(llama_folder, tmp_path, steps=3)
    assert head.linear.weight.abs().sum() > 0
    moved = [float(p.detach().abs().sum()) for name, p in model.named_parameters() if "lora_B" in name]
    assert moved and all(size > 0 for size in moved)
    assert not hasattr(model, "rating_head")


def test_frozen_trains_the_head_alone(llama_folder: Path, tmp_path: Path) -> None:
    done, model, head = run(llama_folder, tmp_path, frozen=True)
    assert done.trainable_parameters == head.linear.weight.numel() + head.linear.bias.numel()
    assert all(float(p.detach().abs().sum()) == 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert head.linear.weight.abs().sum() > 0


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_head(llama_folder: Path, tmp_path: Path, method: str) -> None:
    settings = {"method": method, "learning_rate": 1e-3 if method == "full" else 1e-2}
    whole, _, head = run(llama_folder, tmp_path / "whole", **settings)
    for file in (tmp_path / "whole" / "checkpoints" / "checkpoint-12").iterdir():
        file.unlink()
    resumed, _, again = run(llama_folder, tmp_path / "whole", **settings)
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert torch.equal(head.linear.weight, again.linear.weight) and torch.equal(head.linear.bias, again.linear.bias)
    kept = load_head(tmp_path / "whole" / "checkpoints" / "checkpoint-12")
    assert kept is not None and torch.equal(kept.linear.weight, head.linear.weight)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_saved_merged_and_loaded_it_answers_the_same(llama_folder: Path, tmp_path: Path, alpha: float) -> None:
    section = ModelSection(name=str(llama_folder), dtype="float32")
    _, model, head = run(llama_folder, tmp_path, alpha=alpha, lora=LoraSection(rank=4))
    lora.merge(str(llama_folder), section, tmp_path / "adapter", tmp_path / "merged")
    before = weights_stamp(str(tmp_path / "merged"))
    copy_head(tmp_path / "adapter", tmp_path / "merged")
    assert weights_stamp(str(tmp_path / "merged")) != before
    merged, loaded = load_model(str(tmp_path / "merged"), section).eval(), load_head(tmp_path / "merged")
    assert loaded is not None and loaded.shape == head.shape
    ids, mask = torch.tensor([[5, 9, 30, 12, 44], [6, 3, 18, 2, 31]]), torch.ones(2, 5, dtype=torch.long)
    with torch.no_grad():
        live, served = (last_states(each, ids, mask) for each in (model.eval(), merged))
        assert loaded.ratings(live) == head.ratings(live)
        assert loaded.ratings(served) == pytest.approx(head.ratings(live), abs=1e-3)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert len(index["weight_map"]) > 10


def test_a_torn_head_is_one_clear_error(tmp_path: Path) -> None:
    assert load_head(tmp_path) is None
    save_head(head_of(1.0), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    (tmp_path / CONFIG).write_text(json.dumps(config | {"alpha": 0.0}), encoding="utf-8")
    with raises(ModelError, Facts("damaged", tmp_path, says="`llmrec train`")):
        load_head(tmp_path)
    (tmp_path / CONFIG).unlink()
    with raises(ModelError, Facts("damaged", tmp_path, says=("FileNotFoundError", "`llmrec train`"))):
        load_head(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert load_head(tmp_path) is None
