"""Searches a catalogue with any engine, and detects candidates that differ only in their last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmrec.backends.encode import Encoder
from llmrec.decode.beam import TreeEngine, beam_search
from llmrec.errors import BackendError
from llmrec.models.batching import group_by_length
from llmrec.progress import count_answers
from llmrec.types import Prompt, SearchResult


def search(
    reader: TreeEngine,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    *,
    k: int,
    width: int,
    excluded: Sequence[Sequence[int]],
    exact: bool,
    engine: str,
    batch_tokens: int,
) -> list[SearchResult]:
    """Search a catalogue with a tree engine; implements `Backend.search`.

    Prompts are searched together up to ``batch_tokens`` tokens, including padding and beams. ``engine`` names the
    route.

    Raises:
        BackendError: If a prompt leaves no room for the longest text.
        DataError: If two texts have the same tokens.
    """
    encoded = [encoder.prompt(prompt) for prompt in prompts]
    catalogues = {stop: encoder.catalogue(texts, stop) for stop in dict.fromkeys(prompt.stop for prompt in prompts)}
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) + (deep := catalogues[prompt.stop].depth) > encoder.max_length:
            raise BackendError(
                f"a prompt of {len(ids)} tokens and an answer of {deep} do not fit model.max_length="
                f"{encoder.max_length}; show less history (tasks.<family>.history), or raise model.max_length",
                kind="too-large",
                column="model.max_length",
            )
    value = [SearchResult(items=(), scores=(), certified=False, width=0)] * len(prompts)
    for stop, catalogue in catalogues.items():
        chosen = [n for n, prompt in enumerate(prompts) if prompt.stop == stop]
        behind = min(max(k, width), len(catalogue)) * catalogue.depth
        lengths = [len(encoded[n]) + behind for n in chosen]
        for indices in group_by_length(lengths, batch_tokens, longest_first=True):
            rows = [chosen[index] for index in indices]
            out = [excluded[n] for n in rows] if excluded else ()
            batch = [encoded[n] for n in rows]
            results = beam_search(reader, catalogue, batch, k=k, width=width, excluded=out, exact=exact)
            for n, result in zip(rows, results, strict=True):
                value[n] = replace(result, engine=engine, prompt_tokens=len(encoded[n]))
            count_answers(len(rows))
    return value


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """Labels that share all tokens except the last one."""

    shared: tuple[int, ...]
    distinct: tuple[int, ...]


def single_token_labels(tails: Sequence[tuple[int, ...]], *, closed: bool) -> LabelTokens | None:
    """Return the labels if they differ in exactly their last token; otherwise None.

    A shared first token (some tokenizers write ``" 4"`` as a space and a digit) is moved into the prompt; it adds
    the same amount to every label, so order and normalised distribution stay exact. Closed texts are scored
    whole and may be compared with those of another call, so no token may be left out.
    """
    if len(tails) < 2 or len({len(tail) for tail in tails}) != 1 or not tails[0]:
        return None
    shared = tails[0][:-1]
    distinct = tuple(tail[-1] for tail in tails)
    if (closed and shared) or any(tail[:-1] != shared for tail in tails) or len(set(distinct)) != len(distinct):
        return None
    return LabelTokens(shared, distinct)
