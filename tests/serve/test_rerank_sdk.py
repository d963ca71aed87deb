"""Reranking with both versions of Cohere's client, and with Jina's body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.serve.served import Served

cohere = pytest.importorskip("cohere", reason="cohere is not installed")

QUERY = "Brindal Nook Blender\nTilsby Swift Juicer"
DOCUMENTS = ["Orlune Nook Hand Mixer", "Brindal Palm Peeler", "Kestwick Shelter Coat Stand", "Unsold thing"]
JINA = "jina-reranker-v2-base-multilingual"


@pytest.fixture(scope="module")
def expected(served: Served) -> list[int]:
    """Positions of the documents, ranked by the service for a history of the query's lines."""
    body = {
        "history": [{"title": line} for line in QUERY.splitlines()],
        "candidates": [{"item_id": str(n), "title": text} for n, text in enumerate(DOCUMENTS)],
    }
    response = httpx.post(f"{served.url}/v1/rank", json=body, timeout=60).json()
    return [int(item["item_id"]) for item in response["items"]]


def client(served: Served, kind: Any, key: str | None = None) -> Any:
    return kind(base_url=served.keyed_url, api_key=key or served.key, timeout=60)


def jina(served: Served, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{served.keyed_url}/v1/rerank", json=body, headers=served.bearer(), timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


@pytest.mark.parametrize("kind", [cohere.ClientV2, cohere.Client], ids=["v2", "v1"])
def test_documents_are_sorted(served: Served, expected: list[int], kind: Any) -> None:
    cohere_client = client(served, kind)
    # Model names of other services select the default model.
    response = cohere_client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS)
    assert [each.index for each in response.results] == expected
    scores = [each.relevance_score for each in response.results]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)
    assert len(set(scores)) == len(DOCUMENTS)
    assert response.id and response.meta.billed_units.search_units == 1
    first = cohere_client.rerank(model="tuned", query=QUERY, documents=DOCUMENTS, top_n=2).results
    assert [(each.index, each.relevance_score) for each in first] == [
        (each.index, each.relevance_score) for each in response.results[:2]
    ]
    other = cohere_client.rerank(model="tuned", query="Orlune Palm Kettle", documents=DOCUMENTS, top_n=99).results
    assert len(other) == len(DOCUMENTS) and {each.relevance_score for each in other} != set(scores)


def test_version_1_accepts_and_returns_objects(served: Served, expected: list[int]) -> None:
    documents = [{"text": text} for text in DOCUMENTS]
    cohere_client = client(served, cohere.Client)
    response = cohere_client.rerank(model="tuned", query=QUERY, documents=documents, return_documents=True)
    assert [each.index for each in response.results] == expected
    assert [each.document.text for each in response.results] == [DOCUMENTS[n] for n in expected]
    plain = cohere_client.rerank(model="tuned", query=QUERY, documents=documents)
    assert all(each.document is None for each in plain.results)


@pytest.mark.parametrize("name", ["item-knn", "popularity"])
def test_classic_models_keep_unknown_documents_in_order(served: Served, name: str) -> None:
    documents = [f"Nonsense {letter}" for letter in "ABCD"]
    results = client(served, cohere.ClientV2).rerank(model=name, query=QUERY, documents=documents).results
    assert [each.index for each in results] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [cohere.ClientV2, cohere.Client], ids=["v2", "v1"])
def test_errors_of_the_client(served: Served, kind: Any) -> None:
    with pytest.raises(cohere.UnauthorizedError) as refused:
        client(served, kind, "llmrec_wrong").rerank(model="tuned", query=QUERY, documents=DOCUMENTS)
    assert refused.value.status_code == 401
    for changes in ({"documents": []}, {"top_n": 0}, {"documents": ["  "]}):
        request = {"model": "tuned", "query": QUERY, "documents": DOCUMENTS} | changes
        with pytest.raises(cohere.UnprocessableEntityError):
            client(served, kind).rerank(**request)


def test_equal_documents_have_equal_scores(served: Served) -> None:
    response = client(served, cohere.ClientV2).rerank(
        model="tuned", query=QUERY, documents=[DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]]
    )
    scores = {each.index: each.relevance_score for each in response.results}
    assert scores[0] == scores[2] and len(scores) == 3 and sum(scores.values()) == pytest.approx(1)


@pytest.mark.parametrize("form", ["strings", "objects"])
def test_body_of_jina(served: Served, expected: list[int], form: str) -> None:
    documents: list[Any] = DOCUMENTS if form == "strings" else [{"text": text} for text in DOCUMENTS]
    body = {"model": JINA, "query": QUERY, "documents": documents, "top_n": 3}
    assert all(each.get("document") is None for each in jina(served, **body, return_documents=False)["results"])
    response = jina(served, **body, return_documents=True)
    assert [each["index"] for each in response["results"]] == expected[:3]
    assert [each["document"] for each in response["results"]] == [{"text": DOCUMENTS[n]} for n in expected[:3]]
    assert response["usage"]["total_tokens"] > 0 and response["model"] == "tuned"


def test_first_value_of_an_object_is_its_text(served: Served) -> None:
    documents = [{"title": text} for text in DOCUMENTS[:2]]
    response = jina(served, model=JINA, query=QUERY, documents=documents, return_documents=True)
    assert [each["document"]["text"] for each in response["results"]] == [
        DOCUMENTS[each["index"]] for each in response["results"]
    ]
