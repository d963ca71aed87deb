"""One running service for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.serve.served import Served


@pytest.fixture(scope="session")
def served(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real service over a toy model: tests share it, and give what they add to it names of their own."""
    for module in ("torch", "fastapi", "uvicorn", "prometheus_client", "mcp"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    from tests.serve.served import serving

    with serving(llama_folder, tmp_path_factory.mktemp("served")) as found:
        yield found
