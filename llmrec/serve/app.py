"""The HTTP side: routes, statuses and OpenAPI over a `Service`. What each does is in `llmrec.serve.service`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from llmrec import __version__
from llmrec.errors import LlmrecError
from llmrec.serve import schema
from llmrec.serve.batching import Full, TooLate
from llmrec.serve.forms import told
from llmrec.serve.gates import BodyLimit, Door, Measured, SameOrigin
from llmrec.serve.metrics import Metrics
from llmrec.serve.service import Service
from llmrec.serve.worker import EngineLost
from llmrec.types import Item

_T = TypeVar("_T")
_Responses = dict[int | str, dict[str, Any]]

_PAGE = {"page.js": "text/javascript", "page.css": "text/css"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_STATUS = {"unknown-name": 404, "busy": 429, "exhausted": 503, "defect": 500}
# Seconds after which an engine that is starting is worth another question.
_RETRY = 5

_Id = Annotated[str, Path(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]


def _said(*statuses: int) -> _Responses:
    """Return what OpenAPI says of the failures of an endpoint."""
    words = {
        400: "The body is no JSON, or a header is missing.",
        401: "There is no API key, or one that is not known.",
        403: "The key may not do this, or the call comes from a page of another site.",
        404: "A model, an item or a user is not known.",
        413: "The body is too large.",
        415: "The body is not said to be JSON.",
        422: "The body breaks a rule, or the question cannot be answered.",
        429: "Too much is asked; Retry-After says when to ask again.",
        500: "A defect of llmrec.",
        503: "The engine is starting; Retry-After says when to ask again.",
        504: "There was no answer in time.",
    }
    return {status: {"model": schema.Failed, "description": words[status]} for status in statuses}


_ALWAYS = (400, 401, 403, 422, 429)
_POSTED = (*_ALWAYS, 413, 415)
_ASKED = (*_POSTED, 404, 500, 503, 504)


def make_app(service: Service, door: Door, *, body_limit: int = 1 << 20) -> FastAPI:
    """Make the application.

    Args:
        service: What answers.
        door: Who may ask.
        body_limit: Bytes of a body.
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
        # Their pages load scripts from another site, and this service needs no network.
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    metrics = Metrics(service)
    _handle_errors(app)
    app.include_router(_open_routes(service, metrics))
    app.include_router(_questions(service, door))
    app.include_router(_knowledge(service, door))
    app.add_middleware(BodyLimit, most=body_limit)
    app.add_middleware(SameOrigin)
    app.add_middleware(Measured, metrics=metrics)
    return app


# --------------------------------------------------------------------------- errors


def _failed(status: int, kind: str, message: str, at: str | None = None, after: float | None = None) -> JSONResponse:
    body = schema.Failed(error=schema.Failure(kind=kind, message=message, at=at))
    headers = {} if after is None else {"Retry-After": str(max(1, round(after)))}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


def _failure(error: LlmrecError) -> tuple[int, schema.Failure, float | None]:
    """Return the status, the body and the seconds to wait that an error stands for."""
    after = error.after if isinstance(error, Full) else float(_RETRY) if isinstance(error, EngineLost) else None
    status = 503 if isinstance(error, EngineLost) else 504 if isinstance(error, TooLate) else None
    status = status or _STATUS.get(error.kind or "", 422)
    return status, schema.Failure(kind=error.kind or "failed", message=str(error), at=error.column), after


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(LlmrecError)
    async def _(_: Request, error: LlmrecError) -> JSONResponse:
        status, failure, after = _failure(error)
        return _failed(status, failure.kind, failure.message, failure.at, after)

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        if first["type"] == "json_invalid":
            return _failed(400, "syntax", "the body is no JSON")
        # The value itself may be a secret or hostile; it is not repeated.
        return _failed(422, "bad-value", f"{where or 'the body'}: {first['msg']}", where or None)

    @app.exception_handler(AnyHTTPException)
    async def _(_: Request, error: AnyHTTPException) -> JSONResponse:
        kinds = {401: "unreachable", 404: "unknown-name", 413: "too-large", 429: "busy"}
        kind = kinds.get(error.status_code, "unsupported")
        made = _failed(error.status_code, kind, str(error.detail))
        made.headers.update(error.headers or {})
        return made


async def _while_there(request: Request, work: Awaitable[_T]) -> _T:
    """Wait for an answer as long as the client does; what it no longer waits for leaves the queue.

    Raises:
        HTTPException: If the client left; nobody reads that.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    asking, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return asking.result()
        raise HTTPException(499, "the client left")
    finally:
        asking.cancel()
        leaving.cancel()


# --------------------------------------------------------------------------- routes


def _open_routes(service: Service, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return _asset("index.html", "text/html")

    @router.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in _PAGE:
            raise HTTPException(404, "there is no such file")
        return _asset(name, _PAGE[name])

    @router.get("/health", tags=["state"])
    async def health() -> schema.Health:
        """Whether the process answers."""
        return schema.Health()

    @router.get("/ready", tags=["state"], responses={503: {"model": schema.Ready}})
    async def ready(response: Response) -> schema.Ready:
        """Whether questions to models are answered now."""
        if not service.engine.ready:
            response.status_code = 503
        names = [card.name for card in service.engine.cards]
        return schema.Ready(ready=service.engine.ready, models=names)

    @router.get("/metrics", tags=["state"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def measured() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _asset(name: str, kind: str) -> Response:
    found = files("llmrec.serve").joinpath("page", name).read_bytes()
    return Response(found, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)


def _questions(service: Service, door: Door) -> APIRouter:
    router = APIRouter(tags=["questions"], dependencies=[Depends(door.key)], responses=_said(*_ASKED))

    @router.post("/v1/rank")
    async def rank(request: Request, body: schema.RankBody) -> schema.RankAnswer:
        """Rank candidates, or the whole catalogue, for a user."""
        return await _while_there(request, service.rank(body))

    @router.post("/v1/rank/batch")
    async def rank_batch(request: Request, body: schema.RankBatch) -> schema.RankAnswers:
        """Rank for several users."""
        return schema.RankAnswers(answers=await _batch(request, service, service.rank, body.requests))

    @router.post("/v1/rate")
    async def rate(request: Request, body: schema.ItemBody) -> schema.RateAnswer:
        """Predict a user's rating of an item."""
        return await _while_there(request, service.rate(body))

    @router.post("/v1/rate/batch")
    async def rate_batch(request: Request, body: schema.ItemBatch) -> schema.RateAnswers:
        """Predict several ratings."""
        return schema.RateAnswers(answers=await _batch(request, service, service.rate, body.requests))

    @router.post("/v1/predict")
    async def predict(request: Request, body: schema.ItemBody) -> schema.PredictAnswer:
        """Predict whether a user likes or chooses an item."""
        return await _while_there(request, service.predict(body))

    @router.post("/v1/predict/batch")
    async def predict_batch(request: Request, body: schema.ItemBatch) -> schema.PredictAnswers:
        """Predict several yes or no."""
        return schema.PredictAnswers(answers=await _batch(request, service, service.predict, body.requests))

    @router.post(
        "/v1/explain",
        response_model=schema.ExplainAnswer,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def explain(request: Request, body: schema.ItemBody) -> Any:
        """Say why an item suits a user; with ``Accept: text/event-stream`` as a stream of events."""
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(_streamed(service, body), media_type="text/event-stream")
        return await _while_there(request, service.explain(body))

    @router.post("/v1/explain/batch")
    async def explain_batch(request: Request, body: schema.ItemBatch) -> schema.ExplainAnswers:
        """Explain several items."""
        return schema.ExplainAnswers(answers=await _batch(request, service, service.explain, body.requests))

    @router.post("/v1/similar")
    async def similar(request: Request, body: schema.SimilarBody) -> schema.SimilarAnswer:
        """Find items like others."""
        return await _while_there(request, service.similar(body))

    # Cohere's client of its second version asks the one, its first version and Jina's the other.
    @router.post("/v2/rerank", operation_id="rerank_v2")
    @router.post("/v1/rerank", operation_id="rerank_v1")
    async def rerank(request: Request, body: schema.RerankBody) -> schema.RerankAnswer:
        """Order texts, in the form of Cohere and Jina; each line of ``query`` is a title of the history."""
        return await _while_there(request, _reranked(service, body))

    return router


def _knowledge(service: Service, door: Door) -> APIRouter:
    router = APIRouter(tags=["knowledge"], dependencies=[Depends(door.key)], responses=_said(*_ALWAYS))

    @router.get("/v1/models")
    async def models() -> schema.Models:
        """List the models, the default first; none while the engine starts for the first time."""
        return schema.Models(models=service.cards())

    @router.get("/v1/items")
    async def items(
        q: Annotated[str, Query(max_length=200, description="Looked for in titles and ids.")] = "",
        limit: Annotated[int, Query(ge=1, le=schema.MOST_ITEMS)] = 20,
        offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
    ) -> schema.FoundItems:
        """Look for items by title or id."""
        found, total = service.catalogue.search(q, limit=limit, offset=offset)
        return schema.FoundItems(items=[_item(item) for item in found], total=total)

    @router.get("/v1/items/{item_id:path}", responses=_said(404))
    async def item(item_id: _Id) -> schema.CatalogueItem:
        """Return an item."""
        return _item(service.catalogue.get(item_id))

    @router.put("/v1/items", responses=_said(*_POSTED, 503), dependencies=[Depends(door.admin)])
    async def put_items(body: schema.ItemsBody) -> schema.Stored:
        """Add or replace items; questions from then on know them."""
        found = [Item(item_id=each.item_id, title=each.title, fields=dict(each.fields)) for each in body.items]
        return schema.Stored(stored=await service.put_items(found))

    @router.delete("/v1/items/{item_id:path}", responses=_said(404, 503), dependencies=[Depends(door.admin)])
    async def remove_item(item_id: _Id) -> schema.Removed:
        """Remove an item; no list holds it from then on."""
        await service.remove_item(item_id)
        return schema.Removed(removed=1)

    @router.get("/v1/users/{user_id:path}", responses=_said(404))
    async def user(user_id: _Id) -> schema.KnownUser:
        """Return what a user did, oldest first."""
        return told(user_id, await service.user(user_id), service.catalogue.items)

    @router.delete("/v1/users/{user_id:path}", dependencies=[Depends(door.admin)])
    async def erase(user_id: _Id) -> schema.Erased:
        """Erase a person: events, and texts about the person."""
        return await service.erase(user_id)

    @router.post("/v1/events", responses=_said(*_POSTED, 404))
    async def events(body: schema.EventsBody) -> schema.Stored:
        """Extend the histories of users; it is stored once this is answered."""
        return schema.Stored(stored=await service.add_events(body))

    @router.post("/v1/reload", responses=_said(503), dependencies=[Depends(door.admin)])
    async def reload() -> schema.Models:
        """Read the models anew and put them in the place of those that answer meanwhile."""
        await service.reload()
        return schema.Models(models=service.cards())

    return router


async def _batch(request: Request, service: Service, ask: Callable[[Any], Any], bodies: Any) -> list[Any]:
    found = await _while_there(request, service.each(ask, bodies))
    answers: list[Any] = []
    for each in found:
        if isinstance(each, LlmrecError):
            answers.append(schema.Failed(error=_failure(each)[1]))
        elif isinstance(each, BaseException):
            raise each
        else:
            answers.append(each)
    return answers


async def _streamed(service: Service, body: schema.ItemBody) -> AsyncIterator[str]:
    try:
        async for event, data in service.streamed(body):
            yield f"event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
    except LlmrecError as error:
        yield f"event: error\ndata: {schema.Failed(error=_failure(error)[1]).model_dump_json()}\n\n"


async def _reranked(service: Service, body: schema.RerankBody) -> schema.RerankAnswer:
    model, places, usage = await service.rerank(body)
    texts = [each if isinstance(each, str) else str(each.get("text", "")) for each in body.documents]
    results = [
        schema.RerankResult(
            index=place, relevance_score=score, document={"text": texts[place]} if body.return_documents else None
        )
        for place, score in places[: body.top_n]
    ]
    return schema.RerankAnswer(
        id=service.next_id(),
        model=model,
        results=results,
        usage={"total_tokens": usage.prompt_tokens + usage.completion_tokens},
        meta={"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    )


def _item(item: Item) -> schema.CatalogueItem:
    return schema.CatalogueItem(item_id=item.item_id, title=item.title, fields=dict(item.fields))
