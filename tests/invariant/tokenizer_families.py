"""Small tokenizers of common model families: their published control tokens on a vocabulary of single letters.

The chat templates are written for these tests, with the control tokens where the format of each family has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>[]|{}/_:;.,!?'\"#*&%$@+-=()~^`\\"


@dataclass(frozen=True)
class Added:
    """A token and how tokenizers match it."""

    text: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class Family:
    """A family: its tokens, the roles of four of them, its chat format and its kind of vocabulary."""

    name: str
    tokens: tuple[Added, ...]
    eos: str
    template: str | None
    bos: str | None = None
    pad: str | None = None
    unk: str | None = None
    core: str = "bytes"


def special(*texts: str, **options: bool) -> tuple[Added, ...]:
    return tuple(Added(text, **options) for text in texts)


def plain(*texts: str, **options: bool) -> tuple[Added, ...]:
    return tuple(Added(text, special=False, **options) for text in texts)


def turns(user: str, answer: str, opening: str, *, start: str = "", system: str | None = None) -> str:
    """Return a chat template from the text of each turn, in which X stands for the content."""
    first = user if system is None else system

    def filled(words: str) -> str:
        before, _, after = words.partition("X")
        return f"{before}{{{{ message['content'] }}}}{after}"

    return (
        f"{start}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{filled(first)}"
        f"{{% elif message['role'] == 'user' %}}{filled(user)}"
        f"{{% else %}}{filled(answer)}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )


_CHATML_ANSWER = "<|im_start|>assistant\nX<|im_end|>\n"
# The thinking of earlier answers is removed, so a title with the closing tag could cut an answer.
_THINKING = (
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{% if message['role'] == 'user' and text.startswith('<tool_response>') %}<|im_start|>tool\n{{ text }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ text }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_NO_SYSTEM = (
    "<bos>{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "qwen",
        (
            *special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_pad|>"),
            *plain("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
            *plain("<|fim_prefix|>", "<|fim_suffix|>", "<|repo_name|>", "<|file_sep|>"),
        ),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        template=_THINKING,
        core="bytes-nfc",
    ),
    Family(
        "llama-2",
        special("<unk>", "<s>", "</s>"),
        eos="</s>",
        bos="<s>",
        unk="<unk>",
        template=turns("[INST] X [/INST]", " X </s>", "", start="<s>", system="<<SYS>>\nX\n<</SYS>>\n\n"),
        core="pieces",
    ),
    Family(
        "llama-3",
        special(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            *("<|eom_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{n}|>" for n in range(240))),
        ),
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        template=turns(
            "<|start_header_id|>user<|end_header_id|>\n\nX<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\nX<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            start="<|begin_of_text|>",
            system="<|start_header_id|>system<|end_header_id|>\n\nX<|eot_id|>",
        ),
    ),
    Family(
        "mistral",
        special(
            *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]"),
            *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[IMG]", "[PREFIX]"),
            *("[MIDDLE]", "[SUFFIX]", *(f"[control_{n}]" for n in range(500))),
        ),
        eos="</s>",
        bos="<s>",
        unk="<unk>",
        template=turns("[INST]X[/INST]", "X</s>", "", start="<s>", system="[SYSTEM_PROMPT]X[/SYSTEM_PROMPT]"),
        core="pieces",
    ),
    Family(
        "gemma",
        (
            *special("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
            *plain("<mask>", "<2mass>", "[@BOS@]", "[multimodal]", "<table>", "</table>", "<b>", "</b>", "<h1>"),
            *plain(*(f"<unused{n}>" for n in range(99)), *("\n" * n for n in range(1, 31)), "▁▁", "▁▁▁▁"),
        ),
        eos="<eos>",
        bos="<bos>",
        pad="<pad>",
        unk="<unk>",
        template=_NO_SYSTEM,
        core="pieces",
    ),
    Family(
        "phi-3",
        (
            *special("<unk>", "<s>", "<|endoftext|>"),
            *special("</s>", "<|assistant|>", "<|end|>", "<|system|>", "<|user|>", "<|placeholder1|>", rstrip=True),
        ),
        eos="<|end|>",
        bos="<s>",
        unk="<unk>",
        template=turns(
            "<|user|>\nX<|end|>\n", "<|assistant|>\nX<|end|>\n", "<|assistant|>\n", system="<|system|>\nX<|end|>\n"
        ),
        core="pieces",
    ),
    Family(
        "phi-4",
        (
            *special("<|endoftext|>", "<|dummy_0|>", lstrip=True, rstrip=True),
            *special("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|fim_middle|>", lstrip=True, rstrip=True),
        ),
        eos="<|im_end|>",
        bos="<|endoftext|>",
        template=turns(
            "<|im_start|>user<|im_sep|>X<|im_end|>",
            "<|im_start|>assistant<|im_sep|>X<|im_end|>",
            "<|im_start|>assistant<|im_sep|>",
            system="<|im_start|>system<|im_sep|>X<|im_end|>",
        ),
    ),
    Family(
        "deepseek",
        (
            *special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|EOT|>"),
            *plain("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜fim▁hole｜>", "<｜tool▁calls▁begin｜>"),
            *plain("<｜tool▁calls▁end｜>", "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>"),
        ),
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        pad="<｜▁pad▁｜>",
        template=turns(
            "<｜User｜>X",
            "<｜Assistant｜>X<｜end▁of▁sentence｜>",
            "<｜Assistant｜>",
            start="<｜begin▁of▁sentence｜>",
            system="X",
        ),
    ),
    Family(
        "falcon",
        special(
            *(">>TITLE<<", ">>ABSTRACT<<", ">>INTRODUCTION<<", ">>SUMMARY<<", ">>COMMENT<<", ">>ANSWER<<"),
            *(">>QUESTION<<", ">>DOMAIN<<", ">>PREFIX<<", ">>SUFFIX<<", ">>MIDDLE<<", "<|endoftext|>"),
        ),
        eos="<|endoftext|>",
        template=turns("User: X\n", "Falcon: X<|endoftext|>\n", "Falcon:", system="System: X\n"),
    ),
    # One token for every role, and no chat format.
    Family(
        "gpt-2",
        special("<|endoftext|>"),
        eos="<|endoftext|>",
        bos="<|endoftext|>",
        unk="<|endoftext|>",
        template=None,
    ),
    Family(
        "t5",
        special("<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in range(100))),
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        template=None,
        core="unigram-nfkc",
    ),
    Family(
        "bert",
        special("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        eos="[SEP]",
        bos="[CLS]",
        pad="[PAD]",
        unk="[UNK]",
        template=None,
        core="words-lower",
    ),
    # Every way to match a token at once, behind a normaliser that rewrites most of a text.
    Family(
        "odd",
        (
            *special("<|im_start|>", "<|im_end|>", "<S e p>", "<  gap>", "Human:", "eng_Latn", "__bos__", "@@END@@"),
            *special("[Turn]", "<résumé>", "<用户>", "《END》", "</q>", "<<q>>", "<q", normalized=True),
            *plain("<tool>", "<TASK>", "<ﬁn>", "[a|b]", "|||X|||", normalized=True, lstrip=True, rstrip=True),
            *plain("<word>", single_word=True),
            *plain("\n\n", "    ", "\t", "ordinary", "=>", "!!"),
        ),
        eos="<|im_end|>",
        template=turns("<|im_start|>user\nX<|im_end|>\n", _CHATML_ANSWER, "<|im_start|>assistant\n"),
        core="words-lower",
    ),
)


def build(family: Family) -> Any:
    """Return a family's tokenizer."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    core = _CORES[family.core]()
    added = [
        AddedToken(
            token.text,
            special=token.special,
            normalized=token.normalized,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
        )
        for token in family.tokens
    ]
    core.add_special_tokens([token for token in added if token.special])
    core.add_tokens([token for token in added if not token.special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad or family.eos,
        unk_token=family.unk,
    )
    tokenizer.chat_template = family.template
    return tokenizer


@cache
def tokenizer_of(name: str) -> Any:
    return build(next(family for family in FAMILIES if family.name == name))


def all_tokens() -> list[str]:
    """Return the control tokens of all families, with only a few of each numbered series."""
    rows = ("_token_", "control_", "unused", "extra_id_")
    few = [
        token.text
        for family in FAMILIES
        for token in family.tokens
        if token.text.strip(" \n\t▁") and not (any(row in token.text for row in rows) and token.text[-3:-2].isdigit())
    ]
    return list(dict.fromkeys(few))


# --------------------------------------------------------------------------- vocabularies


def _bytes(normalizer: Any = None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    return core


def _bytes_nfc() -> Any:
    from tokenizers import normalizers

    return _bytes(normalizers.NFC())


def _pieces() -> Any:
    """Like SentencePiece BPE: spaces are ▁, and characters outside the vocabulary become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    names = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *LETTERS]
    vocabulary = {name: number for number, name in enumerate(names)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def _unigram() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return core


def _words() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    letters = dict.fromkeys(letter.lower() for letter in LETTERS)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {name: number for number, name in enumerate(names)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=5000))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer(lowercase=True)])
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return core


_CORES: dict[str, Callable[[], Any]] = {
    "bytes": _bytes,
    "bytes-nfc": _bytes_nfc,
    "pieces": _pieces,
    "unigram-nfkc": _unigram,
    "words-lower": _words,
}
