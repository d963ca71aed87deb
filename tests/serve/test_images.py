"""Images of items: which URLs are valid, and what the policy of the page allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from llmrec.serve.images import MAX_ORIGINS, common_image_origins, item_image_url
from llmrec.types import Item

if TYPE_CHECKING:
    from tests.serve.served import Served

GOOD = "https://images.example.com/a/b_1.jpg?w=40&h=40"


def of(url: str, name: str = "n", field: str = "image") -> Item:
    return Item(item_id=name, title=name, fields={field: url})


@pytest.mark.parametrize(
    "url",
    [
        *(GOOD, "http://cdn.example.co.uk:8080/x.png", "https://example.com"),
        "HTTPS://Images.Example.COM/a%20b~(1),2.png#top",
    ],
)
def test_valid_urls(url: str) -> None:
    assert item_image_url({"image": url}) == url
    assert item_image_url({"title": "x", "image_url": f"  {url} "}) == url


@pytest.mark.parametrize(
    "url",
    [
        *("x.png", "//images.example.com/x.png", "data:image/png;base64,AAAA", "javascript:alert(1)", "file:///etc/x"),
        # Hosts of a local network.
        *("http://router/x.png", "http://127.0.0.1/x.png", "http://[::1]/x.png", "http://shop.localhost:8080/x.png"),
        *("https://printer.local/x.png", "https://metadata.google.internal/x.png"),
        # Characters that a header cannot contain.
        *("https://a.example.com:\u0661\u0662/x.png", "https://img.\u017fhop.com/x.png"),
        # Ends of a directive, and hidden hosts.
        *("https://example.com;script-src/x.png", "https://example.com'unsafe-inline'/x.png"),
        *("https://*.example.com/x.png", "https://user:secret@example.com/x.png"),
        *("https://example.com\\@evil.example.com/x.png", 'https://example.com/"onerror="x'),
        *("https://example.com/\nx.png", f"https://example.com/{'a' * 2000}"),
    ],
)
def test_invalid_urls(url: str) -> None:
    assert item_image_url({"image": url}) is None
    assert common_image_origins([of(url)]) == ()


def test_first_valid_field_and_value_count() -> None:
    fields = {"image_link": "https://c.example.com/3", "image": "none", "image_url": f"{GOOD}, https://b.example.com/2"}
    assert item_image_url(fields) == GOOD
    assert item_image_url({"picture": GOOD, "url": GOOD}) is None


def test_most_common_origins_are_allowed() -> None:
    items = [of(f"https://h{n}.example.com/x", f"i{n}") for n in range(40)]
    items += [of(f"https://H39.example.com/{n}", f"j{n}") for n in range(3)]
    allowed = common_image_origins(items)
    assert allowed[0] == "https://h39.example.com" and len(allowed) == len(set(allowed)) == MAX_ORIGINS


def test_policy_allows_the_hosts_of_images_only(served: Served) -> None:
    def allowed(path: str) -> list[str]:
        policy = httpx.get(f"{served.url}{path}").headers["content-security-policy"]
        (images,) = [part.split() for part in policy.split("; ") if part.startswith("img-src ")]
        assert [part for part in policy.split("; ") if "script-src" in part] == ["script-src 'self'"]
        return images[1:]

    assert allowed("/") == allowed("/chat") == ["'self'", "data:"]
    fields = {"image_url": GOOD}
    evil = {"image_url": "https://e.example.com; script-src *"}
    items = [{"item_id": "p-1", "title": "With an image", "fields": fields}]
    items += [{"item_id": "p-2", "title": "With a bad one", "fields": evil}]
    httpx.put(f"{served.url}/v1/items", json={"items": items}).raise_for_status()
    try:
        assert allowed("/") == ["'self'", "data:", "https://images.example.com"]
        assert allowed("/chat") == ["'self'", "data:"]
        body = {"history": ["k01"], "candidates": ["p-1", "p-2", "k02"], "model": "item-knn"}
        listed = httpx.post(f"{served.url}/v1/rank", json=body).json()["items"]
        assert {item["item_id"]: item["image"] for item in listed} == {"p-1": GOOD, "p-2": None, "k02": None}
    finally:
        for name in ("p-1", "p-2"):
            httpx.delete(f"{served.url}/v1/items/{name}")
    assert allowed("/") == ["'self'", "data:"]
