"""Two templates side by side: what differs in their sources, and in the prompts of one and the same training event."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from llmrec.backends.encode import Encoder
from llmrec.build.bundle import FILE
from llmrec.build.dryrun import marked
from llmrec.build.prompt_listing import WIDTH, chosen_of, find, rows
from llmrec.build.study import Study
from llmrec.errors import LlmrecError, RecipeError, did_you_mean
from llmrec.prompts import Template
from llmrec.types import Example

_FACTS = ("version", "use", "shape")
# A run folder records what makes a prompt, and not what is said about the template.
_NOTES = ("set", "number", "also", "leak", "needs")
_PARTS = ("system", "user", "lead", "target", "tail")
# Rows of each template among which one event is looked for: a few passes over the users of MovieLens-100K.
_SEARCHED = 4000


def compare(study: Study, encoder: Encoder, first: str, second: str) -> Iterator[str]:
    """Yield the differences of two templates of a family, in lines of at most `WIDTH` columns.

    Args:
        study: Names the templates, and has the data for the prompts.
        encoder: Renders them.
        first: A template's name.
        second: Another one's, or the folder of a run that trained with an earlier version of the first.

    Raises:
        RecipeError: If a name is unknown, the two are of different families, or the folder records no such template.
    """
    one, folder = find(study, first), Path(second).expanduser()
    stored = folder.is_dir()
    other = recorded(folder, one) if stored else find(study, second)
    if one.family != other.family:
        raise RecipeError(f"{one.id} and {other.id} answer different questions; compare templates of one family")
    # Read from the older to the newer.
    left, right = (other, one) if stored else (one, other)
    yield f"- {left.id}{f', as trained in {second}' if stored else ''}"
    yield f"+ {right.id}{', as it is now' if stored else ''}"
    yield ""
    yield from sources(left, right, notes=not stored)
    yield from _prompts(study, encoder, left, right)


def recorded(folder: Path, template: Template) -> Template:
    """Return a template as a run or an exported folder was trained with it.

    Raises:
        RecipeError: If the folder holds no record of it.
    """
    found = [file for file in (folder / "merged" / FILE, folder / FILE) if file.is_file()]
    if not found:
        raise RecipeError(
            f"{folder} holds no {FILE}, which says what templates a model was trained with; give a run folder whose "
            "training is finished, or an exported one"
        )
    try:
        entries = {
            entry["name"]: entry for entry in json.loads(found[0].read_text("utf-8"))["templates"][template.family]
        }
        if template.name not in entries:
            raise RecipeError(
                f"{found[0]} records no template {template.id}{did_you_mean(template.name, entries)}; it has "
                f"{', '.join(entries)}"
            )
        return Template(**entries[template.name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{found[0]} records no templates of {template.family} that can be read ({type(error).__name__}: {error}); "
            "give the folder of a run that trained this family"
        ) from error


# --------------------------------------------------------------------------- sources


def sources(left: Template, right: Template, *, notes: bool = True) -> Iterator[str]:
    """Yield the parts that differ, each as a unified diff, and the names of those that do not."""
    same = []
    for key in (*_FACTS, *(_NOTES if notes else ()), *_PARTS):
        one, other = (str(getattr(template, key)) for template in (left, right))
        if one == other:
            same += [key] if one else []
        elif key in _PARTS:
            yield key
            yield from _unified(one.splitlines(), other.splitlines())
        else:
            yield f"{key}: {one or 'none'} -> {other or 'none'}"
    if same:
        yield from textwrap.wrap(f"the same in both: {', '.join(same)}", WIDTH, subsequent_indent="  ")
    yield ""


def _unified(left: Sequence[str], right: Sequence[str], context: int = 3) -> Iterator[str]:
    """Yield a unified diff without its heads; a long line goes on below its mark."""
    for line in islice(difflib.unified_diff(left, right, n=context, lineterm=""), 2, None):
        if line.startswith("@@"):
            continue
        mark, text = line[0], line[1:]
        pieces = textwrap.wrap(text, WIDTH - 4, drop_whitespace=False, break_on_hyphens=False) or [""]
        yield f"  {mark} {pieces[0]}".rstrip()
        yield from (f"  {mark}   {piece}".rstrip() for piece in pieces[1:])


# --------------------------------------------------------------------------- prompts


def _prompts(study: Study, encoder: Encoder, left: Template, right: Template) -> Iterator[str]:
    chosen = chosen_of(study, left.family)
    lacking = next((f"{each.id} {chosen.lacks(each)}" for each in (left, right) if chosen.lacks(each)), "")
    try:
        pair = None if lacking else _same_event(study, left, right)
    except LlmrecError as error:
        lacking, pair = str(error), None
    if pair is None:
        why = lacking or f"no training event was drawn for both among {_SEARCHED} rows of each"
        yield from textwrap.wrap(f"The prompts are not compared: {why}", WIDTH, subsequent_indent="  ")
        return
    one, other = pair
    user, item = one.pairs[-1] if one.pairs else (one.user_id, "")
    about = "".join(f", {name} {value}" for name, value in (("user", user), ("item", item)) if value)
    yield f"The prompt of a training event{about}"
    before, after = (marked(example, encoder).split("\n") for example in (one, other))
    if before == after:
        yield "  the same in both"
    yield from _unified(before, after, context=max(len(before), len(after)))


def _same_event(study: Study, left: Template, right: Template) -> tuple[Example, Example] | None:
    """Return a row of each whose last target is one event; None where there is none among the first rows.

    Templates of one shape draw the same events in the same order. A list and a chat meet where they may.
    """
    first: dict[tuple[str, ...], Example] = {}
    second: dict[tuple[str, ...], Example] = {}
    for one, other in islice(zip(rows(study, left), rows(study, right), strict=False), _SEARCHED):
        first.setdefault(_event(one), one)
        second.setdefault(_event(other), other)
        for key in (_event(one), _event(other)):
            if key in first and key in second:
                return first[key], second[key]
    return None


def _event(example: Example) -> tuple[str, ...]:
    """Return what a row's last target is about; alignment has no events, and there it is the row itself."""
    return example.pairs[-1] if example.pairs else (example.id,)
