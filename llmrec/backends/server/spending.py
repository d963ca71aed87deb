"""What was spent on a server, in tokens and money, and the caps that stop requests."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from llmrec.errors import EngineFailure
from llmrec.recipe.schema import ServerSection
from llmrec.types import Cost

_MILLION = 1_000_000
# Tokens that no answer has used: a larger number is a fault, and no table of SQLite could add many of them up.
_MOST = 2**32


class Ledger(Protocol):
    """Where what was spent outlives the process."""

    def spent(self) -> Cost:
        """Return all that was ever booked."""
        ...

    def spend(self, cost: Cost) -> None:
        """Book some more."""
        ...


class Spending:
    """What was spent on a server, by this process and those before it.

    Requests under way when a cap is reached are finished and kept, so a cap can be passed by what they cost.

    Args:
        section: Caps and prices.
        ledger: Where it is booked; None forgets it with the process.
    """

    def __init__(self, section: ServerSection, ledger: Ledger | None) -> None:
        self._section, self._ledger = section, ledger
        self._lock = threading.Lock()
        self._total = ledger.spent() if ledger is not None else Cost()
        self._unbooked = Cost()

    @property
    def capped(self) -> bool:
        """Whether there is a cap, so that answers must say what they used."""
        return self._section.max_tokens_budget is not None or self._section.max_cost is not None

    @property
    def total(self) -> Cost:
        """All tokens so far."""
        with self._lock:
            return self._total

    @property
    def money(self) -> float:
        """What they cost, in the currency of the prices."""
        total, section = self.total, self._section
        return (total.prompt_tokens * section.price_in + total.completion_tokens * section.price_out) / _MILLION

    def check(self) -> None:
        """Stop here once a cap is reached.

        Raises:
            EngineFailure: If it is; the message names the key.
        """
        section, total = self._section, self.total
        used = total.prompt_tokens + total.completion_tokens
        kept = "what was answered is kept; raise the cap and run the same command again to continue"
        if section.max_tokens_budget is not None and used >= section.max_tokens_budget:
            raise EngineFailure(
                f"the budget eval.server.max_tokens_budget={section.max_tokens_budget:,} is used up: "
                f"{total.prompt_tokens:,} tokens were read and {total.completion_tokens:,} written; {kept}",
                kind="exhausted",
                column="eval.server.max_tokens_budget",
            )
        if section.max_cost is not None and self.money >= section.max_cost:
            raise EngineFailure(
                f"the budget eval.server.max_cost={section.max_cost:g} is used up: {self.money:.4g} was spent on "
                f"{total.prompt_tokens:,} tokens read and {total.completion_tokens:,} written; {kept}",
                kind="exhausted",
                column="eval.server.max_cost",
            )

    def count(self, cost: Cost) -> None:
        """Count what one answer used, whether or not it could be read; from any thread."""
        with self._lock:
            self._total, self._unbooked = self._total + cost, self._unbooked + cost

    def book(self) -> None:
        """Write down what is not yet in the ledger; only from the thread that the ledger belongs to."""
        with self._lock:
            cost, self._unbooked = self._unbooked, Cost()
        if self._ledger is not None and cost != Cost():
            self._ledger.spend(cost)


def usage(value: Any) -> Cost | None:
    """Return the tokens that an answer says it used; None if it does not."""
    found = value.get("usage") if isinstance(value, dict) else None
    if not isinstance(found, dict):
        return None
    counts = [found.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(count, int) and 0 <= count <= _MOST for count in counts):
        return None
    return Cost(prompt_tokens=counts[0], completion_tokens=counts[1])
