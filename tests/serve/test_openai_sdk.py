"""Conversations with OpenAI's client: complete conversations, and errors in OpenAI's format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.serve.served import Served

openai = pytest.importorskip("openai", reason="openai is not installed")


def client(served: Served, key: str | None = None) -> Any:
    return openai.OpenAI(base_url=f"{served.keyed_url}/v1", api_key=key or served.key, timeout=120, max_retries=0)


def messages_of(*texts: str) -> list[dict[str, Any]]:
    """Return messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_conversation_follows_from_its_messages(served: Served) -> None:
    chat = client(served).chat.completions
    first = chat.create(model="item-knn", messages=messages_of("surprise me please"), extra_body={"k": 3})
    assert first.object == "chat.completion" and first.model.startswith("item-knn")
    assert first.choices[0].finish_reason == "stop" and first.choices[0].message.role == "assistant"
    text, items = first.choices[0].message.content, first.model_extra["items"]
    assert len(items) == 3 and all(item["title"] in text for item in items)
    messages = messages_of("surprise me please", text, "I have seen all of these, more please")
    second = chat.create(model="item-knn", messages=messages, extra_body={"k": 3})
    assert len(second.model_extra["items"]) == 3
    assert not {item["item_id"] for item in second.model_extra["items"]} & {item["item_id"] for item in items}
    body = {"text": messages[0]["content"], "model": "item-knn", "k": 3}
    state = httpx.post(f"{served.url}/v1/chat", json=body).json()["state"]
    body = {"text": messages[2]["content"], "state": state, "model": "item-knn", "k": 3}
    assert second.choices[0].message.content == httpx.post(f"{served.url}/v1/chat", json=body).json()["text"]


def test_other_roles_and_keys_are_ignored(served: Served) -> None:
    chat = client(served).chat.completions
    plain = chat.create(model="item-knn", messages=messages_of("surprise me please"))
    parts = [{"type": "text", "text": "surprise me please"}]
    messages = [{"role": "system", "content": "obey " * 2000}, {"role": "user", "content": parts}]
    more = chat.create(model="item-knn", messages=messages, temperature=0.7, max_tokens=9, stream=False, n=1, user="u")
    assert more.choices[0].message.content == plain.choices[0].message.content and more.id != plain.id


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"stream": True}, "stream", "streaming is not supported"),
        ({"n": 2}, "n", "one choice"),
        ({"messages": messages_of("hello", "Hello!")}, "messages", "role user"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.0.content", ""),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 3000}] * 2}]}, "messages.0", "4000"),
        ({"extra_body": {"k": 0}}, "k", ""),
    ],
)
def test_unsupported_requests_have_status_400(served: Served, changes: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client(served).chat.completions.create(**{"model": "item-knn", "messages": messages_of("hello")} | changes)
    error = refused.value
    assert (error.status_code, error.type, error.code) == (400, "invalid_request_error", "bad-value")
    assert error.param == param and words in str(error)


def test_errors_of_the_client(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client(served).chat.completions.create(model="unknown", messages=messages_of("hello"))
    assert missing.value.param == "model" and missing.value.code == "unknown-name"
    with pytest.raises(openai.AuthenticationError) as refused:
        client(served, "llmrec_wrong").chat.completions.create(model="item-knn", messages=messages_of("hello"))
    assert refused.value.type == "invalid_request_error" and "API key" in str(refused.value)
    headers = {**served.bearer(), "Content-Type": "application/json"}
    response = httpx.post(f"{served.keyed_url}/v1/chat/completions", content=b"{", headers=headers)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
