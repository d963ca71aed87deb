"""Compares text encoders and ways to fine-tune them on item pairs, on validation users of three data sets.

``LLMREC_DATA=FOLDER OMP_NUM_THREADS=1 python -m eval.benchmarks.encoder_tuning eval/results/encoder_tuning.json``

Each variant changes one setting of `transitions-tuned`. The data are Amazon 2014 Toys; variants on Amazon 2014 Beauty
start with "beauty-", and those on Goodreads with "books-". Test users are not used. The curve of a variant has NDCG@10
after every 120 steps: for similarity to the latest items alone, and for `transitions-text`, whose weight of texts is
chosen on 5,000 validation users and evaluated on the others.
Finished variants are not run again. The seconds of 4-blocks include six minutes in which the process was stopped.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eval.benchmarks.provenance import provenance
from llmrec.baselines.base import LSA
from llmrec.baselines.item_texts import lsa_vectors, texts_of_items
from llmrec.baselines.neural import info_nce
from llmrec.baselines.pairs import (
    LOG_FREQUENCY_SHARE,
    ItemPairs,
    PairEpoch,
    SimilarToLatest,
    TransitionsTuned,
    TransitionsTunedConfig,
)
from llmrec.baselines.transitions import TransitionCounts, count_transitions, normalise_transitions
from llmrec.baselines.validation import mean_ndcgs, ranking_cases
from llmrec.durable import write_json
from llmrec.models.text_encoder import TunedEncoder, find_encoder
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import load_suite

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

SUITES, ROW = "eval/suites/{}.yaml", "transitions-tuned"
CHOOSING = 5_000
EVERY = 120
WEIGHTS = {"toys": (3.0, 8.0, 20.0, 30.0), "beauty": (3.0, 8.0, 20.0, 30.0), "books": (0.0, 0.3, 1.0, 3.0, 8.0, 20.0)}
"""Weights of texts by data set."""


@dataclass(frozen=True)
class Variant:
    """A fine-tuning setting.

    Attributes:
        encoder: Name of the text encoder; `lsa` or `none`: nothing to fine-tune.
        blocks: Number of fine-tuned layers.
        steps: Number of optimiser steps, over which the learning rate decays to 0.
        learning_rate: Learning rate after the warm-up.
        hard: Draw one additional negative per pair among this many nearest items, updated every 120 steps.
        distilled: Learn the transition weights of all items of the batch instead of the drawn pair.
        titles: Encode titles without the other fields.
        data: The data set, by its file in eval/suites/.
    """

    encoder: str = "all-MiniLM-L6-v2"
    blocks: int = 2
    steps: int = 240
    learning_rate: float = 1e-4
    hard: int = 0
    distilled: bool = False
    titles: bool = False
    data: str = "toys"


NONE, MPNET, SMOLLM = "none", "sentence-transformers/all-mpnet-base-v2", "SmolLM2-135M-Instruct"
VARIANTS = {
    "default": Variant(),
    "720-steps": Variant(steps=720),
    "all-6-blocks": Variant(blocks=6),
    "distilled": Variant(distilled=True),
    "hard-negatives": Variant(hard=50),
    "learning-rate-3e-4": Variant(learning_rate=3e-4),
    "all-mpnet-base-v2": Variant(encoder=MPNET),
    "SmolLM2-135M": Variant(encoder=SMOLLM),
    "no-text": Variant(encoder=NONE, steps=0),
    "lsa": Variant(encoder=LSA, steps=0),
    "beauty-no-text": Variant(encoder=NONE, steps=0, data="beauty"),
    "beauty-lsa": Variant(encoder=LSA, steps=0, data="beauty"),
    "beauty-default": Variant(data="beauty"),
    "beauty-all-mpnet-base-v2": Variant(encoder=MPNET, steps=0, data="beauty"),
    "beauty-SmolLM2-135M": Variant(encoder=SMOLLM, steps=0, data="beauty"),
    "1-block": Variant(blocks=1),
    "4-blocks": Variant(blocks=4),
    "titles": Variant(titles=True),
    "books-no-text": Variant(encoder=NONE, steps=0, data="books"),
    "books-lsa": Variant(encoder=LSA, steps=0, data="books"),
    "books-default": Variant(data="books"),
    "books-all-mpnet-base-v2": Variant(encoder=MPNET, steps=0, data="books"),
}


class Judge:
    """Evaluates item vectors on validation users."""

    def __init__(self, data: SplitDataset, parameters: Mapping[str, Any], weights: Sequence[float]) -> None:
        self._weights = weights
        self._data, self._steps = data, count_transitions(data)
        self._parameters = parameters
        cases = ranking_cases(data)
        self._chosen, self._others = cases[:CHOOSING], cases[CHOOSING:]
        bought = dict(zip(self._steps.catalogue.ids, self._steps.popular, strict=True))
        self._cold = [case for case in cases if not bought[str(case.truth)]]

    @property
    def users(self) -> dict[str, int]:
        """Return the numbers of validation users."""
        return {"chosen": len(self._chosen), "others": len(self._others), "cold": len(self._cold)}

    def __call__(self, vectors: NDArray[np.float32]) -> dict[str, float]:
        """Return NDCG@10 of similarity alone, and of `transitions-text` with these vectors."""
        model = TransitionsTuned(**self._parameters)
        model.restore(self._data, {"vectors": vectors})
        models = [model.with_config(model.config.model_copy(update={"text": weight})) for weight in self._weights]
        values = [mean_ndcgs(weighted, self._chosen)["excluded"] for weighted in models]
        best = int(np.argmax(values))
        return {
            "similarity": mean_ndcgs(SimilarToLatest(self._steps, vectors), self._chosen)["excluded"],
            "weight": self._weights[best],
            "chosen": values[best],
            "others": mean_ndcgs(models[best], self._others)["excluded"],
            "cold": mean_ndcgs(models[best], self._cold)["excluded"],
        }


class Trainer(PairEpoch):
    """Fine-tunes an encoder on pairs of items with the settings of a variant."""

    def __init__(
        self, variant: Variant, encoder: TunedEncoder, steps: TransitionCounts, config: TransitionsTunedConfig
    ) -> None:
        super().__init__(encoder, ItemPairs.of(steps, config.apart, config.nearby), config, np.random.default_rng(0))
        self._variant = variant
        self._weights = normalise_transitions(steps, config) if variant.distilled else None
        self._near: NDArray[np.int64] | None = None

    def __call__(self, optimiser: torch.optim.Optimizer) -> float:
        """Find the hard negatives of these steps, run the steps, and return the mean loss in nats."""
        if self._variant.hard:
            vectors = self.encoder.every()
            self._near = (vectors @ vectors.T).fill_diagonal_(-1).topk(self._variant.hard).indices.numpy()
        return super().__call__(optimiser)

    def loss(self, first: NDArray[np.int64], then: NDArray[np.int64]) -> Any:
        """Return the loss of the pairs of a batch in nats, a tensor with gradients."""
        hard = [] if self._near is None else [self._near[first, self.rng.integers(0, self._variant.hard, len(first))]]
        candidates = np.concatenate([then, *hard])
        # Only targets are drawn by their frequency; additional negatives are not.
        frequency = np.where(np.arange(len(candidates)) < len(first), self.log_frequency[candidates], 0.0)
        logits = self.similarities(first, candidates) - LOG_FREQUENCY_SHARE * torch.from_numpy(frequency).float()
        same = first[:, None] == candidates[None, :]
        if self._weights is not None:
            # The drawn pair keeps a positive target even if its weight is 0.
            target = self._weights[first][:, candidates].toarray() + 1e-6 * np.eye(len(first), len(candidates))
            target = torch.from_numpy(np.where(same, 0.0, target)).float()
            target = target / target.sum(1, keepdim=True)
            logits = logits.masked_fill(torch.from_numpy(same), -1e9)
            return -(target * torch.log_softmax(logits, dim=1)).sum(1).mean()
        known = same | (self.pairs.seen[first][:, candidates].toarray() > 0)
        known[np.arange(len(first)), np.arange(len(first))] = False
        return info_nce(logits, torch.from_numpy(known))


def curve(variant: Variant, data: SplitDataset, parameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Fine-tune, and yield the evaluation of the pretrained and of the fine-tuned vectors every 120 steps."""
    torch.manual_seed(0)
    judge = Judge(data, parameters, WEIGHTS[variant.data])
    steps, config = count_transitions(data), TransitionsTunedConfig(**parameters)
    items = [data.dataset.items[item] for item in steps.catalogue.ids]
    texts = texts_of_items([replace(item, fields={}) for item in items] if variant.titles else items)
    begin = time.monotonic()
    if variant.encoder in (LSA, NONE):
        # Zero vectors have similarity 0 to all items.
        vectors = np.zeros((len(texts), 1), dtype=np.float32)
        if variant.encoder == LSA:
            vectors = lsa_vectors(texts, texts).astype(np.float32)
        yield {"users": judge.users, "step": 0, "seconds": time.monotonic() - begin, "tuned": judge(vectors)}
        return
    encoder = TunedEncoder(find_encoder(variant.encoder)[0], texts, blocks=variant.blocks)
    pretrained = encoder.every().numpy()
    seconds = time.monotonic() - begin
    yield {"users": judge.users, "step": 0, "seconds": seconds, "tuned": judge(pretrained)}
    looks = variant.steps // EVERY
    settings = {"steps": EVERY, "epochs": looks, "learning_rate": variant.learning_rate}
    trainer = Trainer(variant, encoder, steps, config.model_copy(update=settings))
    optimiser = torch.optim.AdamW(encoder.blocks.parameters(), weight_decay=config.weight_decay)
    for look in range(1, looks + 1):
        begin = time.monotonic()
        loss = trainer(optimiser)
        seconds += time.monotonic() - begin
        vectors = encoder.every().numpy()
        both = np.concatenate([vectors, pretrained], axis=1) / np.sqrt(2, dtype=np.float32)
        yield {
            "step": look * EVERY,
            "seconds": seconds,
            "loss": loss,
            "tuned": judge(vectors),
            "concatenated": judge(both),
        }


def finished(target: Path) -> dict[str, Any]:
    """Return the results of finished variants."""
    return dict(json.loads(target.read_text(encoding="utf-8"))["variants"]) if target.is_file() else {}


def main(target: Path, names: Sequence[str]) -> None:
    """Run each variant in a separate process, so that peak memory is comparable."""
    if len(names) != 1:
        for name in names or VARIANTS:
            subprocess.run([sys.executable, "-m", "eval.benchmarks.encoder_tuning", str(target), name], check=True)
        return
    (name,) = names
    if name in finished(target):
        return
    variant = VARIANTS[name]
    suite = load_suite(SUITES.format(variant.data))
    (row,) = (row for row in suite.rows if row.label == ROW)
    looks = []
    for look in curve(variant, load_split(suite.data, suite.split_seeds[0]), row.parameters):
        looks.append(look)
        sys.stdout.write(f"{name}: {json.dumps(look)}\n")
        sys.stdout.flush()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    entry = {**asdict(variant), "curve": looks, "megabytes": memory, **provenance()}
    result = {
        "command": "LLMREC_DATA=FOLDER OMP_NUM_THREADS=1 make bench NAME=encoder-tuning",
        "what": "NDCG@10 of validation users of Amazon Toys and Beauty and Goodreads, seen items filtered, one seed",
        "variants": {**finished(target), name: entry},
    }
    write_json(target, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
