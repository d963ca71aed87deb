"""What holds for every way to train: gradients are right, validation changes nothing, and a resumed run is the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.models.item_tokens import extended
from llmrec.models.load import load_model, load_tokenizer
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.tasks.rating import Scale
from llmrec.train import follow, lora, precision, sft
from llmrec.train.batches import plan
from llmrec.train.heads import HeadLoss, attach, measure
from llmrec.train.loss import label_loss
from llmrec.train.steps import Step
from tests.conftest import section
from tests.train.gradients import moved
from tests.train.test_item_tokens import INDEX, TITLES
from tests.train.test_item_tokens import examples as lists
from tests.train.test_training import examples as ratings

METHODS = ("lora", "qlora", "full", "rating head", "item tokens")
# For a test of which one method is enough in every run; `make test-all` has them all.
SOME = ("lora", *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:]))
FIVE = Scale((1.0, 2.0, 3.0, 4.0, 5.0), tuple("12345"))


@pytest.fixture(scope="module")
def folders(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and its copy that knows item tokens."""
    grown = tmp_path_factory.mktemp("grown") / "base"
    extended(str(llama_folder), section(llama_folder), INDEX, TITLES, grown, words=True, seed=0)
    return {"plain": llama_folder, "item tokens": grown}


class Case:
    """A model made ready for a method, rows for it, and what stands in for its head."""

    def __init__(self, method: str, folders: dict[str, Path], **settings: Any) -> None:
        if method == "qlora":
            pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        self.folder = folders["item tokens" if method == "item tokens" else "plain"]
        kind = method if method in ("lora", "qlora", "full") else "lora"
        # Higher rates leave the region where a tiny model's steps mean anything.
        values = {"learning_rate": 1e-3, "lora": LoraSection(rank=4), "valid_every": 2, "save_every": 2, **settings}
        self.train = TrainSection(method=kind, **values)
        self.encoder = Encoder(load_tokenizer(str(self.folder), section(self.folder)), max_length=256)
        ids = self.encoder.tokenizer.convert_tokens_to_ids(list(INDEX.tokens)) if method == "item tokens" else ()
        torch.manual_seed(0)
        self.model = lora.load_trainable(str(self.folder), section(self.folder), self.train, tokens=ids)
        self.rows = [self.encoder.row(each) for each in (lists(64) if method == "item tokens" else ratings()[:64])]
        self.head = None
        if method == "rating head":
            self.rows = [self._class(row) for row in self.rows]
            self.head = attach(self.model, FIVE, alpha=0.5, counts=(1, 1, 1, 1, 1), frozen=False)
        self.steps: Sequence[Step] = plan(iter(self.rows), steps=6, batch_tokens=160, seed=0)

    def run(self, out: Path) -> str:
        valid = {"rating": self.rows[:4]} if self.train.valid_rows else {}
        options: Any = {"folder": out, "seed": 0, "quiet": True, "loss": sft.LossInputs(head=self.head)}
        return sft.train(self.model, self.encoder, self.steps, valid, self.train, **options).adapter_sha256

    @staticmethod
    def _class(row: TokenRow) -> TokenRow:
        """A class of the scale where the last target stood."""
        place = max(n for n, label in enumerate(row.labels) if label != -100)
        return TokenRow(row.ids[: place + 1], (*[-100] * place, place % 5))


@pytest.mark.parametrize("method", SOME)
def test_validation_never_changes_what_is_trained(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    found = {valid: Case(method, folders, valid_rows=valid).run(tmp_path / str(valid)) for valid in (0, 32)}
    assert found[0] == found[32]


@pytest.mark.parametrize("method", SOME)
def test_a_resumed_run_ends_like_an_uninterrupted_one(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    whole = Case(method, folders).run(tmp_path / "whole")
    for file in (tmp_path / "whole" / "checkpoints" / "checkpoint-6").iterdir():
        file.unlink()
    assert Case(method, folders).run(tmp_path / "whole") == whole


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


def test_what_training_does_is_named(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The validation before the first step took a minute in which no step was done, and a resumed run said nothing."""
    names = []

    class Named(follow.Bar):
        def start(self) -> None:
            names.append(self.name)
            super().start()

    monkeypatch.setattr(follow, "Bar", Named)
    caplog.set_level(logging.INFO, logger="llmrec.progress")
    Case("lora", folders).run(tmp_path)
    assert names == ["train", "validation before step 1", *(f"validation at step {step}" for step in (2, 4, 6))]
    assert "resuming" not in caplog.text
    for file in (tmp_path / "checkpoints" / "checkpoint-6").iterdir():
        file.unlink()
    Case("lora", folders).run(tmp_path)
    assert "training: resuming from step 4 of 6" in caplog.text
    assert names[5:] == ["train", "validation at step 6"]


@pytest.mark.parametrize("method", METHODS)
def test_every_step_trains_also_the_only_one(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    case = Case(method, folders)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters() if p.requires_grad}
    case.steps = case.steps[:1]
    head = case.head.linear.bias.detach().clone() if case.head else None
    case.run(tmp_path)
    moved = [name for name, p in case.model.named_parameters() if name in before and not torch.equal(p, before[name])]
    # A new head's weights are 0, so that its first step reaches nothing below it.
    assert moved if head is None else not torch.equal(case.head.linear.bias, head)


def gradients(loss: Any, model: Any) -> torch.Tensor:
    """Every trained weight's gradient, one behind the other."""
    model.zero_grad()
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return torch.cat([trained[name].grad.flatten().double() for name in sorted(trained)])


def plain_loss(model: Any, row: TokenRow, case: Case) -> Any:
    """Cross-entropy as a textbook writes it, in float32, or the head's loss on states that the model gives out."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, labels = torch.tensor([row.ids]), torch.tensor(row.labels)
    if case.head is None:
        logits = base(input_ids=ids).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
    states = base(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, :-1]
    wanted = labels[1:] != -100
    outputs = case.head.outputs(states[wanted])
    truth = torch.tensor(FIVE.values)[labels[1:][wanted]]
    entropy = torch.nn.functional.cross_entropy(outputs, labels[1:][wanted], reduction="sum")
    return 0.5 * entropy + 0.5 * (outputs.softmax(-1) @ torch.tensor(FIVE.values) - truth).square().sum()


def dequantised(case: Case) -> None:
    """Put the plain layers with the weights that a 4-bit layer stands for in its place."""
    import bitsandbytes as bnb

    for module in list(case.model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
                plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
                plain.weight = torch.nn.Parameter(weight.reshape(plain.weight.shape), requires_grad=False)
                setattr(module, name, plain)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_a_float32_reference_also_after_an_evaluation(
    method: str, folders: dict[str, Path]
) -> None:
    case = Case(method, folders)
    moved(case.model, 0.02)
    row = case.rows[3]
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    by = HeadLoss(case.head) if case.head else None
    if case.head:
        measure(case.head, case.model, case.steps, 0)
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


def test_adapters_stay_in_float32_on_a_quantised_base(folders: dict[str, Path], tmp_path: Path) -> None:
    case = Case("qlora", folders)
    start = {name: p.detach().clone() for name, p in case.model.named_parameters() if p.requires_grad}
    with precision.adapters_as_they_are(case.model):
        for p in case.model.parameters():
            if p.requires_grad:
                p.data = p.data.bfloat16()
    assert all(torch.equal(p, start[name]) for name, p in case.model.named_parameters() if name in start)
    case.run(tmp_path)
    assert {p.dtype for p in case.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0.0, (1.0, 0.75, 0.5, 0.25)), (0.5, (0.5, 1.0, 1.0, 0.5)), (1.0, (0.25, 0.5, 0.75, 1.0))],
)
def test_the_learning_rate_begins_above_0_and_reaches_its_peak(
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


def test_what_a_model_is_measured_with_is_what_was_trained(folders: dict[str, Path], tmp_path: Path) -> None:
    """The adapter on its quantised base, loaded again, gives the logits of training."""
    case = Case("qlora", folders)
    case.run(tmp_path)
    again = lora.load_adapted(str(case.folder), section(case.folder), case.train, tmp_path / "adapter")
    ids = torch.tensor([case.rows[0].ids])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, case.model.eval()(input_ids=ids).logits)
    assert load_model(str(case.folder), section(case.folder)).dtype == torch.float32
