"""One line of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        name: What was looked at.
        found: What was found.
        mend: What to do about a fault; empty where nothing is wrong.
        note: Advice about something that is not wrong, but worth knowing.
    """

    name: str
    found: str
    mend: str = ""
    note: str = ""

    @property
    def level(self) -> Literal["ok", "notice", "fault"]:
        """``fault`` where there is something to mend, ``notice`` where there is advice."""
        return "fault" if self.mend else "notice" if self.note else "ok"
