"""Training reviews as frozen token states, and the selection of reviews for a (user, item) pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.errors import DataError, require
from llmrec.models.text_encoder import (
    LoadedEncoder,
    check_encoder_split,
    find_encoder,
    iterate_states,
    load_text_encoder,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.baselines.rated import Ratings
    from llmrec.data.split import SplitDataset

Side = Literal["user", "item"]
SIDES: tuple[Side, ...] = ("user", "item")
Span = tuple[int, int]
"""The character range of a token in a text."""


@dataclass(frozen=True)
class Reviews:
    """Training reviews, oldest first.

    Attributes:
        users: Index of each review's user, shape (n,).
        items: Index of each review's item, shape (n,).
        texts: The texts of the reviews.
        of: By side, the reviews of each user, or of each item.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    texts: tuple[str, ...]
    of: dict[Side, list[NDArray[np.int64]]]

    @staticmethod
    def read(data: SplitDataset, known: Ratings, order: Callable[[int], Sequence[int]]) -> Reviews:
        """Return the reviews of training interactions.

        Args:
            data: The split.
            known: The indices of users and items; reviews without a rating are skipped.
            order: Returns, for a number of reviews, the index of the review whose text each gets.

        Raises:
            DataError: If no training rating has a review.
        """
        rated = data.train.drop_nulls("rating").select("user_id", "item_id", "timestamp", "text")
        rated = rated.unique(["user_id", "item_id"], keep="last", maintain_order=True)
        rated = rated.sort("timestamp", maintain_order=True)
        reviews = data.dataset.reviews
        results = []
        for user, item, _, text in rated.iter_rows():
            review = reviews[user, item].text if (user, item) in reviews else "" if reviews else text or ""
            if review.strip():
                results.append((known.user_index[user], known.item_index[item], review))
        if not results:
            raise DataError(
                f"the baseline 'ubert' needs reviews, but no training rating of {data.dataset.name!r} has a review; "
                "use a source with reviews, such as amazon-reviews, or set data.columns.text to the text column",
                kind="missing-column",
                at=data.dataset.name,
                column="text",
            )
        users, items = (np.array([row[side] for row in results]) for side in (0, 1))
        texts = tuple(results[index][2] for index in order(len(results)))
        of: dict[Side, list[NDArray[np.int64]]] = {
            "user": _rows_by_owner(users, len(known.user_index)),
            "item": _rows_by_owner(items, len(known.item_index)),
        }
        return Reviews(users, items, texts, of)

    def for_pair(self, side: Side, user: int, item: int, most: int) -> NDArray[np.int64]:
        """Return the latest reviews of a user (or item) that may be used for a pair.

        The review of the pair and reviews of the same user with the same text are excluded, since they would reveal the
        rating.

        Args:
            side: The side: user or item.
            user: Index of the user; -1: unknown.
            item: Index of the item; -1: unknown.
            most: The maximum number of reviews.
        """
        owner = user if side == "user" else item
        if owner < 0:
            return np.zeros(0, dtype=np.int64)
        result = self.of[side][owner]
        same = (self.users[result] == user) & (self.items[result] == item)
        if user >= 0 and item >= 0:
            of_user = self.of["user"][user]
            text = {self.texts[row] for row in of_user[self.items[of_user] == item].tolist()}
            if text:
                same_user = self.users[result] == user
                same |= same_user & np.array([self.texts[row] in text for row in result.tolist()], dtype=bool)
        kept: NDArray[np.int64] = result[~same][-most:]
        return kept


def _rows_by_owner(owners: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """Return the rows of each of ``count`` owners, in order."""
    ends = np.cumsum(np.bincount(owners, minlength=count))
    return np.split(np.argsort(owners, kind="stable"), ends[:-1])


@dataclass(frozen=True)
class Tokens:
    """Values for all tokens of several texts, concatenated.

    Attributes:
        values: Frozen states of an encoder, or their projections, a torch tensor of shape (tokens, d).
        starts: Start of each text, and the end of the last one, shape (texts + 1,).
    """

    values: Any
    starts: NDArray[np.int64]

    def positions(self, rows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the token positions of some texts, and a mask, shape (b, t) each.

        Args:
            rows: Texts to concatenate, for each of b users or items.
        """
        spans = [[np.arange(self.starts[row], self.starts[row + 1]) for row in item] for item in rows]
        token_rows = [np.concatenate(span) if span else np.zeros(0, dtype=np.int64) for span in spans]
        longest = max([1, *map(len, token_rows)])
        positions = np.zeros((len(rows), longest), dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=bool)
        for row, item in enumerate(token_rows):
            positions[row, : len(item)], mask[row, : len(item)] = item, True
        return positions, mask


class FrozenEncoder:
    """A frozen text encoder that returns token states, without special tokens."""

    def __init__(self, name: str, data: SplitDataset, most: int) -> None:
        """Load the text encoder.

        Args:
            name: The name of the encoder, or its folder.
            data: The split with which it is used.
            most: The maximum number of tokens of a text; longer ones are truncated.

        Raises:
            DataError: If it was fine-tuned on another split.
            ModelError: If it is missing, or cannot be opened.
        """
        check_encoder_split(name, data)
        self._encoder: LoadedEncoder = load_text_encoder(find_encoder(name)[0])
        self._most = min(most + 2, self._encoder.limit)

    @property
    def mask(self) -> int | None:
        """Id of the mask token; None if the encoder has none."""
        result: int | None = self._encoder.tokenizer.mask_token_id
        return result

    def tokens(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[Span]]]:
        """Return the tokens of each text with their character spans, which are empty for special tokens."""
        return self._encoder.spans(texts, self._most) if texts else ([], [])

    def states(self, encoded: Sequence[Sequence[int]], spans: Sequence[Sequence[Span]]) -> Tokens:
        """Return the token states in half precision, without special tokens.

        Args:
            encoded: The tokens of each text from `tokens`; some may be masked.
            spans: Their character spans.
        """
        torch = require("torch", "baselines")
        kept = [[index for index, (start, end) in enumerate(span) if end > start] for span in spans]
        starts = np.concatenate([[0], np.cumsum([len(item) for item in kept])]).astype(np.int64)
        values = torch.zeros(int(starts[-1]), self._encoder.model.config.hidden_size, dtype=torch.float16)
        for rows, states, _ in iterate_states(self._encoder, encoded):
            for row, state in zip(rows, states, strict=True):
                values[starts[row] : starts[row + 1]] = state[kept[row]].half().cpu()
        return Tokens(values, starts)
