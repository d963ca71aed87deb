"""The HTTP side: routes, statuses and OpenAPI over a `Service`. What each does is in `llmrec.serve.service`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer

from llmrec import __version__
from llmrec.data.read.limits import ID_LIMIT
from llmrec.errors import LlmrecError
from llmrec.serve import schema
from llmrec.serve.failures import answer_failures, failure, said
from llmrec.serve.forms import document_text, told
from llmrec.serve.gates import Auth, Authenticated, BodyLimit, Measured, Plain, SameOrigin, StrictRoute
from llmrec.serve.metrics import Metrics
from llmrec.serve.schema_chat import ChatAnswer, ChatBody
from llmrec.serve.schema_rerank import RerankAnswer, RerankBody, RerankResult
from llmrec.serve.service import Service
from llmrec.serve.talking import Talking
from llmrec.types import Item

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_OWN, _SWAGGER = "llmrec.serve", "fastapi_offline"
# Files of the pages: the package and folder that they are in, and their type.
_PAGE = {
    "page.js": (_OWN, "page", "text/javascript"),
    "chat.js": (_OWN, "page", "text/javascript"),
    "docs.js": (_OWN, "page", "text/javascript"),
    "page.css": (_OWN, "page", "text/css"),
    "swagger-ui-bundle.js": (_SWAGGER, "static", "text/javascript"),
    "swagger-ui.css": (_SWAGGER, "static", "text/css"),
}
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
_Id = Annotated[str, Path(min_length=1, max_length=ID_LIMIT, pattern=schema.NAME)]


_ALWAYS = (401, 403, 422, 429, 500, 503)
_NOT_NOW = (429, 503, 504)
_POSTED = (*_ALWAYS, 400, 413, 415)
_ASKED = (*_POSTED, 404, 504)


def make_app(service: Service, auth: Auth, *, body_limit: int = 1 << 20) -> FastAPI:
    """Make the application.

    Args:
        service: What answers.
        auth: Who may ask.
        body_limit: Bytes of a body.
    """
    talking = Talking(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        talking.close()
        await service.close()

    app = FastAPI(
        title="llmrec",
        version=__version__,
        summary="A recommender over HTTP.",
        lifespan=lifespan,
        # FastAPI's own page loads scripts from another site, and this service needs no network.
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    metrics = Metrics(service)
    answer_failures(app)
    app.include_router(_open_routes(service, metrics))
    # `Authenticated` asks for the key; this only describes it.
    bearer = HTTPBearer(auto_error=False, description="An API key, made by `llmrec serve-key`.")
    needed = [Depends(bearer)] if auth.keyed else []
    app.include_router(_questions(service, talking), dependencies=needed)
    app.include_router(_knowledge(service, auth), dependencies=needed)
    # The last is the first that a request meets.
    app.add_middleware(BodyLimit, most=body_limit)
    app.add_middleware(Authenticated, auth=auth)
    app.add_middleware(SameOrigin, keyed=auth.keyed)
    app.add_middleware(Plain)
    app.add_middleware(Measured, metrics=metrics)
    return app


# --------------------------------------------------------------------------- who waits


async def _while_there(service: Service, request: Request, work: Awaitable[_T]) -> _T:
    """Wait for an answer as long as the client does; what it no longer waits for leaves the queue.

    Raises:
        TooLate: If all that the answer takes lasts longer than a request may.
        HTTPException: If the client left; nobody reads that.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    asking, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        patience = service.settings.patience
        await asyncio.wait({asking, leaving}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return asking.result()
        if leaving.done():
            raise HTTPException(499, "the client left")
        raise service.batcher.late()
    finally:
        asking.cancel()
        leaving.cancel()


# --------------------------------------------------------------------------- routes


def _open_routes(service: Service, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return _asset(_OWN, "page", "index.html", "text/html")

    @router.get("/chat", include_in_schema=False)
    async def chat_page() -> Response:
        return _asset(_OWN, "page", "chat.html", "text/html")

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        answer = _asset(_OWN, "page", "docs.html", "text/html")
        # Swagger UI sets style attributes.
        answer.headers["Content-Security-Policy"] = _POLICY.replace("style-src", "style-src 'unsafe-inline'")
        return answer

    @router.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in _PAGE:
            raise HTTPException(404, "there is no such file")
        package, folder, kind = _PAGE[name]
        return _asset(package, folder, name, kind)

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


def _asset(package: str, folder: str, name: str, kind: str) -> Response:
    found = files(package).joinpath(folder, name).read_bytes()
    return Response(found, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)


def _questions(service: Service, talking: Talking) -> APIRouter:
    router = APIRouter(tags=["questions"], route_class=StrictRoute, responses=said(*_ASKED))

    @router.post("/v1/rank")
    async def rank(request: Request, body: schema.RankBody) -> schema.RankAnswer:
        """Rank candidates, or the whole catalogue, for a user."""
        return await _while_there(service, request, service.rank(body))

    @router.post("/v1/rank/batch")
    async def rank_batch(request: Request, body: schema.RankBatch) -> schema.RankAnswers:
        """Rank for several users."""
        return schema.RankAnswers(answers=await _batch(request, service, service.rank, body.requests))

    @router.post("/v1/rate")
    async def rate(request: Request, body: schema.ItemBody) -> schema.RateAnswer:
        """Predict a user's rating of an item."""
        return await _while_there(service, request, service.rate(body))

    @router.post("/v1/rate/batch")
    async def rate_batch(request: Request, body: schema.ItemBatch) -> schema.RateAnswers:
        """Predict several ratings."""
        return schema.RateAnswers(answers=await _batch(request, service, service.rate, body.requests))

    @router.post("/v1/predict")
    async def predict(request: Request, body: schema.ItemBody) -> schema.PredictAnswer:
        """Predict whether a user likes or chooses an item."""
        return await _while_there(service, request, service.predict(body))

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
            events = service.streamed(body)
            # What fails before the first of them has a status.
            first = await _while_there(service, request, anext(events))
            return StreamingResponse(_streamed(first, events), media_type="text/event-stream")
        return await _while_there(service, request, service.explain(body))

    @router.post("/v1/explain/batch")
    async def explain_batch(request: Request, body: schema.ItemBatch) -> schema.ExplainAnswers:
        """Explain several items."""
        return schema.ExplainAnswers(answers=await _batch(request, service, service.explain, body.requests))

    @router.post("/v1/ask")
    async def ask(request: Request, body: schema.AskBody) -> schema.AskAnswer:
        """Answer a question of any family that a model was tuned on, such as a review's headline or its stars."""
        return await _while_there(service, request, service.ask(body))

    @router.post("/v1/similar")
    async def similar(request: Request, body: schema.SimilarBody) -> schema.SimilarAnswer:
        """Find items like others."""
        return await _while_there(service, request, service.similar(body))

    @router.post(
        "/v1/chat",
        response_model=ChatAnswer,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def chat(request: Request, body: ChatBody) -> Any:
        """Answer one line of a conversation; with ``Accept: text/event-stream`` calls come as events before it."""
        if "text/event-stream" in request.headers.get("accept", ""):
            events = talking.streamed(body)
            first = await _while_there(service, request, anext(events))
            return StreamingResponse(_streamed(first, events), media_type="text/event-stream")
        return await _while_there(service, request, talking.answer(body))

    # Cohere's client of its second version asks the one, its first version and Jina's the other.
    @router.post("/v2/rerank", operation_id="rerank_v2")
    @router.post("/v1/rerank", operation_id="rerank_v1")
    async def rerank(request: Request, body: RerankBody) -> RerankAnswer:
        """Order texts, in the form of Cohere and Jina; each line of ``query`` is a title of the history."""
        return await _while_there(service, request, _reranked(service, body))

    return router


def _knowledge(service: Service, auth: Auth) -> APIRouter:
    router = APIRouter(tags=["knowledge"], route_class=StrictRoute, responses=said(*_ALWAYS))

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

    @router.get("/v1/items/{item_id:path}", responses=said(404))
    async def item(item_id: _Id) -> schema.CatalogueItem:
        """Return an item."""
        return _item(service.catalogue.get(item_id))

    @router.put("/v1/items", responses=said(*_POSTED), dependencies=[Depends(auth.admin)])
    async def put_items(body: schema.ItemsBody) -> schema.Stored:
        """Add or replace items; questions from then on know them."""
        found = [Item(item_id=each.item_id, title=each.title, fields=dict(each.fields)) for each in body.items]
        return schema.Stored(stored=await service.put_items(found))

    @router.delete("/v1/items/{item_id:path}", responses=said(404), dependencies=[Depends(auth.admin)])
    async def remove_item(item_id: _Id) -> schema.Removed:
        """Remove an item; no list holds it from then on."""
        await service.remove_item(item_id)
        return schema.Removed(removed=1)

    @router.get("/v1/users/{user_id:path}", responses=said(404))
    async def user(user_id: _Id) -> schema.KnownUser:
        """Return what a user did, oldest first."""
        return told(user_id, await service.user(user_id), service.catalogue.items)

    @router.delete("/v1/users/{user_id:path}", dependencies=[Depends(auth.admin)])
    async def erase(user_id: _Id) -> schema.Erased:
        """Erase a person: events, and texts about the person."""
        return await service.erase(user_id)

    @router.post("/v1/events", responses=said(*_POSTED, 404))
    async def events(body: schema.EventsBody) -> schema.Stored:
        """Extend the histories of users; it is stored once this is answered."""
        return schema.Stored(stored=await service.add_events(body))

    @router.post("/v1/reload", dependencies=[Depends(auth.admin)])
    async def reload() -> schema.Models:
        """Read the models anew and put them in the place of those that answer meanwhile."""
        await service.reload()
        return schema.Models(models=service.cards())

    return router


async def _batch(request: Request, service: Service, ask: Callable[[Any], Any], bodies: Any) -> list[Any]:
    """Answer several questions.

    Raises:
        LlmrecError: If none could be asked, because of the service and not because of the questions.
    """
    found = await _while_there(service, request, service.each(ask, bodies))
    if all(isinstance(each, LlmrecError) and failure(each)[0] in _NOT_NOW for each in found):
        raise found[0]
    answers: list[Any] = []
    for each in found:
        if isinstance(each, LlmrecError):
            answers.append(schema.Failed(error=failure(each)[1]))
        elif isinstance(each, Exception):
            log.error("a question of a batch failed that should not have", exc_info=each)
            defect = schema.Failure(kind="defect", message="this failed inside the service; its log says where")
            answers.append(schema.Failed(error=defect))
        else:
            answers.append(each)
    return answers


async def _streamed(first: tuple[str, Any], events: AsyncIterator[tuple[str, Any]]) -> AsyncIterator[str]:
    yield _event(*first)
    try:
        async for each in events:
            yield _event(*each)
    except LlmrecError as error:
        yield _event("error", schema.Failed(error=failure(error)[1]).model_dump())


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _reranked(service: Service, body: RerankBody) -> RerankAnswer:
    model, places, usage, notes = await service.rerank(body)
    texts = [document_text(each) for each in body.documents]
    results = [
        RerankResult(
            index=place, relevance_score=score, document={"text": texts[place]} if body.return_documents else None
        )
        for place, score in places[: body.top_n]
    ]
    return RerankAnswer(
        id=service.next_id(),
        model=model,
        results=results,
        usage={"total_tokens": usage.prompt_tokens + usage.completion_tokens},
        meta={"api_version": {"version": "2"}, "billed_units": {"search_units": 1}, "warnings": list(notes)},
    )


def _item(item: Item) -> schema.CatalogueItem:
    return schema.CatalogueItem(item_id=item.item_id, title=item.title, fields=dict(item.fields))
