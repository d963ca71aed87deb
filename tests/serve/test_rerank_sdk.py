"""Rerank as others' clients ask for it: Cohere's own package, both versions of it, and Jina's documented body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.serve.served import Served

cohere = pytest.importorskip("cohere", reason="cohere is not installed")

QUERY = "Brindal Nook Blender\nTilsby Swift Juicer"
DOCUMENTS = ["Orlune Nook Hand Mixer", "Brindal Palm Peeler", "Kestwick Shelter Coat Stand", "A thing nobody sells"]
JINA = "jina-reranker-v2-base-multilingual"


@pytest.fixture(scope="module")
def expected(served: Served) -> list[int]:
    """Places of the documents as the service itself ranks them for a history of the query's lines."""
    body = {
        "history": [{"title": line} for line in QUERY.splitlines()],
        "candidates": [{"item_id": str(place), "title": text} for place, text in enumerate(DOCUMENTS)],
    }
    found = httpx.post(f"{served.url}/v1/rank", json=body, timeout=60).json()
    return [int(item["item_id"]) for item in found["items"]]


def client(served: Served, kind: Any, key: str | None = None) -> Any:
    return kind(base_url=served.keyed_url, api_key=key or served.key, timeout=60)


def jina(served: Served, **body: Any) -> dict[str, Any]:
    found = httpx.post(f"{served.keyed_url}/v1/rerank", json=body, headers=served.bearer(), timeout=60)
    assert found.status_code == 200, found.text
    return dict(found.json())


# --------------------------------------------------------------------------- Cohere's package


@pytest.mark.parametrize("kind", [cohere.ClientV2, cohere.Client], ids=["v2", "v1"])
@pytest.mark.parametrize("name", ["rerank-v3.5", "tuned"])
def test_all_documents_come_best_first(served: Served, expected: list[int], kind: Any, name: str) -> None:
    found = client(served, kind).rerank(model=name, query=QUERY, documents=DOCUMENTS)
    assert [each.index for each in found.results] == expected
    scores = [each.relevance_score for each in found.results]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)
    assert len(set(scores)) == len(DOCUMENTS)
    assert found.id and found.meta.billed_units.search_units == 1


@pytest.mark.parametrize("kind", [cohere.ClientV2, cohere.Client], ids=["v2", "v1"])
def test_the_first_are_the_same_when_few_are_asked_for(served: Served, kind: Any) -> None:
    asked = client(served, kind)
    every = asked.rerank(model="tuned", query=QUERY, documents=DOCUMENTS)
    few = asked.rerank(model="tuned", query=QUERY, documents=DOCUMENTS, top_n=2)
    assert [(each.index, each.relevance_score) for each in few.results] == [
        (each.index, each.relevance_score) for each in every.results[:2]
    ]
    assert len(asked.rerank(model="tuned", query=QUERY, documents=DOCUMENTS, top_n=99).results) == len(DOCUMENTS)


def test_the_query_decides(served: Served) -> None:
    asked = client(served, cohere.ClientV2)
    scores = [
        {each.index: each.relevance_score for each in asked.rerank(model="tuned", query=q, documents=DOCUMENTS).results}
        for q in (QUERY, "Orlune Palm Kettle")
    ]
    assert scores[0] != scores[1]


def test_the_first_version_takes_objects_and_returns_them(served: Served, expected: list[int]) -> None:
    documents = [{"text": text} for text in DOCUMENTS]
    asked = client(served, cohere.Client)
    found = asked.rerank(model="tuned", query=QUERY, documents=documents, return_documents=True)
    assert [each.index for each in found.results] == expected
    assert [each.document.text for each in found.results] == [DOCUMENTS[place] for place in expected]
    plain = asked.rerank(model="tuned", query=QUERY, documents=documents)
    assert all(each.document is None for each in plain.results)


@pytest.mark.parametrize("name", ["item-knn", "popularity"])
def test_models_that_know_no_texts_order_all(served: Served, name: str) -> None:
    found = client(served, cohere.ClientV2).rerank(model=name, query=QUERY, documents=DOCUMENTS)
    assert sorted(each.index for each in found.results) == list(range(len(DOCUMENTS)))


@pytest.mark.parametrize("kind", [cohere.ClientV2, cohere.Client], ids=["v2", "v1"])
def test_failures_are_those_of_the_package(served: Served, kind: Any) -> None:
    with pytest.raises(cohere.UnauthorizedError) as refused:
        client(served, kind, "llmrec_wrong").rerank(model="tuned", query=QUERY, documents=DOCUMENTS)
    assert refused.value.status_code == 401
    asked = client(served, kind)
    with pytest.raises(cohere.UnprocessableEntityError):
        asked.rerank(model="tuned", query=QUERY, documents=[])
    with pytest.raises(cohere.UnprocessableEntityError):
        asked.rerank(model="tuned", query=QUERY, documents=DOCUMENTS, top_n=0)
    with pytest.raises(cohere.UnprocessableEntityError):
        asked.rerank(model="tuned", query=QUERY, documents=["  "])


def test_equal_documents_share_their_place(served: Served) -> None:
    found = client(served, cohere.ClientV2).rerank(
        model="tuned", query=QUERY, documents=[DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]]
    )
    scores = {each.index: each.relevance_score for each in found.results}
    assert scores[0] == scores[2] and len(scores) == 3 and sum(scores.values()) == pytest.approx(1)


# --------------------------------------------------------------------------- Jina's body


@pytest.mark.parametrize("form", ["strings", "objects"])
def test_jinas_body_is_answered(served: Served, expected: list[int], form: str) -> None:
    documents: list[Any] = DOCUMENTS if form == "strings" else [{"text": text} for text in DOCUMENTS]
    found = jina(served, model=JINA, query=QUERY, documents=documents, top_n=3, return_documents=True)
    assert [each["index"] for each in found["results"]] == expected[:3]
    assert [each["document"] for each in found["results"]] == [{"text": DOCUMENTS[place]} for place in expected[:3]]
    assert found["usage"]["total_tokens"] > 0 and found["model"] == "tuned"


def test_what_is_returned_of_an_object_is_what_was_ranked(served: Served) -> None:
    """Of an object without a ``text`` its first value is read."""
    documents = [{"title": text} for text in DOCUMENTS[:2]]
    found = jina(served, model=JINA, query=QUERY, documents=documents, return_documents=True)
    assert [each["document"]["text"] for each in found["results"]] == [
        DOCUMENTS[each["index"]] for each in found["results"]
    ]


def test_jinas_documents_stay_away_when_they_are_not_wanted(served: Served) -> None:
    found = jina(served, model=JINA, query=QUERY, documents=DOCUMENTS, top_n=1, return_documents=False)
    (only,) = found["results"]
    assert only.get("document") is None and 0 < only["relevance_score"] <= 1


def test_documents_are_no_items_of_the_catalogue(served: Served) -> None:
    documents = [f"Nonsense {letter}" for letter in "ABCD"]
    for model in ("popularity", "item-knn"):
        body = {"model": model, "query": "Whatever", "documents": documents}
        found = httpx.post(f"{served.url}/v1/rerank", json=body).json()["results"]
        # Nobody has chosen any of them, so they stay as they were given.
        assert [each["index"] for each in found] == [0, 1, 2, 3], model
