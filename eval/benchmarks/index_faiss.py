"""Quantises vectors by faiss, on the word of `index_speed.py`: one line of JSON for each line on stdin.

It runs in that library's own environment, so it imports nothing of llmrec: ``PYTHON index_faiss.py FOLDER LEVELS
BITS``. The folder holds ``x.npy``; each round leaves ``codes.npy`` and ``sums.npy``, the sums of codewords, beside it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import faiss
import numpy as np

ITERATIONS = 25


def by_level(x: np.ndarray, levels: int, bits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and sums of codewords by faiss.Kmeans on what the levels before left over."""
    rest, codes = x.copy(), []
    for level in range(levels):
        # All vectors are used, as llmrec uses them.
        clusters = faiss.Kmeans(
            x.shape[1], 1 << bits, niter=ITERATIONS, seed=seed * levels + level, max_points_per_centroid=len(x)
        )
        clusters.train(rest)
        _, chosen = clusters.index.search(rest, 1)
        codes.append(chosen[:, 0])
        rest -= clusters.centroids[codes[-1]]
    return np.stack(codes, axis=1), x - rest


def by_quantizer(x: np.ndarray, levels: int, bits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and sums of codewords by faiss.ResidualQuantizer with its own beam of 5 and progressive start."""
    quantizer = faiss.ResidualQuantizer(x.shape[1], levels, bits)
    quantizer.cp.niter, quantizer.cp.seed = ITERATIONS, seed
    quantizer.train(x)
    packed = quantizer.compute_codes(x)
    return packed.astype(np.int64), quantizer.decode(packed)


def main() -> None:
    """Answer until there is no more to ask."""
    folder, levels, bits = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if bits != 8:
        raise SystemExit("codes are read as bytes: 8 bits")
    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    x = np.load(folder / "x.npy")
    kinds = {"kmeans": by_level, "residual_quantizer": by_quantizer}
    for line in sys.stdin:
        if line.strip() == "versions":
            said: object = {"python": sys.version.split()[0], "faiss": faiss.__version__, "numpy": np.__version__}
        else:
            kind, seed = line.split()
            begin = time.perf_counter()
            codes, sums = kinds[kind](x, levels, bits, int(seed))
            said = time.perf_counter() - begin
            np.save(folder / "codes.npy", codes)
            np.save(folder / "sums.npy", sums)
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
