"""Reads token trees with transformers: each prompt once, and each token of a tree once.

All tokens that are fed together form one row per user, with a mask that lets each see its prompt and its ancestors. The
KV cache only grows: nothing is copied or reordered for beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmrec.decode.beam import Floats, LogprobQueries, TreeEngine, TreeTokens
from llmrec.errors import require
from llmrec.models.traits import cache_bytes_per_token, chosen_logprobs, is_encoder_decoder, is_plain_head

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


def can_read_trees(model: torch.nn.Module) -> bool:
    """Whether a model supports token trees: its logits are computed row by row, and positions can be set."""
    plain = is_plain_head(model.config, model.get_output_embeddings())
    return plain and (not is_encoder_decoder(model.config) or model.config.model_type in ("t5", "mt5"))


def output_scale(config: PretrainedConfig) -> float:
    """Return the factor by which an encoder-decoder scales hidden states before the head."""
    return float(config.d_model**-0.5) if getattr(config, "scale_decoder_outputs", False) else 1.0


def pad_sequences(texts: Sequence[Sequence[int]], pad: int, device: Any, *, left: bool = False) -> tuple[Any, Any]:
    """Return padded token ids and their mask, each of shape (texts, longest)."""
    torch, longest = require("torch", "train"), max(map(len, texts))
    ids = torch.full((len(texts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        columns = slice(longest - len(text), longest) if left else slice(len(text))
        ids[row, columns] = torch.tensor(list(text))
        mask[row, columns] = 1
    return ids.to(device), mask.to(device)


def head_inputs(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> Any:
    """Return the input of the head, shape (rows, columns, d).

    The ids are of shape (rows, columns), of an encoder-decoder those of its decoder, which gets the further inputs:
    masks, or the encoder's states.
    """
    scale = output_scale(model.config) if is_encoder_decoder(model.config) else 1.0
    states = model.get_decoder()(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    return states if scale == 1.0 else states * scale


def can_score_states(model: torch.nn.Module) -> bool:
    """Test on a few tokens whether a model's logits equal its head applied to the hidden states."""
    if not can_read_trees(model):
        return False
    torch = require("torch", "train")
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    with torch.inference_mode():
        if is_encoder_decoder(model.config):
            encoded = model.get_encoder()(input_ids=ids).last_hidden_state
            logits = model(encoder_outputs=(encoded,), decoder_input_ids=ids, use_cache=False).logits
            states = head_inputs(model, ids, encoder_hidden_states=encoded)
        else:
            logits, states = model(input_ids=ids, use_cache=False).logits, head_inputs(model, ids)
        expected = model.get_output_embeddings()(states)
    return bool(torch.allclose(expected.float(), logits.float(), atol=1e-4, rtol=0.02))


# The part of a model that computes hidden states, without the head: the decoder of a causal model, or that of T5 after
# the encoder.


class CausalBody:
    """The decoder of a causal language model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._decoder = model.get_decoder()

    def begin(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Start with new prompts, and return the first token ids of each row: the prompts, which a decoder reads."""
        return prompts

    def run(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> tuple[Any, Any]:
        """Compute the hidden states of new tokens after the tokens in the key-value cache.

        Args:
            ids: Token ids, shape (rows, columns).
            mask: 1 or 0 for every column so far, shape (rows, all columns), or values to add to
                attention, shape (rows, 1, columns, all columns).
            positions: Position ids, shape (rows, columns).
            cache: The cache that the previous call returned; None at first.

        Returns:
            The input of the head, shape (rows, columns, d), and the extended cache.
        """
        out = self._decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state, out.past_key_values


class T5Body:
    """The decoder of T5 after the encoded prompts, whose keys and values are computed once.

    Positions are an attention bias that counts columns, and hidden states are scaled before the head.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._torch = require("torch", "train")
        self._model, config = model, model.config
        self._start = int(config.decoder_start_token_id)
        self._scale = output_scale(config)
        self._bias = model.get_decoder().block[0].layer[0].SelfAttention
        self._states: Any = None
        self._seen: Any = None
        self._positions: Any = None

    def begin(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Encode prompts, padded on the right, and return the start token of the decoder for each."""
        ids, self._seen = pad_sequences(prompts, 0, self._model.device)
        out = self._model.get_encoder()(input_ids=ids, attention_mask=self._seen)
        self._states, self._positions = out.last_hidden_state, None
        return [(self._start,)] * len(prompts)

    def run(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> tuple[Any, Any]:
        """Compute columns; see `CausalBody.run`."""
        known = positions if self._positions is None else self._torch.cat([self._positions, positions], dim=1)
        self._positions = known
        out = self._model.get_decoder()(
            input_ids=ids,
            attention_mask=mask if mask.dim() == 2 else self._bias_corrected(mask, positions, known),
            encoder_hidden_states=self._states,
            encoder_attention_mask=self._seen,
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state * self._scale, out.past_key_values

    def _bias_corrected(self, mask: torch.Tensor, positions: torch.Tensor, known: Any) -> Any:
        """Return the mask with corrected position bias, shape (rows, heads, columns, all columns).

        The model adds a bias by the distance of two columns. In a tree the distance is one of depth, so the difference
        of both biases is added to the mask, which enters the same sum.
        """
        bias, torch = self._bias, self._torch
        columns, wide = positions.shape[1], known.shape[1]
        apart = bias._relative_position_bucket(
            known[:, None, :] - positions[:, :, None],
            bidirectional=False,
            num_buckets=bias.relative_attention_num_buckets,
            max_distance=bias.relative_attention_max_distance,
        )
        right = bias.relative_attention_bias(apart).permute(0, 3, 1, 2)
        wrong = bias.compute_bias(columns, wide, device=right.device, past_seen_tokens=wide - columns)
        return torch.where(mask == 0, right - wrong, mask)


# Rows of logits at a time, which take tens of megabytes for a large vocabulary.
_ROWS = 256


class MaskedTree:
    """A `TreeEngine` for causal language models that accept block masks, and for T5.

    Attributes:
        tokens: The number of computed tokens, with prompts, without padding.
        forwards: The number of forward passes of the body.
        head_rows: The number of computed rows of logits.
    """

    def __init__(self, model: torch.nn.Module, pad: int, *, warm: bool = False) -> None:
        """Create the tree engine.

        Args:
            model: The model, in evaluation mode.
            pad: Any token id.
            warm: Keep the cache of a single prompt for the next one. Scores may then differ in the last bits. Not for
                an encoder-decoder, whose rows have no prompt.
        """
        self._torch = require("torch", "train")
        self._model, self._pad, self._keep = model, pad, warm
        self._body = T5Body(model) if is_encoder_decoder(model.config) else CausalBody(model)
        self._cache: Any = None
        self._warm: tuple[tuple[int, ...], Any] | None = None
        self._prompts: list[tuple[int, ...]] = []
        self.tokens = self.forwards = self.head_rows = 0

    def open(self, prompts: Sequence[Sequence[int]], targets: LogprobQueries) -> Floats:
        """Read prompts, padded on the left; see `TreeEngine`.

        With ``warm`` a single prompt continues from the previous single prompt, as far as they share a prefix.
        """
        torch = self._torch
        with torch.inference_mode():
            begun = self._body.begin(prompts)
        if begun is not prompts:
            self.tokens += sum(map(len, prompts))
            prompts = begun
        self._prompts = [tuple(prompt) for prompt in prompts]
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        self._lengths, self._width = lengths, longest
        # For every prompt and fed token: its position, and the later columns that it attends to.
        self._positions = lengths - 1
        self._sees = np.zeros((len(prompts), 0), dtype=bool)
        known = self._reuse_cache(prompts)
        ids = np.full((len(prompts), longest - known), self._pad)
        for row, prompt in enumerate(prompts):
            ids[row, longest - known - (len(prompt) - known) :] = prompt[known:]
        mask = np.arange(longest) >= (longest - lengths)[:, None]
        positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)[:, known:]
        hidden = self._forward(ids, torch.from_numpy(mask.astype(np.int64)), positions)
        self.tokens += int(lengths.sum()) - known * len(prompts)
        return self._logprobs(hidden[:, -1], targets, targets.after)

    def feed(self, fed: TreeTokens, targets: LogprobQueries) -> Floats:
        """Read tokens after the prompts; see `TreeEngine`."""
        torch, count = self._torch, len(fed.tokens)
        base, before = len(self._positions), self._sees.shape[1]
        slots = _ranks_within_prompt(fed.users)
        wide = int(slots.max()) + 1
        self._record_tokens(fed, slots, wide)
        ids = np.full((len(self._lengths), wide), self._pad)
        positions = np.zeros((len(self._lengths), wide), dtype=np.int64)
        ids[fed.users, slots] = fed.tokens
        positions[fed.users, slots] = self._positions[base:]
        seen = np.zeros((len(self._lengths), wide, self._width + before + wide), dtype=bool)
        seen[:, :, : self._width] = np.arange(self._width) >= (self._width - self._lengths)[:, None, None]
        seen[fed.users, slots, self._width :] = self._sees[base:]
        dtype = self._model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~torch.from_numpy(seen), torch.finfo(dtype).min)
        hidden = self._forward(ids, mask[:, None], positions)
        self.tokens += count
        rows = torch.from_numpy(fed.users * wide + slots).to(hidden.device)
        return self._logprobs(hidden.flatten(0, 1)[rows], targets, targets.after - base)

    def close(self) -> None:
        """Discard the tree; with ``warm``, keep the cache of a single prompt."""
        if self._keep and len(self._prompts) == 1 and self._cache is not None:
            truncate_cache(self._cache, len(self._prompts[0]))
            self._warm = (self._prompts[0], self._cache)
        self._cache = None

    def _reuse_cache(self, prompts: Sequence[Sequence[int]]) -> int:
        """Reuse the cache, and return how many tokens of a single prompt it contains."""
        warm, self._warm = self._warm, None
        if warm is None or len(prompts) != 1:
            return 0
        # The last token is read again, since its logits are needed.
        known = min(_common_prefix_length(warm[0], prompts[0]), len(prompts[0]) - 1)
        if known:
            truncate_cache(warm[1], known)
            self._cache = warm[1]
        return known

    def _record_tokens(self, fed: TreeTokens, slots: NDArray[np.int64], wide: int) -> None:
        """Record position, column and ancestors of fed tokens; parents precede their children."""
        base, before = len(self._positions), self._sees.shape[1]
        sees = np.zeros((base + len(fed.tokens), before + wide), dtype=bool)
        sees[:base, :before] = self._sees
        positions = np.concatenate([self._positions, np.zeros(len(fed.tokens), dtype=np.int64)])
        for n, (parent, slot) in enumerate(zip(fed.parents.tolist(), slots.tolist(), strict=True), base):
            positions[n] = positions[parent] + 1
            sees[n] = sees[parent]
            sees[n, before + slot] = True
        self._positions, self._sees = positions, sees

    def _forward(self, ids: NDArray[np.int64], mask: torch.Tensor, positions: NDArray[np.int64]) -> Any:
        """Run the model on new columns, and return the last hidden states, shape (prompts, columns, d)."""
        torch, device = self._torch, self._model.device
        with torch.inference_mode():
            hidden, self._cache = self._body.run(
                torch.from_numpy(ids).to(device), mask.to(device), torch.from_numpy(positions).to(device), self._cache
            )
        self.forwards += 1
        return hidden

    def _logprobs(self, hidden: torch.Tensor, targets: LogprobQueries, rows: NDArray[np.int64]) -> Floats:
        """Return full-softmax log-probabilities of given tokens; ``rows`` selects the preceding hidden states."""
        torch, head = self._torch, self._model.get_output_embeddings()
        result = np.empty(len(rows))
        used, group = np.unique(rows, return_inverse=True)
        for start in range(0, len(used), _ROWS):
            part = used[start : start + _ROWS]
            selected = np.flatnonzero((group >= start) & (group < start + len(part)))
            with torch.inference_mode():
                states = hidden[torch.from_numpy(part).to(hidden.device)]
                at = torch.from_numpy(group[selected] - start).to(hidden.device)
                ids = torch.from_numpy(targets.tokens[selected]).to(hidden.device)
                result[selected] = chosen_logprobs(head, states, at, ids).cpu().numpy()
            self.head_rows += len(part)
        return result


def truncate_cache(cache: Any, length: int) -> None:
    """Truncate a cache to a length."""
    if (over := cache.get_seq_length() - length) > 0:
        cache.crop(-over)


def _ranks_within_prompt(users: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of earlier tokens for the same prompt, shape (n,)."""
    order = np.argsort(users, kind="stable")
    counts = np.bincount(users)
    ranks = np.empty(len(users), dtype=np.int64)
    ranks[order] = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


# Reads token trees with any transformers model: a full row for every token whose logits are needed.
#
# Slower than `MaskedTree`, and correct for models that it does not support: sliding windows, recurrent
# layers, logits that are more than a matrix product, and encoder-decoders, whose prompt is read by the encoder
# once.


_TEXTS_PER_PASS = 64


class PlainTree:
    """A `TreeEngine` without a cache, for any model.

    Attributes:
        tokens: The number of computed tokens, without padding.
        forwards: The number of forward passes.
        head_rows: The number of rows of logits used.
    """

    def __init__(self, model: torch.nn.Module, pad: int, *, states: bool = False) -> None:
        """Create the tree engine.

        Args:
            model: A causal language model, or an encoder-decoder, in evaluation mode.
            pad: Any token id.
            states: Whether the model `can_score_states`: chosen logits are then computed in float32 whatever its dtype.
        """
        self._states = states
        self._torch = require("torch", "train")
        self._model, self._pad = model, pad
        self._paired = is_encoder_decoder(model.config)
        self._texts: list[tuple[int, ...]] = []
        self._users: list[int] = []
        self._encoded: Any = None
        self.tokens = self.forwards = self.head_rows = 0

    def open(self, prompts: Sequence[Sequence[int]], targets: LogprobQueries) -> Floats:
        """Read prompts; see `TreeEngine`."""
        self._users = list(range(len(prompts)))
        if not self._paired:
            self._texts = [tuple(prompt) for prompt in prompts]
            return self._answers(targets)
        ids, mask = pad_sequences(prompts, self._pad, self._model.device)
        with self._torch.inference_mode():
            self._encoded = self._model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        self._mask = mask
        self.tokens += int(mask.sum())
        self._texts = [(int(self._model.config.decoder_start_token_id),)] * len(prompts)
        return self._answers(targets)

    def feed(self, fed: TreeTokens, targets: LogprobQueries) -> Floats:
        """Add tokens, and compute the rows whose logits are needed; see `TreeEngine`."""
        for user, parent, token in zip(fed.users.tolist(), fed.parents.tolist(), fed.tokens.tolist(), strict=True):
            self._texts.append((*self._texts[parent], token))
            self._users.append(user)
        return self._answers(targets)

    def close(self) -> None:
        """Discard all texts."""
        self._texts, self._users, self._encoded = [], [], None

    def _answers(self, targets: LogprobQueries) -> Floats:
        torch, result = self._torch, np.empty(len(targets.tokens))
        used, group = np.unique(targets.after, return_inverse=True)
        for start in range(0, len(used), _TEXTS_PER_PASS):
            part = used[start : start + _TEXTS_PER_PASS].tolist()
            selected = np.flatnonzero((group >= start) & (group < start + len(part)))
            last = self._last(part)
            at = torch.from_numpy(group[selected] - start).to(last.device)
            ids = torch.from_numpy(targets.tokens[selected]).to(last.device)
            if self._states:
                with torch.inference_mode():
                    values = chosen_logprobs(self._model.get_output_embeddings(), last, at, ids)
            else:
                logits = last.float()
                values = (logits[at, ids] - logits.logsumexp(-1)[at]).double()
            result[selected] = values.cpu().numpy()
            self.head_rows += len(part)
        return result

    def _last(self, numbers: Sequence[int]) -> Any:
        """Return the last hidden states of the texts, shape (n, d), or their logits, shape (n, vocabulary)."""
        torch, texts = self._torch, [self._texts[n] for n in numbers]
        ids, mask = pad_sequences(texts, self._pad, self._model.device)
        ends = torch.tensor([len(text) - 1 for text in texts], device=ids.device)
        rows = torch.arange(len(texts), device=ids.device)
        self.tokens += sum(map(len, texts))
        self.forwards += 1
        with torch.inference_mode():
            if self._paired:
                owners = torch.tensor([self._users[n] for n in numbers], device=ids.device)
                out = self._decoder_outputs(ids, self._encoded[owners], self._mask[owners])
            # Padded on the right: with causal attention, no text attends to the padding.
            elif self._states:
                out = head_inputs(self._model, ids, attention_mask=mask)
            else:
                out = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return out[rows, ends]

    def _decoder_outputs(self, ids: torch.Tensor, encoded: Any, seen: Any) -> Any:
        if self._states:
            return head_inputs(self._model, ids, encoder_hidden_states=encoded, encoder_attention_mask=seen)
        out = self._model(encoder_outputs=(encoded,), attention_mask=seen, decoder_input_ids=ids, use_cache=False)
        return out.logits


# Reads prompts up to their last token, with a cache of the prefixes of recent prompts.
#
# Strategies with many prompts per request repeat its history in each of them. A prompt is read in
# blocks of fixed size and the cache is truncated at block ends, so that a block has the same shape and the same cache
# whether or not it was read before: a score does not depend on earlier prompts.


BLOCK_TOKENS = 64
"""Tokens per block. Smaller blocks share more prefixes, but need more and smaller matrix products."""
# Bytes of cached keys and values: for a small model all requests of a batch, for a large model a few.
_MAX_CACHE_BYTES = 768 << 20


@dataclass(slots=True)
class _CachedPrompt:
    """A cached prompt with its keys and values."""

    ids: list[int]
    cache: Any


class PrefixReader:
    """Reads prompts with a causal decoder whose cache can be truncated.

    Attributes:
        read: The number of computed tokens, without shared ones.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._torch, self._model = require("torch", "train"), model
        self._room = max(1, _MAX_CACHE_BYTES // cache_bytes_per_token(model.config, model.dtype.itemsize))
        self._known: list[_CachedPrompt] = []
        self.read = 0

    def last(self, ids: Sequence[int]) -> Any:
        """Return the last hidden state of a prompt, shape (1, d)."""
        return self._states(list(ids))[-1:]

    def tree(
        self, ids: Sequence[int], tokens: Sequence[int], sees: NDArray[np.bool_], depths: NDArray[np.int64]
    ) -> Any:
        """Return the hidden states of the last prompt token and of a token tree after it, shape (1 + t, d).

        Args:
            ids: The prompt.
            tokens: The tree, t of them, parents before children.
            sees: Which of them each one sees, shape (t, t); all see the prompt.
            depths: The number of ancestors of each, shape (t,).
        """
        torch, device = self._torch, self._model.device
        first = self._states(list(ids))[-1:]
        if not tokens:
            return first
        cache, dtype = self._known[-1].cache, self._model.dtype
        mask = torch.zeros((len(tokens), len(ids) + len(tokens)), dtype=dtype, device=device)
        mask[:, len(ids) :].masked_fill_(torch.from_numpy(~sees).to(device), torch.finfo(dtype).min)
        with torch.inference_mode():
            out = self._model.get_decoder()(
                input_ids=torch.tensor([list(tokens)], device=device),
                attention_mask=mask[None, None],
                position_ids=torch.from_numpy(len(ids) + depths)[None].to(device),
                past_key_values=cache,
                use_cache=True,
            )
        truncate_cache(out.past_key_values, len(ids))
        self._known[-1].cache = out.past_key_values
        self.read += len(tokens)
        return torch.cat([first, out.last_hidden_state[0]])

    def _states(self, ids: list[int]) -> Any:
        """Return the hidden states of the last block of a prompt, and cache the prompt."""
        torch = self._torch
        known, kept = self._like(ids)
        if kept:
            truncate_cache(known.cache, kept)
        states: Any = None
        with torch.inference_mode():
            for start in range(kept, len(ids), BLOCK_TOKENS):
                row = torch.tensor([ids[start : start + BLOCK_TOKENS]], device=self._model.device)
                out = self._model.get_decoder()(input_ids=row, past_key_values=known.cache, use_cache=True)
                states, known.cache = out.last_hidden_state, out.past_key_values
        known.ids = ids
        self.read += len(ids) - kept
        self._known.append(known)
        while len(self._known) > 1 and sum(len(item.ids) for item in self._known) > self._room:
            self._known.pop(0)
        return states[0]

    def _like(self, ids: list[int]) -> tuple[_CachedPrompt, int]:
        """Take the cached prefix of a prompt, and return its length.

        A cached prompt is consumed by the one that continues from it. One that shares less than half stays: it belongs
        to another user, and only the frame of the question is the same.
        """
        # The last token is always read, since its hidden state is the result.
        most = (len(ids) - 1) // BLOCK_TOKENS
        shared = [min(most, _common_prefix_length(ids, item.ids) // BLOCK_TOKENS) for item in self._known]
        best = max(range(len(shared)), key=lambda i: (shared[i], i), default=None)
        if best is None or 2 * shared[best] * BLOCK_TOKENS < len(ids):
            return _CachedPrompt([], None), 0
        return self._known.pop(best), shared[best] * BLOCK_TOKENS


def _common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two prompts."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


# Scores candidates after prompts: one tree of common prefixes per prompt, many prompts at a time.


@dataclass(frozen=True)
class CandidateTree:
    """The candidates for a prompt as a tree of common prefixes.

    Attributes:
        tokens: Every inner token once, parents before their children.
        parents: The parent of each token, counted from 1; 0 is the prompt.
        depths: The number of ancestors of each token.
        sees: The attention mask: each token sees its ancestors and itself, shape (tokens, tokens).
        owners: The candidate of every token of every candidate.
        after: The token that it follows, counted from 1; 0 is the prompt.
        targets: The token itself.
    """

    tokens: list[int]
    parents: list[int]
    depths: NDArray[np.int64]
    sees: NDArray[np.bool_]
    owners: NDArray[np.int64]
    after: NDArray[np.int64]
    targets: NDArray[np.int64]

    @staticmethod
    def of(tails: Sequence[tuple[int, ...]]) -> CandidateTree:
        """Build a tree from the tokens of candidates, in which common prefixes occur once."""
        numbers: dict[tuple[int, ...], int] = {(): 0}
        parents: list[int] = []
        owners, after, targets = [], [], []
        # Sorted by tokens: half precision depends on the column, and a score must not depend on the order of
        # candidates.
        for owner, tail in sorted(enumerate(tails), key=lambda pair: pair[1]):
            for end, token in enumerate(tail):
                before = tail[:end]
                if before not in numbers:
                    parents.append(numbers[before[:-1]])
                    numbers[before] = len(numbers)
                owners.append(owner)
                after.append(numbers[before])
                targets.append(token)
        prefixes = list(numbers)[1:]
        sees = np.eye(len(prefixes), dtype=bool)
        for number, parent in enumerate(parents):
            if parent:
                sees[number] |= sees[parent - 1]
        return CandidateTree(
            tokens=[prefix[-1] for prefix in prefixes],
            parents=parents,
            depths=np.array([len(prefix) - 1 for prefix in prefixes], dtype=np.int64),
            sees=sees,
            owners=np.array(owners, dtype=np.int64),
            after=np.array(after, dtype=np.int64),
            targets=np.array(targets, dtype=np.int64),
        )


def score_candidates(
    engine: TreeEngine, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[tuple[int, ...]]]
) -> list[list[float]]:
    """Return the log-probabilities of candidates after each prompt, computed for all prompts at once."""
    trees = [CandidateTree.of(tails) for tails in candidates]
    # Prompts have the first indices, followed by all fed tokens.
    begins = np.cumsum([len(prompts), *(len(tree.tokens) for tree in trees)])
    after = [np.where(tree.after == 0, n, tree.after - 1 + begins[n]) for n, tree in enumerate(trees)]
    parents = [
        np.where(np.array(tree.parents) == 0, n, np.array(tree.parents) - 1 + begins[n]) for n, tree in enumerate(trees)
    ]
    every, targets = np.concatenate(after), np.concatenate([tree.targets for tree in trees])
    order = np.argsort(every, kind="stable")
    first, later = order[every[order] < len(prompts)], order[every[order] >= len(prompts)]
    result = np.empty(len(order))
    try:
        result[first] = engine.open(prompts, LogprobQueries(every[first], targets[first]))
        if len(later):
            users = np.repeat(np.arange(len(prompts)), [len(tree.tokens) for tree in trees])
            tokens = np.array([token for tree in trees for token in tree.tokens])
            fed = TreeTokens(users, np.concatenate(parents).astype(np.int64), tokens)
            result[later] = engine.feed(fed, LogprobQueries(every[later], targets[later]))
    finally:
        engine.close()
    parts = np.split(result, np.cumsum([len(tree.targets) for tree in trees])[:-1])
    return [
        sum_by_candidate(part, tree.owners, len(tails))
        for part, tree, tails in zip(parts, trees, candidates, strict=True)
    ]


def sum_by_candidate(logprobs: NDArray[np.float64], owners: NDArray[np.int64], count: int) -> list[float]:
    """Sum the log-probabilities over the tokens of each candidate."""
    return [float(total) for total in np.bincount(owners, weights=logprobs, minlength=count)]
