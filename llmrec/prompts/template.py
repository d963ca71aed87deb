"""Prompt templates: YAML files in a small subset of Jinja, safe from injection by data.

A data value never enters a template as text. Each one is rendered as a placeholder of private-use characters, which
neither cleaned data nor a template can contain, and the output is split back into segments. So a title ``{{ 7*7 }}``
stays literal, and a title can neither imitate template text nor add a line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import StrictUndefined, TemplateError, Undefined, nodes
from jinja2 import Template as JinjaTemplate
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmrec.errors import ErrorKind, Location, RecipeError, did_you_mean
from llmrec.prompts.values import Fields, Placeholders, Record
from llmrec.prompts.words import ENGLISH, LANGUAGES_FOLDER, Words, english_words, read_language_words
from llmrec.recipe.pages import read_yaml_page
from llmrec.resources import resource
from llmrec.types import Message, Role, Segment

# The subset of Jinja that prompt templates may use: checked on the syntax tree, then compiled.
#
# Variables with one level of attributes; ``if`` with comparisons, ``and``, ``or``, ``not``; one level of ``for`` over a
# list variable with ``loop.first``, ``loop.last``, ``loop.index``. There are no calls, filters, arithmetic or nested
# loops, so a template can access only its values and cannot run for long.


FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\uf8ff\U000f0000-\U0010ffff]")
"""Characters forbidden in templates: control and line separators, surrogates, private use."""

_DEPTH_LIMIT = 24
_LOOP_ATTRIBUTES = ("first", "last", "index")
_STATEMENTS = (nodes.Output, nodes.TemplateData, nodes.If, nodes.For)
_EXPRESSIONS = (nodes.Name, nodes.Getattr, nodes.Const, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not)


class ForbiddenConstruct(Exception):
    """Raised for a construct that templates must not use, with the line of the template text."""

    def __init__(self, line: int, construct: str) -> None:
        super().__init__(construct)
        self.line = line
        self.construct = construct


@dataclass(frozen=True)
class CompiledTemplate:
    """A checked template text, with the variables that it uses."""

    names: frozenset[str]
    source: str

    @cached_property
    def template(self) -> JinjaTemplate:
        """The compiled Jinja template; compiled on first use, because most loaded templates are only checked."""
        return _ENVIRONMENT.from_string(self.source)

    @cached_property
    def _plain(self) -> tuple[str | tuple[str, str], ...] | None:
        """Texts and variables of the template; None if it has other elements."""
        results: list[str | tuple[str, str]] = []
        for node in _ENVIRONMENT.parse(self.source).body:
            for piece in node.nodes if isinstance(node, nodes.Output) else (node,):
                if isinstance(piece, nodes.TemplateData):
                    results.append(piece.data)
                elif isinstance(piece, nodes.Getattr) and isinstance(piece.node, nodes.Name):
                    results.append((piece.node.name, piece.attr))
                else:
                    return None
        return tuple(results)

    def rendered(self, values: Mapping[str, object]) -> Iterator[str]:
        """Yield the rendered text in parts.

        Args:
            values: Values of all variables, wrapped by a `Placeholders`.

        Raises:
            TemplateError, RecipeError, TypeError, ValueError: If a value is invalid.
        """
        plain = self._plain
        if plain is None or not all(isinstance(values[piece[0]], Record) for piece in plain if type(piece) is tuple):
            yield from self.template.generate(values)
            return
        # Most leads and targets, which are rendered for each step of a list, so that creating a Jinja context is slow.
        for piece in plain:
            yield piece if isinstance(piece, str) else str(_finalize(getattr(values[piece[0]], piece[1])))


def _finalize(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, list) or (callable(value) and not isinstance(value, Undefined)):
        raise RecipeError(
            "a list or record cannot be rendered; loop over the list, or use a field of the record", kind="bad-value"
        )
    return value


class _Sandbox(ImmutableSandboxedEnvironment):
    def getattr(self, obj: object, attribute: str) -> object:
        # Templates can access only data, and must not use names that begin with an underscore.
        return getattr(obj, attribute) if type(obj) is Record else super().getattr(obj, attribute)


_ENVIRONMENT = _Sandbox(
    undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_finalize, cache_size=0
)
_ENVIRONMENT.globals.clear()
_ENVIRONMENT.filters.clear()
_ENVIRONMENT.tests.clear()


@lru_cache(maxsize=1024)
def compile_template(source: str) -> CompiledTemplate:
    """Check a template text, and return it with its variables.

    Raises:
        ForbiddenConstruct: If it is invalid, with the line and the construct.
    """
    names: set[str] = set()
    try:
        for node in _ENVIRONMENT.parse(source).body:
            _check_node(node, 0, None, names)
        return CompiledTemplate(frozenset(names), source)
    except TemplateError as error:
        raise ForbiddenConstruct(getattr(error, "lineno", None) or 1, str(error.message)) from None
    except (RecursionError, ValueError, MemoryError, OverflowError, SyntaxError):
        raise ForbiddenConstruct(1, "an expression that is nested too deeply, or a number that is too long") from None


def _check_node(node: nodes.Node, depth: int, bound: str | None, names: set[str]) -> None:
    """Reject syntax that is not allowed, and collect free variables; ``bound`` is the loop variable."""
    if depth > _DEPTH_LIMIT:
        raise ForbiddenConstruct(node.lineno, f"more than {_DEPTH_LIMIT} levels of nesting")
    if not isinstance(node, _STATEMENTS + _EXPRESSIONS):
        raise ForbiddenConstruct(node.lineno, f"{type(node).__name__.lower()}, which is not supported")
    if isinstance(node, nodes.Const) and isinstance(node.value, str) and FORBIDDEN.search(node.value):
        raise ForbiddenConstruct(node.lineno, "a control or private-use character")
    if isinstance(node, nodes.Getattr):
        _check_attribute(node, bound, names)
    elif isinstance(node, nodes.Name):
        if node.name == "loop":
            raise ForbiddenConstruct(
                node.lineno, "loop without an attribute; use loop.first, loop.last or loop.index in a for"
            )
        if node.name != bound:
            names.add(node.name)
    elif isinstance(node, nodes.For):
        _check_loop(node, depth, bound, names)
    else:
        for child in node.iter_child_nodes():
            _check_node(child, depth + 1, bound, names)


def _check_attribute(node: nodes.Getattr, bound: str | None, names: set[str]) -> None:
    owner = node.node
    if not isinstance(owner, nodes.Name):
        raise ForbiddenConstruct(node.lineno, f"attribute {node.attr!r} of an expression that is not a plain variable")
    if node.attr.startswith("_"):
        raise ForbiddenConstruct(node.lineno, f"attribute {node.attr!r} starts with an underscore")
    if owner.name == "loop":
        if bound is None or node.attr not in _LOOP_ATTRIBUTES:
            raise ForbiddenConstruct(
                node.lineno, f"loop.{node.attr}; inside a for there are loop.first, loop.last and loop.index"
            )
    elif owner.name != bound:
        names.add(owner.name)


def _check_loop(node: nodes.For, depth: int, bound: str | None, names: set[str]) -> None:
    if bound is not None:
        raise ForbiddenConstruct(node.lineno, "a for inside a for")
    if node.recursive or node.test is not None:
        raise ForbiddenConstruct(node.lineno, "a recursive or filtered for; put an if inside the loop")
    if not isinstance(node.iter, nodes.Name) or not isinstance(node.target, nodes.Name):
        raise ForbiddenConstruct(node.lineno, "a for over an expression that is not a plain list variable")
    if node.target.name == "loop":
        # Jinja rejects this only when the template is first rendered.
        raise ForbiddenConstruct(node.lineno, "a loop variable called loop")
    _check_node(node.iter, depth + 1, None, names)
    for child in node.body:
        _check_node(child, depth + 1, node.target.name, names)
    for child in node.else_:
        _check_node(child, depth + 1, None, names)


SOURCE_LIMIT = 16 * 1024
_PARTS = ("system", "user", "lead", "target")
_HASHED_KEYS = ("family", "name", "version", "use", "shape", "system", "user", "lead", "target", "tail")
# Metadata of a template, which do not change prompts and are not hashed; words of a language do and are.
_METADATA_KEYS = ("set", "number", "also", "leak", "needs", "language")
_ALL_KEYS = (*_HASHED_KEYS, *_METADATA_KEYS)
_USES = ("seen", "named", "unseen")
_REQUIRED_KEYS = ("family", "name", "version", "use", "shape", "user", "target")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_ALSO = re.compile(rf"{_NAME.pattern} \S+")
_CODE = re.compile(r"\.code\b")
_TITLE = re.compile(r"\.title\b")
_CODED, _TITLED = (re.compile(rf"\b([\w.]+)\.{name}\b") for name in ("code", "title"))
_TAG = re.compile(r"{[{%].*?[%}]}")
_WORDS = re.compile(r"[\w\s]")
_ITEM = frozenset({"item"})


@dataclass(frozen=True)
class Template:
    """A prompt template of a task.

    Attributes:
        family: The task of the template.
        name: Unique inside the family; also the name of the file.
        version: Increased whenever the words change.
        use: ``seen`` templates are for training, ``named`` ones if a recipe names them or their set, ``unseen`` never.
        shape: A ``list`` is continued step by step, each step consisting of lead, target and tail. A ``chat`` has one
            answer, the target, closed by the end of turn.
        system: Text of the system message; empty for none.
        user: Text of the user message.
        lead: Text before a list's target, such as the title whose rating follows.
        target: The text to learn.
        tail: Literal text that ends a step of a list; it starts with a newline and is learned too. A list with only
            codes of item tokens needs none, because no code is a prefix of another.
        set: The published set with an equivalent template, such as ``p5``; a recipe may name the whole set.
        number: The number of the template of the set with the same fields, such as ``1-3``.
        also: Another set and the number in it, such as ``p5-yelp 3-2``.
        leak: Note on what its question could reveal of the answer; empty if nothing.
        needs: ``reviews`` if it shows data of reviews: a headline, a feature, the review itself. Without
            them it is used only if it is named, and then rejected.
        language: Code of its language.
        words: Words that code writes and reads in that language: yes and no, numbers; see `Words`.
    """

    family: str
    name: str
    version: int
    use: Literal["seen", "named", "unseen"]
    shape: Literal["list", "chat"]
    user: str
    target: str
    system: str = ""
    lead: str = ""
    tail: str = ""
    set: str = ""
    number: str = ""
    also: str = ""
    leak: str = ""
    needs: Literal["", "reviews"] = ""
    language: str = ENGLISH
    words: Words = field(default_factory=english_words, compare=False)
    sha: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Check the syntax of all parts.

        Raises:
            RecipeError: If a part or the shape is invalid.
        """
        _check_fields(self)
        for part in _PARTS:
            _check_source(part, getattr(self, part))
        if self.words.language != self.language:
            object.__setattr__(self, "words", read_language_words(self.language))
        hashed: dict[str, Any] = {key: getattr(self, key) for key in _HASHED_KEYS}
        if self.language != ENGLISH:
            hashed["words"] = self.words.model_dump(mode="json")
        content = json.dumps(hashed, sort_keys=True)
        object.__setattr__(self, "sha", hashlib.sha256(content.encode()).hexdigest()[:12])

    def stored(self) -> dict[str, Any]:
        """Return the template in the form stored in model folders."""
        return {key: getattr(self, key) for key in _ALL_KEYS} | {"words": self.words.model_dump(mode="json")}

    @staticmethod
    def of_stored(entry: Mapping[str, Any]) -> Template:
        """Return a template from the form stored in model folders.

        Raises:
            RecipeError: As `Template`.
        """
        words = entry.get("words")
        return Template(**{**entry, "words": Words.model_validate(words) if words else english_words()})

    @property
    def id(self) -> str:
        """``family/name``."""
        return f"{self.family}/{self.name}"

    @property
    def sets(self) -> Mapping[str, str]:
        """The template sets that contain the template, with its number in each set."""
        name, _, number = self.also.partition(" ")
        return {key: value for key, value in ((self.set, self.number), (name, number)) if key}

    @property
    def writes_codes(self) -> bool:
        """Whether the template shows item codes, which require an item index."""
        return any(_CODE.search(getattr(self, part)) for part in _PARTS)

    @property
    def writes_titles(self) -> bool:
        """Whether the template shows item titles."""
        return any(_TITLE.search(getattr(self, part)) for part in _PARTS)

    @property
    def writes_both(self) -> bool:
        """Whether the template shows the same item by both code and title."""
        text = "\n".join(getattr(self, part) for part in _PARTS)
        coded, titled = ({match[1] for match in pattern.finditer(text)} for pattern in (_CODED, _TITLED))
        return not coded.isdisjoint(titled)

    @property
    def asks_with_code(self) -> bool:
        """Whether an item's code precedes the answer."""
        return any(_CODE.search(getattr(self, part)) for part in _PARTS if part != "target")

    @property
    def answers_with_code(self) -> bool:
        """Whether the answer is an item's code."""
        return _CODE.search(self.target) is not None

    @property
    def shows_profile(self) -> bool:
        """Whether the template shows a profile of the user."""
        return "profile" in self.names("system", "user")

    def names(self, *parts: str) -> frozenset[str]:
        """Return the variables used in the given parts (``system``, ``user``, ``lead`` and ``target``)."""
        return frozenset().union(*(compile_template(getattr(self, part)).names for part in parts))

    def check(self, *, turns: Collection[str], lead: Collection[str], target: Collection[str]) -> None:
        """Reject variables that must not be used in a part, so that no prompt shows the answer.

        Raises:
            RecipeError: With the template, the variable and the known ones.
        """
        for part, known in (("system", turns), ("user", turns), ("lead", lead), ("target", target)):
            for name in sorted(self.names(part)):
                self._check_variable(part, name, known)

    def turns(self, values: Mapping[str, object]) -> tuple[Message, ...]:
        """Render the system message, if there is one, and the user message.

        Raises:
            RecipeError: If a variable is unknown or the text exceeds its limit.
        """
        roles: tuple[tuple[Role, str], ...] = (("system", "system"), ("user", "user"))
        rendered = ((role, self._render_part(part, values)) for role, part in roles)
        return tuple(Message(role, segments) for role, segments in rendered if segments)

    @property
    def bare(self) -> bool:
        """Whether the prompt contains only codes: a list without other text, or a question without words."""
        if self.lead or self.tail or self.target.strip() != "{{ item.code }}":
            return False
        return self.shape == "list" or not _WORDS.search(_TAG.sub("", self.user))

    def opening(self, values: Mapping[str, object]) -> tuple[Segment, ...]:
        """Render the fixed text at the start of the answer, after which the model generates."""
        return self._render_part("lead", values)

    def step(self, values: Mapping[str, object]) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """Render the text before the target, and the target as one segment of kind ``target``."""
        return self.opening(values), (Segment("target", self.answer(values) + self.tail),)

    def answer(self, values: Mapping[str, object]) -> str:
        """Render the target as the text whose likelihood is scored."""
        return "".join(segment.text for segment in self._render_part("target", values))

    def _check_variable(self, part: str, name: str, known: Collection[str]) -> None:
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            problem = f"unknown variable {name!r}{did_you_mean(name, known)}; known there: {names}"
            raise RecipeError(
                f"template {self.id}, key {part}: {problem}", kind="unknown-name", at=self.id, column=part
            )

    def _render_part(self, part: str, values: Mapping[str, object]) -> tuple[Segment, ...]:
        source: str = getattr(self, part)
        if "{" not in source:
            return (Segment("text", source),) if source else ()
        parsed = compile_template(source)
        item = values.get("item") if parsed.names == _ITEM else None
        if isinstance(item, Fields) and source in item.rendered:
            return item.rendered[source]
        for name in parsed.names:
            self._check_variable(part, name, values)
        ledger = Placeholders()
        chunks: list[str] = []
        try:
            for chunk in parsed.rendered({name: ledger.wrap(values[name]) for name in parsed.names}):
                ledger.spend(len(chunk))
                chunks.append(chunk)
        except (TemplateError, RecipeError, TypeError, ValueError) as error:
            raise RecipeError(
                f"template {self.id}, key {part}: {error}",
                kind=getattr(error, "kind", None) or "syntax",
                at=self.id,
                column=part,
            ) from None
        segments = ledger.segments("".join(chunks))
        if isinstance(item, Fields):
            item.rendered[source] = segments
        return segments


def load_templates(family: str, *extra: Path | str | None) -> dict[str, Template]:
    """Load all templates of a task.

    Args:
        family: Name of a task.
        extra: Files and folders of further templates, of this family and others; in a folder, ``<family>/*.yaml`` if
            that exists. None is ignored.

    Returns:
        Templates by name: seen before named before unseen, lists before chats, then by name. The first is the default.

    Raises:
        RecipeError: If a file is not a template of this grammar, or a name is repeated.
    """
    files = sorted(resource("prompts").joinpath(family).glob("*.yaml"))
    mixed: list[Path] = []
    for item in (Path(path) for path in extra if path is not None):
        if not item.exists():
            raise RecipeError(
                f"template file or folder {item} does not exist; check the path", kind="missing-file", at=item
            )
        if (item / family).is_dir():
            files += sorted((item / family).glob("*.yaml"))
        else:
            mixed += [item] if item.is_file() else sorted(item.glob("*.yaml"))
    result: dict[str, tuple[Template, Path]] = {}
    for file in (*files, *mixed):
        template = _read_template(file)
        if template.family != family:
            if file in mixed:
                continue
            raise RecipeError.at(
                file,
                "contradiction",
                f": family is {template.family!r}, but the file is in the folder of {family!r}; move the file",
                "family",
            )
        if template.name in result:
            raise RecipeError.at(
                file,
                "duplicate",
                f": {template.id} is also defined in {result[template.name][1]}; rename one of the templates",
                "name",
            )
        result[template.name] = (template, file)
    order = sorted((t for t, _ in result.values()), key=lambda t: (_USES.index(t.use), t.shape != "list", t.name))
    return {template.name: template for template in order}


# --------------------------------------------------------------------------- files


def _template_error(key: str, kind: ErrorKind, problem: str) -> RecipeError:
    """Return the error about a key; the loader adds the file and the line."""
    return RecipeError(problem, kind=kind, column=key)


def _check_source(part: str, source: str) -> None:
    if len(source) > SOURCE_LIMIT:
        raise _template_error(part, "too-large", f"key {part} is longer than {SOURCE_LIMIT} characters; shorten it")
    bad = FORBIDDEN.search(source)
    if bad:
        raise _template_error(
            part,
            "encoding",
            f"key {part} contains the control or private-use character U+{ord(bad.group()):04X}; remove it",
        )
    try:
        compile_template(source)
    except ForbiddenConstruct as refusal:
        raise _template_error(
            part,
            "syntax",
            f"key {part}, line {refusal.line} of its text: {refusal.construct}; a template may contain variables such "
            "as item.title, if, one for over a list, comparisons, and, or, not",
        ) from None


def _check_fields(template: Template) -> None:
    for key in _ALL_KEYS:
        value = getattr(template, key)
        if key == "version":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _template_error(key, "bad-value", "version must be a whole number of at least 1")
        elif not isinstance(value, str):
            kind = type(value).__name__
            raise _template_error(
                key,
                "bad-value",
                f"{key} is a {kind}, not a text; write a text, in quotes if necessary",
            )
    for key in ("family", "name"):
        if not _NAME.fullmatch(getattr(template, key)):
            raise _template_error(
                key, "bad-value", f"{key} is {getattr(template, key)!r}; use lower-case letters, digits and hyphens"
            )
    for key, known in (("use", _USES), ("shape", ("list", "chat")), ("needs", ("reviews", ""))):
        value = getattr(template, key)
        if value not in known:
            choices = " or ".join(name or "drop it" for name in known)
            raise _template_error(
                key, "unknown-name", f"{key} is {value!r}{did_you_mean(value, known)}; choose {choices}"
            )
    for key in ("user", "target"):
        if not getattr(template, key).strip():
            raise _template_error(key, "missing-value", f"{key} is empty; add its value")
    if template.shape == "list" and not template.tail.startswith("\n") and not template.bare:
        raise _template_error(
            "tail",
            "contradiction",
            f"tail is {template.tail!r}; list steps end with a newline, which titles cannot have. Only a list of "
            'codes, with target "{{ item.code }}" and without a lead, may have no tail',
        )
    for key in ("lead", "tail"):
        if template.shape == "chat" and getattr(template, key):
            raise _template_error(key, "contradiction", f"a chat has no {key}; remove the key or use shape: list")
    if template.set and not _NAME.fullmatch(template.set):
        raise _template_error(
            "set", "bad-value", f"set is {template.set!r}; use lower-case letters, digits and hyphens"
        )
    if template.also and not _ALSO.fullmatch(template.also):
        raise _template_error(
            "also",
            "bad-value",
            f"also is {template.also!r}; write a set and the template's number in this set, such as 'p5-yelp 3-2'",
        )
    for key in ("number", "also", "leak"):
        if FORBIDDEN.search(getattr(template, key)):
            raise _template_error(key, "encoding", f"{key} contains a control or private-use character; remove it")
    if "{" in template.tail or FORBIDDEN.search(template.tail):
        raise _template_error("tail", "bad-value", "tail must be literal text without variables or control characters")


def _read_template(file: Path) -> Template:
    if file.stat().st_size > 4 * SOURCE_LIMIT:
        raise RecipeError.at(file, "too-large", f": longer than {4 * SOURCE_LIMIT} bytes; a template is a short file")
    page, locations = read_yaml_page(file)
    values: Mapping[str, Any] = page
    for key in values:
        if key not in _ALL_KEYS:
            location, known = locations.get((str(key),), Location(str(file), line=1)), ", ".join(_ALL_KEYS)
            rest = f": unknown key {key!r}{did_you_mean(str(key), _ALL_KEYS)}; known: {known}"
            raise RecipeError.at(location, "unknown-key", rest, str(key))
    for key in _REQUIRED_KEYS:
        if key not in values:
            raise RecipeError.at(file, "missing-key", f": key {key!r} is missing; add it", key)
    if values["name"] != file.stem:
        rest = f": name is {values['name']!r}, but the file is {file.stem!r}; use the same name"
        raise RecipeError.at(locations[("name",)], "contradiction", rest, "name")
    try:
        language = values.get("language", ENGLISH)
        words = (
            read_language_words(language, *(at / LANGUAGES_FOLDER for at in file.parents[:2]))
            if isinstance(language, str)
            else english_words()
        )
        return Template(**values, words=words)
    except RecipeError as fault:
        if fault.file is not None:  # the file with the words of a language
            raise
        location = locations.get((fault.column or "",), Location(str(file), line=1))
        raise RecipeError(f"{location}: {fault}", kind=fault.kind, at=location, column=fault.column) from None
