"""Which recommenders `llmrec auto` tries, in the order of what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmrec.data.dataset import Dataset
from llmrec.durable import Json

# Items beyond which EASE, which inverts a matrix of items by items, takes minutes and gigabytes.
_MOST_SQUARE = 20_000
# Seconds of a budget from which on a text encoder is tuned: on two cores a fit takes minutes.
_LONG = 3600.0
# Share of items with a title from which on texts are worth reading.
_TITLED = 0.5


@dataclass(frozen=True)
class Part:
    """A recommender that may become a part of the fusion.

    Attributes:
        label: What it is called in files and lines.
        baseline: Its name in the registry.
        fixed: Parameters that are not tuned.
    """

    label: str
    baseline: str
    fixed: Mapping[str, Json] = field(default_factory=dict)


def parts_for(dataset: Dataset, encoder: str | None, *, texts: bool, torch: bool, budget: float) -> list[Part]:
    """Return what is tried on a data set.

    Tuned alone, recommenders forget what is more than a few events old and then say much the same: those with the
    whole history stand beside them, since parts of a fusion are to differ.

    Args:
        dataset: The data.
        encoder: The text encoder that is at hand; None: latent semantic analysis of the texts themselves.
        texts: Items have texts; see `has_texts`.
        torch: Networks can be trained here.
        budget: Seconds of the whole search.
    """
    parts = [Part(name, name) for name in ("popularity", "recent-popularity", "markov-1", "markov", "item-knn")]
    parts += [Part(name, name) for name in ("transitions", "markov-cooccurrence", "rp3beta")]
    parts.append(Part("item-knn, whole history", "item-knn", {"history": 200, "decay": 1.0}))
    if texts:
        read: Mapping[str, Json] = {"encoder": encoder} if encoder else {}
        parts += [Part("transitions-text", "transitions-text", read), Part("content", "content", read)]
    if len(dataset.items) <= _MOST_SQUARE:
        parts += [Part("ease", "ease"), Part("ease, whole history", "ease", {"decay": 1.0})]
    parts += [Part("als", "als"), Part("als, whole history", "als", {"decay": 1.0}), Part("bpr", "bpr")]
    if torch:
        parts.append(Part("sasrec", "sasrec", {"quiet": True}))
        if texts and encoder and budget >= _LONG:
            parts.append(Part("transitions-tuned", "transitions-tuned", {"encoder": encoder, "quiet": True}))
    return parts


def has_texts(dataset: Dataset) -> bool:
    """Whether most items have a title that is not their id."""
    titled = sum(item.title not in ("", name) for name, item in dataset.items.items())
    return titled > _TITLED * len(dataset.items)
