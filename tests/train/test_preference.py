"""Losses from preference: equal to their definitions and to TRL's, against an exact reference, and learned from."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.models.item_tokens import extended
from llmrec.models.load import load_model, load_tokenizer
from llmrec.recipe.schema import LoraSection, ModelSection, PreferenceSection, TrainSection
from llmrec.tasks.rows import Listwise, against
from llmrec.train import lora, sft
from llmrec.train.batches import plan
from llmrec.train.loss import label_loss, list_scores
from llmrec.train.packing import stack, tree
from llmrec.train.preference import compare, preference_loss, reference, rewards_of
from llmrec.types import Example, Message, Segment
from tests.train.test_item_tokens import INDEX, TITLES

FILMS = ("Heat", "Fargo", "The Big Lebowski", "Alien")


def section(**keys: Any) -> PreferenceSection:
    return PreferenceSection(**keys)


def toys() -> tuple[Any, Any, Any, Any]:
    """Log-likelihoods of lists under the model and its reference, which are chosen, and how long the answers are."""
    rng = np.random.default_rng(0)
    scores, before = (torch.from_numpy(-rng.uniform(2, 30, size=(5, 4))) for _ in range(2))
    return scores, before, torch.tensor([0, 2, 3, 1, 1]), torch.from_numpy(rng.integers(1, 9, size=(5, 4))).double()


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# --------------------------------------------------------------------------- what they are


@pytest.mark.parametrize(
    "keys",
    [
        {"loss": "dpo", "beta": 0.3},
        {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2, "margin": 0.5},
        {"loss": "s-dpo", "beta": 0.7},
        {"loss": "s-dpo", "beta": 0.7, "reference_free": True, "margin": 0.4},
        {"loss": "simpo", "beta": 2.0, "margin": 1.0},
        {"loss": "ipo", "beta": 0.1},
    ],
)
def test_the_losses_are_what_their_papers_say(keys: dict[str, Any]) -> None:
    own = section(**keys)
    scores, before, chosen, lengths = toys()
    found = preference_loss(rewards_of(scores, before if own.refers else None, lengths, own), chosen, own)
    wanted = 0.0
    for n, at in enumerate(chosen.tolist()):
        ratio = [float(scores[n, k] - (before[n, k] if own.refers else 0.0)) for k in range(4)]
        mean = [value / float(length) for value, length in zip(ratio, lengths[n], strict=True)]
        others = [k for k in range(4) if k != at]
        if own.loss == "ipo":
            wanted += sum((mean[at] - mean[k] - 1 / (2 * own.beta)) ** 2 for k in others) / 3
        elif own.loss == "s-dpo":
            # -log sigmoid(-log sum exp(beta (ratio of a rejected answer - ratio of the chosen one))), as printed.
            worse = sum(math.exp(own.beta * (ratio[k] - ratio[at]) + own.margin) for k in others)
            wanted += -math.log(sigmoid(-math.log(worse)))
        else:
            values = mean if own.loss == "simpo" else ratio
            ahead = [own.beta * (values[at] - values[k]) - own.margin for k in others]
            e = own.label_smoothing
            wanted += sum(-(1 - e) * math.log(sigmoid(a)) - e * math.log(sigmoid(-a)) for a in ahead) / 3
    assert float(found) == pytest.approx(wanted, abs=1e-6)


def test_s_dpo_with_one_rejected_answer_is_dpo() -> None:
    scores, before, _, lengths = (each[:, :2] if each.dim() == 2 else each for each in toys())
    chosen = torch.tensor([0, 1, 1, 0, 1])
    both = [
        preference_loss(rewards_of(scores, before, lengths, own), chosen, own)
        for own in (section(loss="s-dpo", negatives=1), section(loss="dpo", negatives=1))
    ]
    assert float(both[0]) == pytest.approx(float(both[1]), abs=1e-12)


@pytest.mark.parametrize(("loss", "smoothing"), [("simpo", 0.0), ("simpo", 0.1), ("sigmoid", 0.1)])
def test_pair_losses_are_those_of_trl(loss: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    scores, _, _, lengths = toys()
    kind = "simpo" if loss == "simpo" else "dpo"
    own = section(
        loss=kind, beta=1.5, margin=0.7 if kind == "simpo" else 0.0, label_smoothing=smoothing, reference_free=True
    )
    values = scores / lengths if kind == "simpo" else scores
    stub = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), loss_type=loss, beta=1.5, simpo_gamma=0.7,
        label_smoothing=smoothing,
    )  # fmt: skip
    theirs = CPOTrainer.cpo_loss(stub, values[:, 0], values[:, 1])[0]
    pairs, chosen = slice(None, 2), torch.zeros(5, dtype=torch.long)
    ours = preference_loss(rewards_of(scores[:, pairs], None, lengths[:, pairs], own), chosen, own)
    assert float(ours) == pytest.approx(float(theirs.sum()), abs=1e-6)


# --------------------------------------------------------------------------- what they read


def lists(count: int = 12) -> list[Example]:
    """Questions whose first answer is the chosen one: the film after the one that stands in the question."""
    made = []
    for n in range(count):
        chosen = n % len(FILMS)
        question = (Message("user", (Segment("text", "Next to: "), Segment("item", FILMS[chosen - 1]))),)
        rejected = tuple(title for title in FILMS if title != FILMS[chosen])
        made.append(
            Example(
                id=str(n), user_id="u", task="sequential", template="sequential/next-title", messages=question,
                answer=(Segment("target", FILMS[chosen]),), ends_turn=True, rejected=rejected,
            )
        )  # fmt: skip
    return made


class Case:
    """A tiny model with an adapter, lists for it, and steps of these."""

    def __init__(
        self, folder: Path, count: int = 12, *, negatives: int = 3, steps: int = 6, tokens: Any = (), **keys: Any
    ):
        self.folder, self.model_section = folder, ModelSection(name=str(folder), dtype="float32")
        self.train = TrainSection(
            preference=section(negatives=negatives, **keys), start="sft", steps=steps, learning_rate=1e-3,
            lora=LoraSection(rank=4), valid_every=2, save_every=2, valid_rows=0,
        )  # fmt: skip
        self.encoder = Encoder(load_tokenizer(str(folder), self.model_section), max_length=256)
        ids = self.encoder.tokenizer.convert_tokens_to_ids(list(tokens))
        torch.manual_seed(0)
        self.model = lora.load_trainable(str(folder), self.model_section, self.train, tokens=ids)
        size = 1 + negatives
        self.rows = [self.encoder.row(each) for one in lists(count) for each in against(one)[:size]]
        self.steps = plan(chain(self.rows), steps=steps, batch_tokens=200, seed=0, lists=size)
        self.own = self.train.preference
        self.listwise = Listwise("softmax", size, preference=self.own)

    def moved(self) -> Case:
        """Have what is trained be other than at the start."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.requires_grad and "lora_A" not in name:
                    p.add_(torch.randn_like(p) * 0.02)
        return self

    def packed(self) -> dict[str, Any]:
        laid = stack([tree(each.rows) for each in self.steps[0].bins], 0)
        return {name: torch.from_numpy(each) for name, each in asdict(laid).items()}

    def run(self, out: Path) -> Any:
        return sft.train(
            self.model,
            self.encoder,
            self.steps,
            {},
            self.train,
            folder=out,
            seed=0,
            quiet=True,
            loss=sft.LossInputs(listwise=self.listwise),
        )


def plain(model: Any, row: TokenRow) -> Any:
    """A row's log-likelihood, unpacked."""
    return -label_loss(model, torch.tensor([row.ids]), torch.tensor([row.labels]))[0]


@pytest.mark.parametrize("tokens", [False, True])
def test_the_reference_is_the_model_that_training_starts_from(tokens: bool, llama_folder: Path, tmp_path: Path) -> None:
    folder = llama_folder
    if tokens:
        folder = tmp_path / "base"
        extended(str(llama_folder), ModelSection(name=str(llama_folder)), INDEX, TITLES, folder, words=True, seed=0)
    case = Case(folder, tokens=INDEX.tokens if tokens else ()).moved()
    start = load_model(str(folder), case.model_section).eval()
    with torch.no_grad():
        theirs = list_scores(start, case.packed(), 4)
        ours = list_scores(case.model, case.packed(), 4)
    with reference(case.model):
        before = list_scores(case.model, case.packed(), 4)
    assert torch.allclose(before, theirs, atol=1e-4, rtol=0) and not torch.allclose(ours, theirs, atol=0.05)
    assert all(p.requires_grad for name, p in case.model.named_parameters() if "lora" in name or "delta" in name)


@pytest.mark.parametrize("loss", ["dpo", "s-dpo", "simpo"])
def test_gradients_are_those_of_plain_rows(loss: str, llama_folder: Path) -> None:
    case = Case(llama_folder, loss=loss, negatives=3, sft_weight=0.3).moved()
    start = load_model(str(llama_folder), case.model_section).eval()
    case.model.train()

    def gradients(total: Any) -> torch.Tensor:
        case.model.zero_grad()
        total.backward()
        trained = [(name, p) for name, p in case.model.named_parameters() if p.requires_grad]
        return torch.cat([p.grad.flatten().double() for _, p in sorted(trained)])

    total, count, figures = compare(case.model, case.packed(), case.own)
    ours = gradients(total)
    wanted: Any = 0.0
    right = 0.0
    for each in case.steps[0].bins:
        at = next(n for n, row in enumerate(each.rows) if row.weight > 0)
        scores = torch.stack([plain(case.model, row) for row in each.rows])[None]
        with torch.no_grad():
            before = torch.stack([plain(start, row) for row in each.rows])[None]
        lengths = torch.tensor([[float(row.targets) for row in each.rows]])
        rewards = rewards_of(scores, before if case.own.refers else None, lengths, case.own)
        wanted = wanted + preference_loss(rewards, torch.tensor([at]), case.own)
        wanted = wanted - 0.3 * scores[0, at] / lengths[0, at]
        others = torch.cat([rewards[0, :at], rewards[0, at + 1 :]])
        right += float((rewards[0, at] > others).float().mean())
    theirs = gradients(wanted)
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), abs=1e-3) and count == len(case.steps[0].bins)
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    assert cosine >= 0.999 and float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=0.01)
    assert figures["rewards/accuracies"] == pytest.approx(right)


def test_a_step_has_the_loss_and_rewards_of_trl_dpo_trainer(llama_folder: Path, tmp_path: Path) -> None:
    """TRL's own trainer on the same model and tokens: loss, margin and accuracy, for DPO and IPO."""
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
        chosen, pairs = [each[0] for each in ordered], [each[1] for each in ordered]
        width = max(len(row.ids) for row in (*chosen, *pairs))
        laid = {
            "input_ids": [[*row.ids, *[0] * (width - len(row.ids))] for row in (*chosen, *pairs)],
            "attention_mask": [[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in (*chosen, *pairs)],
            "completion_mask": [
                [int(label != -100) for label in row.labels] + [0] * (width - len(row.ids)) for row in (*chosen, *pairs)
            ],
        }
        case.moved().model.eval()
        found, count, figures = compare(case.model, case.packed(), case.own)
        loss = trainer.compute_loss(case.model, {name: torch.tensor(value) for name, value in laid.items()}).detach()
        assert float(found.detach()) / count == pytest.approx(float(loss), abs=1e-4)
        if kind == "dpo":
            told = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
            for name in ("rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen"):
                assert figures[name] / count == pytest.approx(told[name], abs=1e-3)


# --------------------------------------------------------------------------- training


def test_a_planted_preference_is_learned(llama_folder: Path, tmp_path: Path) -> None:
    case = Case(llama_folder, 300, steps=40, beta=0.5)
    done = case.run(tmp_path)
    lines = [line for line in done.log if line["loss"] is not None]
    assert lines[0]["figures"]["rewards/accuracies"] == 0 and lines[0]["loss"] == pytest.approx(math.log(4), abs=1e-5)
    assert lines[-1]["figures"]["rewards/accuracies"] > 0.95 and lines[-1]["loss"] < 0.3
    assert lines[-1]["figures"]["rewards/margins"] > lines[5]["figures"]["rewards/margins"] > 0


@pytest.mark.slow
def test_a_resumed_run_ends_like_an_uninterrupted_one(llama_folder: Path, tmp_path: Path) -> None:
    whole = Case(llama_folder, 40).run(tmp_path / "whole")
    for file in (tmp_path / "whole" / "checkpoints" / "checkpoint-6").iterdir():
        file.unlink()
    again = Case(llama_folder, 40).run(tmp_path / "whole")
    assert again.adapter_sha256 == whole.adapter_sha256
    assert [line.get("figures") for line in again.log] == [line.get("figures") for line in whole.log]
