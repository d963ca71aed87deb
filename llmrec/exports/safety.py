"""Inspects files before they leave the machine, and uploads them to a model hub (private by default)."""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmrec.errors import LlmrecError, require
from llmrec.resources import cache_dir

_ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".md", ".txt", ".model", ".parquet"})
_ALLOWED_NAMES = frozenset({"LICENSE", "LICENSE-base", "SHA256SUMS"})
# Vocabularies contain fragments of any path.
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"})
_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_KEY)$")
_SHORTEST_SECRET = 8


def check_contents(folder: Path, private: Iterable[Path], *, own_code: bool) -> None:
    """Reject a folder with an unexpected type of file, a path of this machine, or a secret of the environment.

    Args:
        folder: The folder to publish.
        private: Folders whose names must not occur in it, in addition to home, working and cache folders.
        own_code: Whether the model has Python files.

    Raises:
        LlmrecError: If there is one; the message has the file and the finding, but not the secret.
    """
    paths = _machine_paths(private)
    secrets = _environment_secrets()
    for file in sorted(file for file in folder.rglob("*") if not file.is_dir()):
        name = file.relative_to(folder).as_posix()
        known = file.suffix in _ALLOWED_SUFFIXES or file.name in _ALLOWED_NAMES or (own_code and file.suffix == ".py")
        if file.is_symlink() or not known:
            raise LlmrecError(
                f"the export would contain {name}, whose file type is not allowed; remove the file",
                kind="unsafe",
                at=name,
            )
        text = _read_text(file)
        for secret in secrets:
            if secret in text:
                raise LlmrecError.at(
                    name,
                    "unsafe",
                    " would contain the value of a secret environment variable; remove the secret from the run",
                )
        for path in paths if file.name not in _VOCABULARIES else ():
            if re.search(rf"(?<![\w./~-]){re.escape(path)}(?![\w-])", text):
                raise LlmrecError.at(
                    name,
                    "unsafe",
                    f" would contain the path {path} of this machine; remove the path from the recipe or the templates",
                )


def _machine_paths(folders: Iterable[Path]) -> list[str]:
    """Return the absolute paths that would reveal something about this machine."""
    result: set[str] = set()
    for folder in (Path.home(), Path.cwd(), cache_dir(), *folders):
        result |= {str(entry) for entry in (folder.expanduser().absolute(), folder.expanduser().resolve())}
    return sorted(path for path in result if len(Path(path).parts) > 2 or path == str(Path.home()))


def _environment_secrets() -> list[str]:
    hub = require("huggingface_hub", "train")
    named = [value for name, value in os.environ.items() if _SECRET.search(name)]
    return [value for value in {*named, hub.get_token() or ""} if len(value) >= _SHORTEST_SECRET]


def _read_text(file: Path) -> str:
    """Return the text of a file; for weights, only the header."""
    if file.suffix == ".safetensors":
        with file.open("rb") as stream:
            return stream.read(int.from_bytes(stream.read(8), "little")).decode("utf-8", "replace")
    return file.read_bytes().decode("utf-8", "replace")


def remove_other_files(folder: Path, patterns: Sequence[str]) -> None:
    """Remove all files that match no pattern."""
    kept = {file for pattern in patterns for file in folder.glob(pattern)}
    for file in folder.rglob("*"):
        if file.is_file() and file not in kept:
            file.unlink()


def has_same_weights(one: Path, two: Path) -> bool:
    """Whether two model folders have the same weights, up to rounding to the coarser dtype."""
    torch = require("torch", "train")
    first, second = _tensor_files(one), _tensor_files(two)
    if first.keys() != second.keys():
        return False
    for name in first:
        a, b = _read_tensor(first[name], name), _read_tensor(second[name], name)
        if a.shape != b.shape:
            return False
        # The relative rounding error of the coarser dtype, and an absolute error for the sums in the merge.
        coarse = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
        fine = 1e-6 * float(b.abs().max()) + 1e-7
        if not torch.allclose(a.float(), b.float(), rtol=coarse, atol=fine):
            return False
    return True


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor in a model folder, those of heads included."""
    safetensors, result = require("safetensors", "train"), dict[str, Path]()
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as opened:
            result |= dict.fromkeys(opened.keys(), file)
    return result


def _read_tensor(file: Path, name: str) -> Any:
    safetensors = require("safetensors", "train")
    with safetensors.safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def check_upload(name: str) -> None:
    """Check the requirements of an upload, before minutes of work.

    Raises:
        LlmrecError: If the name is invalid, the hub is disabled, or the token is missing.
    """
    hub, errors = require("huggingface_hub", "train"), require("huggingface_hub.errors", "train")
    try:
        require("huggingface_hub.utils", "train").validate_repo_id(name)
        well_formed = name.count("/") == 1
    except errors.HFValidationError:
        well_formed = False
    if not well_formed:
        raise LlmrecError(
            f"--push {name!r} is not a hub name; use USER/NAME, such as --push ada/films-recommender",
            kind="bad-value",
            column="--push",
        )
    if require("huggingface_hub.constants", "train").HF_HUB_OFFLINE:
        raise LlmrecError(
            "--push needs the hub, which HF_HUB_OFFLINE disables; unset this variable, or drop --push",
            kind="unreachable",
            column="--push",
        )
    if not hub.get_token():
        raise LlmrecError(
            "--push needs a hub token with write access; set HF_TOKEN or run `hf auth login`, then export again",
            kind="missing-value",
            column="--push",
        )


def upload_export(folder: Path, name: str, files: Sequence[str], *, private: bool) -> str:
    """Upload the named files of a folder, and return the URL of the repository.

    Raises:
        LlmrecError: If the hub cannot be reached or rejects the upload, or if a private upload would go to a public
            repository. The folder is unchanged.
    """
    hub = require("huggingface_hub", "train")
    api: Any = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    fix = (
        f"The folder {folder} is complete; fix the cause and upload it with: "
        f"hf upload {name} {folder}{' --private' if private else ''}"
    )
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        if private and not api.repo_info(name).private:
            raise LlmrecError(
                f"{name} is a public repository on the hub, and without --public, --push uploads only to private "
                f"ones; choose another name, or add --public. The folder {folder} is complete",
                kind="contradiction",
                column="--push",
            )
        with warnings.catch_warnings():
            # The catalogue of an export is stored with its model, in a model repository.
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file", UserWarning)
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                allow_patterns=[glob.escape(file) for file in files],
                commit_message="Export by llmrec",
            )
    except LlmrecError:
        raise
    except (
        Exception
    ) as error:  # the library raises dozens of exception types, from network errors to rejections by the hub
        token = hub.get_token() or ""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[0] if lines else type(error).__name__).replace(token or "\0", "[token]")
        raise LlmrecError(
            f"the upload to {name} failed: {reason[:300]}. {fix}", kind="unreachable", column="--push"
        ) from error
    return address
