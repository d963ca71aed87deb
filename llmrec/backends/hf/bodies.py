"""The part of a model that turns tokens into hidden states, as `llmrec.backends.hf.tree` runs it.

A causal model's is its decoder. T5's is its decoder behind an encoder that reads the prompt, with two oddities: places
are told by a bias on attention that counts columns, and hidden states are scaled before the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llmrec.errors import require
from llmrec.models.traits import is_paired, plain_head


class Body(Protocol):
    """Reads columns of tokens, whole prompts first."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Take new prompts, and return the tokens that stand in the rows before anything is fed."""
        ...

    def run(self, ids: Any, mask: Any, places: Any, cache: Any) -> tuple[Any, Any]:
        """Read columns behind those of the cache.

        Args:
            ids: Token ids, shape (rows, columns).
            mask: What is seen: 1 or 0 of every column so far, shape (rows, all columns), or numbers to add to
                attention, shape (rows, 1, columns, all columns).
            places: How many tokens stand before each in its text, shape (rows, columns).
            cache: What the call before returned; None at first.

        Returns:
            What the head is applied to, shape (rows, columns, d), and the grown cache.
        """
        ...


def body_of(model: Any) -> Body:
    """Return the body of a model that `takes_trees`."""
    return PairedBody(model) if is_paired(model.config) else CausalBody(model)


def takes_trees(model: Any) -> bool:
    """Whether a model's logits can be had row by row from its body's hidden states, and its places be told."""
    plain = plain_head(model.config, model.get_output_embeddings())
    return plain and (not is_paired(model.config) or model.config.model_type in ("t5", "mt5"))


def output_scale(config: Any) -> float:
    """Return what an encoder-decoder's hidden states are multiplied by before the head; mT5 has no such key."""
    return float(config.d_model**-0.5) if getattr(config, "scale_decoder_outputs", False) else 1.0


def states_of(model: Any, ids: Any, **inputs: Any) -> Any:
    """Return what the head of a model that `takes_trees` is applied to, shape (rows, columns, d).

    Args:
        model: The model.
        ids: Token ids, of an encoder-decoder those of its decoder, shape (rows, columns).
        inputs: What else its decoder is told, such as masks, or the encoder's states.
    """
    scale = output_scale(model.config) if is_paired(model.config) else 1.0
    states = model.get_decoder()(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    return states if scale == 1.0 else states * scale


def reads_states(model: Any) -> bool:
    """Whether a model `takes_trees`, proven on a few tokens: its own logits are those that its head makes of states."""
    if not takes_trees(model):
        return False
    torch = require("torch", "train")
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    with torch.inference_mode():
        if is_paired(model.config):
            encoded = model.get_encoder()(input_ids=ids).last_hidden_state
            logits = model(encoder_outputs=(encoded,), decoder_input_ids=ids, use_cache=False).logits
            states = states_of(model, ids, encoder_hidden_states=encoded)
        else:
            logits, states = model(input_ids=ids, use_cache=False).logits, states_of(model, ids)
        made = model.get_output_embeddings()(states)
    return bool(torch.allclose(made.float(), logits.float(), atol=1e-4, rtol=0.02))


class CausalBody:
    """The decoder of a causal language model."""

    def __init__(self, model: Any) -> None:
        self._decoder = model.get_decoder()

    def begin(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Return the prompts; see `Body`."""
        return prompts

    def run(self, ids: Any, mask: Any, places: Any, cache: Any) -> tuple[Any, Any]:
        """Read columns; see `Body`."""
        out = self._decoder(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state, out.past_key_values


class PairedBody:
    """T5's decoder over what its encoder made of the prompts, which is turned into keys and values once."""

    def __init__(self, model: Any) -> None:
        self._torch = require("torch", "train")
        self._model, config = model, model.config
        self._start = int(config.decoder_start_token_id)
        self._scale = output_scale(config)
        self._bias = model.get_decoder().block[0].layer[0].SelfAttention
        self._states: Any = None
        self._seen: Any = None
        self._places: Any = None

    def begin(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Read prompts with the encoder, padded on their right, and return the decoder's start token for each."""
        torch, device = self._torch, self._model.device
        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        self._seen = torch.zeros((len(prompts), longest), dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(list(prompt))
            self._seen[row, : len(prompt)] = 1
        out = self._model.get_encoder()(input_ids=ids.to(device), attention_mask=self._seen)
        self._states, self._places = out.last_hidden_state, None
        return [(self._start,)] * len(prompts)

    def run(self, ids: Any, mask: Any, places: Any, cache: Any) -> tuple[Any, Any]:
        """Read columns; see `Body`."""
        known = places if self._places is None else self._torch.cat([self._places, places], dim=1)
        self._places = known
        out = self._model.get_decoder()(
            input_ids=ids,
            attention_mask=mask if mask.dim() == 2 else self._placed(mask, places, known),
            encoder_hidden_states=self._states,
            encoder_attention_mask=self._seen,
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state * self._scale, out.past_key_values

    def _placed(self, mask: Any, places: Any, known: Any) -> Any:
        """Return the mask with what the model's count of columns gets wrong, shape (rows, heads, columns, all columns).

        The model adds a bias for how many columns two tokens stand apart. In a tree they stand apart by their depth,
        so the difference of both biases is added with the mask, which takes part in the same sum.
        """
        bias, torch = self._bias, self._torch
        columns, wide = places.shape[1], known.shape[1]
        apart = bias._relative_position_bucket(
            known[:, None, :] - places[:, :, None],
            bidirectional=False,
            num_buckets=bias.relative_attention_num_buckets,
            max_distance=bias.relative_attention_max_distance,
        )
        right = bias.relative_attention_bias(apart).permute(0, 3, 1, 2)
        wrong = bias.compute_bias(columns, wide, device=right.device, past_seen_tokens=wide - columns)
        return torch.where(mask == 0, right - wrong, mask)
