"""Keyphrases of texts, by YAKE (Campos et al., Information Sciences 509, 2020), kept in a cache on disk.

YAKE scores a phrase by its words' case, place, frequency, neighbours and sentences within one text. It needs no
training and no corpus, so that the phrases of a review depend on that review alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from llmrec.data.hashing import digest_strings
from llmrec.durable import write_json
from llmrec.errors import require
from llmrec.resources import cache_dir

log = logging.getLogger(__name__)

_LANGUAGE, _WORDS, _MOST, _ALIKE = "en", 2, 10, 0.9
# Of a longer text the beginning speaks for the rest.
_LENGTH = 4000


def keyphrases(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return each text's keyphrases, in small letters, best first: at most 10, of one or two words.

    Raises:
        MissingExtra: If the package ``yake`` is not installed.
    """
    yake = require("yake", "reviews")
    settings = f"yake {version('yake')} {_LANGUAGE} {_WORDS} {_MOST} {_ALIKE} {_LENGTH}"
    path = cache_dir() / "keyphrases" / f"{digest_strings([settings, *texts])}.json"
    try:
        found = [tuple(map(str, phrases)) for phrases in json.loads(path.read_text(encoding="utf-8"))]
        if len(found) == len(texts):
            return found
    except (OSError, ValueError, TypeError):
        pass  # not made yet, or not to be read: made again
    extractor = yake.KeywordExtractor(lan=_LANGUAGE, n=_WORDS, top=_MOST, dedupLim=_ALIKE)
    if len(texts) > 1000:
        log.info("extracting keyphrases of %d reviews; this is done once", len(texts))
    found = [_of(extractor, text) for text in texts]
    try:
        write_json(path, found)
    except OSError as error:
        log.warning("keyphrases cannot be kept in %s (%s); the next run extracts them again", path.parent, error)
    return found


def _of(extractor: Any, text: str) -> tuple[str, ...]:
    text = text[:_LENGTH]
    if not text.strip():
        return ()
    scored = [(round(float(score), 9), str(phrase).casefold()) for phrase, score in extractor.extract_keywords(text)]
    return tuple(dict.fromkeys(phrase for _, phrase in sorted(scored)))
