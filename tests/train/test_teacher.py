"""A teacher of another shape: its loss by hand, what it refuses, and that a pupil comes near it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmrec.backends.encode import IGNORED
from llmrec.errors import ModelError
from llmrec.models.load import load_model, load_tokenizer
from llmrec.recipe.schema import TeacherSection, TrainSection
from llmrec.train import lora, sft
from llmrec.train.batches import plan
from llmrec.train.heads import open_teacher
from llmrec.train.loss import TaughtLoss, label_loss, related
from tests.conftest import make_model, opened, section
from tests.facts import Facts, raises
from tests.train.test_training import examples


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
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    load_tokenizer(str(wide), section(wide)).save_pretrained(folder)
    return folder


def test_the_loss_is_that_of_soft_targets_by_hand(wide: Path, narrow: Path) -> None:
    (teacher, encoder), (pupil, _) = opened(wide), opened(narrow)
    row = encoder.row(examples()[0])
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    wanted = labels[:, 1:] != IGNORED
    answers = torch.nn.functional.one_hot(labels[:, 1:][wanted], pupil.config.vocab_size).float()
    said = teacher(input_ids=ids).logits[:, :-1][wanted].softmax(-1).detach()
    for share in (0.0, 0.3, 1.0):
        pupil.zero_grad()
        expected = -(
            ((1 - share) * answers + share * said) * pupil(input_ids=ids).logits[:, :-1][wanted].log_softmax(-1)
        ).sum()
        expected.backward()
        gradients = [each.grad.clone() for each in pupil.parameters()]
        pupil.zero_grad()
        found, count = label_loss(pupil, ids, labels, TaughtLoss(teacher, share))
        found.backward()
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5) and count == int(wanted.sum())
        for one, other in zip(pupil.parameters(), gradients, strict=True):
            assert torch.allclose(one.grad, other, atol=1e-5)
    assert all(each.grad is None for each in teacher.parameters())


def test_relations_are_compared_by_hand_and_whatever_the_widths() -> None:
    torch.manual_seed(0)
    states, teacher = torch.randn(5, 4), torch.randn(5, 7)
    total = 0.0
    for n in range(5):
        own, theirs = (torch.tensor([float(each[n] @ other) for other in each]) for each in (states, teacher))
        total += float((own / own.norm() - theirs / theirs.norm()).square().sum())
    assert float(related(states, teacher)) == pytest.approx(total / 5, rel=1e-5)
    turned = torch.linalg.qr(torch.randn(4, 4))[0]
    assert float(related(states, 3 * states @ turned)) == pytest.approx(0, abs=1e-6)
    assert 0 < float(related(states, teacher)) <= 4


def test_relations_stand_beside_the_loss_of_targets(wide: Path, narrow: Path) -> None:
    (teacher, encoder), (pupil, _) = opened(wide), opened(narrow)
    row = encoder.row(examples()[0])
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    plain, count = label_loss(pupil, ids, labels, TaughtLoss(teacher, 0.5))
    both, _ = label_loss(pupil, ids, labels, TaughtLoss(teacher, 0.5, 2.0))
    wanted = labels[:, 1:] != IGNORED
    states = [each.get_decoder()(input_ids=ids).last_hidden_state[:, :-1][wanted] for each in (pupil, teacher)]
    assert float((both - plain).detach()) == pytest.approx(2 * count * float(related(*states).detach()), rel=1e-4)


def test_a_pupil_comes_near_its_teacher(wide: Path, narrow: Path, tmp_path: Path) -> None:
    (_, encoder), chosen = opened(narrow), section(narrow)
    taught = open_teacher(str(wide), chosen, TeacherSection(run="x", share=1.0), _vocabulary(narrow))
    train = TrainSection(
        method="full", steps=30, batch_tokens=256, learning_rate=5e-3, valid_rows=0, save_every=30, report_to=()
    )
    rows = [encoder.row(each) for each in examples()]
    steps = plan((rows[n % len(rows)] for n in range(10_000)), steps=30, batch_tokens=256, seed=0)
    model = lora.load_trainable(str(narrow), chosen, train, tokens=[])
    ids, labels = torch.tensor([rows[0].ids]), torch.tensor([rows[0].labels])
    with torch.no_grad():
        before = float(label_loss(model, ids, labels, taught)[0])
    sft.train(
        model,
        encoder,
        steps,
        {},
        train,
        folder=tmp_path,
        seed=0,
        quiet=True,
        loss=sft.LossInputs(taught=taught),
        device="cpu",
    )
    with torch.no_grad():
        wanted = labels[:, 1:] != IGNORED
        said = taught.teacher(input_ids=ids).logits[:, :-1][wanted].log_softmax(-1)
        after = float(label_loss(model, ids, labels, taught)[0])
    least = float(-(said.exp() * said).sum())
    assert after - least < 0.5 * (before - least)


def _vocabulary(folder: Path) -> int:
    return int(load_model(str(folder), section(folder)).config.vocab_size)


def test_other_tokens_are_refused(wide: Path) -> None:
    with raises(ModelError, Facts("mismatch", column="train.teacher")):
        open_teacher(str(wide), section(wide), TeacherSection(run="x"), 17)
