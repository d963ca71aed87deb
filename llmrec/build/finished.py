"""Opens the run folder of a finished training, and proves that its weights are those on record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.backends.models import weights_stamp
from llmrec.errors import LlmrecError
from llmrec.recipe import Recipe
from llmrec.recipe_file import load_recipe


@dataclass(frozen=True)
class Source:
    """A run folder whose adapter is the one on record; ``merged`` is its merged model's dtype, if that is sound too."""

    folder: Path
    recipe: Recipe
    record: Mapping[str, Any]
    merged: str | None


def open_run(run: Path) -> Source:
    """Read a run folder and prove that its adapter is the one that training recorded."""
    if not (run / "recipe.yaml").is_file():
        raise LlmrecError(f"{run} is no run folder, since it holds no recipe.yaml; name one such as runs/quickstart")
    recipe = load_recipe(run / "recipe.yaml")
    path = run / "train.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        recorded, method, steps = str(record["adapter_sha256"]), str(record["method"]), int(record["steps"])
    except FileNotFoundError:
        raise LlmrecError(
            f"{run} holds no finished training (train.json); finish it with `llmrec train` first"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise LlmrecError(f"{path} is no training record ({error!r}); train again with `llmrec train`") from error
    if method != recipe.train.method or steps != recipe.train.steps:
        raise LlmrecError(
            f"{run / 'recipe.yaml'} says {recipe.train.method} for {recipe.train.steps} steps, but {path} records "
            f"{method} for {steps}: another recipe was tried on this folder since. Run the one that trained it again"
        )
    found = weights_sha256(run / "adapter")
    if found != recorded:
        raise LlmrecError(
            f"the weights in {run / 'adapter'} are not those that training recorded: their sha256 is {found}, and "
            f"{path} says {recorded}. Put the right files back, or train again with `llmrec train`"
        )
    return Source(run, recipe, record, _sound(run / "merged", record))


def weights_sha256(folder: Path) -> str:
    """Return the sha256 over a folder's safetensors files in name order, as training records it."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _sound(merged: Path, record: Mapping[str, Any]) -> str | None:
    """Return the dtype of a merged model that is as training left it, else None."""
    if not (merged / "config.json").is_file() or record.get("merged_sha256") != weights_stamp(str(merged)):
        return None
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype"))
