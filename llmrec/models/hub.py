"""Models of the Hugging Face hub: local cache, downloads, and an error message for each kind of failure."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from llmrec.errors import ErrorKind, ModelError, require

_CONFIG_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model")
_WEIGHT_PATTERN = "*.safetensors"
# Seconds to wait for the hub's answer whether it has a model.
_HUB_TIMEOUT = 5
_DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_CONNECTION_ERRORS = {
    "ConnectError",
    "ConnectionError",
    "TimeoutException",
    "TimeoutError",
    "Timeout",
    "TransportError",
}


def cached_folder(name: str, revision: str | None, *, code: bool) -> str | None:
    """Return the folder of a model that is complete in the hub cache, with weights; otherwise None."""
    hub = require("huggingface_hub", "train")
    if not Path(_cache_folder(), f"models--{name.replace('/', '--')}").is_dir():
        return None  # without importing the download library, which is slow
    try:
        result = hub.snapshot_download(
            name, revision=revision, allow_patterns=_download_patterns(weights=True, code=code), local_files_only=True
        )
    except Exception:
        return None
    folder = Path(result)
    return result if (folder / "config.json").is_file() and is_complete(folder) else None


def download_model(name: str, revision: str | None, *, code: bool, weights: bool = True) -> str:
    """Download a model to the hub cache and return its folder.

    Args:
        name: A name on the hub, such as ``org/model``.
        revision: A branch, tag or commit; None: the main one.
        code: Download Python files too.
        weights: Download the weights; otherwise only configuration and tokenizer, which takes seconds.

    Raises:
        ModelError: If the hub denies access or cannot be reached, the disk is full, or its weights are in pickle files
            only; the message contains the fix.
    """
    hub = require("huggingface_hub", "train")
    try:
        info = hub.HfApi(endpoint=_hub_url()).model_info(name, revision=revision, timeout=_HUB_TIMEOUT)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        if not any(file.endswith(".safetensors") for file in files):
            raise ModelError(
                f"model {name} has no safetensors files on the hub, and weights in pickle files are not loaded; choose "
                "a revision that has them (model.revision), or convert it with save_pretrained and use that folder",
                kind="unsafe",
                at=name,
                column="model.name",
            )
        patterns = _download_patterns(weights=weights, code=code)
        return str(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, endpoint=_hub_url()))
    except ModelError:
        raise
    except Exception as error:
        raise _download_error(name, revision, error) from error


def is_complete(folder: Path) -> bool:
    """Whether all safetensors files of a model exist; after an interrupted download, some are missing."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob(_WEIGHT_PATTERN))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, OSError):
        return False
    return all((folder / str(shard)).is_file() for shard in shards)


def _download_patterns(*, weights: bool, code: bool) -> list[str]:
    return [*_CONFIG_PATTERNS, *((_WEIGHT_PATTERN,) if weights else ()), *(("*.py",) if code else ())]


def _download_error(name: str, revision: str | None, error: Exception) -> ModelError:
    """Return the error for a failed download, with the fix."""
    chain = list(_exception_chain(error))
    kinds = {kind.__name__ for item in chain for kind in type(item).__mro__}
    status = next((code for item in chain if (code := _response_status(item)) is not None), None)
    # the address of a proxy may contain a password
    text = re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))[:300] or type(error).__name__
    kind, sentence = (
        _disk_problem(chain, text)
        or _response_problem(name, revision, kinds, status, text)
        or _network_problem(kinds, text)
    )
    key = "model.revision" if "RevisionNotFoundError" in kinds else "model.name"
    return ModelError(f"model {name!r}: {sentence}", kind=kind, at=name, column=key)


def _exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response_status(error: BaseException) -> int | None:
    result = getattr(getattr(error, "response", None), "status_code", None)
    return result if isinstance(result, int) else None


def _disk_problem(chain: list[BaseException], text: str) -> tuple[ErrorKind, str] | None:
    """Return the error for a download that could not be stored; None if that is not the cause."""
    folder = _cache_folder()
    numbers = {item.errno for item in chain if isinstance(item, OSError)}
    if numbers & set(_DISK_FULL_ERRORS) or "No space left on device" in text:
        free = _free_gib(folder)
        return "exhausted", (
            f"the disk is full: {folder} has {free:.1f} GiB left. Free space and run the command again, which resumes "
            "the download, or set HF_HOME to a folder on a larger disk"
        )
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return "unreadable", (
            f"the hub's cache {folder} is not writable; change its owner (chown), or set HF_HOME to another folder"
        )
    return None


def _response_problem(
    name: str, revision: str | None, kinds: set[str], status: int | None, text: str
) -> tuple[ErrorKind, str] | None:
    """Return the error for a response of the hub; None if there was no response."""
    page = f"{_hub_url()}/{name}"
    has_token = require("huggingface_hub", "train").get_token()
    token = "the token in HF_TOKEN or of `hf auth login`" if has_token else "there is no token (HF_TOKEN)"
    if "HFValidationError" in kinds:
        return "unknown-name", f"it is neither a local folder nor a valid name on the hub ({text}); correct model.name"
    if "GatedRepoError" in kinds:
        return "unreachable", (
            f"the hub requires accepting its licence, and {token}. Accept it at {page}, and set "
            "HF_TOKEN to a token of that account"
        )
    if "RevisionNotFoundError" in kinds:
        return "unknown-name", (
            f"the model has no revision {revision!r} on the hub; see {page}/tree/main, or remove the key model.revision"
        )
    if status == 401:
        return "unreachable", (
            f"it is not on the hub, or it is private and needs a valid token: {token}. Check the name at {page}, and "
            "set HF_TOKEN to a token with access to the model"
        )
    if status == 403:
        return "unreachable", (
            f"the hub denies access (403): {token}. Set HF_TOKEN to a token with read access; a fine-grained token "
            f"must include the model; see {page}"
        )
    if status == 404 or "RepositoryNotFoundError" in kinds:
        return (
            "unknown-name",
            f"it is not a local folder, and {_hub_url()} has no model of this name (404); correct it",
        )
    if status == 407:
        return _network_problem({"ProxyError"}, text)
    if status is not None:
        return "unreachable", (
            f"the hub responds with status {status} ({text}); try again later, or set model.name to a folder"
        )
    return None


def _network_problem(kinds: set[str], text: str) -> tuple[ErrorKind, str]:
    """Return the error for a failed connection to the hub."""
    if "OfflineModeIsEnabled" in kinds:
        return "unreachable", (
            f"HF_HUB_OFFLINE is set, and the hub's cache {_cache_folder()} does not contain the complete model; "
            "download the model once without HF_HUB_OFFLINE, or set model.name to a folder"
        )
    if "ProxyError" in kinds or "proxy" in text.lower() or (kinds & _CONNECTION_ERRORS and _has_proxy()):
        return "unreachable", (
            f"the proxy for {_hub_url()} does not work ({text}); correct HTTPS_PROXY and NO_PROXY, or set "
            "HF_HUB_OFFLINE=1 to work without the hub"
        )
    if kinds & _CONNECTION_ERRORS:
        return "unreachable", (
            f"{_hub_url()} cannot be reached ({text}); check the network, set HF_ENDPOINT to a mirror, or set "
            "model.name to a folder"
        )
    return "failed", (
        f"the download from {_hub_url()} was interrupted ({text}); run the command again to resume the download"
    )


def _has_proxy() -> bool:
    """Whether requests to the hub go through a proxy, according to the environment."""
    hub = urlsplit(_hub_url())
    return {hub.scheme, "all"} & getproxies().keys() != set() and not proxy_bypass(hub.netloc)


def _hub_url() -> str:
    return str(_hub_constants().ENDPOINT).rstrip("/")


def _cache_folder() -> str:
    return str(_hub_constants().HF_HUB_CACHE)


def _hub_constants() -> Any:
    return require("huggingface_hub.constants", "train")


def _free_gib(folder: str) -> float:
    """Return the free GiB on the disk of a folder, which need not exist yet."""
    parent = Path(folder)
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return shutil.disk_usage(os.fspath(parent)).free / 2**30
