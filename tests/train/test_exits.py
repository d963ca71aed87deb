"""Early exits: the loss at every depth, and answers from any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.backends.hf.backend import HFBackend
from llmrec.errors import RecipeError
from llmrec.models import exits
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import LoraSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import plan
from llmrec.train.loss import ExitLoss, label_loss
from llmrec.types import Message, Prompt, Segment
from tests.conftest import make_model, opened, section
from tests.facts import Facts, raises
from tests.train.test_training import examples

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep"), layers=LAYERS)


@pytest.mark.parametrize("layers", [1, 2, 24, 30])
def test_weights_of_exits_sum_to_1_and_grow_with_depth(layers: int) -> None:
    found = exits.weights(layers)
    assert sum(found) == pytest.approx(1) and len(found) == layers
    assert [each / found[0] for each in found] == pytest.approx(range(1, layers + 1))


@torch.no_grad()
def test_the_loss_is_that_of_truncated_models_weighted(folder: Path) -> None:
    model, encoder = opened(folder)
    row = encoder.row(examples()[0])
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    found, count = label_loss(model, ids, labels, ExitLoss(None))
    body, expected = model.get_decoder(), 0.0
    layers = body.layers
    for depth, weight in enumerate(exits.weights(LAYERS), start=1):
        body.layers = torch.nn.ModuleList(list(layers)[:depth])
        loss, targets = label_loss(model, ids, labels)
        expected, count_of_one = expected + weight * float(loss), targets
    assert float(found) == pytest.approx(expected, rel=1e-5) and count == count_of_one


def test_what_the_last_layer_says_is_the_target_of_a_share(folder: Path) -> None:
    model, encoder = opened(folder)
    row = encoder.row(examples()[0])
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    wanted = labels[:, 1:] != -100
    answers = torch.nn.functional.one_hot(labels[:, 1:][wanted], model.config.vocab_size).float()

    def by_hand(share: float) -> Any:
        found = [model.lm_head(each[:, :-1][wanted]).log_softmax(-1) for each in exits.depths(model, input_ids=ids)]
        said = found[-1].detach().exp()
        targets = [(1 - share) * answers + share * said] * (LAYERS - 1) + [answers]
        losses = [-(target * each).sum() for target, each in zip(targets, found, strict=True)]
        return sum(weight * loss for weight, loss in zip(exits.weights(LAYERS), losses, strict=True))

    for share in (0.0, 0.3, 1.0):
        found, expected = label_loss(model, ids, labels, ExitLoss(None, share))[0], by_hand(share)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        moved = [each for each in model.parameters() if each.requires_grad]
        for one, two in zip(torch.autograd.grad(found, moved), torch.autograd.grad(expected, moved), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "says"),
    [({}, "train.exits"), ({"exits": True, "method": "option"}, "train.method=lora")],
)
def test_distillation_that_has_no_teacher_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrainSection(distill=0.5, **more)


@pytest.mark.parametrize("depth", [1, 3, LAYERS])
def test_an_exit_answers_as_the_truncated_model(folder: Path, depth: int) -> None:
    prompt = Prompt(messages=(Message("user", (Segment("text", "rating Heat"),)),))
    model, encoder = opened(folder)
    leaving = HFBackend(model, encoder, exit=depth)
    found = leaving.score([prompt], [("1", "4")], closed=False)[0]
    cut, _ = opened(folder)
    cut.get_decoder().layers, cut.config.num_hidden_layers = cut.get_decoder().layers[:depth], depth
    expected = HFBackend(cut, encoder).score([prompt], [("1", "4")], closed=False)[0]
    assert found.engine == "hf:exit" and found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert leaving.exits is not None and leaving.exits.taken == {depth: 1}
    # Nothing of it is left on the model.
    assert not any(layer._forward_hooks for layer in model.get_decoder().layers)


def test_confidence_leaves_at_the_first_layer_that_is_sure(folder: Path) -> None:
    model, encoder = opened(folder)
    prompt = Prompt(messages=(Message("user", (Segment("text", "rating Heat"),)),))
    taken = []
    for sure in (0.5, 0.9, 0.999999):
        backend = HFBackend(model, encoder, exit=sure)
        backend.score([prompt], [("1", "4")], closed=False)
        assert backend.exits is not None
        taken.append(next(iter(backend.exits.taken)))
    assert taken[0] == 1 and taken == sorted(taken) and taken[-1] == LAYERS
    found = [HFBackend(model, encoder, exit=n).score([prompt], [("1", "4")], closed=False)[0] for n in range(1, 5)]
    best = [max(torch.tensor(each.logprobs).softmax(0).tolist()) for each in found]
    assert taken[1] == next((n for n, each in enumerate(best, start=1) if each >= 0.9), LAYERS)


def test_labels_of_several_tokens_go_through_all_layers_and_it_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, encoder = opened(folder)
    prompt = Prompt(messages=(Message("user", (Segment("text", "rating Heat"),)),))
    backend = HFBackend(model, encoder, exit=1)
    backend.score([prompt, prompt], [("1", "Toy Story"), ("1", "4")], closed=False)
    assert backend.exits is not None and backend.exits.whole == 1 and backend.exits.taken == {1: 1}
    backend.close()
    assert "eval.exit: 1 of 2 scored prompts" in caplog.text


def test_item_tokens_under_an_adapter_learn_at_every_depth(folder: Path) -> None:
    train = TrainSection(exits=True, lora=LoraSection(rank=4))
    encoder = opened(folder)[1]
    model = lora.load_trainable(str(folder), section(folder), train, tokens=[5, 6])
    assert hasattr(model.get_output_embeddings(), "token_adapter")
    exits.check(model.get_base_model(), "train.exits")
    row = encoder.row(examples()[0])
    found, _ = label_loss(model, torch.tensor([row.ids]), torch.tensor([row.labels]), ExitLoss(None))
    found.backward()
    rows = next(each for name, each in model.named_parameters() if "trainable_tokens_delta" in name)
    assert float(rows.grad.abs().max()) > 0


def test_every_depth_learns(folder: Path, tmp_path: Path) -> None:
    train = TrainSection(exits=True, lora=LoraSection(rank=4), learning_rate=5e-3, valid_every=9, save_every=9)
    encoder = opened(folder)[1]
    rows = [encoder.row(each) for each in examples()[:64]]
    steps = plan(iter(rows), steps=8, batch_tokens=160, seed=0)
    model = lora.load_trainable(str(folder), section(folder), train)
    batch = steps[0].rows[0]
    given = torch.tensor([batch.ids]), torch.tensor([batch.labels])

    @torch.no_grad()
    def losses() -> list[float]:
        states = exits.depths(model.get_base_model(), input_ids=given[0])
        wanted = given[1][:, 1:] != -100
        head = model.get_output_embeddings()
        return [
            float(torch.nn.functional.cross_entropy(head(each[:, :-1][wanted]), given[1][:, 1:][wanted]))
            for each in states
        ]

    before = losses()
    sft.train(model, encoder, steps, {}, train, folder=tmp_path, seed=0, quiet=True)
    after = losses()
    assert all(later < earlier for earlier, later in zip(before, after, strict=True))


def test_what_cannot_leave_early_is_refused(folder: Path) -> None:
    model, encoder = opened(folder)
    with raises(RecipeError, Facts("bad-value", column="eval.exit", says=f"{LAYERS} layers")):
        HFBackend(model, encoder, exit=LAYERS + 1)
    for wrong in ("eval.exit=2.5", "eval.backend=vllm"):
        with raises(RecipeError, Facts(column="eval.exit", says="eval.backend=hf", kind="contradiction")):
            load_recipe("recipes/movielens-100k/yes-no.yaml", ["eval.exit=2", wrong])
