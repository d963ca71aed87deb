"""What a key may be: ``KEY=1e-4..1e-3``, a range, or ``KEY=8,16,32``, a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from llmrec.durable import Json
from llmrec.errors import RecipeError
from llmrec.recipe.pages import flow, value_of

if TYPE_CHECKING:
    import optuna

# A range whose ends differ by this factor is searched on a log scale.
_DECADE = 10


@dataclass(frozen=True)
class Space:
    """A key and its values.

    Attributes:
        key: Dotted, as overrides write it.
        values: Those of a list; empty for a range.
        low: The lower end of a range, whole where both ends are.
        high: The upper end.
    """

    key: str
    values: tuple[Json, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def start(self) -> Json:
        """A value, to check the key by."""
        return self.values[0] if self.values else self.low

    @property
    def log(self) -> bool:
        """Whether a range is searched on a log scale."""
        return self.low > 0 and self.high / self.low >= _DECADE

    def suggest(self, trial: optuna.Trial) -> Json:
        """Ask for a value."""
        if self.values:
            return self.value(trial.suggest_categorical(self.key, [flow(value) for value in self.values]))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.key, self.low, self.high, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def parameter(self, value: Json) -> Json | None:
        """Return a value as trials hold it, None where it is not one of this space."""
        if self.values:
            # Texts, since Optuna takes no lists and tells 1 from True by neither value nor hash.
            return flow(value) if value in self.values else None
        able = isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        return value if able else None

    def value(self, parameter: Json) -> Json:
        """Return what a trial holds as a value of the key."""
        found: Json = value_of(str(parameter), self.key) if self.values else parameter
        return found


def spaces(texts: Sequence[str]) -> tuple[Space, ...]:
    """Read what ``--over`` says.

    Raises:
        RecipeError: If one is not of the form, or a key stands twice.
    """
    found = tuple(map(_space, texts))
    if not found:
        raise RecipeError(
            "nothing to search: name a key and its values, such as --over train.learning_rate=1e-4..1e-3",
            kind="missing-key",
            column="--over",
        )
    keys = [space.key for space in found]
    if len(set(keys)) < len(keys):
        raise RecipeError(f"--over: a key stands twice in {', '.join(keys)}", kind="duplicate", column="--over")
    return found


def grid(found: Sequence[Space]) -> list[dict[str, Json]] | None:
    """Return every point where all spaces are lists, else None."""
    if any(not space.values for space in found):
        return None
    return [
        dict(zip((space.key for space in found), point, strict=True))
        for point in product(*(space.values for space in found))
    ]


def _space(text: str) -> Space:
    key, sign, values = text.partition("=")
    key, values = key.strip(), values.strip()
    if not sign or not key or not values:
        raise _refused(text)
    low, dots, high = values.partition("..")
    if dots:
        ends = _number(low, key), _number(high, key)
        if ends[0] is None or ends[1] is None or not ends[0] < ends[1]:
            raise _refused(text)
        if isinstance(ends[0], int) and isinstance(ends[1], int):
            return Space(key, (), ends[0], ends[1])
        return Space(key, (), float(ends[0]), float(ends[1]))
    listed = value_of(f"[{values}]", key)
    if not isinstance(listed, list) or not listed or any(isinstance(value, dict) for value in listed):
        raise _refused(text)
    return Space(key, tuple(dict.fromkeys(map(_number_or, listed))) if _flat(listed) else tuple(listed))


def _flat(values: Sequence[Json]) -> bool:
    return not any(isinstance(value, list) for value in values)


def _number(text: str, key: str) -> int | float | None:
    found = _number_or(value_of(text, key))
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def _number_or(value: Json) -> Json:
    """Return a number that YAML takes for a text, such as 1e-4, as a number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _refused(text: str) -> RecipeError:
    return RecipeError(
        f"--over {text!r} is not of the form KEY=LOW..HIGH or KEY=A,B,C, such as train.learning_rate=1e-4..1e-3",
        kind="bad-value",
        column="--over",
    )
