"""Weights of UniSRec that go from one domain to another: a folder with a card, sealed when it is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmrec.baselines.neural import put_back, weights_of
from llmrec.baselines.unisrec.network import Universal
from llmrec.data.hashing import digest_frame
from llmrec.durable import read_json, replacing, seal, verifies, write_json
from llmrec.errors import DataError, ModelError, RecipeError, require
from llmrec.models.text_encoder import find_encoder

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset

WEIGHTS, CARD = "unisrec.safetensors", "unisrec.json"

# What weights of another domain must agree in.
_SHAPE = ("dim", "layers", "heads", "experts", "max_len")
# Vectors of single items, which mean nothing elsewhere.
_OWN = "network.table."


def save(model: Universal, folder: Path, data: SplitDataset) -> None:
    """Write the weights, less the vectors of single items; errors as `UniSRec.save` raises them."""
    config = model.config
    if not config.named:
        raise RecipeError(
            f"unisrec: {config.encoder} makes other vectors of every data set, so that its weights are of no use in "
            "another one; name a text encoder",
            kind="unsupported",
            column="encoder",
        )
    arrays = {name: array for name, array in weights_of(model.network).items() if not name.startswith(_OWN)}
    told = {
        "format": 1,
        **{key: getattr(config, key) for key in _SHAPE},
        "width": model.vectors.shape[1],
        "encoder": config.encoder,
        "stamp": find_encoder(config.encoder)[1],
        "data": data.dataset.name,
        "fingerprint": data.dataset.fingerprint,
        "train": digest_frame(data.train),
        "parameters": config.model_dump(mode="json"),
    }
    with replacing(folder) as draft:
        draft.mkdir()
        require("safetensors.numpy", "train").save_file(arrays, draft / WEIGHTS)
        write_json(draft / CARD, told)
        seal(draft)


def load(model: Universal, folder: str, data: SplitDataset) -> None:
    """Put the weights of another domain into a network.

    Raises:
        ModelError: If the folder does not hold them as they were written, or they are of another shape or encoder.
        DataError: If they were learned from these data under another split.
    """
    path, fix = Path(folder), "write it anew with UniSRec.save"
    if not verifies(path):
        raise ModelError(
            f"start: {folder} holds no weights of unisrec as they were written; {fix}", kind="damaged", at=path
        )
    told = read_json(path / CARD, fix)
    config = model.config
    wanted = {key: getattr(config, key) for key in _SHAPE}
    wanted |= {"width": model.vectors.shape[1], "stamp": find_encoder(config.encoder)[1]}
    for key, value in wanted.items():
        if told.get(key) != value:
            raise ModelError(
                f"start: {folder} was learned with {key}={told.get(key)!r}, and here it is {value!r}; "
                "give both the same parameters and encoder",
                kind="mismatch",
                at=path,
                column=key,
            )
    same = told.get("data") == data.dataset.name or told.get("fingerprint") == data.dataset.fingerprint
    if same and told.get("train") != digest_frame(data.train):
        raise DataError(
            f"start: {folder} was learned from {data.dataset.name} under another split, and may know what is held out "
            "here; learn it anew from the training part of this one",
            kind="leak",
            at=folder,
            column="start",
        )
    arrays = require("safetensors.numpy", "train").load_file(path / WEIGHTS)
    own = {name: array for name, array in weights_of(model.network).items() if name.startswith(_OWN)}
    put_back(model.network, {**arrays, **own})
