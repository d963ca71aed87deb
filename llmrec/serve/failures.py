"""Errors over HTTP: status codes, the common response body, and the time until a retry."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from llmrec.errors import LlmrecError, did_you_mean
from llmrec.serve import schema
from llmrec.serve.batching import AnswerTimeout, QueueFull
from llmrec.serve.databases import StoreError
from llmrec.serve.engine import EngineLost

log = logging.getLogger("llmrec.serve")

OPENAI_PATH = "/v1/chat/completions"
"""The path whose failures have OpenAI's format; see `llmrec.serve.verbs`."""
_STATUS_DESCRIPTIONS = {
    400: "The body is not JSON.",
    401: "The API key is missing or unknown.",
    403: "The key lacks permission, or the request comes from another site.",
    404: "Unknown model, item or user.",
    413: "The body is too large.",
    415: "The content type is not JSON.",
    422: "The body or the URL is invalid, or the request cannot be answered.",
    429: "Too many requests; retry after the time in Retry-After.",
    500: "Internal error.",
    503: "The engine is starting, or the store is unavailable; retry after the time in Retry-After.",
    504: "Timeout.",
}
_STATUS_BY_KIND = {"busy": 429, "exhausted": 503, "defect": 500}
# Fields whose unknown names give status 404; in other fields, unknown names are invalid values.
_NOT_FOUND_FIELDS = frozenset({"model", "item_id", "user", "candidates"})
_KIND_BY_STATUS = {
    400: "syntax",
    401: "missing-key",
    403: "unsafe",
    404: "unknown-name",
    413: "too-large",
    415: "wrong-format",
    422: "bad-value",
    429: "busy",
    503: "unreadable",
}
RETRY_SECONDS = 5.0
"""Seconds until a retry after an internal failure."""
# Maximum number of characters of a client's text that a response repeats.
_MAX_REPEATED_CHARACTERS = 200
# Type names and tags that pydantic adds to error locations, besides keys and numbers.
_TYPE_NAMES = {"constrained-str", "str", "float", "datetime", "user"} | {
    name for name, kind in vars(schema).items() if isinstance(kind, type) and issubclass(kind, BaseModel)
}
_WRONG_TYPE_ERRORS = {"string_type", "model_type", "model_attributes_type", "dict_type"}
# Messages that replace pydantic's.
_MESSAGES = {
    "string_pattern_mismatch": "Input should be text without control characters that is not blank",
    "extra_forbidden": "unknown key",
}


def openapi_error_responses(*statuses: int, body: type[BaseModel] = schema.Failed) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of an endpoint for OpenAPI."""
    return {status: {"model": body, "description": _STATUS_DESCRIPTIONS[status]} for status in statuses}


def validation_error_details(error: ValidationError, *forms: type[BaseModel]) -> tuple[str, str]:
    """Return the location of a validation error, separated by dots, and its message without the value.

    Args:
        error: The validation error.
        forms: Further models that a value may have, in addition to those of `llmrec.serve.schema`.
    """
    worst = _most_informative_error(error.errors())
    names = {form.__name__ for form in forms}
    return ".".join(part for part in _location_parts(worst) if part not in names)[
        :_MAX_REPEATED_CHARACTERS
    ], _error_message(worst)


class _ErrorResponse(JSONResponse):
    """An error response; OpenAI's endpoint has its own format, and uses status 400 instead of 422."""

    def __init__(self, error: schema.Failure, status: int, headers: Mapping[str, str]) -> None:
        self._error = error
        super().__init__(schema.Failed(error=error).model_dump(), status_code=status, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == OPENAI_PATH:
            kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
            error = self._error
            body = schema.OpenAIFailure(message=error.message, type=kind, param=error.at, code=error.kind)
            self.body = self.render(schema.OpenAIFailed(error=body).model_dump())
            self.headers["Content-Length"] = str(len(self.body))
            self.status_code = 400 if self.status_code == 422 else self.status_code
        await super().__call__(scope, receive, send)


def error_response(
    status: int, kind: str, message: str, at: str | None = None, after: float | None = None
) -> JSONResponse:
    """Return an error response; ``after`` is the number of seconds until a retry."""
    headers = {} if after is None else {"Retry-After": str(max(1, round(after)))}
    return _ErrorResponse(schema.Failure(kind=kind, message=message, at=at), status, headers)


def error_status_and_body(error: LlmrecError) -> tuple[int, schema.Failure, float | None]:
    """Return the status, the body and the seconds until a retry for an error."""
    kind, message = error.kind or "failed", str(error)
    if isinstance(error, StoreError):
        # path and message are only for the operator
        log.error("%s", error)
        status, message = 503, "the store of this service cannot be used; see the log of the service"
    elif isinstance(error, EngineLost):
        status = 503
    elif isinstance(error, AnswerTimeout):
        status = 504
    elif kind == "unknown-name":
        status = 404 if error.column in _NOT_FOUND_FIELDS else 422
    else:
        status = _STATUS_BY_KIND.get(kind, 422)
    after = error.after if isinstance(error, QueueFull) else RETRY_SECONDS if status in (429, 503) else None
    return status, schema.Failure(kind=kind, message=message, at=error.column), after


def register_error_handlers(app: FastAPI) -> None:
    """Register handlers that give all errors of an application the same format."""

    @app.exception_handler(LlmrecError)
    async def _(_: Request, error: LlmrecError) -> JSONResponse:
        status, body, after = error_status_and_body(error)
        return error_response(status, body.kind, body.message, body.at, after)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        worst = _most_informative_error(error.errors())
        if worst["type"] == "json_invalid":
            return error_response(400, "syntax", "the body is not JSON")
        # The first element is the source: the body, or a URL parameter.
        parts = _location_parts(worst)[1:]
        where = ".".join(parts)[:_MAX_REPEATED_CHARACTERS]
        message = _error_message(worst)
        if worst["type"] == "extra_forbidden":
            message += did_you_mean(parts[-1], _body_keys(request))
        return error_response(422, "bad-value", f"{where or 'the body'}: {message}", where or None)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        status = error.status_code
        message = "the body is not JSON" if status == 400 else str(error.detail)
        response = error_response(status, _KIND_BY_STATUS.get(status, "unsupported"), message)
        response.headers.update(error.headers or {})
        if status == 405:
            response.headers["Allow"] = ", ".join(sorted(_allowed_methods(request)))
        return response

    @app.exception_handler(Exception)
    async def _(_: Request, __: Exception) -> JSONResponse:
        # the server logs the exception
        return error_response(500, "defect", "internal error; see the log of the service")


def _body_keys(request: Request) -> list[str]:
    """Return all keys that the body of a route may have, at any depth."""
    field = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    full = model.model_json_schema() if model is not None else {}
    return [key for item in (full, *full.get("$defs", {}).values()) for key in item.get("properties", ())]


def _most_informative_error(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the most informative error of a union type."""
    return max(errors, key=lambda error: (len(error["loc"]), error["type"] not in _WRONG_TYPE_ERRORS))


def _location_parts(fault: Mapping[str, Any]) -> list[str]:
    """Return the keys and positions in an error location, without names of types and tags."""
    location: Sequence[int | str] = fault["loc"]
    # An unknown key ends the location; it may equal the name of a type or tag.
    key = len(location) - 1 if fault["type"] == "extra_forbidden" else None
    return [
        str(part) for n, part in enumerate(location) if n == key or not (isinstance(part, str) and _is_type_name(part))
    ]


def _error_message(fault: Mapping[str, Any]) -> str:
    # The value may be secret or malicious, so it is not repeated.
    return _MESSAGES.get(fault["type"]) or str(fault["msg"])[:_MAX_REPEATED_CHARACTERS]


def _is_type_name(part: str) -> bool:
    return part in _TYPE_NAMES or part.startswith(("dict[", "list[", "function-", "json-or-python["))


def _allowed_methods(request: Request) -> set[str]:
    """Return the methods of a URL, which may have several routes."""
    results: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            results |= set(getattr(route, "methods", None) or ())
    return results | ({"HEAD"} if "GET" in results else set())
