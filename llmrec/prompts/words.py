"""Words of a language that are written in prompts and recognised in answers: yes, no, numbers, "out of".

One file per language, ``prompts/languages/<code>.yaml``; docs/prompts.md explains how to add one. All other words of
a prompt are in its template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from pydantic import Field, model_validator

from llmrec.errors import RecipeError, did_you_mean
from llmrec.recipe.load import load_yaml_model
from llmrec.recipe.schema import Section
from llmrec.resources import resource

LANGUAGES_FOLDER = "languages"
ENGLISH = "en"
_NUMBER_WORD_COUNT = 11
_LANGUAGE_CODE = r"[a-z]{2,3}(-[a-z0-9]{2,8})*"


class Words(Section):
    """The words of a language, selected by the template key ``language``; the default is English."""

    language: str = Field(pattern=rf"^{_LANGUAGE_CODE}$", description="language code (BCP 47), lower case")
    says_yes: str = Field(min_length=1, description="value of `{{ answer }}` for a yes")
    says_no: str = Field(min_length=1, description="value of `{{ answer }}` for a no")
    numbers: tuple[str, ...] = Field((), description="words for zero to ten, lower case")
    out_of: tuple[str, ...] = Field(
        (), description="word between a rating and its scale: `of` in 4 of 5 (/ is always accepted)"
    )
    joining: tuple[str, ...] = Field((), description="words between the entries of a list, such as and")
    linking: tuple[str, ...] = Field(
        (), description="words that may follow a label, such as is; a letter before any other word is not a label"
    )
    words_alone: tuple[str, ...] = Field(
        (), description="capital letters that are also words in the language, such as A"
    )
    answer: str = Field("", description="noun at the beginning of an answer, as in: my answer is ...")
    before_answer: tuple[str, ...] = Field((), description="words that may precede the answer noun, such as my")
    after_answer: tuple[str, ...] = Field((), description="words that may follow the answer noun, such as is")

    @model_validator(mode="after")
    def _usable(self) -> Words:
        if self.says_yes.casefold() == self.says_no.casefold():
            raise ValueError("says_no: the value equals says_yes; use different words")
        if self.numbers and len(self.numbers) != _NUMBER_WORD_COUNT:
            raise ValueError(f"numbers: write {_NUMBER_WORD_COUNT} words, from zero to ten, or none")
        return self

    @cached_property
    def scale(self) -> re.Pattern[str]:
        """Pattern of the suffix that names the scale of a rating: ``/5``, ``out of 5``."""
        return re.compile(rf"\s*(?:{_alternation_pattern('/', *self.out_of)})\s*(\d+)", re.IGNORECASE)

    @cached_property
    def lead(self) -> re.Pattern[str]:
        """Pattern of lower-case text before an answer: ``the answer is``."""
        if not self.answer:
            return re.compile("(?!)")
        before = rf"(?:(?:{_alternation_pattern(*self.before_answer)})\s+)*" if self.before_answer else ""
        after = rf"(?:\s+(?:{_alternation_pattern(*self.after_answer)}))?" if self.after_answer else ""
        return re.compile(rf"{before}{re.escape(self.answer)}{after}\b[\s:]*")

    def answer_word(self, *, yes: bool) -> str:
        """Return the word for yes or no."""
        return self.says_yes if yes else self.says_no

    def spellings(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the spellings of yes and of no; none is a prefix of another, so that probabilities can be added."""
        return _word_spellings(self.says_yes), _word_spellings(self.says_no)


def read_language_words(language: str, *folders: Path) -> Words:
    """Return the words of a language.

    Args:
        language: Its code.
        folders: Folders searched for its file before those of the package.

    Raises:
        RecipeError: If its file is missing, or a file is invalid.
    """
    for folder in (*folders, resource("prompts", LANGUAGES_FOLDER)) if re.fullmatch(_LANGUAGE_CODE, language) else ():
        if (page := folder / f"{language}.yaml").is_file():
            return _read_word_file(page)
    known = sorted(page.stem for page in resource("prompts", LANGUAGES_FOLDER).glob("*.yaml"))
    raise RecipeError(
        f"language is {language!r}, which has no word file{did_you_mean(language, known)}; known: {', '.join(known)}. "
        f"Write {LANGUAGES_FOLDER}/{language}.yaml next to the family's folder",
        kind="unknown-name",
        column="language",
    )


@lru_cache(maxsize=64)
def _read_word_file(page: Path) -> Words:
    words = load_yaml_model(Words, page, {}, {})
    if words.language != page.stem:
        rest = f": language is {words.language!r}, but the file is {page.stem!r}; use the same name"
        raise RecipeError.at(page, "contradiction", rest, "language")
    return words


@lru_cache(maxsize=1)
def english_words() -> Words:
    """Return the English words."""
    return read_language_words(ENGLISH)


def _alternation_pattern(*words: str) -> str:
    return "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in words)


def _word_spellings(word: str) -> tuple[str, ...]:
    spelt: Sequence[str] = (word, word.lower(), word.upper(), f" {word}", f" {word.lower()}")
    return tuple(dict.fromkeys(spelt))
