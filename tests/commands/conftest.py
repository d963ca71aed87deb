"""The model card shows a run's results: it is tested on the run that the report is tested on."""

from __future__ import annotations

from tests.report.conftest import hostile, payloads, results

__all__ = ["hostile", "payloads", "results"]
