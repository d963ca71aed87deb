"""A check for schemathesis, run in its environment: bodies that match the schema must not be rejected as malformed.

A question whose body fits can still have no answer, for which 422 is documented: a rule names a field that no item has,
a model does not answer the verb. What must not be is that the body itself is found to be wrong, which is told apart by
the failure's ``kind`` and ``at``: the service reads bodies by the schema that it publishes.
"""

from __future__ import annotations

from typing import Any

import schemathesis

# Of failures that pydantic finds; see `llmrec.serve.failures`.
_WRONG_BODY = "bad-value"


@schemathesis.check
def body_of_the_schema_is_read(ctx: Any, response: Any, case: Any) -> None:
    """Check that a body that matches the schema is not rejected as malformed."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 422:
        return
    error = response.json()["error"]
    if error["kind"] == _WRONG_BODY:
        raise AssertionError(f"the service rejects a body that its schema allows: {error}")
