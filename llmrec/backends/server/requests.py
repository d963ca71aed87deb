"""Writes the requests that a server is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmrec.durable import Json
from llmrec.guard import neutralise
from llmrec.recipe.schema import ServerSection
from llmrec.types import Prompt


def completion_body(section: ServerSection, ids: Sequence[int] | str, *, room: int, **keys: Any) -> dict[str, Json]:
    """Return a request to continue token ids, or a text, greedily."""
    prompt = ids if isinstance(ids, str) else list(ids)
    return _with_extra(section, {"prompt": prompt, "max_tokens": room, **keys})


def likelihood_body(section: ServerSection, rows: Sequence[Sequence[int]]) -> dict[str, Json]:
    """Return a request for the log-probabilities of whole rows of token ids."""
    keys: dict[str, Json] = {"prompt": [list(row) for row in rows], "max_tokens": 1, "echo": True, "logprobs": 1}
    return _with_extra(section, keys)


def chat_body(
    section: ServerSection, prompt: Prompt, *, room: int, control: Sequence[str], continues: bool, **keys: Any
) -> dict[str, Json]:
    """Return a request to answer chat turns greedily.

    The given part of the answer stands in an assistant turn of its own, at the end. A server that is known to go on
    from there is told to; others may begin their turn anew.

    Args:
        section: Model, room for thinking, further keys.
        prompt: The turns.
        room: Tokens of the answer.
        control: What no text may spell out, where the server's tokens are known.
        continues: Whether the server can be told to go on from an assistant turn.
        keys: Further keys of the request.
    """
    turns = [{"role": turn.role, "content": neutralise(turn.text, control)} for turn in prompt.messages]
    given = neutralise("".join(segment.text for segment in prompt.answer_prefix), control)
    if given:
        turns.append({"role": "assistant", "content": given})
        if continues:
            keys |= {"continue_final_message": True, "add_generation_prompt": False}
    return _with_extra(section, {"messages": turns, "max_tokens": room + section.thinking_tokens, **keys})


def _with_extra(section: ServerSection, keys: dict[str, Json]) -> dict[str, Json]:
    body = {"model": section.model, "temperature": 0, **keys, **section.extra}
    return {name: value for name, value in body.items() if value is not None}
