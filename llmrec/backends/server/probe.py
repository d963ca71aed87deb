"""Asks a server once what it offers, by requests of a few tokens.

Servers that speak the same protocol differ in what they answer: log-probabilities of the likeliest tokens or of named
ones, of prompts, or none. What counts is what comes back, not what a server is called.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from llmrec.backends.encode import Encoder
from llmrec.backends.server import read as remote_read
from llmrec.backends.server.client import MALFORMED, Refused, Wire
from llmrec.backends.server.requests import chat_body, completion_body, likelihood_body
from llmrec.backends.server.spending import usage
from llmrec.durable import Json
from llmrec.errors import BackendError
from llmrec.recipe.schema import ServerSection
from llmrec.types import Message, Prompt, Segment

log = logging.getLogger(__name__)

T = TypeVar("T")

# Digits, accents, another script and a symbol: tokenizers that cut all of these into as many pieces are the same one.
_TEXT = "Heat (1995), Amélie, 羅生門, Ночной дозор: 3.5 of 5, №1 🎬 antidisestablishmentarianism"
_PROMPT = Prompt(messages=(Message("user", (Segment("text", "Answer with one digit, 1 or 2."),)),))
# The most that servers allow, first of all and in older versions.
_TOPS = (20, 5)
_ROOM = 4
# Nats by which servers of one model may differ on a likely token: kernels and half precision round otherwise.
_ALIKE, _LIKELY = 0.5, -3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """What a server can do.

    Attributes:
        exact: It continues token ids as they are, by completions; otherwise it is asked by chat.
        top: Likeliest first tokens that it gives log-probabilities of; 0: none.
        named: It gives those of tokens that the request names.
        likelihood: It gives those of a prompt's tokens.
        continues: It can be told to go on from an assistant turn.
    """

    exact: bool
    top: int
    named: bool = False
    likelihood: bool = False
    continues: bool = False


async def probe_all(wire: Wire, section: ServerSection, encoder: Encoder | None) -> Offers:
    """Find out what servers offer, all of them the same.

    Raises:
        BackendError: As `probe`; or if they differ in what they offer, in whether they list the model, or in what they
            say after one prompt.
    """
    wires = wire.each()
    found = await asyncio.gather(*(probe(one, section, encoder) for one in wires), return_exceptions=True)
    offers = [each for each in found if isinstance(each, Offers)]
    for each in found:
        if isinstance(each, BaseException):
            raise each
    if len(wires) == 1:
        return offers[0]
    differ = [_different(offers[0], each) for each in offers]
    if not any(differ):
        told = [await _told(one, section, encoder, offers[0]) for one in wires]
        differ = [_contradicts(told[0], each) for each in told]
    for one, how in zip(wires, differ, strict=True):
        if how:
            raise BackendError(
                f"eval.server.url: {wires[0].where} and {one.where} do not serve the same model: {how}; serve "
                f"{section.model} alike on all of them, or take one out of the list",
                kind="mismatch",
                at=one.where,
                column="eval.server.url",
            )
    return offers[0]


@dataclass(frozen=True, slots=True)
class _Told:
    """What a server says of its model: whether it lists it, if it lists any, and its likeliest first tokens."""

    listed: bool | None
    tokens: dict[str, float]


async def _told(wire: Wire, section: ServerSection, encoder: Encoder | None, offers: Offers) -> _Told:
    """Ask a server for its models, and for log-probabilities after one prompt where it gives any."""

    def listed(value: Any) -> bool:
        return section.model in [model["id"] for model in value["data"]]

    try:
        known = await wire.ask("/models", None, listed, what=lambda: "a question for its models")
    except BackendError:
        known = None
    if not offers.top:
        return _Told(known, {})
    if offers.exact and encoder is not None:
        body = completion_body(section, list(encoder.piece(_TEXT)), room=1, logprobs=offers.top)
        return _Told(known, await _try(wire, "/completions", body, remote_read.first))
    keys = {"logprobs": True, "top_logprobs": offers.top}
    body = chat_body(section, _PROMPT, room=_ROOM, control=(), continues=False) | keys
    return _Told(known, await _try(wire, "/chat/completions", body, remote_read.chat_first))


def _different(one: Offers, other: Offers) -> str:
    """Say in what two servers offer different things; empty: in nothing."""
    names = [
        name
        for name in ("exact", "top", "named", "likelihood", "continues")
        if getattr(one, name) != getattr(other, name)
    ]
    return ", ".join(f"{name} is {getattr(one, name)} and {getattr(other, name)}" for name in names)


def _contradicts(one: _Told, other: _Told) -> str:
    """Say where two servers speak of different models; empty: nowhere."""
    if None not in (one.listed, other.listed) and one.listed != other.listed:
        return "only one of them lists it"
    for token in one.tokens.keys() | other.tokens.keys():
        here, there = (each.tokens.get(token, min(each.tokens.values(), default=0.0)) for each in (one, other))
        if max(here, there) > _LIKELY and abs(here - there) > _ALIKE:
            return f"after one prompt {token!r} has the log-probability {here:.2f} and {there:.2f}"
    return ""


async def probe(wire: Wire, section: ServerSection, encoder: Encoder | None) -> Offers:
    """Find out what a server offers.

    Raises:
        BackendError: If it does not answer, or ``eval.server.chat: completions`` asks for what it has not.
    """
    if section.chat != "chat":
        found = await _completions(wire, section, encoder) if encoder is not None else "there is no tokenizer"
        if isinstance(found, Offers):
            return found
        if section.chat == "completions":
            raise BackendError(
                f"eval.server.chat: token ids cannot be continued at {wire.where}: {found}; set model.name to the "
                "model that the server has, or eval.server.chat=chat",
                kind="mismatch",
                at=wire.where,
                column="eval.server.chat",
            )
        log.info("%s is asked by chat: %s", wire.where, found)
    return Offers(exact=False, top=await _chat_top(wire, section), continues=await _continues(wire))


async def _completions(wire: Wire, section: ServerSection, encoder: Encoder) -> Offers | str:
    """Return what completions offer, or why token ids cannot be continued."""
    ids = list(encoder.piece(_TEXT))
    # Some servers put a token of their own before a text.
    for asked, lengths in ((_TEXT, (len(ids), len(ids) + 1)), (ids, (len(ids),))):
        try:
            read = await _try(wire, "/completions", completion_body(section, asked, room=1), _read_tokens)
        except Refused as refusal:
            if refusal.status in (401, 402, 403):
                raise
            return "it has no completions" if refusal.no_route else str(refusal)
        if read is None:
            return "it does not count a prompt's tokens, so whether the tokenizer of model.name is its own is not known"
        if read not in lengths:
            return f"the tokenizer of model.name makes {len(ids)} tokens of a text, the server counts {read}"
    top, named = await _labels(wire, section, ids)
    rows = [ids, ids[:_ROOM]]
    return Offers(exact=True, top=top, named=named, likelihood=await _echoes(wire, section, rows))


async def _labels(wire: Wire, section: ServerSection, ids: list[int]) -> tuple[int, bool]:
    """Return how many likeliest tokens a completion gives, and whether it gives named ones."""
    for top in _TOPS:
        body = completion_body(section, ids, room=1, logprobs=top)
        if not await _offered(wire, "/completions", body, lambda value: remote_read.top_labels(value, [("",)])):
            continue
        wanted = ids[:2]
        keys: dict[str, Json] = {"logprob_token_ids": wanted, "return_tokens_as_token_ids": True}
        read = partial(remote_read.named_labels, ids=wanted)
        return top, await _offered(wire, "/completions", body | {"logprobs": 1} | keys, read)
    return 0, False


async def _echoes(wire: Wire, section: ServerSection, rows: list[list[int]]) -> bool:
    # The first token of a text has no log-probability.
    read = partial(remote_read.tail_sums, start=1, tails=[row[1:] for row in rows])
    return await _offered(wire, "/completions", likelihood_body(section, rows), read, count=len(rows))


async def _chat_top(wire: Wire, section: ServerSection) -> int:
    """Return how many likeliest first tokens of a chat answer the server gives; 0 where it thinks first."""
    body = chat_body(section, _PROMPT, room=_ROOM, control=(), continues=False)
    # An answer of any form proves the address, the key and the model: what is refused from here on is not offered.
    await _try(wire, "/chat/completions", body, lambda value: remote_read.completion(value, stop=None, chat=True))
    if section.thinking_tokens:
        return 0
    for top in _TOPS:
        keys = {"logprobs": True, "top_logprobs": top}
        if await _offered(wire, "/chat/completions", body | keys, lambda value: remote_read.chat_labels(value, [""])):
            return top
    return 0


async def _continues(wire: Wire) -> bool:
    """Whether the server is a vLLM, which can be told to go on from an assistant turn."""

    def read(value: Any) -> bool:
        return any(model.get("owned_by") == "vllm" for model in value["data"])

    try:
        return await wire.ask("/models", None, read, what=lambda: "a question for its models")
    except BackendError:
        return False


async def _offered(wire: Wire, path: str, body: dict[str, Json], read: Callable[[Any], Any], *, count: int = 1) -> bool:
    """Whether a server gives what a request asks for: it neither refuses nor leaves it out.

    An answer without its choices is a fault, which says nothing about what is offered.
    """

    def kept(value: Any) -> bool:
        remote_read.choices(value, count)
        try:
            read(value)
        except MALFORMED:
            return False
        return True

    try:
        return await _try(wire, path, body, kept)
    except Refused:
        return False


async def _try(wire: Wire, path: str, body: dict[str, Json], read: Callable[[Any], T]) -> T:
    return await wire.ask(path, body, read, what=lambda: "a first question about what it offers")


def _read_tokens(value: Any) -> int | None:
    """Return the length of the prompt as the server counts it; None where it does not say."""
    remote_read.choices(value, 1)
    found = usage(value)
    return None if found is None else found.prompt_tokens
