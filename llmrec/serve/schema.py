"""Request and response bodies of endpoints, with limits and examples for OpenAPI; see also `verbs`.

Unknown keys are rejected, so that a misspelt option is reported.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llmrec.chat.calls import Call
from llmrec.chat.state import State
from llmrec.data.read.limits import ID_LIMIT
from llmrec.data.requests import is_integer

MAX_EVENTS = 1000
"""Maximum number of interactions in the history of a request."""
MAX_CANDIDATES = 2000
MAX_BATCH = 64
MAX_MESSAGES = 200
"""Maximum number of messages of a conversation in OpenAI's format."""
MAX_ITEMS = 1000
"""Maximum number of items written, or interactions added or returned, per call."""
MAX_TEXT_LENGTH = 4000

# Ids must not contain NUL, lone surrogates or control characters, and must be visible.
_CONTROL_CHARACTERS = r"\x00-\x1f\x7f-\x9f"
# Listed in full, since \s differs between languages.
_SPACE_CHARACTERS = r"\x20\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
NAME_PATTERN = rf"^[^{_CONTROL_CHARACTERS}]*[^{_CONTROL_CHARACTERS}{_SPACE_CHARACTERS}][^{_CONTROL_CHARACTERS}]*$"
_VISIBLE_CHARACTER = re.compile(rf"[^{_CONTROL_CHARACTERS}{_SPACE_CHARACTERS}]")
_VISIBLE_TEXT_PATTERN = rf"^[^\x00]*[^{_CONTROL_CHARACTERS}{_SPACE_CHARACTERS}][^\x00]*$"
Id = Annotated[str, StringConstraints(min_length=1, max_length=ID_LIMIT, pattern=NAME_PATTERN)]
MAX_INTEGER = 2**53 - 1
"""The largest integer: clients in JavaScript round larger ones."""


def _number_as_text(value: object) -> object:
    """Convert an integer to a string, as in files; return other values unchanged."""
    return str(int(value)) if is_integer(value) and abs(value) <= MAX_INTEGER else value


_Integer = Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]
DataId = Annotated[Id, BeforeValidator(_number_as_text, json_schema_input_type=Id | _Integer)]
"""The id of an item or a user: a text or an integer, as in files."""
Prose = Annotated[str, StringConstraints(max_length=MAX_TEXT_LENGTH, pattern=r"^[^\x00]*$")]
Words = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_LENGTH, pattern=_VISIBLE_TEXT_PATTERN)]
_FieldName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NAME_PATTERN)]
# Other keys are rejected; pydantic does not include this in a schema.
_NO_OTHER_KEYS: Any = {"additionalProperties": False}
Fields = Annotated[dict[_FieldName, Prose], Field(max_length=50, json_schema_extra=_NO_OTHER_KEYS)]
_Values: TypeAlias = Annotated[dict[Id, list[Words]], Field(max_length=20, json_schema_extra=_NO_OTHER_KEYS)]
_NonEmptyValues: TypeAlias = Annotated[
    dict[Id, Annotated[list[Words], Field(min_length=1)]], Field(max_length=20, json_schema_extra=_NO_OTHER_KEYS)
]


def _no_text(value: object) -> object:
    """Reject texts that pydantic would accept as numbers although JSON does not."""
    if isinstance(value, str | bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


STRICT_NUMBER = BeforeValidator(_no_text)
_Float = Annotated[float, Field(allow_inf_nan=False), STRICT_NUMBER]
Bool = Annotated[bool, Field(strict=True)]
_DATE_PATTERN = re.compile(r"\d{4}-\d\d-\d\d")


def _no_number_as_text(value: object) -> object:
    """Reject numbers in text form that pydantic would accept as times."""
    if isinstance(value, bool) or (isinstance(value, str) and not _DATE_PATTERN.match(value)):
        raise PydanticCustomError("moment", "Input should be a number, or a time such as 2024-01-06T13:28:00Z")
    return value


Moment = Annotated[
    Annotated[float, Field(allow_inf_nan=False)] | datetime,
    BeforeValidator(_no_number_as_text),
]
_TIME_DESCRIPTION = "A number in the unit of the data (seconds), or ISO 8601 (UTC if it has no time zone)."


def time_as_number(moment: float | datetime, per_second: float) -> float:
    """Return a time in the unit of the data.

    Args:
        moment: A number in this unit, or a point in time.
        per_second: Units in a second.
    """
    if not isinstance(moment, datetime):
        return moment
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * per_second


def milliseconds_since(begun: float) -> float:
    """Return the milliseconds since a time of the monotonic clock."""
    return round(1000 * (time.monotonic() - begun), 3)


class Body(BaseModel):
    """Base class of request bodies; unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --------------------------------------------------------------------------- requests


class ItemText(Body):
    """An item by id, by title, or both; the title replaces the catalogue's title."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["item_id"], "properties": {"item_id": {"type": ["string", "integer"]}}},
                {"required": ["title"], "properties": {"title": {"type": "string", "pattern": _VISIBLE_TEXT_PATTERN}}},
            ]
        }
    )

    item_id: DataId | None = None
    title: Prose | None = None
    fields: Fields = {}

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.item_id is None and not _VISIBLE_CHARACTER.search(self.title or ""):
            raise PydanticCustomError("nameless", "give an item_id or a title")
        return self


class PastEvent(ItemText):
    """A past interaction; histories are oldest first."""

    rating: _Float | None = None
    timestamp: Annotated[Moment | None, Field(description=_TIME_DESCRIPTION)] = None


class Quota(Body):
    """Maximum number of items in a list that share a value of a field."""

    field: Id
    most: Annotated[int, Field(ge=1, le=1000), STRICT_NUMBER]


class Rules(Body):
    """Business rules; forbidden items are never in a list.

    ``only`` and ``without`` compare fields of the catalogue, such as ``category`` or ``in_stock``, with values; a field
    with several values, separated by commas, matches by any of them.
    """

    only: _NonEmptyValues = {}
    without: _Values = {}
    block: Annotated[list[DataId], Field(max_length=MAX_ITEMS)] = []
    quotas: Annotated[list[Quota], Field(max_length=10)] = []
    diversity: Annotated[float, Field(ge=0.0, le=1.0), STRICT_NUMBER] = 0.0


class NewItem(Body):
    """An item of the catalogue."""

    item_id: DataId
    title: Words
    fields: Fields = {}


class ItemsBody(Body):
    """Items to add, or to replace."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"items": [{"item_id": "n1", "title": "A new film", "fields": {}}]}]}
    )

    items: Annotated[list[NewItem], Field(min_length=1, max_length=MAX_ITEMS)]


class NewEvent(Body):
    """An interaction of a user with an item."""

    user_id: DataId
    item_id: DataId
    rating: _Float | None = None
    timestamp: Annotated[Moment | None, Field(description=f"{_TIME_DESCRIPTION} By default now.")] = None


class EventsBody(Body):
    """Interactions to add to histories; models are not retrained."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"events": [{"user_id": "42", "item_id": "7"}]}]})

    events: Annotated[list[NewEvent], Field(min_length=1, max_length=MAX_ITEMS)]


# --------------------------------------------------------------------------- responses


class Failure(BaseModel):
    """An error, for programs (``kind``) and people (``message``)."""

    kind: str
    message: str
    at: str | None = None


class Failed(BaseModel):
    """The body of every error response."""

    error: Failure


class OpenAIFailure(BaseModel):
    """An error in OpenAI's format."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = None
    code: str


class OpenAIFailed(BaseModel):
    """The body of every error response of ``/v1/chat/completions``."""

    error: OpenAIFailure


class ModelCard(BaseModel):
    """A served model."""

    name: str
    kind: Literal["language model", "classic", "fusion"]
    signature: str = Field(description="Hash of everything that can change an answer, except the request.")
    answers: list[str] = Field(
        description="Supported tasks: rank, or tasks about an item (rating, ctr, explanation, review, stars)."
    )
    strategies: list[str] = []


class Models(BaseModel):
    """All models, the default model first."""

    models: list[ModelCard]


class CatalogueItem(BaseModel):
    """An item of the catalogue."""

    model_config = ConfigDict(from_attributes=True)

    item_id: str
    title: str
    fields: dict[str, str] = {}


class ChatBody(Body):
    """A user message, with the ``state`` from the previous answer (none at the beginning)."""

    text: Words = Field(examples=["a comedy, but not horror"])
    state: State = State()
    model: Id | None = Field(None, description="Model that ranks. Default: the default model.")
    k: Annotated[int, Field(ge=1, le=50), STRICT_NUMBER] = 5


class ChatAnswer(BaseModel):
    """The reply, and the state to send with the next message; the profile in it may be edited."""

    text: str
    items: list[CatalogueItem]
    calls: list[Call]
    profile: list[str] = Field(description="The user profile in words, in the same order as in the state.")
    state: State
    milliseconds: float


class TextContent(BaseModel):
    """A text in the content of a message."""

    type: Literal["text"]
    text: Words


class UserMessage(BaseModel):
    """A message of the user in OpenAI's format."""

    role: Literal["user"]
    content: Words | Annotated[list[TextContent], Field(min_length=1)]

    @property
    def text(self) -> str:
        """The texts of the content, one per line."""
        return self.content if isinstance(self.content, str) else "\n".join(entry.text for entry in self.content)

    @model_validator(mode="after")
    def _short(self) -> Self:
        if len(self.text) > MAX_TEXT_LENGTH:
            raise PydanticCustomError("string_too_long", "the texts have more than 4000 characters together")
        return self


class OtherMessage(BaseModel):
    """Any other message in OpenAI's format; its content is ignored."""

    role: Literal["assistant", "system", "developer", "tool", "function"]


class CompletionBody(BaseModel):
    """A whole conversation in OpenAI's format, which ends with a user message; unsupported keys are ignored."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "a comedy, but not horror"}]}]},
    )

    model: Id | None = Field(None, description="Model that ranks. Default: the default model.")
    messages: Annotated[
        list[Annotated[UserMessage | OtherMessage, Field(discriminator="role")]],
        Field(min_length=1, max_length=MAX_MESSAGES),
    ]
    k: Annotated[
        int, Field(ge=1, le=50, description="Number of items per list; an extension of OpenAI's format."), STRICT_NUMBER
    ] = 5
    stream: Annotated[bool | None, Field(description="Streaming is not supported.")] = None
    n: Annotated[int | None, Field(description="Only 1 is supported.")] = None

    @field_validator("stream")
    @classmethod
    def _no_stream(cls, value: bool | None) -> bool | None:
        if value:
            raise PydanticCustomError("stream", "streaming is not supported; remove stream")
        return value

    @field_validator("n")
    @classmethod
    def _single(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise PydanticCustomError("choices", "only one choice is supported; remove n")
        return value

    @field_validator("messages")
    @classmethod
    def _ends_with_user(cls, value: list[UserMessage | OtherMessage]) -> list[UserMessage | OtherMessage]:
        if value[-1].role != "user":
            raise PydanticCustomError("last_message", "the last message should have the role user")
        return value


class CompletionMessage(BaseModel):
    """The reply message."""

    role: Literal["assistant"] = "assistant"
    content: str


class CompletionChoice(BaseModel):
    """The only choice in a completion."""

    index: Literal[0] = 0
    message: CompletionMessage
    finish_reason: Literal["stop"] = "stop"


class Completion(BaseModel):
    """A reply in OpenAI's format."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Seconds since 1970.")
    model: str
    choices: list[CompletionChoice]
    items: list[CatalogueItem] = Field(description="The listed items, best first; an extension of OpenAI's format.")


class Preference(BaseModel):
    """The share of votes for the first of two models."""

    share: float
    low: float = Field(description="Lower end of Wilson's 95 % interval.")
    high: float = Field(description="Upper end.")


class FoundItems(BaseModel):
    """Items whose title or id contains the search text."""

    items: list[CatalogueItem]
    total: int


class KnownEvent(BaseModel):
    """An interaction in a user's history."""

    item_id: str
    title: str | None
    rating: float | None = None
    timestamp: float | None = None


class KnownUser(BaseModel):
    """A user's history, oldest first."""

    user_id: str
    history: list[KnownEvent]


class Stored(BaseModel):
    """Number of stored records."""

    stored: int


class Removed(BaseModel):
    """Number of removed records."""

    removed: int


IN_MEMORY_NOTE = "recommenders with features keep them until the service is restarted"
"""Message on what remains of an erased user whose features a recommender has read."""


class Erased(BaseModel):
    """The result of deleting a user's data, and what it cannot reach."""

    user_id: str
    events: int
    features: int
    remains: list[str] = Field(description="Remaining user data, for example in model weights until the next training.")


class Health(BaseModel):
    """Whether the process is alive."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Whether the models are ready."""

    ready: bool
    models: list[str]
