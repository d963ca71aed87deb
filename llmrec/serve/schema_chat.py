"""What clients of a conversation send and get. The client holds the state: a service keeps nothing of a person."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from llmrec.chat.calls import Call
from llmrec.chat.state import State
from llmrec.serve.schema import NUMBER, Body, CatalogueItem, Id, Words


class ChatBody(Body):
    """One line of the user; ``state`` is that of the last answer, and is left out at the beginning."""

    text: Words = Field(examples=["a comedy, but not horror"])
    state: State = State()
    model: Id | None = Field(None, description="What ranks; the default without one.")
    k: Annotated[int, Field(ge=1, le=50), NUMBER] = 5


class ChatAnswer(BaseModel):
    """The answer, and the state to send with the next line; its profile may be edited before."""

    text: str
    items: list[CatalogueItem]
    calls: list[Call]
    profile: list[str] = Field(description="The profile in words, in the order of the state's.")
    state: State
    milliseconds: float
