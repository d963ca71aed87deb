"""Multi-segment late interaction (M6-Rec, arXiv 2205.08084): most layers encode each segment separately.

A prompt is split into segments: the user's features, each interaction, the candidate. The lower layers encode every
segment separately, with positions from 0, so that its states depend only on its text and can be cached: in memory and,
for a catalogue, in a `FeatureStore` with keys of text and token in a folder named by weights and layer. The last few
layers process all segments jointly, with a learned embedding per kind of segment. The candidate is last, so that the
rest of the prompt is computed once for all candidates.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.backends.encode import Encoder
from llmrec.data.features import Features, FeatureStore, Provenance, lock_store, write_version
from llmrec.errors import DataError, LlmrecError, ModelError, RecipeError, require
from llmrec.models.exits import check_early_exits
from llmrec.models.load import load_model, load_tokenizer, model_folder_hash
from llmrec.recipe.schema import ModelSection
from llmrec.resources import cache_dir

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Number of texts per batch.
_TEXT_BATCH = 64
# Text for checking that the divided model equals the whole model, and tolerance relative to the largest state.
_SAMPLE_TEXT = (
    "Liked 2 of 3. Liked: The Long Way Home (1995). Did not like: A Winter's Day. Liked: Blue. Next: Rivers II."
)
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A segment of a prompt: its text and kind."""

    text: str
    kind: int


class LowerLayers:
    """The layers below the joint layers, with the cached hidden states of each text.

    Args:
        folder: The model.
        section: The settings for loading it.
        joint: Number of layers of the joint part.
        layers: Number of layers to which the model is truncated first; None: all.

    Attributes:
        joint: A decoder of the last layers and the final norm, with states as inputs.
        read: Number of tokens that were computed and not cached.

    Raises:
        RecipeError: If the model has fewer layers.
        ModelError: If the model cannot be divided, that is, its two parts do not equal the whole model.
    """

    def __init__(self, folder: str, section: ModelSection, joint: int, layers: int | None = None) -> None:
        self._torch = require("torch", "train")
        model = load_model(folder, section, dtype=self._torch.float32)
        check_early_exits(model, "model")
        body = model.get_decoder()
        every, total = list(body.layers), len(body.layers)
        used = total if layers is None else layers
        if joint > used or used > total:
            raise RecipeError(
                f"joint={joint} of {used} layers is not possible, since {section.name} has {total} layers; lower "
                "joint or layers",
                kind="bad-value",
                column="joint",
            )
        self.layer = used - joint
        self._body = body.eval().requires_grad_(False)
        self._encoder = Encoder(load_tokenizer(folder, section), max_length=section.max_length)
        self._set_layers(every[:used], body.norm)
        expected = self._sample_states()
        try:
            self.joint = _copy_upper_layers(body, every[self.layer : used], slice(self.layer, used), total)
            self._set_layers(every[: self.layer], self._torch.nn.Identity())
            with self._torch.no_grad():
                result = self.joint(inputs_embeds=self._sample_states(), use_cache=False).last_hidden_state
            deviation = float((result - expected).abs().max() / expected.abs().max())
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            log.debug("%s cannot be divided", section.name, exc_info=error)
            deviation = float("nan")
        if not deviation <= _TOLERANCE:
            raise ModelError(
                f"joint: {section.name} (model type {model.config.model_type}) cannot be divided: its last {joint} "
                "layers as a separate decoder give different states than in the whole model; choose another model",
                kind="unsupported",
                column="joint",
            )
        self._known: dict[str, Any] = {}
        self._folder = cache_dir() / "segments" / f"{model_folder_hash(folder)}-{self.layer}"
        self.width = int(model.config.get_text_config().hidden_size)
        self.read = 0

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a segment; an empty segment has a line break.

        Raises:
            BackendError: If a text contains a control token.
        """
        return list(self._encoder.piece(text or "\n"))

    def _set_layers(self, layers: Sequence[Any], norm: torch.nn.Module) -> None:
        self._body.layers, self._body.norm = self._torch.nn.ModuleList(layers), norm
        self._body.config.num_hidden_layers = len(layers)

    def _sample_states(self) -> Any:
        with self._torch.no_grad():
            return self._body(input_ids=self._torch.tensor([self.ids(_SAMPLE_TEXT)]), use_cache=False).last_hidden_state

    def states(self, texts: Sequence[str]) -> list[Any]:
        """Return the hidden states of each text after the lower layers, (tokens, d) each; computed once per text."""
        torch = self._torch
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        new.sort(key=lambda text: len(self.ids(text)))
        for start in range(0, len(new), _TEXT_BATCH):
            part = [self.ids(text) for text in new[start : start + _TEXT_BATCH]]
            ids = torch.zeros((len(part), max(map(len, part))), dtype=torch.long)
            for row, tokens in enumerate(part):
                ids[row, : len(tokens)] = torch.tensor(tokens)
            # With causal attention, padding on the right has no effect.
            with torch.no_grad():
                result = self._body(input_ids=ids, use_cache=False).last_hidden_state
            for text, tokens, states in zip(new[start : start + _TEXT_BATCH], part, result, strict=True):
                self._known[text] = states[: len(tokens)].clone()
            self.read += sum(map(len, part))
        return [self._known[text] for text in texts]

    def forget(self, texts: Iterable[str]) -> None:
        """Clear the cached states, to measure latency without cache."""
        for text in texts:
            self._known.pop(text, None)

    def keep(self, texts: Iterable[str]) -> int:
        """Cache the states of texts on disk, and return how many were already cached.

        If another process is writing to the store, nothing is stored.
        """
        unique = sorted(set(texts))
        result = self._load_cached_states(unique)
        if result < len(unique):
            rows = {
                _token_key(text, n): state
                for text, states in zip(unique, self.states(unique), strict=True)
                for n, state in enumerate(states.numpy())
            }
            source = Provenance(system="segments", encoder={"layer": self.layer, "stamp": self._folder.name})
            try:
                with lock_store(self._folder) as root:
                    store = self._store()
                    if store is not None:
                        names = store.ids("item")
                        rows |= dict(zip(names, store.get("item", names)[0], strict=True))
                    write_version(root, [Features("item", list(rows), np.stack(list(rows.values())), source)], keep=1)
            except LlmrecError as error:
                if error.kind != "busy":
                    raise
                log.info("%s; hidden states of texts are not stored", error)
        return result

    def _load_cached_states(self, texts: Iterable[str]) -> int:
        store, before = self._store(), len(self._known)
        if store is None:
            return 0
        for text in set(texts) - self._known.keys():
            vectors, known = store.get("item", [_token_key(text, n) for n in range(len(self.ids(text)))])
            if known.all():
                self._known[text] = self._torch.from_numpy(vectors)
        return len(self._known) - before

    def _store(self) -> FeatureStore | None:
        """Return the states cached on disk; None if there are none, or if the cache is damaged."""
        try:
            return FeatureStore.open(self._folder)
        except DataError as error:
            if error.kind not in ("missing-file", "damaged", "wrong-format"):
                raise
            return None


def _token_key(text: str, number: int) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}:{number}"


def _copy_upper_layers(body: torch.nn.Module, layers: Sequence[Any], indices: slice, total: int) -> Any:
    """Return a decoder with copies of the upper layers, which takes hidden states as input.

    Args:
        body: The original decoder.
        layers: The layers.
        indices: The indices of these layers in it.
        total: Its number of layers.
    """
    config = copy.deepcopy(body.config)
    # Settings per layer, such as the attention type, are lists with one value per layer.
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == total:
            setattr(config, name, list(value)[indices])
    config.num_hidden_layers, config.vocab_size = len(layers), 8
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, 0)
    decoder = type(body)(config).float()
    for copied, layer in zip(decoder.layers, layers, strict=True):
        copied.load_state_dict(layer.state_dict())
    decoder.norm.load_state_dict(body.norm.state_dict())
    decoder.embed_tokens.requires_grad_(False)
    return decoder
