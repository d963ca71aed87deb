"""What every benchmark records of how its result was made."""

from __future__ import annotations

import time
from typing import Any

import psutil

from llmrec.machine import commit, machine, versions


def provenance() -> dict[str, Any]:
    """Return machine, versions of packages, commit of the checkout, and the seconds since the process was started."""
    duration = round(time.time() - psutil.Process().create_time(), 1)
    return {"machine": machine(), "versions": versions(), "commit": commit(), "duration": duration}
