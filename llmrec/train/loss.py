"""Training losses, computed only at positions with labels.

The language-model head is the widest matrix of a small model; applying it only to labelled positions, a few
hundred at a time, keeps its cost and memory proportional to the number of targets. Losses are summed here;
`llmrec.train.sft` divides them by a step's targets. The loss of a rating head is
`llmrec.train.heads.RatingHeadLoss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from llmrec.backends.encode import IGNORED
from llmrec.decode.token_tree import TokenTrie
from llmrec.models import exits
from llmrec.models.tensors import base_of
from llmrec.models.traits import is_encoder_decoder, is_plain_head
from llmrec.tasks.rows import ListLoss

# Number of rows of logits at a time, and of hidden states per step whose similarities are compared (n by n).
_CHUNK, _RELATED = 256, 1024

HeadlessLoss = Callable[[Any, Any], Any]
"""Summed loss of hidden states, shape (n, d), and labels, shape (n,); it replaces the language-model head."""


@dataclass(frozen=True, slots=True)
class ExitLoss:
    """A loss on the hidden states after every layer, weighted by depth; see `llmrec.models.exits`.

    Attributes:
        inner: The loss of the states of one depth; None: the language-model head's.
        distill: Before the last layer, the share of the loss whose target is the last layer's distribution over tokens,
            without gradient, instead of the answer (Hinton et al., arXiv 1503.02531, at temperature 1).
    """

    inner: HeadlessLoss | None
    distill: float = 0.0


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """Distillation loss with a frozen teacher that has the same vocabulary.

    Attributes:
        teacher: A causal language model with a plain head over the same vocabulary.
        share: The share of the loss whose target is the teacher's distribution over tokens (Hinton et al., arXiv
            1503.02531, at temperature 1).
        relations: Weight of the similarity-preserving loss; see `similarity_loss`.
    """

    teacher: Any
    share: float
    relations: float = 0.0


@dataclass(frozen=True, slots=True)
class ItemLoss:
    """Cross-entropy in which the softmax for an item token runs only over item tokens.

    Sequential recommenders use the same loss (SASRec, arXiv 1808.09781, section III-E, with a softmax over all items).
    So the model need not learn to exclude the other tokens.

    Attributes:
        tokens: Ids of the item tokens, ascending.
    """

    tokens: tuple[int, ...]


StateLoss = HeadlessLoss | ExitLoss | DistillationLoss | ItemLoss
"""A loss of hidden states in place of the plain loss of the language-model head."""


def similarity_loss(states: torch.Tensor, teacher: Any) -> torch.Tensor:
    """Return the mean squared difference between pairwise similarities of student and teacher states, from 0 to 4.

    Rows of the similarity matrices, normalised to length 1, are compared: similarity-preserving distillation (Tung and
    Mori, arXiv 1907.09682, equations 1 to 3), times the number of states. Widths may differ.

    Args:
        states: Shape (n, d).
        teacher: Shape (n, other d).
    """
    with torch.autocast(states.device.type, enabled=False):
        alike = (item.float() @ item.float().T for item in (states, teacher))
        student, target = (torch.nn.functional.normalize(item, dim=1) for item in alike)
        return (student - target).square().sum(dim=1).mean()


class _ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Cross-entropy through a head, with gradients computed in the forward pass.

    Each chunk of logits is turned into d(loss)/d(hidden) = (softmax - target) W at once, so logits are freed with their
    chunk and never recomputed. The trained part of the head gets its gradient from the same chunk,
    (softmax - target)' hidden: the whole head, or the rows of new tokens in the columns of these tokens.

    The target is 1 at the answer. With a teacher's states, ``share`` of it is their distribution instead, through the
    same head or the teacher's own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        rows: Any = None,
        indices: Any = None,
        counts: Any = None,
        teacher: Any = None,
        share: float = 0.0,
        head: Any = None,
    ) -> Any:
        grad = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_rows = None if rows is None else torch.zeros_like(rows)
        if rows is not None:
            weight = weight.index_copy(0, indices, rows.to(weight.dtype))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Under autocast, each product would convert the whole head again.
        kind, dtype = hidden.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            weight = weight.to(torch.get_autocast_dtype(kind))
        head = weight if head is None else head
        for start in range(0, len(hidden), _CHUNK):
            states, answers = hidden[start : start + _CHUNK], targets[start : start + _CHUNK, None]
            logits = (states @ weight.T).float()
            peak = logits.amax(-1, keepdim=True)
            picked = (1 - share) * logits.gather(-1, answers)
            taught = None
            if teacher is not None:
                taught = (teacher[start : start + _CHUNK] @ head.T).float().softmax(-1).mul_(share)
                picked = picked + (taught * logits).sum(-1, keepdim=True)
            logits.sub_(peak).exp_()
            mass = logits.sum(-1, keepdim=True)
            losses = peak + mass.log() - picked
            logits.div_(mass).scatter_add_(-1, answers, torch.full_like(picked, share - 1.0))
            if taught is not None:
                logits.sub_(taught)
            if counts is not None:
                scale = counts[start : start + _CHUNK, None]
                losses, logits = losses * scale, logits.mul_(scale)
            total += losses.sum()
            grad[start : start + _CHUNK] = logits.to(dtype) @ weight
            if grad_rows is not None:
                grad_rows += logits[:, indices].T @ states.float()
            if grad_weight is not None:
                grad_weight += logits.to(dtype).T @ states
        ctx.save_for_backward(grad, grad_weight, grad_rows)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        grad, *rest = ctx.saved_tensors
        grad_weight, grad_rows = (None if item is None else item * upstream[0].to(item.dtype) for item in rest)
        return grad * upstream[0].to(grad.dtype), grad_weight, None, grad_rows, None, None, None, None, None


def label_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    by: StateLoss | None = None,
    weights: Any = None,
) -> tuple[Any, float]:
    """Return the summed cross-entropy at positions with labels, and their number or total weight.

    Args:
        model: A causal language model, with or without PEFT adapters.
        input_ids: Token ids, right-padded, shape (rows, length). No attention mask is needed: under causal
            attention no position sees the padding that follows it.
        labels: Same shape; -100 where there is no loss.
        by: The loss of the states before labels; None: that of the language-model head.
        weights: Weight of each target of a row, shape (rows,); None: 1.
    """
    labelled = labels[:, 1:] != IGNORED
    counts = None if weights is None else weights[:, None].expand_as(labelled)[labelled]
    targets = labels[:, 1:][labelled]
    return _loss_at_targets(
        model, {"input_ids": input_ids}, lambda states: states[:, :-1][labelled], targets, by, counts
    )


def encoder_decoder_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    weights: Any = None,
) -> tuple[Any, float]:
    """Return the summed cross-entropy of an encoder-decoder's targets, and their number or total weight.

    Args:
        model: An encoder-decoder, with or without PEFT adapters.
        input_ids: Sources, right-padded, shape (rows, longest source).
        attention_mask: 1 on tokens, 0 on padding, same shape.
        labels: Targets, shape (rows, longest target); -100 after their ends. The decoder reads them shifted by one,
            after its start token; with causal attention no target sees the padding.
        weights: Weight of each target of a row, shape (rows,); None: 1.
    """
    before = labels.new_full(labels.shape, int(model.config.decoder_start_token_id))
    # Padding may be any id; here it is the start token.
    before[:, 1:] = torch.where(labels[:, :-1] == IGNORED, before[:, 1:], labels[:, :-1])
    logits = model(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=before, use_cache=False).logits
    labelled = labels != IGNORED
    counts = None if weights is None else weights[:, None].expand_as(labelled)[labelled]
    total = cross_entropy(logits[labelled], labels[labelled], counts)
    return total, int(labelled.sum()) if counts is None else float(counts.sum())


def rows_loss(model: torch.nn.Module, inputs: Mapping[str, Any], by: StateLoss | None = None) -> tuple[Any, float]:
    """Return the summed loss over the targets of examples and their total weight, for any kind of model.

    ``by`` is that of `label_loss`; not supported for an encoder-decoder.
    """
    return (
        encoder_decoder_loss(model, **inputs)
        if is_encoder_decoder(model.config)
        else label_loss(model, **inputs, by=by)
    )


def packed_loss(model: torch.nn.Module, packed: Mapping[str, Any], by: StateLoss | None = None) -> tuple[Any, float]:
    """Return the summed cross-entropy over the targets of packed sequences and their total weight; see `label_loss`.

    ``packed`` has the fields of a batch of `llmrec.train.packing.PackedSequence` as tensors, by name. The model takes
    block masks.
    """
    after, targets = packed["after"], packed["targets"]
    return _loss_at_targets(
        model,
        _packed_inputs(model, packed),
        lambda states: states.flatten(0, 1)[after],
        targets,
        by,
        packed.get("weights"),
    )


def total_target_weight(inputs: Mapping[str, Any], by: StateLoss | None = None, *, paired: bool = False) -> float:
    """Return the total weight of the targets: the divisor of the summed loss of `rows_loss` or `packed_loss`."""
    labels = inputs["targets"] if "targets" in inputs else inputs["labels"][:, 0 if paired else 1 :]
    labelled = labels != IGNORED
    weights = inputs.get("weights") if _takes_weights(by) else None
    if weights is None:
        return float(labelled.sum())
    return float((weights if weights.shape == labelled.shape else weights[:, None] * labelled).sum())


def _takes_weights(by: StateLoss | None) -> bool:
    """Whether targets are weighted; a loss of classes ignores weights."""
    inner = by.inner if isinstance(by, ExitLoss) else by
    return inner is None or isinstance(inner, (DistillationLoss, ItemLoss))


@dataclass(frozen=True)
class AllowedTokens:
    """The tokens allowed at each target of packed sequences, given the token tree of a catalogue.

    Attributes:
        sets: Sets of legal tokens, as tensors.
        which: The index of the set of each target, shape (targets,).
    """

    sets: Sequence[Any]
    which: Any

    @staticmethod
    def of(catalogue: TokenTrie, items: Sequence[int], device: Any) -> AllowedTokens:
        """Return the allowed tokens along the token paths of items, in the order of their rows."""
        numbers: dict[tuple[int, ...], int] = {}
        sets, which = [], []  # type: list[Any], list[int]
        for item in items:
            path: tuple[int, ...] = ()
            for token, legal in catalogue.choices(int(catalogue.ranks[item])):
                if path not in numbers:
                    numbers[path] = len(sets)
                    sets.append(torch.from_numpy(legal).to(device))
                which.append(numbers[path])
                path = (*path, token)
        return AllowedTokens(sets, torch.tensor(which, device=device))

    def masked(self, logits: torch.Tensor, which: Any) -> torch.Tensor:
        """Set the logits of tokens that are not allowed to -inf, shape (n, vocabulary)."""
        used, rows = which.unique(return_inverse=True)
        barred = torch.ones((len(used), logits.shape[-1]), dtype=torch.bool, device=logits.device)
        for row, number in enumerate(used.tolist()):
            barred[row, self.sets[number]] = False
        return logits.masked_fill(barred[rows], -torch.inf)


def target_losses(
    model: torch.nn.Module, packed: Mapping[str, Any], *, temperature: float = 1.0, legal: AllowedTokens | None = None
) -> torch.Tensor:
    """Return the cross-entropy of every target of packed sequences, float32, shape (targets,).

    Logits are recomputed in the backward pass, a few hundred targets at a time.

    Args:
        model: See `packed_loss`.
        packed: See there.
        temperature: Divisor of the logits.
        legal: Renormalise over the legal tokens at each target; None: over the vocabulary.
    """
    base = base_of(model)
    after, answers, inputs = packed["after"], packed["targets"], _packed_inputs(model, packed)
    which = answers if legal is None else legal.which

    def entropies(logits: torch.Tensor, targets: torch.Tensor, sets: Any) -> torch.Tensor:
        logits = logits.float() / temperature
        if legal is not None:
            logits = legal.masked(logits, sets)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    head, rows, indices = _head_parts(base)
    if not is_plain_head(base.config, head):
        return entropies(model(**inputs, use_cache=False).logits.flatten(0, 1)[after], answers, which)
    hidden = base.get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[after]
    weight = head.weight if rows is None else head.weight.index_copy(0, indices, rows.to(head.weight.dtype))

    def losses(states: torch.Tensor, targets: torch.Tensor, sets: Any) -> torch.Tensor:
        return entropies(states.to(weight.dtype) @ weight.T, targets, sets)

    parts = zip(hidden.split(_CHUNK), answers.split(_CHUNK), which.split(_CHUNK), strict=True)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


def _packed_inputs(model: torch.nn.Module, packed: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the model inputs for packed sequences."""
    mask = block_mask(model, packed["ends"])
    return {"input_ids": packed["ids"], "position_ids": packed["positions"], "attention_mask": mask}


def block_mask(model: torch.nn.Module, ends: Any) -> torch.Tensor:
    """Return the attention mask of packed sequences, shape (rows, 1, columns, columns).

    Args:
        model: The model; its attention implementation decides between a boolean and an additive mask.
        ends: Where the subtree of each column ends, shape (rows, columns).
    """
    columns = torch.arange(ends.shape[1], device=ends.device)
    seen = (columns <= columns[:, None]) & (columns[:, None] < ends[:, None, :])
    if getattr(model.config, "_attn_implementation", "sdpa") == "sdpa":
        return seen[:, None]
    numbers = torch.zeros(seen.shape, dtype=model.dtype, device=ends.device)
    return numbers.masked_fill_(~seen, torch.finfo(model.dtype).min)[:, None]


def _loss_at_targets(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    pick: Callable[[Any], Any],
    targets: torch.Tensor,
    by: StateLoss | None,
    counts: Any = None,
) -> tuple[Any, float]:
    """Return the summed loss of targets and their total weight."""
    base = base_of(model)
    count = float(counts.sum()) if counts is not None and _takes_weights(by) else len(targets)
    if isinstance(by, ExitLoss):
        results = [pick(states) for states in exits.states_by_depth(base, **inputs)]
        scales, last = exits.exit_weights(len(results)), results[-1].detach()

        def loss(states: torch.Tensor) -> torch.Tensor:
            if by.inner is not None:
                return by.inner(states, targets)
            taught = (last, by.distill) if by.distill and states is not results[-1] else ()
            return _vocabulary_loss(base, states, targets, counts, *taught)

        return sum(scale * loss(states) for scale, states in zip(scales, results, strict=True)), count
    if by is None and not is_plain_head(base.config, _head_parts(base)[0]):
        return cross_entropy(pick(model(**inputs, use_cache=False).logits), targets, counts), count
    states = pick(base.get_decoder()(**inputs, use_cache=False).last_hidden_state)
    if by is None:
        return _vocabulary_loss(base, states, targets, counts), count
    if isinstance(by, ItemLoss):
        return _item_loss(base, states, targets, by, counts), count
    if not isinstance(by, DistillationLoss):
        return by(states, targets), count
    with torch.no_grad():
        taught = pick(by.teacher.get_decoder()(**inputs, use_cache=False).last_hidden_state)
    total = _vocabulary_loss(base, states, targets, counts, taught, by.share, by.teacher.get_output_embeddings().weight)
    if by.relations and len(targets):
        total = total + by.relations * count * similarity_loss(states[:_RELATED], taught[:_RELATED])
    return total, count


def _item_loss(
    base: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, by: ItemLoss, counts: torch.Tensor
) -> torch.Tensor:
    """Return the summed loss of targets, with item tokens as in `ItemLoss`."""
    head, rows, indices = _head_parts(base)
    tokens = torch.tensor(by.tokens, device=targets.device)
    # Adapters train only the rows of item tokens, in ascending order; otherwise all rows of the head are trained.
    items = head.weight[tokens] if rows is None else rows[indices.argsort()]
    chosen = torch.isin(targets, tokens)
    total = torch.zeros((), dtype=torch.float32, device=targets.device)
    if chosen.any():
        own = None if counts is None else counts[chosen]
        total = _ChunkedCrossEntropy.apply(
            hidden[chosen].to(items.dtype), items, torch.searchsorted(tokens, targets[chosen]), None, None, own
        )
    if not chosen.all():
        rest = None if counts is None else counts[~chosen]
        total = total + _vocabulary_loss(base, hidden[~chosen], targets[~chosen], rest)
    return total


def _vocabulary_loss(
    base: torch.nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    counts: torch.Tensor,
    teacher: Any = None,
    share: float = 0.0,
    by: Any = None,
) -> torch.Tensor:
    """Return the summed cross-entropy of hidden states, shape (n, d), through a linear head in chunks."""
    head, rows, indices = _head_parts(base)
    kind = head.weight.dtype
    taught, other = (None if item is None else item.to(kind) for item in (teacher, by))
    return _ChunkedCrossEntropy.apply(
        hidden.to(kind), head.weight, targets, rows, indices, counts, taught, share, other
    )


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, counts: Any = None) -> torch.Tensor:
    """Return the summed, weighted cross-entropy in float32; shapes (n, vocabulary), (n,), (n,)."""
    if counts is None:
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return (torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none") * counts).sum()


def list_loss(
    model: torch.nn.Module, packed: Mapping[str, Any], size: int, kind: ListLoss, temperature: float = 1.0
) -> tuple[Any, float]:
    """Return the summed loss over candidate lists, and the number of lists.

    Args:
        model: A causal language model that takes block masks, with or without PEFT adapters.
        packed: See `packed_loss`: lists one after the other, and targets of chosen candidates with a weight above 0.
        size: Candidates per list.
        kind: `softmax` or `lambda`.
        temperature: Divisor of log-likelihoods.
    """
    scores = candidate_log_likelihoods(model, packed, size)
    loss = {"softmax": softmax_loss, "lambda": lambda_loss}[kind]
    return loss(scores / temperature, chosen_indices(packed, size)), float(len(scores))


def candidate_log_likelihoods(model: torch.nn.Module, packed: Mapping[str, Any], size: int) -> torch.Tensor:
    """Return the log-likelihood of every candidate, float32, shape (lists, size); see `list_loss`."""
    return sum_by_row(packed, -target_losses(model, packed)).view(-1, size)


def chosen_indices(packed: Mapping[str, Any], size: int) -> torch.Tensor:
    """Return the index of the chosen candidate in each list, shape (lists,); see `list_loss`."""
    return sum_by_row(packed, packed["weights"]).view(-1, size).argmax(1)


def answer_lengths(packed: Mapping[str, Any], size: int) -> torch.Tensor:
    """Return the number of target tokens of each candidate, shape (lists, size); see `list_loss`."""
    return sum_by_row(packed, torch.ones_like(packed["weights"])).view(-1, size)


def sum_by_row(packed: Mapping[str, Any], values: Any) -> torch.Tensor:
    """Sum values of targets by row of the packed sequences, shape (rows,)."""
    owners = packed["owners"]
    return values.new_zeros(int(owners.max()) + 1).index_add(0, owners, values)


def softmax_loss(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of the chosen candidates.

    Scores have the shape (lists, candidates), and indices of the chosen ones (lists,).
    """
    return torch.nn.functional.cross_entropy(scores, chosen, reduction="sum")


def lambda_loss(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the LambdaRank loss (Wang et al., The LambdaLoss Framework, CIKM 2018, section 4), summed over lists.

    Every other candidate adds log2(1 + exp(s_other - s_chosen)), weighted by the difference in NDCG if both were
    swapped, |1 / log2(1 + rank of the chosen) - 1 / log2(1 + rank of the other)|, in the current order of the scores.
    Ties keep their listed order. See `softmax_loss` for the shapes.
    """
    order = scores.detach().argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(1, scores.shape[1] + 1).to(order).expand_as(order))
    discounts = 1 / torch.log2(1.0 + ranks)
    index = chosen[:, None]
    weights = (discounts - discounts.gather(1, index)).abs()
    margins = scores - scores.gather(1, index)
    # the chosen candidate is not compared with itself
    return (weights * torch.nn.functional.softplus(margins)).sum() / torch.log(torch.tensor(2.0))


def _head_parts(base: torch.nn.Module) -> tuple[Any, Any, Any]:
    """Return the output head and, if there are new tokens, its trained rows and their indices."""
    head = base.get_output_embeddings()
    adapter = getattr(head, "token_adapter", None)
    if adapter is None or adapter.disable_adapters:
        return head if adapter is None else adapter.base_layer, None, None
    (name,) = adapter.active_adapters
    indices = torch.tensor(adapter.token_indices[name], device=adapter.base_layer.weight.device)
    return adapter.base_layer, adapter.trainable_tokens_delta[name], indices
