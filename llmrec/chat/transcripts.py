"""Transcripts of conversations as JSON lines, which can be replayed to test that replies do not change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from llmrec.chat.calls import Call
from llmrec.chat.conversation import Conversation, Reply
from llmrec.chat.state import FrozenModel, State
from llmrec.durable import write_text
from llmrec.errors import DataError


class Turn(FrozenModel):
    """A line of a transcript.

    Attributes:
        user: The user message; null begins a new conversation.
        calls: The calls of the turn.
        items: Ids of the list.
        text: The reply.
    """

    user: str | None
    calls: tuple[Call, ...] = ()
    items: tuple[str, ...] = ()
    text: str = ""

    @staticmethod
    def of(message: str, reply: Reply) -> Turn:
        """Return a message and its reply as a line of a transcript."""
        return Turn(user=message, calls=reply.calls, items=reply.items, text=reply.text)


def write(file: Path, turns: Sequence[Turn]) -> None:
    """Write a transcript atomically."""
    write_text(file, "".join(json.dumps(turn.model_dump(), ensure_ascii=False) + "\n" for turn in turns))


def check_overwritable(file: Path) -> None:
    """Reject an existing file that is not a transcript."""
    if not file.exists():
        return
    try:
        read(file)
    except DataError as error:
        raise DataError(
            f"--save {file}: this file is not a transcript and is not overwritten ({error}); choose another file, or "
            "move it away",
            kind="exists",
            at=file,
            column="--save",
        ) from None


def read(file: Path) -> list[Turn]:
    """Read a transcript."""
    try:
        # Split only at line feeds: JSON does not escape other line ends, such as U+2028.
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the transcript {file} cannot be read: {error}", kind="unreadable", at=file) from None
    results = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            results.append(Turn.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "line"
            raise DataError(
                f"{file}, line {number}: {key}: {first['msg']}; a line has the keys {', '.join(Turn.model_fields)}",
                kind="syntax",
                at=file,
                column=key,
            ) from None
    return results


def replay_differences(turns: Sequence[Turn], conversation: Conversation) -> Iterator[str]:
    """Replay the conversations of a transcript, and yield a line for each different reply.

    Raises:
        LlmrecError: If an engine fails.
    """
    state = State()
    for number, turn in enumerate(turns, start=1):
        if turn.user is None:
            state = State()
            continue
        reply = conversation.answer(state, turn.user)
        state, now = reply.state, Turn.of(turn.user, reply)
        for key in ("calls", "items", "text"):
            then, result = turn.model_dump()[key], now.model_dump()[key]
            if then != result:
                yield f"line {number}, {turn.user[:60]!r}: {key} were {_short_json(then)}, are {_short_json(result)}"
                break


def _short_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:200]
