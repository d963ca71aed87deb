"""Reads what a server answers: texts without their thinking, choices by their index, log-probabilities.

Every reader raises a ValueError, LookupError or TypeError at an answer that is not of the right form, and such an
answer is asked for again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmrec.backends.server.spending import usage
from llmrec.types import Completion, Cost

MARGIN = 1.0
"""Nats below the least likely token returned: what a label gets that is not among them."""

_THOUGHT = re.compile(r"\A.*</think(?:ing)?>\s*", re.DOTALL)
_THINKING = re.compile(r"<think(?:ing)?>")


@dataclass(frozen=True, slots=True)
class Labelled:
    """Log-probabilities of labels, in nats, and how many of them were not returned and have the floor."""

    logprobs: tuple[float, ...]
    floored: int


# --------------------------------------------------------------------------- texts


def choices(value: Any, count: int) -> list[Mapping[str, Any]]:
    """Return the choices of an answer in the order of what was asked, whatever order they came in.

    Raises:
        ValueError: If one is missing or stands twice.
    """
    found = value["choices"]
    places = [choice.get("index", 0 if len(found) == 1 else None) for choice in found]
    if len(found) != count or set(places) != set(range(count)):
        raise ValueError(f"{count} choices were asked for, those with index {places} came")
    ordered: list[Mapping[str, Any]] = [choice for _, choice in sorted(zip(places, found, strict=True), key=_place)]
    return ordered


def _place(pair: tuple[int, Any]) -> int:
    return pair[0]


def completion(value: Any, *, stop: str | None, chat: bool) -> Completion:
    """Read a generated text, up to its stop text and without what a model thought before it.

    A block of thoughts that does not end is an empty answer of finish reason ``length``. Without usage, counts are 0.

    Args:
        value: The answer.
        stop: The text that ends the answer; in a chat, line breaks before the answer do not.
        chat: Whether the answer is a chat message.
    """
    (choice,) = choices(value, 1)
    thought = False
    if chat:
        message = choice["message"]
        thought = bool(message.get("reasoning_content") or message.get("reasoning"))
        text = message.get("content") or message.get("refusal") or ""
    else:
        text = choice["text"]
    if not isinstance(text, str):
        raise ValueError("the text of the answer is no text")
    # JSON can name half of a letter, which no file or table can hold.
    text = text.encode("utf-8", "replace").decode("utf-8")
    cost = usage(value) or Cost()
    found = Completion(
        text=text,
        prompt_tokens=cost.prompt_tokens,
        completion_tokens=cost.completion_tokens,
        finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
    )
    text, ended = without_thoughts(text)
    if not ended:
        return replace(found, text="", finish_reason="length")
    if chat or thought or text != found.text:
        text = text.lstrip()
    if stop is not None and stop in text:
        return replace(found, text=text[: text.index(stop)], finish_reason="stop")
    return replace(found, text=text)


def without_thoughts(text: str) -> tuple[str, bool]:
    """Return what follows the last block of thoughts, and whether every block ends.

    Some templates open the block in the prompt, so that the answer holds its end alone.
    """
    rest = _THOUGHT.sub("", text)
    return rest, _THINKING.search(rest) is None


# --------------------------------------------------------------------------- log-probabilities


def named_labels(value: Any, ids: Sequence[int]) -> tuple[float, ...]:
    """Read the log-probabilities of tokens that were asked for by their ids, first token of a completion.

    Raises:
        LookupError: If one of them was not returned.
    """
    found = first(value)
    return tuple(_nats(found[f"token_id:{i}"]) for i in ids)


def top_labels(value: Any, spellings: Sequence[Sequence[str]]) -> Labelled:
    """Read the log-probabilities of labels among the likeliest first tokens of a completion.

    Args:
        value: The answer.
        spellings: How servers may write each label's token, the surest first.
    """
    found = first(value)
    return by_name(found, [next((name for name in names if name in found), names[0]) for names in spellings])


def chat_labels(value: Any, texts: Sequence[str]) -> Labelled:
    """Read the log-probabilities of labels among the likeliest first tokens of a chat answer.

    White space around a token is no part of its label: a chat may begin with either form, so both are added up.
    """
    return by_name(chat_first(value), [text.strip() for text in texts])


def chat_first(value: Any) -> dict[str, float]:
    """Return the log-probabilities of the likeliest first tokens of a chat answer, by text without white space."""
    (choice,) = choices(value, 1)
    found: dict[str, list[float]] = {}
    for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
        found.setdefault(entry["token"].strip(), []).append(_nats(entry["logprob"]))
    return {name: _log_sum(values) for name, values in found.items()}


def by_name(found: Mapping[str, float], names: Sequence[str]) -> Labelled:
    """Give each name its log-probability, or the floor: `MARGIN` below the smallest one returned.

    Raises:
        ValueError: If nothing was returned.
    """
    if not found:
        raise ValueError("no log-probability was returned")
    values = {name: _nats(value) for name, value in found.items()}
    floor = min(values.values()) - MARGIN
    return Labelled(
        tuple(values.get(name, floor) for name in names),
        sum(name not in values for name in names),
    )


def tail_sums(value: Any, start: int, tails: Sequence[Sequence[int]]) -> list[float]:
    """Sum the log-probabilities of each candidate's tokens behind the same prompt, from echoed prompts.

    Args:
        value: An answer with one choice a candidate.
        start: Tokens of the prompt.
        tails: Tokens of each candidate.
    """
    sums = []
    for choice, tail in zip(choices(value, len(tails)), tails, strict=True):
        rows = choice["logprobs"]["token_logprobs"]
        if len(rows) < start + len(tail):
            raise ValueError(f"{start + len(tail)} log-probabilities were asked for, {len(rows)} came")
        sums.append(sum(_nats(each) for each in rows[start : start + len(tail)]))
    return sums


def first(value: Any) -> dict[str, float]:
    """Return the log-probabilities of the likeliest first tokens of a completion, by their text."""
    (choice,) = choices(value, 1)
    return {name: _nats(nats) for name, nats in choice["logprobs"]["top_logprobs"][0].items()}


def _nats(value: Any) -> float:
    """Return a log-probability; servers write a large negative number for none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > 1e-3:
        raise ValueError(f"{value!r} is no log-probability")
    return float(value)


def _log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))
