"""Tokenises prompts and training examples, in the same way for every engine.

The tokenizer's chat template renders the chat part of a prompt. The answer is split into *pieces* at target boundaries
and after each line, and each piece is tokenised separately; a candidate is one more piece. Training examples,
prompts and candidates are split the same way, so a prompt's ids are a prefix of its training example. Contents never
contain control tokens: they are neutralised first, and the ids are checked afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llmrec import __version__
from llmrec.decode.token_tree import TokenTrie
from llmrec.errors import BackendError, DataError, ModelError
from llmrec.guard import clean, control_tokens, neutralise
from llmrec.resources import cache_dir
from llmrec.types import Completion, Example, Message, Prompt, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100
_CACHE_LIMIT = 500_000
# Maximum length of an error of a chat template that is quoted.
_MAX_ERROR_LENGTH = 200
_MAX_CATALOGUES = 4
# Token trees of larger catalogues are cached on disk.
_LARGE_CATALOGUE = 20_000


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The token ids and labels of a training example, equal in length.

    Attributes:
        ids: Token ids.
        labels: Token ids where there is loss, -100 elsewhere.
        weight: The weight of each of its targets in a step's loss.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    weight: float = 1.0

    @property
    def targets(self) -> int:
        """Number of tokens with loss."""
        return sum(label != IGNORED for label in self.labels)


class Encoder:
    """A tokenizer with its chat template.

    Args:
        tokenizer: A Hugging Face fast or slow tokenizer.
        max_length: Maximum prompt length in tokens; longer prompts are errors, never truncated.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.control = control_tokens(tokenizer.all_special_tokens, tokenizer.added_tokens_decoder.values())
        self._control_ids = frozenset(tokenizer.convert_tokens_to_ids(list(self.control))) - self._unknown_token_ids()
        self._pieces: dict[str, tuple[int, ...]] = {}
        self._catalogues: dict[tuple[str | None, str], TokenTrie] = {}
        self._scaffold: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._last: tuple[tuple[Message, ...] | None, tuple[int, ...]] = (None, ())
        self.end_id = self._find_end()
        # T5's tokenizer drops line breaks: an answer that ends with its line would have no end, and a title that is the
        # beginning of another would always be more likely.
        self._ends_lines = not tokenizer.encode("\n", add_special_tokens=False)
        self.stop_ids = frozenset(i for i in (self.end_id, tokenizer.eos_token_id) if i is not None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over vocabulary, added tokens and chat template."""
        tokenizer = self.tokenizer
        core = getattr(tokenizer, "backend_tokenizer", None)
        parts = [
            type(tokenizer).__name__,
            core.to_str() if core is not None else sorted(tokenizer.get_vocab().items()),
            sorted((i, str(token)) for i, token in tokenizer.added_tokens_decoder.items()),
            tokenizer.chat_template or "",
            self.end_id,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def prompt(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, including the given beginning of the answer.

        Raises:
            BackendError: If it is longer than ``max_length``, or contains a forged control token.
        """
        ids = self.chat(prompt.messages)
        for text in answer_pieces(prompt.answer_prefix):
            ids.extend(self.piece(text))
        if len(ids) >= self.max_length:
            raise BackendError(
                f"a prompt of {len(ids)} tokens does not fit model.max_length={self.max_length}; "
                "show less history (tasks.<family>.history), fewer shots (eval.shots.k), or raise model.max_length",
                kind="too-large",
                column="model.max_length",
            )
        return ids

    def continuations(
        self, prompt: Prompt, ids: Sequence[int], texts: Sequence[str], *, closed: bool
    ) -> list[tuple[int, ...]]:
        """Return the token ids of the candidates for a prompt.

        Raises:
            BackendError: If the prompt leaves no room for the longest of them within ``max_length``.
        """
        tails = [self.continuation(prompt, text, closed=closed) for text in texts]
        longest = max((len(tail) for tail in tails), default=0)
        if len(ids) + longest > self.max_length:
            raise BackendError(
                f"a prompt of {len(ids)} tokens and a candidate of {longest} do not fit model.max_length="
                f"{self.max_length}; show less history (tasks.<family>.history), or raise model.max_length",
                kind="too-large",
                column="model.max_length",
            )
        return tails

    def continuation(self, prompt: Prompt, text: str, *, closed: bool) -> tuple[int, ...]:
        """Return the token ids of a candidate; ``closed`` adds the end of the answer."""
        if not closed:
            return self.piece(text)
        if prompt.stop is not None:
            return self.line(text + prompt.stop)
        return (*self.piece(text), self.end_id)

    def line(self, text: str) -> tuple[int, ...]:
        """Tokenise the last line of an answer, with its end."""
        return (*self.piece(text), self.end_id) if self._needs_end_token(text) else self.piece(text)

    def _needs_end_token(self, text: str) -> bool:
        return self._ends_lines and text.endswith("\n")

    def catalogue(self, texts: Sequence[str], stop: str | None) -> TokenTrie:
        """Return the token tree of all answers to prompts with the given stop text.

        The last few trees are kept in memory, and those of large catalogues in the cache folder: tokenising a million
        titles takes longer than building their tree.

        Raises:
            DataError: If two texts have the same tokens.
        """
        key = (stop, hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest())
        known = self._catalogues.pop(key, None)
        if known is None:
            known = (
                self._tree(texts, stop)
                if len(texts) < _LARGE_CATALOGUE
                else self._load_or_build_tree(texts, stop, key[1])
            )
        self._catalogues[key] = known
        while len(self._catalogues) > _MAX_CATALOGUES:
            self._catalogues.pop(next(iter(self._catalogues)))
        return known

    def _load_or_build_tree(self, texts: Sequence[str], stop: str | None, digest: str) -> TokenTrie:
        """Return the token tree from the cache folder, or build and cache it."""
        name = hashlib.sha256(f"{__version__}\0{self.digest}\0{stop!r}\0{digest}".encode()).hexdigest()[:32]
        file = cache_dir() / "catalogues" / f"{name}.safetensors"
        if file.is_file():
            try:
                return TokenTrie.load(file)
            except DataError as error:
                log.warning("%s", error)
        tree = self._tree(texts, stop)
        tree.save(file)
        return tree

    def _tree(self, texts: Sequence[str], stop: str | None) -> TokenTrie:
        prompt = Prompt(messages=(), stop=stop)
        try:
            return TokenTrie.of([self.continuation(prompt, text, closed=True) for text in texts])
        except DataError as error:
            raise error.reworded(
                f"{error} (items are numbered from 0 in the order of their texts; an index such as index: "
                "{scheme: title} gives every item a unique text)"
            ) from None

    def row(self, example: Example) -> TokenRow:
        """Tokenise a training example, with loss on targets and on the end-of-turn token if there is one."""
        ids = self.chat(example.messages)
        labels = [IGNORED] * len(ids)
        for text, is_target in marked_pieces(example.answer):
            piece = self.piece(text)
            ids.extend(piece)
            labels.extend(piece if is_target else [IGNORED] * len(piece))
        if example.ends_turn or (labels[-1] != IGNORED and self._needs_end_token(text)):
            ids.append(self.end_id)
            labels.append(self.end_id)
        return TokenRow(tuple(ids), tuple(labels))

    def text(self, prompt: Prompt) -> str:
        """Return a prompt as the text that the model reads, for reports and logs."""
        return self.turns_text(prompt.messages) + neutralise(
            "".join(s.text for s in prompt.answer_prefix), self.control
        )

    def completion(self, ids: Sequence[int], stop: str | None, prompt_tokens: int) -> Completion:
        """Decode generated token ids up to the end of the answer, for every engine."""
        ended = next((k for k, i in enumerate(ids) if i in self.stop_ids), None)
        written = list(ids if ended is None else ids[:ended])
        text = self._text(written)
        finished, tokens = ended is not None, len(ids) if ended is None else ended + 1
        if stop is not None and stop in text:
            # The rest is padding, because other answers of the batch were longer.
            tokens = bisect_left(range(len(written)), True, key=lambda k: stop in self._text(written[: k + 1])) + 1
            text, finished = text[: text.index(stop)], True
        return Completion(
            text=text,
            prompt_tokens=prompt_tokens,
            completion_tokens=tokens,
            finish_reason="stop" if finished else "length",
        )

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def piece(self, text: str) -> tuple[int, ...]:
        """Tokenise one part of an answer; cached by text."""
        known = self._pieces.get(text)
        if known is None:
            if len(self._pieces) >= _CACHE_LIMIT:
                self._pieces.clear()
            known = tuple(self.tokenizer.encode(neutralise(text, self.control), add_special_tokens=False))
            if any(i in self._control_ids for i in known):
                raise BackendError(
                    f"the text {text!r} is a control token of the tokenizer; remove it from the data", kind="unsafe"
                )
            self._pieces[text] = known
        return known

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokenise chat messages up to the start of the answer, and check that no content imitates a control token.

        The last results are cached, since several answers to one prompt are encoded in sequence.
        """
        before, known = self._last
        if messages == before:
            return list(known)
        ids: list[int] = self.tokenizer.encode(self.turns_text(messages), add_special_tokens=False)
        roles = tuple(message.role for message in messages)
        if roles not in self._scaffold:
            plain = [Message(role, (Segment("text", "x"),)) for role in roles]
            self._scaffold[roles] = self._control_tokens_in(
                self.tokenizer.encode(self.turns_text(plain), add_special_tokens=False)
            )
        if self._control_tokens_in(ids) != self._scaffold[roles]:
            raise BackendError(
                "a title, review or user text contains a control token of the chat template; remove it from the "
                f"data. The prompt begins with {messages[-1].text[:120]!r}",
                kind="unsafe",
            )
        self._last = (tuple(messages), tuple(ids))
        return ids

    def _control_tokens_in(self, ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(i for i in ids if i in self._control_ids)

    def _unknown_token_ids(self) -> frozenset[int]:
        """Return the id of the unknown token, unless it is also another special token.

        Titles in other scripts contain it, so it is no sign of forgery. Its spelling is neutralised like every control
        token.
        """
        tokenizer = self.tokenizer
        unknown: str | None = tokenizer.unk_token
        if unknown is None or unknown in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
            return frozenset()
        return frozenset((int(tokenizer.convert_tokens_to_ids(unknown)),))

    def turns_text(self, messages: Sequence[Message]) -> str:
        """Return chat messages as the text that the model reads, up to the start of the answer."""
        if not self.tokenizer.chat_template:
            start = self.tokenizer.bos_token or ""
            return start + "".join(turn["content"] + "\n\n" for turn in self._turns(messages))
        return self._render_turns(messages)[1]

    def turns(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """Return chat messages in the form of chat templates, without control tokens in their contents."""
        return self._render_turns(messages)[0] if self.tokenizer.chat_template else self._turns(messages)

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        return [{"role": m.role, "content": neutralise(m.text, self.control)} for m in messages]

    def _render_turns(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], str]:
        turns = self._turns(messages)
        try:
            return turns, self._apply_chat_template(turns)
        except ModelError:
            # If a chat template has no system role, its text is put before the first user message.
            if turns[0]["role"] != "system" or len(turns) < 2:
                raise
            joined = {"role": "user", "content": turns[0]["content"] + "\n\n" + turns[1]["content"]}
            turns = [joined, *turns[2:]]
            return turns, self._apply_chat_template(turns)

    def whole(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokenise a whole conversation including the answer, as other programs do."""
        if not self.tokenizer.chat_template:
            return []
        ids: list[int] = self.tokenizer.encode(
            self._apply_chat_template(turns, answering=False), add_special_tokens=False
        )
        return ids

    def _apply_chat_template(self, turns: Sequence[Mapping[str, str]], *, answering: bool = True) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answering, enable_thinking=False
            )
        except Exception as error:
            # The template is a program written by the author of the model, so it runs in a sandbox.
            folder = self.tokenizer.name_or_path
            reason = clean(str(error), _MAX_ERROR_LENGTH) or type(error).__name__
            raise ModelError(
                f"the chat template of {folder} cannot be used: {reason}; restore the original chat_template.jinja "
                "(or the one in tokenizer_config.json), or choose another model",
                kind="unsupported",
                at=folder,
                column="model.name",
            ) from error
        return text

    def _find_end(self) -> int:
        """Find the token that ends an assistant message: the first control token after its content."""
        eos: int | None = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "answer"}]
            tail = self._apply_chat_template(turns, answering=False).rpartition("answer")[2]
            for i in self.tokenizer.encode(tail, add_special_tokens=False):
                if i in self._control_ids:
                    return int(i)
        if eos is None:
            raise BackendError(
                "the tokenizer has neither an end-of-turn nor an end-of-text token; choose another model",
                kind="unsupported",
                column="model.name",
            )
        return eos


def marked_pieces(segments: Sequence[Segment]) -> list[tuple[str, bool]]:
    """Split an answer at targets and line ends into parts, and mark the parts that are targets."""
    runs: list[tuple[str, str]] = []
    for segment in segments:
        kind = segment.kind if segment.kind in ("target", "given") else "text"
        if runs and runs[-1][1] == kind:
            runs[-1] = (runs[-1][0] + segment.text, kind)
        else:
            runs.append((segment.text, kind))
    return [(line, kind == "target") for text, kind in runs for line in text.splitlines(keepends=True) if line]


def answer_pieces(segments: Sequence[Segment]) -> list[str]:
    """Split the given beginning of an answer at line ends, like `marked_pieces`."""
    return [text for text, _ in marked_pieces(segments)]
