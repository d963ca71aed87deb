"""The string that says how a metric was taken, so that figures of different protocols never share a table.

Example: ``NDCG@10|gain:binary|ties:expected|cand:full|seen:excluded|split:loo/test|llmrec:0.1.0``.
The order of the parts is fixed; parts that do not bear on a metric are left out, so ratings have neither ties nor
candidates, and text metrics say how words were cut. ``users`` and ``slice`` stand where a figure is over some cases
only, or says over how many; ``how`` holds what else a metric has to say, such as the bins of a calibration error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["ranking", "lists", "rating", "probability", "text"]

_CUT = r"@[1-9]\d*"
_NAMES: Mapping[Kind, re.Pattern[str]] = {
    "ranking": re.compile(rf"(HR|Recall|Precision|NDCG){_CUT}|(MRR|MAP)({_CUT})?|RankAUC"),
    "lists": re.compile(rf"(Coverage|Novelty|Gini|PopularityLift|Exposure|ColdItems|ILD|Serendipity){_CUT}"),
    "rating": re.compile(r"RMSE|MAE|LikedAUC"),
    "probability": re.compile(r"AUC|GAUC|LogLoss|ECE"),
    "text": re.compile(r"(BLEU|ROUGE|Distinct)-(\d+|L)|FMR|FCR|DIV|USR|Hallucination|CopyRate"),
}
_TEXT: Mapping[str, str] = {
    "BLEU": "sacrebleu-13a-exp",
    "ROUGE": "rouge-score-nostem",
    "Distinct": "words-lower",
    **dict.fromkeys(("FMR", "FCR", "DIV", "USR", "Hallucination", "CopyRate"), "words-lower"),
}
_KEYS = ("gain", "ties", "cand", "seen", "users", "slice", "text", "how", "split", "llmrec")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The parts of a signature, in their order; None where a part does not bear on the metric."""

    metric: str
    gain: str | None = None
    ties: str | None = None
    candidates: str | None = None
    seen: str | None = None
    users: str | None = None
    slice: str | None = None
    text: str | None = None
    how: str | None = None
    split: str
    version: str

    def __str__(self) -> str:
        parts = [self.metric, *(f"{key}:{value}" for key, value in self._parts().items() if value is not None)]
        return "|".join(parts)

    def _parts(self) -> dict[str, str | None]:
        values = (
            *(self.gain, self.ties, self.candidates, self.seen, self.users, self.slice),
            *(self.text, self.how, self.split, self.version),
        )
        return dict(zip(_KEYS, values, strict=True))


def kind_of(metric: str) -> Kind | None:
    """Return what kind of metric a name stands for; None for an unknown one."""
    return next((kind for kind, names in _NAMES.items() if names.fullmatch(metric)), None)


def signature(
    metric: str,
    *,
    gain: str = "binary",
    ties: str = "expected",
    candidates: str | None = None,
    seen: str | None = None,
    users: str | None = None,
    slice: str | None = None,
    how: str | None = None,
    split: str,
    version: str,
) -> str:
    """Write the signature of a metric.

    Args:
        metric: ``HR@k``, ``Recall@k``, ``Precision@k``, ``NDCG@k``, ``MRR``, ``MAP`` (or cut, ``MRR@k``),
            ``RankAUC``; of lists ``Coverage@k``, ``Novelty@k``, ``Gini@k``, ``PopularityLift@k``, ``Exposure@k``,
            ``ColdItems@k``, ``ILD@k``, ``Serendipity@k``; ``RMSE``, ``MAE``, ``LikedAUC``; ``AUC``, ``GAUC``,
            ``LogLoss``, ``ECE``; ``BLEU-4``, ``ROUGE-1``, ``ROUGE-L``, ``Distinct-2``, ``FMR``, ``FCR``, ``DIV``,
            ``USR``, ``Hallucination``, ``CopyRate``.
        gain: Gain of the relevant item; only ranking metrics have one.
        ties: How tied scores are treated by ranking metrics. Lists show one draw of the tied items: ``seeded``.
        candidates: ``full``, or kind and number such as ``uniform-20``; needed by metrics of rankings and lists.
        seen: ``excluded`` or ``included``: whether items of the history can be ranked; needed by the same metrics.
        users: Which or how many users were evaluated; None leaves it unsaid.
        slice: Which cases the figure is over; None for all.
        how: What else sets figures of this metric apart, such as ``jaccard-genres``.
        split: Kind of the split.
        version: Version of llmrec.

    Raises:
        ValueError: If the metric is unknown, one of rankings or lists lacks candidates or seen, or a part holds ``|``
            or white space.
    """
    kind = kind_of(metric)
    if kind is None:
        raise ValueError(f"unknown metric {metric!r}")
    common = Signature(
        metric=metric,
        users=_part_or_none(users),
        slice=_part_or_none(slice),
        text=_TEXT[metric.split("-")[0]] if kind == "text" else None,
        how=_part_or_none(how),
        split=_part(split),
        version=_part(version),
    )
    if kind not in ("ranking", "lists"):
        return str(common)
    if candidates is None or seen is None:
        raise ValueError(f"{metric} needs candidates and seen in its signature")
    common = replace(common, candidates=_part(candidates), seen=_part(seen))
    if kind == "lists":
        return str(replace(common, ties="seeded"))
    return str(replace(common, gain=_part(gain), ties=_part(ties)))


def parse_signature(text: str) -> Signature:
    """Read a signature back; ``str(parse_signature(text)) == text``.

    Raises:
        ValueError: If a part is unknown, empty, missing or out of order.
    """
    metric, *rest = text.split("|")
    parts = {key: value for key, _, value in (part.partition(":") for part in rest)}
    order = [key for key in _KEYS if key in parts]
    wrong = not metric or not {"split", "llmrec"} <= parts.keys() or not all(parts.values())
    if wrong or list(parts) != order or len(parts) != len(rest):
        raise ValueError(f"not a metric signature: {text!r}; expected METRIC|{'|'.join(f'{key}:...' for key in _KEYS)}")
    return Signature(
        metric=metric,
        gain=parts.get("gain"),
        ties=parts.get("ties"),
        candidates=parts.get("cand"),
        seen=parts.get("seen"),
        users=parts.get("users"),
        slice=parts.get("slice"),
        text=parts.get("text"),
        how=parts.get("how"),
        split=parts["split"],
        version=parts["llmrec"],
    )


def _part_or_none(value: str | None) -> str | None:
    return None if value is None else _part(value)


def _part(value: str) -> str:
    if not value or re.search(r"[|\s]", value):
        raise ValueError(f"a part of a signature must be one word without '|', not {value!r}")
    return value
