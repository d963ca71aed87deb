"""Keyphrases of one text, after YAKE (Campos et al., Information Sciences 509, 2020), written from the paper.

A term counts by its case, its place, its frequency, how many neighbours it has, and in how many sentences it stands;
a phrase by its terms and how often they stand together. No training and no corpus, so that the phrases of a text depend
on that text alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from statistics import fmean, median, pstdev

VERSION = 1
"""Of the phrases that a text has; it stands in the key of what is kept on disk."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
# What no phrase goes across.
_BREAK = re.compile(r"[^\w\s'’&-]+|\s[-&]+\s|--+")
_TERM = re.compile(r"\w+(?:['’&-]\w+)*")
# Shorter ones, and numbers, are part of no phrase.
_SHORTEST = 3
_FUNCTION_WORDS = (
    "a about above after again against all almost alone along already also although always am among an and another "
    "any anybody anyone anything anyway are aren't around as at away be became because become becomes been before "
    "behind being below between both but by came can can't cannot come could couldn't did didn't do does doesn't "
    "doing don't done down during each either else enough etc even ever every everybody everyone everything except "
    "far few for from further gave get gets getting give given go goes going gone got had hadn't has hasn't have "
    "haven't having he he's her here hers herself him himself his how however i i'd i'll i'm i've if in indeed "
    "instead into is isn't it it's its itself just keep kept last least less let like likely made make many may maybe "
    "me might mine more most much must my myself near neither never next no nobody none nor not nothing now nowhere "
    "of off often on once one only onto or other others otherwise our ours ourselves out over own per perhaps quite "
    "rather really said same saw say says see seem seemed seems seen several shall she she's should shouldn't since "
    "so some somebody someone something sometimes somewhere still such take taken than that that's the their theirs "
    "them themselves then there there's therefore these they they're they've this those though through thus to "
    "together too took toward towards under until up upon us use used very via was wasn't we we'd we'll we're we've "
    "well went were weren't what whatever when where whether which while who whoever whole whom whose why will with "
    "within without won't would wouldn't yet you you'd you'll you're you've your yours yourself yourselves"
)
_STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


def extract(text: str, *, words: int, most: int, alike: float) -> list[tuple[float, str]]:
    """Return the keyphrases of an English text with their scores, best first; lower is better.

    Args:
        text: The text.
        words: Most words of a phrase.
        most: How many phrases at most.
        alike: Share of equal letters from which on two phrases are one.
    """
    chunks = list(_chunks(text))
    scores = _term_scores(chunks)
    found: Counter[tuple[str, ...]] = Counter()
    for _, terms in chunks:
        small = [term.casefold() for term in terms]
        for size in range(1, words + 1):
            for start in range(len(small) - size + 1):
                phrase = tuple(small[start : start + size])
                if all(term in scores for term in phrase):
                    found[phrase] += 1
    ranked = sorted((_phrase_score([scores[term] for term in p], times), " ".join(p)) for p, times in found.items())
    kept: list[tuple[float, str]] = []
    for score, candidate in ranked:
        if len(kept) == most:
            break
        if not any(_similar(candidate, other, alike) for _, other in kept):
            kept.append((score, candidate))
    return kept


def _chunks(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield runs of terms between punctuation, with the number of their sentence."""
    sentences = [sentence for sentence in _SENTENCE.split(text) if sentence.strip()]
    for number, sentence in enumerate(sentences):
        for part in _BREAK.split(sentence):
            if terms := _TERM.findall(part):
                yield number, terms


def _term_scores(chunks: Sequence[tuple[int, Sequence[str]]]) -> dict[str, float]:
    """Return the score of every term that a phrase may hold: equation 6 of the paper, from its equations 1 to 5."""
    times: Counter[str] = Counter()
    capitals: Counter[str] = Counter()
    acronyms: Counter[str] = Counter()
    sentences: dict[str, set[int]] = defaultdict(set)
    left: dict[str, Counter[str]] = defaultdict(Counter)
    right: dict[str, Counter[str]] = defaultdict(Counter)
    begun: set[int] = set()
    for number, terms in chunks:
        small = [term.casefold() for term in terms]
        for place, (term, key) in enumerate(zip(terms, small, strict=True)):
            times[key] += 1
            sentences[key].add(number)
            if len(term) > 1 and term.isupper():
                acronyms[key] += 1
            # A sentence begins with a capital, whatever the word.
            elif term[0].isupper() and number in begun:
                capitals[key] += 1
            begun.add(number)
            if place:
                left[key][small[place - 1]] += 1
                right[small[place - 1]][key] += 1
    usable = [key for key in times if _usable(key)]
    if not usable:
        return {}
    counts = [times[key] for key in usable]
    usual, top = fmean(counts) + pstdev(counts), max(times.values())
    total = 1 + max(number for number, _ in chunks)
    found = {}
    for key in usable:
        case = max(acronyms[key], capitals[key]) / (1 + math.log(times[key]))
        place_score = math.log(math.log(3 + median(sentences[key])))
        sides = sum(len(side[key]) / side[key].total() for side in (left, right) if side[key])
        related = 1 + sides * times[key] / top
        spread = len(sentences[key]) / total
        found[key] = related * place_score / (case + times[key] / usual / related + spread / related)
    return found


def _usable(term: str) -> bool:
    return len(term) >= _SHORTEST and term.replace("’", "'") not in _STOP_WORDS and not any(map(str.isdigit, term))


def _phrase_score(scores: Sequence[float], times: int) -> float:
    """Return the score of a phrase, equation 7."""
    return math.prod(scores) / (times * (1 + sum(scores)))


def _similar(one: str, other: str, alike: float) -> bool:
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    return matcher.real_quick_ratio() > alike and matcher.quick_ratio() > alike and matcher.ratio() > alike
