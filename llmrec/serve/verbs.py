"""The verbs (types of questions) of a service, each with request, response, documentation and implementation.

HTTP routes, batch routes (`llmrec.serve.app`) and tools for agents (`llmrec.serve.tools`) are derived from `VERBS`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from uuid import uuid4

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, create_model, model_validator
from pydantic_core import PydanticCustomError

from llmrec.answer.listing import COLD_START_NOTE, ListSpec
from llmrec.answer.prompting import CONTEXT_KEYS
from llmrec.answer.recommender import (
    RANK,
    SIMILAR,
    AnnotatedAnswer,
    Card,
    Question,
    Reasons,
    match_model_name,
    require_ranking,
)
from llmrec.chat.state import State
from llmrec.data.requests import parse_request
from llmrec.errors import DataError, LlmrecError
from llmrec.guard import clean
from llmrec.serve.images import item_image_url
from llmrec.serve.schema import (
    MAX_BATCH,
    MAX_CANDIDATES,
    MAX_EVENTS,
    MAX_TEXT_LENGTH,
    STRICT_NUMBER,
    Body,
    Bool,
    ChatAnswer,
    ChatBody,
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionMessage,
    DataId,
    Failed,
    Fields,
    Id,
    ItemText,
    ModelCard,
    OpenAIFailed,
    PastEvent,
    Prose,
    Rules,
    UserMessage,
    Words,
    milliseconds_since,
)
from llmrec.types import Answer, Cost, Item, Probability, Rating, Text, Unparsed

if TYPE_CHECKING:
    from llmrec.serve.service import Service

MAX_DOCUMENTS = 1000


# --------------------------------------------------------------------------- shared code


class _About(Body):
    """The user of a question: a known user, or a history, which takes precedence."""

    model: Annotated[Id, Field(description="A model from GET /v1/models. Default: the first model.")] | None = None
    id: Annotated[Id, Field(description="Seed of the request, for the order of equal scores and of labels.")] = "1"
    user_id: DataId | None = None
    history: Annotated[list[DataId | PastEvent], Field(max_length=MAX_EVENTS)] | None = None
    profile: Prose = ""
    show_prompt: Annotated[Bool, Field(description="Also return the model's prompt.")] = False


class Usage(BaseModel):
    """The cost of a language model's answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    forwards: int = 0


class _Answer(BaseModel):
    model: ModelCard
    notes: list[str] = []
    prompt: str | None = None
    usage: Usage = Usage()
    milliseconds: float = Field(description="Time from the request's arrival to its answer.")


class RankedItem(BaseModel):
    """An item of a list."""

    item_id: str
    title: str
    rank: int
    score: float = Field(description="Score on the model's scale; higher is better.")
    rationale: str | None = None
    fields: dict[str, str] = {}
    image: str | None = Field(
        None, description="URL of the item's image, from the fields image, image_url or image_link if it is valid."
    )


def model_card(card: Card | None) -> ModelCard:
    """Return the description of a model."""
    assert card is not None
    return ModelCard(
        name=card.name,
        kind=card.kind,
        signature=card.signature,
        answers=list(card.verbs),
        strategies=list(card.strategies),
    )


def answer_usage(cost: Cost) -> Usage:
    """Return the cost of a language model's answer."""
    return Usage(prompt_tokens=cost.prompt_tokens, completion_tokens=cost.completion_tokens, forwards=cost.forwards)


def ranked_items(answer: AnnotatedAnswer, items: Mapping[str, Item], reasons: Sequence[str] = ()) -> list[RankedItem]:
    """Return the items of a list, with explanations for the first ones."""
    ranking = require_ranking(answer)
    rows = zip(ranking.items, answer.titles, ranking.scores, strict=True)
    return [
        RankedItem(
            item_id=name,
            title=title,
            rank=position,
            score=score,
            rationale=(reasons[position - 1] or None) if position <= len(reasons) else None,
            fields=dict(items[name].fields) if name in items else {},
            image=item_image_url(items[name].fields) if name in items else None,
        )
        for position, (name, title, score) in enumerate(rows, start=1)
    ]


# --------------------------------------------------------------------------- rank


class RankBody(_About):
    """A ranking request; without ``candidates`` the whole catalogue is ranked."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"history": ["1", "2"], "k": 5}, {"user_id": "42", "candidates": ["7", "9"]}]}
    )

    candidates: Annotated[list[DataId | ItemText], Field(min_length=1, max_length=MAX_CANDIDATES)] | None = None
    k: Annotated[int, Field(ge=1, le=1000), STRICT_NUMBER] = 10
    strategy: Annotated[Id, Field(description="Ranking method of a language model; docs/ranking-methods.md.")] = "auto"
    exclude_seen: Bool = True
    rationale: Annotated[int, Field(ge=0, le=20, description="Number of top items to explain."), STRICT_NUMBER] = 0
    rules: Rules = Rules()


class RankAnswer(_Answer):
    """Items, best first."""

    items: list[RankedItem]
    cold: bool = Field(description="The user is unknown; the list contains popular items.")


async def rank(service: Service, body: RankBody) -> RankAnswer:
    """Rank the given candidates, or the whole catalogue."""
    begun = time.monotonic()
    rules = service.rules_with(body.rules)
    service.check_strategy(body.model, body.strategy)
    request = await service.request_of(body, candidates=body.candidates)
    request = replace(request, notes=(*request.notes, *service.unknown_note(body.rules.block)))
    wanted = ListSpec(body.k, body.model, body.strategy, body.exclude_seen, rules)
    (question, request), answer = await service.listed(request, wanted)
    reasons = Reasons()
    if body.rationale:
        first = min(body.rationale, body.k)
        reasons = (await service.between("reasons", question, [request], [answer], first))[0]
    notes = [
        *(note for note in answer.notes if note != COLD_START_NOTE),
        *reasons.notes,
        *([COLD_START_NOTE] if answer.cold else []),
    ]
    took = milliseconds_since(begun)
    shows = body.show_prompt and not answer.cold
    return RankAnswer(
        model=model_card(answer.card),
        items=ranked_items(answer, service.catalogue.items, reasons.texts),
        notes=notes,
        prompt=await service.between("prompt", question, request) if shows else None,
        usage=answer_usage(require_ranking(answer).cost + reasons.cost),
        cold=answer.cold,
        milliseconds=took,
    )


# --------------------------------------------------------------------------- one item


_ONE_ITEM_SCHEMA: Any = {
    "anyOf": [
        {"required": ["item_id"], "properties": {"item_id": {"type": ["string", "integer"]}}},
        {"required": ["item"], "properties": {"item": {"type": "object"}}},
    ]
}


def _no_id(value: object) -> object:
    """Reject an id where an item is expected."""
    if isinstance(value, str | int | float):
        raise PydanticCustomError("id", "Input should be an object with a title; give an id as item_id")
    return value


class ItemBody(_About):
    """A question about one item: its rating, the probability that it is liked, or an explanation."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"history": ["1", "2"], "item_id": "7"}], **_ONE_ITEM_SCHEMA}
    )

    item_id: Annotated[DataId, Field(description="An item of the catalogue.")] | None = None
    item: Annotated[
        ItemText | None, BeforeValidator(_no_id), Field(description="An item given by its title, instead of item_id.")
    ] = None
    context: Fields = Field({}, description="Further task inputs: review, feature, headline, rating.")

    @model_validator(mode="after")
    def _check_item(self) -> Self:
        if (self.item_id is None) is (self.item is None):
            raise PydanticCustomError("one-item", "give either item_id or item")
        return self

    @property
    def named(self) -> str | ItemText:
        """The item id or item text in the request."""
        item = self.item_id if self.item is None else self.item
        assert item is not None
        return item


async def answer_about_item(
    service: Service, family: str, body: ItemBody, listener: Callable[[str], None] | None = None
) -> tuple[Answer, Mapping[str, Any]]:
    """Answer a question about an item; also returns the fields that all answers share."""
    begun = time.monotonic()
    item = body.named
    if isinstance(item, str) and service.catalogue.items:
        service.catalogue.get(item)
    if unknown := sorted(body.context.keys() - CONTEXT_KEYS):
        raise DataError(
            f"context: {unknown[0]!r} is not a known context field; known fields: {', '.join(sorted(CONTEXT_KEYS))}",
            kind="unknown-key",
            column="context",
        )
    request = await service.request_of(body, candidates=[item])
    request = replace(request, context={**request.context, **body.context})
    question = Question(model=body.model, verb=family)
    if listener is None:
        result = await service.batcher.ask(question, request)
    else:
        (result,) = await service.between("answer", question, [request], listener=listener)
        if isinstance(result, LlmrecError):
            raise result
    answer = result.answer
    if isinstance(answer, Unparsed):
        raise DataError(f"{family}: {answer.reason}", kind="failed")
    return answer, {
        "model": model_card(result.card),
        "item_id": request.candidates[0].item_id,
        "notes": list(request.notes),
        "prompt": await service.between("prompt", question, request) if body.show_prompt else None,
        "usage": answer_usage(answer.cost),
        "milliseconds": milliseconds_since(begun),
    }


class RateAnswer(_Answer):
    """A predicted rating on the scale of the data."""

    item_id: str
    rating: float
    scale: tuple[float, float] | None


async def rate(service: Service, body: ItemBody) -> RateAnswer:
    """Predict a rating."""
    answer, common = await answer_about_item(service, "rating", body)
    assert isinstance(answer, Rating)
    return RateAnswer(**common, rating=answer.value, scale=service.engine.scale)


class PredictAnswer(_Answer):
    """The predicted probability that the user likes or chooses the item."""

    item_id: str
    probability: float


async def predict(service: Service, body: ItemBody) -> PredictAnswer:
    """Predict whether a user likes or chooses an item."""
    answer, common = await answer_about_item(service, "ctr", body)
    assert isinstance(answer, Probability)
    return PredictAnswer(**common, probability=answer.value)


class ExplainAnswer(_Answer):
    """Why the item suits the user: generated text, or the contributions of an ensemble's members."""

    item_id: str
    text: str


async def explain(service: Service, body: ItemBody, listener: Callable[[str], None] | None = None) -> ExplainAnswer:
    """Explain why an item suits a user; ``listener`` receives the text while it is generated."""
    answer, common = await answer_about_item(service, "explanation", body, listener)
    assert isinstance(answer, Text)
    return ExplainAnswer(**common, text=answer.text)


class AskBody(ItemBody):
    """A question for any task on which a model was trained."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"family": "rating", "history": ["1"], "item_id": "7"}], **_ONE_ITEM_SCHEMA}
    )

    family: Annotated[
        Id, Field(description="Task: rating, ctr, explanation, review or stars, if the model supports it.")
    ]


class AskAnswer(_Answer):
    """The answer to the task; fields of other tasks are null."""

    item_id: str
    family: str
    rating: float | None = None
    probability: float | None = None
    text: str | None = None


async def ask(service: Service, body: AskBody) -> AskAnswer:
    """Answer a question about an item for any task."""
    answer, common = await answer_about_item(service, body.family, body)
    return AskAnswer(
        **common,
        family=body.family,
        rating=answer.value if isinstance(answer, Rating) else None,
        probability=answer.value if isinstance(answer, Probability) else None,
        text=answer.text if isinstance(answer, Text) else None,
    )


# --------------------------------------------------------------------------- similar


class SimilarBody(Body):
    """A request for similar items."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"item_ids": ["1"], "k": 5}]})

    item_ids: Annotated[list[DataId], Field(min_length=1, max_length=20)]
    by: Annotated[Literal["interactions", "text"], Field(description="Similarity by common users, or by texts.")] = (
        "interactions"
    )
    candidates: (
        Annotated[
            list[DataId],
            Field(
                min_length=1,
                max_length=MAX_CANDIDATES,
                description="Rank only these items, such as the items in a history. Unknown items are left out.",
            ),
        ]
        | None
    ) = None
    k: Annotated[int, Field(ge=1, le=1000), STRICT_NUMBER] = 10
    rules: Rules = Field(default_factory=Rules)


class SimilarAnswer(BaseModel):
    """Items, most similar first."""

    model: ModelCard
    items: list[RankedItem]
    notes: list[str] = []
    milliseconds: float


async def similar(service: Service, body: SimilarBody) -> SimilarAnswer:
    """Find items that are similar to given items."""
    begun = time.monotonic()
    rules = service.rules_with(body.rules)
    for item in body.item_ids:
        service.catalogue.get(item)
    items = service.catalogue.items
    within = None if body.candidates is None else [item for item in body.candidates if item in items]
    if within == []:
        raise DataError("candidates: no candidate is in the catalogue", kind="unknown-name", column="candidates")
    record = {"history": list(body.item_ids), "candidates": within}
    request = parse_request(record, 1, items, whole=within is None)
    _, answer = await service.listed(request, ListSpec(body.k, body.by, rules=rules), SIMILAR)
    return SimilarAnswer(
        model=model_card(answer.card),
        items=ranked_items(answer, items),
        notes=[*answer.notes, *service.unknown_note(body.rules.block)],
        milliseconds=milliseconds_since(begun),
    )


# --------------------------------------------------------------------------- chat/completions


async def complete_conversation(service: Service, body: CompletionBody) -> Completion:
    """Answer the last message of a conversation, whose state is derived from the user's earlier messages."""
    created, state = int(time.time()), State()
    for message in body.messages:
        if isinstance(message, UserMessage):
            turn = ChatBody(text=message.text, state=state, model=body.model, k=body.k)
            answer = await service.conversations.answer(turn)
            state = answer.state
    names = [card.name for card in service.engine.cards]
    # a greeting is answered before the models are loaded
    model = body.model or next(iter(names), "")
    return Completion(
        id=f"chatcmpl-{uuid4().hex}",
        created=created,
        model=match_model_name(model, names) or model,
        choices=[CompletionChoice(message=CompletionMessage(content=answer.text))],
        items=answer.items,
    )


# --------------------------------------------------------------------------- rerank


class RerankBody(BaseModel):
    """A reranking request in the format of Cohere (v2) and Jina; other keys of these formats are ignored."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"examples": [{"query": "Toy Story (1995)", "documents": ["Aladdin (1992)", "Heat (1995)"]}]},
    )

    model: str | None = None
    query: Words
    documents: Annotated[list[Words | dict[str, JsonValue]], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=1), STRICT_NUMBER] | None = None
    return_documents: Bool = False


class RerankResult(BaseModel):
    """A ranked text with its relevance score."""

    index: int
    relevance_score: float = Field(description="Score in [0, 1]. The scores of all texts add up to 1.")
    document: dict[str, str] | None = None


class RerankAnswer(BaseModel):
    """Texts, best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: dict[str, int]
    meta: dict[str, JsonValue]


async def rerank(service: Service, body: RerankBody) -> RerankAnswer:
    """Rank texts for a query, whose lines are the titles of a history."""
    texts = [_document_text(document) for document in body.documents]
    history = [{"title": line} for line in body.query.splitlines() if line.strip()]
    if len(history) > MAX_EVENTS:
        reason = f"the query has {len(history)} lines, more than {MAX_EVENTS}; send only the last lines"
        raise DataError(reason, kind="too-large", column="query")
    # Texts are not items of the catalogue, even with equal ids: titles identify them, without duplicates.
    candidates = [{"title": text} for text in dict.fromkeys(texts)]
    request = parse_request({"history": history, "candidates": candidates}, 1, None)
    model = match_model_name(body.model or "", [card.name for card in service.engine.cards])
    answer = await service.batcher.ask(Question(model=model), request)
    assert answer.card is not None
    ranking = require_ranking(answer)
    share = dict(zip(ranking.items, _normalise_scores(ranking.scores, answer.card), strict=True))
    order = sorted(range(len(texts)), key=lambda index: (-share[clean(texts[index])], index))
    total = sum(share[clean(texts[index])] for index in order) or 1.0
    return RerankAnswer(
        id=str(uuid4()),
        model=answer.card.name,
        results=[
            RerankResult(
                index=index,
                relevance_score=share[clean(texts[index])] / total,
                document={"text": texts[index]} if body.return_documents else None,
            )
            for index in order[: body.top_n]
        ],
        usage={"total_tokens": ranking.cost.prompt_tokens + ranking.cost.completion_tokens},
        meta={
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "warnings": list(answer.notes),
        },
    )


def _normalise_scores(scores: Sequence[float], card: Card) -> list[float]:
    """Normalise scores to sum 1."""
    if card.kind == "language model":
        weights = np.exp(np.array(scores) - max(scores))
    else:
        weights = 1.0 / np.arange(1, len(scores) + 1)
    shares: list[float] = (weights / weights.sum()).tolist()
    return shares


def _document_text(document: str | Mapping[str, object]) -> str:
    """Return the text of a document."""
    text = document if isinstance(document, str) else document.get("text", next(iter(document.values()), ""))
    if not isinstance(text, str) or not text.strip():
        raise DataError("a document has no text; remove it", kind="empty", column="documents")
    if len(text) > MAX_TEXT_LENGTH:
        reason = f"a document has {len(text)} characters, more than {MAX_TEXT_LENGTH}; shorten it"
        raise DataError(reason, kind="too-large", column="documents")
    return text


# --------------------------------------------------------------------------- the table of verbs


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A type of question that a service answers.

    Attributes:
        name: The name in its route, ``/v1/NAME``.
        about: The description for HTTP.
        body: The request body.
        answer: The response body.
        ask: The function that answers.
        asks: What a model must support for it, `RANK` or a family; None: every service has it.
        batch: The description of its batch route; empty: none.
        event: The name of the events before its answer in a stream; then ``ask`` takes a listener. Empty: none.
        engine: Whether every question needs the engine, so that it is rejected early while the queue is full.
        versions: The versions of its routes.
        failed: The body of its failures.
    """

    name: str
    about: str
    body: type[BaseModel]
    answer: type[BaseModel]
    ask: Callable[..., Awaitable[Any]]
    asks: str | None = None
    batch: str = ""
    event: str = ""
    engine: bool = True
    versions: tuple[str, ...] = ("v1",)
    failed: type[BaseModel] = Failed

    async def stream(self, service: Service, body: Any) -> AsyncIterator[tuple[str, Any]]:
        """Yield the events before the answer, then ``done`` with the complete answer."""
        pieces: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(piece: Any) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        asking = asyncio.ensure_future(self.ask(service, body, listener))
        asking.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield self.event, {"text": piece} if isinstance(piece, str) else piece.model_dump(mode="json")
            yield "done", (await asking).model_dump(mode="json")
        finally:
            asking.cancel()


VERBS: Mapping[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb(
            name="rank",
            about="Rank candidates, or the whole catalogue, for a user.",
            body=RankBody,
            answer=RankAnswer,
            ask=rank,
            asks=RANK,
            batch="Rank for several users at once.",
        ),
        Verb(
            name="rate",
            about="Predict a user's rating of an item.",
            body=ItemBody,
            answer=RateAnswer,
            ask=rate,
            asks="rating",
            batch="Predict several ratings at once.",
        ),
        Verb(
            name="predict",
            about="Predict the probability that a user likes an item.",
            body=ItemBody,
            answer=PredictAnswer,
            ask=predict,
            asks="ctr",
            batch="Predict several probabilities at once.",
        ),
        Verb(
            name="explain",
            about="Explain why an item suits a user; streams with ``Accept: text/event-stream``.",
            body=ItemBody,
            answer=ExplainAnswer,
            ask=explain,
            asks="explanation",
            batch="Explain several items at once.",
            event="text",
        ),
        Verb(
            name="ask",
            about="Answer a request of any task that the model was trained on, such as the stars of a review.",
            body=AskBody,
            answer=AskAnswer,
            ask=ask,
        ),
        Verb(
            name="similar",
            about="Find similar items, in the catalogue or among candidates.",
            body=SimilarBody,
            answer=SimilarAnswer,
            ask=similar,
            batch="Find similar items for several requests at once.",
        ),
        Verb(
            name="chat",
            about="Answer one message of a conversation; streams with ``Accept: text/event-stream``.",
            body=ChatBody,
            answer=ChatAnswer,
            ask=lambda service, body, *listener: service.conversations.answer(body, *listener),
            event="call",
            engine=False,
        ),
        Verb(
            name="chat/completions",
            about="Answer the last message of a conversation, in the format of OpenAI.",
            body=CompletionBody,
            answer=Completion,
            ask=complete_conversation,
            engine=False,
            failed=OpenAIFailed,
        ),
        Verb(
            name="rerank",
            about="Rerank texts, in the format of Cohere and Jina.",
            body=RerankBody,
            answer=RerankAnswer,
            ask=rerank,
            # Cohere's client v2 uses /v2; Cohere's client v1 and Jina's client use /v1.
            versions=("v1", "v2"),
        ),
    )
}


@cache
def batch_body(body: type[BaseModel]) -> type[BaseModel]:
    """Return the request body for a batch of questions."""
    several = Annotated[list[body], Field(min_length=1, max_length=MAX_BATCH)]  # type: ignore[valid-type]
    doc = "Several requests; each succeeds or fails independently."
    return create_model(body.__name__.replace("Body", "Batch"), __base__=Body, __doc__=doc, requests=(several, ...))


@cache
def batch_answer(answer: type[BaseModel]) -> type[BaseModel]:
    """Return the response body for a batch of questions."""
    several = list[answer | Failed]  # type: ignore[valid-type]
    return create_model(f"{answer.__name__}s", __doc__="One per request, in order.", answers=(several, ...))
