"""Seeded hashes for all random choices about data, so that they depend on ids and not on the row order.

blake2b is used instead of the hash of a library, so that a split does not change with the version of polars or numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import polars as pl
from numpy.typing import NDArray

# Number of rows whose strings are converted to Python at a time.
_BLOCK = 65_536


def hash64(purpose: str, seed: int, *columns: Sequence[str] | pl.Series) -> NDArray[np.uint64]:
    """Hash each row of strings to 64 bits.

    Args:
        purpose: Name of the decision; hashes with different purposes are independent.
        seed: The run's seed.
        columns: Columns of equal length, such as the user and the item of every row.

    Returns:
        One hash per row, shape (n,).
    """
    # The length precedes each string, so that ("ab", "c") and ("a", "bc") differ.
    prefix = f"{purpose}\x1f{seed}\x1f"
    results = []
    rows = zip(*columns, strict=True)
    while block := list(islice(rows, _BLOCK)):
        digests = [
            hashlib.blake2b(
                (prefix + "".join([f"{len(part)}:{part}" for part in row])).encode(), digest_size=8
            ).digest()
            for row in block
        ]
        results.append(np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64))
    return np.concatenate(results) if results else np.empty(0, dtype=np.uint64)


def hash_one(purpose: str, seed: int, *parts: str) -> int:
    """Hash one row of strings to the same value as `hash64`."""
    return int(hash64(purpose, seed, *[[part] for part in parts])[0])


def digest_frame(frame: pl.DataFrame) -> str:
    """Return a SHA-256 over the values of a data frame, in row order; nulls differ from empty texts."""
    total = hashlib.sha256()
    for name in frame.columns:
        series = frame[name]
        total.update(f"{name}\x1f{len(series)}\x1f".encode())
        if series.dtype in (pl.String, pl.Enum, pl.Null):
            _digest_texts(total, series)
        else:
            # Nulls are hashed as a mask; the value at a null is set to 0, because its bytes are undefined.
            total.update(series.is_null().to_numpy().astype(np.uint8).tobytes())
            total.update(series.cast(pl.Float64).fill_null(0.0).to_numpy().astype("<f8").tobytes())
    return total.hexdigest()


def _digest_texts(total: hashlib._Hash, series: pl.Series) -> None:
    """Add texts to a hash block by block, like `digest_strings`."""
    blocks = [series[start : start + _BLOCK] for start in range(0, len(series), _BLOCK)]
    for block in blocks:
        lengths = block.cast(pl.String).str.len_bytes().cast(pl.Int64).fill_null(-1)
        total.update(lengths.to_numpy().astype("<i8").tobytes())
    for block in blocks:
        total.update(block.cast(pl.String).str.join("").item().encode())


def digest_strings(values: Iterable[str | None]) -> str:
    """Return a SHA-256 over a sequence of strings."""
    encoded = [None if value is None else value.encode("utf-8", "surrogatepass") for value in values]
    lengths = np.array([-1 if value is None else len(value) for value in encoded], dtype="<i8")
    return hashlib.sha256(lengths.tobytes() + b"".join(value for value in encoded if value is not None)).hexdigest()
