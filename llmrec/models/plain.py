"""Reads configuration and tokenizer of common decoders without transformers and torch, whose import takes seconds.

For checks only. Uncommon or damaged models are left to transformers, which decides and gives the reason.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmrec.recipe.schema import ModelSection

# Decoders that every supported version of transformers has, with the keys of their sizes, which must not be 0.
_DECODER_TYPES = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3")
)
_SIZE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
_LIBRARIES = ("torch", "transformers", "tokenizers")
# Keys of models whose loading needs more than an architecture.
_UNCOMMON_KEYS = ("auto_map", "quantization_config")
# Tokenizer classes that use tokenizer.json unchanged.
_TOKENIZER_CLASSES = frozenset(
    (
        *("TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast"),
        *("Qwen2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizerFast", "GemmaTokenizerFast"),
    )
)
_SPECIAL_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def is_plain_decoder(folder: str, section: ModelSection) -> bool:
    """Whether a folder contains a decoder of a known type, whose configuration can be read without transformers."""
    config = _read_json_object(Path(folder) / "config.json")
    if config is None or section.trust_remote_code or any(config.get(key) for key in _UNCOMMON_KEYS):
        return False
    if config.get("model_type") not in _DECODER_TYPES or not all(map(importlib.util.find_spec, _LIBRARIES)):
        return False
    sizes = [config.get(name) for name in _SIZE_KEYS]
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        return False
    layers = config.get("layer_types")
    fits = layers is None or (isinstance(layers, list) and len(layers) == config["num_hidden_layers"])
    return fits and (bool(config.get("head_dim")) or config["hidden_size"] % config["num_attention_heads"] == 0)


class PlainTokenizer:
    """A tokenizer read only from ``tokenizer.json``, with the methods that `llmrec.backends.encode.Encoder` uses.

    Args:
        folder: Its folder.
        core: The tokenizer of the library ``tokenizers``.
        special: Special tokens by role.
        extra: Further special tokens.
        template: The chat template.
    """

    def __init__(
        self, folder: str, core: Any, special: Mapping[str, str], extra: Sequence[str], template: str | None
    ) -> None:
        self.name_or_path, self.chat_template = folder, template
        self._core, self._special = core, special
        self.all_special_tokens = list(dict.fromkeys((*special.values(), *extra)))
        self.bos_token, self.unk_token = special.get("bos_token"), special.get("unk_token")
        self.eos_token = special.get("eos_token")
        self.pad_token = special.get("pad_token", self.eos_token)
        self.eos_token_id = None if self.eos_token is None else core.token_to_id(self.eos_token)

    @property
    def added_tokens_decoder(self) -> Any:
        """Added tokens by id."""
        return self._core.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens."""
        known: dict[str, int] = self._core.get_vocab()
        return known

    def add_tokens(self, tokens: Sequence[Any]) -> None:
        """Add tokens of the ``tokenizers`` library."""
        self._core.add_tokens(list(tokens))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of one or several tokens; unknown tokens get the id of the unknown token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        result = self._core.token_to_id(tokens)
        return self._core.token_to_id(self.unk_token) if result is None and self.unk_token is not None else result

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self._core.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, including special tokens."""
        text: str = self._core.decode(list(tokens), skip_special_tokens=False)
        return text

    def apply_chat_template(self, turns: Sequence[Mapping[str, str]], **options: Any) -> str:
        """Render chat messages as transformers does with ``tokenize=False``."""
        world = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        world.globals |= {
            "raise_exception": _raise_value_error,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        world.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        variables = {"messages": list(turns), "tools": None, "documents": None, **self._special, **options}
        return world.from_string(self.chat_template or "").render(variables)


def _raise_value_error(message: str) -> None:
    raise ValueError(message)


def plain_tokenizer(folder: str, section: ModelSection) -> PlainTokenizer | None:
    """Return the tokenizer of a folder if its files define it completely; None if transformers is needed."""
    path = Path(folder)
    settings, core = _read_json_object(path / "tokenizer_config.json"), None
    if settings is None or settings.get("tokenizer_class") not in _TOKENIZER_CLASSES or section.trust_remote_code:
        return None
    try:
        from tokenizers import Tokenizer

        core = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception:  # the library raises bare exceptions; transformers reports the error
        return None
    core.no_truncation()
    core.no_padding()
    named = (_read_json_object(path / "special_tokens_map.json") or {}) | settings
    special = {name: text for name in _SPECIAL_TOKEN_ROLES if (text := _token_text(named.get(name))) is not None}
    if any(core.token_to_id(text) is None for text in special.values()):
        return None
    template, file = settings.get("chat_template"), path / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8", errors="replace")
    if not (template is None or isinstance(template, str)) or "generation %}" in (template or ""):
        return None
    more = [named.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    extra = [text for item in more if isinstance(item, list) for one in item if (text := _token_text(one)) is not None]
    return PlainTokenizer(folder, core, special, extra, template)


def _token_text(value: Any) -> str | None:
    result = value.get("content") if isinstance(value, dict) else value
    return result if isinstance(result, str) else None


def _read_json_object(file: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None
