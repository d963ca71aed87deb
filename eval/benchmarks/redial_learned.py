"""Models of `eval.benchmarks.redial` that are trained on dialogues, and a language model that generates titles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmrec.answer.checks import with_resolved_engine
from llmrec.answer.language_model import LanguageModel
from llmrec.answer.options import RecommenderOptions
from llmrec.answer.rules import Rules
from llmrec.chat.conversation import Conversation
from llmrec.chat.dual_encoder import (
    DEFAULT_ENCODER,
    DialogueTurns,
    DualEncoder,
    apply_linear_map,
    build_dialogue_turns,
    train_dual_encoder,
)
from llmrec.chat.facts import Facts
from llmrec.chat.managers import RuleManager
from llmrec.chat.reading import Reader
from llmrec.chat.simulator import random_target_conversations, transcript_turns
from llmrec.chat.tools import Tools
from llmrec.chat.transcripts import Turn
from llmrec.data.hashing import hash64
from llmrec.ensembles.weights import FOLDS, assign_folds
from llmrec.types import Item, Message, Prompt, Segment

if TYPE_CHECKING:
    from eval.benchmarks.redial import Cases

TALKS = 1000
"""Number of simulated conversations for training."""
MODEL, BEAMS = "SmolLM2-135M-Instruct", 50
_ASK = "{query}\n\nWhich film should be recommended now? Answer with its title alone."
# Lower than any log-likelihood of a search.
_UNNAMED = -1e9

Floats = NDArray[np.float32]


class OtherDialogues:
    """Dual encoders trained on the dialogues of some folds.

    Args:
        cases: The cases.
        turns: Vectors of turns by the frozen encoder, shape (turns, d).
        items: Vectors of items by the frozen encoder, shape (items, d).
    """

    def __init__(self, cases: Cases, turns: Floats, items: Floats) -> None:
        self.folds, self._cases, self.turns, self.items = assign_folds("redial", cases.clusters), cases, turns, items
        goals: dict[str, set[int]] = {}
        for dialogue, target in zip(cases.clusters, cases.targets, strict=True):
            goals.setdefault(dialogue, set()).add(int(target))
        # Other targets of the dialogue, and items mentioned before, are not negatives.
        apart = [
            frozenset(goals[dialogue] | set(cases.named[row])) - {int(target)}
            for dialogue, row, target in zip(cases.clusters, cases.rows, cases.targets, strict=True)
        ]
        numbers = np.unique(cases.clusters, return_inverse=True)[1]
        self._asked = DialogueTurns(turns[cases.rows], cases.targets, apart, numbers)
        self._known: dict[frozenset[int], DualEncoder] = {}

    def learns(self, without: frozenset[int]) -> NDArray[np.int64]:
        """Return the training cases without some folds."""
        return np.flatnonzero(~np.isin(self.folds, list(without)))

    def scores(self, judged: int) -> Floats:
        """Return scores for evaluating a fold, and for fitting its weights on the others, shape (turns, items).

        The encoder that scores a fold for the fit is trained neither on that fold nor on the evaluated one.
        """
        return self._joined(lambda fold: frozenset((judged, fold)))

    def alone(self) -> Floats:
        """Return the scores of every fold by the encoder trained on all others, shape (turns, items)."""
        return self._joined(lambda fold: frozenset((fold,)))

    def _joined(self, without: Callable[[int], frozenset[int]]) -> Floats:
        scores = np.zeros((len(self.turns), len(self.items)), dtype=np.float32)
        for fold in range(FOLDS):
            dual, rows = self._without(without(fold)), np.unique(self._cases.rows[self.folds == fold])
            scores[rows] = apply_linear_map(self.turns[rows], dual.context) @ apply_linear_map(self.items, dual.item).T
        return scores

    def _without(self, folds: frozenset[int]) -> DualEncoder:
        if folds not in self._known:
            self._known[folds] = train_dual_encoder(DEFAULT_ENCODER, self._asked.part(self.learns(folds)), self.items)
        return self._known[folds]


def exchanged_items(items: Sequence[Item]) -> NDArray[np.int64]:
    """Return for each item another one, whose text replaces its text: one with a page if it has a page."""
    order = np.argsort(hash64("redial texts", 0, [item.item_id for item in items]), kind="stable")
    exchanged = np.empty(len(items), dtype=np.int64)
    paged = np.array(["facts" in items[index].fields for index in order])
    for alike in (order[paged], order[~paged]):
        exchanged[alike] = np.roll(alike, 1)
    return exchanged


@dataclass(frozen=True)
class Unknowing:
    """A recommender with equal scores, so that items matching the rules are in catalogue order."""

    rules: Rules = field(default_factory=Rules)

    def rank(self, liked: Sequence[str], rules: Rules, k: int, candidates: Sequence[str] = ()) -> list[str]:
        """See `llmrec.chat.tools.ListRecommender`."""
        return []

    def similar(self, items: Sequence[str], rules: Rules, k: int) -> list[str]:
        """See `llmrec.chat.tools.ListRecommender`."""
        return []


def synthetic(items: Sequence[Item], vectors: Floats) -> tuple[DualEncoder, list[Turn]]:
    """Return a dual encoder trained on simulated conversations over the items with facts, and the conversations.

    Args:
        items: All items.
        vectors: Vectors of the items, shape (items, d).
    """
    films = {item.item_id: item for item in items if "facts" in item.fields}
    facts = Facts(films)
    talk = Conversation(Tools(facts, Unknowing()), RuleManager(), Reader(facts))
    turns = transcript_turns(random_target_conversations(talk, TALKS, seed=0))
    return train_dual_encoder(
        DEFAULT_ENCODER, build_dialogue_turns(turns, [item.item_id for item in items], DEFAULT_ENCODER), vectors
    ), turns


def named(cases: Cases, names: Sequence[str], chosen: NDArray[np.int64]) -> Floats:
    """Return the log-likelihoods of the titles that a language model generates; a lower value for all others.

    Args:
        cases: The cases.
        names: Titles of all items; items with the same title have the same score.
        chosen: The cases to evaluate.

    Returns:
        Shape (chosen, items).
    """
    columns: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        columns.setdefault(name, []).append(column)
    titles = list(columns)
    title_index = {column: index for index, group in enumerate(columns.values()) for column in group}
    scores = np.full((len(chosen), len(names)), _UNNAMED, dtype=np.float32)
    prompts, out = [], []
    for row in cases.rows[chosen]:
        prompts.append(Prompt(messages=(Message("user", (Segment("text", _ASK.format(query=cases.queries[row])),)),)))
        # Exclude titles whose items were all mentioned before.
        before = set(cases.named[row])
        out.append(sorted({title_index[i] for i in before if before.issuperset(columns[names[i]])}))
    options = with_resolved_engine(RecommenderOptions(model=MODEL, backend="hf"))
    with LanguageModel.open(options, ranks=False) as model, model.backend("search") as backend:
        for row, (prompt, without) in enumerate(zip(prompts, out, strict=True)):
            (result,) = backend.search([prompt], titles, k=BEAMS, width=BEAMS, excluded=[without])
            for title, score in zip(result.items, result.scores, strict=True):
                scores[row, columns[titles[title]]] = score
            if row % 10 == 9:
                sys.stderr.write(f"{row + 1} of {len(chosen)} named\n")
    return scores
