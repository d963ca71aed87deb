"""A backend without a model, for tests and trying out recipes: scores from hashes, and fixed texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from llmrec.types import Capability, Completion, Prompt, Scores, SearchResult


class FakeBackend:
    """Returns scores from hashes: the same prompt and candidate always get the same score, in any batch.

    Args:
        complete: Prompt text -> completion; by default a digit drawn from the prompt's hash.
        prefer: (prompt text, candidate) -> log-probability; by default drawn from their hash.
    """

    name = "fake"
    capabilities: frozenset[Capability] = frozenset({"generate", "score", "search"})

    def __init__(
        self,
        complete: Callable[[str], str] | None = None,
        prefer: Callable[[str, str], float] | None = None,
    ) -> None:
        self._complete = complete or (lambda text: str(1 + int(5 * _uniform_hash(text))))
        self._prefer = prefer or (lambda text, candidate: -20 * _uniform_hash(text, candidate) - 0.01)

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Completion]:
        """Return fixed texts, cut at ``max_tokens`` words."""
        answers = []
        for prompt in prompts:
            words = self._complete(prompt_text(prompt)).split(" ")
            answers.append(
                Completion(
                    text=" ".join(words[:max_tokens]),
                    prompt_tokens=len(prompt_text(prompt).split()),
                    completion_tokens=min(len(words), max_tokens),
                    finish_reason="stop" if len(words) <= max_tokens else "length",
                )
            )
        return answers

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, closed: bool = True
    ) -> list[Scores]:
        """Return scores from hashes."""
        return [
            Scores(
                logprobs=tuple(self._prefer(prompt_text(prompt), text) for text in texts),
                tokens=tuple(max(1, len(text.split())) for text in texts),
                prompt_tokens=len(prompt_text(prompt).split()),
                engine="fake",
            )
            for prompt, texts in zip(prompts, candidates, strict=True)
        ]

    def search(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        *,
        k: int,
        width: int,
        excluded: Sequence[Sequence[int]] = (),
        exact: bool = False,
    ) -> list[SearchResult]:
        """Return the texts with the highest scores from hashes."""
        results = []
        for n, prompt in enumerate(prompts):
            out = set(excluded[n]) if excluded else set()
            scores = {
                index: self._prefer(prompt_text(prompt), text) for index, text in enumerate(texts) if index not in out
            }
            best = sorted(scores, key=lambda index: -scores[index])[:k]
            short = "" if len(best) == k else f"only {len(scores)} of {len(texts)} items are valid answers"
            result = tuple(scores[index] for index in best)
            results.append(
                SearchResult(
                    items=tuple(best), scores=result, certified=True, width=max(k, width), short=short, engine="fake"
                )
            )
        return results

    def close(self) -> None:
        """Do nothing, since there is nothing to free."""


def prompt_text(prompt: Prompt) -> str:
    """Return the messages and the given answer of a prompt as plain text."""
    turns = [f"{message.role}: {message.text}" for message in prompt.messages]
    return "\n".join([*turns, "assistant: " + "".join(segment.text for segment in prompt.answer_prefix)])


def _uniform_hash(*parts: str) -> float:
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
