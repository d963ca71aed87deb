"""Quantises the texts of a real catalogue beside faiss, in one run, interleaved, and times bounds and RQ-VAE.

``FAISS_PYTHON=PYTHON LLMREC_DATA=FOLDER python -m eval.benchmarks.index_speed eval/results/index_speed.json``, where
PYTHON is the interpreter of an environment with ``faiss-cpu`` and FOLDER holds ``amazon14_beauty/items.tsv.gz`` and
``sequences.txt.gz``; without it, the films of MovieLens-small are taken. ENCODER names another text encoder than the
recipe's. Goals: a mean squared error of at most 1.02 of faiss' k-means by level, at 1.5 times its perplexity on the
levels after the first (faiss' ResidualQuantizer, which searches a beam of codes, is held to the same); at 100,000
vectors a bound costs at most 3 times the time; and a fit is at least 1,000 times cheaper than the 20,000 epochs of
RQ-VAE that TIGER trains.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.data.sets.table import load
from llmrec.data.split import split
from llmrec.durable import write_json
from llmrec.index.semantic import fit, kmeans, perplexity, reconstructed, residual_kmeans
from llmrec.index.table import build
from llmrec.machine import machine, versions
from llmrec.models.text_encoder import encode_texts, find_encoder
from llmrec.recipe.schema import DataSection, IndexSection, RQVAEIndex, SemanticIndex, Split

LEVELS, BITS, ROUNDS = 3, 8, 3
CODES = 1 << BITS
MANY, EPOCHS = 100_000, 20_000
GOALS = {"mse": 1.02, "perplexity": 1.5, "bound": 3.0, "rqvae": 1000.0}


def catalogue() -> tuple[str, NDArray[np.float32], dict[str, Any]]:
    """Return the data's name, the vectors of its items' texts, and figures of the indexes that they give."""
    folder = os.environ.get("LLMREC_DATA")
    section = (
        DataSection(source="sequences", path=str(Path(folder) / "amazon14_beauty"))
        if folder
        else DataSection(source="movielens-small")
    )
    data = split(load(section, seed=0), Split(), seed=0)
    encoder, _ = find_encoder(os.environ.get("ENCODER", SemanticIndex().encoder))
    found: list[NDArray[np.float32]] = []

    def once(texts: list[str]) -> NDArray[np.float32]:
        if not found:
            found.append(encode_texts(encoder, texts))
        return found[0]

    figures = {}
    for repair in ("extra_level", "last_level"):
        wanted = IndexSection(scheme="semantic", semantic=SemanticIndex(repair=repair))
        index = build(wanted, data, seed=0, embed=once)
        shared = len(index.codes) - len({*index.codes.values()})
        figures[repair] = {"before": dict(index.figures), "collisions_after": shared, "tokens": len(index.tokens)}
    return data.dataset.name, found[0], figures


def quality(x: NDArray[np.float32], codes: NDArray[np.int64], sums: NDArray[np.float32]) -> dict[str, Any]:
    """Return what codes are worth: error, use of each level, and items that share their code with another."""
    sizes = np.unique(codes, axis=0, return_counts=True)[1]
    return {
        "mse": float(np.square(x - sums).sum(axis=1, dtype=np.float64).mean()),
        "perplexity": [perplexity(codes[:, level], CODES) for level in range(LEVELS)],
        "collisions": float(sizes[sizes > 1].sum() / len(x)),
    }


class Peer:
    """Faiss in another environment."""

    def __init__(self, python: str, folder: Path) -> None:
        script, self._folder = Path(__file__).with_name("index_faiss.py"), folder
        self._process = subprocess.Popen(
            [python, str(script), str(folder), str(LEVELS), str(BITS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._ask("versions")

    def round(self, kind: str, x: NDArray[np.float32], seed: int) -> dict[str, Any]:
        """Quantise once."""
        seconds = self._ask(f"{kind} {seed}")
        return {"seconds": seconds} | quality(
            x, np.load(self._folder / "codes.npy"), np.load(self._folder / "sums.npy")
        )

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the other library's process ended; its error stands above")
        return json.loads(line)


def ours(x: NDArray[np.float32], seed: int, *, balance: float) -> dict[str, Any]:
    """Quantise once."""
    begin = time.perf_counter()
    found = residual_kmeans(x, LEVELS, CODES, balance=balance, seed=seed)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds} | quality(x, found.codes, reconstructed(found.codes, found.codebooks))


def compared(x: NDArray[np.float32], python: str) -> tuple[dict[str, Any], Any]:
    """Return medians over rounds by method, and the other library's versions."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "x.npy", x)
        peer = Peer(python, Path(folder))
        methods: dict[str, Callable[[int], dict[str, Any]]] = {
            "llmrec": lambda seed: ours(x, seed, balance=SemanticIndex().balance),
            "llmrec_unbounded": lambda seed: ours(x, seed, balance=0.0),
            "faiss_kmeans": lambda seed: peer.round("kmeans", x, seed),
            "faiss_residual_quantizer": lambda seed: peer.round("residual_quantizer", x, seed),
        }
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
        for seed in range(ROUNDS):
            for name, once in methods.items():
                rounds[name].append(once(seed))
        peer.close()
    medians = {
        name: {key: np.median([row[key] for row in rows], axis=0).tolist() for key in rows[0]}
        for name, rows in rounds.items()
    }
    return medians, peer.versions


def against(peer: str, methods: dict[str, Any]) -> dict[str, Any]:
    """Return the error over a peer's, and the use of levels after the first over a peer's."""
    error = methods["llmrec"]["mse"] / methods[peer]["mse"]
    use = [own / its for own, its in zip(methods["llmrec"]["perplexity"], methods[peer]["perplexity"], strict=True)][1:]
    met = {"mse": error <= GOALS["mse"], "perplexity": min(use) >= GOALS["perplexity"]}
    return {
        "mse_ratio": {"value": error, "goal": {"at_most": GOALS["mse"], "met": met["mse"]}},
        "perplexity_ratios": {"value": use, "goal": {"at_least": GOALS["perplexity"], "met": met["perplexity"]}},
    }


def bound(x: NDArray[np.float32]) -> dict[str, Any]:
    """Return the seconds of a level at 100,000 vectors with and without the bound: real ones, repeated with noise."""
    rng = np.random.default_rng(0)
    many = x[rng.integers(len(x), size=MANY)] + rng.normal(scale=0.02, size=(MANY, x.shape[1])).astype(np.float32)
    most = int(np.ceil(SemanticIndex().balance * MANY / CODES))
    seconds: dict[str, list[float]] = {"bounded": [], "free": []}
    for _ in range(2):
        for name, limit in (("bounded", most), ("free", 0)):
            begin = time.perf_counter()
            kmeans(many, CODES, most=limit)
            seconds[name].append(time.perf_counter() - begin)
    ratio = min(seconds["bounded"]) / min(seconds["free"])
    goal = {"at_most": GOALS["bound"], "met": ratio <= GOALS["bound"]}
    return {"vectors": MANY, "seconds": seconds, "ratio": ratio, "goal": goal}


def autoencoder(x: NDArray[np.float32], ours: float) -> dict[str, Any]:
    """Return the seconds of an epoch, and of TIGER's epochs in multiples of a fit of ours."""
    timed = []
    for _ in range(2):
        spent = []
        for epochs in (1, 4):
            begin = time.perf_counter()
            fit(x, RQVAEIndex(epochs=epochs), LEVELS, CODES, quiet=True)
            spent.append(time.perf_counter() - begin)
        timed.append((spent[1] - spent[0]) / 3)
    ratio = min(timed) * EPOCHS / ours
    goal = {"at_least": GOALS["rqvae"], "met": ratio >= GOALS["rqvae"]}
    return {"seconds_an_epoch": min(timed), "epochs": EPOCHS, "times_a_fit": ratio, "goal": goal}


def main(target: Path) -> None:
    """Measure and write."""
    python = os.environ.get("FAISS_PYTHON")
    if not python:
        raise SystemExit("name the interpreter of an environment with faiss-cpu: FAISS_PYTHON=PYTHON")
    name, x, indexes = catalogue()
    methods, peer = compared(x, python)
    found = {
        "methods": methods,
        "against": {peer: against(peer, methods) for peer in methods if peer.startswith("faiss")},
        "bound": bound(x),
        "rqvae": autoencoder(x, methods["llmrec"]["seconds"]),
        "indexes": indexes,
    }
    result = {
        "command": "FAISS_PYTHON=PYTHON LLMREC_DATA=FOLDER python -m eval.benchmarks.index_speed "
        "eval/results/index_speed.json",
        "what": f"residual quantisation, {LEVELS} x {CODES} codes: {len(x)} items of {name}, {x.shape[1]} numbers each",
        "rounds": ROUNDS,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        **found,
        "machine": machine(),
        "versions": versions() | {"peer": peer},
    }
    write_json(target, result)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
