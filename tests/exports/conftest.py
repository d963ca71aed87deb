"""Fixtures that export tests share with report tests: the content of a finished run."""

from tests.report.conftest import hostile, payloads, results, run_dir, save, several

__all__ = ["hostile", "payloads", "results", "run_dir", "save", "several"]
