"""What a source of reviews lacks, made up from the training reviews of a split: titles, names, features, sentences.

It is done after the split, and only what may be learned from speaks for it: a title made of all reviews of an item
would hold the words of those that are held out. Of a held-out review, its own feature and sentence are chosen from
its own text by the training reviews' vocabulary; they are its truth and go nowhere else.

Keyphrases (`llmrec.data.keyphrases`) are cached on disk. The phrases of a review depend on that review alone.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmrec.data.hashing import digest_strings, hash_one
from llmrec.data.keyphrases import VERSION, extract
from llmrec.durable import write_json
from llmrec.resources import cache_dir
from llmrec.terminal import logger
from llmrec.types import Item

if TYPE_CHECKING:
    import polars as pl

    from llmrec.data.dataset import Dataset, Review


NAMES, TITLES = "names", "titles"
# Phrases of a title; where two items have the same ones, up to as many as the second number.
_IN_TITLE, _MOST_IN_TITLE = 3, 6
# A phrase of fewer training reviews is one writer's turn of words and no feature.
_LEAST = 3
# Shorter ones say little more than the feature; longer ones are no answer to "why, in one sentence?".
_SENTENCE = (4, 40)
_SENTENCES = re.compile(r"(?<=[.!?])(?=\s|[A-Z])|\n+")
_WORD = re.compile(r"\w+")
# What reviews say of everything. A feature is something that an item has, and these are opinions, deeds and times.
_OPINIONS = (
    "good great nice best better excellent perfect awesome amazing wonderful fantastic decent fine bad worse worst "
    "poor terrible cheap love loved loves like liked likes hate recommend recommended happy pleased disappointed worth "
    "easy hard work works worked working buy bought buying purchase purchased order ordered use used uses using get "
    "got make makes made need needed needs want wanted thing things lot bit way time times day days week weeks month "
    "months year years ago people product products item items amazon review reviews star stars thanks don didn doesn "
    "pretty simple well find found give back put long big small fit fits job money issues"
)
_OPINION = frozenset(_OPINIONS.split())
_FIRST = ("Ba", "Ce", "Da", "Fe", "Ga", "Ha", "Io", "Ka", "Le", "Ma", "Ne", "Pa", "Ro", "Sa", "Te", "Vi")
_MIDDLE = ("la", "ri", "no", "mi", "ta", "ve", "so", "du", "ne", "li", "ra", "co", "be", "zi", "fa", "mo")
_LAST = ("n", "s", "r", "l", "na", "ra", "ro", "lin", "tan", "vel", "dor", "mi", "ke", "sen", "rik", "th")


def derived(dataset: Dataset, train: pl.DataFrame, *, seed: int) -> Dataset:
    """Return a dataset of reviews with what its source lacks; other datasets as they are.

    Args:
        dataset: Before or after an earlier derivation; what that made is made again.
        train: The interactions that may be learned from.
        seed: Of the run; pseudonyms depend on it.
    """
    if not dataset.reviews:
        return dataset
    taught = [pair for pair in train.select("user_id", "item_id").iter_rows() if pair in dataset.reviews]
    counts = Counter(phrase for pair in taught for phrase in dataset.reviews[pair].phrases)
    known = {phrase for phrase, count in counts.items() if count >= _LEAST and not _opinion(phrase)}
    found = replace(dataset, reviews={pair: _about(review, known) for pair, review in dataset.reviews.items()})
    if TITLES in dataset.derives:
        found = replace(found, items=_titled(dataset, taught, counts))
    if NAMES in dataset.derives:
        names = pseudonyms(sorted(set(dataset.interactions["user_id"])), seed=seed)
        found = replace(found, users={user: {**dataset.users.get(user, {}), "name": names[user]} for user in names})
    return found


def sentences(text: str) -> list[str]:
    """Return a text's sentences: cut at line ends, and behind a full stop, question mark or exclamation mark."""
    return [sentence for part in _SENTENCES.split(text) if (sentence := " ".join(part.split()))]


def _opinion(phrase: str) -> bool:
    words = _WORD.findall(phrase)
    return not words or any(word in _OPINION or word.isdigit() for word in words)


def _about(review: Review, known: Collection[str]) -> Review:
    """Choose the best keyphrase that training knows and that a sentence of fair length holds, and this sentence."""
    low, high = _SENTENCE
    fair = [sentence for sentence in sentences(review.text) if low <= len(_WORD.findall(sentence)) <= high]
    for phrase in review.phrases:
        if phrase not in known:
            continue
        whole = re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)
        held = next((sentence for sentence in fair if whole.search(sentence)), None)
        if held is not None:
            return replace(review, feature=phrase, sentence=held)
    return replace(review, feature="", sentence="")


# --------------------------------------------------------------------------- titles


def _titled(dataset: Dataset, taught: Sequence[tuple[str, str]], counts: Mapping[str, int]) -> dict[str, Item]:
    """Give every item its most telling phrases as a title; an item without a training review keeps its id."""
    own: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in taught:
        own[pair[1]].update(dataset.reviews[pair].phrases)
    phrases = {item: list(_telling(own[item], counts, len(taught))) for item in dataset.items}
    titles = {item: ", ".join(found[:_IN_TITLE]) or item for item, found in phrases.items()}
    for length in range(_IN_TITLE + 1, _MOST_IN_TITLE + 1):
        for item in _shared(titles):
            titles[item] = ", ".join(phrases[item][:length]) or item
    for item in _shared(titles):
        titles[item] = f"{titles[item]}, {item}"
    return {item: replace(entry, title=titles[item]) for item, entry in dataset.items.items()}


def _telling(own: Mapping[str, int], counts: Mapping[str, int], reviews: int) -> Iterator[str]:
    """Yield an item's phrases, best first: those of many of its reviews and few others, none with a word again."""
    usable = [phrase for phrase in own if not _opinion(phrase)]
    # What one review alone says is taken where nothing else is left.
    usable.sort(
        key=lambda phrase: (counts[phrase] < _LEAST, -own[phrase] * math.log(1 + reviews / counts[phrase]), phrase)
    )
    said: set[str] = set()
    for phrase in usable:
        words = set(_WORD.findall(phrase))
        if not words & said:
            said |= words
            yield phrase


def _shared(titles: Mapping[str, str]) -> list[str]:
    times = Counter(titles.values())
    return sorted(item for item, title in titles.items() if times[title] > 1)


# --------------------------------------------------------------------------- names


def pseudonyms(users: Sequence[str], *, seed: int) -> dict[str, str]:
    """Return a made name for every user, all different, from a seeded hash of the user's id."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for user in users:
        attempt = 0
        while (name := _name(hash_one("pseudonym", seed, user, str(attempt)))) in taken:
            attempt += 1
        taken.add(name)
        names[user] = name
    return names


def _name(number: int) -> str:
    parts = []
    for _ in range(2):
        for syllables in (_FIRST, _MIDDLE, _LAST):
            number, place = divmod(number, len(syllables))
            parts.append(syllables[place])
    return "".join(parts[:3]) + " " + "".join(parts[3:])


log = logger(__name__)

_WORDS, _MOST, _ALIKE = 2, 10, 0.9
# Of a longer text the beginning speaks for the rest.
_LENGTH = 4000


def keyphrases(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return each text's keyphrases, in small letters, best first: at most 10, of one or two words."""
    settings = f"keyphrases {VERSION} {_WORDS} {_MOST} {_ALIKE} {_LENGTH}"
    path = cache_dir() / "keyphrases" / f"{digest_strings([settings, *texts])}.json"
    try:
        found = [tuple(map(str, phrases)) for phrases in json.loads(path.read_text(encoding="utf-8"))]
        if len(found) == len(texts):
            return found
    except (OSError, ValueError, TypeError):
        pass  # not made yet, or not to be read: made again
    if len(texts) > 1000:
        log.info("extracting keyphrases of %d reviews; this is done once", len(texts))
    found = [_of(text) for text in texts]
    try:
        write_json(path, found)
    except OSError as error:
        log.warning("keyphrases cannot be kept in %s (%s); the next run extracts them again", path.parent, error)
    return found


def _of(text: str) -> tuple[str, ...]:
    scored = extract(text[:_LENGTH], words=_WORDS, most=_MOST, alike=_ALIKE)
    return tuple(phrase for _, phrase in sorted((round(score, 9), phrase) for score, phrase in scored))
