"""One running service for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from httpx._transports import default

if TYPE_CHECKING:
    from tests.serve.served import Served

# Otherwise each client reads all certificates again.
default.create_ssl_context = cache(default.create_ssl_context)


@pytest.fixture(scope="session")
def served(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service over a toy model, shared by all tests: they use unique names for what they add."""
    for module in ("torch", "fastapi", "uvicorn", "prometheus_client", "mcp"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    from tests.serve.served import serving

    with serving(llama_folder, tmp_path_factory.mktemp("served")) as result:
        yield result
