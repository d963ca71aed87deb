"""Rating heads: losses by hand, hidden states, saved and resumed weights, and a run with a head."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.errors import ErrorKind, ModelError, RecipeError
from llmrec.evaluate.figures import EvalProtocol
from llmrec.evaluate.predictor import evaluate
from llmrec.exports.export import export
from llmrec.models.load import load_model, model_folder_hash
from llmrec.models.rating_head import (
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    HeadShape,
    RatingHead,
    copy_rating_head,
    last_states,
    load_rating_head,
    new_rating_head,
    save_rating_head,
    set_standardisation,
)
from llmrec.pipeline import run as pipeline
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import LoraSection, Recipe, TrainSection
from llmrec.tasks.family import family_of
from llmrec.tasks.rating import RatingScale
from llmrec.train import lora
from llmrec.train.batches import RatingClasses, plan_steps
from llmrec.train.heads import RatingHeadLoss, attach_rating_head
from llmrec.train.loss import label_loss, packed_loss
from llmrec.types import Answer, Case, Example, Rating, Request, Segment, Unparsed
from tests.conftest import encoder_of, opened, section
from tests.facts import Facts, raises
from tests.train.tiny import alone, example, fit, packed, tear, user

FIVE = RatingScale((1.0, 2.0, 3.0, 4.0, 5.0), ("1", "2", "3", "4", "5"))
TEN = RatingScale(tuple(map(float, range(11))), tuple(map(str, range(11))))
QUESTION = user("Answer with one number")


def rated(number: int, *ratings: str, chat: bool = False) -> Example:
    """Return a row that rates films; a chat row has one rating and ends its turn."""
    lines = [(Segment("item", f"Heat {number + k}: "), Segment("target", f"{r}\n")) for k, r in enumerate(ratings)]
    answer = ratings[:1] if chat else tuple(segment for line in lines for segment in line)
    return example(QUESTION, *answer, id=str(number), ends_turn=chat)


@pytest.fixture(scope="module")
def encoder(llama_folder: Path) -> Encoder:
    return encoder_of(llama_folder)


def head_of(alpha: float, width: int = 8, seed: int = 3) -> RatingHead:
    head = new_rating_head(HeadShape(values=FIVE.values, alpha=alpha, width=width), [1, 2, 3, 4, 5])
    torch.manual_seed(seed)
    torch.nn.init.normal_(head.linear.weight)
    return head


def test_classes_are_at_the_first_token_of_ratings(encoder: Encoder) -> None:
    row = encoder.row(rated(7, "4", "1", "5"))
    result = RatingClasses(encoder, FIVE).row(row)
    assert result is not None and result.ids == row.ids
    indices = [n for n, label in enumerate(result.labels) if label != IGNORED]
    assert [result.labels[n] for n in indices] == [3, 0, 4]
    assert [encoder.tokenizer.decode([row.ids[n]]) for n in indices] == ["4", "1", "5"]
    # The head reads the state of the token before, where a prompt for this rating ends.
    for n, number in zip(indices, ("7", "8", "9"), strict=True):
        assert encoder.tokenizer.decode(list(row.ids[:n])).endswith(f"Heat {number}: ")
    chat = RatingClasses(encoder, TEN).row(encoder.row(rated(0, "10", chat=True)))
    assert chat is not None and chat.targets == 1 and chat.labels[len(encoder.chat(QUESTION))] == 10


@pytest.mark.parametrize(("kept", "expected"), [(1, None), (2, [10])])
def test_truncated_rating_has_no_loss(encoder: Encoder, kept: int, expected: list[int] | None) -> None:
    row = encoder.row(rated(3, "10"))
    start = next(n for n, label in enumerate(row.labels) if label != IGNORED)
    assert encoder.tokenizer.decode(list(row.ids[start : start + 2])) == "10"
    result = RatingClasses(encoder, TEN).row(TokenRow(row.ids[: start + kept], row.labels[: start + kept]))
    assert (result and [label for label in result.labels if label != IGNORED]) == expected


def test_targets_are_counted(encoder: Encoder) -> None:
    classes = RatingClasses(encoder, FIVE)
    rows = [row for n, marks in enumerate(("55", "1", "353")) if (row := classes.row(encoder.row(rated(n, *marks))))]
    assert classes.counts(rows) == [1, 0, 2, 0, 3]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_new_head_predicts_the_mean(alpha: float) -> None:
    counts = [10, 20, 30, 25, 15]
    head = new_rating_head(HeadShape(values=FIVE.values, alpha=alpha, width=8), counts)
    mean = sum(n * value for n, value in zip(counts, FIVE.values, strict=True)) / 100
    assert head.linear.out_features == (1 if alpha == 0 else 5)
    assert head.ratings(torch.randn(4, 8)) == pytest.approx([mean] * 4, abs=0.02 if alpha else 1e-6)


def by_hand(head: RatingHead, states: Any, classes: list[int]) -> tuple[float, float]:
    """Return cross-entropy and squared error, summed, in plain Python."""
    cross = error = 0.0
    for state, n in zip(states.tolist(), classes, strict=True):
        rows = zip(head.linear.weight.tolist(), head.linear.bias.tolist(), strict=True)
        outputs = [sum(w * x for w, x in zip(weights, state, strict=True)) + bias for weights, bias in rows]
        if len(outputs) == 1:
            error += (outputs[0] - FIVE.values[n]) ** 2
            continue
        weights = [math.exp(each) for each in outputs]
        cross -= math.log(weights[n] / sum(weights))
        rating = sum(w * v for w, v in zip(weights, FIVE.values, strict=True)) / sum(weights)
        error += (rating - FIVE.values[n]) ** 2
    return cross, error


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_loss_is_the_weighted_sum_of_both(alpha: float) -> None:
    torch.manual_seed(0)
    head, states, classes = head_of(alpha), torch.randn(6, 8), [0, 4, 2, 3, 3, 1]
    cross, error = by_hand(head, states, classes)
    loss = float(RatingHeadLoss(head)(states, torch.tensor(classes)).detach())
    assert loss == pytest.approx(alpha * cross + (1 - alpha) * error, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_ratings_stay_within_the_scale(alpha: float) -> None:
    head = head_of(alpha)
    with torch.no_grad():
        head.linear.weight.mul_(100.0)
    states = torch.cat([torch.randn(50, 8) * 1e4, torch.zeros(1, 8)])
    ratings = head.ratings(states)
    assert all(math.isfinite(value) and 1.0 <= value <= 5.0 for value in ratings)
    assert len(set(ratings)) > 1


def test_states_are_standardised_dimension_by_dimension() -> None:
    head, states = head_of(0.0), torch.randn(400, 8) * torch.tensor([100.0, 1, 1, 1, 1, 1, 0.1, 0]) + 7
    before = head.outputs((states - states.mean(0)) / torch.cat([states.std(0, correction=0)[:7], torch.ones(1)]))
    set_standardisation(head, states)
    assert torch.allclose(head.outputs(states), before, atol=1e-4)
    # A constant dimension is not scaled.
    assert torch.isfinite(head.outputs(states + 0.01)).all()


def test_a_head_does_not_round_to_bfloat16() -> None:
    head, states = head_of(0.0), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head.outputs(states)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, head.outputs(states))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_read(side: str, llama_folder: Path) -> None:
    model = opened(llama_folder)[0].eval()
    texts = [[5, 9, 30, 12, 44, 7], [8, 21], [17]]
    ids, mask = torch.full((3, 6), 3), torch.zeros(3, 6, dtype=torch.long)
    for row, text in enumerate(texts):
        part = slice(6 - len(text), 6) if side == "left" else slice(0, len(text))
        ids[row, part], mask[row, part] = torch.tensor(text), 1
    with torch.no_grad():
        states = last_states(model, ids, mask)
        for state, text in zip(states, texts, strict=True):
            plain = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0, -1]
            assert torch.allclose(state, plain, atol=1e-4)
        assert not torch.allclose(states[1], states[2], atol=1e-2)


def test_packed_rows_have_the_loss_of_plain_ones(llama_folder: Path, encoder: Encoder) -> None:
    model, classes, loss = (
        opened(llama_folder)[0].eval(),
        RatingClasses(encoder, FIVE),
        RatingHeadLoss(head_of(0.5, width=128)),
    )
    rows = [row for n in range(4) if (row := classes.row(encoder.row(rated(n, *"4152"[: n + 1]))))]
    with torch.no_grad():
        single = [label_loss(model, *alone(row), loss) for row in rows]
        together, count = packed_loss(model, packed(rows), loss)
    assert count == sum(n for _, n in single) == 10
    assert float(together) == pytest.approx(sum(float(one) for one, _ in single), rel=1e-5)


def run(folder: Path, out: Path, *, alpha: float = 0.5, frozen: bool = False, **settings: Any) -> tuple[Any, Any, Any]:
    """Train on rows whose rating follows from their number; return the record, model and head."""
    values = {"steps": 12, "learning_rate": 1e-2, "valid_every": 6, "save_every": 4, **settings}
    train, encoder = TrainSection(**values), encoder_of(folder)
    classes = RatingClasses(encoder, FIVE)
    rows = [row for k in range(480) if (row := classes.row(encoder.row(rated(k % 3, str(1 + 2 * (k % 3))))))]
    torch.manual_seed(0)
    model = lora.load_trainable(str(folder), section(folder), train)
    planned = plan_steps(iter(rows), steps=train.steps, batch_tokens=256, seed=0)
    counts = classes.counts(row for step in planned for row in step.rows)
    head = attach_rating_head(model, FIVE, alpha=alpha, counts=counts, frozen=frozen)
    return fit(model, encoder, planned, train, out, {"rating": rows[:6]}, head=head), model, head


def test_training_lowers_the_loss(llama_folder: Path, tmp_path: Path) -> None:
    done, _, _ = run(llama_folder, tmp_path, steps=30, learning_rate=5e-3)
    valid = [record["valid_loss"]["rating"] for record in done.log if record["valid_loss"]]
    assert valid[-1] < 0.5 * valid[0]
    # Three ratings in equal numbers: before training, the mean's squared error and the entropy of the shares.
    assert valid[0] == pytest.approx((8 / 3 + math.log(3)) / 2, abs=0.1)


def test_frozen_trains_only_the_head(llama_folder: Path, tmp_path: Path) -> None:
    done, model, head = run(llama_folder, tmp_path, frozen=True)
    assert done.trainable_parameters == head.linear.weight.numel() + head.linear.bias.numel()
    assert all(float(p.detach().abs().sum()) == 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert head.linear.weight.abs().sum() > 0


def test_killed_run_resumes_to_the_same_head(llama_folder: Path, tmp_path: Path) -> None:
    full, model, head = run(llama_folder, tmp_path)
    tear(tmp_path, 12)
    resumed, _, again = run(llama_folder, tmp_path)
    assert resumed.adapter_sha256 == full.adapter_sha256
    assert torch.equal(head.linear.weight, again.linear.weight) and torch.equal(head.linear.bias, again.linear.bias)
    saved = load_rating_head(tmp_path / "checkpoints" / "checkpoint-12")
    assert saved is not None and torch.equal(saved.linear.weight, head.linear.weight)
    assert not hasattr(model, "rating_head")


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_merged_model_and_saved_head_answer_alike(llama_folder: Path, tmp_path: Path, alpha: float) -> None:
    _, model, head = run(llama_folder, tmp_path, alpha=alpha, steps=4, lora=LoraSection(rank=4))
    lora.merge_adapter(str(llama_folder), section(llama_folder), tmp_path / "adapter", tmp_path / "merged")
    before = model_folder_hash(str(tmp_path / "merged"))
    copy_rating_head(tmp_path / "adapter", tmp_path / "merged")
    assert model_folder_hash(str(tmp_path / "merged")) != before
    merged, loaded = load_model(str(tmp_path / "merged"), section("x")).eval(), load_rating_head(tmp_path / "merged")
    assert loaded is not None and loaded.shape == head.shape
    ids, mask = torch.tensor([[5, 9, 30, 12, 44], [6, 3, 18, 2, 31]]), torch.ones(2, 5, dtype=torch.long)
    with torch.no_grad():
        live, served = (last_states(each, ids, mask) for each in (model.eval(), merged))
        assert loaded.ratings(live) == head.ratings(live)
        assert loaded.ratings(served) == pytest.approx(head.ratings(live), abs=1e-3)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert len(index["weight_map"]) > 10


def test_rejects_damaged_head(tmp_path: Path) -> None:
    assert load_rating_head(tmp_path) is None
    save_rating_head(head_of(1.0), tmp_path)
    config = json.loads((tmp_path / HEAD_CONFIG_FILE).read_text(encoding="utf-8"))
    (tmp_path / HEAD_CONFIG_FILE).write_text(json.dumps(config | {"alpha": 0.0}), encoding="utf-8")
    with raises(ModelError, Facts("damaged", tmp_path, says="`llmrec train`")):
        load_rating_head(tmp_path)
    (tmp_path / HEAD_CONFIG_FILE).unlink()
    with raises(ModelError, Facts("damaged", tmp_path, says=("FileNotFoundError", "`llmrec train`"))):
        load_rating_head(tmp_path)
    (tmp_path / HEAD_WEIGHTS_FILE).unlink()
    assert load_rating_head(tmp_path) is None


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


def test_head_rates_for_the_tuned_model_only(ran: pipeline.Run) -> None:
    rows = {(row["arm"], row["predictor"]): row for row in ran.results["rows"] if row["arm"] != "baseline"}
    assert set(rows) == {
        *(("zero-shot", name) for name in ("expected", "parsed")),
        *(("few-shot", name) for name in ("expected", "parsed")),
        ("tuned", "head"),
    }
    head = rows["tuned", "head"]
    assert (head["engine"], head["parse_rate"], head["fallbacks"]) == ("hf:head", 1.0, 0)
    # A random model writes no numbers, so the user's mean is used, and the table shows how often.
    parsed = rows["zero-shot", "parsed"]
    assert parsed["fallbacks"] == round((1 - parsed["parse_rate"]) * parsed["n"])
    assert any("base model has no head" in note for note in ran.results["notes"])
    pairs = {(each["a"], each["b"]) for each in ran.results["comparisons"]}
    tuned = head["id"]
    assert {(tuned, rows["zero-shot", name]["id"]) for name in ("expected", "parsed")} <= pairs
    assert (tuned, "rating/baseline/user-item-bias") in pairs
    for row in ran.results["rows"]:
        assert set(row["metrics"]) == {"RMSE", "MAE", "LikedAUC"}
        assert "|how:from-4|" in row["metrics"]["LikedAUC"]["signature"]
    page = ran.report.read_text(encoding="utf-8")
    assert "LikedAUC" in page and "base model has no head" in page


def test_head_is_saved_with_the_weights_and_hashed(ran: pipeline.Run) -> None:
    folder, training = ran.folder, ran.results["training"]
    adapter, merged = load_rating_head(folder / "adapter"), load_rating_head(folder / "merged")
    assert adapter is not None and merged is not None
    assert (folder / "adapter" / HEAD_WEIGHTS_FILE).read_bytes() == (folder / "merged" / HEAD_WEIGHTS_FILE).read_bytes()
    config = json.loads((folder / "merged" / HEAD_CONFIG_FILE).read_text(encoding="utf-8"))
    assert config == {"values": [1.0, 2.0, 3.0, 4.0, 5.0], "alpha": 0.5, "width": 128}
    assert training["merged_sha256"] == model_folder_hash(str(folder / "merged"))
    assert training["target_tokens"] > training["steps"]


def test_second_run_reuses_the_head_unless_it_changed(
    ran: pipeline.Run, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("it trained again")

    monkeypatch.setattr("llmrec.pipeline.training._train", fail)
    again = pipeline.run(recipe(llama_folder), ran.folder, quiet=True)
    assert [row["metrics"] for row in again.results["rows"]] == [row["metrics"] for row in ran.results["rows"]]
    # The threshold of liked items affects only the evaluation.
    pipeline.run(recipe(llama_folder, "tasks.rating.liked=5"), ran.folder, quiet=True)
    with pytest.raises(AssertionError):
        pipeline.run(recipe(llama_folder, "tasks.rating.head.alpha=1"), ran.folder, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_contains_the_head(ran: pipeline.Run, llama_folder: Path, tmp_path: Path, dtype: str) -> None:
    pipeline.run(recipe(llama_folder), ran.folder, quiet=True)
    export(ran.folder, tmp_path / "model", check_users=0, dtype=dtype)
    assert (tmp_path / "model" / HEAD_WEIGHTS_FILE).read_bytes() == (
        ran.folder / "merged" / HEAD_WEIGHTS_FILE
    ).read_bytes()
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert f"  {HEAD_WEIGHTS_FILE}\n" in (tmp_path / "model" / "SHA256SUMS").read_text(encoding="utf-8")
    export(ran.folder, tmp_path / "adapter", check_users=0, adapter_only=True)
    assert (tmp_path / "adapter" / HEAD_CONFIG_FILE).is_file()


@pytest.mark.parametrize(
    ("change", "kind", "key", "says"),
    [
        (["eval.backend=vllm"], "contradiction", None, ("'vllm'", "set eval.backend=hf")),
        (["tasks.rating.head=null"], "contradiction", None, "the strategy 'head'"),
        (["tasks.rating.strategies=[expected]"], "contradiction", None, "the strategy 'head'"),
        (["tasks.sequential={}"], "contradiction", None, "set the weight of sequential to 0"),
        (["tasks.rating.weight=0", "eval.arms=[zero-shot]"], "contradiction", None, "give rating a weight"),
        (["tasks.rating.head.alpha=2"], "bad-value", "tasks.rating.head.alpha", ()),
    ],
)
def test_rejects_meaningless_settings(
    change: Sequence[str], kind: ErrorKind, key: str | None, says: str | tuple[str, ...]
) -> None:
    with raises(RecipeError, Facts(kind, column=key, says=says)):
        recipe("any", *change)
    # Tasks that are only evaluated are accepted.
    assert recipe("any", "tasks.sequential={weight: 0}").tasks.sequential is not None


class Fixed:
    """A predictor with fixed answers."""

    name = "fixed"

    def __init__(self, *answers: Answer) -> None:
        self._answers = answers

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return list(self._answers)


def test_liked_auc_with_a_fallback() -> None:
    truths = [5.0, 4.0, 3.0, 1.0]
    cases = [Case(request=Request(id=f"r{k}", user_id=f"u{k}", item="i"), truth=t) for k, t in enumerate(truths)]
    ratings = [Rating(request_id=f"r{k}", value=v) for k, v in enumerate([4.5, 3.0, 3.5])]
    protocol = EvalProtocol(split="x", candidates="full", cutoffs=(1,), resamples=20, seed=0, catalogue=9, liked=4.0)
    predictor = Fixed(*ratings, Unparsed(request_id="r3", reason="no number"))
    kind = family_of("rating").answer
    result = evaluate(predictor, cases, name="rating", kind=kind, protocol=protocol, fallback=lambda request: 3.0)
    # Of 2 x 2 pairs, 4.5 is above both, 3.0 is below 3.5 and equals the fallback.
    assert result.figures.metrics["LikedAUC"].value == pytest.approx((2 + 0 + 0.5) / 4)
    assert (result.figures.fallbacks, result.figures.parse_rate) == (1, 0.75)
    single = evaluate(Fixed(ratings[0]), cases[:1], name="rating", kind=kind, protocol=protocol)
    assert single.figures.metrics["LikedAUC"].value is None
