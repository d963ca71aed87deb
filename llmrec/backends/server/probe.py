"""Detects what a server supports, by sending short requests.

Servers with the same protocol differ in their log-probabilities: of the most likely tokens, of named tokens, of
prompts, or none. The probe goes by their answers, not by their names.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

from llmrec.backends.encode import Encoder
from llmrec.backends.server.client import (
    MALFORMED,
    FinalServerError,
    ServerClient,
    chat_body,
    completion_body,
    likelihood_body,
    parse_usage,
)
from llmrec.durable import Json
from llmrec.errors import BackendError
from llmrec.recipe.schema import ServerSection
from llmrec.types import Completion, Cost, Message, Prompt, Segment

# Parsing of answers: texts without reasoning, choices by index, log-probabilities.
#
# All parsers raise a ValueError, LookupError or TypeError for a malformed answer, whose request is then retried.


FLOOR_MARGIN = 1.0
"""Distance in nats of a label that was not returned below the least likely returned token."""

_THOUGHT = re.compile(r"\A.*</think(?:ing)?>\s*", re.DOTALL)
_THINKING = re.compile(r"<think(?:ing)?>")


@dataclass(frozen=True, slots=True)
class LabelLogProbabilities:
    """Log-probabilities of labels in nats, and how many labels got the minimum because they were not returned."""

    logprobs: tuple[float, ...]
    floored: int


# --------------------------------------------------------------------------- texts


def parse_choices(value: Any, count: int) -> list[Mapping[str, Any]]:
    """Return the choices in an answer, in the order of the prompts.

    Raises:
        ValueError: If one is missing or duplicate.
    """
    result = value["choices"]
    indices = [choice.get("index", 0 if len(result) == 1 else None) for choice in result]
    if len(result) != count or set(indices) != set(range(count)):
        raise ValueError(f"expected {count} choices, received choices with the indices {indices}")
    return [choice for _, choice in sorted(zip(indices, result, strict=True), key=itemgetter(0))]


def parse_completion(value: Any, *, stop: str | None, chat: bool) -> Completion:
    """Parse a generated text, without a reasoning block and up to the stop text.

    An unfinished reasoning block is an empty answer with finish reason ``length``. Without usage, counts are 0. Line
    breaks before the answer of a chat do not end it.
    """
    (choice,) = parse_choices(value, 1)
    thought = False
    if chat:
        message = choice["message"]
        thought = bool(message.get("reasoning_content") or message.get("reasoning"))
        text = message.get("content") or message.get("refusal") or ""
    else:
        text = choice["text"]
    if not isinstance(text, str):
        raise ValueError("the text of the answer is not a string")
    # JSON can contain lone surrogates, which cannot be encoded as UTF-8.
    text = text.encode("utf-8", "replace").decode("utf-8")
    cost = parse_usage(value) or Cost()
    result = Completion(
        text=text,
        prompt_tokens=cost.prompt_tokens,
        completion_tokens=cost.completion_tokens,
        finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
    )
    text, ended = remove_reasoning(text)
    if not ended:
        return replace(result, text="", finish_reason="length")
    if chat or thought or text != result.text:
        text = text.lstrip()
    if stop is not None and stop in text:
        return replace(result, text=text[: text.index(stop)], finish_reason="stop")
    return replace(result, text=text)


def remove_reasoning(text: str) -> tuple[str, bool]:
    """Return the text after the last reasoning block, and whether all blocks end.

    Some templates open the block in the prompt, so that the answer contains only its end.
    """
    rest = _THOUGHT.sub("", text)
    return rest, _THINKING.search(rest) is None


# --------------------------------------------------------------------------- log-probabilities


def parse_named_labels(value: Any, ids: Sequence[int]) -> tuple[float, ...]:
    """Parse the log-probabilities of requested token ids at the first generated token.

    Raises:
        LookupError: If one of them was not returned.
    """
    result = parse_first_logprobs(value)
    return tuple(_parse_logprob(result[f"token_id:{i}"]) for i in ids)


def parse_top_labels(value: Any, spellings: Sequence[Sequence[str]]) -> LabelLogProbabilities:
    """Parse the log-probabilities of labels among the most likely first tokens of a completion.

    The spellings are how servers may write each label's token, the most reliable first.
    """
    result = parse_first_logprobs(value)
    return label_logprobs(result, [next((name for name in names if name in result), names[0]) for names in spellings])


def parse_chat_labels(value: Any, texts: Sequence[str]) -> LabelLogProbabilities:
    """Parse the log-probabilities of labels among the most likely first tokens of a chat answer.

    White space around a token is not part of its label: an answer may begin with either form, so both are summed.
    """
    return label_logprobs(parse_chat_logprobs(value), [text.strip() for text in texts])


def parse_chat_logprobs(value: Any) -> dict[str, float]:
    """Return the log-probabilities of the most likely first tokens of a chat answer, by text without white space."""
    (choice,) = parse_choices(value, 1)
    result: dict[str, list[float]] = {}
    for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
        result.setdefault(entry["token"].strip(), []).append(_parse_logprob(entry["logprob"]))
    return {name: _log_sum_exp(values) for name, values in result.items()}


def label_logprobs(returned: Mapping[str, float], names: Sequence[str]) -> LabelLogProbabilities:
    """Return the log-probability of each label; missing labels get a value below the smallest returned one.

    Raises:
        ValueError: If nothing was returned.
    """
    if not returned:
        raise ValueError("no log-probability was returned")
    values = {name: _parse_logprob(value) for name, value in returned.items()}
    floor = min(values.values()) - FLOOR_MARGIN
    return LabelLogProbabilities(
        tuple(values.get(name, floor) for name in names),
        sum(name not in values for name in names),
    )


def sum_candidate_logprobs(value: Any, start: int, tails: Sequence[Sequence[int]]) -> list[float]:
    """Sum the log-probabilities of each candidate's tokens after ``start`` tokens of the echoed prompt."""
    sums = []
    for choice, tail in zip(parse_choices(value, len(tails)), tails, strict=True):
        rows = choice["logprobs"]["token_logprobs"]
        if len(rows) < start + len(tail):
            raise ValueError(f"expected {start + len(tail)} log-probabilities, received {len(rows)}")
        sums.append(sum(_parse_logprob(row) for row in rows[start : start + len(tail)]))
    return sums


def parse_first_logprobs(value: Any) -> dict[str, float]:
    """Return the log-probabilities of the most likely first tokens of a completion, by text."""
    (choice,) = parse_choices(value, 1)
    return {name: _parse_logprob(nats) for name, nats in choice["logprobs"]["top_logprobs"][0].items()}


def _parse_logprob(value: Any) -> float:
    """Return a log-probability; servers write a large negative number for zero probability."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > 1e-3:
        raise ValueError(f"{value!r} is not a log-probability")
    return float(value)


def _log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


log = logging.getLogger(__name__)

T = TypeVar("T")

# Digits, accents, another script and a symbol: tokenizers with the same number of tokens are treated as equal.
_PROBE_TEXT = "Heat (1995), Amélie, 羅生門, Ночной дозор: 3.5 of 5, №1 🎬 antidisestablishmentarianism"
_PROBE_PROMPT = Prompt(messages=(Message("user", (Segment("text", "Answer with one digit, 1 or 2."),)),))
# The maximum values that servers allow, in current and older versions.
_TOP_COUNTS = (20, 5)
_MAX_TOKENS = 4
# Nats by which servers with the same model may differ for a likely token, because of kernels and half precision.
_ALIKE, _LIKELY = 0.5, -3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCapabilities:
    """The capabilities of a server.

    Attributes:
        exact: Whether it continues token ids, by completions; otherwise chat is used.
        top: The number of most likely first tokens with log-probabilities; 0: none.
        named: Whether it returns log-probabilities of requested tokens.
        likelihood: Whether it returns log-probabilities of a prompt's tokens.
        continues: Whether it can continue an assistant turn.
    """

    exact: bool
    top: int
    named: bool = False
    likelihood: bool = False
    continues: bool = False


async def probe_servers(wire: ServerClient, section: ServerSection, encoder: Encoder | None) -> ServerCapabilities:
    """Detect the capabilities of several servers, which must be equal.

    Raises:
        BackendError: As `probe_server`; or if they differ in capabilities, in whether they list the model, or in their
            answers to one prompt.
    """
    wires = wire.each()
    result = await asyncio.gather(*(probe_server(one, section, encoder) for one in wires), return_exceptions=True)
    offers = [item for item in result if isinstance(item, ServerCapabilities)]
    for item in result:
        if isinstance(item, BaseException):
            raise item
    if len(wires) == 1:
        return offers[0]
    differ = [_describe_capability_difference(offers[0], offer) for offer in offers]
    if not any(differ):
        reports = [await _request_model_report(one, section, encoder, offers[0]) for one in wires]
        differ = [_describe_model_difference(reports[0], item) for item in reports]
    for one, difference in zip(wires, differ, strict=True):
        if difference:
            raise BackendError(
                f"eval.server.url: {wires[0].where} and {one.where} do not serve the same model: {difference}; serve "
                f"{section.model} on all servers, or remove one server from the list",
                kind="mismatch",
                at=one.where,
                column="eval.server.url",
            )
    return offers[0]


@dataclass(frozen=True, slots=True)
class _ModelReport:
    """What a server reports about its model: whether it lists the model, and the most likely first tokens."""

    listed: bool | None
    tokens: dict[str, float]


async def _request_model_report(
    wire: ServerClient, section: ServerSection, encoder: Encoder | None, offers: ServerCapabilities
) -> _ModelReport:
    """Request a server's list of models, and log-probabilities after a prompt if it returns any."""

    def listed(value: Any) -> bool:
        return section.model in [model["id"] for model in value["data"]]

    try:
        known = await wire.ask("/models", None, listed, what=lambda: "the request for its models")
    except BackendError:
        known = None
    if not offers.top:
        return _ModelReport(known, {})
    if offers.exact and encoder is not None:
        body = completion_body(section, list(encoder.piece(_PROBE_TEXT)), room=1, logprobs=offers.top)
        return _ModelReport(known, await _send_test_request(wire, "/completions", body, parse_first_logprobs))
    keys = {"logprobs": True, "top_logprobs": offers.top}
    body = chat_body(section, _PROBE_PROMPT, room=_MAX_TOKENS, control=(), continues=False) | keys
    return _ModelReport(known, await _send_test_request(wire, "/chat/completions", body, parse_chat_logprobs))


def _describe_capability_difference(one: ServerCapabilities, other: ServerCapabilities) -> str:
    """Return how the capabilities of two servers differ; empty if they are equal."""
    there = asdict(other)
    return ", ".join(f"{name} is {here} and {there[name]}" for name, here in asdict(one).items() if here != there[name])


def _describe_model_difference(one: _ModelReport, other: _ModelReport) -> str:
    """Return the evidence that two servers have different models; empty if there is none."""
    if None not in (one.listed, other.listed) and one.listed != other.listed:
        return "only one of the two servers lists the model"
    for token in one.tokens.keys() | other.tokens.keys():
        here, there = (item.tokens.get(token, min(item.tokens.values(), default=0.0)) for item in (one, other))
        if max(here, there) > _LIKELY and abs(here - there) > _ALIKE:
            return f"after the same prompt, {token!r} has the log-probabilities {here:.2f} and {there:.2f}"
    return ""


async def probe_server(wire: ServerClient, section: ServerSection, encoder: Encoder | None) -> ServerCapabilities:
    """Detect the capabilities of a server.

    Raises:
        BackendError: If it does not answer, or lacks what ``eval.server.chat: completions`` needs.
    """
    if section.chat != "chat":
        result = await _probe_completions(wire, section, encoder) if encoder is not None else "there is no tokenizer"
        if isinstance(result, ServerCapabilities):
            return result
        if section.chat == "completions":
            raise BackendError(
                f"eval.server.chat: {wire.where} does not accept token IDs as a prompt ({result}); set model.name to "
                "the server's model, or eval.server.chat=chat",
                kind="mismatch",
                at=wire.where,
                column="eval.server.chat",
            )
        log.info("%s uses the chat endpoint: %s", wire.where, result)
    return ServerCapabilities(
        exact=False, top=await _probe_chat_logprobs(wire, section), continues=await _can_continue(wire)
    )


async def _probe_completions(wire: ServerClient, section: ServerSection, encoder: Encoder) -> ServerCapabilities | str:
    """Return the capabilities for completions, or why token ids cannot be continued."""
    ids = list(encoder.piece(_PROBE_TEXT))
    # Some servers add a token before the text.
    for text, lengths in ((_PROBE_TEXT, (len(ids), len(ids) + 1)), (ids, (len(ids),))):
        try:
            read = await _send_test_request(
                wire, "/completions", completion_body(section, text, room=1), _parse_prompt_length
            )
        except FinalServerError as refusal:
            if refusal.status in (401, 402, 403):
                raise
            return "it has no completions API" if refusal.no_route else str(refusal)
        if read is None:
            return "it does not report a prompt's tokens, so the tokenizer of model.name cannot be checked"
        if read not in lengths:
            return f"the tokenizer of model.name splits a text into {len(ids)} tokens, the server into {read}"
    top, named = await _probe_label_logprobs(wire, section, ids)
    rows = [ids, ids[:_MAX_TOKENS]]
    return ServerCapabilities(
        exact=True, top=top, named=named, likelihood=await _has_prompt_logprobs(wire, section, rows)
    )


async def _probe_label_logprobs(wire: ServerClient, section: ServerSection, ids: list[int]) -> tuple[int, bool]:
    """Return how many of the most likely tokens a completion can return, and whether it accepts token ids."""
    for top in _TOP_COUNTS:
        body = completion_body(section, ids, room=1, logprobs=top)
        if not await _is_supported(wire, "/completions", body, lambda value: parse_top_labels(value, [("",)])):
            continue
        requested = ids[:2]
        keys: dict[str, Json] = {"logprob_token_ids": requested, "return_tokens_as_token_ids": True}
        read = partial(parse_named_labels, ids=requested)
        return top, await _is_supported(wire, "/completions", body | {"logprobs": 1} | keys, read)
    return 0, False


async def _has_prompt_logprobs(wire: ServerClient, section: ServerSection, rows: list[list[int]]) -> bool:
    # The first token of a text has no log-probability.
    read = partial(sum_candidate_logprobs, start=1, tails=[row[1:] for row in rows])
    return await _is_supported(wire, "/completions", likelihood_body(section, rows), read, count=len(rows))


async def _probe_chat_logprobs(wire: ServerClient, section: ServerSection) -> int:
    """Return how many most likely first tokens a chat answer returns; 0 if the model writes reasoning first."""
    body = chat_body(section, _PROBE_PROMPT, room=_MAX_TOKENS, control=(), continues=False)
    # Any answer proves that URL, key and model are valid: later errors mean that a capability is missing.
    await _send_test_request(
        wire, "/chat/completions", body, lambda value: parse_completion(value, stop=None, chat=True)
    )
    if section.thinking_tokens:
        return 0
    for top in _TOP_COUNTS:
        keys = {"logprobs": True, "top_logprobs": top}
        if await _is_supported(wire, "/chat/completions", body | keys, lambda value: parse_chat_labels(value, [""])):
            return top
    return 0


async def _can_continue(wire: ServerClient) -> bool:
    """Whether the server is vLLM, which can continue an assistant message."""

    def read(value: Any) -> bool:
        return any(model.get("owned_by") == "vllm" for model in value["data"])

    try:
        return await wire.ask("/models", None, read, what=lambda: "the request for its models")
    except BackendError:
        return False


async def _is_supported(
    wire: ServerClient, path: str, body: dict[str, Json], read: Callable[[Any], Any], *, count: int = 1
) -> bool:
    """Whether a server accepts a request and returns the requested result.

    An answer without choices is a fault, which shows nothing about capabilities.
    """

    def kept(value: Any) -> bool:
        parse_choices(value, count)
        try:
            read(value)
        except MALFORMED:
            return False
        return True

    try:
        return await _send_test_request(wire, path, body, kept)
    except FinalServerError:
        return False


async def _send_test_request(wire: ServerClient, path: str, body: dict[str, Json], read: Callable[[Any], T]) -> T:
    return await wire.ask(path, body, read, what=lambda: "a test request")


def _parse_prompt_length(value: Any) -> int | None:
    """Return the length of the prompt in tokens as reported by the server; None if it is not reported."""
    parse_choices(value, 1)
    result = parse_usage(value)
    return None if result is None else result.prompt_tokens
