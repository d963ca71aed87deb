"""Transfers network weights between data sets: a folder with a model card and checksums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.baselines.item_texts import TextsConfig
from llmrec.baselines.neural import load_network_state, network_state
from llmrec.data.hashing import digest_frame
from llmrec.durable import Json, matches_manifest, read_json, replace_atomically, write_json, write_manifest
from llmrec.errors import DataError, ModelError, require
from llmrec.models.text_encoder import find_encoder

if TYPE_CHECKING:
    from llmrec.data.split import SplitDataset


@dataclass(frozen=True)
class TransferableNetwork:
    """A network without user and item embeddings, whose weights can be used on another data set.

    Attributes:
        name: The name of the baseline, and of both files.
        network: A torch module.
        shape: Properties that must be equal to load the weights.
        domain_key: Substring in the names of weights that are specific to a domain.
        config: The parameters.
    """

    name: str
    network: Any
    shape: Mapping[str, Json]
    domain_key: str
    config: TextsConfig

    def save(self, folder: Path, data: SplitDataset) -> None:
        """Save the transferable weights.

        Args:
            folder: The folder, which is replaced.
            data: The training data.
        """
        fields = {
            "format": 1,
            **self.shape,
            "encoder": self.config.encoder,
            "stamp": find_encoder(self.config.encoder)[1],
            "data": data.dataset.name,
            "fingerprint": data.dataset.fingerprint,
            "train": digest_frame(data.train),
            "parameters": self.config.model_dump(mode="json"),
        }
        with replace_atomically(folder) as draft:
            draft.mkdir()
            arrays = {item: array for item, array in network_state(self.network).items() if self.domain_key not in item}
            require("safetensors.numpy", "train").save_file(arrays, draft / f"{self.name}.safetensors")
            write_json(draft / f"{self.name}.json", fields)
            write_manifest(draft)

    def load(self, folder: str, data: SplitDataset) -> None:
        """Load weights that `save` wrote on another data set.

        Raises:
            ModelError: If the folder is incomplete or damaged, or the weights are of another shape or encoder.
            DataError: If they were learned from these data under another split.
        """
        path, hint = Path(folder), f"save the weights again with the method save of a fitted {self.name}"
        if not matches_manifest(path):
            raise ModelError(
                f"start: the weights of {self.name} in {folder} are missing or damaged; {hint}", kind="damaged", at=path
            )
        card = read_json(path / f"{self.name}.json", hint)
        for key, value in {**self.shape, "stamp": find_encoder(self.config.encoder)[1]}.items():
            if card.get(key) != value:
                raise ModelError(
                    f"start: {folder} was trained with {key}={card.get(key)!r}, but {key} is {value!r}; use the "
                    "same parameters and encoder for both",
                    kind="mismatch",
                    at=path,
                    column=key,
                )
        same = card.get("data") == data.dataset.name or card.get("fingerprint") == data.dataset.fingerprint
        if same and card.get("train") != digest_frame(data.train):
            raise DataError(
                f"start: {folder} was trained on another split of {data.dataset.name}, which may include interactions "
                "that are held out here; train the weights again on the training interactions of this split",
                kind="leak",
                at=folder,
                column="start",
            )
        arrays = require("safetensors.numpy", "train").load_file(path / f"{self.name}.safetensors")
        kept = {item: array for item, array in network_state(self.network).items() if self.domain_key in item}
        load_network_state(self.network, {**arrays, **kept})
