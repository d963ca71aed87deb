"""The HTTP application of a `Service`: routes, status codes and OpenAPI."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer

from llmrec import __version__
from llmrec.data.read.limits import ID_LIMIT
from llmrec.errors import DataError, LlmrecError
from llmrec.metrics.stats import wilson_interval
from llmrec.serve import schema
from llmrec.serve.failures import error_status_and_body, openapi_error_responses, register_error_handlers
from llmrec.serve.gates import (
    Auth,
    AuthMiddleware,
    BodyLimitMiddleware,
    HeadAndUrlMiddleware,
    Metrics,
    MetricsMiddleware,
    SameOriginMiddleware,
    StrictRoute,
)
from llmrec.serve.service import Service
from llmrec.serve.verbs import VERBS, Verb, batch_answer, batch_body, model_card
from llmrec.types import Event, Item

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_PAGE_PACKAGE, _SWAGGER_PACKAGE = "llmrec.serve", "fastapi_offline"
# Static files: their package and folder, and their media type.
_STATIC_FILES = {
    "page.js": (_PAGE_PACKAGE, "page", "text/javascript"),
    "chat.js": (_PAGE_PACKAGE, "page", "text/javascript"),
    "docs.js": (_PAGE_PACKAGE, "page", "text/javascript"),
    "page.css": (_PAGE_PACKAGE, "page", "text/css"),
    "swagger-ui-bundle.js": (_SWAGGER_PACKAGE, "static", "text/javascript"),
    "swagger-ui.css": (_SWAGGER_PACKAGE, "static", "text/css"),
}
_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_MAX_VOTES = 1_000_000
_Id = Annotated[str, Path(min_length=1, max_length=ID_LIMIT, pattern=schema.NAME_PATTERN)]


_COMMON_STATUSES = (401, 403, 422, 429, 500, 503)
_RETRY_STATUSES = (429, 503, 504)
_POST_STATUSES = (*_COMMON_STATUSES, 400, 413, 415)
_VERB_STATUSES = (*_POST_STATUSES, 404, 504)


def make_app(service: Service, auth: Auth, *, body_limit: int = 1 << 20) -> FastAPI:
    """Create the HTTP application of a service.

    Args:
        service: The service.
        auth: Authentication and rate limits.
        body_limit: The maximum size of a body in bytes.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(
        title="llmrec",
        version=__version__,
        summary="A recommender over HTTP.",
        lifespan=lifespan,
        # FastAPI's documentation page loads scripts from another site, but this service must work offline.
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    metrics = Metrics(service)
    register_error_handlers(app)
    app.include_router(_public_routes(service, metrics))
    # `AuthMiddleware` checks the key; this only documents it.
    bearer = HTTPBearer(auto_error=False, description="API key, created with `llmrec serve-key`.")
    needed = [Depends(bearer)] if auth.keyed else []
    app.include_router(_question_routes(service), dependencies=needed)
    app.include_router(_data_routes(service, auth), dependencies=needed)
    # requests pass the middleware in reverse order
    app.add_middleware(BodyLimitMiddleware, most=body_limit)
    app.add_middleware(AuthMiddleware, auth=auth)
    app.add_middleware(SameOriginMiddleware, keyed=auth.keyed)
    app.add_middleware(HeadAndUrlMiddleware)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    return app


# --------------------------------------------------------------------------- timeouts


async def _await_while_connected(service: Service, request: Request, work: Awaitable[_T]) -> _T:
    """Await a result; cancel it if the client disconnects or the timeout is reached."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    asking, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        patience = service.settings.patience
        await asyncio.wait({asking, leaving}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return asking.result()
        if leaving.done():
            raise HTTPException(499, "the client disconnected")
        raise service.batcher.late()
    finally:
        asking.cancel()
        leaving.cancel()


# --------------------------------------------------------------------------- routes


def _public_routes(service: Service, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        answer = _static_file_response(_PAGE_PACKAGE, "page", "index.html", "text/html")
        allowed = await asyncio.to_thread(service.image_origins)
        answer.headers["Content-Security-Policy"] = _SECURITY_POLICY.replace("data:", " ".join(("data:", *allowed)))
        return answer

    @router.get("/chat", include_in_schema=False)
    async def chat_page() -> Response:
        return _static_file_response(_PAGE_PACKAGE, "page", "chat.html", "text/html")

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        answer = _static_file_response(_PAGE_PACKAGE, "page", "docs.html", "text/html")
        # Swagger UI sets style attributes
        answer.headers["Content-Security-Policy"] = _SECURITY_POLICY.replace("style-src", "style-src 'unsafe-inline'")
        return answer

    @router.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in _STATIC_FILES:
            raise HTTPException(404, "file not found")
        package, folder, kind = _STATIC_FILES[name]
        return _static_file_response(package, folder, name, kind)

    @router.get("/health", tags=["state"])
    async def health() -> schema.Health:
        """Return whether the process is alive."""
        return schema.Health()

    @router.get("/ready", tags=["state"], responses={503: {"model": schema.Ready}})
    async def ready(response: Response) -> schema.Ready:
        """Return whether the models are loaded: status 200, otherwise 503."""
        if not service.engine.ready:
            response.status_code = 503
        names = [card.name for card in service.engine.cards]
        return schema.Ready(ready=service.engine.ready, models=names)

    @router.get("/metrics", tags=["state"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def measured() -> Response:
        """Return metrics in the Prometheus format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _static_file_response(package: str, folder: str, name: str, kind: str) -> Response:
    result = files(package).joinpath(folder, name).read_bytes()
    return Response(result, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)


def _question_routes(service: Service) -> APIRouter:
    class Queued(StrictRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def admitted(request: Request) -> Response:
                # Under overload most requests are rejected, so this precedes the parsing of the body.
                service.admit()
                return await handle(request)

            return admitted

    router = APIRouter(tags=["questions"])

    for verb in VERBS.values():
        router.route_class = Queued if verb.engine else StrictRoute
        stream: dict[int | str, dict[str, Any]] = {
            200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
        }
        for version in verb.versions:
            router.add_api_route(
                f"/{version}/{verb.name}",
                _verb_handler(service, verb),
                methods=["POST"],
                name=verb.name,
                operation_id=f"{verb.name}_{version}" if len(verb.versions) > 1 else None,
                description=verb.about,
                response_model=verb.answer,
                responses=openapi_error_responses(*_VERB_STATUSES, body=verb.failed) | (stream if verb.event else {}),
            )
        if verb.batch:
            router.add_api_route(
                f"/v1/{verb.name}/batch",
                _batch_handler(service, verb),
                methods=["POST"],
                name=f"{verb.name}_batch",
                description=verb.batch,
                response_model=batch_answer(verb.answer),
                responses=openapi_error_responses(*_VERB_STATUSES),
            )
    return router


def _verb_handler(service: Service, verb: Verb) -> Callable[..., Any]:
    async def answer(request: Request, body: Any) -> Any:
        if verb.event and "text/event-stream" in request.headers.get("accept", ""):
            events = verb.stream(service, body)
            # Before the first event, an error can still have an HTTP status.
            first = await _await_while_connected(service, request, anext(events))
            return StreamingResponse(_iterate_event_texts(first, events), media_type="text/event-stream")
        return await _await_while_connected(service, request, verb.ask(service, body))

    answer.__annotations__ = {"request": Request, "body": verb.body}
    return answer


def _batch_handler(service: Service, verb: Verb) -> Callable[..., Any]:
    async def answer(request: Request, body: Any) -> Any:
        asking = asyncio.gather(*(verb.ask(service, item) for item in body.requests), return_exceptions=True)
        return batch_answer(verb.answer)(answers=_batch_answers(await _await_while_connected(service, request, asking)))

    answer.__annotations__ = {"request": Request, "body": batch_body(verb.body)}
    return answer


def _data_routes(service: Service, auth: Auth) -> APIRouter:
    router = APIRouter(
        tags=["knowledge"], route_class=StrictRoute, responses=openapi_error_responses(*_COMMON_STATUSES)
    )

    @router.get("/v1/models")
    async def models() -> schema.Models:
        """List the models, the default model first."""
        return schema.Models(models=[model_card(card) for card in service.engine.cards])

    @router.get("/v1/preference")
    async def preference(
        first: Annotated[int, Query(ge=0, le=_MAX_VOTES, description="Votes for the first of two models.")],
        second: Annotated[int, Query(ge=0, le=_MAX_VOTES, description="Votes for the second.")],
    ) -> schema.Preference:
        """Return the share of votes for the first of two models, with its 95 % interval; ties do not count."""
        votes = first + second
        if not votes:
            raise DataError("first and second: there are no votes", kind="empty", column="first")
        low, high = wilson_interval(first / votes, votes)
        return schema.Preference(share=first / votes, low=low, high=high)

    @router.get("/v1/items")
    async def items(
        q: Annotated[str, Query(max_length=200, description="Text to search for in titles and ids.")] = "",
        limit: Annotated[int, Query(ge=1, le=schema.MAX_ITEMS)] = 20,
        offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
    ) -> schema.FoundItems:
        """Search items by title or ID."""
        results, total = service.catalogue.search(q, limit=limit, offset=offset)
        return schema.FoundItems(items=[schema.CatalogueItem.model_validate(item) for item in results], total=total)

    @router.get("/v1/items/{item_id:path}", responses=openapi_error_responses(404))
    async def item(item_id: _Id) -> schema.CatalogueItem:
        """Return an item of the catalogue."""
        return schema.CatalogueItem.model_validate(service.catalogue.get(item_id))

    @router.put("/v1/items", responses=openapi_error_responses(*_POST_STATUSES), dependencies=[Depends(auth.admin)])
    async def put_items(body: schema.ItemsBody) -> schema.Stored:
        """Add or replace items."""
        results = [Item(item_id=entry.item_id, title=entry.title, fields=dict(entry.fields)) for entry in body.items]
        return schema.Stored(stored=await service.put_items(results))

    @router.delete(
        "/v1/items/{item_id:path}", responses=openapi_error_responses(404), dependencies=[Depends(auth.admin)]
    )
    async def remove_item(item_id: _Id) -> schema.Removed:
        """Remove an item from the catalogue."""
        await service.remove_item(item_id)
        return schema.Removed(removed=1)

    @router.get("/v1/users/{user_id:path}", responses=openapi_error_responses(404))
    async def user(user_id: _Id) -> schema.KnownUser:
        """Return the history of a user, oldest first."""
        return _known_user(user_id, await service.user(user_id), service.catalogue.items)

    @router.delete("/v1/users/{user_id:path}", dependencies=[Depends(auth.admin)])
    async def erase(user_id: _Id) -> schema.Erased:
        """Delete the stored interactions and generated texts of a user."""
        return await service.erase(user_id)

    @router.post("/v1/events", responses=openapi_error_responses(*_POST_STATUSES, 404))
    async def events(body: schema.EventsBody) -> schema.Stored:
        """Add interactions to the histories of users; they are stored before the response is sent."""
        return schema.Stored(stored=await service.add_events(body))

    @router.post("/v1/reload", dependencies=[Depends(auth.admin)])
    async def reload() -> schema.Models:
        """Reload the model folder; the old models answer until the new ones are ready."""
        await service.reload()
        return schema.Models(models=[model_card(card) for card in service.engine.cards])

    return router


def _batch_answers(results: Sequence[Any]) -> list[Any]:
    """Return the answers to several questions, with an error for each failed one."""
    if all(
        isinstance(result, LlmrecError) and error_status_and_body(result)[0] in _RETRY_STATUSES for result in results
    ):
        raise results[0]
    answers: list[Any] = []
    for result in results:
        if isinstance(result, LlmrecError):
            answers.append(schema.Failed(error=error_status_and_body(result)[1]))
        elif isinstance(result, Exception):
            log.error("unexpected error in a request of a batch", exc_info=result)
            defect = schema.Failure(kind="defect", message="internal error; see the log of the service")
            answers.append(schema.Failed(error=defect))
        else:
            answers.append(result)
    return answers


async def _iterate_event_texts(first: tuple[str, Any], events: AsyncIterator[tuple[str, Any]]) -> AsyncIterator[str]:
    yield _format_event(*first)
    try:
        async for event in events:
            yield _format_event(*event)
    except LlmrecError as error:
        yield _format_event("error", schema.Failed(error=error_status_and_body(error)[1]).model_dump())


def _format_event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _known_user(user_id: str, events: Sequence[Event], items: Mapping[str, Item]) -> schema.KnownUser:
    """Return the interactions of a user with the titles of their items."""
    history = [
        schema.KnownEvent(
            item_id=event.item_id,
            title=items[event.item_id].title if event.item_id in items else None,
            rating=event.rating,
            timestamp=event.timestamp,
        )
        for event in events
    ]
    return schema.KnownUser(user_id=user_id, history=history)
