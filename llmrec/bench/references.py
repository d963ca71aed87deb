"""Published figures, which the leaderboard prints beside results of the same protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmrec.errors import DataError, RecipeError
from llmrec.recipe.pages import parsed
from llmrec.report.escape import flat
from llmrec.resources import resource


class Page(BaseModel):
    """Frozen base of the pages under eval/references."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Published(Page):
    """One published row. ``seen``: whether items of the history could be ranked, as far as the source tells."""

    system: str
    source: str
    seen: Literal["excluded", "included", "unknown", "rating", "yes-no"]
    values: Mapping[str, float]
    note: str = ""


class Protocol(Page):
    """What a reference's rows share."""

    split: str
    candidates: str


class Reference(Page):
    """One page of published figures on one data set."""

    reference: str
    data: str
    counts: Mapping[Literal["users", "items", "interactions"], int]
    protocol: Protocol
    rows: tuple[Published, ...]


def all_references(folder: Path | None = None) -> dict[str, Reference]:
    """Return every page of published figures by its name."""
    pages = sorted((folder or resource("eval", "references")).glob("*.yaml"))
    return {page.stem: load_reference(page) for page in pages}


def reference(name: str) -> Reference:
    """Return a page of published figures by its name.

    Raises:
        RecipeError: If there is no such page.
    """
    folder = resource("eval", "references")
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(page.stem for page in folder.glob("*.yaml")))
        raise RecipeError(
            f"references: there is no page {name!r} under eval/references; known: {known}",
            kind="unknown-name",
            column="references",
        )
    return load_reference(path)


def load_reference(path: Path) -> Reference:
    """Read a page of published figures.

    Raises:
        DataError: If it cannot be read or does not have this form.
    """
    try:
        return Reference.model_validate(parsed(path.read_text(encoding="utf-8"), path)[0])
    except (OSError, RecipeError, ValueError) as error:
        raise DataError(
            f"{path}: not a page of published figures ({flat(str(error))}); see the other pages beside it",
            kind="wrong-format",
            at=path,
        ) from error
