"""All methods of training: right gradients, validation without effect, and resumed runs with equal results."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.backends.encode import TokenRow
from llmrec.models.item_tokens import save_with_item_tokens
from llmrec.models.load import load_model
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.tasks.rating import RatingScale
from llmrec.train import lora, precision, sft
from llmrec.train.batches import plan_steps
from llmrec.train.heads import RatingHeadLoss, attach_rating_head, fit_standardisation
from llmrec.train.loss import label_loss
from llmrec.train.steps import Step
from tests.conftest import encoder_of, section
from tests.train.test_item_tokens import INDEX, TITLES
from tests.train.test_item_tokens import examples as lists
from tests.train.tiny import alone, fit, moved, tear
from tests.train.tiny import examples as ratings

METHODS = ("lora", "qlora", "full", "rating head", "item tokens")
# All methods are tested by `make test-all`.
SOME = ("lora", *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:]))
FIVE = RatingScale((1.0, 2.0, 3.0, 4.0, 5.0), tuple("12345"))


@pytest.fixture(scope="module")
def folders(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and its copy that knows item tokens."""
    grown = tmp_path_factory.mktemp("grown") / "base"
    save_with_item_tokens(str(llama_folder), section(llama_folder), INDEX, TITLES, grown, words=True, seed=0)
    return {"plain": llama_folder, "item tokens": grown}


class Case:
    """A model that is ready for a method, rows for it, and its rating head, if any."""

    def __init__(self, method: str, folders: dict[str, Path], **settings: Any) -> None:
        if method == "qlora":
            pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        self.folder = folders["item tokens" if method == "item tokens" else "plain"]
        kind = method if method in ("lora", "qlora", "full") else "lora"
        values = {"learning_rate": 1e-3, "lora": LoraSection(rank=4), "valid_every": 2, "save_every": 2, **settings}
        self.train = TrainSection(method=kind, **values)
        self.encoder = encoder_of(self.folder)
        ids = self.encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens)) if method == "item tokens" else ()
        torch.manual_seed(0)
        self.model = lora.load_trainable(str(self.folder), section(self.folder), self.train, tokens=ids)
        self.rows = [self.encoder.row(each) for each in (lists(64) if method == "item tokens" else ratings()[:64])]
        self.head = None
        if method == "rating head":
            self.rows = [self._class(row) for row in self.rows]
            self.head = attach_rating_head(self.model, FIVE, alpha=0.5, counts=(1, 1, 1, 1, 1), frozen=False)
        self.steps: Sequence[Step] = plan_steps(iter(self.rows), steps=6, batch_tokens=160, seed=0)

    def run(self, out: Path) -> str:
        valid = {"rating": self.rows[:4]} if self.train.valid_rows else {}
        return fit(self.model, self.encoder, self.steps, self.train, out, valid, head=self.head).adapter_sha256

    @staticmethod
    def _class(row: TokenRow) -> TokenRow:
        """Replace the last target by a class of the scale."""
        last = max(n for n, label in enumerate(row.labels) if label != -100)
        return TokenRow(row.ids[: last + 1], (*[-100] * last, last % 5))


@pytest.mark.parametrize("method", SOME)
def test_validation_does_not_change_training(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    hashes = {valid: Case(method, folders, valid_rows=valid).run(tmp_path / str(valid)) for valid in (0, 32)}
    assert hashes[0] == hashes[32]


@pytest.mark.parametrize("method", SOME)
def test_resumed_run_ends_like_an_uninterrupted_one(
    method: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="llmrec.progress")
    full = Case(method, folders).run(tmp_path)
    assert "resuming" not in caplog.text
    tear(tmp_path, 6)
    assert Case(method, folders).run(tmp_path) == full
    assert "training: resuming from step 4 of 6" in caplog.text


@pytest.mark.parametrize("method", ["item tokens", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[:-1])])
def test_half_precision_learns_like_float32(
    method: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    losses = []
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setitem(
            globals(), "section", lambda folder, dtype=dtype: ModelSection(name=str(folder), dtype=dtype)
        )
        Case(method, folders, valid_rows=0).run(tmp_path / dtype)
        lines = (tmp_path / dtype / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in lines[1:]])
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[1] != losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_single_step_trains(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    case = Case(method, folders)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters() if p.requires_grad}
    case.steps = case.steps[:1]
    head = case.head.linear.bias.detach().clone() if case.head else None
    case.run(tmp_path)
    moved = [name for name, p in case.model.named_parameters() if name in before and not torch.equal(p, before[name])]
    # A new head's weights are 0, so its first step changes nothing below it.
    assert moved if head is None else not torch.equal(case.head.linear.bias, head)


def gradients(loss: Any, model: Any) -> torch.Tensor:
    """Return the gradients of all trained weights as one vector."""
    model.zero_grad()
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return torch.cat([trained[name].grad.flatten().double() for name in sorted(trained)])


def plain_loss(model: Any, row: TokenRow, case: Case) -> Any:
    """Return the cross-entropy of the model's logits in float32, or the head's loss on its states."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, labels = torch.tensor([row.ids]), torch.tensor(row.labels)
    if case.head is None:
        logits = base(input_ids=ids).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
    states = base(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, :-1]
    kept = labels[1:] != -100
    outputs = case.head.outputs(states[kept])
    truth = torch.tensor(FIVE.values)[labels[1:][kept]]
    entropy = torch.nn.functional.cross_entropy(outputs, labels[1:][kept], reduction="sum")
    return 0.5 * entropy + 0.5 * (outputs.softmax(-1) @ torch.tensor(FIVE.values) - truth).square().sum()


def dequantised(case: Case) -> None:
    """Replace 4-bit layers by plain layers with the same weights."""
    import bitsandbytes as bnb

    assert any(isinstance(layer, bnb.nn.Linear4bit) for layer in case.model.modules())
    for module in list(case.model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
                plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
                plain.weight = torch.nn.Parameter(weight.reshape(plain.weight.shape), requires_grad=False)
                setattr(module, name, plain)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_float32_reference_after_evaluation(method: str, folders: dict[str, Path]) -> None:
    case = Case(method, folders)
    moved(case.model, 0.02)
    row = case.rows[3]
    ids, labels = alone(row)
    by = RatingHeadLoss(case.head) if case.head else None
    if case.head:
        fit_standardisation(case.head, case.model, case.steps, 0)
    # Validation comes before the first step of a run.
    case.model.eval()
    with torch.no_grad():
        label_loss(case.model, ids, labels, by)
    sft.check_packing(case.model)
    case.model.train()
    ours = gradients(label_loss(case.model, ids, labels, by)[0], case.model)
    if method == "qlora":
        dequantised(case)
    theirs = gradients(plain_loss(case.model, row, case), case.model)
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    assert cosine >= 0.999 and float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=0.01)


def test_adapters_of_a_quantised_base_stay_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    case = Case("qlora", folders)
    start = {name: p.detach().clone() for name, p in case.model.named_parameters() if p.requires_grad}
    with precision.preserve_adapter_dtype(case.model):
        for p in case.model.parameters():
            if p.requires_grad:
                p.data = p.data.bfloat16()
    assert all(torch.equal(p, start[name]) for name, p in case.model.named_parameters() if name in start)
    case.run(tmp_path)
    assert {p.dtype for p in case.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(("warmup", "expected"), [(0.0, (1.0, 0.75, 0.5, 0.25)), (0.5, (0.5, 1.0, 1.0, 0.5))])
def test_learning_rate_schedule(
    warmup: float, expected: tuple[float, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    case = Case("lora", folders, warmup=warmup)
    case.steps = case.steps[:4]
    used: list[float] = []
    step: Callable[..., Any] = torch.optim.AdamW.step

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        used.append(self.param_groups[0]["lr"] / 1e-3)
        return step(self, *args, **options)

    torch.optim.AdamW.step = noting  # type: ignore[method-assign]
    try:
        case.run(tmp_path)
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
    assert used == pytest.approx(expected)


def test_loaded_adapter_gives_the_logits_of_training(folders: dict[str, Path], tmp_path: Path) -> None:
    case = Case("qlora", folders)
    case.run(tmp_path)
    again = lora.load_adapted(str(case.folder), section(case.folder), case.train, tmp_path / "adapter")
    ids = torch.tensor([case.rows[0].ids])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, case.model.eval()(input_ids=ids).logits)
    assert load_model(str(case.folder), section(case.folder)).dtype == torch.float32
