"""Writes the files of an exported folder with checksums, under a temporary name that is renamed at the end."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrec.backends.encode import Encoder
from llmrec.durable import parse_checked_json, read_json, sha256_of, write_checked_json, write_json, write_text
from llmrec.errors import LlmrecError
from llmrec.exports import card_facts
from llmrec.machine import is_process_alive
from llmrec.models import bottleneck, soft_prompt
from llmrec.models.load import BUNDLE_FILE
from llmrec.models.rating_head import HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, copy_rating_head
from llmrec.pipeline import bundle
from llmrec.pipeline.bundle import CHECKSUMS_FILE
from llmrec.pipeline.indexing import FOLDER
from llmrec.pipeline.runs import TrainedRun
from llmrec.pipeline.study import Study
from llmrec.recipe.schema import SOFT_PROMPT_METHODS, Recipe

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "additional_chat_templates/*.jinja"),
)
# How to fix a damaged file of a run.
_RETRAIN = "train again with `llmrec train`"
_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
_SOFT_PROMPT_FILES = (soft_prompt.SOFT_PROMPT_FILE, bottleneck.BOTTLENECKS_FILE)
_MODEL_FILES = (
    *_WEIGHT_FILES,
    HEAD_WEIGHTS_FILE,
    HEAD_CONFIG_FILE,
    *_SOFT_PROMPT_FILES,
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
)
# Configuration keys in which libraries store the folder from which something was loaded.
_PATH_KEYS = ("_name_or_path", "name_or_path", "_model_name_or_path", "is_local", "local_files_only")


def allowed_patterns(recipe: Recipe) -> tuple[str, ...]:
    """Return the patterns of the files that a model may contain."""
    return (*_MODEL_FILES, "*.py") if recipe.model.trust_remote_code else _MODEL_FILES


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy all files that match a pattern, with their relative paths."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            destination = target / file.relative_to(source)
            destination.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, destination)


def remove_machine_paths(path: Path) -> None:
    """Remove folders of this machine from a configuration."""
    if path.is_file():
        values = read_json(path, _RETRAIN)
        write_json(path, {key: value for key, value in values.items() if key not in _PATH_KEYS})


def set_greedy_generation(draft: Path, encoder: Encoder) -> None:
    """Set greedy decoding as the default for generation, as in evaluation."""
    path = draft / "generation_config.json"
    result = read_json(path, _RETRAIN) if path.is_file() else {}
    ends = result.get("eos_token_id") or []
    tokenizer = encoder.tokenizer
    settled = {
        "bos_token_id": result.get("bos_token_id", tokenizer.bos_token_id),
        "eos_token_id": sorted({*(ends if isinstance(ends, list) else [ends]), *encoder.stop_ids}),
        "pad_token_id": result.get("pad_token_id", tokenizer.pad_token_id),
        "do_sample": False,
    }
    write_json(path, {key: value for key, value in settled.items() if value is not None})


def copy_adapter(source: TrainedRun, base: str, draft: Path) -> None:
    """Copy the adapter, and name the base model in it as the recipe does."""
    lacking = {
        **dict.fromkeys(SOFT_PROMPT_METHODS, "has soft prompts, which an adapter does not contain"),
        "full": "used full fine-tuning, so it has no adapter",
    }
    if why := lacking.get(source.record["method"]):
        raise LlmrecError.at(source.folder, "unsupported", f" {why}; drop --adapter-only", "--adapter-only")
    adapter = source.folder / "adapter"
    shutil.copyfile(adapter / "adapter_model.safetensors", draft / "adapter_model.safetensors")
    config = read_json(adapter / "adapter_config.json", _RETRAIN)
    origin = card_facts.base_facts(source.recipe.model, base)
    config |= {"base_model_name_or_path": origin.hub or origin.name, "revision": origin.revision}
    write_json(draft / "adapter_config.json", config)
    copy_rating_head(adapter, draft)


def write_bundle(source: TrainedRun, study: Study | None, draft: Path, made_from: str) -> None:
    """Write ``llmrec.json`` and the hash of the inputs of the export.

    Args:
        source: The run.
        study: Its study, if its data can be read.
        draft: The folder.
        made_from: Hash of all inputs of the export, to recognise a finished export.
    """
    stored = source.folder / "merged" / BUNDLE_FILE
    if stored.is_file():
        bundle.read(str(source.folder))  # Reject a damaged file here, before the export is passed on.
        content: Mapping[str, Any] = read_json(stored, _RETRAIN)
    elif study is not None:
        content = bundle.bundle_content(study)
    else:
        raise LlmrecError.at(
            stored, "missing-file", " is missing and the data cannot be read; train again with `llmrec train`"
        )
    write_checked_json(draft / BUNDLE_FILE, {**content, "made_from": made_from})


def copy_index(source: TrainedRun, draft: Path, *, titles: bool) -> None:
    """Copy the item codes if the model was trained on codes; titles would reveal the catalogue.

    Raises:
        LlmrecError: If they are missing in the merged model.
    """
    index, content = source.folder / "merged" / FOLDER, read_json(draft / BUNDLE_FILE, _RETRAIN)
    if content.get("index") is None or (content["index"] == "title" and not titles):
        return
    if not index.is_dir():
        raise LlmrecError.at(
            index, "missing-file", ", which defines the model's codes, is missing; train again with `llmrec train`"
        )
    shutil.copytree(index, draft / FOLDER)


def stored_inputs_hash(folder: Path) -> str | None:
    """Return the hash of an export's inputs; None if the folder is not an unchanged export."""
    try:
        result = parse_checked_json((folder / BUNDLE_FILE).read_bytes()).get("made_from")
    except (OSError, ValueError, AttributeError):
        return None
    return str(result) if result and is_unchanged_export(folder) else None


def write_checksums(draft: Path) -> dict[str, int]:
    """Write ``SHA256SUMS``, and return the size of every file."""
    files = sorted(file for file in draft.rglob("*") if file.is_file())
    lines = [f"{sha256_of(file)}  {file.relative_to(draft).as_posix()}\n" for file in files]
    write_text(draft / CHECKSUMS_FILE, "".join(lines))
    return {file.relative_to(draft).as_posix(): file.stat().st_size for file in (*files, draft / CHECKSUMS_FILE)}


def is_unchanged_export(folder: Path) -> bool:
    """Whether a folder is an export with exactly the files and contents in its ``SHA256SUMS``."""
    digests = read_checksums(folder)
    return digests is not None and all(sha256_of(folder / name) == digest for name, digest in digests.items())


def is_export(folder: Path) -> bool:
    """Whether a folder has exactly the files of an export, even if they were edited."""
    return read_checksums(folder) is not None


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Return the hashes in ``SHA256SUMS`` by file; None if the folder has other files."""
    try:
        lines = (folder / CHECKSUMS_FILE).read_text(encoding="utf-8").splitlines()
        digests = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return None
    held = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    return digests if held == {*digests, CHECKSUMS_FILE} else None


@contextmanager
def replacing_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary folder next to the target, and rename it to the target if the block succeeds.

    Raises:
        LlmrecError: If the target exists and must not be replaced, or writing fails.
    """
    check_replaceable(target, force=force)
    try:
        _remove_leftovers(target)
        draft = _sibling_path(target, "tmp")
        draft.mkdir(parents=True)
    except OSError as error:
        raise _unwritable_error(target, error) from error
    try:
        yield draft
        check_replaceable(target, force=force)
        _replace_folder(draft, target)
    except OSError as error:
        raise _unwritable_error(target, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_replaceable(target: Path, *, force: bool) -> None:
    """Reject an existing target that must not be replaced: without ``force``, or a folder with foreign files."""
    if not os.path.lexists(target):
        return
    if not force:
        raise LlmrecError.at(target, "exists", " exists already; choose another --out, or replace it with --force")
    if target.is_symlink() or not target.is_dir() or not is_export(target):
        raise LlmrecError.at(
            target,
            "exists",
            " was not written by `llmrec export`, or was changed afterwards, so --force does not replace it; "
            "remove this folder, or choose another --out",
        )


def _replace_folder(draft: Path, target: Path) -> None:
    old = _sibling_path(target, "old")
    if target.exists():
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Remove the leftovers of dead processes, and restore a folder that was not replaced."""
    if not target.parent.is_dir():
        return
    for kind in ("old", "tmp"):
        for left in sorted(target.parent.glob(f"{glob.escape(target.name)}.llmrec-{kind}-*")):
            owner = left.name.rpartition("-")[2]
            # In a container, process ids repeat, so a folder of this id that this process did not create is a leftover.
            if not owner.isdigit() or (int(owner) != os.getpid() and is_process_alive(int(owner))):
                continue
            if kind == "old" and not target.exists():
                left.rename(target)
            else:
                shutil.rmtree(left)


def _sibling_path(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.llmrec-{kind}-{os.getpid()}")


def _unwritable_error(target: Path, error: OSError) -> LlmrecError:
    reason = error.strerror or str(error)
    return LlmrecError(
        f"the export to {target} cannot be written ({reason}); fix this, or choose another --out",
        kind="unreadable",
        at=target,
    )
