"""Fits baselines, and caches slow fits by fingerprint for other runs and benchmarks.

Files are safetensors in ``fits`` of the cache folder. Above `DEFAULT_LIMIT`, files that were not read for `STALE_DAYS`
days are removed first, then those that save the least time for their size.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from llmrec.baselines.parameters import create_baseline, input_hashes
from llmrec.errors import RecipeError
from llmrec.fingerprint import fingerprint
from llmrec.machine import cpu_has_bf16, has_cuda, package_version, package_versions
from llmrec.progress import Progress
from llmrec.resources import cache_dir

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.recipe.schema import Section

    State = Mapping[str, NDArray[Any]]

log = logging.getLogger(__name__)

LIMIT_VARIABLE = "LLMREC_FITS"
"""Environment variable: the limit of stored fits in GiB, or ``off``."""
DEFAULT_LIMIT = 4.0
"""Default limit of stored fits in GiB."""
MIN_STORED_SECONDS = 2.0
"""Minimum duration in seconds of a fit that is stored; restoring a faster one saves no time."""
STALE_DAYS = 30
"""Days without a read after which a fit is deleted before all others: most are from older code."""

# Parameters that only affect the progress bar.
_DISPLAY_PARAMETERS = {"quiet"}


@runtime_checkable
class Storable(Protocol):
    """A baseline whose fitted state can be cached."""

    name: str
    AT_ANSWER: frozenset[str]
    FITS_ON: str

    @property
    def config(self) -> Section:
        """The parameters of the fit."""
        ...

    def state(self) -> State:
        """Return the fitted state as arrays, without user ids and values that can be computed from the data."""
        ...

    def restore(self, data: SplitDataset, state: State) -> None:
        """Restore the fitted state from `state`, given the same data."""
        ...


def fit_key(model: Storable, data: SplitDataset, seed: int) -> str:
    """Return the fingerprint of a fit."""
    config = model.config.model_dump(mode="json", exclude={*model.AT_ANSWER, *_DISPLAY_PARAMETERS})
    return fingerprint(
        "fit",
        modules=(type(model).__module__,),
        name=model.name,
        config=config,
        seed=seed,
        # A fit that uses only training interactions does not depend on validation users.
        data=[data.dataset.fingerprint, data.kind, data.readable] if model.FITS_ON == "train" else data.fingerprint,
        files=input_hashes(model.name, model.config.model_dump()),
        bf16=cpu_has_bf16(),
        # GPUs compute sums in another order.
        cuda=config.get("device") != "cpu" and has_cuda(),
        versions={**package_versions(), "implicit": package_version("implicit")},
    )


def restore_fit(model: Storable, key: str, data: SplitDataset) -> float | None:
    """Restore a cached fit, and return its original duration in seconds; None if it is not cached."""
    path = _fit_path(model, key)
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("key") != key or metadata.get("sha256") != _state_digest(state, metadata.get("seconds", "")):
            raise ValueError("its content has changed")
        model.restore(data, state)
        seconds = float(metadata["seconds"])
        os.utime(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        log.warning("the stored model %s cannot be used (%s); fitting %s again", path, error, model.name)
        return None
    log.info("%s: reusing the stored model %s", model.name, path)
    return seconds


def store_fit(model: Storable, key: str, seconds: float) -> None:
    """Cache a fit that took long enough and is not too large; write errors only cause a warning."""
    limit = _cache_limit()
    state = model.state() if seconds >= MIN_STORED_SECONDS else {}
    if not state or sum(array.nbytes for array in state.values()) > limit:
        return
    from safetensors.numpy import save_file

    path = _fit_path(model, key)
    metadata = {"key": key, "seconds": repr(seconds), "sha256": _state_digest(state, repr(seconds))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # unique, since several processes may cache the same fit at the same time
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".draft")
        os.close(handle)
        try:
            save_file({name: np.asarray(array, order="C") for name, array in state.items()}, draft, metadata=metadata)
            Path(draft).replace(path)
        finally:
            Path(draft).unlink(missing_ok=True)
        _trim_cache(path.parent, limit)
    except OSError as error:
        log.warning("the fitted model %s cannot be stored in %s (%s)", model.name, path.parent, error)


def _trim_cache(folder: Path, limit: float) -> None:
    """Remove cached fits until the cache is within its size limit: outdated fits first, then fast ones."""
    sizes = {file: file.stat().st_size for file in folder.glob("*.safetensors")}
    size = sum(sizes.values())
    if size <= limit:
        return
    from safetensors import SafetensorError, safe_open

    def priority(file: Path) -> tuple[bool, float, float]:
        try:
            with safe_open(file, framework="numpy") as opened:
                seconds = float((opened.metadata() or {})["seconds"])
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError):
            return False, 0.0, 0.0
        read = file.stat().st_mtime
        return time.time() - read < 86_400 * STALE_DAYS, seconds / sizes[file], read

    for file in sorted(sizes, key=priority):
        if size <= limit:
            break
        file.unlink(missing_ok=True)
        size -= sizes[file]


def _fit_path(model: Storable, key: str) -> Path:
    return cache_dir() / "fits" / f"{model.name}-{key}.safetensors"


def _cache_limit() -> float:
    """Return the size limit of the cache in bytes; 0 if fits are not cached."""
    value = os.environ.get(LIMIT_VARIABLE, "").strip().lower()
    try:
        size = 0.0 if value == "off" else float(value or DEFAULT_LIMIT)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise RecipeError(
            f"{LIMIT_VARIABLE} is {value[:40]!r}; set the maximum size of stored models in GiB, such as 4, or off",
            kind="bad-value",
            column=LIMIT_VARIABLE,
        )
    return size * 2**30


def _state_digest(state: State, seconds: str) -> str:
    result = hashlib.sha256(seconds.encode())
    for name, array in sorted(state.items()):
        result.update(f"{name} {array.dtype} {array.shape}".encode())
        result.update(np.asarray(array, order="C").tobytes())
    return result.hexdigest()


# --------------------------------------------------------------------------- fitting


def fit_baseline(
    name: str,
    parameters: Mapping[str, Any],
    data: SplitDataset,
    *,
    seed: int,
    like: Sequence[Any] = (),
    where: str = "parameters",
) -> Any:
    """Return a fitted baseline, from the cache or newly fitted with a progress bar.

    Args:
        name: The name of the baseline.
        parameters: Its parameters.
        data: The split.
        seed: The seed of the fit.
        like: Baselines of this name that were fitted on the same data with the same seed. If one differs only in
            parameters that do not affect fitting, its fit is reused.
        where: The key of the parameters, for messages.
    """
    model = create_baseline(name, parameters, seed=seed, where=where)
    for other in like:
        if other.config.model_dump(exclude=model.AT_ANSWER) == model.config.model_dump(exclude=model.AT_ANSWER):
            same = other.with_config(model.config)
            same.recalled = 0.0
            return same
    return fit_or_restore(model, data, seed=seed)


def fit_or_restore(model: Any, data: SplitDataset, *, seed: int) -> Any:
    """Fit a baseline, or restore its cached fit, and return it.

    Args:
        model: The baseline.
        data: The split.
        seed: The seed of the baseline.
    """
    key = fit_key(model, data, seed) if isinstance(model, Storable) and _cache_limit() else None
    if key is not None and (seconds := restore_fit(model, key, data)) is not None:
        model.recalled = seconds
        return model
    begin = time.monotonic()
    with Progress(f"fitting {model.name}", None, quiet=bool(getattr(getattr(model, "config", None), "quiet", False))):
        model.fit(data)
    if key is not None:
        store_fit(model, key, time.monotonic() - begin)
    return model
