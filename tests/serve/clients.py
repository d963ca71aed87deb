"""Test a running service with other clients: ``python -m tests.serve.clients URL [--key KEY] [--model FOLDER]``.

The clients of OpenAI, Cohere and MCP use HTTP (the service needs ``--mcp``); the retriever of LangChain opens the
folder of the model.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

_RETRIEVER = Path(__file__).resolve().parents[2] / "docs" / "examples" / "langchain_retriever.py"


def openai(url: str, key: str, model: str) -> str:
    """Return the reply to a message."""
    from openai import OpenAI

    chat = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).chat.completions
    reply = chat.create(model=model, messages=[{"role": "user", "content": "surprise me please"}])
    return str(reply.choices[0].message.content)


def cohere(url: str, key: str, model: str) -> str:
    """Return the better of two texts."""
    from cohere import ClientV2

    texts = ["Alien (1979)", "Aladdin (1992)"]
    results = ClientV2(base_url=url, api_key=key).rerank(model=model, query="Aliens (1986)", documents=texts, top_n=1)
    return texts[results.results[0].index]


def mcp(url: str, key: str, model: str) -> str:
    """Return the titles that a tool recommends."""
    import httpx2
    from mcp import Client
    from mcp.client.streamable_http import streamable_http_client

    async def call() -> Any:
        http = httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=60)
        async with http, Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client:
            return await client.call_tool("recommend", {"model": model, "k": 2})

    answer = asyncio.run(call())
    assert not answer.is_error, answer.content
    return ", ".join(item["title"] for item in answer.structured_content["items"])


CLIENTS: Mapping[str, Callable[[str, str, str], str]] = {"openai": openai, "cohere": cohere, "mcp": mcp}
"""Clients over HTTP by the names of their packages; each takes an address, a key and a model of the service."""


def retriever() -> Any:
    """Return the class of the documented retriever of LangChain."""
    spec = importlib.util.spec_from_file_location("langchain_retriever", _RETRIEVER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RecommendationRetriever


def langchain(folder: str, model: str, user: str) -> str:
    """Return the titles that the retriever finds for a user."""
    import llmrec

    with llmrec.load(folder, models=[model]) as rec:
        results = retriever()(recommender=rec, k=2).invoke(user or rec.users[0])
    return ", ".join(document.page_content for document in results)


def main() -> None:
    """Use every client, and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--key", default="none", help="an API key of the service")
    parser.add_argument("--by", default="item-knn", help="the model that answers")
    parser.add_argument("--model", help="the folder of the model, for LangChain")
    parser.add_argument("--user", default="", help="a user of this folder")
    options = parser.parse_args()
    for name, ask in CLIENTS.items():
        sys.stdout.write(f"{name} {version(name)}: {ask(options.url, options.key, options.by)!r}\n")
    if options.model:
        titles = langchain(options.model, options.by, options.user)
        sys.stdout.write(f"langchain-core {version('langchain-core')}: {titles!r}\n")


if __name__ == "__main__":
    main()
