"""Published results, shown next to results under the same protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmrec.display import single_line
from llmrec.errors import DataError, RecipeError
from llmrec.recipe.pages import parse_yaml
from llmrec.resources import resource


class FrozenRecord(BaseModel):
    """Frozen base class of the records in eval/references."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishedResult(FrozenRecord):
    """A published result; ``seen`` is whether history items could be ranked, if known."""

    system: str
    source: str
    seen: Literal["excluded", "included", "unknown", "rating", "yes-no"]
    values: Mapping[str, float]
    note: str = ""


class PublishedProtocol(FrozenRecord):
    """The evaluation protocol of a publication's results."""

    split: str
    candidates: str


class Reference(FrozenRecord):
    """Published results on one data set, from one file."""

    reference: str
    data: str
    counts: Mapping[Literal["users", "items", "interactions"], int]
    protocol: PublishedProtocol
    rows: tuple[PublishedResult, ...]


def read_references(folder: Path | None = None) -> dict[str, Reference]:
    """Return all references by name."""
    pages = sorted((folder or resource("eval", "references")).glob("*.yaml"))
    return {page.stem: read_reference_file(page) for page in pages}


def reference(name: str) -> Reference:
    """Return a reference by name.

    Raises:
        RecipeError: If it does not exist.
    """
    known = read_references()
    if name not in known:
        raise RecipeError(
            f"references: there is no file {name!r} in eval/references; known: {', '.join(known)}",
            kind="unknown-name",
            column="references",
        )
    return known[name]


def read_reference_file(path: Path) -> Reference:
    """Read a reference from its file.

    Raises:
        DataError: If it cannot be read or has another format.
    """
    try:
        return Reference.model_validate(parse_yaml(path.read_text(encoding="utf-8"), path)[0])
    except (OSError, RecipeError, ValueError) as error:
        raise DataError(
            f"{path}: invalid file of published results ({single_line(str(error))}); see the other files in its folder",
            kind="wrong-format",
            at=path,
        ) from error
