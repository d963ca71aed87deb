"""Pretraining of U-BERT: masked opinion words, and the ratings of single reviews."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmrec.errors import ModelError, RecipeError, require
from llmrec.progress import Progress
from llmrec.systems.ubert.network import ReviewModel, UBertConfig, encode_entities, shuffled_batches
from llmrec.systems.ubert.reviews import FrozenEncoder, Span

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.baselines.rated import Ratings

_WORD = re.compile(r"\w+(?:['’]\w+)*")
# Minimum number of reviews with a word of the lexicon.
_MIN_WORD_REVIEWS = 5


def opinion_words(config: UBertConfig, texts: Sequence[str], ratings: NDArray[np.float64]) -> tuple[str, ...]:
    """Return the sorted opinion words, from a file or else the words that best predict ratings.

    Without a file these are the words with the largest ``|mean rating of the reviews with it - mean| * sqrt(reviews)``.

    Args:
        config: Contains the file, or the number of words.
        texts: Training reviews.
        ratings: Rating of each review, shape (n,).

    Raises:
        RecipeError: If the file cannot be read, or contains no word.
    """
    if config.lexicon is not None:
        try:
            words = {line.strip().lower() for line in Path(config.lexicon).read_text(encoding="utf-8").splitlines()}
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"lexicon: {config.lexicon} cannot be read ({error}); name a text file of words, one per line",
                kind="unreadable",
                at=config.lexicon,
                column="lexicon",
            ) from error
        results = sorted(word for word in words if _WORD.fullmatch(word))
        if not results:
            raise RecipeError(
                f"lexicon: {config.lexicon} contains no words; write opinion words, one per line",
                kind="empty",
                at=config.lexicon,
                column="lexicon",
            )
        return tuple(results)
    residuals: dict[str, list[float]] = defaultdict(list)
    for text, rating in zip(texts, (ratings - ratings.mean()).tolist(), strict=True):
        for word in {item.lower() for item in _WORD.findall(text)}:
            residuals[word].append(rating)
    effects = {
        word: abs(sum(item)) / len(item) ** 0.5 for word, item in residuals.items() if len(item) >= _MIN_WORD_REVIEWS
    }
    return tuple(sorted(sorted(effects, key=lambda word: (-effects[word], word))[: config.opinions]))


@dataclass(frozen=True)
class MaskedTexts:
    """Texts in which some opinion words are masked.

    Attributes:
        encoded: The tokens of each text, with the mask in place of the words.
        texts: Text index of each masked word, shape (m,).
        positions: Position of its first token, special tokens not counted, shape (m,).
        words: Its index in the lexicon, shape (m,).
    """

    encoded: list[list[int]]
    texts: NDArray[np.int64]
    positions: NDArray[np.int64]
    words: NDArray[np.int64]

    @staticmethod
    def of(
        texts: Sequence[str],
        encoded: Sequence[Sequence[int]],
        spans: Sequence[Sequence[Span]],
        words: Sequence[str],
        *,
        mask: int,
        share: float,
        rng: np.random.Generator,
    ) -> MaskedTexts:
        """Mask all tokens of random opinion words, at least one word in each text that has any."""
        number = {word: index for index, word in enumerate(words)}
        hidden, result = [list(ids) for ids in encoded], []
        for row, text in enumerate(texts):
            opinions = [item for item in _WORD.finditer(text) if item.group().lower() in number]
            # Truncated words cannot be masked.
            opinions = [item for item in opinions if any(e >= item.end() for s, e in spans[row] if e > s)]
            chosen = rng.random(len(opinions)) < share
            if len(opinions) and not chosen.any():
                chosen[rng.integers(len(opinions))] = True
            for opinion in (item for item, drawn in zip(opinions, chosen.tolist(), strict=True) if drawn):
                tokens = [
                    index
                    for index, (start, end) in enumerate(spans[row])
                    if end > start and start < opinion.end() and end > opinion.start()
                ]
                for index in tokens:
                    hidden[row][index] = mask
                before = sum(end > start for start, end in spans[row][: tokens[0]])
                result.append((row, before, number[opinion.group().lower()]))
        columns = np.array(result, dtype=np.int64).reshape(-1, 3).T
        return MaskedTexts(hidden, columns[0], columns[1], columns[2])


def last_pair_ratings(known: Ratings) -> dict[tuple[int, int], float]:
    """Return the last rating of each (user, item) pair."""
    last = np.argsort(known.order)
    columns = (column[last].tolist() for column in (known.users, known.items, known.values))
    return {(user, item): value for user, item, value in zip(*columns, strict=True)}


def pretrain_encoders(model: ReviewModel, frozen: FrozenEncoder, seed: int) -> None:
    """Pretrain the user encoder on single reviews, and copy it to the item encoder.

    The user encoder gets one review with masked opinion words. Each masked word is predicted from the state of its
    token and the user's vector (cross-entropy over the lexicon), and the review's rating from the user's vector
    (squared error).

    Args:
        model: The model to train.
        frozen: The text encoder.
        seed: The seed for masks, order and weights of the two heads, which are discarded afterwards.

    Raises:
        RecipeError: See `opinion_words`.
        ModelError: If the text encoder has no token for masked words.
    """
    torch, config, reviews = require("torch", "baselines"), model.config, model.reviews
    if frozen.mask is None:
        raise ModelError(
            f"pretrain: the text encoder {config.encoder} has no mask token; name another encoder, such as "
            "all-MiniLM-L6-v2, or set pretrain=0",
            kind="unsupported",
            at=config.encoder,
            column="pretrain",
        )
    known = model.known
    ratings = last_pair_ratings(known)
    truth = np.array([ratings[pair] for pair in zip(reviews.users.tolist(), reviews.items.tolist(), strict=True)])
    words = opinion_words(config, reviews.texts, truth)
    rng = np.random.default_rng([seed, 1])
    plain, spans = frozen.tokens(reviews.texts)
    hidden = MaskedTexts.of(reviews.texts, plain, spans, words, mask=frozen.mask, share=config.masked, rng=rng)
    original_tokens, model.tokens = model.tokens, frozen.states(hidden.encoded, spans)
    targets = torch.from_numpy(((truth - known.mean) / model.spread).astype(np.float32))
    of_text: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(hidden.texts.tolist()):
        of_text[row].append(index)
    nn, dim, network = torch.nn, config.dim, model.network
    heads = nn.ModuleDict({"words": nn.Linear(2 * dim, len(words)), "rating": nn.Linear(dim, 1)})
    learning = [*network["down"].parameters(), *network["user"].parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(learning, lr=config.learning_rate, weight_decay=config.weight_decay)
    network.train()
    with Progress("ubert: single reviews", config.pretrain, unit="epochs", quiet=config.quiet, passing=True) as bar:
        for epoch in range(config.pretrain):
            for part in shuffled_batches(len(truth), config.batch, rng):
                positions, mask = model.tokens.positions([part[[row]] for row in range(len(part))])
                tokens = model.read(positions)
                users = encode_entities(
                    network["user"], torch.from_numpy(reviews.users[part]), tokens, torch.from_numpy(mask)
                )
                loss = config.beta * nn.functional.mse_loss(heads["rating"](users)[:, 0], targets[part])
                masked = [(row, index) for row, text in enumerate(part.tolist()) for index in of_text[text]]
                if masked:
                    rows, which = np.array(masked).T
                    joint = torch.cat([tokens[rows, hidden.positions[which]], users[rows]], dim=1)
                    loss = loss + nn.functional.cross_entropy(
                        heads["words"](joint), torch.from_numpy(hidden.words[which])
                    )
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
            bar.reach(epoch + 1)
    model.tokens = original_tokens
    for name in ("domain", "query", "key"):
        network["item"][name].load_state_dict(network["user"][name].state_dict())
