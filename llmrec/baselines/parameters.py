"""Creates baselines from the names and parameters in recipes and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec.baselines.base import LSA, validated_config
from llmrec.baselines.item_texts import STORE_PREFIX
from llmrec.data.features import FeatureStore
from llmrec.durable import MANIFEST, sha256_of
from llmrec.errors import ModelError
from llmrec.models.text_encoder import CHANCE_ENCODER, find_encoder
from llmrec.recipe.schema import Section
from llmrec.registry import BASELINES, import_component

InputHashes = dict[str, str | dict[str, str]]
"""Hashes of the inputs other than the data, by kind; for stores, one per folder."""


def baseline_config(name: str, parameters: Mapping[str, Any], where: str) -> Section:
    """Return the validated configuration of a baseline.

    Args:
        name: The name of the baseline.
        parameters: Parameters by name; missing ones have their defaults.
        where: Their key, for the error message.

    Raises:
        RecipeError: If the baseline or a parameter is unknown, or a value is out of bounds.
    """
    config_class: type[Section] = import_component(BASELINES, name, f"baseline of {where}", key=where).Config
    return validated_config(config_class, name, parameters, where)


def stops_early(name: str) -> bool:
    """Whether a baseline uses early stopping on validation users."""
    return "patience" in import_component(BASELINES, name, "baseline").Config.model_fields


def feature_store_hashes(name: str, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return the feature stores that a baseline reads, with hashes of their contents.

    Raises:
        DataError: If one of them is not a store.
    """
    folders = getattr(baseline_config(name, parameters, "parameters"), "folders", ())
    return {folder: FeatureStore.open(folder).stamp for folder in folders}


def input_hashes(name: str, parameters: Mapping[str, Any]) -> InputHashes:
    """Return hashes of the models and feature stores that a baseline reads, by kind.

    Missing or unusable ones are left out: ``fit`` raises an error for them.

    Raises:
        RecipeError: As `baseline_config`.
        DataError: As `feature_store_hashes`.
    """
    config, stores = baseline_config(name, parameters, "parameters"), feature_store_hashes(name, parameters)
    result: dict[str, str | dict[str, str] | None] = {"stores": stores}
    # Parameters of plug-ins are unknown here; their code is hashed instead.
    if type(config).__module__.startswith("llmrec."):
        values = config.model_dump(mode="json")
        start, lexicon = Path(values.get("start") or "") / MANIFEST, Path(values.get("lexicon") or "")
        result["encoder"] = weights_hash(values.get("encoder"))
        result["align"] = weights_hash((values.get("align") or {}).get("encoder"))
        result["model"] = weights_hash(values.get("model"))
        result["start"] = sha256_of(start) if start.is_file() and values.get("start") else None
        result["lexicon"] = sha256_of(lexicon) if lexicon.is_file() else None
    return {key: value for key, value in result.items() if value}


def weights_hash(name: str | None) -> str | None:
    """Return a hash of the weights of a language model or text encoder; None if they are not in a folder."""
    if not name or name in (LSA, CHANCE_ENCODER) or name.startswith(STORE_PREFIX):
        return None
    try:
        return find_encoder(name)[1]
    except ModelError:
        return None


def create_baseline(name: str, parameters: Mapping[str, Any], *, seed: int, where: str = "parameters") -> Any:
    """Return an unfitted baseline with these parameters.

    Raises:
        RecipeError: As `baseline_config`.
    """
    return import_component(BASELINES, name, "baseline")(baseline_config(name, parameters, where), seed=seed)
