"""Preference losses: equal to their definitions and to TRL's, with an exact reference, and learned."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmrec.backends.encode import TokenRow
from llmrec.models.item_tokens import save_with_item_tokens
from llmrec.recipe.schema import LoraSection, PreferenceSection, TrainSection
from llmrec.tasks.rows import Listwise, split_rejected
from llmrec.train import lora
from llmrec.train.batches import plan_steps
from llmrec.train.loss import candidate_log_likelihoods, label_loss
from llmrec.train.preference import implicit_rewards, preference_list_loss, preference_loss, use_reference_model
from tests.conftest import encoder_of, opened
from tests.conftest import section as model_section
from tests.train.test_item_tokens import INDEX, TITLES
from tests.train.tiny import alone, fit, lists, packed, tear


def section(**keys: Any) -> PreferenceSection:
    return PreferenceSection(**keys)


def toys() -> tuple[Any, Any, Any, Any]:
    """Return log-likelihoods under the model and its reference, chosen answers, and lengths of answers."""
    rng = np.random.default_rng(0)
    scores, before = (torch.from_numpy(-rng.uniform(2, 30, size=(5, 4))) for _ in range(2))
    return scores, before, torch.tensor([0, 2, 3, 1, 1]), torch.from_numpy(rng.integers(1, 9, size=(5, 4))).double()


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(
    "keys",
    [
        {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2, "margin": 0.5},
        {"loss": "s-dpo", "beta": 0.7},
        {"loss": "s-dpo", "beta": 0.7, "reference_free": True, "margin": 0.4},
        {"loss": "simpo", "beta": 2.0, "margin": 1.0},
        {"loss": "ipo", "beta": 0.1},
    ],
)
def test_losses_equal_those_of_the_papers(keys: dict[str, Any]) -> None:
    chosen_loss = section(**keys)
    scores, before, chosen, lengths = toys()
    rewards = implicit_rewards(scores, before if chosen_loss.refers else None, lengths, chosen_loss)
    expected, beta, margin, e = 0.0, chosen_loss.beta, chosen_loss.margin, chosen_loss.label_smoothing
    for n, at in enumerate(chosen.tolist()):
        ratio = [float(scores[n, k] - (before[n, k] if chosen_loss.refers else 0.0)) for k in range(4)]
        mean = [value / float(length) for value, length in zip(ratio, lengths[n], strict=True)]
        others = [k for k in range(4) if k != at]
        if chosen_loss.loss == "ipo":
            expected += sum((mean[at] - mean[k] - 1 / (2 * beta)) ** 2 for k in others) / 3
        elif chosen_loss.loss == "s-dpo":
            # -log sigmoid(-log sum exp(beta (ratio of a rejected answer - ratio of the chosen one))), as printed.
            worse = sum(math.exp(beta * (ratio[k] - ratio[at]) + margin) for k in others)
            expected += -math.log(sigmoid(-math.log(worse)))
        else:
            values = mean if chosen_loss.loss == "simpo" else ratio
            ahead = [beta * (values[at] - values[k]) - margin for k in others]
            expected += sum(-(1 - e) * math.log(sigmoid(a)) - e * math.log(sigmoid(-a)) for a in ahead) / 3
    assert float(preference_loss(rewards, chosen, chosen_loss)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("loss", "smoothing"), [("simpo", 0.0), ("sigmoid", 0.1)])
def test_pair_losses_equal_trl(loss: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    scores, _, _, lengths = toys()
    keys: dict[str, Any] = {"loss": "simpo", "margin": 0.7} if loss == "simpo" else {"loss": "dpo", "margin": 0.0}
    chosen_loss = section(**keys, beta=1.5, label_smoothing=smoothing, reference_free=True)
    values = scores / lengths if loss == "simpo" else scores
    stub = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), loss_type=loss, beta=1.5, simpo_gamma=0.7,
        label_smoothing=smoothing,
    )  # fmt: skip
    theirs = CPOTrainer.cpo_loss(stub, values[:, 0], values[:, 1])[0]
    rewards = implicit_rewards(scores[:, :2], None, lengths[:, :2], chosen_loss)
    ours = preference_loss(rewards, torch.zeros(5, dtype=torch.long), chosen_loss)
    assert float(ours) == pytest.approx(float(theirs.sum()), abs=1e-6)


class Case:
    """A tiny model with an adapter, and steps of lists."""

    def __init__(
        self, folder: Path, count: int = 12, *, negatives: int = 3, steps: int = 6, tokens: Any = (), **keys: Any
    ):
        self.loss = section(negatives=negatives, **keys)
        self.train = TrainSection(
            preference=self.loss, start="sft", steps=steps, learning_rate=1e-3, lora=LoraSection(rank=4),
            valid_every=2, save_every=2, valid_rows=0,
        )  # fmt: skip
        self.encoder = encoder_of(folder)
        ids = self.encoder.tokenizer.convert_tokens_to_ids(list(tokens))
        torch.manual_seed(0)
        self.model = lora.load_trainable(str(folder), model_section(folder), self.train, tokens=ids)
        size = 1 + negatives
        rows = [self.encoder.row(each) for one in lists(count) for each in split_rejected(one)[:size]]
        self.steps = plan_steps(iter(rows), steps=steps, batch_tokens=200, seed=0, lists=size)
        self.listwise = Listwise("softmax", size, preference=self.loss)

    def moved(self) -> Case:
        """Change trained weights from their initial values."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.requires_grad and "lora_A" not in name:
                    p.add_(torch.randn_like(p) * 0.02)
        return self

    def packed(self) -> dict[str, Any]:
        return packed(*(each.rows for each in self.steps[0].bins))

    def run(self, out: Path) -> Any:
        return fit(self.model, self.encoder, self.steps, self.train, out, listwise=self.listwise)


def plain(model: Any, row: TokenRow) -> Any:
    return -label_loss(model, *alone(row))[0]


@pytest.mark.parametrize("tokens", [False, True])
def test_reference_is_the_initial_model(tokens: bool, llama_folder: Path, tmp_path: Path) -> None:
    folder = llama_folder
    if tokens:
        folder = tmp_path / "base"
        save_with_item_tokens(str(llama_folder), model_section(llama_folder), INDEX, TITLES, folder, words=True, seed=0)
    case = Case(folder, tokens=INDEX.tokens if tokens else ()).moved()
    start = opened(folder)[0].eval()
    with torch.no_grad():
        theirs = candidate_log_likelihoods(start, case.packed(), 4)
        ours = candidate_log_likelihoods(case.model, case.packed(), 4)
    with use_reference_model(case.model):
        before = candidate_log_likelihoods(case.model, case.packed(), 4)
    assert torch.allclose(before, theirs, atol=1e-4, rtol=0) and not torch.allclose(ours, theirs, atol=0.05)
    assert all(p.requires_grad for name, p in case.model.named_parameters() if "lora" in name or "delta" in name)


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_gradients_equal_those_of_plain_rows(loss: str, llama_folder: Path) -> None:
    case = Case(llama_folder, loss=loss, negatives=3, sft_weight=0.3).moved()
    start = opened(llama_folder)[0].eval()
    case.model.train()

    def gradients(total: Any) -> torch.Tensor:
        case.model.zero_grad()
        total.backward()
        trained = [(name, p) for name, p in case.model.named_parameters() if p.requires_grad]
        return torch.cat([p.grad.flatten().double() for _, p in sorted(trained)])

    total, count, figures = preference_list_loss(case.model, case.packed(), case.loss)
    ours = gradients(total)
    expected: Any = 0.0
    right = 0.0
    for each in case.steps[0].bins:
        at = next(n for n, row in enumerate(each.rows) if row.weight > 0)
        scores = torch.stack([plain(case.model, row) for row in each.rows])[None]
        with torch.no_grad():
            before = torch.stack([plain(start, row) for row in each.rows])[None]
        lengths = torch.tensor([[float(row.targets) for row in each.rows]])
        rewards = implicit_rewards(scores, before if case.loss.refers else None, lengths, case.loss)
        expected = expected + preference_loss(rewards, torch.tensor([at]), case.loss)
        expected = expected - 0.3 * scores[0, at] / lengths[0, at]
        others = torch.cat([rewards[0, :at], rewards[0, at + 1 :]])
        right += float((rewards[0, at] > others).float().mean())
    theirs = gradients(expected)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), abs=1e-3)
    assert count == len(case.steps[0].bins)
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    assert cosine >= 0.999 and float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=0.01)
    assert figures["rewards/accuracies"] == pytest.approx(right)


def test_loss_and_rewards_equal_trl_dpo_trainer(llama_folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    for kind, theirs in (("dpo", "sigmoid"), ("ipo", "ipo")):
        case = Case(llama_folder, loss=kind, negatives=1, beta=0.3)
        config = DPOConfig(
            output_dir=str(tmp_path / kind), loss_type=[theirs], beta=0.3, use_cpu=True, report_to="none", bf16=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = DPOTrainer(
            model=case.model, args=config, train_dataset=texts, processing_class=case.encoder.tokenizer
        )
        ordered = [sorted(each.rows, key=lambda row: -row.weight) for each in case.steps[0].bins]
        rows = [*(each[0] for each in ordered), *(each[1] for each in ordered)]
        columns = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [[1] * len(row.ids) for row in rows],
            "completion_mask": [[int(label != -100) for label in row.labels] for row in rows],
        }
        width = max(len(row.ids) for row in rows)
        inputs = {
            name: torch.tensor([[*row, *[0] * (width - len(row))] for row in column])
            for name, column in columns.items()
        }
        case.moved().model.eval()
        total, count, figures = preference_list_loss(case.model, case.packed(), case.loss)
        loss = trainer.compute_loss(case.model, inputs).detach()
        assert float(total.detach()) / count == pytest.approx(float(loss), abs=1e-4)
        if kind == "dpo":
            metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
            for name in ("rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen"):
                assert figures[name] / count == pytest.approx(metrics[name], abs=1e-3)


def test_training_learns_a_planted_preference(llama_folder: Path, tmp_path: Path) -> None:
    case = Case(llama_folder, 200, steps=25, beta=0.5)
    done = case.run(tmp_path)
    lines = [line for line in done.log if line["loss"] is not None]
    assert lines[0]["figures"]["rewards/accuracies"] == 0 and lines[0]["loss"] == pytest.approx(math.log(4), abs=1e-5)
    assert lines[-1]["figures"]["rewards/accuracies"] > 0.95 and lines[-1]["loss"] < 0.3
    assert lines[-1]["figures"]["rewards/margins"] > lines[5]["figures"]["rewards/margins"] > 0


@pytest.mark.slow
def test_resumed_run_ends_like_an_uninterrupted_one(llama_folder: Path, tmp_path: Path) -> None:
    full = Case(llama_folder, 40).run(tmp_path)
    tear(tmp_path, 6)
    again = Case(llama_folder, 40).run(tmp_path)
    assert again.adapter_sha256 == full.adapter_sha256
    assert [line.get("figures") for line in again.log] == [line.get("figures") for line in full.log]
