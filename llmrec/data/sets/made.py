"""The synthetic table of reviews that ships with llmrec; nobody wrote them, and none of the products exists."""

from __future__ import annotations

from dataclasses import replace

from llmrec.data.dataset import Dataset
from llmrec.data.sets.table import table
from llmrec.errors import DataError
from llmrec.recipe.schema import Columns, DataSection
from llmrec.resources import resource


def made_reviews(section: DataSection, *, seed: int) -> Dataset:
    """Load the shipped table of synthetic reviews: 120 users, 40 products, about 1,400 reviews with texts.

    Products carry ``category``, ``brand`` and ``price``.

    Raises:
        DataError: If the recipe gives it a path or columns, which it has by itself.
    """
    if section.path is not None or section.items is not None or section.columns != Columns():
        raise DataError(
            "source 'made-reviews' ships with llmrec; leave out data.path, data.items and data.columns",
            kind="contradiction",
            column="data",
        )
    path = resource("recipes", "made", "reviews.csv")
    own = {
        "path": str(path),
        "columns": Columns(fields=("category", "brand", "price")),
        "rating_scale": section.rating_scale or (1.0, 5.0),
        "noun": section.noun if section.noun != DataSection.model_fields["noun"].default else "kitchen products",
    }
    dataset = table(section.model_copy(update=own), seed=seed)
    provenance = {**dataset.provenance, "source": "made-reviews", "made": "yes", "licence": "as llmrec itself"}
    return replace(dataset, name="made-reviews", provenance=provenance)
