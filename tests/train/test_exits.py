"""Early exits, and distillation from the last layer or from a teacher of another shape."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrec.backends.encode import IGNORED
from llmrec.backends.hf.backend import HFBackend
from llmrec.errors import ModelError, RecipeError
from llmrec.models import exits
from llmrec.models.load import load_model
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import LoraSection, TeacherSection, TrainSection
from llmrec.train import lora
from llmrec.train.batches import plan_steps
from llmrec.train.heads import load_distillation_loss
from llmrec.train.loss import DistillationLoss, ExitLoss, label_loss, similarity_loss
from llmrec.types import Prompt
from tests.conftest import encoder_of, make_model, opened, section
from tests.facts import Facts, raises
from tests.train.tiny import alone, examples, fit, user

LAYERS = 4
PROMPT = Prompt(messages=user("rating Heat"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep"), layers=LAYERS)


@pytest.mark.parametrize("layers", [1, 24])
def test_exit_weights_sum_to_1_and_grow_with_depth(layers: int) -> None:
    weights = exits.exit_weights(layers)
    assert sum(weights) == pytest.approx(1) and len(weights) == layers
    assert [each / weights[0] for each in weights] == pytest.approx(range(1, layers + 1))


@torch.no_grad()
def test_loss_is_weighted_sum_of_truncated_models(folder: Path) -> None:
    model, encoder = opened(folder)
    inputs = alone(encoder.row(examples()[0]))
    loss, count = label_loss(model, *inputs, ExitLoss(None))
    body, expected = model.get_decoder(), 0.0
    layers = body.layers
    for depth, weight in enumerate(exits.exit_weights(LAYERS), start=1):
        body.layers = torch.nn.ModuleList(list(layers)[:depth])
        single, targets = label_loss(model, *inputs)
        expected += weight * float(single)
        assert count == targets
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_distillation_from_the_last_layer_by_hand(folder: Path) -> None:
    model, encoder = opened(folder)
    ids, labels = alone(encoder.row(examples()[0]))
    kept = labels[:, 1:] != -100
    answers = torch.nn.functional.one_hot(labels[:, 1:][kept], model.config.vocab_size).float()

    def by_hand(share: float) -> Any:
        logs = [
            model.lm_head(each[:, :-1][kept]).log_softmax(-1) for each in exits.states_by_depth(model, input_ids=ids)
        ]
        last = logs[-1].detach().exp()
        targets = [(1 - share) * answers + share * last] * (LAYERS - 1) + [answers]
        losses = [-(target * each).sum() for target, each in zip(targets, logs, strict=True)]
        return sum(weight * loss for weight, loss in zip(exits.exit_weights(LAYERS), losses, strict=True))

    for share in (0.0, 0.3):
        loss, expected = label_loss(model, ids, labels, ExitLoss(None, share))[0], by_hand(share)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        trained = [each for each in model.parameters() if each.requires_grad]
        for one, two in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "says"), [({}, "train.exits"), ({"exits": True, "method": "option"}, "train.method=lora")]
)
def test_rejects_distillation_without_teacher(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrainSection(distill=0.5, **more)


@pytest.mark.parametrize("depth", [1, LAYERS])
def test_exit_equals_truncated_model(folder: Path, depth: int) -> None:
    model, encoder = opened(folder)
    leaving = HFBackend(model, encoder, exit=depth)
    result = leaving.score([PROMPT], [("1", "4")], closed=False)[0]
    cut, _ = opened(folder)
    cut.get_decoder().layers, cut.config.num_hidden_layers = cut.get_decoder().layers[:depth], depth
    expected = HFBackend(cut, encoder).score([PROMPT], [("1", "4")], closed=False)[0]
    assert result.engine == "hf:exit" and result.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert leaving.exits is not None and leaving.exits.taken == {depth: 1}
    assert not any(layer._forward_hooks for layer in model.get_decoder().layers)


def test_confidence_exits_at_first_confident_layer(folder: Path) -> None:
    model, encoder = opened(folder)
    taken = []
    for sure in (0.5, 0.9, 0.999999):
        backend = HFBackend(model, encoder, exit=sure)
        backend.score([PROMPT], [("1", "4")], closed=False)
        assert backend.exits is not None
        taken.append(next(iter(backend.exits.taken)))
    assert taken[0] == 1 and taken == sorted(taken) and taken[-1] == LAYERS
    results = [HFBackend(model, encoder, exit=n).score([PROMPT], [("1", "4")], closed=False)[0] for n in range(1, 5)]
    best = [max(torch.tensor(each.logprobs).softmax(0).tolist()) for each in results]
    assert taken[1] == next((n for n, each in enumerate(best, start=1) if each >= 0.9), LAYERS)


def test_labels_of_several_tokens_use_all_layers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, encoder = opened(folder)
    backend = HFBackend(model, encoder, exit=1)
    backend.score([PROMPT, PROMPT], [("1", "Toy Story"), ("1", "4")], closed=False)
    assert backend.exits is not None and backend.exits.whole == 1 and backend.exits.taken == {1: 1}
    backend.close()
    assert "eval.exit: 1 of 2 scored prompts" in caplog.text


def test_item_tokens_get_gradients_with_exits(folder: Path) -> None:
    train = TrainSection(exits=True, lora=LoraSection(rank=4))
    encoder = opened(folder)[1]
    model = lora.load_trainable(str(folder), section(folder), train, tokens=[5, 6])
    assert hasattr(model.get_output_embeddings(), "token_adapter")
    exits.check_early_exits(model.get_base_model(), "train.exits")
    label_loss(model, *alone(encoder.row(examples()[0])), ExitLoss(None))[0].backward()
    rows = next(each for name, each in model.named_parameters() if "trainable_tokens_delta" in name)
    assert float(rows.grad.abs().max()) > 0


def test_every_depth_learns(folder: Path, tmp_path: Path) -> None:
    train = TrainSection(exits=True, lora=LoraSection(rank=4), learning_rate=5e-3, valid_every=9, save_every=9)
    encoder = opened(folder)[1]
    rows = [encoder.row(each) for each in examples()[:64]]
    steps = plan_steps(iter(rows), steps=8, batch_tokens=160, seed=0)
    model = lora.load_trainable(str(folder), section(folder), train)
    ids, labels = alone(steps[0].rows[0])

    @torch.no_grad()
    def losses() -> list[float]:
        states, kept = exits.states_by_depth(model.get_base_model(), input_ids=ids), labels[:, 1:] != -100
        logits = [model.get_output_embeddings()(each[:, :-1][kept]) for each in states]
        return [float(torch.nn.functional.cross_entropy(each, labels[:, 1:][kept])) for each in logits]

    before = losses()
    fit(model, encoder, steps, train, tmp_path)
    after = losses()
    assert all(later < earlier for earlier, later in zip(before, after, strict=True))


def test_rejects_impossible_exits(folder: Path) -> None:
    model, encoder = opened(folder)
    with raises(RecipeError, Facts("bad-value", column="eval.exit", says=f"{LAYERS} layers")):
        HFBackend(model, encoder, exit=LAYERS + 1)
    for wrong in ("eval.exit=2.5", "eval.backend=vllm"):
        with raises(RecipeError, Facts(column="eval.exit", says="eval.backend=hf", kind="contradiction")):
            load_recipe("recipes/movielens-100k/yes-no.yaml", ["eval.exit=2", wrong])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("wide"), layers=3)


@pytest.fixture(scope="module")
def narrow(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of fewer layers and half the width over the same tokens."""
    folder = tmp_path_factory.mktemp("narrow")
    config = load_model(str(wide), section(wide)).config
    torch.manual_seed(1)
    small = type(config).from_dict({**config.to_dict(), "hidden_size": config.hidden_size // 2, "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    encoder_of(wide).tokenizer.save_pretrained(folder)
    return folder


def test_soft_targets_by_hand(wide: Path, narrow: Path) -> None:
    (teacher, encoder), (student, _) = opened(wide), opened(narrow)
    ids, labels = alone(encoder.row(examples()[0]))
    kept = labels[:, 1:] != IGNORED
    answers = torch.nn.functional.one_hot(labels[:, 1:][kept], student.config.vocab_size).float()
    soft = teacher(input_ids=ids).logits[:, :-1][kept].softmax(-1).detach()
    for share in (0.0, 0.3):
        student.zero_grad()
        logs = student(input_ids=ids).logits[:, :-1][kept].log_softmax(-1)
        expected = -(((1 - share) * answers + share * soft) * logs).sum()
        expected.backward()
        gradients = [each.grad.clone() for each in student.parameters()]
        student.zero_grad()
        loss, count = label_loss(student, ids, labels, DistillationLoss(teacher, share))
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5) and count == int(kept.sum())
        for one, other in zip(student.parameters(), gradients, strict=True):
            assert torch.allclose(one.grad, other, atol=1e-5)
    assert all(each.grad is None for each in teacher.parameters())


def test_relations_by_hand(wide: Path, narrow: Path) -> None:
    torch.manual_seed(0)
    states, targets = torch.randn(5, 4), torch.randn(5, 7)
    total = 0.0
    for n in range(5):
        ours, theirs = (torch.tensor([float(each[n] @ other) for other in each]) for each in (states, targets))
        total += float((ours / ours.norm() - theirs / theirs.norm()).square().sum())
    assert float(similarity_loss(states, targets)) == pytest.approx(total / 5, rel=1e-5)
    turned = torch.linalg.qr(torch.randn(4, 4))[0]
    assert float(similarity_loss(states, 3 * states @ turned)) == pytest.approx(0, abs=1e-6)
    # They are added to the loss of targets.
    (teacher, encoder), (student, _) = opened(wide), opened(narrow)
    ids, labels = alone(encoder.row(examples()[0]))
    plain, count = label_loss(student, ids, labels, DistillationLoss(teacher, 0.5))
    both, _ = label_loss(student, ids, labels, DistillationLoss(teacher, 0.5, 2.0))
    kept = labels[:, 1:] != IGNORED
    hidden = [each.get_decoder()(input_ids=ids).last_hidden_state[:, :-1][kept] for each in (student, teacher)]
    assert float((both - plain).detach()) == pytest.approx(
        2 * count * float(similarity_loss(*hidden).detach()), rel=1e-4
    )


def test_student_approaches_its_teacher(wide: Path, narrow: Path, tmp_path: Path) -> None:
    encoder = encoder_of(narrow)
    size = load_model(str(narrow), section(narrow)).config.vocab_size
    taught = load_distillation_loss(str(wide), section(narrow), TeacherSection(run="x", share=1.0), size)
    train = TrainSection(method="full", steps=20, learning_rate=5e-3, valid_rows=0, save_every=20, report_to=())
    rows = [encoder.row(each) for each in examples()]
    steps = plan_steps(cycle(rows), steps=20, batch_tokens=256, seed=0)
    model = lora.load_trainable(str(narrow), section(narrow), train)
    ids, labels = alone(rows[0])

    def loss() -> float:
        with torch.no_grad():
            return float(label_loss(model, ids, labels, taught)[0])

    before = loss()
    fit(model, encoder, steps, train, tmp_path, taught=taught)
    with torch.no_grad():
        soft = taught.teacher(input_ids=ids).logits[:, :-1][labels[:, 1:] != IGNORED].log_softmax(-1)
    least = float(-(soft.exp() * soft).sum())
    assert loss() - least < 0.5 * (before - least)


def test_rejects_teacher_with_other_tokens(wide: Path) -> None:
    with raises(ModelError, Facts("mismatch", column="train.teacher")):
        load_distillation_loss(str(wide), section(wide), TeacherSection(run="x"), 17)
