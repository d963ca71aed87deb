"""Bodies of the rerankers of Cohere (v2) and Jina: texts in, order out."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from llmrec.serve.schema import NUMBER, Bool, Words

MOST_DOCUMENTS = 1000


class RerankBody(BaseModel):
    """Texts in, order out: the form of Cohere (v2) and of Jina.

    Keys that these have and llmrec does not are passed by.
    """

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"examples": [{"query": "Toy Story (1995)", "documents": ["Aladdin (1992)", "Heat (1995)"]}]},
    )

    model: str | None = None
    query: Words
    documents: Annotated[list[Words | dict[str, JsonValue]], Field(min_length=1, max_length=MOST_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=1), NUMBER] | None = None
    return_documents: Bool = False


class RerankResult(BaseModel):
    """One text."""

    index: int
    relevance_score: float = Field(description="In [0, 1]; the scores of all texts add to 1.")
    document: dict[str, str] | None = None


class RerankAnswer(BaseModel):
    """Texts, best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: dict[str, int]
    meta: dict[str, JsonValue]
