"""A family's task over the items of requests alone: it can ask, and has nothing to learn from."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from llmrec.data.dataset import SCHEMA, Dataset
from llmrec.data.split import SplitDataset
from llmrec.pipeline.bundle import Bundle
from llmrec.tasks.family import family_of
from llmrec.tasks.task import Task, TaskInputs
from llmrec.types import Item, ItemCodes


def task_of(bundle: Bundle, family: str, items: Mapping[str, Item], codes: ItemCodes | None = None) -> Task:
    """Build a family's task over these items alone: no interactions, so it can only ask."""
    section = bundle.tasks.present()[family]
    data = data_of(bundle, items)
    inputs = TaskInputs(data=data, templates=bundle.templates[family], seed=bundle.seed, index=codes, learns=False)
    return family_of(family).task(section, inputs)


def data_of(bundle: Bundle, items: Mapping[str, Item]) -> SplitDataset:
    """Return data of these items and of no interaction."""
    nothing = pl.DataFrame(schema=dict(SCHEMA))
    dataset = Dataset(
        name="requests", noun=bundle.noun, interactions=nothing, items=items, rating_scale=bundle.rating_scale
    )
    return SplitDataset(
        dataset=dataset,
        kind="requests",
        seed=bundle.seed,
        train=nothing,
        valid=nothing,
        test=nothing,
        held_out=frozenset(),
    )
