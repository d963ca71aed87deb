"""Rows of the candidates of one question, for a loss over them whose scores are the likelihoods of their own texts.

Training so learns the order that `llmrec.strategies.pointwise.LikelihoodRanker` reads: a candidate's score is
log P(text | prompt), summed over its tokens. All candidates of a question lie in one masked row, so that the prompt is
read once and every score is exact. With one chosen candidate a list, ListNet's top-one loss (Cao et al., ICML 2007),
and ListMLE and PListMLE (Xia et al., ICML 2008; Lan et al., UAI 2014) cut behind the first place, are `softmax`;
`lambda` weighs pairs by the difference in NDCG that their exchange makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.tasks.rows import Listwise
from llmrec.types import Example


@runtime_checkable
class Listing(Protocol):
    """A task whose rows can be lists of candidates, each with the text that would choose it."""

    @property
    def listwise(self) -> Listwise | None:
        """How rows are learned as lists; None: by their own tokens."""
        ...

    def alternatives(self, example: Example) -> Sequence[Example]:
        """Return a row once for each of its candidates, the chosen one first."""
        ...


def list_rows(task: Listing, examples: Iterable[Example], encoder: Encoder, limit: int) -> Iterator[TokenRow | None]:
    """Yield the rows of a question's candidates one behind the other; None in place of all if one is too long.

    A text that was cut would have another likelihood.

    Args:
        task: Gives the candidates of a row.
        examples: The rows, without end.
        encoder: The tokenizer.
        limit: Longest row in tokens.
    """
    for example in examples:
        rows = [encoder.row(each) for each in task.alternatives(example)]
        if any(len(row.ids) > limit for row in rows):
            yield None
        else:
            yield from rows
