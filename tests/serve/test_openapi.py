"""The committed OpenAPI document is that of the application."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("prometheus_client", reason="the serve extra is not installed")

from llmrec.serve.openapi import openapi_document

PAGE = Path(__file__).resolve().parents[2] / "docs" / "openapi.json"


def test_the_committed_document_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == openapi_document(), "make docs"
