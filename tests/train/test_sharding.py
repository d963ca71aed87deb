"""Weights that are divided among processes: the same loss, and checkpoints that another number of processes reads.

FSDP2 on the CPU: without the trainer, with shards as safetensors, since torch's own format keeps its metadata in a
pickle; and with the trainer, where accelerate is made to take the CPU for an accelerator. Nothing was run on GPUs.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the train extra is not installed")

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from llmrec.backends.encode import Encoder
from llmrec.durable import seal, verifies
from llmrec.errors import LlmrecError, RecipeError
from llmrec.models.load import load_model, load_tokenizer
from llmrec.recipe.schema import LoraSection, ModelSection, TrainSection
from llmrec.train import lora, sft, world
from llmrec.train.batches import laid_out, plan
from llmrec.train.loss import rows_loss
from llmrec.train.world import SHARDED, World, joined, through
from tests.facts import Facts, raises
from tests.train.test_training import examples
from tests.train.test_world import LOSS, STEPS, assert_alike, training, weights
from tests.train.together import together

FLAT = StateDictOptions(flatten_optimizer_state_dict=True, strict=False)


class Trained:
    """A model with its optimiser, whole or divided, and the steps that it takes."""

    def __init__(self, folder: Path, method: str, world: World) -> None:
        section = ModelSection(name=str(folder), dtype="float32", device="cpu")
        settings = TrainSection(method=method, lora=LoraSection(rank=4, dropout=0.0))
        encoder = Encoder(load_tokenizer(str(folder), section), max_length=256)
        rows = [encoder.row(example) for example in examples()[:60]]
        self.steps, self.world = plan(iter(rows), steps=4, batch_tokens=160, seed=0), world
        torch.manual_seed(0)
        self.model: Any = lora.load_trainable(str(folder), section, settings)
        if world.size > 1:
            mesh = init_device_mesh("cpu", (world.size,))
            base = self.model.get_base_model() if method == "lora" else self.model
            for part in (*base.get_decoder().layers, self.model):
                fully_shard(part, mesh=mesh)
        trainable = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-2 if method == "lora" else 1e-3)

    def step(self, number: int) -> float:
        """Take one planned step and return its loss."""
        share = self.steps[number].split(self.world.size)[self.world.rank]
        inputs = {name: torch.tensor(each) for name, each in laid_out(self.model, share.rows, 0).items()}
        total, count = through(self.model, rows_loss, inputs)
        everything = self.world.total(count, "cpu")
        # Gradients of FSDP are means over the processes.
        (total * self.world.size / everything).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.world.total(float(total.detach()), "cpu") / everything

    def state(self) -> dict[str, Any]:
        """Return what is trained and its moments, divided as they are; of the optimiser's state the tensors."""
        model, moments = get_state_dict(self.model, self.optimizer, options=FLAT)
        names = [name for name, each in self.model.named_parameters() if each.requires_grad]
        tensors = {name: value for name, value in moments.items() if isinstance(value, torch.Tensor)}
        return {name: model[name] for name in names} | tensors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_divided_model_learns_alike_and_one_process_goes_on_with_it(
    llama_folder: Path, tmp_path: Path, method: str
) -> None:
    whole = Trained(llama_folder, method, World())
    losses = [whole.step(n) for n in range(4)]
    saved = tmp_path / "shards"

    def divided() -> Any:
        with joined("cpu") as group:
            trained = Trained(llama_folder, method, group)
            assert isinstance(trained.model, FSDPModule)
            found = [trained.step(n) for n in range(2)]
            writer = checkpoint.HuggingFaceStorageWriter(str(saved), save_distributed=True)
            checkpoint.save(trained.state(), storage_writer=writer)
            return found

    assert together(2, divided, tmp_path / "told") == [pytest.approx(losses[:2], rel=1e-5)] * 2
    assert len(list(saved.glob("*.safetensors"))) == 2
    assert not list(saved.glob("*.metadata"))
    seal(saved)
    assert verifies(saved)
    alone = Trained(llama_folder, method, World())
    alone.step(3)  # a step makes the moments, and is forgotten
    state = alone.state()
    checkpoint.load(state, storage_reader=checkpoint.HuggingFaceStorageReader(str(saved)), no_dist=True)
    _, kept = get_state_dict(alone.model, alone.optimizer, options=FLAT)
    set_state_dict(
        alone.model,
        alone.optimizer,
        model_state_dict={name: value for name, value in state.items() if not name.startswith("state.")},
        optim_state_dict={**kept, **{name: value for name, value in state.items() if name.startswith("state.")}},
        options=FLAT,
    )
    assert [alone.step(n) for n in (2, 3)] == pytest.approx(losses[2:], rel=1e-5)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(alone.model.state_dict()[name], value, atol=1e-4), name


# What docs/scaling.md has in accelerate's configuration, as accelerate launch hands it on.
SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def as_on_gpus() -> None:
    """Have accelerate divide weights on the CPU, in this process."""
    warnings.simplefilter("ignore")
    os.environ.update(SETTINGS)
    begun = PartialState.__init__

    def begin(self: Any, *given: Any, **named: Any) -> None:
        begun(self, *given, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin
    sft.requested_kind = world.requested_kind = lambda device: SHARDED


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"method": "full", "learning_rate": 1e-3}])
def test_the_trainer_divides_a_model_and_goes_on_in_another_number_of_processes(
    llama_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    _, _, _, losses = training(llama_folder, tmp_path / "one", **settings)()

    def divided() -> Any:
        as_on_gpus()
        return training(llama_folder, tmp_path / "two", **settings)()

    last = tmp_path / "two" / "checkpoints" / f"checkpoint-{STEPS}"
    for count in (2, 3):
        told = together(count, divided, tmp_path / f"told{count}")
        assert told[0][:3] == [count, SHARDED, STEPS]
        assert told[0][3] == pytest.approx(losses, rel=LOSS)
        assert_alike(tmp_path / "one", tmp_path / "two")
        assert verifies(last)
        # A run that was killed before its last checkpoint was sealed.
        (last / "manifest.json").unlink()

    def alone() -> Any:
        try:
            training(llama_folder, tmp_path / "two", **settings)()
        except LlmrecError as error:
            return str(error)

    (said,) = together(1, alone, tmp_path / "alone")
    assert "was saved with FSDP" in said


@pytest.fixture(scope="module")
def untied_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose head is another matrix than its embeddings, as that of Llama-3-8B."""
    folder = tmp_path_factory.mktemp("untied")
    section = ModelSection(name=str(llama_folder), dtype="float32", device="cpu")
    model = load_model(str(llama_folder), section)
    model.config.tie_word_embeddings = False
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.05)
    model.save_pretrained(folder)
    load_tokenizer(str(llama_folder), section).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"method": "full", "learning_rate": 1e-3}, {"micro_tokens": 48}])
@pytest.mark.parametrize(
    ("tied", "dtype", "near"), [(False, "float32", LOSS), (True, "bfloat16", 1e-2), (False, "bfloat16", 1e-2)]
)
def test_other_heads_and_half_precision_are_divided_too(
    tied: bool,
    dtype: str,
    near: float,
    settings: dict[str, Any],
    llama_folder: Path,
    untied_folder: Path,
    tmp_path: Path,
) -> None:
    """A base in bfloat16 beside adapters in float32, and a head whose weight is read outside its module."""
    folder = llama_folder if tied else untied_folder
    _, _, _, losses = training(folder, tmp_path / "one", dtype=dtype, **settings)()

    def divided() -> Any:
        as_on_gpus()
        return training(folder, tmp_path / "two", dtype=dtype, **settings)()

    reports = together(2, divided, tmp_path / "reports")
    assert reports[0][:3] == [2, SHARDED, STEPS]
    assert reports[0][3] == pytest.approx(losses, rel=near)
    if dtype == "float32":
        assert_alike(tmp_path / "one", tmp_path / "two")
    kinds = {value.dtype for name, value in weights(tmp_path / "two").items() if settings or "lora" in name}
    assert kinds == {torch.float32}


@pytest.mark.parametrize(
    ("changed", "settings"),
    [
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}),
        ({"FSDP_VERSION": "1"}, {}),
        ({}, {"method": "qlora"}),
        ({}, {"judge": {}}),
    ],
)
def test_what_does_not_go_with_divided_weights_is_refused(
    changed: dict[str, str], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SETTINGS, **changed}.items():
        monkeypatch.setenv(name, value)
    with raises(RecipeError, Facts("unsupported")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world.refuse_sharding(FullyShardedDataParallelPlugin(), TrainSection(**settings), plain=True)
