"""The clients of `tests.serve.clients`, with the installed packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.serve import clients

if TYPE_CHECKING:
    from tests.serve.served import Served

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", clients.CLIENTS)
def test_client_gets_an_answer(served: Served, name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    assert clients.CLIENTS[name](served.keyed_url, served.key, "item-knn")


def test_retriever_equals_the_recommender(served: Served) -> None:
    pytest.importorskip("langchain_core", reason="langchain-core is not installed")
    import llmrec

    with llmrec.load(str(served.run), models=["item-knn"]) as rec:
        documents = clients.retriever()(recommender=rec, k=3).invoke("u01")
        ranked = rec.rank(user="u01", k=3)
        assert [(each.id, each.page_content, each.metadata["score"]) for each in documents] == [
            (row.item_id, row.title, row.score) for row in ranked
        ]
        assert all(rec.items[each.id].fields.items() <= each.metadata.items() for each in documents)
