"""A baseline from its name and its parameters, as recipes and suites write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llmrec.data.features import FeatureStore
from llmrec.errors import ErrorKind, RecipeError, did_you_mean
from llmrec.recipe.schema import Section
from llmrec.registry import BASELINES, lookup


def config_of(name: str, parameters: Mapping[str, Any], where: str) -> Section:
    """Check a baseline's parameters.

    Args:
        name: Of the baseline.
        parameters: By name; those left out have their defaults.
        where: The key that holds them, for the message.

    Raises:
        RecipeError: If there is no such baseline or parameter, or a value is out of bounds.
    """
    made: type[Section] = lookup(BASELINES, name, f"baseline of {where}", key=where).Config
    known = list(made.model_fields)
    try:
        return made.model_validate(parameters)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            message = str(detail["msg"]).removeprefix("Value error, ")
            if detail["type"] == "extra_forbidden":
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                problems.append(f"{name!r} has no parameter {key!r}{did_you_mean(key, known)}; {takes}")
            elif key:
                problems.append(f"{key} of {name!r}: {message[:1].lower()}{message[1:]}, got {detail['input']!r}")
            else:
                problems.append(f"{name!r}: {message}")
        unknown = error.errors()[0]["type"] == "extra_forbidden"
        kind: ErrorKind = "unknown-key" if unknown else "bad-value"
        raise RecipeError(f"{where}: {'; '.join(problems)}", kind=kind, column=where.rpartition(": ")[2]) from None


def stops_early(name: str) -> bool:
    """Whether a baseline looks at validation figures to know when to stop."""
    return "patience" in lookup(BASELINES, name, "baseline").Config.model_fields


def stores_of(name: str, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return the stores of features that a baseline reads, with hashes over what is in them.

    Raises:
        DataError: If one of them is no store.
    """
    folders = getattr(config_of(name, parameters, "parameters"), "folders", ())
    return {folder: FeatureStore.open(folder).stamp for folder in folders}


def make(name: str, parameters: Mapping[str, Any], *, seed: int, where: str = "parameters") -> Any:
    """Return a baseline with these parameters, not yet fitted.

    Raises:
        RecipeError: As `config_of`.
    """
    return lookup(BASELINES, name, "baseline")(config_of(name, parameters, where), seed=seed)
