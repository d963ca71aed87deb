"""Checks that weights match the configuration: a folder in which weights are missing is rejected.

transformers initialises missing tensors at random and ignores unexpected ones.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.display import format_name_list
from llmrec.errors import ModelError, require
from llmrec.models.traits import is_encoder_decoder

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Causal masks, positions and rotary frequencies, which old versions of transformers stored with the weights.
_COMPUTED_BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|(^|\.)position_ids$|\brotary_emb\.inv_freq$")


def load_checked(auto: Any, folder: str | Path, *, unread: Sequence[str] = (), **options: Any) -> Any:
    """Load a model with ``auto.from_pretrained``, and reject weights that do not match its configuration.

    Tensors that transformers is meant to recreate are not errors: a head tied to the embeddings, computed buffers, and
    those that a model class names in ``_keys_to_ignore_on_load_missing`` and ``..._unexpected``.

    Args:
        auto: One of transformers' auto classes.
        folder: The model.
        unread: Parts that llmrec never reads, such as the ``pooler`` of a text encoder; they may be missing.
        options: Arguments of ``from_pretrained``.

    Raises:
        ModelError: If a tensor is missing, of another shape or left over; it names them.
    """
    with _suppress_load_report():
        model, result = auto.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    missing = [name for name in sorted(result["missing_keys"]) if name.partition(".")[0] not in unread]
    shaped = sorted(
        f"{name} {list(theirs)} for {list(ours)}"
        for name, theirs, ours in result["mismatched_keys"]
        if name.partition(".")[0] not in unread
    )
    ignored, extra = _split_unexpected_tensors(model, result["unexpected_keys"])
    if missing or shaped or extra:
        extra = sorted([*extra, *ignored])
        parts = {"missing": missing, "of another shape": shaped, "without a place": extra}
        faults = "; ".join(f"{what}: {format_name_list(names, 3)}" for what, names in parts.items() if names)
        raise ModelError(
            f"the weights in {folder} do not match config.json ({type(model).__name__}): {faults}. Restore "
            "config.json and the safetensors files from one save_pretrained folder, or choose another model",
            kind="damaged",
            at=folder,
            column="model.name",
        )
    if ignored:
        log.warning(
            "%s: ignoring tensors that %s does not have: %s", folder, type(model).__name__, format_name_list(ignored, 3)
        )
    return model


def _split_unexpected_tensors(model: torch.nn.Module, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the unexpected tensors outside and inside the modules of the model.

    The first are further heads and towers in checkpoints (``cls``, ``v_head``, ``mtp``, ``vision_tower``), which the
    model does not use. An additional layer, or a norm within a layer, is different: the model was trained with it and
    computes something else without it.
    """
    prefix = model.base_model_prefix
    body = getattr(model, prefix, model)
    parts = {name.partition(".")[0] for item in (model, body) for name in item.state_dict()} - {prefix}
    extra: list[str] = []
    ignored: list[str] = []
    for name in sorted(names):
        part = name.removeprefix(f"{prefix}.").partition(".")[0]
        if not _COMPUTED_BUFFERS.search(name):
            (extra if part in parts else ignored).append(name)
    return ignored, extra


def base_of(model: torch.nn.Module) -> Any:
    """Return the base model of an adapted model; other models are returned unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def reading_trained_file(what: str, at: Path) -> Iterator[None]:
    """Convert errors about a file that does not match the trained weights next to it.

    Raises:
        ModelError: If the block cannot read or use the file.
    """
    errors = (OSError, ValueError, KeyError, TypeError, RuntimeError, StopIteration)
    try:
        yield
    except (*errors, require("safetensors", "train").SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        message = f"{what} ({type(error).__name__}: {reason}); train again with `llmrec train`"
        raise ModelError(message, kind="damaged", at=at) from error


@contextmanager
def _suppress_load_report() -> Iterator[None]:
    """Suppress transformers' own report of these tensors, but no other message."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_not_load_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_not_load_report)


def _is_not_load_report(record: logging.LogRecord) -> bool:
    return " LOAD REPORT" not in record.getMessage()


# Vocabulary tables of a model: modules with one row per token, and which of them share weights.
#
# The configuration does not reliably say whether embeddings are tied: T5-v1.1, mT5 and umT5 are marked as tied, but
# their checkpoints have a separate head. Modules share a table if their weights are the same tensor.


def vocabulary_tables(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Return a module for each vocabulary table with its name, the input embeddings first."""
    return [modules[0] for modules in _modules_by_table(model)]


@contextmanager
def mark_tied_tables(model: torch.nn.Module) -> Iterator[None]:
    """Mark, while PEFT reads the model, which modules share the table of the input embeddings."""
    (source, _), *others = _modules_by_table(model)[0]
    config, keys = model.config.get_text_config(), model._tied_weights_keys
    text = config.tie_word_embeddings
    config.tie_word_embeddings = bool(others)
    model._tied_weights_keys = {f"{name}.weight": f"{source}.weight" for name, _ in others}
    try:
        yield
    finally:
        config.tie_word_embeddings, model._tied_weights_keys = text, keys


def _modules_by_table(model: torch.nn.Module) -> list[list[tuple[str, Any]]]:
    """Return the named modules with one row per token, grouped by shared weights."""
    first = model.get_input_embeddings()
    holders = [first, model.get_output_embeddings()]
    if is_encoder_decoder(model.config):
        holders += [half.get_input_embeddings() for half in (model.get_encoder(), model.get_decoder())]
    groups: dict[int, list[tuple[str, Any]]] = {id(first.weight): []}
    for name, module in model.named_modules():
        if any(module is holder for holder in holders):
            groups.setdefault(id(module.weight), []).append((name, module))
    groups[id(first.weight)].sort(key=lambda pair: pair[1] is not first)
    return list(groups.values())
