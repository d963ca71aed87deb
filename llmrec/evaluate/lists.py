"""List metrics, such as coverage and diversity."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrec.errors import LlmrecError
from llmrec.evaluate.figures import EvalProtocol, Measurements, compute_metrics
from llmrec.metrics.beyond import ItemContents

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrec.data.split import SplitDataset
    from llmrec.types import Case

_WORD_SEPARATOR = re.compile(r"\s*[|,;>]\s*")
_DEFAULT_CUTOFF = 10


@dataclass(frozen=True, slots=True)
class ListMetricData:
    """Training data and item fields from which metrics of lists are computed.

    Attributes:
        items: The catalogue, in the order of all arrays.
        counts: Training users of each item, shape (items,).
        users: Number of training users.
        contents: Words or vectors of the items, for diversity; None omits it.
    """

    items: tuple[str, ...]
    counts: NDArray[np.float64]
    users: int
    contents: ItemContents | None = None

    @staticmethod
    def of(data: SplitDataset, *, field: str | None = None) -> ListMetricData:
        """Compute the inputs of list metrics from a data set.

        Args:
            data: The data; only training interactions are counted.
            field: Item field with words separated by ``|``, ``,``, ``;`` or ``>``, such as ``genres``; for diversity.

        Raises:
            LlmrecError: If no item has the field.
        """
        items = tuple(sorted(data.dataset.items))
        index = {item: position for position, item in enumerate(items)}
        pairs = data.train.select("user_id", "item_id").unique()
        indices = [index[item] for item in pairs["item_id"].to_list()]
        counts = np.bincount(np.array(indices, dtype=np.int64), minlength=len(items)).astype(np.float64)
        contents = None
        if field is not None:
            words = tuple(_split_words(data.dataset.items[item].fields.get(field, "")) for item in items)
            if not any(words):
                raise LlmrecError(
                    f"{data.dataset.name}: no item has the field {field!r}; choose another field",
                    kind="unknown-name",
                    at=data.dataset.name,
                )
            contents = ItemContents(words=words, source=field)
        return ListMetricData(items, counts, int(data.train["user_id"].n_unique()), contents)


def list_figures(
    lists: NDArray[np.int32],
    items: Sequence[str],
    cases: Sequence[Case],
    protocol: EvalProtocol,
    background: ListMetricData,
    *,
    seen: str,
) -> Measurements:
    """Return the list metrics of a model at cut-off 10, or at the largest cut-off.

    Coverage, Gini and ColdItems are computed over all lists together; they have no interval, since a resample has fewer
    different lists. Cold-start metrics require a catalogue with cold-start items. Serendipity uses training popularity
    as the expected list.

    Args:
        lists: Item indices, best first, padded with -1, shape (n, k).
        items: The item of each index.
        cases: The requests.
        protocol: The cut-offs.
        background: Training data of the same catalogue.
        seen: Whether lists may contain items of the history, ``excluded`` or ``included``.

    Raises:
        LlmrecError: If the training data are of another catalogue.
    """
    if tuple(items) != background.items:
        raise LlmrecError(
            "list metrics need counts of the same catalogue in the same order; compute them from the same split",
            kind="mismatch",
        )
    k = min(_DEFAULT_CUTOFF if _DEFAULT_CUTOFF in protocol.cutoffs else max(protocol.cutoffs), lists.shape[1])
    index = {item: position for position, item in enumerate(background.items)}
    histories = ([index.get(event.item_id, -1) for event in case.request.history] for case in cases)
    held = [np.array([item for item in history if item >= 0], dtype=np.int64) for history in histories]
    users = [case.request.user_id for case in cases]
    targets = np.array([index.get(str(case.truth), -1) for case in cases])
    hidden = held if seen == "excluded" else [held[0][:0]] * len(held)
    inputs = {
        "lists": lists,
        "items": len(background.items),
        "counts": background.counts,
        "users": background.users,
        "cold_counts": None if background.counts.all() else background.counts,
        "contents": background.contents,
        "expected": _popular_lists(background, hidden, targets, k),
        "targets": targets,
        "histories": held,
        "owners": users,
    }
    return compute_metrics("lists", inputs, users, protocol, cutoffs=(k,), seen=seen)


def cold_target_figures(
    cases: Sequence[Case], background: ListMetricData, values: Mapping[str, NDArray[np.float64]], names: Sequence[str]
) -> dict[str, float]:
    """Return the metrics for requests with a cold-start target, and their number as ``n``.

    Args:
        cases: Requests with an item as truth.
        background: Counts of the same catalogue.
        values: Per-request values by metric.
        names: Metrics to average; without such requests the result is ``n`` only.
    """
    counts = dict(zip(background.items, background.counts.tolist(), strict=True))
    cold = np.array([counts.get(str(case.truth), 0.0) == 0 for case in cases], dtype=bool)
    means = {name: float(values[name][cold].mean()) for name in names} if cold.any() else {}
    return {"n": float(cold.sum()), **means}


# --------------------------------------------------------------------------- helpers


def _split_words(text: str) -> frozenset[str]:
    return frozenset(word for word in _WORD_SEPARATOR.split(text.strip().casefold()) if word)


def _popular_lists(
    background: ListMetricData, hidden: Sequence[NDArray[np.int64]], targets: NDArray[np.int64], k: int
) -> NDArray[np.int64]:
    """Return the k most popular items that can be ranked for each request, shape (n, k)."""
    order = np.argsort(-background.counts, kind="stable")
    lists = np.full((len(hidden), k), -1, dtype=np.int64)
    for row, (hidden_items, target) in enumerate(zip(hidden, targets, strict=True)):
        first = order[: k + len(hidden_items)]
        kept = first[~np.isin(first, hidden_items[hidden_items != target])][:k]
        lists[row, : len(kept)] = kept
    return lists
