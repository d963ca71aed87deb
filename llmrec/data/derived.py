"""Derives the titles, user names, features and sentences that a review data set lacks, from its training reviews.

This is done after the split and from training reviews only: a title made from all reviews of an item would contain
words of held-out reviews. The feature and sentence of a held-out review are chosen from its own text with the
vocabulary of the training reviews; they are its ground truth and are not used elsewhere.

Keyphrases (`keyphrases`) are cached on disk. The phrases of a review depend only on that review.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from statistics import fmean, median, pstdev
from typing import TYPE_CHECKING

from llmrec.data.hashing import digest_strings, hash_one
from llmrec.durable import write_json
from llmrec.resources import cache_dir
from llmrec.terminal import warn_once_logger
from llmrec.types import Item

if TYPE_CHECKING:
    import polars as pl

    from llmrec.data.dataset import Dataset, Review

log = warn_once_logger(__name__)


# --------------------------------------------------------------------------- keyphrases

# Keyphrases of one text, after YAKE (Campos et al., Information Sciences 509, 2020), implemented from the paper.
#
# A term is scored by its case, position, frequency, number of different neighbours and number of sentences; a phrase by
# its terms and its frequency. There is no training and no corpus, so the phrases of a text depend only on that text.


# Part of the cache key.
_KEYPHRASE_VERSION = 1
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
# Phrases do not cross these characters.
_PHRASE_BREAK = re.compile(r"[^\w\s'’&-]+|\s[-&]+\s|--+")
_TERM = re.compile(r"\w+(?:['’&-]\w+)*")
# Maximum words per phrase, maximum phrases, and the share of equal letters from which two phrases count as the same.
_MAX_WORDS, _MAX_PHRASES, _SIMILARITY = 2, 10, 0.9
# Longer texts are truncated to this length.
_MAX_TEXT_LENGTH = 4000
# Shorter terms, and numbers, are not part of any phrase.
_MIN_TERM_LENGTH = 3
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


def score_keyphrases(text: str) -> list[tuple[float, str]]:
    """Return the keyphrases of an English text with their scores, best first; lower is better."""
    chunks = list(_term_runs(text))
    scores = _term_scores(chunks)
    result: Counter[tuple[str, ...]] = Counter()
    for _, terms in chunks:
        small = [term.casefold() for term in terms]
        for size in range(1, _MAX_WORDS + 1):
            for start in range(len(small) - size + 1):
                phrase = tuple(small[start : start + size])
                if all(term in scores for term in phrase):
                    result[phrase] += 1
    ranked = sorted((_phrase_score([scores[term] for term in p], times), " ".join(p)) for p, times in result.items())
    kept: list[tuple[float, str]] = []
    for score, candidate in ranked:
        if len(kept) == _MAX_PHRASES:
            break
        if not any(_are_similar(candidate, other) for _, other in kept):
            kept.append((score, candidate))
    return kept


def _term_runs(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield runs of terms between punctuation marks, with the index of their sentence."""
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
    for number, sentence in enumerate(sentences):
        for part in _PHRASE_BREAK.split(sentence):
            if terms := _TERM.findall(part):
                yield number, terms


def _term_scores(chunks: Sequence[tuple[int, Sequence[str]]]) -> dict[str, float]:
    """Return the score of every term that can be part of a phrase (equations 1 to 6)."""
    times: Counter[str] = Counter()
    capitals: Counter[str] = Counter()
    acronyms: Counter[str] = Counter()
    sentences: dict[str, set[int]] = defaultdict(set)
    left: dict[str, Counter[str]] = defaultdict(Counter)
    right: dict[str, Counter[str]] = defaultdict(Counter)
    begun: set[int] = set()
    for number, terms in chunks:
        small = [term.casefold() for term in terms]
        for index, (term, key) in enumerate(zip(terms, small, strict=True)):
            times[key] += 1
            sentences[key].add(number)
            if len(term) > 1 and term.isupper():
                acronyms[key] += 1
            # The first word of a sentence is always capitalised.
            elif term[0].isupper() and number in begun:
                capitals[key] += 1
            begun.add(number)
            if index:
                left[key][small[index - 1]] += 1
                right[small[index - 1]][key] += 1
    usable = [key for key in times if _is_keyphrase_term(key)]
    if not usable:
        return {}
    counts = [times[key] for key in usable]
    usual, top = fmean(counts) + pstdev(counts), max(times.values())
    total = 1 + max(number for number, _ in chunks)
    result = {}
    for key in usable:
        case = max(acronyms[key], capitals[key]) / (1 + math.log(times[key]))
        position_score = math.log(math.log(3 + median(sentences[key])))
        sides = sum(len(side[key]) / side[key].total() for side in (left, right) if side[key])
        related = 1 + sides * times[key] / top
        spread = len(sentences[key]) / total
        result[key] = related * position_score / (case + times[key] / usual / related + spread / related)
    return result


def _is_keyphrase_term(term: str) -> bool:
    return (
        len(term) >= _MIN_TERM_LENGTH and term.replace("’", "'") not in _STOP_WORDS and not any(map(str.isdigit, term))
    )


def _phrase_score(scores: Sequence[float], times: int) -> float:
    """Return the score of a phrase (equation 7)."""
    return math.prod(scores) / (times * (1 + sum(scores)))


def _are_similar(first: str, other: str) -> bool:
    matcher = SequenceMatcher(None, first, other, autojunk=False)
    return all(ratio() > _SIMILARITY for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio))


NAMES, TITLES = "names", "titles"
# Phrases per title; up to the second number if several items have the same phrases.
_TITLE_PHRASES, _MAX_TITLE_PHRASES = 3, 6
# A phrase in fewer training reviews is one author's wording, not a feature.
_MIN_REVIEWS = 3
# Shorter sentences add little to the feature; longer ones do not answer "why?" in one sentence.
_SENTENCE_LENGTHS = (4, 40)
_SENTENCE_BREAK = re.compile(r"(?<=[.!?])(?=\s|[A-Z])|\n+")
_WORD = re.compile(r"\w+")
# Words that occur in reviews of any item: opinions, actions and times, not properties of an item.
_OPINIONS = (
    "good great nice best better excellent perfect awesome amazing wonderful fantastic decent fine bad worse worst "
    "poor terrible cheap love loved loves like liked likes hate recommend recommended happy pleased disappointed worth "
    "easy hard work works worked working buy bought buying purchase purchased order ordered use used uses using get "
    "got make makes made need needed needs want wanted thing things lot bit way time times day days week weeks month "
    "months year years ago people product products item items amazon review reviews star stars thanks don didn doesn "
    "pretty simple well find found give back put long big small fit fits job money issues"
)
_OPINION_WORDS = frozenset(_OPINIONS.split())
_FIRST_SYLLABLES = ("Ba", "Ce", "Da", "Fe", "Ga", "Ha", "Io", "Ka", "Le", "Ma", "Ne", "Pa", "Ro", "Sa", "Te", "Vi")
_MIDDLE_SYLLABLES = ("la", "ri", "no", "mi", "ta", "ve", "so", "du", "ne", "li", "ra", "co", "be", "zi", "fa", "mo")
_LAST_SYLLABLES = ("n", "s", "r", "l", "na", "ra", "ro", "lin", "tan", "vel", "dor", "mi", "ke", "sen", "rik", "th")


def with_derived_texts(dataset: Dataset, train: pl.DataFrame, *, seed: int) -> Dataset:
    """Add missing titles, names, features and sentences to a review data set; other data sets are unchanged.

    Args:
        dataset: The data set. Results of an earlier derivation are replaced.
        train: The training interactions.
        seed: Seed of the pseudonyms.
    """
    if not dataset.reviews:
        return dataset
    training = [pair for pair in train.select("user_id", "item_id").iter_rows() if pair in dataset.reviews]
    counts = Counter(phrase for pair in training for phrase in dataset.reviews[pair].phrases)
    known = {phrase for phrase, count in counts.items() if count >= _MIN_REVIEWS and not _is_opinion(phrase)}
    result = replace(dataset, reviews={pair: _with_feature(review, known) for pair, review in dataset.reviews.items()})
    if TITLES in dataset.derives:
        result = replace(result, items=_with_titles(dataset, training, counts))
    if NAMES in dataset.derives:
        names = pseudonyms(sorted(set(dataset.interactions["user_id"])), seed=seed)
        result = replace(result, users={user: {**dataset.users.get(user, {}), "name": names[user]} for user in names})
    return result


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences at line ends, full stops, question marks and exclamation marks."""
    return [sentence for part in _SENTENCE_BREAK.split(text) if (sentence := " ".join(part.split()))]


def _is_opinion(phrase: str) -> bool:
    words = _WORD.findall(phrase)
    return not words or any(word in _OPINION_WORDS or word.isdigit() for word in words)


def _with_feature(review: Review, known: Collection[str]) -> Review:
    """Return a review with its feature and a sentence about it."""
    low, high = _SENTENCE_LENGTHS
    usable = [sentence for sentence in split_sentences(review.text) if low <= len(_WORD.findall(sentence)) <= high]
    for phrase in review.phrases:
        if phrase not in known:
            continue
        pattern = re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)
        result = next((sentence for sentence in usable if pattern.search(sentence)), None)
        if result is not None:
            return replace(review, feature=phrase, sentence=result)
    return replace(review, feature="", sentence="")


# --------------------------------------------------------------------------- titles


def _with_titles(dataset: Dataset, training: Sequence[tuple[str, str]], counts: Mapping[str, int]) -> dict[str, Item]:
    """Return every item with its most distinctive phrases as title; items without training reviews keep their id."""
    phrase_counts: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in training:
        phrase_counts[pair[1]].update(dataset.reviews[pair].phrases)
    phrases = {item: list(_distinctive_phrases(phrase_counts[item], counts, len(training))) for item in dataset.items}
    titles = {item: ", ".join(result[:_TITLE_PHRASES]) or item for item, result in phrases.items()}
    for length in range(_TITLE_PHRASES + 1, _MAX_TITLE_PHRASES + 1):
        for item in _items_sharing_titles(titles):
            titles[item] = ", ".join(phrases[item][:length]) or item
    for item in _items_sharing_titles(titles):
        titles[item] = f"{titles[item]}, {item}"
    return {item: replace(entry, title=titles[item]) for item, entry in dataset.items.items()}


def _distinctive_phrases(phrases: Mapping[str, int], counts: Mapping[str, int], reviews: int) -> Iterator[str]:
    """Yield the distinctive phrases of an item, best first."""
    usable = [phrase for phrase in phrases if not _is_opinion(phrase)]
    # Phrases of a single review are used only if no others are left.
    usable.sort(key=lambda p: (counts[p] < _MIN_REVIEWS, -phrases[p] * math.log(1 + reviews / counts[p]), p))
    used: set[str] = set()
    for phrase in usable:
        words = set(_WORD.findall(phrase))
        if not words & used:
            used |= words
            yield phrase


def _items_sharing_titles(titles: Mapping[str, str]) -> list[str]:
    times = Counter(titles.values())
    return sorted(item for item, title in titles.items() if times[title] > 1)


# --------------------------------------------------------------------------- names


def pseudonyms(users: Sequence[str], *, seed: int) -> dict[str, str]:
    """Return a unique made-up name for every user, from a seeded hash of the user's id."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for user in users:
        attempt = 0
        while (name := _pseudonym(hash_one("pseudonym", seed, user, str(attempt)))) in taken:
            attempt += 1
        taken.add(name)
        names[user] = name
    return names


def _pseudonym(number: int) -> str:
    parts = []
    for _ in range(2):
        for syllables in (_FIRST_SYLLABLES, _MIDDLE_SYLLABLES, _LAST_SYLLABLES):
            number, index = divmod(number, len(syllables))
            parts.append(syllables[index])
    return "".join(parts[:3]) + " " + "".join(parts[3:])


def keyphrases(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the keyphrases of each text in lower case, best first: at most 10, of one or two words."""
    settings = f"keyphrases {_KEYPHRASE_VERSION} {_MAX_WORDS} {_MAX_PHRASES} {_SIMILARITY} {_MAX_TEXT_LENGTH}"
    path = cache_dir() / "keyphrases" / f"{digest_strings([settings, *texts])}.json"
    try:
        results = [tuple(map(str, phrases)) for phrases in json.loads(path.read_text(encoding="utf-8"))]
        if len(results) == len(texts):
            return results
    except (OSError, ValueError, TypeError):
        pass  # missing or unreadable cache: extract again
    if len(texts) > 1000:
        log.info("extracting keyphrases of %d reviews; this is done once", len(texts))
    results = [_extract_keyphrases(text) for text in texts]
    try:
        write_json(path, results)
    except OSError as error:
        log.warning("keyphrases cannot be stored in %s (%s); the next run extracts them again", path.parent, error)
    return results


def _extract_keyphrases(text: str) -> tuple[str, ...]:
    scored = score_keyphrases(text[:_MAX_TEXT_LENGTH])
    return tuple(phrase for _, phrase in sorted((round(score, 9), phrase) for score, phrase in scored))
