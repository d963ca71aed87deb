"""Chooses how the training rows of families are made.

An encoder-decoder has a row a target. Packed rows of families that ask after the history branch off one history. Rows
of a task that can be drawn before they are put into words are put together from lines that are tokenised once. All
others are encoded from their words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from llmrec.backends.encode import Encoder, TokenRow
from llmrec.errors import RecipeError
from llmrec.recipe.schema import TrainSection
from llmrec.tasks.task import Task
from llmrec.train.batches import fit_row
from llmrec.train.branches import Branching, branching_rows
from llmrec.train.line_rows import Drawing, RowStream
from llmrec.train.listwise import list_rows
from llmrec.train.seq2seq import target_rows
from llmrec.types import Example


@dataclass(frozen=True)
class Sources:
    """Where training rows come from.

    Attributes:
        tasks: The trained families by name.
        examples: Gives the rows of a family in words, without end.
        users: Everybody.
        section: The recipe's ``train`` section.
        seed: Of training.
        paired: Whether the model is an encoder-decoder.
    """

    tasks: Mapping[str, Task]
    examples: Callable[[str], Iterator[Example]]
    users: Sequence[str]
    section: TrainSection
    seed: int
    paired: bool


def streams(
    sources: Sources, shares: Mapping[str, float], encoder: Encoder
) -> tuple[dict[str, Iterator[tuple[str, TokenRow | None]]], dict[str, float]]:
    """Return streams of families and their rows, with weights; where rows are packed, families branch off together.

    A row is None where no target of it fits ``train.max_row_tokens``.

    Args:
        sources: See there.
        shares: Shares of training tokens, by family.
        encoder: The tokenizer.

    Raises:
        RecipeError: If rows of an encoder-decoder are to be packed.
    """
    section, seed = sources.section, sources.seed
    packing = section.packing == "tree"
    if packing and sources.paired:
        raise RecipeError(
            "train.packing: an encoder-decoder reads no packed rows; set train.packing=none",
            kind="contradiction",
            column="train.packing",
        )
    tasks = {family: task for family in shares if isinstance(task := sources.tasks[family], Branching)}
    tasks = {family: task for family, task in tasks.items() if packing and task.branches}
    # A pool's rows are chosen for each family, before it is known which could share what they show.
    together = len(tasks) > 1 and section.examples is None
    alone = [family for family in shares if not together or family not in tasks]
    found: dict[str, Iterator[tuple[str, TokenRow | None]]]
    found = {family: zip(repeat(family), _own(sources, family, encoder)) for family in alone}
    weights = {family: shares[family] for family in alone}
    if together:
        name, lines = " and ".join(sorted(tasks)), section.band is not None
        found[name] = branching_rows(
            tasks, shares, sources.users, encoder, limit=section.max_row_tokens, seed=seed, lines=lines
        )
        weights[name] = sum(shares[family] for family in tasks)
    return found, weights


def _own(sources: Sources, family: str, encoder: Encoder) -> Iterator[TokenRow | None]:
    """Return a family's training rows, without end."""
    task, section = sources.tasks[family], sources.section
    limit = section.max_row_tokens
    if task.listwise is not None:
        return list_rows(task.listwise, sources.examples(family), encoder, limit)
    if sources.paired:
        made = (target_rows(example, encoder, limit) for example in sources.examples(family))
        return (row for rows in made for row in (*rows, *([] if rows else [None])))
    # Only words tell where lines begin, and only they are in a pool.
    if isinstance(task, Drawing) and section.band is None and section.examples is None:
        return iter(RowStream(task, encoder, limit=limit, seed=sources.seed))
    lines = section.band is not None
    return (fit_row(example, encoder, limit, lines=lines) for example in sources.examples(family))


def followed(examples: Iterable[Example], encoder: Encoder, limit: int, *, paired: bool) -> list[TokenRow]:
    """Return the rows of held-out examples, to follow their loss; one without a target within ``limit`` is left out."""
    if paired:
        return [row for example in examples for row in target_rows(example, encoder, limit)]
    return [row for example in examples if (row := fit_row(example, encoder, limit)) is not None]
