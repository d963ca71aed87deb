"""Learning from reward: rewards, advantages and losses by hand, gradients, resumption, and a learned reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmrec.backends.hf.tree import MaskedTree
from llmrec.data.hashing import hash_one
from llmrec.decode.rollouts import RolloutMethod, sample_rollouts
from llmrec.decode.token_tree import TokenTrie
from llmrec.models.item_tokens import save_with_item_tokens
from llmrec.recipe.schema import LoraSection, RewardSection, TrainSection
from llmrec.tasks.base import ranking_reward
from llmrec.train import lora, sft
from llmrec.train.batches import plan_steps
from llmrec.train.reward.objective import RewardObjective, advantages, policy_loss
from llmrec.train.reward.rewards import Rewards, closing_token_count
from llmrec.types import Case, Request, Segment
from tests.conftest import encoder_of, section
from tests.train.test_item_tokens import INDEX, TITLES
from tests.train.tiny import example, fit, moved, tear, user

ITEMS = tuple(sorted(TITLES))
PLANTED = 7


class Task:
    """A task as rewards need it."""

    reward = staticmethod(ranking_reward)


@dataclass(frozen=True)
class Planted:
    """Rewards one item, whatever the question."""

    catalogue: TokenTrie
    items: Sequence[str] = ITEMS

    def of(self, case: Case, indices: Sequence[int]) -> list[float]:
        return [float(n == PLANTED) for n in indices]


class Toy:
    """A tiny model with item tokens, an adapter, and questions whose true item is the one after the last."""

    def __init__(
        self,
        base: Path,
        *,
        steps: int = 6,
        planted: bool = True,
        learning_rate: float = 1e-2,
        limit: int | None = None,
        **settings: Any,
    ) -> None:
        self.encoder = encoder_of(base)
        self.train = TrainSection(
            steps=steps, valid_rows=0, save_every=2, learning_rate=learning_rate, lora=LoraSection(rank=4, dropout=0.3)
        )
        tokens = self.encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens))
        torch.manual_seed(0)
        self.model = lora.load_trainable(str(base), section(base), self.train, tokens=tokens)
        self.catalogue = self.encoder.catalogue([INDEX.encode(item) for item in ITEMS], "\n")
        self.reward = RewardSection(**{"group": 4, **settings})
        task: Any = Task()
        rewards: Any = Planted(self.catalogue)
        if not planted:
            rewards = Rewards(self.reward.kind, task, ITEMS, self.catalogue, closing_token_count(self.catalogue))
        self.cases, rows = [], []
        for n in range(6 * steps):
            last, true = ITEMS[n % 9], ITEMS[(n + 1) % 9]
            question = user("After ", Segment("item", INDEX.encode(last)))
            rows.append(self.encoder.row(example(question, INDEX.encode(true) + "\n", id=str(n), ends_turn=False)))
            self.cases.append(Case(request=Request(id=f"q{n}", user_id="u"), truth=true))
        count = -(-steps // self.reward.updates)
        behind = self.reward.group * self.catalogue.depth
        self.steps = plan_steps(iter(rows), steps=count, batch_tokens=130, seed=0, behind=behind)
        self.objective = RewardObjective(self.steps, self.cases, self.reward, rewards, pad=0, seed=3, limit=limit)

    def run(self, out: Path) -> sft.TrainingResult:
        return fit(self.model, self.encoder, self.steps, self.train, out, objective=self.objective)

    def policy(self, prompt: Sequence[int], *, legal: bool = True, temperature: float = 1.0) -> np.ndarray[Any, Any]:
        """Return the probability of each item, by plain forward passes and a softmax over siblings."""
        results, paths = [], [self.catalogue.path(int(self.catalogue.ranks[n])) for n in range(9)]
        for path in paths:
            ids, total = torch.tensor([[*prompt, *path]]), 0.0
            with torch.no_grad():
                logits = self.model.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
            for depth, token in enumerate(path):
                rest = sorted({other[depth] for other in paths if other[:depth] == path[:depth]})
                among = logits[depth, rest] if legal else logits[depth]
                total += float(logits[depth, token] - among.logsumexp(0))
            results.append(math.exp(total))
        return np.array(results)


@pytest.fixture(scope="module")
def base(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown") / "base"
    save_with_item_tokens(str(llama_folder), section(llama_folder), INDEX, TITLES, folder, words=True, seed=0)
    return folder


def prompt_of(toy: Toy, number: int = 0) -> tuple[int, ...]:
    row = toy.steps[number].rows[0]
    return row.ids[: row.labels.count(-100)]


def rewards_of(kind: Any, *indices: int, truth: int = 1) -> list[float]:
    """Rewards of a group of four codes of two tokens: 0 and 1 share a first token, and so do 2 and 3."""
    catalogue = TokenTrie.of([(5, 1, 9), (5, 2, 9), (6, 1, 9), (6, 2, 9)])
    task: Any = Task()

    class Scorer:
        name, items = "classic", ("d", "c", "b", "a")

        def scores(self, requests: Sequence[Request]) -> np.ndarray[Any, Any]:
            return np.array([[4.0, 1.0, 4.0, 0.0]])

    rewards = Rewards(kind, task, ("a", "b", "c", "d"), catalogue, closing_token_count(catalogue), Scorer())
    return rewards.of(Case(request=Request(id="q", user_id="u"), truth="abcd"[truth]), indices)


def test_rewards_by_hand() -> None:
    assert rewards_of({"hit": 1.0}, 3, 1, 0) == [0, 1, 0]
    second = 1 / math.log2(3)
    # Without the first item the true one would be first; items after it change nothing.
    assert rewards_of({"ndcg": 1.0}, 3, 1, 0) == pytest.approx([second - 1, second, 0])
    third = 1 / math.log2(4)
    assert rewards_of({"rank-penalty": 1.0}, 3, 1, 0) == pytest.approx(
        [-1 / (1 + second + third), 0, -third / (1 + second + third)]
    )
    assert rewards_of({"rank-penalty": 1.0}, 3, 2, 0) == [0, 0, 0]
    assert rewards_of({"prefix": 1.0}, 3, 1, 0) == [0, 1, 0.5]
    # Of the other three items, b and d score above two and tie, c above one, a above none.
    assert rewards_of({"percentile": 1.0}, 0, 1, 2, 3) == pytest.approx([0, 2.5 / 3, 1 / 3, 2.5 / 3])
    assert rewards_of({"hit": 2.0, "prefix": 0.5}, 1, 0) == pytest.approx([2.5, 0.25])


def test_prefix_reward_if_one_code_is_a_prefix_of_another() -> None:
    task: Any = Task()
    # The third level is the same in the first two, and the break ends all.
    catalogue = TokenTrie.of([(5, 1, 7, 9), (5, 1, 9), (5, 2, 7, 9)])
    rewards = Rewards({"prefix": 1.0}, task, ("a", "b", "c"), catalogue, closing_token_count(catalogue))
    question = Request(id="q", user_id="u")
    assert rewards.of(Case(request=question, truth="a"), (0, 1, 2)) == pytest.approx([1, 2 / 3, 1 / 3])
    assert rewards.of(Case(request=question, truth="b"), (0, 1, 2)) == pytest.approx([2 / 3, 1, 1 / 3])
    # A level that all codes share is not always their end.
    assert closing_token_count(TokenTrie.of([(5, 1, 7, 9), (6, 1, 7, 9), (5, 2, 7, 9)])) == 1
    assert closing_token_count(TokenTrie.of([(5, 1), (5, 2)])) == 0


@pytest.mark.parametrize("normalise", [True, False])
def test_advantages_sum_to_zero(normalise: bool) -> None:
    rng = np.random.default_rng(0)
    for n in (2, 5, 16):
        weights = rng.dirichlet(np.ones(n))
        gains = advantages(rng.normal(size=n).tolist(), weights, normalise=normalise)
        assert weights @ gains == pytest.approx(0, abs=1e-12) and np.abs(gains).max() > 0.1
        if normalise:
            assert weights @ gains**2 == pytest.approx(1, abs=1e-2)
    assert advantages([0.5] * 3, np.full(3, 1 / 3), normalise=normalise).tolist() == [0, 0, 0]


def test_equal_draws_can_be_joined_with_weights() -> None:
    """Items a, b, b, b with rewards 1, 0: one weight of 3/4 gives what four rollouts give."""
    apart = advantages([1, 0, 0, 0], np.full(4, 0.25), normalise=True)
    joined = advantages([1, 0], np.array([0.25, 0.75]), normalise=True)
    assert joined.tolist() == pytest.approx([apart[0], apart[1]])
    new, old = (torch.tensor([value, -0.9, -0.9, -0.9], dtype=torch.float64) for value in (-1.0, -1.2))
    each = torch.full((4,), 0.25, dtype=torch.float64)
    four = policy_loss(new, old, old - 0.1, torch.from_numpy(apart), each, clip=0.2, beta=0.1)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    gains = torch.from_numpy(joined)
    two = policy_loss(new[:2], old[:2], old[:2] - 0.1, gains, weights, clip=0.2, beta=0.1)
    assert float(two.total) == pytest.approx(float(four.total), abs=1e-12)


def test_policy_loss_by_hand() -> None:
    new, old, reference = (-1.0, -2.0, -0.5), (-1.4, -1.9, -0.5), (-1.1, -2.5, -0.4)
    gains, weights = (1.0, -2.0, 0.5), (0.2, 0.5, 0.3)
    expected = 0.0
    for lp, before, ref, gain, weight in zip(new, old, reference, gains, weights, strict=True):
        ratio = math.exp(lp - before)
        kl = math.exp(ref - lp) - (ref - lp) - 1
        expected += weight * (0.3 * kl - min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain))
    inputs = [torch.tensor(each, dtype=torch.float64) for each in (new, old, reference, gains, weights)]
    result = policy_loss(*inputs, clip=0.2, beta=0.3)
    assert float(result.total) == pytest.approx(expected, abs=1e-12)
    assert result.clipped.tolist() == [True, False, False]


@pytest.mark.parametrize(("logprobs", "temperature"), [("legal", 1.0), ("full", 1.0), ("legal", 0.5)])
def test_step_by_hand(base: Path, logprobs: Any, temperature: float) -> None:
    """Rollouts of the policy and their hits; before the first update all ratios are 1."""
    settings: Any = {"logprobs": logprobs, "temperature": temperature, "rollouts": "sampled", "normalise": False}
    toy = Toy(base, planted=False, **settings)
    moved(toy.model, 0.3)
    total, count = toy.objective.loss(toy.model, 0)
    expected, rows = 0.0, toy.steps[0].rows
    cases = [toy.cases[n] for n in next(iter(toy.steps.numbers()))]
    engine = MaskedTree(toy.model.get_base_model(), 0)
    prompts = [row.ids[: row.labels.count(-100)] for row in rows]
    seeds = [hash_one("rollouts", 3, case.request.id) for case in cases]
    drawn: Any = {"way": "sampled", "count": 4, "temperature": temperature, "seeds": seeds}
    groups = sample_rollouts(engine, toy.catalogue, prompts, **drawn)
    how: Any = {"legal": logprobs == "legal", "temperature": temperature}
    for prompt, case, group in zip(prompts, cases, groups, strict=True):
        hits = [float(ITEMS[item] == case.truth) for item in group.items]
        mean = float(group.weights @ np.array(hits))
        new = np.log(toy.policy(prompt, **how))
        with toy.model.disable_adapter():
            reference = np.log(toy.policy(prompt, **how))
        for item, hit, weight in zip(group.items.tolist(), hits, group.weights.tolist(), strict=True):
            gap = reference[item] - new[item]
            expected += weight * (0.04 * (math.exp(gap) - gap - 1) - (hit - mean))
    assert count == len(rows) > 1
    assert float(total.detach()) == pytest.approx(expected, abs=1e-5)
    metrics = toy.objective.metrics()
    assert metrics["kl"] > 0.001 and 0 <= metrics["zero"] <= 1 and metrics["distinct"] <= 9


def test_parts_equal_the_full_step(base: Path, tmp_path: Path) -> None:
    results = []
    for limit in (None, 60):
        toy = Toy(base, planted=False, updates=2, limit=limit)
        moved(toy.model, 0.3)
        total, count = 0.0, toy.objective.parts(toy.model, 0)
        for part in range(count):
            loss, questions = toy.objective.loss(toy.model, 0, part)
            loss.backward()
            total += float(loss.detach())
        gradients = [weight.grad.clone() for weight in toy.model.parameters() if weight.grad is not None]
        metrics = dict(toy.objective.metrics())
        toy.model.zero_grad()
        log = toy.run(tmp_path / str(limit)).log[1:]
        results.append((count, total, questions, gradients, metrics, [line["reward"] for line in log]))
    (one, total, questions, gradients, metrics, lines), (several, *rest) = results
    assert (one, several > 1) == (1, True)
    assert rest[:2] == [pytest.approx(total, rel=1e-5), questions]
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(gradients, rest[2], strict=True))
    assert rest[3] == pytest.approx(metrics, rel=1e-4)
    assert rest[4][0] == pytest.approx(lines[0], rel=1e-3)
    assert [line["kl"] for line in rest[4]] == pytest.approx([line["kl"] for line in lines], rel=1e-2)


def test_only_the_adapter_gets_gradients(base: Path) -> None:
    toy = Toy(base)
    before = {name: weight.detach().clone() for name, weight in toy.model.named_parameters()}
    trained = {name for name, weight in toy.model.named_parameters() if weight.requires_grad}
    total, _ = toy.objective.loss(toy.model, 0)
    total.backward()
    reached = {name for name, weight in toy.model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert reached and reached <= trained and all("lora_" in n or "trainable_tokens" in n for n in reached)
    assert any("trainable_tokens" in name for name in reached)
    assert all(torch.equal(weight, before[name]) for name, weight in toy.model.named_parameters())
    assert {name for name, weight in toy.model.named_parameters() if weight.requires_grad} == trained


@pytest.mark.parametrize("way", [pytest.param("sampled", marks=pytest.mark.slow), "without-replacement"])
def test_training_learns_a_planted_reward(base: Path, tmp_path: Path, way: RolloutMethod) -> None:
    steps = 40 if way == "sampled" else 30
    toy = Toy(base, steps=steps, rollouts=way, beta=0.0, learning_rate=2e-2)
    before = toy.policy(prompt_of(toy))[PLANTED]
    done = toy.run(tmp_path)
    assert before < 0.3 and toy.policy(prompt_of(toy))[PLANTED] > 0.9
    first, last = done.log[1]["reward"], done.log[-1]["reward"]
    assert last["reward"] > 0.9 > first["reward"] and last["entropy"] < first["entropy"]
    assert done.tokens == sum(line["reward"]["tokens"] for line in done.log[1:]) and done.steps == steps


@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_resumed_run_ends_like_an_uninterrupted_one(base: Path, tmp_path: Path, updates: int) -> None:
    full = Toy(base, updates=updates).run(tmp_path)
    tear(tmp_path, 6)
    again = Toy(base, updates=updates).run(tmp_path)
    assert again.adapter_sha256 == full.adapter_sha256
    assert [line.get("reward") for line in again.log] == [line.get("reward") for line in full.log]
    assert updates == 1 or any(line["reward"]["kl"] > 0 for line in full.log[2:])
