"""Rows of the answers of one question, for a loss over them whose scores are the likelihoods of their own texts.

Training so learns the order that `llmrec.strategies.pointwise.LikelihoodRanker` reads: an answer's score is
log P(text | prompt), summed over its tokens. All answers to a question lie in one masked row, so that the prompt is
read once and every score is exact. With one chosen candidate a list, ListNet's top-one loss (Cao et al., ICML 2007),
and ListMLE and PListMLE (Xia et al., ICML 2008; Lan et al., UAI 2014) cut behind the first place, are `softmax`;
`lambda` weighs pairs by the difference in NDCG that their exchange makes. Losses from preference, which compare a model
with the one that it started from, read the same rows: `llmrec.train.preference`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.errors import RecipeError
from llmrec.tasks.rows import Listwise, against
from llmrec.tasks.task import Task
from llmrec.types import Example


def common(tasks: Mapping[str, Task], *, preference: bool, paired: str | None) -> Listwise | None:
    """Return how the rows of all tasks are learned as lists; None: by their own tokens.

    Args:
        tasks: The families that are trained, by name.
        preference: Whether the recipe learns from preference.
        paired: Name of the model, where it is an encoder-decoder.

    Raises:
        RecipeError: If other families are trained beside those lists, a family has none to learn from preference by, or
            the model is an encoder-decoder.
    """
    found = {family: task.listwise for family, task in tasks.items() if task.listwise is not None}
    if not (found or preference):
        return None
    family = next(iter(found or tasks))
    others = [name for name in tasks if name != family]
    key, instead = ("train.preference", "null") if preference else (f"tasks.{family}.loss", "answer")
    if family not in found:
        what = f"rows of tasks.{family} say of no answer what it is preferred to; train another family (train.only)"
    elif paired is not None:
        what = f"{paired} is an encoder-decoder, whose rows are not packed; choose another model"
    elif others:
        what = (
            f"lists of tasks.{family} are not learned beside rows of tasks.{others[0]}; leave one of both out of "
            "training (train.only)"
        )
    else:
        return found[family]
    raise RecipeError(f"{key}: {what}, or set it to {instead}", kind="contradiction", column=key)


def list_rows(
    listwise: Listwise, examples: Iterable[Example], encoder: Encoder, limit: int
) -> Iterator[TokenRow | None]:
    """Yield the rows of a question's answers one behind the other, the chosen one first; None if one is too long.

    A text that was cut would have another likelihood.

    Args:
        listwise: How many answers a list has.
        examples: The rows, without end.
        encoder: The tokenizer.
        limit: Longest row in tokens.

    Raises:
        RecipeError: If a row has fewer answers.
    """
    for example in examples:
        rows = [encoder.row(each) for each in against(example)]
        if len(rows) != listwise.size:
            raise RecipeError(
                f"train.preference.negatives: the row {example.id} has {len(rows) - 1} other answers, and "
                f"{listwise.size - 1} are asked for; set train.preference.negatives={max(1, len(rows) - 1)}, or choose "
                "other templates",
                kind="too-large",
                column="train.preference.negatives",
            )
        if any(len(row.ids) > limit for row in rows):
            yield None
        else:
            yield from rows
