"""A check for schemathesis, run in its environment: bodies that match the schema must not be rejected as malformed.

A request with a valid body may still have no answer, for which 422 is documented: a rule names an unknown field, or the
model does not support the endpoint. But the body itself must not be rejected as malformed, which the failure's ``kind``
and ``at`` show.
"""

from __future__ import annotations

from typing import Any

import schemathesis

# The kind of validation failures; see `llmrec.serve.failures`.
_WRONG_BODY = "bad-value"


@schemathesis.check
def body_of_the_schema_is_read(ctx: Any, response: Any, case: Any) -> None:
    """Check that a body that matches the schema is not rejected as malformed."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 422:
        return
    error = response.json()["error"]
    if error["kind"] == _WRONG_BODY:
        raise AssertionError(f"the service rejects a body that its schema allows: {error}")
