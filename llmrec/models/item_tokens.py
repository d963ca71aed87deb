"""Adds the tokens of an item index to a model; the new embeddings are initialised from item titles.

The copy is an ordinary model folder, so training, merging, export and every engine read it like the base model. vLLM
does not support new tokens in an adapter, but does in a resized base.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmrec.durable import replace_atomically
from llmrec.errors import ModelError, require
from llmrec.guard import control_tokens
from llmrec.index.table import ItemIndex
from llmrec.models.load import dtype, load_model, load_tokenizer
from llmrec.models.tensors import vocabulary_tables
from llmrec.models.whole_words import attach_whole_words, save_whole_words, token_kinds, whole_word_embeddings
from llmrec.recipe.schema import ModelSection

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Number of items whose titles initialise a token.
_ITEMS_PER_TOKEN = 256


def add_item_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add tokens to a tokenizer, and return their ids in order.

    Raises:
        ModelError: If the tokenizer cannot encode one of them as a single id.
    """
    tokenizers = require("tokenizers", "train")
    # Not special, since answers are decoded without special tokens; not normalised, for an exact match.
    new = [tokenizers.AddedToken(name, special=False, normalized=False) for name in tokens]
    tokenizer.add_tokens(new)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(list(tokens))]
    written = tokenizer.encode("".join(tokens), add_special_tokens=False)
    if written != ids:
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} splits item tokens such as {tokens[0]} into several tokens; "
            "choose another model, or an index of numbers or titles",
            kind="unsupported",
            column="model.name",
        )
    return ids


def save_with_item_tokens(
    base: str,
    section: ModelSection,
    index: ItemIndex,
    titles: Mapping[str, str],
    target: Path,
    *,
    words: bool,
    seed: int,
    vectors: Mapping[str, NDArray[np.float32]] | None = None,
    whitened: bool = True,
) -> None:
    """Save a copy of a model and its tokenizer with the tokens of an index, atomically.

    Whole-word embeddings are kept and treat each new code as a word.

    Args:
        base: The model's folder.
        section: The recipe's model section.
        index: The index, whose ``vocabulary`` is added.
        titles: Item titles by id; items may be missing.
        target: The folder to write.
        words: Start each new row from the words of its items; otherwise at random.
        seed: Random seed.
        vectors: Item vectors by id; if given, new rows start from them instead of from words.
        whitened: Whiten the vectors.
    """
    torch = require("torch", "train")
    model = load_model(base, section, dtype=torch.float32)
    tokenizer = load_tokenizer(base, section)
    names = index.vocabulary
    known = tokenizer.get_vocab().keys() & set(names)
    texts = _titles_by_token(index, titles) if words else {}
    # Before the tokens are added, so that no title is tokenised as one of them.
    pieces = [[tokenizer.encode(text, add_special_tokens=False) for text in texts.get(name, ())] for name in names]
    ids = add_item_tokens(tokenizer, names)
    old = model.get_input_embeddings().weight.shape[0]
    resize_vocabulary(model, max(len(tokenizer), old))
    levels = [name.partition("_")[0] for name in names]
    fresh = [n for n, name in enumerate(names) if name not in known]
    for _, module in vocabulary_tables(model):
        table = module.weight.detach()
        known_rows = table[:old].numpy()
        if vectors is None:
            means = _mean_title_embeddings(known_rows, pieces)
        else:
            means = _mean_feature_vectors(index, vectors, table.shape[1], whitened=whitened)
        rows = _initial_embeddings(known_rows, means, levels, seed)
        with torch.no_grad():
            table[[ids[n] for n in fresh]] = torch.from_numpy(rows[fresh])
    _update_whole_words(model, tokenizer)
    with replace_atomically(target) as draft:
        draft.mkdir()
        # First, because the table stays in float32 whatever the dtype of the model.
        save_whole_words(model, draft)
        model.to(dtype(section)).save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def resize_vocabulary(model: torch.nn.Module, size: int) -> None:
    """Add rows to every embedding table and head of a model.

    Resizing ties the head of a model whose configuration says so. T5-v1.1, mT5 and umT5 say so although their heads are
    separate, and would lose them; so would the two halves of BART.
    """
    torch = require("torch", "train")
    others = vocabulary_tables(model)[1:]
    if others:
        model.tie_weights = lambda *_, **__: None
    model.resize_token_embeddings(size, mean_resizing=False)
    if others:
        del model.tie_weights
    for name, module in others:
        if module.weight.shape[0] < size and not hasattr(module, "out_features"):
            more = module.weight.new_zeros(size - len(module.weight), module.weight.shape[1])
            module.weight = torch.nn.Parameter(torch.cat([module.weight.detach(), more]))
            module.num_embeddings = size
            model.set_submodule(name, module)


def _update_whole_words(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Update the whole-word embeddings of a model for a tokenizer with new tokens."""
    embeddings = whole_word_embeddings(model)
    if embeddings is not None:
        control = control_tokens(tokenizer.all_special_tokens, tokenizer.added_tokens_decoder.values())
        size = model.get_input_embeddings().weight.shape[0]
        attach_whole_words(model, embeddings.weight.detach(), token_kinds(tokenizer, control, size))


def _titles_by_token(index: ItemIndex, titles: Mapping[str, str]) -> dict[str, list[str]]:
    """Return, for each token, the titles of (a sample of) the items whose codes contain it."""
    holders: dict[str, list[str]] = defaultdict(list)
    for item in sorted(index.codes, key=lambda item: hashlib.blake2b(item.encode(), digest_size=8).digest()):
        for name in index.codes[item]:
            if item in titles and len(holders[name]) < _ITEMS_PER_TOKEN:
                holders[name].append(titles[item])
    return dict(holders)


def _mean_title_embeddings(
    table: NDArray[np.float32], pieces: Sequence[Sequence[Sequence[int]]]
) -> list[NDArray[np.float32] | None]:
    """Return, for each token, the mean title embedding of its items; None without titles.

    The table has the rows of the known vocabulary, shape (v, d), and ``pieces`` the token ids of each text.
    """
    return [
        np.mean([table[ids].mean(axis=0) for ids in texts if ids], axis=0) if any(map(len, texts)) else None
        for texts in pieces
    ]


def _mean_feature_vectors(
    index: ItemIndex, vectors: Mapping[str, NDArray[np.float32]], width: int, *, whitened: bool
) -> list[NDArray[np.float32] | None]:
    """Return, for each token, the mean feature vector of its items; None without features.

    Vectors are rotated to their principal components. Text vectors are whitened: without that, few components hold most
    of the variance, and differences between similar items would be lost (WhitenRec, ICDE 2024, section 3). Vectors of
    a recommender are not, since it was trained on their dot products.
    """
    names = list(vectors)
    x = np.stack([vectors[name] for name in names]).astype(np.float64)
    x -= x.mean(axis=0)
    _, spreads, directions = np.linalg.svd(x, full_matrices=False)
    kept = min(width, int((spreads > spreads[0] * 1e-4).sum()))
    turned = np.zeros((len(names), width), dtype=np.float32)
    scale = np.sqrt(len(names)) / spreads[:kept] if whitened else 1.0
    turned[:, :kept] = (x @ directions[:kept].T) * scale
    row = {name: number for number, name in enumerate(names)}
    holders: dict[str, list[int]] = defaultdict(list)
    for item, code in index.codes.items():
        for token in code:
            if item in row:
                holders[token].append(row[item])
    return [turned[holders[token]].mean(axis=0) if token in holders else None for token in index.vocabulary]


def _initial_embeddings(
    table: NDArray[np.float32],
    meanings: Sequence[NDArray[np.float32] | None],
    levels: Sequence[str],
    seed: int,
) -> NDArray[np.float32]:
    """Return the initial embedding of every new token, shape (tokens, d).

    Means over items are close together, so their deviations within a level are scaled to the standard deviation of the
    rows of ordinary words. A token without items starts at random, with the same mean and deviation.

    Args:
        table: Rows of the known vocabulary, shape (v, d).
        meanings: The embedding that each token represents, shape (d,) each.
        levels: The level of each token in its code.
        seed: Random seed.
    """
    centre = table.mean(axis=0)
    spread = float(np.sqrt(np.square(table - centre).sum(axis=1).mean()))
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((len(meanings), table.shape[1])).astype(np.float32)
    away = noise * np.float32(spread / np.sqrt(table.shape[1]))
    for level in dict.fromkeys(levels):
        members = [n for n, name in enumerate(levels) if name == level and meanings[n] is not None]
        if len(members) < 2:
            continue
        means = np.stack([np.asarray(meanings[n]) for n in members])
        means -= means.mean(axis=0)
        size = float(np.sqrt(np.square(means).sum(axis=1).mean()))
        if size > 0:
            # A little noise distinguishes tokens with the same titles.
            away[members] = means * (spread / size) + 0.05 * away[members]
    rows: NDArray[np.float32] = (centre + away).astype(np.float32)
    return rows
