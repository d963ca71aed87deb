"""Supervised fine-tuning with TRL's SFTTrainer over planned steps; the loss is computed only at labels."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from llmrec.backends.encode import IGNORED, Encoder, TokenRow
from llmrec.durable import replace_atomically, write_manifest
from llmrec.errors import LlmrecError, RecipeError
from llmrec.machine import has_cuda
from llmrec.models import bottleneck
from llmrec.models.load import weights_sha256
from llmrec.models.rating_head import RatingHead, save_rating_head
from llmrec.models.soft_prompt import SoftPrompt
from llmrec.models.traits import can_use_block_mask, is_encoder_decoder
from llmrec.models.whole_words import save_whole_words, whole_word_embeddings
from llmrec.recipe.schema import TrainSection
from llmrec.tasks.rows import Listwise
from llmrec.train import pruning as magnitude
from llmrec.train.batches import micro_steps, pad_rows, padded_inputs
from llmrec.train.checkpoint import FSDP_MODEL_FILE, CheckpointCallback, newest_valid_checkpoint, remove_old_checkpoints
from llmrec.train.follow import BestAdapter, TrainingMonitor
from llmrec.train.heads import (
    detach_rating_head,
    fit_standardisation,
    restore_rating_head,
    restore_whole_words,
    state_loss,
)
from llmrec.train.kernels import enable_gradient_checkpointing, log_missing_paging, use_faster_layers
from llmrec.train.loss import (
    DistillationLoss,
    StateLoss,
    label_loss,
    list_loss,
    packed_loss,
    rows_loss,
    total_target_weight,
)
from llmrec.train.packing import pack_rows, stack_sequences
from llmrec.train.precision import (
    autocast_dtype,
    convert_to_float32,
    mixed_precision,
    preserve_adapter_dtype,
    without_input_casting,
)
from llmrec.train.preference import disable_dropout, preference_list_loss
from llmrec.train.steps import Step
from llmrec.train.trackers import selected_trackers, tracker_callbacks, trackio_project
from llmrec.train.world import (
    SHARDED,
    World,
    check_parallelism,
    check_sharding_settings,
    current_world,
    log_parallelism,
    requested_parallelism,
    run_in_wrapped_forward,
)

# Marks the batch of a process without examples, whose loss has weight 0.
_IDLE = "idle"
# The batches of a step that is computed in several parts.
_PARTS = "parts"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """The result of a training run.

    ``seconds`` includes ``seconds_before``, the time of killed invocations up to the resumed checkpoint.
    ``kept_step`` is the step of the adapter selected by validation. ``processes`` is the number of processes, and
    ``distributed`` their kind, as accelerate names it. ``sparsity`` is the share of zeros in pruned layers.
    """

    method: str
    steps: int
    tokens: int
    target_tokens: int
    seconds: float
    seconds_before: float
    tokens_per_second: float
    trainable_parameters: int
    total_parameters: int
    log: list[dict[str, Any]]
    adapter_sha256: str
    processes: int = 1
    distributed: str = "no"
    kept_step: int | None = None
    sparsity: float | None = None


class Objective(Protocol):
    """Computes the loss of a step from data generated with the current model.

    Attributes:
        updates: The number of consecutive optimiser steps per planned step.
    """

    updates: int

    def parts(self, model: torch.nn.Module, number: int) -> int:
        """Return the number of micro-batches in an optimiser step."""
        ...

    def loss(self, model: torch.nn.Module, number: int, part: int) -> tuple[Any, float]:
        """Return the summed loss of a micro-batch, and the divisor for the whole step."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Return the values to log about the last step, including ``tokens`` and ``targets``."""
        ...


class LabelRowTrainer(SFTTrainer):  # type: ignore[misc]
    """An SFTTrainer whose data set contains whole optimiser steps, and whose head is applied only at labels."""

    by: StateLoss | None = None
    listwise: Listwise | None = None
    objective: Objective | None = None
    world: World = World()
    # Additional values to log, by name: first sums, then means.
    figures: Mapping[str, float] = {}
    # The divisor of the losses of a step's parts; None if a step has one part, whose loss returns the divisor.
    step_divisor: float | None = None
    # The scale of gradients, which decreases if they overflow.
    scale: float = 0.0
    # Whether layers multiply under autocast, in which case adapters need no float32 copies of their inputs.
    autocast: bool = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of the steps: as planned, or random with a seed."""
        if self.objective is not None:
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> Any:
        """Return the optimiser steps in a fixed order; each process gets a share of every step."""
        loader = super().get_train_dataloader()
        if self.world.size > 1:
            # accelerate would give whole batches to processes; transformers disables this for its sampler the same way.
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the learning-rate schedule of the recipe.

        With the Trainer's schedule the first warm-up step has rate 0, and a warm-up over all steps never reaches the
        full rate.
        """
        schedule = super().create_scheduler(num_training_steps, optimizer)
        after, warm = schedule.lr_lambdas[0], self.args.warmup_steps
        self.lr_scheduler = LambdaLR(
            schedule.optimizer, lambda step: (step + 1) / warm if step < warm else float(after(step))
        )
        return self.lr_scheduler

    def training_step(self, model: torch.nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Any:
        """Compute the loss of a step and accumulate the gradients of its parts."""
        parts: Sequence[Mapping[str, Any]] = inputs.get(_PARTS, [inputs])
        if self.objective is not None:
            parts = [{**inputs, "part": n} for n in range(self.objective.parts(model, int(inputs["step"])))]
        if self.accelerator.scaler is not None:
            self.scale = self.accelerator.scaler.get_scale()
        self.step_divisor = None
        if len(parts) > 1 and self.objective is None:
            count = sum(self._total_weight(model, part) for part in parts)
            self.step_divisor = self.world.total(count, self.args.device) or 1
        total, figures = 0.0, defaultdict[str, float](float)
        with without_input_casting(model, active=self.autocast):
            for n, part in enumerate(parts, start=1):
                with nullcontext() if n == len(parts) else self.accelerator.no_sync(model):
                    total += super().training_step(model, part, num_items_in_batch)
                for name, value in self.figures.items():
                    figures[name] += value
        self.figures = figures
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss over the weighted targets or lists of the step.

        With several processes each returns its part times their number: gradients and logged losses are averaged over
        processes, so the mean is the loss of a single process.
        """
        if self.objective is not None:
            total, count = self.objective.loss(model, int(inputs["step"]), inputs["part"])
            return (total / count, {}) if return_outputs else total / count
        share = {name: value for name, value in inputs.items() if name != _IDLE}
        total, count = run_in_wrapped_forward(model, self._summed, share)
        if _IDLE in inputs:  # a step with fewer rows than processes
            total, count = total * 0.0, 0.0
            self.figures = dict.fromkeys(self.figures, 0.0)
        divisor = self.step_divisor or self.world.total(count, total.device) or 1
        self.figures = {name: self.world.total(value, total.device) / divisor for name, value in self.figures.items()}
        loss = total * self.world.size / divisor
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the values of a step."""
        scaled = {}
        if self.accelerator.scaler is not None:
            # An optimiser fused with the scaler skips steps itself, unnoticed by accelerate.
            scale = self.accelerator.scaler.get_scale()
            scaled = {"scaler/scale": scale, "scaler/skipped": float(scale < self.scale)}
        super().log({**logs, **self.figures, **scaled} if "loss" in logs else logs, *args, **kwargs)

    def _total_weight(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> float:
        """Return the total weight of the targets in a part, or the number of its lists."""
        if _IDLE in inputs:
            return 0.0
        if self.listwise is not None:
            return (int(inputs["owners"].max()) + 1) / self.listwise.size
        return total_target_weight(inputs, self.by, paired=is_encoder_decoder(getattr(model, "module", model).config))

    def _summed(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, float]:
        """Return the summed loss and the total weight of its targets or lists."""
        with mixed_precision(model):
            if self.listwise is not None:
                lists = self.listwise
                if lists.preference is not None:
                    total, count, self.figures = preference_list_loss(model, inputs, lists.preference)
                    return total, count
                return list_loss(model, inputs, lists.size, lists.loss, lists.temperature)
            return (packed_loss if "ends" in inputs else rows_loss)(model, inputs, self.by)


def train(
    model: torch.nn.Module,
    encoder: Encoder,
    steps: Sequence[Step],
    valid: Mapping[str, Sequence[TokenRow]],
    section: TrainSection,
    *,
    folder: Path,
    seed: int,
    quiet: bool = False,
    head: RatingHead | None = None,
    soft: SoftPrompt | None = None,
    listwise: Listwise | None = None,
    objective: Objective | None = None,
    taught: DistillationLoss | None = None,
    items: Sequence[int] = (),
    device: str | None = None,
    judge: Callable[[Any], float] | None = None,
) -> TrainingResult:
    """Train on the planned steps, and save the adapter (or full weights) to ``folder/adapter``.

    A killed run resumes from the newest checkpoint in ``folder/checkpoints`` that verifies, and ends with the same
    weights.

    Args:
        model: From `llmrec.train.lora.load_trainable`.
        encoder: Its tokenizer.
        steps: The planned steps.
        valid: Held-out rows by task, for the validation loss.
        section: The recipe's ``train`` section.
        folder: The run folder.
        seed: The training seed.
        quiet: Show no progress.
        head: A rating head of the model, for rows whose labels are classes; saved next to the adapter.
        soft: The soft prompts of the model; if tied, the labels of rows are label numbers.
        listwise: The settings of a loss over lists of candidates.
        objective: Computes the loss of each planned step.
        taught: A distillation loss; validation still uses the loss of the answers.
        items: Ids of the item tokens.
        device: The training device; None: the GPU, if torch can use one.
        judge: Returns a model's validation metric, for ``train.judge``: the best adapter is kept instead of the last.
    """
    world = current_world()
    started = time.monotonic()
    device = device or ("cuda" if has_cuda() else "cpu")
    convert_to_float32(model, device)
    if section.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if listwise is not None and listwise.preference is not None:
        disable_dropout(model)
    pad = encoder.tokenizer.pad_token_id
    by = state_loss(model, section, head, soft, taught, items)
    seen = None if by is taught else by
    # additional files of a checkpoint
    kept: list[Callable[[Path], None]] = [
        partial(f, model) for f in (save_whole_words, bottleneck.save, magnitude.save)
    ]
    kept += ([] if head is None else [partial(save_rating_head, head)]) + ([] if soft is None else [soft.save])
    # the planned step of each optimiser step
    order = [n for n in range(len(steps)) for _ in range(objective.updates if objective else 1)][: section.steps]
    sizes = [(step.tokens, step.targets) for step in map(steps.__getitem__, order)]
    tokens, targets = (sum(item) for item in zip(*sizes, strict=True))

    def write(tuned: torch.nn.Module, draft: Path, **weights: Any) -> None:
        tuned.save_pretrained(draft, **weights)
        for save in kept:
            save(draft)

    patience = section.judge.patience if section.judge else None
    best = None
    if judge is not None and world.first:
        best = BestAdapter(folder / "best", patience, judge, write, folder / "checkpoints")
    after = [] if best is None else [best.saved]
    saving = CheckpointCallback(
        [*kept, write_manifest, partial(remove_old_checkpoints, section.keep_checkpoints), *after],
        world,
        minutes=section.save_minutes,
        every=objective.updates if objective else 1,
    )
    log_file = folder / "train_log.jsonl"
    follow = TrainingMonitor(
        len(order), tokens, valid, section, log_file, pad=pad, quiet=quiet, by=seen, best=best, world=world
    )
    if objective is not None:
        follow.metrics = objective.metrics
    pruning = [] if section.prune is None else [magnitude.PruningCallback(model, section.prune, len(order))]
    scaled = autocast_dtype(model, device) == torch.float16
    with preserve_adapter_dtype(model):
        trainer = LabelRowTrainer(
            model=model,
            args=_trainer_config(section, folder, len(order), seed, device, scaled=scaled),
            train_dataset=Dataset.from_dict({"step": order}),
            processing_class=encoder.tokenizer,
            data_collator=partial(_collate_step, model, steps, pad, world, section.micro_tokens)
            if objective is None
            else _collate_step_number,
            # Trackers come after the callback that adds validation losses to the log.
            callbacks=[
                *pruning,
                follow,
                *(tracker_callbacks(selected_trackers(section), folder) if world.first else ()),
                saving,
            ],
        )
    kind = trainer.accelerator.distributed_type.value
    check_parallelism(requested_parallelism(device), kind)
    if kind == SHARDED:
        plain = head is None and whole_word_embeddings(model) is None
        check_sharding_settings(trainer.accelerator.state.fsdp_plugin, section, plain=plain, scaled=scaled)
    follow.everybody = kind == SHARDED
    log_parallelism(world, kind)
    trainer.remove_callback(PrinterCallback)
    trainer.by, trainer.listwise, trainer.objective, trainer.world = by, listwise, objective, world
    # rollouts are drawn without autocast
    trainer.autocast = autocast_dtype(model, device) is not None and objective is None
    # The trainer has moved the model to its device, whose attention kernels must be checked.
    if steps and steps[0].bins:
        instead = "train.packing=none"
        if listwise is not None:
            instead = "tasks.direct.loss=answer" if listwise.preference is None else "train.preference=null"
        for item in (model, *([taught.teacher] if taught else [])):
            check_packing(item, instead)
    if objective is not None:
        check_packing(model, "train.reward=null")
    checkpoint = _checkpoint_to_resume(folder / "checkpoints", world, sharded=kind == SHARDED)
    if checkpoint is not None:
        restore_whole_words(model, checkpoint)
        bottleneck.load(model, checkpoint)
        magnitude.load(model, checkpoint)
    if head is not None and checkpoint is not None:
        restore_rating_head(head, checkpoint)
    elif head is not None:
        with mixed_precision(model):
            fit_standardisation(head, model, steps, pad)
    follow.open(resumed=checkpoint is not None)
    with use_faster_layers(model, section), log_missing_paging(section, device):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    adapter = folder / "adapter"
    state = {"state_dict": trainer.accelerator.get_state_dict(trainer.model)} if kind == SHARDED else {}
    if world.first:
        with replace_atomically(adapter) as draft:
            if head is not None:
                detach_rating_head(model)
            if best is not None:
                best.copy_to(draft)
            else:
                write(model, draft, **state)
    world.wait()
    # After early stopping, the remaining planned steps are unused.
    sizes = sizes[: follow.records[-1]["step"]]
    if objective is not None:
        rewards = [record["reward"] for record in follow.records if "reward" in record]
        sizes = [(int(item["tokens"]), int(item["targets"])) for item in rewards]
    tokens, targets = (sum(item) for item in zip(*sizes, strict=True))
    seconds = follow.before + time.monotonic() - started
    return TrainingResult(
        method=section.method,
        steps=len(sizes),
        tokens=tokens,
        target_tokens=targets,
        seconds=seconds,
        seconds_before=follow.before,
        tokens_per_second=follow.speed(),
        trainable_parameters=sum(size for size, trained in parameters if trained),
        total_parameters=sum(size for size, _ in parameters),
        log=follow.records,
        adapter_sha256=weights_sha256(adapter),
        processes=world.size,
        distributed=kind.lower() if kind == "NO" else kind,
        kept_step=None if best is None else best.step,
        sparsity=magnitude.sparsity(model),
    )


def check_packing(model: torch.nn.Module, instead: str = "train.packing=none") -> None:
    """Compute the loss of synthetic examples packed and unpacked, and reject a model for which the losses differ.

    Raises:
        RecipeError: If the model ignores the mask of packed sequences; ``instead`` is the advice.
    """
    begin, ends = (5, 6, 7, 8, 9), ((10, 11, 12), (13, 14, 15, 16), (17,))
    rows = [TokenRow((*begin, *end), (*[IGNORED] * len(begin), *end)) for end in (*ends, (18, 19))]
    rows[-1] = TokenRow(rows[-1].ids[3:], rows[-1].labels[3:])
    reads = can_use_block_mask(model.config)
    if reads:
        device = model.device
        ids, labels = (torch.tensor(item, device=device) for item in pad_rows(rows, 0))
        packed = {
            name: torch.from_numpy(item).to(device)
            for name, item in asdict(stack_sequences([pack_rows(rows)], 0)).items()
        }
        was_training = model.training
        model.eval()
        with torch.no_grad(), mixed_precision(model):
            one, two = float(label_loss(model, ids, labels)[0]), float(packed_loss(model, packed)[0])
        model.train(was_training)
        # Half precision rounds differently in another order; attention between examples would cause larger differences.
        exact = isinstance(mixed_precision(model), nullcontext) and model.dtype == torch.float32
        reads = abs(one - two) <= (1e-3 + 1e-5 * abs(one) if exact else 0.3 + 0.005 * abs(one))
    if not reads:
        raise RecipeError(
            f"{instead.partition('=')[0]}: models of type {model.config.model_type} ignore the mask that separates "
            f"packed rows; set {instead}",
            kind="unsupported",
            column=instead.partition("=")[0],
        )


def _checkpoint_to_resume(folder: Path, world: World, *, sharded: bool) -> Path | None:
    """Return the checkpoint from which all processes resume; the first process selects it.

    Raises:
        LlmrecError: If only one of the checkpoint and this training uses FSDP.
    """
    result = newest_valid_checkpoint(folder) if world.first else None
    step = world.agree(int(result.name.rpartition("-")[2]) if result is not None else -1)
    if step < 0:
        return None
    checkpoint = folder / f"checkpoint-{step}"
    if (checkpoint / FSDP_MODEL_FILE).is_file() != sharded:
        raise LlmrecError(
            f"{checkpoint} was saved {'without' if sharded else 'with'} FSDP and can only be resumed the same way; "
            f"start the training as before, with any number of processes, or remove {folder}",
            kind="mismatch",
            at=checkpoint,
        )
    return checkpoint


def _collate_step_number(items: Sequence[Mapping[str, int]]) -> dict[str, torch.Tensor]:
    """Return only the number of a planned step, because the tokens depend on the current model."""
    (item,) = items
    return {"step": torch.tensor(item["step"])}


def _collate_step(
    model: torch.nn.Module,
    steps: Sequence[Step],
    pad: int,
    world: World,
    limit: int | None,
    items: Sequence[Mapping[str, int]],
) -> dict[str, Any]:
    """Return the batch of an optimiser step, divided into parts of at most ``limit`` tokens.

    All processes have the same number of parts, since sharded weights need all of them for each part.
    """
    (item,) = items
    step = steps[item["step"]]
    shares = [micro_steps(share, limit) for share in (step.split(world.size) if world.size > 1 else [step])]
    count = max(len(share) for share in shares)
    parts = [_step_tensors(model, part, pad) for part in shares[world.rank] if part.rows]
    if len(parts) < count:
        # Every process computes a batch, because gradients are summed over all processes.
        shortest = min((part for share in shares for part in share if part.rows), key=lambda part: part.tokens)
        parts += [_step_tensors(model, shortest, pad) | {_IDLE: torch.ones(())}] * (count - len(parts))
    return parts[0] if count == 1 else {_PARTS: parts}


def _step_tensors(model: torch.nn.Module, step: Step, pad: int) -> dict[str, torch.Tensor]:
    packed = [pack_rows(item.rows) for item in step.bins]
    laid = asdict(stack_sequences(packed, pad)) if packed else padded_inputs(model, step.rows, pad)
    return {name: torch.tensor(values) for name, values in laid.items()}


def _trainer_config(
    section: TrainSection, folder: Path, steps: int, seed: int, device: str, *, scaled: bool = False
) -> Any:
    config = SFTConfig(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.schedule,
        warmup_steps=round(section.warmup * steps),
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim=section.optim,
        # see `enable_gradient_checkpointing`
        gradient_checkpointing=False,
        # Autocast is applied around the loss, whose head is called outside the forward pass of the model.
        bf16=False,
        # enables the gradient scaler
        fp16=scaled,
        logging_steps=1,
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=section.save_every,
        eval_strategy="no",
        # Trackers are callbacks created by `trackers`; trackio's callback reads these two settings.
        report_to="none",
        project=trackio_project(),
        run_name=folder.name,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
        seed=seed,
        use_cpu=device == "cpu",
    )
    # Use one GPU: DataParallel would wrap the model, and its decoder is called outside the wrapper.
    config._n_gpu = min(config.n_gpu, 1)
    return config
