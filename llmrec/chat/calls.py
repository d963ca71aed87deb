"""The tool calls of a conversation as typed records, and the calls allowed in each state.

Arguments of calls are from closed lists: fields and values of the catalogue, positions in the shown list, fixed
numbers, and words copied from the last user message. The legal calls are therefore a finite list of texts, and a
language model that searches the token tree of this list (`llmrec.decode.token_tree`) cannot generate anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Set
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from llmrec.chat.facts import Facts
from llmrec.chat.state import MAX_QUERY_CHARACTERS, FrozenModel, State
from llmrec.errors import DataError

FixedSentence = Literal["hello", "thanks", "bye", "decline", "explained"]
MAX_LISTED_VALUES, SEARCH_COUNTS, DEFAULT_LIST_LENGTH = 60, (5, 20, 50), 5
"""Maximum number of values of a field listed in full; numbers of items a search returns; default list length."""

_WORDS = re.compile(r"[\w'’-]+")
# Number of words of a message at which a search text may begin, and its maximum length in words.
_MAX_SEARCH_START, _MAX_SEARCH_WORDS = 40, 5


class Search(FrozenModel):
    """Find items by words."""

    tool: Literal["search"] = "search"
    text: str = Field(min_length=1, max_length=MAX_QUERY_CHARACTERS)
    k: int = Field(20, ge=1, le=200)


class Filter(FrozenModel):
    """Keep items whose field has (or does not have) a value or is within a limit."""

    tool: Literal["filter"] = "filter"
    field: str = Field(max_length=100)
    op: Literal["is", "not", "from", "until"]
    value: str = Field(max_length=1000)


class Similar(FrozenModel):
    """Find items that are often chosen together with given items."""

    tool: Literal["similar"] = "similar"
    items: tuple[int, ...] = Field((), max_length=20)


class Rank(FrozenModel):
    """Rank the candidates, the whole catalogue, or items of the list given by position."""

    tool: Literal["rank"] = "rank"
    items: tuple[int, ...] = Field((), max_length=20)


class Explain(FrozenModel):
    """State facts about an item of the list, and why it was recommended."""

    tool: Literal["explain"] = "explain"
    item: int = Field(ge=1, le=1000)


class Show(FrozenModel):
    """End the turn by showing recommendations; if ``ask`` names a field, also ask about it."""

    tool: Literal["show"] = "show"
    k: int = Field(DEFAULT_LIST_LENGTH, ge=1, le=50)
    ask: str = Field("", max_length=100)


class Ask(FrozenModel):
    """End the turn with a question about a field."""

    tool: Literal["ask"] = "ask"
    field: str = Field(max_length=100)


class ShowProfile(FrozenModel):
    """End the turn by showing the user's profile in words."""

    tool: Literal["profile"] = "profile"


class Forget(FrozenModel):
    """Delete a preference, or all preferences, from the profile, and end the turn."""

    tool: Literal["forget"] = "forget"
    wish: int = Field(0, ge=0, le=1000)


class Say(FrozenModel):
    """End the turn with a fixed sentence."""

    tool: Literal["say"] = "say"
    what: FixedSentence


Call: TypeAlias = Annotated[
    Search | Filter | Similar | Rank | Explain | Show | Ask | ShowProfile | Forget | Say, Field(discriminator="tool")
]
_CALL_ADAPTER: TypeAdapter[Call] = TypeAdapter(Call)


def format_call(call: Call) -> str:
    """Return a tool call as one line of JSON."""
    return json.dumps(call.model_dump(), ensure_ascii=False)


def parse_call(text: str) -> Call:
    """Parse a tool call."""
    try:
        return _CALL_ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"not a tool call: {'.'.join(map(str, first['loc']))}: {first['msg']}", kind="bad-value"
        ) from None


def is_ending_call(call: Call) -> bool:
    """Whether a tool call ends the turn; the others are tools."""
    return isinstance(call, Show | Ask | ShowProfile | Forget | Say)


def allowed_calls(state: State, facts: Facts, intents: Set[str] = frozenset(), *, ending: bool = False) -> list[Call]:
    """Return all tool calls allowed in a state.

    Values of fields with more than `MAX_LISTED_VALUES` values are legal if they share a word with the last user
    message. `Forget` is legal only if the user requests it.

    Args:
        state: The state, with the last user message.
        facts: The facts of the catalogue.
        intents: The intents of that message, without the words of titles (`llmrec.chat.reading.ParsedMessage`).
        ending: Return endings only, as after the last tool of a turn.
    """
    results: list[Call] = list(_ending_calls(state, facts, intents))
    return results if ending else [*_tool_calls(state, facts), *results]


def _tool_calls(state: State, facts: Facts) -> Iterator[Call]:
    message = next((line.text for line in reversed(state.lines) if line.role == "user"), "")
    words = _WORDS.findall(message)[:_MAX_SEARCH_START]
    spans = {" ".join(words[at : at + size]) for at in range(len(words)) for size in range(1, _MAX_SEARCH_WORDS + 1)}
    for text in sorted(span for span in spans if len(span) <= MAX_QUERY_CHARACTERS):
        yield from (Search(text=text, k=k) for k in SEARCH_COUNTS)
    lowered = {word.casefold() for word in words}
    for field, values in facts.values.items():
        near = [
            value
            for value in values
            if len(values) <= MAX_LISTED_VALUES or lowered & {w.casefold() for w in _WORDS.findall(value)}
        ]
        for value in near:
            yield from (Filter(field=field, op=op, value=value) for op in ("is", "not"))
            if field in facts.numeric:
                yield from (Filter(field=field, op=op, value=value) for op in ("from", "until"))
    positions = range(1, len(state.shown) + 1)
    if state.liked:
        yield Similar()
    yield from (Similar(items=(position,)) for position in positions)
    yield from (Similar(items=(one, other)) for one in positions for other in positions if one < other)
    yield Rank()
    if len(positions) > 1:
        yield Rank(items=tuple(positions))
    yield from (Explain(item=position) for position in positions)


def _ending_calls(state: State, facts: Facts, intents: Set[str]) -> Iterator[Call]:
    fields = [field for field in facts.values if field not in state.asked]
    for k in (1, 3, DEFAULT_LIST_LENGTH):
        yield Show(k=k)
        yield from (Show(k=k, ask=field) for field in fields)
    yield from (Ask(field=field) for field in fields)
    yield ShowProfile()
    if intents & {"forget", "lift"}:
        yield from (Forget(wish=number) for number in range(len(state.profile) + 1))
    yield from (Say(what=what) for what in ("hello", "thanks", "bye", "decline", "explained"))
