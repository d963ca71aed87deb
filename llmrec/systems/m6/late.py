"""CTR prediction by a language model with cached lower layers (multi-segment late interaction of M6-Rec)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from llmrec.baselines.base import Baseline, PositiveFloat
from llmrec.baselines.ctr import LikeRatioConfig
from llmrec.baselines.neural import load_network_state, network_state
from llmrec.data.split import history_without_item, liked_threshold, scale_of
from llmrec.errors import DataError, require
from llmrec.machine import cpu_has_bf16
from llmrec.models.load import resolve_model_folder
from llmrec.progress import Progress
from llmrec.recipe.schema import Depth, ModelSection, Positive
from llmrec.results import Reads
from llmrec.systems.m6.segments import LowerLayers, PromptPart
from llmrec.types import Answer, Event, Item, Probability, Request, Unparsed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset

PROFILE, LIKED, DISLIKED, CANDIDATE = range(4)
# Candidates per batch for one history.
_CANDIDATE_BATCH = 64


class LateConfig(LikeRatioConfig):
    """Parameters of `LateInteraction`."""

    model: str = Field("SmolLM2-135M-Instruct", description="Decoder language model: name or folder.")
    joint: int = Field(
        3,
        ge=0,
        description="Number of last layers that process all segments jointly and are trained. 0 (ablation): a head on "
        "averaged hidden states.",
    )
    layers: Depth | None = Field(
        None,
        description="Number of model layers to keep. The value of `joint` (ablation): no layers are cached.",
    )
    history: Positive = Field(10, description="Maximum number of latest rated interactions in the prompt.")
    rows: Positive = Field(2000, description="Number of sampled training ratings.")
    epochs: Positive = Field(2, description="Number of epochs.")
    batch: Positive = Field(16, description="Examples per optimiser step.")
    learning_rate: PositiveFloat = Field(1e-4, description="Learning rate of AdamW.")
    quiet: bool = Field(False, description="Hide the progress bar.")


@dataclass
class LateInteractionModel:
    """The model: lower layers, joint layers and head.

    Attributes:
        lower: The encoder of segments.
        parts: The segment embeddings and the head, a ``torch.nn.ModuleDict``.
        items: The catalogue.
        liked: The lowest rating of a like.
        history: Maximum number of ratings.
        depth: Number of joint layers.
    """

    lower: LowerLayers
    parts: Any
    items: Mapping[str, Item]
    liked: float
    history: int
    depth: int

    def title(self, item: str) -> str:
        """Return the title of an item."""
        result = self.items.get(item)
        return result.title if result is not None else item

    def user(self, events: Sequence[Event]) -> list[PromptPart]:
        """Return the segments about a user: the number of likes, and each rating."""
        rated = [event for event in events if event.rating is not None][-self.history :]
        kinds = [LIKED if float(event.rating or 0) >= self.liked else DISLIKED for event in rated]
        prefixes = {LIKED: "Liked", DISLIKED: "Did not like"}
        profile = PromptPart(f"Liked {kinds.count(LIKED)} of {len(kinds)}.", PROFILE)
        shown = [PromptPart(f"{prefixes[k]}: {self.title(e.item_id)}.", k) for k, e in zip(kinds, rated, strict=True)]
        return [profile, *shown]

    def candidate(self, item: str) -> PromptPart:
        """Return the segment about a candidate."""
        return PromptPart(f"Next: {self.title(item)}.", CANDIDATE)

    def embedded(self, segments: Sequence[PromptPart]) -> Any:
        """Return the concatenated hidden states of segments, plus embeddings of their kinds, shape (tokens, d)."""
        torch, states = require("torch", "train"), self.lower.states([segment.text for segment in segments])
        kinds = self.parts["kinds"].weight
        return torch.cat([state + kinds[item.kind] for state, item in zip(states, segments, strict=True)])

    def logits(self, user: Sequence[PromptPart], candidates: Sequence[PromptPart]) -> Any:
        """Return the log-odds of a yes for several candidates of a user, shape (n,); the user is encoded once."""
        torch, before = require("torch", "train"), self.embedded(user)
        after = [self.embedded([candidate]) for candidate in candidates]
        if not self.depth:
            mean = before.mean(0)
            return self._head(torch.stack([torch.cat([mean, candidate_states[-1]]) for candidate_states in after]))
        cache = self.lower.joint(inputs_embeds=before[None], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(after))
        rows, mask, lengths = self._padded(after)
        mask = torch.cat([mask.new_ones((len(after), len(before))), mask], dim=1)
        positions = (len(before) + torch.arange(rows.shape[1]))[None].expand(len(after), -1)
        states = self.lower.joint(
            inputs_embeds=rows, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return self._head(states[torch.arange(len(after)), lengths - 1])

    def forward(self, prompts: Sequence[Sequence[PromptPart]]) -> Any:
        """Return the log-odds of whole prompts, each with its candidate last, for training, shape (n,)."""
        torch = require("torch", "train")
        if not self.depth:
            return torch.cat([self.logits(prompt[:-1], prompt[-1:]) for prompt in prompts])
        rows, mask, lengths = self._padded([self.embedded(prompt) for prompt in prompts])
        states = self.lower.joint(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state
        return self._head(states[torch.arange(len(prompts)), lengths - 1])

    def _padded(self, texts: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Return hidden states padded on the right, their mask, and their lengths."""
        torch = require("torch", "train")
        lengths = torch.tensor([len(text) for text in texts])
        rows = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        return rows, (torch.arange(rows.shape[1]) < lengths[:, None]).long(), lengths

    def _head(self, states: torch.Tensor) -> Any:
        normal = require("torch", "train").nn.functional.layer_norm(states, states.shape[-1:])
        return self.parts["head"](normal)[:, 0]


class LateInteraction(Baseline[LateConfig, LateInteractionModel]):
    """Predicts the probability of a like from cached text states and a few joint layers.

    The lower layers are frozen. The joint layers, the segment embeddings and the head are trained with the
    cross-entropy on training ratings; the validation split is not used.
    """

    name = "late-interaction"
    stochastic = True
    READS: ClassVar[Reads] = "language model"
    FITS_ON = "train"
    Config = LateConfig

    @classmethod
    def reads(cls, config: LateConfig) -> Reads:
        """Return which item data the model reads."""
        return cls.READS if config.joint else "texts"

    def learn(self, data: SplitDataset) -> None:
        """Train the joint layers and the head.

        Raises:
            DataError: If no training rating has previous ratings.
            ModelError: If the model is missing or not supported.
            MissingExtra: If torch or transformers is not installed.
        """
        torch = require("torch", "train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model = self._late(self._lower(), data)
            prompts, truth = self._prompts(data, model)
            model.lower.keep({item.text for prompt in prompts for item in prompt})
            self._train(model, prompts, truth)
        self._model = model

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the trained weights as arrays."""
        return network_state(_trainable_modules(self._fitted))

    def restore(self, data: SplitDataset, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the trained weights from `state`."""
        model = self._late(self._lower(), data)
        load_network_state(_trainable_modules(model), state)
        self._model = model

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Predict the probability that the user likes the item; each history is encoded once."""
        model, result = self._fitted, dict[int, Answer]()
        torch = require("torch", "train")
        # requests of a user need not be adjacent
        groups: dict[tuple[str, tuple[Event, ...]], list[int]] = {}
        for n, request in enumerate(requests):
            if request.item is not None:
                groups.setdefault((request.user_id, history_without_item(request.history, request.item)), []).append(n)
        for (_, past), indices in groups.items():
            user = model.user(past)
            for start in range(0, len(indices), _CANDIDATE_BATCH):
                part = indices[start : start + _CANDIDATE_BATCH]
                with torch.no_grad():
                    logits = model.logits(user, [model.candidate(str(requests[n].item)) for n in part])
                for n, probability in zip(part, logits.sigmoid().tolist(), strict=True):
                    result[n] = Probability(request_id=requests[n].id, value=probability)
        return [
            result.get(n) or Unparsed(request_id=request.id, reason="the request has no item to judge")
            for n, request in enumerate(requests)
        ]

    def _lower(self) -> LowerLayers:
        section = ModelSection(name=self._config.model, dtype="float32")
        return LowerLayers(resolve_model_folder(section), section, self._config.joint, self._config.layers)

    def _late(self, lower: LowerLayers, data: SplitDataset) -> LateInteractionModel:
        nn, config = require("torch", "train").nn, self._config
        parts = nn.ModuleDict(
            {
                "kinds": nn.Embedding(4, lower.width),
                "head": nn.Linear(lower.width * (1 if config.joint else 2), 1),
            }
        )
        for parameter in parts.parameters():
            nn.init.zeros_(parameter)
        liked = liked_threshold(scale_of(data), config.liked)
        return LateInteractionModel(lower, parts, data.dataset.items, liked, config.history, config.joint)

    def _prompts(self, data: SplitDataset, model: LateInteractionModel) -> tuple[list[list[PromptPart]], list[float]]:
        """Return a prompt for each training rating, and the labels."""
        rng, result = np.random.default_rng(self._seed), []
        for user in data.train.get_column("user_id").unique().sort().to_list():
            events = [event for event in data.history(user, "valid") if event.rating is not None]
            # Ratings that occur only in histories are inputs and never targets.
            targets = set(data.train_events(user))
            result += [(events[:at], events[at]) for at in range(1, len(events)) if events[at] in targets]
        if not result:
            raise DataError(
                f"{self.name} needs users with at least two training ratings, but no user of {data.dataset.name} "
                "has two; use data with ratings, or remove the baseline",
                kind="too-few",
                at=data.dataset.name,
                column="rating",
            )
        chosen = rng.permutation(len(result))[: self._config.rows]
        rows = [result[n] for n in chosen]
        prompts = [
            [*model.user(history_without_item(past, event.item_id)), model.candidate(event.item_id)]
            for past, event in rows
        ]
        return prompts, [float(float(event.rating or 0) >= model.liked) for _, event in rows]

    def _train(
        self, model: LateInteractionModel, prompts: Sequence[Sequence[PromptPart]], truth: Sequence[float]
    ) -> None:
        torch, config = require("torch", "train"), self._config
        trained = [p for part in (model.lower.joint, model.parts) for p in part.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=config.learning_rate)
        rng, labels = np.random.default_rng(self._seed + 1), torch.tensor(truth)
        with Progress(self.name, config.epochs * len(prompts), unit="rows", quiet=config.quiet, passing=True) as bar:
            for _ in range(config.epochs):
                order = rng.permutation(len(prompts))
                for start in range(0, len(order), config.batch):
                    part = order[start : start + config.batch].tolist()
                    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
                        logits = model.forward([prompts[n] for n in part]).float()
                    optimiser.zero_grad(set_to_none=True)
                    torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[part]).backward()
                    optimiser.step()
                    bar.advance(len(part))
        model.lower.joint.eval()


def _trainable_modules(model: LateInteractionModel) -> Any:
    """Return the trainable modules, a ``torch.nn.ModuleDict``."""
    return require("torch", "train").nn.ModuleDict({"joint": model.lower.joint, "parts": model.parts})
