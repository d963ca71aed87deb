"""Inference cost by model and by setting, in tokens and seconds per request.

The cost of an ensemble includes that of its members; a setting counts every row once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmrec.results import LANGUAGE_MODEL_ARMS, Results, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """The inference cost of a model: prompt tokens that were read, completion tokens, and wall-clock time.

    Attributes:
        forwards_per_request: Model calls, with one per generated token; None if unknown.
        tokens_per_request: Tokens read and written; None for a row without requests.
        tokens_per_user: The same over users, or over requests if users are unknown.
        seconds_per_request: Wall-clock time over requests; not a latency, since requests are batched.
    """

    row: Row
    read: int
    written: int
    seconds: float
    forwards_per_request: float | None
    tokens_per_request: float | None
    tokens_per_user: float | None
    seconds_per_request: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmCost:
    """The total inference cost of all zero-shot, few-shot, tuned or baseline models."""

    arm: str
    rows: int
    requests: int
    read: int
    written: int
    seconds: float

    @property
    def rate(self) -> float | None:
        """Tokens read and written per second; None without tokens."""
        tokens = self.read + self.written
        return tokens / self.seconds if self.seconds and tokens else None


def cost_of(row: Row, members: Sequence[Row] = ()) -> RowCost:
    """Return the inference cost of a model.

    Args:
        row: The row.
        members: The members of an ensemble; they answered the same requests.
    """
    costs = [entry.cost for entry in (row, *members)]
    read, written = sum(cost.prompt_tokens for cost in costs), sum(cost.completion_tokens for cost in costs)
    tokens, seconds = read + written, sum(cost.seconds or 0.0 for cost in costs)
    forwards, users = sum(cost.forwards for cost in costs), row.users or row.n
    return RowCost(
        row=row,
        read=read,
        written=written,
        seconds=seconds,
        forwards_per_request=forwards / row.n if row.n > 0 and forwards else None,
        tokens_per_request=tokens / row.n if row.n > 0 else None,
        tokens_per_user=tokens / users if users > 0 else None,
        seconds_per_request=seconds / row.n if row.n > 0 else None,
    )


def cost_by_row(results: Results, task: str) -> tuple[RowCost, ...]:
    """Return the inference costs of the models of a task, best model first."""
    return tuple(cost_of(row, results.members(row)) for row in results.standings(task))


def cost_by_arm(results: Results) -> tuple[ArmCost, ...]:
    """Return the number of models, requests, tokens and seconds, for zero-shot, few-shot and tuned models."""
    arms = {arm: [cost_of(row) for row in results.rows if row.arm == arm] for arm in (*LANGUAGE_MODEL_ARMS, "baseline")}
    return tuple(
        ArmCost(
            arm=arm,
            rows=len(costs),
            requests=sum(cost.row.n for cost in costs),
            read=sum(cost.read for cost in costs),
            written=sum(cost.written for cost in costs),
            seconds=sum(cost.seconds for cost in costs),
        )
        for arm, costs in arms.items()
        if costs
    )
