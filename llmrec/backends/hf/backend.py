"""The transformers backend: exact candidate scores in one forward pass per prompt, and batched greedy decoding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.backends.encode import Encoder
from llmrec.backends.hf.tree import (
    BLOCK_TOKENS,
    CandidateTree,
    MaskedTree,
    PlainTree,
    PrefixReader,
    can_read_trees,
    can_score_states,
    head_inputs,
    pad_sequences,
    score_candidates,
    sum_by_candidate,
)
from llmrec.backends.search import search, single_token_labels
from llmrec.errors import BackendError, require
from llmrec.models.batching import group_by_length
from llmrec.models.exits import EarlyExits
from llmrec.models.memory import EVALUATION_ADVICE, convert_memory_errors
from llmrec.models.rating_head import RatingHead, last_states
from llmrec.models.traits import can_use_block_mask, chosen_logprobs, is_encoder_decoder
from llmrec.progress import count_answers
from llmrec.types import Capability, Completion, HeadRating, Prompt, Scores, SearchResult

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


# Streaming of generated text, and progress within a batch.


class TokenListener:
    """Receives the tokens for one prompt as transformers generates them (``BaseStreamer``).

    Args:
        encoder: Reads tokens.
        stop: The text that ends the answer; None: the end of turn does.
        listener: Receives the added text; a character is held back until all of its bytes are generated.
    """

    def __init__(self, encoder: Encoder, stop: str | None, listener: Callable[[str], None]) -> None:
        self._encoder, self._stop, self._listener = encoder, stop, listener
        self._ids: list[int] = []
        self._sent = 0
        self._prompt = True

    def put(self, value: Any) -> None:
        """Receive the prompt on the first call, then one token per call."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        text = self._encoder.completion(self._ids, self._stop, 0).text
        if len(text) > self._sent and not text.endswith("\ufffd"):
            self._listener(text[self._sent :])
            self._sent = len(text)

    def end(self) -> None:
        """Receive the end of the text."""


class TokenCounter:
    """Tracks the progress of a batch, for which transformers passes one token per prompt at a time."""

    def __init__(self, prompts: int, max_tokens: int) -> None:
        self._prompts, self._share = prompts, prompts / max_tokens
        self._noted = -self._share

    def put(self, value: Any) -> None:
        """Receive the prompts on the first call, then one token per prompt."""
        self._noted += self._share
        if self._noted:
            count_answers(self._share)

    def end(self) -> None:
        """Count the remaining tokens, which were not needed."""
        count_answers(self._prompts - self._noted)


log = logging.getLogger(__name__)

# Advice in the error if GPU memory is insufficient.
_with_memory_advice = convert_memory_errors("asking the model", EVALUATION_ADVICE, "eval.batch_tokens")
# Number of rows of logits converted to float32 at a time.
_ROWS = 256
# Tokens per forward pass on a CPU and on a GPU, where even a small pass takes tens of milliseconds.
_CPU_TOKENS, _GPU_TOKENS = 4096, 32768


class HFBackend:
    """Runs a causal language model or an encoder-decoder with transformers.

    Args:
        model: The loaded model, in any dtype, on any device.
        encoder: Its tokenizer and chat template.
        batch_tokens: Upper bound on the padded tokens of one forward pass; None: a default for the device.
        packed: Score all candidates of a prompt in one forward under a block mask. Models with sliding windows or
            recurrent layers, and encoder-decoders other than T5, do not support such a mask and are scored one row per
            candidate instead.
        head: The rating head trained with the model, if any.
        wide: Score the candidates of many prompts in each pass, instead of one prompt after the other with shared
            prefixes read once. None: on a GPU, where passes cost more than tokens.
        exit: The early exit for one-token labels, see `llmrec.models.exits.EarlyExits`; None: the last layer.

    Attributes:
        listener: Receives the text of a single prompt piece by piece while it is generated.
    """

    name = "hf"
    capabilities: frozenset[Capability] = frozenset({"generate", "score", "search", "rate"})

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: Encoder,
        *,
        batch_tokens: int | None = None,
        packed: bool | None = None,
        head: RatingHead | None = None,
        wide: bool | None = None,
        exit: float | None = None,
    ) -> None:
        self._torch = require("torch", "train")
        self.model = model.eval()
        self.model.generation_config = self._greedy_settings(model.generation_config, encoder)
        self.encoder = encoder
        on_gpu = model.device.type == "cuda"
        self.batch_tokens = batch_tokens or (_GPU_TOKENS if on_gpu else _CPU_TOKENS)
        self._wide = on_gpu if wide is None else wide
        _warn_position_scaling(model.config, encoder.max_length)
        self._paired = is_encoder_decoder(model.config)
        reads = can_read_trees(model) if self._paired else can_use_block_mask(model.config)
        self.packed = reads if packed is None else packed
        self._proven = packed is not None
        self._tree: Any = None
        self._prefixes: Any = None if self._paired else PrefixReader(self.model)
        self._head = head.to(model.device) if head is not None else None
        self.exits = None if exit is None else EarlyExits(self.model, exit)
        self.listener: Callable[[str], None] | None = None

    @_with_memory_advice
    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Decode greedily, in batches of similar length; see `Backend.generate`."""
        encoded = [self.encoder.prompt(prompt) for prompt in prompts]
        answers: dict[int, Completion] = {}
        for stop in {prompt.stop for prompt in prompts}:
            chosen = [i for i, prompt in enumerate(prompts) if prompt.stop == stop]
            for batch in group_by_length([len(encoded[i]) + max_tokens for i in chosen], self.batch_tokens):
                rows = [chosen[j] for j in batch]
                for i, completion in zip(rows, self._decode([encoded[i] for i in rows], stop, max_tokens), strict=True):
                    answers[i] = completion
        return [answers[i] for i in range(len(prompts))]

    @_with_memory_advice
    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        """Compute exact candidate scores over the full vocabulary; see `Backend.score`."""
        encoded = [self.encoder.prompt(prompt) for prompt in prompts]
        tails = [
            self.encoder.continuations(prompt, ids, texts, closed=closed)
            for prompt, ids, texts in zip(prompts, encoded, candidates, strict=True)
        ]
        if self._wide and self._states and self.exits is None:
            return self._score_wide(encoded, tails, closed=closed)
        scores: dict[int, Scores] = {}
        # Sort prompts so that those with a common prefix are adjacent and the prefix is read once.
        for i in sorted(range(len(prompts)), key=lambda i: encoded[i]):
            ids, texts = encoded[i], tails[i]
            labels = None if self._paired else single_token_labels(texts, closed=closed)
            if labels is not None:
                prompt, texts = ids + list(labels.shared), [(token,) for token in labels.distinct]
                if self.exits is not None:
                    result, route = self.exits.score(prompt, labels.distinct), "hf:exit"
                else:
                    result, route = self._score_labels(prompt, labels.distinct), "hf:one-token"
            else:
                if self.exits is not None:
                    self.exits.whole += 1
                if self._can_pack(ids, texts):
                    result, route = self._score_packed(ids, texts), "hf:tree"
                else:
                    result, route = self._score_rows(ids, texts), "hf:rows"
            scores[i] = _candidate_scores(result, ids, texts, route)
            count_answers(1)
        return [scores[i] for i in range(len(prompts))]

    def _score_wide(
        self, encoded: Sequence[list[int]], tails: Sequence[Sequence[tuple[int, ...]]], *, closed: bool
    ) -> list[Scores]:
        """Score the candidates of many prompts in each pass, in batches of prompts of similar length."""
        trees = self._can_read_trees()
        engine = self._masked_tree() if trees else self._row_engine()
        labels = [None if self._paired else single_token_labels(tail, closed=closed) for tail in tails]
        prompts = [ids if label is None else [*ids, *label.shared] for ids, label in zip(encoded, labels, strict=True)]
        behind = [
            tail if label is None else [(token,) for token in label.distinct]
            for tail, label in zip(tails, labels, strict=True)
        ]
        result: dict[int, Scores] = {}
        lengths = [len(ids) + sum(map(len, tail)) for ids, tail in zip(prompts, behind, strict=True)]
        for batch in group_by_length(lengths, self.batch_tokens):
            values = score_candidates(engine, [prompts[i] for i in batch], [behind[i] for i in batch])
            for i, logprobs in zip(batch, values, strict=True):
                name = "hf:one-token" if labels[i] else "hf:tree" if trees else "hf:rows"
                result[i] = _candidate_scores(logprobs, encoded[i], behind[i], name)
            count_answers(len(batch))
        return [result[i] for i in range(len(encoded))]

    @_with_memory_advice
    def search(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        *,
        k: int,
        width: int,
        excluded: Sequence[Sequence[int]] = (),
        exact: bool = False,
    ) -> list[SearchResult]:
        """Search a catalogue, in batches of similar length; see `Backend.search`."""
        tree = self._can_read_trees()
        if self._tree is None:
            self._tree = self._masked_tree() if tree else self._row_engine()
        return search(
            self._tree,
            self.encoder,
            prompts,
            texts,
            k=k,
            width=width,
            excluded=excluded,
            exact=exact,
            engine="hf:tree" if tree else "hf:rows",
            batch_tokens=self.batch_tokens,
        )

    @_with_memory_advice
    def rate(self, prompts: Sequence[Prompt]) -> list[HeadRating]:
        """Predict ratings in batches of similar length, with one forward pass each; see `HeadBackend.rate`."""
        if self._head is None:
            raise BackendError(
                "this model was fine-tuned without tasks.rating.head, so it has no rating head; remove 'head' from "
                "tasks.rating.strategies, or fine-tune a model with tasks.rating.head",
                kind="unsupported",
                column="tasks.rating.strategies",
            )
        torch, encoded = self._torch, [self.encoder.prompt(prompt) for prompt in prompts]
        result: dict[int, HeadRating] = {}
        for batch in group_by_length([len(ids) for ids in encoded], self.batch_tokens):
            ids, mask = self._padded([encoded[i] for i in batch])
            with torch.inference_mode():
                values = self._head.ratings(last_states(self.model, ids, mask))
            for i, value in zip(batch, values, strict=True):
                result[i] = HeadRating(value=value, prompt_tokens=len(encoded[i]), engine="hf:head")
            count_answers(len(batch))
        return [result[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Free the model, and log how many scored answers could not use an early exit."""
        if self.exits is not None and self.exits.whole:
            log.warning(
                "eval.exit: %d of %d scored prompts used all layers, because their answers are not one-token labels "
                "for this tokenizer",
                self.exits.whole,
                self.exits.whole + self.exits.taken.total(),
            )
            self.exits.whole = 0
        self.model = self._tree = self._prefixes = None

    def _greedy_settings(self, stored: Any, encoder: Encoder) -> Any:
        """Return settings for greedy decoding.

        Other settings of generation_config.json, such as beams, penalties or suppressed tokens, would change answers
        here but not in other engines.
        """
        transformers = require("transformers", "train")
        begins = ("bos_token_id", "decoder_start_token_id")
        return transformers.GenerationConfig(
            **{name: getattr(stored, name, None) for name in begins},
            do_sample=False,
            eos_token_id=sorted(encoder.stop_ids),
            pad_token_id=encoder.tokenizer.pad_token_id,
        )

    def _can_read_trees(self) -> bool:
        """Test whether a token tree can be computed as one sequence."""
        if self.packed and not self._proven:
            some = [self.encoder.piece(text) for text in ("one two", "three")]
            self._can_pack(list(self.encoder.piece("a b c")), some)
        return self.packed and can_read_trees(self.model)

    def _can_pack(self, ids: list[int], tails: Sequence[tuple[int, ...]]) -> bool:
        """Test whether candidates can be packed into one sequence, since a model may ignore the mask."""
        if self.packed and not self._proven and len(tails) > 1:
            some = tails[-2:]
            pairs = zip(self._score_packed(ids, some), self._score_rows(ids, some), strict=True)
            loose = self.model.dtype != self._torch.float32
            self.packed = all(abs(a - b) <= (1.0 + 0.02 * abs(b) if loose else 0.01) for a, b in pairs)
            self._proven = True
            if not self.packed:
                log.warning("this model ignores custom attention masks, so candidates are scored one by one")
        return self.packed

    def _decode(self, prompts: list[list[int]], stop: str | None, max_tokens: int) -> list[Completion]:
        torch, tokenizer = self._torch, self.encoder.tokenizer
        rows, mask = self._padded(prompts)
        options: dict[str, Any] = {} if stop is None else {"stop_strings": [stop], "tokenizer": tokenizer}
        streamer: TokenCounter | TokenListener = TokenCounter(len(prompts), max_tokens)
        if self.listener is not None and len(prompts) == 1 and not self._paired:
            streamer = TokenListener(self.encoder, stop, self.listener)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=rows,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                streamer=streamer,
                **options,
            )
        # The output of an encoder-decoder has no prompt and begins with the start token of the decoder.
        begin = 1 if self._paired else rows.shape[1]
        return [
            self.encoder.completion(row[begin:].tolist(), stop, len(ids))
            for row, ids in zip(output, prompts, strict=True)
        ]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """Return prompts padded on the left, or on the right for an encoder, with their mask."""
        # A decoder continues at the end of the prompt; an encoder counts positions from its beginning.
        return pad_sequences(prompts, self.encoder.tokenizer.pad_token_id, self.model.device, left=not self._paired)

    def _score_labels(self, ids: list[int], labels: Sequence[int]) -> list[float]:
        torch, device = self._torch, self.model.device
        targets = torch.tensor(list(labels), device=device)
        row = torch.tensor([ids], device=device)
        with torch.inference_mode():
            if not self._states:
                logits = self.model(input_ids=row, logits_to_keep=1).logits
                return [float(item) for item in _picked_logprobs(logits[0, -1].expand(len(labels), -1), targets)]
            states = self._prefixes.last(ids) if self._can_read_trees() else head_inputs(self.model, row)[0, -1:]
            result = chosen_logprobs(self.model.get_output_embeddings(), states, torch.zeros_like(targets), targets)
        return [float(item) for item in result]

    def _score_packed(self, ids: list[int], tails: Sequence[tuple[int, ...]]) -> list[float]:
        """Score candidates with one forward pass over the prompt and a tree of candidates.

        Common prefixes are computed once, and the last token of a candidate is not needed. Logits are computed for the
        prompt's last token and the tokens of the tree.
        """
        torch, device, start = self._torch, self.model.device, len(ids)
        if self._paired:
            return score_candidates(self._masked_tree(), [ids], [tails])[0]
        tree = CandidateTree.of(tails)
        after, targets = (torch.from_numpy(item).to(device) for item in (tree.after, tree.targets))
        if self._states and len(tree.tokens) <= BLOCK_TOKENS:
            # Few tokens after the prompt: answers such as yes and no, whose prompts share prefixes.
            states = self._prefixes.tree(ids, tree.tokens, tree.sees, tree.depths)
            with torch.inference_mode():
                result = chosen_logprobs(self.model.get_output_embeddings(), states, after, targets).cpu().numpy()
            return sum_by_candidate(result, tree.owners, len(tails))
        size = start + len(tree.tokens)
        seen = np.tri(size, start, dtype=bool)
        seen = np.hstack([seen, np.vstack([np.zeros((start, len(tree.tokens)), dtype=bool), tree.sees])])
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        mask.masked_fill_(torch.from_numpy(~seen).to(device), torch.finfo(dtype).min)
        positions = np.concatenate([np.arange(start), start + tree.depths])
        inputs = {
            "input_ids": torch.tensor([[*ids, *tree.tokens]], device=device),
            "attention_mask": mask[None, None],
            "position_ids": torch.from_numpy(positions)[None].to(device),
            "use_cache": False,
        }
        with torch.inference_mode():
            if self._states:
                states = self.model.get_decoder()(**inputs).last_hidden_state[0, start - 1 :]
                result = chosen_logprobs(self.model.get_output_embeddings(), states, after, targets).cpu().numpy()
            else:
                kept = torch.arange(start - 1, size, device=device)
                logits = self.model(**inputs, logits_to_keep=kept).logits[0]
                totals = torch.cat([part.float().logsumexp(-1) for part in logits.split(_ROWS)])
                result = (logits[after, targets].float() - totals[after]).double().cpu().numpy()
        return sum_by_candidate(result, tree.owners, len(tails))

    def _score_rows(self, ids: list[int], tails: Sequence[tuple[int, ...]]) -> list[float]:
        """Score each candidate as a full sequence (the reference implementation)."""
        torch = self._torch
        if self._paired:
            return score_candidates(self._row_engine(), [ids], [tails])[0]
        results = []
        for tail in tails:
            row = torch.tensor([ids + list(tail)], device=self.model.device)
            targets = row[0, len(ids) :]
            with torch.inference_mode():
                if self._states:
                    states, after = head_inputs(self.model, row)[0, len(ids) - 1 : -1], torch.arange(len(tail))
                    head = self.model.get_output_embeddings()
                    result = chosen_logprobs(head, states, after.to(row.device), targets)
                else:
                    logits = self.model(input_ids=row, logits_to_keep=len(tail) + 1, use_cache=False).logits[0, :-1]
                    result = _picked_logprobs(logits, targets).double()
                results.append(float(result.sum()))
        return results

    @cached_property
    def _states(self) -> bool:
        return can_score_states(self.model)

    def _masked_tree(self) -> MaskedTree:
        return MaskedTree(self.model, self.encoder.tokenizer.pad_token_id)

    def _row_engine(self) -> PlainTree:
        return PlainTree(self.model, self.encoder.tokenizer.pad_token_id, states=self._states)


def _warn_position_scaling(config: PretrainedConfig, longest: int) -> None:
    """Warn if position scaling depends on the longest prompt of a batch."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    known = int(
        rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None) or longest
    )
    if rope.get("rope_type") in ("dynamic", "longrope") and longest > known:
        log.warning(
            "this model rescales positions in batches with a row of more than %d tokens, so scores of prompts near "
            "model.max_length=%d depend on the batch; set model.max_length=%d to avoid this",
            known,
            longest,
            known,
        )


def _candidate_scores(
    logprobs: Sequence[float], ids: Sequence[int], tails: Sequence[tuple[int, ...]], engine: str
) -> Scores:
    lengths = tuple(len(tail) for tail in tails)
    return Scores(logprobs=tuple(logprobs), tokens=lengths, prompt_tokens=len(ids), engine=engine)


def _picked_logprobs(logits: torch.Tensor, ids: Any) -> Any:
    """Return the full-softmax log-probability of each chosen id, float32, shape (n,)."""
    logits = logits.float()
    return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)
