"""Computes text vectors with a pretrained text encoder, such as all-MiniLM-L6-v2."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.data.hashing import digest_frame, hash64
from llmrec.durable import Json, read_json, replace_atomically
from llmrec.errors import DataError, ModelError, require
from llmrec.machine import cpu_has_bf16, gpu_has_bf16, has_cuda
from llmrec.models.batching import group_by_length
from llmrec.models.load import POOLING_FILE, model_folder_hash, resolve_model_folder, silence_libraries
from llmrec.models.tensors import load_checked
from llmrec.progress import Progress
from llmrec.recipe.schema import ModelSection
from llmrec.resources import cache_dir

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset


BATCH_TOKENS = 4096
"""Tokens per batch, including padding."""
DTYPE = "float32"
"""The dtype of weights and embeddings."""

# Fewer texts do not need a progress bar.
_PROGRESS_MINIMUM = 2000


def find_encoder(name: str) -> tuple[str, str]:
    """Return the folder of a text encoder, and a hash over its weights and tokenizer.

    Raises:
        ModelError: If there is no encoder of this name.
    """
    folder = resolve_model_folder(ModelSection(name=name)) if Path(name).is_dir() else _resolve_named_encoder(name)
    return folder, model_folder_hash(folder)


@lru_cache(maxsize=16)
def _resolve_named_encoder(name: str) -> str:
    """Return the folder of a named model, cached per process."""
    return resolve_model_folder(ModelSection(name=name))


@dataclass(frozen=True)
class LoadedEncoder:
    """A text encoder in memory.

    Attributes:
        model: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        limit: The maximum number of tokens of a text.
        first: Whether a text's vector is the first token's state instead of the mean.
    """

    model: Any
    tokenizer: Any
    limit: int
    first: bool

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, truncated to the maximum length of the encoder."""
        result = self.tokenizer(list(texts), truncation=True, max_length=self.limit)["input_ids"]
        return [list(ids) for ids in result]

    def spans(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Return the truncated tokens of each text with their character spans, which are empty for special tokens."""
        result = self.tokenizer(list(texts), truncation=True, max_length=most, return_offsets_mapping=True)
        offsets = [[(int(start), int(end)) for start, end in item] for item in result["offset_mapping"]]
        return [list(ids) for ids in result["input_ids"]], offsets

    def padded(self, encoded: Sequence[Sequence[int]]) -> Any:
        """Return texts as padded model inputs."""
        return self.tokenizer.pad({"input_ids": encoded}, return_tensors="pt").to(self.model.device)

    def pooled(self, states: torch.Tensor, mask: torch.Tensor) -> Any:
        """Pool the last hidden states: shape (n, tokens, d) -> (n, d)."""
        if self.first:
            return states[:, 0]
        weights = mask[:, :, None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one normalised vector for each text, shape (n, d)."""
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for rows, states, mask in iterate_states(self, self.tokens(texts)):
            vectors[rows] = self.pooled(states, mask).cpu().numpy()
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)
        return unit


def load_text_encoder(folder: str) -> LoadedEncoder:
    """Load a text encoder.

    Last hidden states are pooled as set in the folder's ``1_Pooling/config.json`` (Reimers and Gurevych, EMNLP 2019):
    the first token's, or the mean over all tokens, which is also the default without that file.

    Raises:
        ModelError: If the folder has no encoder that transformers can load, or its weights do not match its
            configuration.
    """
    torch, transformers = require("torch", "train"), require("transformers", "train")
    silence_libraries()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        # Pooling is done here; the encoder's own pooler, which many folders lack, is not used.
        auto, unread = transformers.AutoModel, ("pooler",)
        model = load_checked(auto, folder, unread=unread, use_safetensors=True, dtype=torch.float32).eval()
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        # A damaged folder can cause any exception; see `llmrec.models.load`.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"the text encoder in {folder} cannot be loaded: {reason}; set index.semantic.encoder "
            "to a folder or hub model saved with save_pretrained (safetensors)",
            kind="damaged",
            at=folder,
            column="index.semantic.encoder",
        ) from error
    model.to("cuda" if has_cuda() else "cpu")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    first = bool(_read_settings(folder, POOLING_FILE).get("pooling_mode_cls_token"))
    return LoadedEncoder(model, tokenizer, _max_text_tokens(folder, model), first)


def encode_texts(folder: str, texts: Sequence[str]) -> NDArray[np.float32]:
    """Load a text encoder, and return one normalised vector for each text, shape (n, d).

    Raises:
        ModelError: See `load_text_encoder`.
    """
    return load_text_encoder(folder).vectors(texts)


def iterate_states(encoder: LoadedEncoder, encoded: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Any, Any]]:
    """Yield batches of texts: indices, last hidden states (n, tokens, d), and mask (n, tokens)."""
    torch = require("torch", "train")
    with Progress("encoding", len(encoded), unit="texts", quiet=len(encoded) < _PROGRESS_MINIMUM) as bar:
        for rows in group_by_length([len(ids) for ids in encoded], BATCH_TOKENS, longest_first=True):
            batch = encoder.padded([encoded[row] for row in rows])
            with torch.no_grad():
                states = encoder.model(**batch).last_hidden_state
            yield rows, states, batch["attention_mask"]
            bar.advance(len(rows))


def _max_text_tokens(folder: str, model: torch.nn.Module) -> int:
    text = _read_settings(folder, "sentence_bert_config.json").get("max_seq_length")
    if isinstance(text, int) and text:
        return text
    return int(min(512, getattr(model.config, "max_position_embeddings", 512)))


def _read_settings(folder: str, name: str) -> dict[str, Json]:
    file = Path(folder) / name
    try:
        result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} cannot be read ({error}); download the encoder again", kind="damaged", at=file
        ) from error
    return result if isinstance(result, dict) else {}


# Text encoders by name, with vectors cached on disk.


log = logging.getLogger(__name__)

CHANCE_ENCODER = "chance"
"""An encoder without information: the baseline for the contribution of text to codes."""
TUNING_RECORD_FILE = "llmrec-encoder.json"
"""The file in a fine-tuned encoder's folder that records its training data."""


def text_embedder(name: str) -> Embedder:
    """Return the embedder for a named text encoder."""
    if name == CHANCE_ENCODER:
        return Embedder(CHANCE_ENCODER, CHANCE_ENCODER)
    return Embedder(*find_encoder(name))


def text_embedder_for_split(name: str, data: SplitDataset) -> Embedder:
    """Return the embedder for a split, after `check_encoder_split`."""
    check_encoder_split(name, data)
    return text_embedder(name)


def check_encoder_split(name: str, data: SplitDataset) -> None:
    """Check that an encoder was not trained on held-out interactions.

    Raises:
        DataError: If the encoder was fine-tuned on other training interactions, which may include held-out ones.
    """
    learned = encoder_training_hash(name)
    if learned is not None and learned != digest_frame(data.train):
        raise DataError(
            f"the text encoder {name} was fine-tuned on other interactions than the training split of "
            f"{data.dataset.name}, which may include held-out interactions; fine-tune it again with `llmrec "
            "tune-encoder` and this recipe, or use the encoder without fine-tuning",
            kind="leak",
            at=name,
            column="encoder",
        )


def encoder_training_hash(name: str) -> str | None:
    """Return a hash of the interactions on which an encoder was fine-tuned; None if llmrec did not fine-tune it."""
    # A feature store is not an encoder; it records from which interactions its texts were generated.
    if name == CHANCE_ENCODER or name.startswith("store:"):
        return None
    record = read_tuning_record(Path(find_encoder(name)[0]))
    return str(record["train"]) if record else None


def read_tuning_record(folder: Path) -> dict[str, Any]:
    """Return the record of the training data of an encoder that llmrec fine-tuned; empty for other folders.

    Raises:
        DataError: If the file is damaged.
    """
    file = folder / TUNING_RECORD_FILE
    if not file.is_file():
        return {}
    fix = "delete the folder, and fine-tune the encoder again with `llmrec tune-encoder`"
    record = read_json(file, fix)
    if "train" not in record:
        raise DataError.at(file, "damaged", f" has no key 'train'; {fix}")
    return record


class Embedder:
    """Computes text vectors and caches them on disk."""

    def __init__(self, folder: str, stamp: str) -> None:
        """Prepare to encode texts; the stamp is a hash over the encoder's weights and tokenizer."""
        self.stamp = stamp
        self._folder = folder

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one normalised vector for each text, shape (n, d)."""
        if self._folder == CHANCE_ENCODER:
            return _random_vectors(texts)
        # sorted and distinct, so that each text of a catalogue is encoded once
        distinct = sorted(set(texts))
        rows = {text: row for row, text in enumerate(distinct)}
        return self._read(distinct)[[rows[text] for text in texts]]

    def _read(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector for each text, from the cache or the encoder."""
        tensors = require("safetensors.numpy", "train")
        digest = hashlib.sha256("\0".join([*self.record.values(), *texts]).encode()).hexdigest()[:32]
        file = cache_dir() / "vectors" / f"{digest}.safetensors"
        if file.is_file():
            try:
                result: NDArray[np.float32] = tensors.load_file(file)["vectors"]
                return result
            except Exception as error:
                log.warning("%s cannot be read (%s); computing the embeddings again", file, error)
        vectors = self._encoder.vectors(texts)
        with replace_atomically(file) as draft:
            tensors.save_file({"vectors": vectors}, draft, metadata=self.record)
        return vectors

    @cached_property
    def _encoder(self) -> LoadedEncoder:
        return load_text_encoder(self._folder)

    @property
    def record(self) -> dict[str, str]:
        """The cache key: hash of weights and tokenizer, precision, and batch size in tokens."""
        return {"stamp": self.stamp, "dtype": DTYPE, "batch_tokens": str(BATCH_TOKENS)}


def _random_vectors(texts: Sequence[str]) -> NDArray[np.float32]:
    """Return a pseudorandom direction for each text, derived from its hash, shape (n, 64)."""
    hashed = hash64("chance", 0, texts)
    rows = np.stack([np.random.default_rng(int(seed)).standard_normal(64) for seed in hashed])
    result: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return result


# Fine-tuning of the last blocks of a text encoder; hidden states below them are computed once.


# Files of sentence-transformers in addition to the model: modules, pooling, maximum length.
_EXTRA_FILES = (
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


class TunedEncoder:
    """Vectors of fixed texts by a text encoder whose last blocks are trainable.

    The blocks below are frozen, so their output for each text is computed once and stored: 2 bytes times hidden size
    times tokens. Vectors have length 1.

    Attributes:
        blocks: The trainable blocks, a torch module.
    """

    def __init__(self, folder: str, texts: Sequence[str], *, blocks: int) -> None:
        """Tokenise the texts and compute the input of the trainable blocks, at least one.

        Raises:
            ModelError: If it cannot be loaded or has fewer blocks.
        """
        self._torch = require("torch", "train")
        self._folder = Path(folder)
        self._encoder = load_text_encoder(folder)
        model = self._encoder.model.requires_grad_(False)
        if model.device.type == "cpu":
            # For short texts, the backward pass of the fused kernel is slower than plain matrix products.
            model.set_attn_implementation("eager")
        holder, name, layers = _find_blocks(model, folder)
        if not 1 <= blocks <= len(layers):
            raise ModelError(
                f"the text encoder in {folder} has only {len(layers)} blocks, so its last {blocks} blocks cannot be "
                "fine-tuned",
                kind="bad-value",
                at=folder,
            )
        self.blocks = self._torch.nn.ModuleList(layers[-blocks:]).requires_grad_(True).eval()
        self._tokens = self._encoder.tokens(texts)
        self._states = self._block_inputs()
        self._input: Any = None
        # Replaces all lower blocks by one that returns their stored output and has the attributes of the first one.
        recall, as_tuple = copy.copy(layers[0]), self._has_tuple_output(layers[-1])
        recall.forward = lambda *args, **kwargs: (self._input,) if as_tuple else self._input
        self._original = holder, name, layers
        self._put([recall, *self.blocks])

    def __call__(self, rows: Sequence[int]) -> Any:
        """Return the vectors of some texts, with gradients if enabled, shape (n, d)."""
        torch, encoder = self._torch, self._encoder
        batch = encoder.padded([self._tokens[row] for row in rows])
        kept = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(self._states[row]).float() for row in rows], batch_first=True
        )
        self._input = kept.to(encoder.model.device)
        device = encoder.model.device.type
        native = gpu_has_bf16() if device == "cuda" else cpu_has_bf16()
        with torch.autocast(device, torch.bfloat16, enabled=native):
            states = encoder.model(**batch).last_hidden_state
        return torch.nn.functional.normalize(encoder.pooled(states.float(), batch["attention_mask"]), dim=1)

    def length(self, row: int) -> int:
        """Return the number of tokens of a text."""
        return len(self._tokens[row])

    def _batches(self) -> list[list[int]]:
        return group_by_length([len(ids) for ids in self._tokens], BATCH_TOKENS, longest_first=True)

    def every(self) -> Any:
        """Return the vectors of all texts with the current weights, without gradients, shape (texts, d)."""
        torch = self._torch
        training = self.blocks.training
        self.blocks.eval()
        result = torch.zeros(len(self._tokens), self._encoder.model.config.hidden_size)
        with torch.no_grad():
            for rows in self._batches():
                result[torch.tensor(rows)] = self(rows).cpu()
        self.blocks.train(training)
        return result

    def save(self, folder: Path) -> None:
        """Save weights, tokenizer and pooling in the encoder's original format; it cannot be trained afterwards."""
        self._put(self._original[2])
        self._encoder.model.save_pretrained(folder)
        self._encoder.tokenizer.save_pretrained(folder)
        for name in _EXTRA_FILES:
            if (self._folder / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._folder / name, folder / name)

    def _put(self, blocks: Sequence[Any]) -> None:
        """Put blocks into the model; decoders stop at the number in the configuration and cache as many."""
        holder, name, layers = self._original
        setattr(holder, name, self._torch.nn.ModuleList(blocks))
        self._encoder.model.config.num_hidden_layers = max(len(layers), len(blocks))

    def _has_tuple_output(self, block: torch.nn.Module) -> bool:
        """Test whether blocks return a tuple, as those of MPNet do, or their output alone, as those of BERT do."""
        results: list[bool] = []
        hook = block.register_forward_hook(lambda _, __, output: results.append(isinstance(output, tuple)))
        with self._torch.inference_mode():
            self._encoder.model(**self._encoder.padded(self._tokens[:1]))
        hook.remove()
        return results[0]

    def _block_inputs(self) -> list[NDArray[np.float16]]:
        """Return the input of the first trainable block for each text, shape (tokens, d) each."""
        torch, encoder = self._torch, self._encoder
        result: list[Any] = [None] * len(self._tokens)
        caught: list[Any] = []

        def catch(_: Any, args: tuple[Any, ...], kwargs: Any) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _StopForward

        hook = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        with torch.inference_mode():
            for rows in self._batches():
                try:
                    encoder.model(**encoder.padded([self._tokens[row] for row in rows]))
                except _StopForward:
                    (states,) = caught
                    caught.clear()
                for index, row in enumerate(rows):
                    result[row] = states[index, : len(self._tokens[row])].half().cpu().numpy()
        hook.remove()
        return result


class _StopForward(Exception):
    """Raised to stop a forward pass whose remaining layers are not needed."""


def _find_blocks(model: torch.nn.Module, folder: str) -> tuple[Any, str, list[Any]]:
    """Return the parent module of an encoder's blocks, their attribute name, and the blocks.

    Raises:
        ModelError: If no module list has as many modules as the configuration has blocks.
    """
    torch = require("torch", "train")
    count = getattr(model.config, "num_hidden_layers", None)
    for holder in model.modules():
        for name, part in holder.named_children():
            if isinstance(part, torch.nn.ModuleList) and len(part) == count:
                return holder, name, list(part)
    raise ModelError(
        f"the text encoder in {folder} ({type(model).__name__}) does not have a list of {count} blocks that can be "
        "fine-tuned; choose a BERT, an MPNet or a decoder",
        kind="unsupported",
        at=folder,
    )
