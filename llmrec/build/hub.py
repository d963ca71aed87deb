"""Uploads an exported folder to a model hub: asked for by name only, private unless told otherwise."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrec.errors import LlmrecError, require


def check(name: str) -> None:
    """Find what an upload lacks before minutes of work, not after.

    Raises:
        LlmrecError: If the name cannot be one, the hub is switched off, or there is no token.
    """
    hub, errors = require("huggingface_hub", "train"), require("huggingface_hub.errors", "train")
    try:
        require("huggingface_hub.utils", "train").validate_repo_id(name)
        well_formed = name.count("/") == 1
    except errors.HFValidationError:
        well_formed = False
    if not well_formed:
        raise LlmrecError(f"--push {name!r} is no hub name; write USER/NAME, such as --push ada/films-recommender")
    if require("huggingface_hub.constants", "train").HF_HUB_OFFLINE:
        raise LlmrecError("--push needs the hub, and HF_HUB_OFFLINE switches it off; unset it, or leave out --push")
    if not hub.get_token():
        raise LlmrecError(
            "--push needs a token of the hub with write access; set HF_TOKEN or run `hf auth login`, then export again"
        )


def push(folder: Path, name: str, files: Sequence[str], *, private: bool) -> str:
    """Upload exactly the named files of a folder, and return the address of the repository.

    Raises:
        LlmrecError: If the hub cannot be reached or refuses, or if a private upload would land in a public repository.
            The folder stays as it is.
    """
    hub = require("huggingface_hub", "train")
    api: Any = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    mend = (
        f"The folder {folder} is complete; mend the cause and upload it with: "
        f"hf upload {name} {folder}{' --private' if private else ''}"
    )
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        if private and not api.repo_info(name).private:
            raise LlmrecError(
                f"{name} exists on the hub and is public, and --push uploads to private repositories unless --public "
                f"is given; choose another name or say --public. The folder {folder} is complete"
            )
        with warnings.catch_warnings():
            # The catalogue of an export belongs beside its model, in a model repository.
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file", UserWarning)
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                allow_patterns=[_literally(file) for file in files],
                commit_message="Export by llmrec",
            )
    except LlmrecError:
        raise
    except Exception as error:  # the library raises dozens of types, from network errors to refusals of the hub
        token = hub.get_token() or ""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[0] if lines else type(error).__name__).replace(token or "\0", "[token]")
        raise LlmrecError(f"the upload to {name} failed: {reason[:300]}. {mend}") from error
    return address


def _literally(name: str) -> str:
    """Return a file name as a pattern that matches nothing else."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
