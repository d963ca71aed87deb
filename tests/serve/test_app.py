"""Every endpoint over HTTP, on a real service with a toy model."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.serve.fake_engine import faking
from tests.serve.served import Served, failure

pytest.importorskip("prometheus_client", reason="the serve extra is not installed")

from prometheus_client.parser import text_string_to_metric_families

from llmrec.metrics.stats import wilson_interval

# One of each kind; tests/serve/test_same_lists.py compares further ones.
MODELS = ("tuned", "item-knn")
HISTORY = ["k01", "k04", "k07"]


class Client:
    """A client of one service."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=120)

    def post(self, path: str, **body: Any) -> Any:
        response = self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def get(self, path: str) -> Any:
        response = self.http.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    def rank(self, **body: Any) -> list[str]:
        return ids(self.post("/v1/rank", **body))

    def put(self, *items: dict[str, Any]) -> None:
        response = self.http.put("/v1/items", json={"items": items})
        assert (response.status_code, response.json()) == (200, {"stored": len(items)})

    def refused(self, path: str, status: int, **body: Any) -> dict[str, Any]:
        return failure(self.http.post(path, json=body), status)


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Client]:
    client = Client(served.url)
    yield client
    client.http.close()


@pytest.fixture(scope="module")
def catalogue(client: Client) -> dict[str, dict[str, Any]]:
    """The items of the toy run: forty products."""
    items = {item["item_id"]: item for item in client.get("/v1/items?limit=1000")["items"]}
    return {name: item for name, item in items.items() if name.startswith("k") and len(name) == 3}


@contextmanager
def added(client: Client, *items: dict[str, Any]) -> Iterator[None]:
    """Put items, and remove them at the end, because other tests use the same service."""
    client.put(*items)
    try:
        yield
    finally:
        for item in items:
            client.http.delete(f"/v1/items/{quote(item['item_id'], safe='')}")


def product(name: str, title: str, **fields: str) -> dict[str, Any]:
    return {"item_id": name, "title": title, "fields": fields}


@pytest.mark.parametrize("model", MODELS)
def test_list_is_sorted_and_described(client: Client, catalogue: dict[str, Any], model: str) -> None:
    answer = client.post("/v1/rank", history=HISTORY, k=5, model=model)
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4, 5]
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True) and all(math.isfinite(score) for score in scores)
    for item in answer["items"]:
        assert {key: item[key] for key in ("item_id", "title", "fields")} == catalogue[item["item_id"]]
    assert not set(ids(answer)) & set(HISTORY) and len(set(ids(answer))) == 5
    assert answer["model"]["name"] == model and answer["cold"] is False and answer["prompt"] is None
    assert (answer["usage"]["forwards"] > 0) is (model == "tuned")


@pytest.mark.parametrize("model", MODELS)
def test_known_user_is_ranked_by_the_stored_history(client: Client, model: str) -> None:
    events = client.get("/v1/users/u02")["history"]
    history = [{key: event[key] for key in ("item_id", "rating", "timestamp")} for event in events]
    by_id = client.post("/v1/rank", user_id="u02", k=6, model=model)
    by_history = client.post("/v1/rank", history=history, k=6, model=model)
    assert by_id["items"] == by_history["items"]
    # A history of the request replaces the stored one.
    both = client.post("/v1/rank", user_id="u02", history=HISTORY, k=6, model=model)
    assert both["items"] == client.post("/v1/rank", history=HISTORY, k=6, model=model)["items"]


@pytest.mark.parametrize("model", MODELS)
def test_each_candidate_is_ranked_once(client: Client, model: str) -> None:
    candidates = ["k10", "k30", "k01", "k20", "k10"]
    answer = client.post("/v1/rank", history=HISTORY, candidates=candidates, model=model)
    # A seen item is ranked if it is a candidate.
    assert sorted(ids(answer)) == ["k01", "k10", "k20", "k30"]
    assert any("k10" in note for note in answer["notes"])
    first = client.rank(history=HISTORY, candidates=candidates, model=model, k=2)
    assert first == ids(answer)[:2]


def test_candidates_may_have_other_titles(client: Client) -> None:
    candidates = [{"title": "Unsold thing"}, {"item_id": "k02", "title": "Another title"}, "k03"]
    answer = client.post("/v1/rank", history=HISTORY, candidates=candidates)
    titles = {item["item_id"]: item["title"] for item in answer["items"]}
    assert titles["Unsold thing"] == "Unsold thing"
    assert titles["k02"] == "Another title" and titles["k03"] == "Orlune Nook Hand Mixer"


def test_prompt_and_rationale_are_optional(client: Client, catalogue: dict[str, Any]) -> None:
    answer = client.post("/v1/rank", history=HISTORY, candidates=["k10", "k20"], show_prompt=True, rationale=1)
    assert catalogue["k01"]["title"] in answer["prompt"] and catalogue["k07"]["title"] in answer["prompt"]
    first, second = answer["items"]
    assert second["rationale"] is None and answer["usage"]["completion_tokens"] > 0
    assert first["rationale"] is None or isinstance(first["rationale"], str)
    classic = client.post("/v1/rank", history=HISTORY, model="markov", show_prompt=True, rationale=1)
    assert classic["prompt"] is None and any("markov" in note for note in classic["notes"])


def test_unknown_user_gets_popular_items(client: Client) -> None:
    for body in ({}, {"user_id": "unknown"}, {"history": []}, {"history": ["no-such-item"]}):
        answer = client.post("/v1/rank", k=5, **body)
        assert answer["cold"] is True and answer["model"]["name"] == "popularity", body
        assert ids(answer) == client.rank(history=["k40"], k=5, model="popularity", exclude_seen=False)
    cold = client.post("/v1/rank", candidates=["k10", "k20", "k30"], model="tuned")
    assert cold["cold"] is True and sorted(ids(cold)) == ["k10", "k20", "k30"]
    # A profile is enough.
    assert client.post("/v1/rank", profile="likes kettles", candidates=["k10", "k20"])["cold"] is False


def brand(catalogue: dict[str, Any], *names: str) -> set[str]:
    return {name for name, item in catalogue.items() if item["fields"]["brand"] in names}


@pytest.mark.parametrize("model", MODELS)
def test_rules_forbid_and_allow_items(client: Client, catalogue: dict[str, Any], model: str) -> None:
    brindal = brand(catalogue, "Brindal")
    storage = {name for name, item in catalogue.items() if item["fields"]["category"] == "storage"}
    both = {"only": {"brand": ["Brindal"]}, "without": {"category": ["storage"]}, "block": ["k01", "no-such"]}
    for rules, allowed, exclude_seen in (
        ({}, set(catalogue), True),
        ({"only": {"brand": ["brindal ", "TILSBY"]}}, brand(catalogue, "Brindal", "Tilsby"), False),
        (both, brindal - storage - {"k01"}, True),
    ):
        expected = allowed - (set(HISTORY) if exclude_seen else set())
        listed = client.rank(history=HISTORY, k=1000, model=model, rules=rules, exclude_seen=exclude_seen)
        assert set(listed) & set(catalogue) == expected and len(listed) == len(set(listed))
        # A shorter list is the beginning of a longer one.
        assert client.rank(history=HISTORY, k=4, model=model, rules=rules, exclude_seen=exclude_seen) == listed[:4]
        candidates = [*list(catalogue)[:12], *list(catalogue)[-3:]]
        ranked = client.rank(history=HISTORY, candidates=candidates, model=model, rules=rules, k=1000)
        assert set(ranked) == set(candidates) & allowed
    quotas = {"quotas": [{"field": "brand", "most": 2}], "diversity": 0.5}
    brands = Counter(catalogue[name]["fields"]["brand"] for name in client.rank(history=HISTORY, k=10, rules=quotas))
    assert brands.total() == 10 and max(brands.values()) <= 2


def test_rules_hold_for_cold_users_and_similar_items(client: Client, catalogue: dict[str, Any]) -> None:
    rules = {"only": {"brand": ["Orlune"]}, "block": ["k03"]}
    expected = brand(catalogue, "Orlune") - {"k03"}
    assert set(client.rank(k=1000, rules=rules)) == expected
    for by in ("interactions", "text"):
        assert set(ids(client.post("/v1/similar", item_ids=["k06"], k=1000, by=by, rules=rules))) == expected - {"k06"}


def test_rejects_wrong_rules(client: Client) -> None:
    for rules, kind in (
        ({"only": {"brand": ["Unknown"]}}, "empty"),
        ({"only": {"brnad": ["Orlune"]}}, "unknown-name"),
        ({"quotas": [{"field": "colour", "most": 1}]}, "unknown-name"),
        ({"only": {"brand": []}}, "bad-value"),
        ({"diversity": 1.5}, "bad-value"),
        ({"olny": {}}, "bad-value"),
    ):
        assert client.refused("/v1/rank", 422, history=HISTORY, rules=rules)["kind"] == kind, rules


def test_rules_that_leave_only_new_items(client: Client) -> None:
    """A language model that does not search reranks the items of a classic recommender, which finds none here."""
    with added(client, product("fresh1", "Fresh Thing", brand="Fresh"), product("fresh2", "Fresh Two", brand="Fresh")):
        rules = {"only": {"brand": ["Fresh"]}}
        assert sorted(client.rank(history=HISTORY, rules=rules, model="tuned")) == ["fresh1", "fresh2"]
        refused = client.refused("/v1/rank", 422, history=HISTORY, rules=rules, strategy="likelihood")
        assert refused["kind"] == "failed"
        assert client.rank(history=HISTORY, rules=rules, model="markov") == []
        assert sorted(client.rank(history=HISTORY, rules=rules, candidates=["fresh1", "fresh2", "k02"])) == [
            "fresh1",
            "fresh2",
        ]
        results = client.post("/v1/similar", item_ids=["k01"], by="text", rules=rules)
        assert sorted(ids(results)) == ["fresh1", "fresh2"]


def test_unknown_names_have_status_404(client: Client) -> None:
    for path, body, at in (
        ("/v1/rank", {"history": HISTORY, "model": "no-such"}, "model"),
        ("/v1/rank", {"history": HISTORY, "candidates": ["no-such"]}, "candidates"),
        ("/v1/rate", {"history": HISTORY, "item_id": "no-such"}, "item_id"),
        ("/v1/predict", {"history": HISTORY, "item_id": "no-such"}, "item_id"),
        ("/v1/explain", {"history": HISTORY, "item_id": "no-such"}, "item_id"),
        ("/v1/similar", {"item_ids": ["k01", "no-such"]}, "item_id"),
        ("/v1/events", {"events": [{"user_id": "u1", "item_id": "no-such"}]}, "item_id"),
    ):
        error = client.refused(path, 404, **body)
        assert (error["kind"], error["at"]) == ("unknown-name", at), path
    for path in ("/v1/items/no-such", "/v1/users/unknown", "/v1/no-such", "/page/no-such.js"):
        assert failure(client.http.get(path), 404)["kind"] == "unknown-name"
    assert failure(client.http.delete("/v1/items/no-such"), 404)["at"] == "item_id"


def test_rejects_unsupported_task_and_strategy(client: Client) -> None:
    for path in ("/v1/rate", "/v1/explain"):
        error = client.refused(path, 422, history=HISTORY, item_id="k10", model="markov")
        assert (error["kind"], error["at"]) == ("unsupported", "model") and "rank" in error["message"]
    assert client.refused("/v1/rank", 422, history=HISTORY, model="markov", strategy="list")["at"] == "strategy"
    error = client.refused("/v1/rank", 422, history=HISTORY, strategy="lst")
    assert (error["kind"], error["at"]) == ("unknown-name", "strategy") and "'list'" in error["message"]


def test_error_names_the_wrong_key(client: Client) -> None:
    for body, at in (
        ({"histroy": HISTORY}, "histroy"),
        ({"history": HISTORY, "k": 0}, "k"),
        ({"history": HISTORY, "k": "5"}, "k"),
        ({"history": HISTORY, "exclude_seen": 1}, "exclude_seen"),
        ({"history": HISTORY, "candidates": []}, "candidates"),
        ({"history": [{}]}, "history.0"),
        ({"history": ["k01", {"item_id": "k02", "rating": "five"}]}, "history.1.rating"),
        ({"history": ["k01", {"item_id": "k02", "text": "good"}]}, "history.1.text"),
        ({"history": ["a\nb"]}, "history.0"),
        ({"history": ["k01", True]}, "history.1"),
        ({"candidates": ["k01", {"item_id": 2**53}]}, "candidates.1.item_id"),
        ({"history": HISTORY, "rules": {"quotas": [{"field": "brand"}]}}, "rules.quotas.0.most"),
        ({"id": ""}, "id"),
    ):
        error = client.refused("/v1/rank", 422, **body)
        assert (error["kind"], error["at"]) == ("bad-value", at), body
    for body in ({}, {"item_id": "k10", "item": {"title": "Own"}}, {"item": "k10"}):
        assert "item_id" in client.refused("/v1/rate", 422, history=HISTORY, **body)["message"], body
    message = client.refused("/v1/events", 422, events=[{"user_id": "u", "item_id": "k01", "timestmp": 1}])["message"]
    assert message == "events.0.timestmp: unknown key (did you mean 'timestamp'?)"
    message = client.refused("/v1/rank", 422, histroy=HISTORY)["message"]
    assert message == "histroy: unknown key (did you mean 'history'?)"
    # Keys named like a type or a tag of the schema.
    for key in ("user", "State", "str"):
        error = client.refused("/v1/rank", 422, **{key: "u01"})
        assert error["at"] == key and error["message"].startswith(f"{key}: unknown key"), key


def test_ratings_and_probabilities_are_in_range(client: Client) -> None:
    rate = client.post("/v1/rate", history=HISTORY, item_id="k10", show_prompt=True)
    low, high = rate["scale"]
    assert (low, high) == (1.0, 5.0) and low <= rate["rating"] <= high and rate["item_id"] == "k10"
    assert "Yarrowell Palm Teapot" in rate["prompt"]
    predict = client.post("/v1/predict", user_id="u01", item={"title": "Unsold thing"})
    assert 0 <= predict["probability"] <= 1 and predict["item_id"] == "Unsold thing"
    assert rate["rating"] == client.post("/v1/rate", history=HISTORY, item_id="k10")["rating"]


def test_explanation_as_text_and_as_events(client: Client) -> None:
    body = {"history": HISTORY, "item_id": "k10"}
    plain = client.post("/v1/explain", **body)
    assert plain["item_id"] == "k10" and plain["usage"]["completion_tokens"] > 0
    with client.http.stream("POST", "/v1/explain", json=body, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
        events = read_events(answer.iter_lines())
    names = [name for name, _ in events]
    assert names == ["text"] * (len(events) - 1) + ["done"]
    done = events[-1][1]
    # What a toy model writes may end in the middle of a character.
    assert done["text"].startswith("".join(data["text"] for name, data in events if name == "text"))
    for key in ("text", "model", "usage", "item_id", "notes"):
        assert done[key] == plain[key]


def read_events(lines: Iterator[str]) -> list[tuple[str, Any]]:
    """Read a stream as a browser does."""
    events, name = [], ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            events.append((name, json.loads(line.removeprefix("data: "))))
        else:
            assert line == ""
    return events


def test_failure_before_the_first_event_has_a_status(client: Client) -> None:
    for body, status in (({"item_id": "no-such"}, 404), ({"item_id": "k10", "model": "markov"}, 422), ({}, 422)):
        answer = client.http.post(
            "/v1/explain", json={"history": HISTORY, **body}, headers={"Accept": "text/event-stream"}
        )
        failure(answer, status)


def test_invalid_request_of_a_batch_affects_no_other(client: Client) -> None:
    questions: list[dict[str, Any]] = [
        {"history": HISTORY, "candidates": ["k10", "k20", "k30"]},
        {"history": HISTORY, "candidates": ["no-such"]},
        {"history": HISTORY, "k": 3, "model": "markov"},
        {"history": HISTORY, "model": "no-such"},
        {"history": ["k20"], "candidates": ["k10", "k20", "k30"]},
        {"history": HISTORY, "rules": {"only": {"brand": ["Unknown"]}}},
        {"user_id": "u01", "k": 2},
    ]
    answers = client.post("/v1/rank/batch", requests=questions)["answers"]
    assert [each.get("error", {}).get("kind") for each in answers] == [
        *(None, "unknown-name", None, "unknown-name", None, "empty", None)
    ]
    for question, answer in zip(questions, answers, strict=True):
        if "error" not in answer:
            assert answer["items"] == client.post("/v1/rank", **question)["items"]
        else:
            assert answer["error"] == client.http.post("/v1/rank", json=question).json()["error"]


@pytest.mark.parametrize(("verb", "key"), [("rate", "rating"), ("explain", "text")])
def test_batch_about_items_keeps_its_order(client: Client, verb: str, key: str) -> None:
    items = ["k10", "no-such", "k20", "k30"]
    questions = [{"history": HISTORY, "item_id": item} for item in items]
    answers = client.post(f"/v1/{verb}/batch", requests=questions)["answers"]
    assert [each.get("item_id") for each in answers] == ["k10", None, "k20", "k30"]
    alone = client.post(f"/v1/{verb}", **questions[2])
    assert answers[2][key] == (alone[key] if verb == "explain" else pytest.approx(alone[key], abs=1e-5))


def test_rejects_malformed_batch(client: Client) -> None:
    error = client.refused("/v1/rank/batch", 422, requests=[{"history": HISTORY}, {"histroy": HISTORY}])
    assert error["at"] == "requests.1.histroy"
    assert client.refused("/v1/rank/batch", 422, requests=[])["at"] == "requests"
    assert client.refused("/v1/rank/batch", 422, requests=[{}] * 65)["at"] == "requests"


def test_added_item_is_known_at_once(client: Client) -> None:
    new = product("p-new", "Zephyrine Glass Kettle", brand="Zephyrine", category="coffee and tea")
    with added(client, new):
        assert client.get("/v1/items/p-new") == new
        assert client.get("/v1/items?q=zephyrine")["items"] == [new]
        assert client.get("/v1/items?q=p-new")["total"] == 1
        assert "p-new" in client.rank(history=HISTORY, candidates=["p-new", "k10"])
        assert "p-new" in client.rank(history=HISTORY, candidates=["p-new", "k10"], model="markov")
        # Its title is what the model reads, in a history and as a candidate.
        answer = client.post("/v1/rank", history=["p-new"], candidates=["k10", "k20"], show_prompt=True)
        assert "Zephyrine Glass Kettle" in answer["prompt"]
        assert client.post("/v1/rate", history=HISTORY, item_id="p-new")["item_id"] == "p-new"
        assert "p-new" in ids(client.post("/v1/similar", item_ids=["k06"], by="text", k=50))
        for by in ("interactions", "text"):
            similar = client.post("/v1/similar", item_ids=["p-new"], by=by, k=5)
            assert "p-new" not in ids(similar) and all(math.isfinite(item["score"]) for item in similar["items"])
        # Rules see its fields.
        assert client.rank(history=HISTORY, candidates=["p-new", "k10"], rules={"only": {"brand": ["zephyrine"]}}) == [
            "p-new"
        ]
        again = product("p-new", "Zephyrine Iron Kettle", brand="Other")
        client.put(again)
        assert client.get("/v1/items/p-new") == again and client.get("/v1/items?q=glass kettle")["total"] == 0
        assert client.rank(history=["p-new"], k=2, model="item-knn")


def test_similar_items_among_candidates_in_a_batch(client: Client) -> None:
    past = ["k02", "k06", "k20", "no-such"]
    requests = [{"item_ids": [name], "candidates": past, "k": 2} for name in ("k01", "k06")]
    results = client.post("/v1/similar/batch", requests=[*requests, {**requests[0], "candidates": ["no-such"]}])[
        "answers"
    ]
    for answer, name in zip(results, ("k01", "k06"), strict=False):
        everything = ids(client.post("/v1/similar", item_ids=[name], k=1000))
        # They have the order of the list of all items; the item itself is the last resort.
        expected = [item for item in everything if item in past]
        assert [item for item in ids(answer) if item != name] == expected[: len(ids(answer)) - (name in ids(answer))]
        assert len(ids(answer)) == 2
    assert results[2]["error"]["kind"] == "unknown-name" and results[2]["error"]["at"] == "candidates"


def test_preference_has_wilson_interval(client: Client) -> None:
    low, high = wilson_interval(0.7, 10)
    assert client.get("/v1/preference?first=7&second=3") == {"share": 0.7, "low": low, "high": high}
    assert client.get("/v1/preference?first=0&second=4")["low"] == 0.0
    for query in ("first=0&second=0", "first=-1&second=2", "first=1", "first=1&second=x"):
        failure(client.http.get(f"/v1/preference?{query}"), 422)


def test_removed_item_is_never_listed(client: Client) -> None:
    removed = client.get("/v1/items/k33")
    assert client.http.delete("/v1/items/k33").json() == {"removed": 1}
    try:
        for model in MODELS:
            assert "k33" not in client.rank(history=HISTORY, k=1000, model=model, exclude_seen=False)
        assert "k33" not in client.rank(k=1000)
        for by in ("interactions", "text"):
            assert "k33" not in ids(client.post("/v1/similar", item_ids=["k01"], k=1000, by=by))
            client.refused("/v1/similar", 404, item_ids=["k33"], by=by)
        assert "k33" not in {item["item_id"] for item in client.get("/v1/items?limit=1000")["items"]}
        failure(client.http.get("/v1/items/k33"), 404)
        failure(client.http.delete("/v1/items/k33"), 404)
        client.refused("/v1/rank", 404, history=HISTORY, candidates=["k33"])
        # A history may still contain it.
        notes = client.post("/v1/rank", history=["k33", "k01"], k=2, model="markov")["notes"]
        assert any("k33" in note for note in notes)
    finally:
        client.put(removed)
    assert "k33" in client.rank(history=HISTORY, k=1000, model="markov")


@pytest.mark.parametrize(
    "name",
    ["a//b", "...", "a?b#c", "%2F", "日本😀", "a" * 1000],
)
def test_any_id_can_be_added_ranked_and_removed(client: Client, name: str) -> None:
    path = f"/v1/items/{quote(name, safe='')}"
    with added(client, product(name, "An item with a strange id")):
        assert client.get(path)["item_id"] == name
        assert name in client.rank(history=HISTORY, candidates=[name, "k10"])
        assert client.post("/v1/events", events=[{"user_id": name, "item_id": name}]) == {"stored": 1}
        user = f"/v1/users/{quote(name, safe='')}"
        assert [event["item_id"] for event in client.get(user)["history"]] == [name]
        assert client.http.delete(user).json()["events"] == 1
        assert client.http.delete(path).json() == {"removed": 1}
        failure(client.http.get(path), 404)


def test_searches_are_paged(client: Client, catalogue: dict[str, Any]) -> None:
    brindal = client.get("/v1/items?q=BRINDAL&limit=1000")
    assert {item["item_id"] for item in brindal["items"]} == brand(catalogue, "Brindal")
    pages = [client.get(f"/v1/items?q=brindal&limit=3&offset={offset}") for offset in range(0, 12, 3)]
    assert {page["total"] for page in pages} == {brindal["total"]}
    assert [item for page in pages for item in page["items"]] == brindal["items"]
    assert client.get("/v1/items?q=%20")["total"] == client.get("/v1/items")["total"] >= 40
    assert client.get("/v1/items?q=no+such+thing") == {"items": [], "total": 0}
    assert client.get("/v1/items?q=%2Epalm") == {"items": [], "total": 0}
    for query in ("limit=0", "limit=1001", "offset=-1", "limit=x", f"q={'a' * 201}"):
        assert failure(client.http.get(f"/v1/items?{query}"), 422)["at"] == query.partition("=")[0]


def test_rejects_invalid_items_together(client: Client) -> None:
    before = client.get("/v1/items")["total"]
    for item in (
        {"item_id": "", "title": "x"},
        {"item_id": "a\u0000", "title": "x"},
        {"item_id": "a", "title": ""},
        {"item_id": "a", "title": "x\u0000"},
        {"item_id": "a", "title": "x" * 4001},
        {"item_id": "a", "title": "x", "fields": {"b\u0000": "c"}},
        {"item_id": "a", "title": "x", "fields": {"b": 1}},
        {"item_id": "a" * 1001, "title": "x"},
    ):
        good = {"item_id": "good", "title": "x"}
        assert failure(client.http.put("/v1/items", json={"items": [good, item]}), 422)["kind"] == "bad-value"
    # Either all items are stored or none.
    assert client.get("/v1/items")["total"] == before
    # A title that is empty after escaping for a prompt.
    titleless = {"items": [{"item_id": "a", "title": "<|im_end|>"}]}
    answer = client.http.put("/v1/items", json=titleless)
    if answer.status_code == 200:
        assert client.rank(history=HISTORY, candidates=["a", "k10"])
        client.http.delete("/v1/items/a")


def test_id_may_be_an_integer(client: Client) -> None:
    with added(client, product("7", "Seven"), product("-8", "Minus eight")):
        client.put({"item_id": 7, "title": "Another seven"})
        assert client.get("/v1/items/7")["title"] == "Another seven"
        as_numbers, as_texts = (
            client.post("/v1/rank", history=[one, {"item_id": two}], candidates=[two, "k10", {"item_id": one}])
            for one, two in ((7, -8), ("7", "-8"))
        )
        assert as_numbers["items"] == as_texts["items"] and sorted(ids(as_numbers)) == ["-8", "7", "k10"]
        assert ids(client.post("/v1/similar", item_ids=[7], k=50)) == ids(
            client.post("/v1/similar", item_ids=["7"], k=50)
        )
        assert "7" not in client.rank(history=HISTORY, k=1000, rules={"block": [7]})
        client.post("/v1/events", events=[{"user_id": 42, "item_id": 7.0}])
        assert [event["item_id"] for event in client.get("/v1/users/42")["history"]] == ["7"]
        assert client.rank(user_id=42, k=5) == client.rank(user_id="42", k=5)
        client.http.delete("/v1/users/42")


def test_signature_changes_with_the_catalogue_only(client: Client) -> None:
    def signatures() -> dict[str, str]:
        return {card["name"]: card["signature"] for card in client.get("/v1/models")["models"]}

    before = signatures()
    assert set(MODELS) <= set(before) and len(set(before.values())) == len(before)
    client.rank(history=HISTORY, k=3)
    client.post("/v1/events", events=[{"user_id": "signer", "item_id": "k01"}])
    assert signatures() == before
    assert client.post("/v1/rank", history=HISTORY)["model"]["signature"] == before["tuned"]
    with added(client, product("s-1", "Something")):
        changed = signatures()
        assert all(changed[name] != before[name] for name in before)
        assert client.post("/v1/rank", history=HISTORY)["model"]["signature"] == changed["tuned"]
        client.put(product("s-1", "Something"))
        assert signatures() == changed
        client.put(product("s-1", "Something", colour="red"))
        assert all(signatures()[name] != changed[name] for name in before)
    assert signatures() == before
    client.http.delete("/v1/users/signer")


@pytest.mark.parametrize("model", MODELS)
def test_events_extend_the_history(client: Client, model: str) -> None:
    user = f"event-{model}"
    try:
        for n, item in enumerate(["k10", "k11"]):
            assert client.post("/v1/events", events=[{"user_id": user, "item_id": item, "rating": 4}]) == {"stored": 1}
            history = client.get(f"/v1/users/{user}")["history"]
            assert [event["item_id"] for event in history] == ["k10", "k11"][: n + 1]
            assert history[-1]["rating"] == 4.0 and history[-1]["timestamp"] > 1.7e9
            results = client.rank(user_id=user, k=1000, model=model)
            assert item not in results and len(results) >= 38
        events = [{key: event[key] for key in ("item_id", "rating", "timestamp")} for event in history]
        assert results == client.rank(history=events, k=1000, model=model)
    finally:
        client.http.delete(f"/v1/users/{user}")


def test_no_event_is_stored_if_one_is_invalid(client: Client) -> None:
    events = [{"user_id": "half", "item_id": "k01"}, {"user_id": "half", "item_id": "no-such"}]
    assert client.refused("/v1/events", 404, events=events)["at"] == "item_id"
    failure(client.http.get("/v1/users/half"), 404)


def test_erased_user_is_unknown(client: Client) -> None:
    known = client.get("/v1/users/u04")["history"]
    assert len(known) > 3
    client.post("/v1/events", events=[{"user_id": "u04", "item_id": "k01"}, {"user_id": "u04", "item_id": "k02"}])
    erased = client.http.delete("/v1/users/u04")
    assert erased.status_code == 200 and erased.json()["user_id"] == "u04" and erased.json()["events"] == 2
    # The data of the run is not shown, but reported as remaining.
    assert erased.json()["remains"]
    failure(client.http.get("/v1/users/u04"), 404)
    assert client.post("/v1/rank", user_id="u04", k=3)["cold"] is True
    # The user may come back, with an empty history.
    assert client.http.delete("/v1/users/u04").json()["events"] == 0
    client.post("/v1/events", events=[{"user_id": "u04", "item_id": "k05"}])
    assert [event["item_id"] for event in client.get("/v1/users/u04")["history"]] == ["k05"]
    client.http.delete("/v1/users/u04")
    unknown = client.http.delete("/v1/users/unknown").json()
    assert (unknown["events"], unknown["features"], unknown["remains"]) == (0, 0, [])


def test_changes_survive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [{"user_id": "new", "item_id": "i3"}, {"user_id": "old", "item_id": "i4", "timestamp": 3, "rating": 2}]
    with faking(tmp_path, monkeypatch) as first:
        before = Client(first.url)
        before.put({"item_id": "i8", "title": "Eight"}, {"item_id": "i2", "title": "Another two"})
        assert before.http.delete("/v1/items/i7").status_code == 200
        before.post("/v1/events", events=events)
        assert before.http.delete("/v1/users/new").json()["events"] == 1
        before.post("/v1/events", events=[{"user_id": "new", "item_id": "i5"}])
        known = before.get("/v1/users/old")
        listed = before.rank(user_id="old", k=20)
        cards = before.get("/v1/models")
    assert [event["item_id"] for event in known["history"]] == ["i0", "i1", "i4"]
    assert listed == ["i2", "i3", "i5", "i6", "i8"]
    with faking(tmp_path, monkeypatch) as second:
        after = Client(second.url)
        assert after.get("/v1/users/old") == known and after.rank(user_id="old", k=20) == listed
        assert [event["item_id"] for event in after.get("/v1/users/new")["history"]] == ["i5"]
        assert after.get("/v1/items/i2")["title"] == "Another two" and after.get("/v1/items?q=eight")["total"] == 1
        failure(after.http.get("/v1/items/i7"), 404)
        assert after.get("/v1/models") == cards
        assert after.http.delete("/v1/users/old").json()["remains"]
    with faking(tmp_path, monkeypatch) as third:
        last = Client(third.url)
        failure(last.http.get("/v1/users/old"), 404)
        assert last.post("/v1/rank", user_id="old", k=1)["cold"] is True
    for each in (before, after, last):
        each.http.close()


def test_state_endpoints_and_head(client: Client) -> None:
    assert client.get("/health") == {"status": "ok"}
    ready = client.get("/ready")
    assert ready["ready"] is True and ready["models"] == [card["name"] for card in client.get("/v1/models")["models"]]
    for path in ("/", "/health", "/ready", "/metrics", "/openapi.json", "/v1/items", "/v1/items/k01", "/v1/models"):
        head = client.http.head(path)
        assert head.status_code == 200 and head.content == b"", path
        if path not in ("/metrics",):
            assert head.headers["content-length"] == client.http.get(path).headers["content-length"], path


def test_wrong_methods_have_status_405(client: Client) -> None:
    for method, path, allowed in (
        ("GET", "/v1/rank", "POST"),
        ("HEAD", "/v1/rank", "POST"),
        ("OPTIONS", "/v1/rank", "POST"),
        ("POST", "/v1/items", "GET, HEAD, PUT"),
        ("PATCH", "/v1/items/k01", "DELETE, GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
    ):
        answer = client.http.request(method, path)
        assert answer.status_code == 405 and answer.headers["allow"] == allowed, (method, path)
        if method != "HEAD":
            assert failure(answer, 405)["kind"] == "unsupported"
    # A redirect would lead to any host that the client names.
    assert failure(client.http.post("/v1/rank/", json={}), 404)["kind"] == "unknown-name"


def test_metrics_are_in_prometheus_format(client: Client) -> None:
    def figures() -> dict[str, float]:
        text = client.http.get("/metrics").text
        return {
            f"{sample.name}{sorted(sample.labels.items())}": sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = figures()
    client.rank(history=HISTORY, candidates=["k10", "k20"])
    client.refused("/v1/rank", 404, history=HISTORY, model="secret-model-name")
    client.http.get("/secret-path/no-such")
    client.http.get("/v1/items/secret-item")
    after = figures()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    endpoint = "[('endpoint', '/v1/rank'), ('status', '{}')]"
    assert more(f"llmrec_requests_total{endpoint.format(200)}") == 1
    assert more(f"llmrec_requests_total{endpoint.format(404)}") == 1
    assert more("llmrec_request_seconds_count[('endpoint', '/v1/rank')]") == 2
    assert more("llmrec_requests_total[('endpoint', 'other'), ('status', '404')]") == 1
    assert more("llmrec_asked_total[]") == more("llmrec_batches_total[]") == 1
    assert after["llmrec_queue[]"] == 0 and after["llmrec_engine_up[]"] == 1 and after["llmrec_engine_starts_total[]"]
    assert after["llmrec_engine_seconds_total[]"] > before["llmrec_engine_seconds_total[]"]
    assert "secret" not in json.dumps(list(after))


def test_openapi_describes_all_endpoints(served: Served, client: Client) -> None:
    plain = client.get("/openapi.json")
    assert "securitySchemes" not in plain["components"] and '"security"' not in json.dumps(plain)
    document = httpx.get(f"{served.keyed_url}/openapi.json").json()
    paths = {f"{method.upper()} {path}" for path, each in document["paths"].items() for method in each}
    assert {"POST /v1/rank", "PUT /v1/items", "DELETE /v1/users/{user_id}", "POST /v2/rerank", "GET /ready"} <= paths
    for path, methods in document["paths"].items():
        for method, each in methods.items():
            assert ("security" in each) is path.startswith("/v"), path
            for status, answer in each["responses"].items():
                if status >= "400" and path != "/ready":
                    name = "OpenAIFailed" if path == "/v1/chat/completions" else "Failed"
                    failed = {"$ref": f"#/components/schemas/{name}"}
                    assert answer["content"]["application/json"]["schema"] == failed, (path, method, status)


def test_run_folder_gains_only_the_store(served: Served) -> None:
    assert {path.name for path in Path(served.run).iterdir()} <= {
        *("recipe.yaml", "merged", "service.sqlite", "service.sqlite-wal", "service.sqlite-shm"),
    }
