"""The string that says how a metric was taken, so that figures of different protocols never share a table.

Example: ``NDCG@10|gain:binary|ties:expected|cand:uniform-20|seen:excluded|split:leave_one_out|llmrec:0.1.0``.
The order of the parts is fixed; parts that do not bear on a metric are left out, so ratings have neither ties nor
candidates, and text metrics say how words were cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

_RANKING = re.compile(r"(HR|NDCG)@[1-9]\d*|MRR(@[1-9]\d*)?")
_RATING = re.compile(r"RMSE|MAE")
_TEXT: Mapping[str, str] = {
    "BLEU": "sacrebleu-13a-exp",
    "ROUGE": "rouge-score-nostem",
    "Distinct": "words-lower",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The parts of a signature, in their order; None where a part does not bear on the metric."""

    metric: str
    gain: str | None = None
    ties: str | None = None
    candidates: str | None = None
    seen: str | None = None
    text: str | None = None
    split: str
    version: str

    def __str__(self) -> str:
        parts = [self.metric, *(f"{key}:{value}" for key, value in self._parts().items() if value is not None)]
        return "|".join(parts)

    def _parts(self) -> dict[str, str | None]:
        return {
            "gain": self.gain,
            "ties": self.ties,
            "cand": self.candidates,
            "seen": self.seen,
            "text": self.text,
            "split": self.split,
            "llmrec": self.version,
        }


_KEYS = ("gain", "ties", "cand", "seen", "text", "split", "llmrec")


def signature(
    metric: str,
    *,
    gain: str = "binary",
    ties: str = "expected",
    candidates: str | None = None,
    seen: str | None = None,
    split: str,
    version: str,
) -> str:
    """Write the signature of a metric.

    Args:
        metric: ``HR@k``, ``NDCG@k``, ``MRR`` (or ``MRR@k``), ``RMSE``, ``MAE``, ``BLEU-4``, ``ROUGE-1``, ``ROUGE-L``
            or ``Distinct-2``.
        gain: Gain of the relevant item.
        ties: How tied scores are treated.
        candidates: ``full``, or kind and number such as ``uniform-20``; needed by ranking metrics.
        seen: ``excluded`` or ``included``: whether items of the history can be ranked; needed by ranking metrics.
        split: Kind of the split.
        version: Version of llmrec.

    Raises:
        ValueError: If the metric is unknown, a ranking metric lacks candidates or seen, or a part holds ``|`` or
            white space.
    """
    common = Signature(metric=metric, split=_part(split), version=_part(version))
    if _RANKING.fullmatch(metric):
        if candidates is None or seen is None:
            raise ValueError(f"{metric} needs candidates and seen in its signature")
        parts = replace(common, gain=_part(gain), ties=_part(ties), candidates=_part(candidates), seen=_part(seen))
        return str(parts)
    if _RATING.fullmatch(metric):
        return str(common)
    family = metric.split("-")[0]
    if family in _TEXT and re.fullmatch(r"[A-Za-z]+-(\d+|L)", metric):
        return str(replace(common, text=_TEXT[family]))
    raise ValueError(f"unknown metric {metric!r}")


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
        text=parts.get("text"),
        split=parts["split"],
        version=parts["llmrec"],
    )


def same_protocol(a: str, b: str) -> bool:
    """Say whether two figures may stand in one table.

    Figures of one metric must agree in every part. Figures of different metrics must agree in all but how words
    are cut, which differs between BLEU and ROUGE by nature.

    Raises:
        ValueError: If one of them is not a signature.
    """
    left, right = parse_signature(a), parse_signature(b)
    if left.metric == right.metric:
        return left == right
    return replace(left, metric="", text=None) == replace(right, metric="", text=None) and (
        (left.text is None) == (right.text is None)
    )


def _part(value: str) -> str:
    if not value or re.search(r"[|\s]", value):
        raise ValueError(f"a part of a signature must be one word without '|', not {value!r}")
    return value
