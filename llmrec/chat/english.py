"""English words for rule-based parsing: negations, requests, likes, bounds, positions in a list, and stop words."""

from __future__ import annotations

import re

WORD = re.compile(r"[\w'’&-]+")
CLAUSE_SEPARATOR = re.compile(
    r"[.!?;\n]+\s*|"
    r",?\s*\b(?:(?<!anything )(?<!all )but|however|although|though|instead|what about|how about)\b\s*",
    re.IGNORECASE,
)
"""Separators of clauses."""


def _compile_words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)


NEGATION = _compile_words(
    "no|not|don['’]?t|do not|doesn['’]?t|didn['’]?t|never|without|except|hate[ds]?|dislike[ds]?|avoid|anything but|"
    "(?:sick|tired|bored) of|other than|can['’]?t stand|isn['’]?t|non|less|couldn['’]?t|nothing|"
    "remov(?:e|ing)|exclud(?:e|ing)|skip|(?:leave|rule|filter) out|neither|nor|hardly"
)
# Negations are excluded: *do not forget* is not a request to forget.
_FORGET = "(?<!never )(?<!not )(?<!n't )(?<!n’t )forget"
_LIFT = r"lift (?:\w+ ){0,2}(?:bans?|limits?|restrictions?)"
BAN_REVOCATION = _compile_words(
    "(?:is|are|'s|would be|will be|sounds?|fine|ok|okay) (?:\\w+ )?"
    "(?:fine|ok|okay|allowed|good|alright|possible|welcome)|again|after all|don['’]?t mind|do not mind|no longer mind|"
    f"allow|bring back|{_FORGET} (?:about|what i said)|never mind|{_LIFT}"
)
"""Phrases that take back a ban."""
LIFT_REQUEST = _compile_words(f"{_FORGET}|{_LIFT}")
TOLERATED = _compile_words(
    "(?:don['’]?t|do not|doesn['’]?t|does not|no longer|never) mind|not opposed to|nothing against"
)
"""Phrases that are neither a ban nor a request."""
LEAVE_OUT = (
    re.compile(r"\b(?:leave|rule|filter|keep|take|cut)\s+(?:\w+\s+){0,2}$", re.IGNORECASE),
    re.compile(r"\s*(?:movies?|films?|books?|ones?)?\s*(?:out|off|away)\b", re.IGNORECASE),
)
"""Words before and after something to leave out."""
WANT = _compile_words(
    "want|need|looking|look for|find|recommend|suggest|show|give|something|anything|any|some|please|only|must|should|"
    "mood|['’]d (?:like|love|prefer)|would (?:be|like|love|prefer)|prefer|another|more|let['’]?s|try|make it|how about"
)
WOULD = re.compile(r"['’]d |\bwould\b", re.IGNORECASE)
LIKE = _compile_words("likes?|liked|loves?|loved|enjoy(?:ed|s)?|fan|favou?rites?|into|adore|great|good|best|amazing")
SEEN = _compile_words("seen|watched|know|read|have (?:it|that|this|those|them)|saw|already")
UNSEEN = _compile_words(
    "(?:haven['’]?t|have not|hadn['’]?t|never|don['’]?t|do not|didn['’]?t|did not) (?:yet |ever )?"
    "(?:seen|watched|read|saw|see|watch|know)"
)
DISLIKED = _compile_words(
    rf"(?:{NEGATION.pattern}|wasn['’]?t)(?:\s+\w+){{0,2}}\s+(?:{LIKE.pattern})|hate[ds]?|dislike[ds]?|can['’]?t stand"
)
"""Phrases about a disliked item; whether it was seen is then irrelevant."""
NEGATION_END = re.compile(
    r",\s*(?!\s*$)(?:(?:just|only|more|maybe|rather|i|show|give|something|some|please)\b)", re.IGNORECASE
)
"""The end of a negation's scope within a clause."""
IS_NOT = re.compile(r"\s*(?:movies?|films?|books?|one|ones)?\s*(?:is|are|was|were)(?:n['’]t| not)\b", re.IGNORECASE)
DID_NOT = re.compile(r"\s*(?:did|does)(?:n['’]t| not)\b", re.IGNORECASE)
OR = re.compile(r"[\s\w,]{0,20}\bor\b[\s\w]{0,12}", re.IGNORECASE)

_AFTER, _BEFORE = (
    "after|since|from|newer than|later than|more recent than",
    "before|until|older than|earlier than|up to",
)
_YEAR = r"\s+(?:the\s+)?(?:year\s+)?((?:19|20)\d\d)\b(?!s)"
YEAR_BOUNDS = (
    (re.compile(rf"\b(?:{_AFTER}){_YEAR}", re.IGNORECASE), True),
    (re.compile(rf"\b(?:{_BEFORE}){_YEAR}", re.IGNORECASE), False),
)
"""Years that follow *after* (true) and *before* (false)."""
DECADE = re.compile(r"(?:\b|')((?:19|20)?\d0)['’]?s\b", re.IGNORECASE)
DECADES = {
    name: 10 * place
    for place, name in enumerate(
        WORD.findall("twenties thirties forties fifties sixties seventies eighties nineties"), 2
    )
}
_ANY_DECADE = rf"\s+(?:the\s+)?'?(?:{DECADE.pattern}|{'|'.join(DECADES)})"
NEWER = re.compile(rf"\b(?:{_AFTER.replace('from|', '')}){_ANY_DECADE}", re.IGNORECASE)
OLDER = re.compile(rf"\b(?:{_BEFORE}){_ANY_DECADE}", re.IGNORECASE)

ORDINALS = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "last": -1}
POSITION = re.compile(
    r"(?:#|\bnumber |\bno\. ?|\[)(\d{1,2})\b|\b(first|second|third|fourth|fifth|last)(?: one)?\b", re.IGNORECASE
)
THESE = _compile_words("these|those|them|all|both|any of|none of")

INTENTS = {
    "profile": _compile_words(
        "my profile|know about me|what (?:do|have) you (?:know|remember|noted)|what have i (?:said|told)"
    ),
    "forget": _compile_words(
        f"{_FORGET} (?:all|everything|me(?! not))|start over|reset|clear (?:my )?(?:profile|everything)|new search"
    ),
    "lift": LIFT_REQUEST,
    "instead": _compile_words("instead"),
    "explain": _compile_words(
        "why|explain|tell me (?:more )?about|what is (?:it|that|this) about|more about|who (?:is|stars)"
    ),
    "similar": _compile_words("similar|alike|more like|something like|like (?:that|this|the|number|#)"),
    "bye": _compile_words("bye|goodbye|see you|good night|that['’]?s all|have a (?:good|nice|great)"),
    "thanks": _compile_words("thanks?|thank you|thx|cheers|appreciate"),
    "hello": re.compile(r"^\W*(?:hi|hello|hey|good (?:morning|evening|afternoon))\b", re.IGNORECASE),
    "more": _compile_words("more|another|others?|else|next|different"),
    "elsewhere": re.compile(
        r"^\W*(?:what|how|when|where|who|which|can you|could you|do you|are you|is|write|tell|translate)\b",
        re.IGNORECASE,
    ),
    "request": _compile_words(
        r"recommend\w*|suggest\w*|find|looking|want|need|show|watch|give me|movies?|films?|books?|something|anything|"
        "ideas?|surprise"
    ),
}

SYNONYMS = {
    "sci fi": "science fiction",
    "scifi": "science fiction",
    "sci-fi": "science fiction",
    "science-fiction": "sci-fi",
    "science fiction": "sci-fi",
    "romantic": "romance",
    "rom-com": "romance",
    "animated": "animation",
    "animation": "animated",
    "cartoon": "animation",
    "scary": "horror",
    "funny": "comedy",
    "comedic": "comedy",
    "suspense": "thriller",
    "kids": "children's",
    "children": "children's",
    "biographical": "biography",
    "noir": "film-noir",
    "sport": "sports",
    "historical": "history",
}
"""Synonyms of values: a catalogue may use either name."""

COMMON_WORD_TITLES = frozenset(
    WORD.findall("it up her us them action adventure drama comedy horror you me we go seven heat big one two yes no")
)
"""Words that are also titles but are rarely meant as such."""

STOP_WORDS = frozenset(
    WORD.findall(
        """a about after again all already also always am an and any anything are as ask at be because been before being
        best both but by can could did do does doing done each else enjoy enjoyed even every everything fan favorite
        favourite film films find fine first for fourth from fun fifth get give go good got great had has have having he
        hello help her here hey hi him his how i i'd i'm i've if in instead into is it it's its just kind know last let
        like liked likes list little looking lot love loved loves made make many may maybe me mean mind mood more most
        movie movies much must my need never new nice no not now number of off ok okay old on one only or other others
        our out over please prefer pretty rather really recommend recommendation recommendations right same saw say
        second see seen she should show shows similar so some something sort still such suggest suggestion suggestions
        sure take tell than thank thanks that that's the their them then there these they thing things think third this
        those time to too try two up us very want was watch watched watching way we well were what what's when where
        which while who why will with would yes yet you your book books item items don't didn't"""
    )
)
"""Stop words of searches."""


def singular(phrase: str) -> str:
    """Return a phrase with its last word in the singular, by common English rules."""
    head, _, last = phrase.rpartition(" ")
    if len(last) > 3 and last.endswith("ies"):
        last = last[:-3] + "y"
    elif len(last) > 3 and last.endswith("s") and not last.endswith("ss"):
        last = last[:-1]
    return f"{head} {last}".strip()
