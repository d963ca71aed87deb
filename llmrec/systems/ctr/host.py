"""Base class of the CTR networks: field embeddings, training with early stopping, and answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field, field_validator

from llmrec.baselines.base import Baseline, Decay, PositiveFloat
from llmrec.baselines.ctr import LikeRatioConfig
from llmrec.baselines.neural import train_with_early_stopping
from llmrec.baselines.profiles import Adaptor, RowFeatures, gated_expert_sum
from llmrec.baselines.validation import rating_cases
from llmrec.data.features import FeatureKind
from llmrec.errors import DataError, require
from llmrec.recipe.schema import Positive, Width
from llmrec.results import Reads
from llmrec.systems.ctr.align import Align, SentenceVectors, iterate_alignment_epochs
from llmrec.systems.ctr.fields import EncodedRows, FieldEncoder
from llmrec.types import Answer, Case, Probability, Request, Unparsed

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch.optim import Optimizer

    from llmrec.data.split import SplitDataset

log = logging.getLogger(__name__)

# Small initial embeddings: with large ones two epochs overfit.
_INITIAL_DEVIATION = 0.05
# Rows per batch of answers, and decimal places to which they are rounded, since the last digits depend on batch size.
_SCORING_BATCH, _ANSWER_DIGITS = 4096, 9


class CtrNetworkConfig(LikeRatioConfig):
    """Parameters of the inputs and training of a CTR network."""

    dim: Width = Field(16, description="Embedding dimension.")
    window: Positive = Field(20, description="Maximum number of latest rated interactions to use.")
    hidden: str = Field("128,64", description="Comma-separated widths of the hidden layers.")
    user_id: bool = Field(False, description="Learn an embedding per training user.")
    numbers: bool = Field(True, description="Also use the input features of the baseline `logistic`.")
    decay: Decay = Field(
        0.8, description="With `numbers`: decay of older ratings, the weight relative to the next newer one."
    )
    features: str = Field("", description="Comma-separated folders of feature stores.")
    sides: Literal["both", "user", "item"] = Field("both", description="Features to use: of users, of items, or both.")
    shuffled: bool = Field(False, description="Ablation: assign features to random users and items.")
    seen: Literal["leave", "refuse"] = Field(
        "leave",
        description="If features were computed from training examples: `leave` out these examples, or raise an error "
        "(`refuse`).",
    )
    whitening: float = Field(
        1.0, ge=0, le=1, description="Strength of the whitening of the features. 0: none, 1: full."
    )
    experts: Positive = Field(3, description="Number of experts per feature store, in addition to two shared experts.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout rate.")
    batch: Positive = Field(1024, description="Examples per optimiser step.")
    learning_rate: PositiveFloat = Field(1e-3, description="Learning rate of Adam.")
    weight_decay: float = Field(1e-5, ge=0, description="Decoupled weight decay (AdamW).")
    epochs: Positive = Field(20, description="Maximum number of epochs.")
    patience: Positive | None = Field(
        2,
        description="Early stopping: epochs without a better validation log loss. `null`: run all epochs.",
    )
    quiet: bool = Field(True, description="Hide the progress bar, and log epochs of the first stage at debug level.")
    align: Align | None = Field(None, description="First training stage: contrastive alignment with texts (CTRL).")

    @field_validator("hidden")
    @classmethod
    def _widths(cls, value: str) -> str:
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(f"hidden: {value!r} is not a list of widths; separate them by commas, such as 128,64")
        return value

    @property
    def widths(self) -> tuple[int, ...]:
        """Sizes of the hidden layers."""
        return tuple(int(part) for part in self.hidden.split(","))

    @property
    def folders(self) -> tuple[str, ...]:
        """The feature stores to read."""
        return tuple(part.strip() for part in self.features.split(",") if part.strip())


@dataclass(frozen=True)
class FeatureBatch:
    """A batch of rows as vectors.

    Attributes:
        item: Vectors of the requested items, shape (b, d).
        fields: Vectors of all fields except the history, the item first, shape (b, f, d).
        events: Vectors of the latest ratings, shape (b, window, d).
        mask: 1 for ratings, 0 for padding, shape (b, window).
        liked: 1 for a like, shape (b, window).
        numbers: Count features, shape (b, k).
    """

    item: Any
    fields: Any
    events: Any
    mask: Any
    liked: Any
    numbers: Any


@dataclass(frozen=True)
class InputSizes:
    """Input sizes of a network: number of fields with pooled history, vector dimensions, count features."""

    fields: int
    dim: int
    numbers: int

    @property
    def wide(self) -> int:
        """Total size of all fields and count features."""
        return self.fields * self.dim + self.numbers


@dataclass(frozen=True)
class FittedNetwork:
    """A trained network in double precision, with the data needed to answer."""

    fields: FieldEncoder
    adaptor: Adaptor
    network: Any
    epochs: int


H = TypeVar("H", bound=CtrNetworkConfig)


class CtrNetwork(Baseline[H, FittedNetwork]):
    """Base class of CTR networks; subclasses implement the methods of *interface of subclasses*.

    Fields are the item, its attributes, those of the user, the user (optional), the history, and one for each feature
    table. Count features are additional inputs. The loss is the cross-entropy; training ends when validation log-loss
    has not fallen for ``patience`` epochs, and the best epoch's weights are kept.
    """

    stochastic = True
    POOLED: ClassVar[int] = 2
    """Number of vectors into which the history is pooled: the mean over likes, and over the others."""
    FIRST_ORDER: ClassVar[bool] = False
    """Whether the last of the ``dim`` + 1 values of each vector is the feature's weight in a linear term."""
    GRID: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "learning_rate": (3e-4, 1e-3, 3e-3),
        "dropout": (0.0, 0.1, 0.3),
        "dim": (8, 16, 32),
    }
    FITS: ClassVar[int] = 5

    @classmethod
    def reads(cls, config: H) -> Reads:
        """Return which item data the network reads: texts if it is first aligned with texts."""
        return "texts" if config.align is not None and not config.align.longer else cls.READS

    @classmethod
    def text_encoder(cls, parameters: Mapping[str, Any]) -> str | None:
        """Return the text encoder for the alignment; None without texts."""
        align = Align.model_validate(parameters["align"]) if isinstance(parameters.get("align"), Mapping) else None
        return None if align is None or align.longer else super().text_encoder(align.model_dump())

    def learn(self, data: SplitDataset, cases: Sequence[Case] | None = None) -> None:
        """Train the network on the training ratings.

        Args:
            data: The split.
            cases: Cases for early stopping, with ratings as truth; None: the validation ratings, with their histories
                in the split.

        Raises:
            DataError: If there are none, a store cannot be read, or a text was written from a held-out pair, or from a
                training example with ``seen: refuse``.
            MissingExtra: If torch is not installed.
        """
        torch, config = require("torch", "baselines"), self._config
        fields, rows = FieldEncoder.of(data, self.name, liked=config.liked, window=config.window, decay=config.decay)
        kinds: tuple[FeatureKind, ...] = ("user", "item") if config.sides == "both" else (config.sides,)
        adaptor = Adaptor.of(config.folders, rows, config.whitening, kinds=kinds, shuffle=config.shuffled, data=data)
        rows = self._unseen(data, adaptor, rows)
        if config.patience is None:
            cases = []
        elif cases is None:
            cases = rating_cases(data)
        liked = fields.counted.counts.liked
        judged = fields.encode([case.request for case in cases], [float(float(c.truth) >= liked) for c in cases])
        self.looked_at = frozenset(case.request.user_id for case in cases)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            network, columns = self._network(fields, adaptor), adaptor.columns(rows)
            if config.align is not None:
                self._align(config.align, network, fields, rows, columns, data)
            epoch = self._train(network, fields, (rows, columns), (judged, adaptor.columns(judged)))
        self._model = FittedNetwork(fields, adaptor, network.double().eval(), epoch)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the probability that the user likes the item, for each request."""
        model = self._fitted
        answers: list[Answer] = []
        for start in range(0, len(requests), _SCORING_BATCH):
            part = requests[start : start + _SCORING_BATCH]
            rows = model.fields.encode(part)
            logits = self._judge(model.network, model.fields, rows, model.adaptor.columns(rows))
            for request, probability in zip(part, (1 / (1 + np.exp(-logits))).tolist(), strict=True):
                if request.item is None:
                    answers.append(Unparsed(request_id=request.id, reason="the request has no item to judge"))
                    continue
                value = min(max(round(probability, _ANSWER_DIGITS), 10**-_ANSWER_DIGITS), 1 - 10**-_ANSWER_DIGITS)
                answers.append(Probability(request_id=request.id, value=value))
        return answers

    # ----------------------------------------------------------------------- interface of subclasses

    def _build(self, sizes: InputSizes) -> Any:
        """Build the network as a ``torch.nn.ModuleDict`` for these input sizes."""
        raise NotImplementedError

    def _represent(self, body: torch.nn.Module, seen: FeatureBatch) -> tuple[Any, ...]:
        """Return the input of the last layer, as one or more tensors of shape (b, k)."""
        raise NotImplementedError

    def _output(self, body: torch.nn.Module, parts: tuple[Any, ...]) -> Any:
        """Return the log-odds of a yes from the output of `_represent`, shape (b,)."""
        raise NotImplementedError

    # ----------------------------------------------------------------------- building blocks

    def _unseen(self, data: SplitDataset, adaptor: Adaptor, rows: EncodedRows) -> EncodedRows:
        """Return the training rows from which their own feature texts were not generated."""
        if not adaptor.seen:
            return rows
        if leaked := adaptor.seen & data.held_out:
            user, item = min(leaked)
            raise DataError(
                f"{self.name}: feature texts were generated from {len(leaked)} held-out interactions, such as user "
                f"{user!r} with item {item!r}; create the texts from the training interactions of this split (llmrec "
                "augment)",
                kind="leak",
            )
        pairs = zip(rows.user_names.tolist(), rows.item_names.tolist(), strict=True)
        kept = np.array([pair not in adaptor.seen for pair in pairs], dtype=bool)
        excluded = int((~kept).sum())
        if excluded and self._config.seen == "refuse":
            raise DataError(
                f"{self.name}: feature texts were generated from {excluded} of {len(kept)} training examples; set "
                "seen=leave, or data.split.kind=prefix, which separates texts and training",
                kind="leak",
            )
        if not kept.any():
            raise DataError(
                f"{self.name}: feature texts were generated from all training examples, so no example is left for "
                "training; set data.split.kind=prefix",
                kind="leak",
            )
        if excluded:
            log.info(
                "%s: %d of %d training examples are excluded, because feature texts were generated from them",
                self.name,
                excluded,
                len(kept),
            )
        return rows.of(kept)

    def _network(self, fields: FieldEncoder, adaptor: Adaptor) -> Any:
        nn, config = require("torch", "baselines").nn, self._config
        numbers = len(fields.counted.mean) if config.numbers else 0
        of_items = [len(item_attribute.numbers) for item_attribute in fields.item_attributes]
        of_users = [len(user_attribute.numbers) for user_attribute in fields.user_attributes]
        width = config.dim + self.FIRST_ORDER
        count = 1 + len(of_items) + len(of_users) + config.user_id + self.POOLED + len(adaptor.tables)
        network = nn.ModuleDict(
            {
                "item": nn.Embedding(len(fields.warm), width, padding_idx=0),
                "likes": nn.Embedding(2, width),
                "of_items": nn.ModuleList([nn.Embedding(n + 1, width, padding_idx=0) for n in of_items]),
                "of_users": nn.ModuleList([nn.Embedding(n + 1, width, padding_idx=0) for n in of_users]),
                "users": nn.Embedding(len(fields.users) + 1 if config.user_id else 1, width, padding_idx=0),
                "numbers": nn.Linear(max(numbers, 1), 1),
                "body": self._build(InputSizes(count, config.dim, numbers)),
            }
        )
        if adaptor.tables:
            network["adaptor"] = adaptor.build(width, config.experts)
        for module in network.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=_INITIAL_DEVIATION)
                if module.padding_idx is not None:
                    with require("torch", "baselines").no_grad():
                        module.weight[module.padding_idx].zero_()
        return network

    def _align(
        self,
        align: Align,
        network: torch.nn.Module,
        fields: FieldEncoder,
        rows: EncodedRows,
        columns: Sequence[RowFeatures],
        data: SplitDataset,
    ) -> None:
        """Align the network with texts, which are then discarded."""

        def represent(part: NDArray[np.int64]) -> Any:
            seen = self._see(network, fields, rows.of(part), [column.of(part) for column in columns])
            return require("torch", "baselines").cat(self._represent(network["body"], seen), dim=1)

        def judge(part: NDArray[np.int64]) -> Any:
            return self._forward(network, fields, rows.of(part), [column.of(part) for column in columns])

        sentences = None if align.longer else SentenceVectors.of(data, fields, align)
        for number, result in enumerate(
            iterate_alignment_epochs(
                align, network, rows, represent=represent, judge=judge, sentences=sentences, seed=self._seed
            ),
            1,
        ):
            level = logging.DEBUG if self._config.quiet else logging.INFO
            log.log(level, "stage one, epoch %d: loss %.4f, own text nearest %.4f", number, result.loss, result.right)

    def _train(
        self,
        network: torch.nn.Module,
        fields: FieldEncoder,
        learned: tuple[EncodedRows, list[RowFeatures]],
        judged: tuple[EncodedRows, list[RowFeatures]],
    ) -> int:
        """Train the network, keep the weights of the best epoch, and return that epoch."""
        torch, config = require("torch", "baselines"), self._config
        loss_of, rng = torch.nn.functional.binary_cross_entropy_with_logits, np.random.default_rng(self._seed)
        rows, columns = learned

        def learn(optimiser: Optimizer) -> float:
            network.train()
            order, total = rng.permutation(len(rows)), 0.0
            for start in range(0, len(order), config.batch):
                batch = order[start : start + config.batch]
                optimiser.zero_grad(set_to_none=True)
                logits = self._forward(network, fields, rows.of(batch), [column.of(batch) for column in columns])
                loss = loss_of(logits, torch.from_numpy(rows.truth[batch]))
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(batch)
            return total / max(1, len(order))

        def judge() -> float:
            odds = self._judge(network, fields, *judged)
            return float(np.logaddexp(0, -(2 * judged[0].truth - 1) * odds).mean())

        judged_by = judge if len(judged[0]) else None
        return train_with_early_stopping(network, judged_by, config, learn, name=self.name, measure="log-loss")

    def _judge(
        self, network: torch.nn.Module, fields: FieldEncoder, rows: EncodedRows, columns: Sequence[RowFeatures]
    ) -> NDArray[np.float64]:
        """Return the log-odds of all rows, shape (n,)."""
        torch = require("torch", "baselines")
        network.eval()
        result = np.zeros(len(rows))
        with torch.no_grad():
            for start in range(0, len(rows), _SCORING_BATCH):
                part = np.arange(start, min(start + _SCORING_BATCH, len(rows)))
                some = [column.of(part) for column in columns]
                result[part] = self._forward(network, fields, rows.of(part), some).double().numpy()
        return result

    def _forward(
        self, network: torch.nn.Module, fields: FieldEncoder, rows: EncodedRows, columns: Sequence[RowFeatures]
    ) -> Any:
        seen = self._see(network, fields, rows, columns)
        logits = self._output(network["body"], self._represent(network["body"], seen))
        return logits + network["numbers"](seen.numbers)[:, 0] if self._config.numbers else logits

    def _see(
        self, network: torch.nn.Module, fields: FieldEncoder, rows: EncodedRows, columns: Sequence[RowFeatures]
    ) -> FeatureBatch:
        torch, config, kind = require("torch", "baselines"), self._config, network["item"].weight.dtype

        def vectors(table: Any, numbers: NDArray[np.int64]) -> Any:
            return table(torch.from_numpy(numbers))

        def mean(table: Any, numbers: NDArray[np.int64]) -> Any:
            known = torch.from_numpy(numbers > 0).to(kind)[..., None]
            return (vectors(table, numbers) * known).sum(-2) / known.sum(-2).clamp(min=1)

        items = vectors(network["item"], fields.warm[rows.items])
        of_items = zip(network["of_items"], fields.item_values, strict=True)
        parts = [items, *(mean(table, values[rows.items]) for table, values in of_items)]
        parts += [mean(table, numbers) for table, numbers in zip(network["of_users"], rows.of_users, strict=True)]
        if config.user_id:
            parts.append(vectors(network["users"], rows.users))
        for index, entry in enumerate(columns):
            parts.append(
                gated_expert_sum(network["adaptor"], index, torch.from_numpy(entry.vectors[entry.entities]).to(kind))
            )
        events = vectors(network["item"], fields.warm[rows.events]) + vectors(network["likes"], rows.liked)
        for table, values in zip(network["of_items"], fields.item_values, strict=True):
            events = events + mean(table, values[rows.events])
        mask = torch.from_numpy(rows.events > 0).to(kind)
        # The item vector includes its attributes, as in the history.
        item = torch.stack(parts[: 1 + len(fields.item_values)], dim=1).sum(dim=1)
        return FeatureBatch(
            item=item,
            fields=torch.stack(parts, dim=1),
            events=events * mask[:, :, None],
            mask=mask,
            liked=torch.from_numpy(rows.liked).to(kind),
            numbers=torch.from_numpy(rows.numbers).to(kind)
            if config.numbers
            else torch.zeros((len(rows), 0), dtype=kind),
        )


def pool_history(seen: FeatureBatch) -> Any:
    """Return the mean vectors of the liked and of the other items in the history, shape (b, 2, d)."""
    torch = require("torch", "baselines")
    means = []
    for weights in (seen.mask * seen.liked, seen.mask * (1 - seen.liked)):
        total = weights.sum(dim=1, keepdim=True).clamp(min=1)
        means.append((seen.events * weights[:, :, None]).sum(dim=1) / total)
    return torch.stack(means, dim=1)


def all_fields(seen: FeatureBatch) -> Any:
    """Return all fields and the result of `pool_history`, shape (b, f, d)."""
    return require("torch", "baselines").cat([seen.fields, pool_history(seen)], dim=1)


def dense_layers(widths: Sequence[int], dropout: float, *, last: int | None = 1) -> Any:
    """Return linear layers with ReLU and dropout, followed by a linear layer of size ``last``."""
    nn = require("torch", "baselines").nn
    modules: list[Any] = []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
    if last is not None:
        modules.append(nn.Linear(widths[-1], last))
    return nn.Sequential(*modules)
