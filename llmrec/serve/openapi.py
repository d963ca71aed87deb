"""The OpenAPI document of the HTTP interface; ``python -m llmrec.serve.openapi FILE`` writes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import cast

from llmrec.serve.app import make_app
from llmrec.serve.gates import Auth
from llmrec.serve.keys import Keys
from llmrec.serve.service import Service


def openapi_document() -> str:
    """Return the OpenAPI document of the application as JSON."""
    # There are no requests, so no service is needed. Keys are set, so that the document describes authentication.
    keys = Keys(Path("keys.json"), (0, 0, 0, 0), ())
    document = make_app(cast(Service, object()), Auth(keys)).openapi()
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(openapi_document(), encoding="utf-8")
