"""Shared code of neural sequence models: batches of sequences, losses over all items, early stopping.

`SequenceNetwork` trains and applies a plain ``torch.nn`` container. Its item vectors are input and output, so a score
is a dot product with them. They contain only the items with training interactions.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from pydantic import Field

from llmrec.baselines.base import Catalogue, InteractionLog, PositiveFloat, ScoredBaseline, WarmItems
from llmrec.baselines.profiles import UserProfiles
from llmrec.baselines.validation import mean_ndcgs, ranking_cases
from llmrec.errors import RecipeError, require
from llmrec.machine import cpu_has_bf16, gpu_has_bf16, has_cuda
from llmrec.progress import Progress
from llmrec.recipe.schema import Positive, Section
from llmrec.types import Case, CatalogueScorer, Request

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch.optim import Optimizer

    from llmrec.data.split import SplitDataset

log = logging.getLogger(__name__)


# --------------------------------------------------------------------------- epochs


class TrainingSettings(Protocol):
    """Settings of optimisation and early stopping."""

    @property
    def learning_rate(self) -> float:
        """Learning rate of AdamW."""
        ...

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay."""
        ...

    @property
    def epochs(self) -> int:
        """Maximum number of epochs."""
        ...

    @property
    def patience(self) -> int | None:
        """Epochs without improvement before training stops; None to train all epochs."""
        ...

    @property
    def quiet(self) -> bool:
        """Whether to hide the progress bar."""
        ...


def train_with_early_stopping(
    network: torch.nn.Module,
    judge: Callable[[], float] | None,
    config: TrainingSettings,
    learn: Callable[[Any], float],
    *,
    name: str,
    measure: str,
    sign: int = 1,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    learned: bool = False,
) -> int:
    """Train until the validation value has not improved for ``patience`` epochs, and keep the best weights.

    Args:
        network: The network to train.
        judge: Evaluates the current network on the validation split, lower is better; None: train all epochs and keep
            the last one.
        config: The training parameters.
        learn: Trains for one epoch with an optimiser, and returns the mean loss.
        name: The name in the progress display.
        measure: The name of the validation metric.
        sign: The factor for displaying it.
        param_groups: Groups of parameters with separate learning rates; None: one rate for all.
        learned: Whether the network is already trained; it is kept unchanged if no epoch is better.

    Returns:
        The best epoch, from 1; 0: the unchanged network.
    """
    torch = require("torch", "baselines")
    optimiser = torch.optim.AdamW(
        param_groups or network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    best, kept, since = math.inf, None, 0
    early = config.patience is not None
    with Progress(name, config.epochs, unit="epochs", quiet=config.quiet, early=early, passing=True) as bar:
        for epoch in range(0 if learned and judge else 1, config.epochs + 1):
            mean = learn(optimiser) if epoch else math.nan
            bar.reach(epoch, f"loss {mean:.3f}")
            if judge is None:
                continue
            value = judge()
            log.info("epoch %d: loss %.4f, validation %s %.4f", epoch, mean, measure, sign * value)
            since += 1
            if value < best:
                best, kept, since = value, (epoch, copy.deepcopy(network.state_dict())), 0
            bar.reach(epoch, f"loss {mean:.3f}, validation {measure} {sign * value:.4f}, best {sign * best:.4f}")
            if config.patience is not None and since >= config.patience:
                break
    if kept is not None:
        network.load_state_dict(kept[1])
    network.eval()
    return kept[0] if kept else config.epochs


# --------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class SequenceBatch:
    """Items and the next items as targets, padded on the right, shape (b, t); target -1 means no target."""

    items: NDArray[np.int64]
    targets: NDArray[np.int64]


def training_segments(
    events: InteractionLog, max_len: int, leads: NDArray[np.int64] | None = None
) -> list[NDArray[np.int64]]:
    """Split the items of every user into segments of at most ``max_len + 1``, from the end.

    Adjacent segments share an item, an input in one and a target in the other. With ``leads`` every item of a segment
    is a target, so that they share none.

    Args:
        events: The training interactions.
        max_len: Number of input items of a segment.
        leads: Index that precedes each segment of a user, shape (users,); None: nothing.
    """
    ends = np.cumsum(np.bincount(events.users, minlength=events.user_count))
    pieces = []
    for user, items in enumerate(np.split(events.items.astype(np.int64), ends[:-1])):
        steps = (1, -max_len) if leads is None else (0, -max_len - 1)
        for end in range(len(items), *steps):
            piece = items[max(0, end - max_len - 1) : end]
            pieces.append(piece if leads is None else np.concatenate([leads[user : user + 1], piece]))
    return pieces


def training_batches(
    sequences: Sequence[NDArray[np.int64]], size: int, rng: np.random.Generator
) -> Iterator[SequenceBatch]:
    """Yield batches of about ``size`` targets from sequences of similar length, in random order."""
    mixed = rng.permutation(len(sequences))
    lengths = np.array([len(sequences[index]) - 1 for index in mixed])
    order = mixed[np.argsort(lengths, kind="stable")]
    groups: list[list[int]] = [[]]
    for index in order.tolist():
        if groups[-1] and (len(groups[-1]) + 1) * (len(sequences[index]) - 1) > size:
            groups.append([])
        groups[-1].append(index)
    for number in rng.permutation(len(groups)).tolist():
        rows = [sequences[index] for index in groups[number]]
        if rows:
            yield _pad_sequences(rows)


def _pad_sequences(rows: Sequence[NDArray[np.int64]]) -> SequenceBatch:
    longest = max(len(row) for row in rows) - 1
    items = np.zeros((len(rows), longest), dtype=np.int64)
    targets = np.full((len(rows), longest), -1, dtype=np.int64)
    for index, row in enumerate(rows):
        items[index, : len(row) - 1], targets[index, : len(row) - 1] = row[:-1], row[1:]
    return SequenceBatch(items, targets)


def equal_length_batches(histories: Sequence[NDArray[np.int64]], most: int) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of non-empty histories of equal length, at most ``most`` at a time."""
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    for length in np.unique(lengths[lengths > 0]).tolist():
        indices = np.flatnonzero(lengths == length)
        yield from (indices[start : start + most] for start in range(0, len(indices), most))


# Number of logits per block: 2 MB in single precision on a CPU, which fits in the cache of a core; and on a GPU.
_BLOCK_LOGITS, _GPU_BLOCK_LOGITS = 1 << 19, 1 << 26
# Sequences scored per batch.
_SCORING_BATCH = 512
# Number of validation cases for early stopping; more cases change only the third digit of NDCG@10.
_EARLY_STOPPING_CASES = 10_000


SoftmaxLoss = Callable[[Any, Any, Any], tuple[float, Any, Any]]
"""Returns the mean loss and its gradients, for vectors, the table of items, and targets; see `full_softmax_loss`."""


class NeuralConfig(Section):
    """Parameters of training, and the maximum sequence length."""

    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout rate.")
    max_len: Positive = Field(
        50,
        description="Maximum sequence length. Longer training sequences are split.",
    )
    negatives: Positive | None = Field(
        None, description="Number of sampled negatives per step. `null`: softmax over all items."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the matrix products with the item embeddings in the loss. `auto`: bfloat16 where "
        "the processor supports it. All other computations use float32.",
    )
    batch: Positive = Field(512, description="Approximate number of targets per optimiser step.")
    learning_rate: PositiveFloat = Field(1e-3, description="Learning rate of Adam.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW).")
    epochs: Positive = Field(100, description="Maximum number of epochs.")
    patience: Positive | None = Field(
        10,
        description="Early stopping: epochs without a better validation NDCG@10. `null`: run all epochs.",
    )
    quiet: bool = Field(False, description="Hide the progress bar.")

    @property
    def half(self) -> bool:
        """Whether products with the item embeddings use bfloat16."""
        return self.precision == "bfloat16" or (self.precision == "auto" and cpu_has_bf16())


class SequenceConfig(NeuralConfig):
    """Parameters of a sequence model, with its device."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device. `auto`: a GPU if PyTorch can use one.")

    @property
    def half(self) -> bool:
        """Whether products with the item embeddings use bfloat16."""
        return gpu_has_bf16() if self.precision == "auto" and self.torch_device == "cuda" else super().half

    @property
    def torch_device(self) -> Literal["cpu", "cuda"]:
        """The device to use; ``auto`` selects the GPU if there is one.

        Raises:
            RecipeError: If a GPU is requested and there is none.
        """
        if self.device != "cpu" and has_cuda():
            return "cuda"
        if self.device == "cuda":
            raise RecipeError(
                "device=cuda: PyTorch finds no GPU (see `llmrec doctor`); set device to auto or cpu",
                kind="unsupported",
                column="device",
            )
        return "cpu"


class ProfiledConfig(SequenceConfig):
    """Parameters of a sequence model with user features."""

    features: str = Field(
        "", description="Feature store of user features, which become the first element of each sequence."
    )
    shuffled: bool = Field(False, description="Ablation: assign features to random users.")
    whitening: float = Field(
        1.0, ge=0, le=1, description="Strength of the whitening of the features. 0: none, 1: full."
    )
    experts: Positive = Field(
        3, description="Number of experts that project the features, in addition to two shared experts."
    )

    @property
    def folders(self) -> tuple[str, ...]:
        """The feature stores to read."""
        return (self.features,) if self.features else ()

    @property
    def steps(self) -> int:
        """Maximum number of input positions of the network."""
        return self.max_len + bool(self.features)


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with the items that it scores.

    Attributes:
        model: The model, which defines the forward pass.
        warm: The items with training interactions.
        network: The network.
        epochs: The number of epochs of training.
        table: The final item vectors, shape (items, dim), so that a request does not compute them; None in training.
    """

    model: SequenceNetwork[Any]
    warm: WarmItems
    network: Any
    epochs: int = 0
    table: Any = None

    @property
    def name(self) -> str:
        """The name in the progress display."""
        return self.model.name

    @property
    def catalogue(self) -> Catalogue:
        """All items."""
        return self.warm.catalogue

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of all items, in column order."""
        return self.catalogue.ids

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the scores of all items after each history, shape (n, items)."""
        torch, model = require("torch", "baselines"), self.model
        histories = [history[-model.config.max_len :] for history in self.warm.histories(requests)]
        count = len(self.warm.indices)
        if model._profiles is not None:
            histories = model._profiles.before(histories, [request.user_id for request in requests], count)
        result = np.zeros((len(requests), count), dtype=np.float32)
        self.network.eval()
        with torch.no_grad():
            table = model._item_vectors(self.network) if self.table is None else self.table
            for rows in equal_length_batches(histories, _SCORING_BATCH):
                items = torch.from_numpy(np.stack([histories[row] for row in rows])).to(table.device)
                result[rows] = (model._encode(self.network, items)[:, -1] @ table.T).cpu().numpy()
        return self.warm.spread(result, histories)

    def finished(self, epochs: int) -> TrainedNetwork:
        """Return the model with its final item vectors after training."""
        with require("torch", "baselines").no_grad():
            return replace(self, epochs=epochs, table=self.model._item_vectors(self.network.eval()))


N = TypeVar("N", bound=SequenceConfig)


class SequenceNetwork(ScoredBaseline[N, TrainedNetwork]):
    """Base class of neural sequence models; subclasses define ``_build`` and ``_encode``.

    A model whose item vectors are not a plain table of embeddings also defines ``_embedded`` and ``_item_vectors``.
    """

    stochastic = True
    SCORES = "logits"
    _profiles: UserProfiles | None = None

    def learn(self, data: SplitDataset) -> None:
        """Train the network on the training sequences, and keep the weights of the best epoch.

        If ``patience`` is set, the validation interactions of the split are used for early stopping only.

        Raises:
            DataError: If features cannot be read, or were written from training targets or held-out interactions.
            MissingExtra: If torch is not installed.
        """
        torch, config, seed = require("torch", "baselines"), self._config, self._seed
        catalogue = Catalogue.of(data)
        events = InteractionLog.of(data, catalogue)
        warm = WarmItems.of(events, catalogue)
        self._open(data, warm)
        count = len(warm.indices)
        leads = None if self._profiles is None else self._profiles.numbers(list(data.train_counts()), count)
        sequences = training_segments(warm.log(events), config.max_len, leads)
        cases = early_stopping_cases(data, config, _EARLY_STOPPING_CASES)
        # Seeds torch only for this fit; the random state of the caller is unchanged.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self._built(count).to(config.torch_device)
            model = TrainedNetwork(self, warm, network)
            loss: SoftmaxLoss = partial(full_softmax_loss, half=config.half)
            if config.negatives is not None:
                loss = _SampledSoftmaxLoss(warm, config.negatives, seed)
            rng = np.random.default_rng(seed)

            def forward(items: Any, rows: Any) -> tuple[Any, Any]:
                table = self._item_vectors(network)
                return self._encode(network, items)[rows], table

            def learn(optimiser: Optimizer) -> float:
                batches = training_batches(sequences, config.batch, rng)
                return train_softmax_epoch(network, batches, optimiser, forward, loss)

            epochs = train_ranker_with_early_stopping(
                model, cases, config, learn, param_groups=self._param_groups(network)
            )
        self._model, self.looked_at = model.finished(epochs), case_users(cases)

    def scores(self, requests: Sequence[Request]) -> NDArray[np.floating[Any]]:
        """Return the logits of all items after each history, shape (n, items)."""
        return self._fitted.scores(requests)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the network weights and the best epoch as arrays."""
        return {"epochs": np.array([self._fitted.epochs]), **network_state(self._fitted.network)}

    def restore(self, data: SplitDataset, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the fitted network from `state`."""
        warm = WarmItems.in_training(data)
        self._open(data, warm)
        with require("torch", "baselines").random.fork_rng(devices=[]):
            network = self._built(len(warm.indices))
        load_network_state(network, state)
        self._model = TrainedNetwork(self, warm, network.to(self._config.torch_device)).finished(
            int(state["epochs"][0])
        )
        self.looked_at = case_users(early_stopping_cases(data, self._config, _EARLY_STOPPING_CASES))

    def _open(self, data: SplitDataset, warm: WarmItems) -> None:
        """Read the inputs other than interactions."""
        config = self._config
        self._profiles = None
        if isinstance(config, ProfiledConfig) and config.features:
            self._profiles = UserProfiles.of(
                config.features, data, config.whitening, shuffle=config.shuffled, experts=config.experts
            )

    def _build(self, items: int) -> Any:
        """Return an untrained network for a number of items."""
        raise NotImplementedError

    def _encode(self, network: torch.nn.Module, items: Any) -> Any:
        """Map item indices, shape (b, t), to one vector per position, shape (b, t, dim)."""
        raise NotImplementedError

    def _embedded(self, network: torch.nn.Module, items: Any) -> Any:
        """Return the item vectors, preceded by the user vector if there are user features."""
        return network["table"](items) if self._profiles is None else self._profiles.embedded(network, items)

    def _item_vectors(self, network: torch.nn.Module) -> Any:
        """Return the vectors of all items with training interactions, shape (items, dim)."""
        return network["table"].weight

    def _param_groups(self, network: torch.nn.Module) -> Sequence[Mapping[str, Any]] | None:
        """Return groups of parameters with separate learning rates; None: one rate for all."""
        return None

    def _built(self, items: int) -> Any:
        network = self._build(items)
        if self._profiles is not None:
            network["profiles"] = self._profiles.build(network["table"].embedding_dim)
        return network


def train_softmax_epoch(
    network: torch.nn.Module,
    batches: Iterable[SequenceBatch],
    optimiser: Optimizer,
    forward: Callable[[Any, Any], tuple[Any, Any]],
    loss: SoftmaxLoss,
) -> float:
    """Train for one epoch with a softmax over items, and return the mean loss.

    Args:
        network: The network to train.
        batches: The training batches.
        optimiser: The optimiser of its parameters.
        forward: Returns, for items (b, t) and a mask of those with a target, one vector per target and the table of
            item vectors.
        loss: The loss of the vectors.
    """
    torch = require("torch", "baselines")
    network.train()
    device = next(network.parameters()).device
    total, count = 0.0, 0
    for batch in batches:
        optimiser.zero_grad(set_to_none=True)
        targets, items = (torch.from_numpy(item).to(device) for item in (batch.targets, batch.items))
        rows = targets >= 0
        vectors, table = forward(items, rows)
        with torch.no_grad():
            value, vector_grad, table_grad = loss(vectors.detach(), table.detach(), targets[rows])
        torch.autograd.backward([vectors, table], [vector_grad, table_grad])
        optimiser.step()
        total, count = total + value * len(vectors), count + len(vectors)
    return total / max(1, count)


def early_stopping_cases(data: SplitDataset, config: TrainingSettings, most: int) -> Sequence[Case]:
    """Return the validation cases for early stopping; empty without early stopping."""
    return [] if config.patience is None else ranking_cases(data, most)


def case_users(cases: Sequence[Case]) -> frozenset[str]:
    """Return the users of the validation cases."""
    return frozenset(case.request.user_id for case in cases)


def network_state(network: torch.nn.Module) -> dict[str, NDArray[Any]]:
    """Return the weights of a network as arrays."""
    return {f"network.{name}": tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}


def load_network_state(network: torch.nn.Module, state: Mapping[str, NDArray[Any]]) -> None:
    """Load weights into a network and set it to evaluation mode."""
    torch = require("torch", "baselines")
    weights = {name.removeprefix("network."): array for name, array in state.items() if name.startswith("network.")}
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    network.eval()


class NetworkScorer(CatalogueScorer, Protocol):
    """A model that scores all items with a trainable network."""

    @property
    def network(self) -> Any:
        """The torch network."""
        ...


def train_ranker_with_early_stopping(
    model: NetworkScorer,
    cases: Sequence[Case],
    config: TrainingSettings,
    learn: Callable[[Any], float],
    *,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    learned: bool = False,
) -> int:
    """Train with early stopping by validation NDCG@10; see `train_with_early_stopping`.

    Args:
        model: Scores with the current network.
        cases: Validation cases for early stopping; without any, all epochs are trained and the last one is kept.
        config: The training parameters.
        learn: Trains for one epoch with an optimiser, and returns the mean loss.
        param_groups: Groups of parameters with separate learning rates; None: one rate for all.
        learned: Whether the network is already trained; it is kept unchanged if no epoch is better.

    Returns:
        The best epoch, from 1; 0: the unchanged network.
    """

    def missing() -> float:
        return -mean_ndcgs(model, cases)["excluded"]

    return train_with_early_stopping(
        model.network,
        missing if cases else None,
        config,
        learn,
        name=model.name,
        measure="NDCG@10",
        sign=-1,
        param_groups=param_groups,
        learned=learned,
    )


# --------------------------------------------------------------------------- losses


def full_softmax_loss(vectors: Any, table: Any, targets: torch.Tensor, *, half: bool = False) -> tuple[float, Any, Any]:
    """Return the mean cross-entropy over all items, with its gradients.

    Each block of logits is converted in place to its gradient, (softmax - one-hot) / n, and then freed, so memory does
    not grow with the batch.

    Args:
        vectors: One vector per target, shape (n, d).
        table: Item vectors, shape (items, d).
        targets: Item indices, shape (n,).
        half: Multiply in bfloat16; the softmax stays in the precision of ``vectors``.
    """
    torch = require("torch", "baselines")
    vector_grad, table_grad, total = torch.empty_like(vectors), torch.zeros_like(table), 0.0
    kind = torch.bfloat16 if half else vectors.dtype
    left, right = vectors.to(kind), table.to(kind)
    block = max(1, (_GPU_BLOCK_LOGITS if table.is_cuda else _BLOCK_LOGITS) // len(table))
    for start in range(0, len(vectors), block):
        rows, block_targets = left[start : start + block], targets[start : start + block, None]
        logits = (rows @ right.T).to(vectors.dtype)
        probabilities = torch.softmax(logits, dim=-1)
        picked = probabilities.gather(-1, block_targets)
        total -= float(picked.clamp_min(1e-38).log().sum())
        probabilities.scatter_(-1, block_targets, picked - 1)
        probabilities = probabilities.to(kind)
        vector_grad[start : start + block] = probabilities @ right
        table_grad += probabilities.T @ rows
    return total / len(vectors), vector_grad / len(vectors), table_grad / len(vectors)


def info_nce(logits: torch.Tensor, hidden: torch.Tensor) -> Any:
    """Return the InfoNCE loss, the mean of ``-log(exp(l_ii) / sum_j exp(l_ij))`` (van den Oord et al., 2018).

    Args:
        logits: Logit of row i and candidate j, shape (n, n), with positives on the diagonal.
        hidden: Mask of pairs that are not negatives, shape (n, n); the diagonal is always included.
    """
    torch = require("torch", "baselines")
    masked = logits.masked_fill(hidden.clone().fill_diagonal_(False), -torch.inf)
    return torch.nn.functional.cross_entropy(masked, torch.arange(len(logits), device=logits.device))


def symmetric_info_nce(logits: torch.Tensor, hidden: torch.Tensor) -> Any:
    """Return the mean of the InfoNCE losses over rows and over columns."""
    return (info_nce(logits, hidden) + info_nce(logits.T, hidden.T)) / 2


class _SampledSoftmaxLoss:
    """The loss of `full_softmax_loss`, with the sum over items estimated from a sample (Bengio and Senecal, 2008).

    ``negatives`` items are sampled for each step, with replacement, in proportion to their training interactions. A
    sampled item j represents ``1 / (negatives * q(j))`` items: ``log(negatives * q(j))`` is subtracted from its logit.
    The logit of the target is not corrected, and samples of the target are dropped, which makes the estimated sum
    unbiased.
    """

    def __init__(self, warm: WarmItems, negatives: int, seed: int) -> None:
        self._probability = warm.popular / warm.popular.sum()
        # As in Generator.choice, which would compute the sum over all items in every step.
        self._cumulative = self._probability.cumsum()
        self._cumulative /= self._cumulative[-1]
        self._negatives = negatives
        self._rng = np.random.default_rng([seed, 1])

    def __call__(self, vectors: Any, table: Any, targets: torch.Tensor) -> tuple[float, Any, Any]:
        torch = require("torch", "baselines")
        sampled = self._cumulative.searchsorted(self._rng.random(self._negatives), side="right")
        offset = torch.from_numpy(np.log(self._negatives * self._probability[sampled])).to(vectors)
        items = torch.from_numpy(sampled).to(targets.device)
        sampled_logits = vectors @ table[items].T - offset
        sampled_logits.masked_fill_(items[None, :] == targets[:, None], -math.inf)
        target_logits = (vectors * table[targets]).sum(-1, keepdim=True)
        probabilities = torch.softmax(torch.cat([target_logits, sampled_logits], dim=1), dim=-1)
        loss = -float(probabilities[:, 0].clamp_min(1e-38).log().mean())
        probabilities[:, 0] -= 1
        probabilities /= len(vectors)
        table_grad = torch.zeros_like(table)
        table_grad.index_add_(0, targets, probabilities[:, :1] * vectors)
        table_grad.index_add_(0, items, probabilities[:, 1:].T @ vectors)
        return loss, probabilities[:, :1] * table[targets] + probabilities[:, 1:] @ table[items], table_grad
