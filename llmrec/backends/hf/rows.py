"""Reads trees of tokens with any transformers model: a whole row for every token that something is wanted after.

Slower than `llmrec.backends.hf.tree`, and right for models that it cannot serve: sliding windows, recurrent layers,
logits that are more than a matrix product, and encoder-decoders, whose prompt is read by the encoder once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmrec.backends.hf.bodies import states_of
from llmrec.decode.beam import Fed, Floats, Wanted
from llmrec.errors import require
from llmrec.models.traits import chosen_logprobs

_ROWS = 64


class PlainTree:
    """A `TreeEngine` that keeps no cache.

    Attributes:
        tokens: Tokens that were computed, padding left out.
        forwards: Passes through the model.
        head_rows: Rows of logits that were wanted.
    """

    def __init__(self, model: Any, pad: int, *, states: bool = False) -> None:
        """Set up.

        Args:
            model: A causal language model, or an encoder-decoder, in evaluation mode.
            pad: Any token id.
            states: The model `reads_states`: chosen logits are then computed in float32 whatever its dtype.
        """
        self._states = states
        self._torch = require("torch", "train")
        self._model, self._pad = model, pad
        self._paired = bool(model.config.is_encoder_decoder)
        self._texts: list[tuple[int, ...]] = []
        self._users: list[int] = []
        self._encoded: Any = None
        self.tokens = self.forwards = self.head_rows = 0

    def open(self, prompts: Sequence[Sequence[int]], wanted: Wanted) -> Floats:
        """Read prompts; see `TreeEngine`."""
        self._users = list(range(len(prompts)))
        if not self._paired:
            self._texts = [tuple(prompt) for prompt in prompts]
            return self._answers(wanted)
        ids, mask = self._padded([tuple(prompt) for prompt in prompts])
        with self._torch.inference_mode():
            self._encoded = self._model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        self._mask = mask
        self.tokens += int(mask.sum())
        self._texts = [(int(self._model.config.decoder_start_token_id),)] * len(prompts)
        return self._answers(wanted)

    def feed(self, fed: Fed, wanted: Wanted) -> Floats:
        """Note tokens, and read the rows that something is wanted after; see `TreeEngine`."""
        for user, parent, token in zip(fed.users.tolist(), fed.parents.tolist(), fed.tokens.tolist(), strict=True):
            self._texts.append((*self._texts[parent], token))
            self._users.append(user)
        return self._answers(wanted)

    def close(self) -> None:
        """Forget everything."""
        self._texts, self._users, self._encoded = [], [], None

    def _answers(self, wanted: Wanted) -> Floats:
        torch, found = self._torch, np.empty(len(wanted.tokens))
        used, group = np.unique(wanted.after, return_inverse=True)
        for start in range(0, len(used), _ROWS):
            part = used[start : start + _ROWS].tolist()
            here = np.flatnonzero((group >= start) & (group < start + len(part)))
            last = self._last(part)
            at = torch.from_numpy(group[here] - start).to(last.device)
            ids = torch.from_numpy(wanted.tokens[here]).to(last.device)
            if self._states:
                with torch.inference_mode():
                    values = chosen_logprobs(self._model.get_output_embeddings(), last, at, ids)
            else:
                logits = last.float()
                values = (logits[at, ids] - logits.logsumexp(-1)[at]).double()
            found[here] = values.cpu().numpy()
            self.head_rows += len(part)
        return found

    def _last(self, numbers: Sequence[int]) -> Any:
        """Return the states after the texts with these numbers, shape (n, d), or the logits, shape (n, vocabulary)."""
        torch, texts = self._torch, [self._texts[n] for n in numbers]
        ids, mask = self._padded(texts)
        ends = torch.tensor([len(text) - 1 for text in texts], device=ids.device)
        rows = torch.arange(len(texts), device=ids.device)
        self.tokens += sum(map(len, texts))
        self.forwards += 1
        with torch.inference_mode():
            if self._paired:
                owners = torch.tensor([self._users[n] for n in numbers], device=ids.device)
                out = self._paired_last(ids, self._encoded[owners], self._mask[owners])
            # Padded on the right: under causal attention no text sees what follows it.
            elif self._states:
                out = states_of(self._model, ids, attention_mask=mask)
            else:
                out = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return out[rows, ends]

    def _paired_last(self, ids: Any, encoded: Any, seen: Any) -> Any:
        if self._states:
            return states_of(self._model, ids, encoder_hidden_states=encoded, encoder_attention_mask=seen)
        out = self._model(encoder_outputs=(encoded,), attention_mask=seen, decoder_input_ids=ids, use_cache=False)
        return out.logits

    def _padded(self, texts: Sequence[tuple[int, ...]]) -> tuple[Any, Any]:
        torch, longest = self._torch, max(map(len, texts))
        ids = torch.tensor([[*text, *[self._pad] * (longest - len(text))] for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        return ids.to(self._model.device), mask.to(self._model.device)
