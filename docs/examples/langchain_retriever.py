"""A LangChain retriever over a recommender: the query is the ID of a user, the documents are the recommended items."""

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever


class RecommendationRetriever(BaseRetriever):
    """Retrieves the list of a recommender that `llmrec.load` or `llmrec.fit` returned."""

    recommender: Any
    k: int = 10

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        ranked, items = self.recommender.rank(user=query, k=self.k), self.recommender.items
        return [
            Document(id=row.item_id, page_content=row.title, metadata={"score": row.score, **items[row.item_id].fields})
            for row in ranked
        ]
