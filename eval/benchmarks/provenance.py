"""The provenance that every benchmark result records."""

from __future__ import annotations

import time
from typing import Any

import psutil

from llmrec.machine import commit, machine, versions


def provenance() -> dict[str, Any]:
    """Return the machine, package versions, commit, and the seconds since the process started."""
    duration = round(time.time() - psutil.Process().create_time(), 1)
    return {"machine": machine(), "versions": versions(), "commit": commit(), "duration": duration}
