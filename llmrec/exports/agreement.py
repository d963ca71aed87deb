"""Measures how well exported weights agree with the trained model on validation cases.

Merging is exact up to rounding for an adapter that was trained on unquantised weights. An adapter that was trained on a
quantised base compensates for its quantisation errors, which the merged model does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.backends.hf.backend import HFBackend
from llmrec.errors import DataError, LlmrecError, MissingExtra, RecipeError, require
from llmrec.evaluate.compare import compare_values
from llmrec.evaluate.predictor import evaluate
from llmrec.exports.card import Agreement, FamilyAgreement
from llmrec.machine import read_memory
from llmrec.models.load import device, load_model, release_memory
from llmrec.models.memory import convert_memory_errors, place_model
from llmrec.models.streaming import tensor_sizes
from llmrec.models.tensors import base_of
from llmrec.pipeline.row_specs import protocol_of
from llmrec.pipeline.study import Study, build_study
from llmrec.recipe.schema import ModelSection, Recipe
from llmrec.strategies.asking import Prompting, create_strategy
from llmrec.tasks.family import family_of
from llmrec.train.batches import pad_rows, truncated_row
from llmrec.train.lora import QUANTISED_METHODS

if TYPE_CHECKING:
    import torch

_MEMORY_HINT = "reduce --check-users (0: none), or set model.device=cpu"
# A few examples are enough to verify an exact merge.
_MAX_EXAMPLES = 8
_BATCH = 8
_MAX_PROMPTS = 8


@dataclass(frozen=True)
class _ModelOutputs:
    """The outputs of a model: losses, values by request, metrics by task, and next-token logits."""

    losses: Mapping[str, float]
    values: Mapping[str, NDArray[np.float64]]
    headlines: Mapping[str, float]
    logits: NDArray[np.float32]


def build_validation_study(recipe: Recipe, users: int) -> Study:
    """Build the study of a recipe with ``users`` validation cases per task.

    Raises:
        DataError: If the data cannot be read, or has no validation split.
    """
    sections = {f: s.model_copy(update={"users": None}) for f, s in recipe.tasks.present().items()}
    return build_study(
        recipe.model_copy(
            update={
                "tasks": recipe.tasks.model_copy(update=sections),
                "eval": recipe.eval.model_copy(update={"split": "valid", "users": max(users, 1)}),
            }
        )
    )


def measure_agreement(
    study: Study,
    encoder: Encoder,
    base: str,
    adapter: Path,
    exported: Path,
    dtype: str,
    *,
    users: int,
    say: Callable[[str], None],
) -> Agreement:
    """Compare the exported weights with the trained adapter on the same validation cases.

    Args:
        study: The study of `build_validation_study`.
        encoder: The tokenizer of both models.
        base: Folder of the base model.
        adapter: Folder of the trained adapter, or of the weights of full fine-tuning.
        exported: Folder of the exported weights.
        dtype: Their dtype.
        users: Cases per family. A method that merges exactly is checked on a few examples only, without task metrics.
        say: Receives progress messages.

    Raises:
        LlmrecError: If the trained model cannot be loaded on this machine, or would not fit into its memory, or a
            metric is not a number.
    """
    from llmrec.train import lora

    recipe = study.recipe
    # The merged model then differs from the trained one, so task metrics are measured too.
    quantised = recipe.train.method in QUANTISED_METHODS
    families = list(study.shares)
    count = users if quantised else min(users, _MAX_EXAMPLES)
    rows = {family: _validation_rows(study, family, encoder, count) for family in families}
    scored = [
        family
        for family in families
        if quantised and study.tasks[family].scored_by(study.eval_templates(family)[0]) is not None
    ]
    if not quantised:
        _check_memory(adapter if recipe.train.method == "full" else Path(base))
    try:
        live = lora.load_adapted(base, recipe.model, recipe.train, adapter)
    except (MissingExtra, RecipeError) as error:
        raise LlmrecError(
            f"the effect of the merge cannot be measured here: {error}. Export on another machine, or with "
            "--check-users 0 (the model card then states that the effect was not measured)",
            kind=error.kind,
            at=error.location,
            column=error.column,
        ) from error
    say("evaluating the adapter on its base model")
    live = _move_to_device(live, recipe.model)
    width = str(live.dtype).removeprefix("torch.")
    before = _compute_outputs(live, study, encoder, rows, scored)
    del live
    release_memory()
    say("evaluating the exported weights on the same cases")
    section = ModelSection(name=str(exported), dtype=dtype, trust_remote_code=recipe.model.trust_remote_code)
    written = _move_to_device(load_model(str(exported), section), recipe.model)
    after = _compute_outputs(written, study, encoder, rows, scored)
    del written
    release_memory()
    result = [_family_agreement(study, family, rows[family], before, after) for family in families]
    logit = float(np.abs(before.logits - after.logits).max())
    if not math.isfinite(sum((logit, *(number for entry in result for number in entry.loss)))):
        raise LlmrecError(
            f"the weights produce values that are not finite as {dtype}; export with --dtype bfloat16",
            kind="bad-value",
            column="--dtype",
        )
    trained = {
        "qlora": "the adapter on the base in NF4",
        "lora8": "the adapter on the base in 8 bits",
        "full": f"the trained weights, {width}",
    }
    return Agreement(
        before=trained.get(recipe.train.method, f"the adapter on the base, {width}"),
        after=f"the exported weights, {dtype}",
        families=tuple(result),
        prompts=len(before.logits),
        logit=logit,
    )


def _check_memory(folder: Path) -> None:
    """Reject a comparison whose model, loaded in float32, would not fit into memory."""
    size, usable = 4 * sum(count for _, count in tensor_sizes(folder).values()), read_memory().usable
    if size > usable:
        raise LlmrecError(
            f"the trained model takes {size / 2**30:.1f} GiB in float32, and {usable / 2**30:.1f} GiB are free; "
            "export with --check-users 0 (the model card then states that nothing was measured), or on a machine "
            "with more memory",
            kind="exhausted",
            column="--check-users",
        )


def _validation_rows(study: Study, family: str, encoder: Encoder, count: int) -> list[TokenRow]:
    limit = study.recipe.model.max_length
    result = [truncated_row(example, encoder, limit) for example in study.tasks[family].examples("valid", count)]
    rows = [row for row in result if row is not None]
    if not rows:
        raise DataError(
            f"tasks.{family}: the validation split of {study.task_data(family).dataset.name} has no examples to "
            "verify the export; hold out examples (data.split), or use --check-users 0",
            kind="empty",
            at=study.task_data(family).dataset.name,
            column="data.split",
        )
    return rows


@convert_memory_errors("measuring the export", _MEMORY_HINT, "--check-users", instead=True)
def _compute_outputs(
    model: torch.nn.Module, study: Study, encoder: Encoder, rows: Mapping[str, list[TokenRow]], scored: Iterable[str]
) -> _ModelOutputs:
    torch = require("torch", "train")
    plain = base_of(model)
    with torch.inference_mode():
        losses = {
            family: _mean_loss(model, examples, encoder.tokenizer.pad_token_id) for family, examples in rows.items()
        }
        logits = _last_token_logits(
            plain, [row for examples in rows.values() for row in examples[: max(1, _MAX_PROMPTS // len(rows))]]
        )
    backend = HFBackend(plain, encoder, batch_tokens=study.recipe.eval.batch_tokens)
    values, headlines = {}, {}
    for family in scored:
        template = study.eval_templates(family)[0]
        asker = Prompting(backend=backend, task=study.tasks[family], template=template.name)
        strategy = study.tasks[family].scored_by(template)
        assert strategy is not None
        predictor = create_strategy(strategy, asker)
        protocol = protocol_of(study, family)
        kind = family_of(family).answer
        result = evaluate(predictor, study.cases(family), name=family, kind=kind, protocol=protocol)
        metric = family_of(family).headline_at(study.recipe.eval.cutoffs)
        # If all true answers are of one class, the AUC is undefined and cannot be compared.
        if (value := result.figures.metrics[metric].value) is not None:
            values[family], headlines[family] = result.values[metric], float(value)
    return _ModelOutputs(losses, values, headlines, logits)


@convert_memory_errors("measuring the export", _MEMORY_HINT, "--check-users")
def _move_to_device(model: torch.nn.Module, section: ModelSection) -> Any:
    """Move a model to its device; quantised models are already placed and must not be moved."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        return model
    return place_model(model, device(section))


def _mean_loss(model: torch.nn.Module, rows: list[TokenRow], pad: int) -> float:
    """Return the mean loss over the targets of a task, in nats per token."""
    from llmrec.train.loss import label_loss

    torch = require("torch", "train")
    total, count = 0.0, 0.0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), _BATCH):
        ids, labels = pad_rows(ordered[start : start + _BATCH], pad)
        batch = (torch.tensor(ids, device=model.device), torch.tensor(labels, device=model.device))
        loss, n = label_loss(model, *batch)
        total, count = total + float(loss), count + n
    return total / max(count, 1)


def _last_token_logits(model: torch.nn.Module, rows: list[TokenRow]) -> NDArray[np.float32]:
    """Return the logits after the last token of each example, shape (examples, vocabulary)."""
    torch = require("torch", "train")
    result = [
        model(input_ids=torch.tensor([row.ids], device=model.device), logits_to_keep=1, use_cache=False).logits[0, -1]
        for row in rows
    ]
    return np.stack([entry.float().cpu().numpy() for entry in result])


def _family_agreement(
    study: Study, family: str, rows: list[TokenRow], before: _ModelOutputs, after: _ModelOutputs
) -> FamilyAgreement:
    targets = sum(row.targets for row in rows)
    loss = (before.losses[family], after.losses[family])
    entry = FamilyAgreement(family=family, rows=len(rows), target_tokens=targets, loss=loss)
    if family not in before.values:
        return entry
    recipe = study.recipe
    metric = family_of(family).headline_at(recipe.eval.cutoffs)
    cases = study.cases(family)
    change = compare_values(
        metric,
        after.values[family],
        before.values[family],
        [case.request.user_id for case in cases],
        resamples=recipe.eval.bootstrap,
        seed=recipe.seed,
    )
    return replace(
        entry,
        metric=metric,
        cases=len(cases),
        values=(before.headlines[family], after.headlines[family]),
        difference=(change.value, change.low, change.high),
    )
