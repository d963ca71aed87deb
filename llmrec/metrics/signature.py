"""Signatures of metrics: texts that record the evaluation protocol, so that different protocols are not mixed up.

Example: ``NDCG@10|gain:binary|ties:expected|cand:full|seen:excluded|split:loo/test|llmrec:0.1.0``.
The order of the parts is fixed. Parts that do not apply to a metric are omitted, so ratings have neither ties nor
candidates, and text metrics name the tokenisation. ``users`` and ``slice`` name the cases of a figure or their number;
``how`` has further details of a metric, such as the bins of a calibration error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmrec.registry import find_metric

_SIGNATURE_KEYS = ("gain", "ties", "cand", "seen", "users", "slice", "text", "how", "split", "llmrec")
# Fields of `Signature` whose key has another name.
_FIELD_NAMES = {"cand": "candidates", "llmrec": "version"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The parts of a signature, in order; None for a part that does not apply to a metric."""

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
        parts = ((key, getattr(self, _FIELD_NAMES.get(key, key))) for key in _SIGNATURE_KEYS)
        return "|".join([self.metric, *(f"{key}:{value}" for key, value in parts if value is not None)])


def signature(
    metric: str,
    *,
    gain: str = "binary",
    candidates: str | None = None,
    seen: str | None = None,
    users: str | None = None,
    slice: str | None = None,
    how: str | None = None,
    split: str,
    version: str,
) -> str:
    """Return the signature of a metric.

    Ties are ``expected`` (averaged over their orders) in ranking metrics, and ``seeded`` (one random order) in those of
    lists.

    Args:
        metric: A name of `llmrec.registry.METRICS`, with its cut-off if any, such as ``NDCG@10``.
        gain: Gain of the relevant item, for ranking metrics only.
        candidates: ``full``, or kind and number such as ``uniform-20``; required by metrics of rankings and lists.
        seen: ``excluded`` or ``included``: whether items of the history can be ranked; required by the same metrics.
        users: Name or number of the evaluated users; None to omit it.
        slice: The subset of cases; None for all.
        how: Further details that distinguish figures of this metric, such as ``jaccard-genres``.
        split: Kind of the split.
        version: Version of llmrec.

    Raises:
        ValueError: If the metric is unknown, one of rankings or lists lacks candidates or seen, or a part contains
            ``|`` or white space.
    """
    entry = find_metric(metric)
    if entry is None:
        raise ValueError(f"unknown metric {metric!r}")
    listed = entry.kind in ("ranking", "lists")
    if listed and (candidates is None or seen is None):
        raise ValueError(f"the signature of {metric} needs candidates and seen")
    for part in (gain, candidates, seen, users, slice, how, split, version):
        if part is not None and (not part or re.search(r"[|\s]", part)):
            raise ValueError(f"a part of a signature must be one word without '|', not {part!r}")
    return str(
        Signature(
            metric=metric,
            gain=gain if entry.kind == "ranking" else None,
            ties={"ranking": "expected", "lists": "seeded"}.get(entry.kind),
            candidates=candidates if listed else None,
            seen=seen if listed else None,
            users=users,
            slice=slice,
            text=entry.words,
            how=how,
            split=split,
            version=version,
        )
    )


def parse_signature(text: str) -> Signature:
    """Parse a signature; ``str(parse_signature(text)) == text``.

    Raises:
        ValueError: If a part is unknown, empty, missing or out of order.
    """
    metric, *rest = text.split("|")
    parts = {key: value for key, _, value in (part.partition(":") for part in rest)}
    order = [key for key in _SIGNATURE_KEYS if key in parts]
    wrong = not metric or not {"split", "llmrec"} <= parts.keys() or not all(parts.values())
    if wrong or list(parts) != order or len(parts) != len(rest):
        raise ValueError(
            f"not a metric signature: {text!r}; expected METRIC|{'|'.join(f'{key}:...' for key in _SIGNATURE_KEYS)}"
        )
    return Signature(metric=metric, **{_FIELD_NAMES.get(key, key): value for key, value in parts.items()})
