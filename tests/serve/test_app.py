"""Every endpoint over HTTP, on a real service with a toy model: what is asked for is what comes back."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
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

from llmrec.metrics.stats import wilson

CLASSIC = ("popularity", "item-knn", "markov-1", "markov")
EVERY = ("tuned", *CLASSIC)
HISTORY = ["k01", "k04", "k07"]


class Asking:
    """A client of one service."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=120)

    def post(self, path: str, **body: Any) -> Any:
        found = self.http.post(path, json=body)
        assert found.status_code == 200, found.text
        return found.json()

    def get(self, path: str) -> Any:
        found = self.http.get(path)
        assert found.status_code == 200, found.text
        return found.json()

    def rank(self, **body: Any) -> list[str]:
        return ids(self.post("/v1/rank", **body))

    def put(self, *items: dict[str, Any]) -> None:
        found = self.http.put("/v1/items", json={"items": items})
        assert (found.status_code, found.json()) == (200, {"stored": len(items)})

    def refused(self, path: str, status: int, **body: Any) -> dict[str, Any]:
        return failure(self.http.post(path, json=body), status)


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


@pytest.fixture(scope="module")
def asking(served: Served) -> Iterator[Asking]:
    found = Asking(served.url)
    yield found
    found.http.close()


@pytest.fixture(scope="module")
def catalogue(asking: Asking) -> dict[str, dict[str, Any]]:
    """The items of the toy run: forty products."""
    found = {item["item_id"]: item for item in asking.get("/v1/items?limit=1000")["items"]}
    return {name: item for name, item in found.items() if name.startswith("k") and len(name) == 3}


@contextmanager
def added(asking: Asking, *items: dict[str, Any]) -> Iterator[None]:
    """Put items, and remove what is left of them in the end: others use the same service."""
    asking.put(*items)
    try:
        yield
    finally:
        for item in items:
            asking.http.delete(f"/v1/items/{quote(item['item_id'], safe='')}")


def product(name: str, title: str, **fields: str) -> dict[str, Any]:
    return {"item_id": name, "title": title, "fields": fields}


# --------------------------------------------------------------------------- lists


@pytest.mark.parametrize("model", EVERY)
def test_a_list_is_best_first_and_says_what_it_is(asking: Asking, catalogue: dict[str, Any], model: str) -> None:
    answer = asking.post("/v1/rank", history=HISTORY, k=5, model=model)
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4, 5]
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True) and all(math.isfinite(score) for score in scores)
    for item in answer["items"]:
        assert {key: item[key] for key in ("item_id", "title", "fields")} == catalogue[item["item_id"]]
    assert not set(ids(answer)) & set(HISTORY) and len(set(ids(answer))) == 5
    assert answer["model"]["name"] == model and answer["cold"] is False and answer["prompt"] is None
    assert (answer["usage"]["forwards"] > 0) is (model == "tuned")


@pytest.mark.parametrize("model", EVERY)
def test_a_known_user_is_asked_about_with_what_is_known(asking: Asking, model: str) -> None:
    events = asking.get("/v1/users/u02")["history"]
    history = [{key: event[key] for key in ("item_id", "rating", "timestamp")} for event in events]
    by_id = asking.post("/v1/rank", user_id="u02", k=6, model=model)
    by_history = asking.post("/v1/rank", history=history, k=6, model=model)
    assert by_id["items"] == by_history["items"]
    # What is sent goes before what is known.
    both = asking.post("/v1/rank", user_id="u02", history=HISTORY, k=6, model=model)
    assert both["items"] == asking.post("/v1/rank", history=HISTORY, k=6, model=model)["items"]


@pytest.mark.parametrize("model", EVERY)
def test_candidates_are_ranked_each_once_and_nothing_else(asking: Asking, model: str) -> None:
    candidates = ["k10", "k30", "k01", "k20", "k10"]
    answer = asking.post("/v1/rank", history=HISTORY, candidates=candidates, model=model)
    # One that was seen is ranked where it is named.
    assert sorted(ids(answer)) == ["k01", "k10", "k20", "k30"]
    assert any("k10" in note for note in answer["notes"])
    first = asking.rank(history=HISTORY, candidates=candidates, model=model, k=2)
    assert first == ids(answer)[:2]


def test_candidates_may_bring_words_of_their_own(asking: Asking) -> None:
    own = [{"title": "Thing that nobody sells"}, {"item_id": "k02", "title": "Another word for it"}, "k03"]
    answer = asking.post("/v1/rank", history=HISTORY, candidates=own, show_prompt=True)
    titles = {item["item_id"]: item["title"] for item in answer["items"]}
    assert titles["Thing that nobody sells"] == "Thing that nobody sells"
    assert titles["k02"] == "Another word for it" and titles["k03"] == "Orlune Nook Hand Mixer"


@pytest.mark.parametrize("model", EVERY)
def test_the_whole_catalogue_is_ranked(asking: Asking, catalogue: dict[str, Any], model: str) -> None:
    unseen = set(catalogue) - set(HISTORY)
    found = asking.rank(history=HISTORY, k=1000, model=model)
    assert set(found) >= unseen and not set(found) & set(HISTORY) and len(found) == len(set(found))
    every = asking.rank(history=HISTORY, k=1000, model=model, exclude_seen=False)
    assert set(every) >= set(catalogue)
    # A shorter list is how the longer one begins.
    assert asking.rank(history=HISTORY, k=3, model=model) == found[:3]


def test_every_strategy_orders_the_candidates(asking: Asking) -> None:
    (card,) = [card for card in asking.get("/v1/models")["models"] if card["name"] == "tuned"]
    assert {"likelihood", "list", "pairwise", "two-step"} <= set(card["strategies"])
    for strategy in ("auto", *card["strategies"]):
        body = {"history": HISTORY, "candidates": ["k10", "k20", "k30"], "strategy": strategy}
        answer = asking.http.post("/v1/rank", json=body)
        if answer.status_code != 200:
            # A toy model does not always write what can be read; that is said, and is no defect.
            assert failure(answer, 422)["kind"] == "failed", strategy
            continue
        assert sorted(ids(answer.json())) == ["k10", "k20", "k30"], strategy
        assert all(math.isfinite(item["score"]) for item in answer.json()["items"]), strategy


def test_the_prompt_and_rationales_come_where_they_are_wanted(asking: Asking, catalogue: dict[str, Any]) -> None:
    answer = asking.post("/v1/rank", history=HISTORY, candidates=["k10", "k20"], show_prompt=True, rationale=1)
    assert catalogue["k01"]["title"] in answer["prompt"] and catalogue["k07"]["title"] in answer["prompt"]
    first, second = answer["items"]
    assert second["rationale"] is None and answer["usage"]["completion_tokens"] > 0
    assert first["rationale"] is None or isinstance(first["rationale"], str)
    classic = asking.post("/v1/rank", history=HISTORY, model="markov", show_prompt=True, rationale=1)
    assert classic["prompt"] is None and any("markov" in note for note in classic["notes"])


def test_nobody_is_given_what_most_people_take(asking: Asking) -> None:
    for body in ({}, {"user_id": "nobody"}, {"history": []}, {"history": ["no-such-item"]}):
        answer = asking.post("/v1/rank", k=5, **body)
        assert answer["cold"] is True and answer["model"]["name"] == "popularity", body
        assert ids(answer) == asking.rank(history=["k40"], k=5, model="popularity", exclude_seen=False)
    cold = asking.post("/v1/rank", candidates=["k10", "k20", "k30"], model="tuned")
    assert cold["cold"] is True and sorted(ids(cold)) == ["k10", "k20", "k30"]
    # A word about the user is something.
    assert asking.post("/v1/rank", profile="likes kettles", candidates=["k10", "k20"])["cold"] is False


# --------------------------------------------------------------------------- rules


def brand(catalogue: dict[str, Any], *names: str) -> set[str]:
    return {name for name, item in catalogue.items() if item["fields"]["brand"] in names}


@pytest.mark.parametrize("model", EVERY)
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ({"only": {"brand": ["brindal ", "TILSBY"]}}, lambda c: brand(c, "Brindal", "Tilsby")),
        ({"without": {"brand": ["Brindal"]}}, lambda c: set(c) - brand(c, "Brindal")),
        ({"block": ["k02", "k03", "no-such"]}, lambda c: set(c) - {"k02", "k03"}),
        (
            {"only": {"brand": ["Brindal"]}, "without": {"category": ["storage"]}, "block": ["k01"]},
            lambda c: {n for n in brand(c, "Brindal") if c[n]["fields"]["category"] != "storage"} - {"k01"},
        ),
    ],
    ids=["only", "without", "block", "all"],
)
def test_nothing_that_is_forbidden_is_listed_and_all_that_is_allowed(
    asking: Asking,
    catalogue: dict[str, Any],
    model: str,
    seen: bool,
    rules: dict[str, Any],
    allowed: Callable[[dict[str, Any]], set[str]],
) -> None:
    wanted = allowed(catalogue) - (set() if seen else set(HISTORY))
    found = asking.rank(history=HISTORY, k=1000, model=model, rules=rules, exclude_seen=not seen)
    assert set(found) & set(catalogue) == wanted
    # As many as are asked for, however deep they lie.
    assert len(asking.rank(history=HISTORY, k=4, model=model, rules=rules)) == min(4, len(wanted - set(HISTORY)))
    candidates = [*list(catalogue)[:12], *list(catalogue)[-3:]]
    assert set(asking.rank(history=HISTORY, candidates=candidates, model=model, rules=rules, k=1000)) == (
        set(candidates) & allowed(catalogue)
    )


@pytest.mark.parametrize("model", EVERY)
def test_quotas_and_diversity_fill_the_list(asking: Asking, catalogue: dict[str, Any], model: str) -> None:
    rules = {"quotas": [{"field": "brand", "most": 2}], "diversity": 0.5}
    found = asking.rank(history=HISTORY, k=10, model=model, rules=rules)
    brands = Counter(catalogue[name]["fields"]["brand"] for name in found)
    # Six brands, two of each.
    assert len(found) == 10 and max(brands.values()) <= 2
    every = asking.rank(history=HISTORY, k=1000, model=model, rules={"quotas": [{"field": "brand", "most": 1}]})
    assert sorted(catalogue[name]["fields"]["brand"] for name in every) == sorted(
        {item["fields"]["brand"] for item in catalogue.values()}
    )
    plain = asking.rank(history=HISTORY, k=10, model=model)
    assert asking.rank(history=HISTORY, k=10, model=model, rules={"diversity": 0.0}) == plain


def test_rules_hold_for_cold_users_and_similar_items_too(asking: Asking, catalogue: dict[str, Any]) -> None:
    rules = {"only": {"brand": ["Orlune"]}, "block": ["k03"]}
    wanted = brand(catalogue, "Orlune") - {"k03"}
    assert set(asking.rank(k=1000, rules=rules)) == wanted
    for by in ("interactions", "text"):
        assert set(ids(asking.post("/v1/similar", item_ids=["k06"], k=1000, by=by, rules=rules))) == wanted - {"k06"}


def test_rules_that_leave_nothing_or_name_nothing_are_refused(asking: Asking) -> None:
    for rules, kind in (
        ({"only": {"brand": ["Nobody's"]}}, "empty"),
        ({"only": {"brnad": ["Orlune"]}}, "unknown-name"),
        ({"quotas": [{"field": "colour", "most": 1}]}, "unknown-name"),
        ({"only": {"brand": []}}, "bad-value"),
        ({"quotas": [{"field": "brand", "most": 0}]}, "bad-value"),
        ({"diversity": 1.5}, "bad-value"),
        ({"olny": {}}, "bad-value"),
    ):
        assert asking.refused("/v1/rank", 422, history=HISTORY, rules=rules)["kind"] == kind, rules


def test_rules_that_leave_only_what_no_model_knows_are_answered_or_refused(asking: Asking) -> None:
    """A language model that does not search orders what a classic one finds, which here is nothing."""
    with added(asking, product("fresh1", "Fresh Thing", brand="Fresh"), product("fresh2", "Fresh Two", brand="Fresh")):
        rules = {"only": {"brand": ["Fresh"]}}
        assert sorted(asking.rank(history=HISTORY, rules=rules, model="tuned")) == ["fresh1", "fresh2"]
        refused = asking.refused("/v1/rank", 422, history=HISTORY, rules=rules, strategy="likelihood")
        assert refused["kind"] == "failed"
        assert asking.rank(history=HISTORY, rules=rules, model="markov") == []
        assert sorted(asking.rank(history=HISTORY, rules=rules, candidates=["fresh1", "fresh2", "k02"])) == [
            "fresh1",
            "fresh2",
        ]
        found = asking.post("/v1/similar", item_ids=["k01"], by="text", rules=rules)
        assert sorted(ids(found)) == ["fresh1", "fresh2"]


# --------------------------------------------------------------------------- what is not there


def test_what_is_not_there_is_404(asking: Asking) -> None:
    for path, body, at in (
        ("/v1/rank", {"history": HISTORY, "model": "no-such"}, "model"),
        ("/v1/rank", {"history": HISTORY, "candidates": ["no-such"]}, "candidates"),
        ("/v1/rate", {"history": HISTORY, "item_id": "no-such"}, "item_id"),
        ("/v1/predict", {"history": HISTORY, "item_id": "no-such"}, "item_id"),
        ("/v1/explain", {"history": HISTORY, "item_id": "no-such"}, "item_id"),
        ("/v1/similar", {"item_ids": ["k01", "no-such"]}, "item_id"),
        ("/v1/events", {"events": [{"user_id": "u1", "item_id": "no-such"}]}, "item_id"),
    ):
        error = asking.refused(path, 404, **body)
        assert (error["kind"], error["at"]) == ("unknown-name", at), path
    for path in ("/v1/items/no-such", "/v1/users/nobody", "/v1/no-such", "/page/no-such.js"):
        assert failure(asking.http.get(path), 404)["kind"] == "unknown-name"
    assert failure(asking.http.delete("/v1/items/no-such"), 404)["at"] == "item_id"


def test_what_a_model_does_not_do_is_refused_with_what_it_does(asking: Asking) -> None:
    for path in ("/v1/rate", "/v1/predict", "/v1/explain"):
        error = asking.refused(path, 422, history=HISTORY, item_id="k10", model="markov")
        assert (error["kind"], error["at"]) == ("unsupported", "model") and "rank" in error["message"]
    assert asking.refused("/v1/rank", 422, history=HISTORY, model="markov", strategy="list")["at"] == "strategy"
    error = asking.refused("/v1/rank", 422, history=HISTORY, strategy="lst")
    assert (error["kind"], error["at"]) == ("unknown-name", "strategy") and "'list'" in error["message"]


def test_what_is_wrong_in_a_body_is_named(asking: Asking) -> None:
    for body, at in (
        ({"histroy": HISTORY}, "histroy"),
        ({"history": HISTORY, "k": 0}, "k"),
        ({"history": HISTORY, "k": "5"}, "k"),
        ({"history": HISTORY, "k": True}, "k"),
        ({"history": HISTORY, "exclude_seen": 1}, "exclude_seen"),
        ({"history": HISTORY, "candidates": []}, "candidates"),
        ({"history": [{}]}, "history.0"),
        ({"history": ["k01", {"item_id": "k02", "rating": "five"}]}, "history.1.rating"),
        ({"history": ["k01", {"item_id": "k02", "text": "good"}]}, "history.1.text"),
        ({"history": [" "]}, "history.0"),
        ({"history": ["a\nb"]}, "history.0"),
        ({"history": ["k01", True]}, "history.1"),
        ({"history": ["k01", 1.5]}, "history.1"),
        ({"candidates": ["k01", {"item_id": 2**53}]}, "candidates.1.item_id"),
        ({"history": HISTORY, "rules": {"quotas": [{"field": "brand"}]}}, "rules.quotas.0.most"),
        ({"id": ""}, "id"),
    ):
        error = asking.refused("/v1/rank", 422, **body)
        assert (error["kind"], error["at"]) == ("bad-value", at), body
    for body in ({}, {"item_id": "k10", "item": {"title": "Own"}}, {"item": "k10"}):
        assert "item_id" in asking.refused("/v1/rate", 422, history=HISTORY, **body)["message"], body
    said = asking.refused("/v1/events", 422, events=[{"user_id": "u", "item_id": "k01", "timestmp": 1}])["message"]
    assert said == "events.0.timestmp: unknown key (did you mean 'timestamp'?)"
    said = asking.refused("/v1/rank", 422, histroy=HISTORY)["message"]
    assert said == "histroy: unknown key (did you mean 'history'?)"
    # Keys that are called like a type or a tag of the schema.
    for key in ("user", "State", "str"):
        error = asking.refused("/v1/rank", 422, **{key: "u01"})
        assert error["at"] == key and error["message"].startswith(f"{key}: unknown key"), key


# --------------------------------------------------------------------------- questions about one item


def test_ratings_and_probabilities_lie_on_their_scales(asking: Asking) -> None:
    rate = asking.post("/v1/rate", history=HISTORY, item_id="k10", show_prompt=True)
    low, high = rate["scale"]
    assert (low, high) == (1.0, 5.0) and low <= rate["rating"] <= high and rate["item_id"] == "k10"
    assert "Yarrowell Palm Teapot" in rate["prompt"]
    predict = asking.post("/v1/predict", user_id="u01", item={"title": "Thing that nobody sells"})
    assert 0 <= predict["probability"] <= 1 and predict["item_id"] == "Thing that nobody sells"
    assert rate["rating"] == asking.post("/v1/rate", history=HISTORY, item_id="k10")["rating"]


def test_a_text_comes_whole_or_as_events(asking: Asking) -> None:
    body = {"history": HISTORY, "item_id": "k10"}
    whole = asking.post("/v1/explain", **body)
    assert whole["item_id"] == "k10" and whole["usage"]["completion_tokens"] > 0
    with asking.http.stream("POST", "/v1/explain", json=body, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
        events = read_events(answer.iter_lines())
    names = [name for name, _ in events]
    assert names == ["text"] * (len(events) - 1) + ["done"]
    done = events[-1][1]
    # What a toy model writes may end within a character.
    assert done["text"].startswith("".join(data["text"] for name, data in events if name == "text"))
    for key in ("text", "model", "usage", "item_id", "notes"):
        assert done[key] == whole[key]


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


def test_what_fails_before_the_first_event_has_a_status(asking: Asking) -> None:
    for body, status in (({"item_id": "no-such"}, 404), ({"item_id": "k10", "model": "markov"}, 422), ({}, 422)):
        answer = asking.http.post(
            "/v1/explain", json={"history": HISTORY, **body}, headers={"Accept": "text/event-stream"}
        )
        failure(answer, status)


# --------------------------------------------------------------------------- several at once


def test_a_bad_question_of_a_batch_touches_no_other(asking: Asking) -> None:
    questions: list[dict[str, Any]] = [
        {"history": HISTORY, "candidates": ["k10", "k20", "k30"]},
        {"history": HISTORY, "candidates": ["no-such"]},
        {"history": HISTORY, "k": 3, "model": "markov"},
        {"history": HISTORY, "model": "no-such"},
        {"history": ["k20"], "candidates": ["k10", "k20", "k30"]},
        {"history": HISTORY, "rules": {"only": {"brand": ["Nobody's"]}}},
        {"user_id": "u01", "k": 2},
    ]
    answers = asking.post("/v1/rank/batch", requests=questions)["answers"]
    assert [each.get("error", {}).get("kind") for each in answers] == [
        *(None, "unknown-name", None, "unknown-name", None, "empty", None)
    ]
    for question, answer in zip(questions, answers, strict=True):
        if "error" not in answer:
            assert answer["items"] == asking.post("/v1/rank", **question)["items"]
        else:
            assert answer["error"] == asking.http.post("/v1/rank", json=question).json()["error"]


@pytest.mark.parametrize(("verb", "key"), [("rate", "rating"), ("predict", "probability"), ("explain", "text")])
def test_batches_about_items_keep_their_order(asking: Asking, verb: str, key: str) -> None:
    items = ["k10", "no-such", "k20", "k30"]
    questions = [{"history": HISTORY, "item_id": item} for item in items]
    answers = asking.post(f"/v1/{verb}/batch", requests=questions)["answers"]
    assert [each.get("item_id") for each in answers] == ["k10", None, "k20", "k30"]
    alone = asking.post(f"/v1/{verb}", **questions[2])
    assert answers[2][key] == (alone[key] if verb == "explain" else pytest.approx(alone[key], abs=1e-5))


def test_a_batch_whose_form_is_wrong_is_refused_as_one(asking: Asking) -> None:
    error = asking.refused("/v1/rank/batch", 422, requests=[{"history": HISTORY}, {"histroy": HISTORY}])
    assert error["at"] == "requests.1.histroy"
    assert asking.refused("/v1/rank/batch", 422, requests=[])["at"] == "requests"
    assert asking.refused("/v1/rank/batch", 422, requests=[{}] * 65)["at"] == "requests"


# --------------------------------------------------------------------------- items


def test_an_item_that_is_put_is_known_at_once(asking: Asking) -> None:
    new = product("p-new", "Zephyrine Glass Kettle", brand="Zephyrine", category="coffee and tea")
    with added(asking, new):
        assert asking.get("/v1/items/p-new") == new
        assert asking.get("/v1/items?q=zephyrine")["items"] == [new]
        assert asking.get("/v1/items?q=p-new")["total"] == 1
        assert "p-new" in asking.rank(history=HISTORY, candidates=["p-new", "k10"])
        assert "p-new" in asking.rank(history=HISTORY, candidates=["p-new", "k10"], model="markov")
        # Its title is what the model reads, in a history and as a candidate.
        asked = asking.post("/v1/rank", history=["p-new"], candidates=["k10", "k20"], show_prompt=True)
        assert "Zephyrine Glass Kettle" in asked["prompt"]
        assert asking.post("/v1/rate", history=HISTORY, item_id="p-new")["item_id"] == "p-new"
        alike = asking.post("/v1/similar", item_ids=["k06"], by="text", k=50)
        assert "p-new" in ids(alike)
        # Rules see its fields.
        assert asking.rank(history=HISTORY, candidates=["p-new", "k10"], rules={"only": {"brand": ["zephyrine"]}}) == [
            "p-new"
        ]
        again = product("p-new", "Zephyrine Iron Kettle", brand="Other")
        asking.put(again)
        assert asking.get("/v1/items/p-new") == again and asking.get("/v1/items?q=glass kettle")["total"] == 0
        assert asking.rank(history=["p-new"], k=2, model="item-knn")


def test_items_are_alike_by_text_however_new_they_are(asking: Asking) -> None:
    pair = [product("q-1", "Qwyx Marble Lantern"), product("q-2", "Qwyx Marble Lantern Deluxe")]
    with added(asking, *pair):
        assert ids(asking.post("/v1/similar", item_ids=["q-1"], by="text", k=1)) == ["q-2"]
        for by in ("interactions", "text"):
            found = asking.post("/v1/similar", item_ids=["q-1"], by=by, k=5)
            assert "q-1" not in ids(found) and all(math.isfinite(item["score"]) for item in found["items"])


@pytest.mark.parametrize("by", ["interactions", "text"])
def test_similar_items_of_a_history_are_found_for_several_items_at_once(asking: Asking, by: str) -> None:
    past = ["k02", "k06", "k20", "no-such"]
    requests = [{"item_ids": [name], "by": by, "candidates": past, "k": 2} for name in ("k01", "k06")]
    found = asking.post("/v1/similar/batch", requests=[*requests, {**requests[0], "candidates": ["no-such"]}])[
        "answers"
    ]
    for answer, name in zip(found, ("k01", "k06"), strict=False):
        everything = ids(asking.post("/v1/similar", item_ids=[name], by=by, k=1000))
        # Their order is that among all items; the item itself is the last resort.
        expected = [item for item in everything if item in past]
        assert [item for item in ids(answer) if item != name] == expected[: len(ids(answer)) - (name in ids(answer))]
        assert len(ids(answer)) == 2
    assert found[2]["error"]["kind"] == "unknown-name" and found[2]["error"]["at"] == "candidates"


def test_a_preference_has_wilsons_interval(asking: Asking) -> None:
    low, high = wilson(0.7, 10)
    assert asking.get("/v1/preference?first=7&second=3") == {"share": 0.7, "low": low, "high": high}
    assert asking.get("/v1/preference?first=0&second=4")["low"] == 0.0
    for query in ("first=0&second=0", "first=-1&second=2", "first=1", "first=1&second=x"):
        failure(asking.http.get(f"/v1/preference?{query}"), 422)


def test_an_item_that_is_removed_is_never_listed_again(asking: Asking) -> None:
    gone = asking.get("/v1/items/k33")
    assert asking.http.delete("/v1/items/k33").json() == {"removed": 1}
    try:
        _nowhere(asking, "k33")
    finally:
        asking.put(gone)
    assert "k33" in asking.rank(history=HISTORY, k=1000, model="markov")


def _nowhere(asking: Asking, name: str) -> None:
    for model in EVERY:
        for seen in (True, False):
            assert name not in asking.rank(history=HISTORY, k=1000, model=model, exclude_seen=seen)
    assert name not in asking.rank(k=1000)
    for by in ("interactions", "text"):
        assert name not in ids(asking.post("/v1/similar", item_ids=["k01"], k=1000, by=by))
        failure(asking.http.post("/v1/similar", json={"item_ids": [name], "by": by}), 404)
    assert name not in {item["item_id"] for item in asking.get("/v1/items?limit=1000")["items"]}
    failure(asking.http.get(f"/v1/items/{name}"), 404)
    failure(asking.http.delete(f"/v1/items/{name}"), 404)
    asking.refused("/v1/rank", 404, history=HISTORY, candidates=[name])
    # A history may still name it: it was chosen once.
    history = asking.post("/v1/rank", history=[name, "k01"], k=2, model="markov")
    assert any(name in note for note in history["notes"])


@pytest.mark.parametrize(
    "name",
    ["a//b", "...", "a?b#c", "%2F", "sp ace", "日本😀", '"<b>;', "a" * 1000, "1.0"],
)
def test_any_id_can_be_put_found_ranked_and_removed(asking: Asking, name: str) -> None:
    path = f"/v1/items/{quote(name, safe='')}"
    with added(asking, product(name, "An item with a strange id")):
        assert asking.get(path)["item_id"] == name
        assert name in asking.rank(history=HISTORY, candidates=[name, "k10"])
        assert asking.post("/v1/events", events=[{"user_id": name, "item_id": name}]) == {"stored": 1}
        user = f"/v1/users/{quote(name, safe='')}"
        assert [event["item_id"] for event in asking.get(user)["history"]] == [name]
        assert asking.http.delete(user).json()["events"] == 1
        assert asking.http.delete(path).json() == {"removed": 1}
        failure(asking.http.get(path), 404)


def test_searches_are_paged(asking: Asking, catalogue: dict[str, Any]) -> None:
    brindal = asking.get("/v1/items?q=BRINDAL&limit=1000")
    assert {item["item_id"] for item in brindal["items"]} == brand(catalogue, "Brindal")
    pages = [asking.get(f"/v1/items?q=brindal&limit=3&offset={offset}") for offset in range(0, 12, 3)]
    assert {page["total"] for page in pages} == {brindal["total"]}
    assert [item for page in pages for item in page["items"]] == brindal["items"]
    assert asking.get("/v1/items?q=%20")["total"] == asking.get("/v1/items")["total"] >= 40
    assert asking.get("/v1/items?q=no+such+thing") == {"items": [], "total": 0}
    assert asking.get("/v1/items?q=%2Epalm") == {"items": [], "total": 0}
    for query in ("limit=0", "limit=1001", "offset=-1", "limit=x", f"q={'a' * 201}"):
        assert failure(asking.http.get(f"/v1/items?{query}"), 422)["at"] == query.partition("=")[0]


def test_items_that_cannot_be_named_are_not_put(asking: Asking) -> None:
    before = asking.get("/v1/items")["total"]
    for item in (
        {"item_id": "", "title": "x"},
        {"item_id": " ", "title": "x"},
        {"item_id": "a\u0000", "title": "x"},
        {"item_id": "a", "title": ""},
        {"item_id": "a", "title": " \n"},
        {"item_id": "a", "title": "x\u0000"},
        {"item_id": "a", "title": "x" * 4001},
        {"item_id": "a", "title": "x", "fields": {"b\u0000": "c"}},
        {"item_id": "a", "title": "x", "fields": {"b": 1}},
        {"item_id": "a" * 1001, "title": "x"},
    ):
        good = {"item_id": "good", "title": "x"}
        assert failure(asking.http.put("/v1/items", json={"items": [good, item]}), 422)["kind"] == "bad-value"
    # All of them or none.
    assert asking.get("/v1/items")["total"] == before
    # A title of which nothing is left for a prompt.
    titleless = {"items": [{"item_id": "a", "title": "<|im_end|>"}]}
    answer = asking.http.put("/v1/items", json=titleless)
    if answer.status_code == 200:
        assert asking.rank(history=HISTORY, candidates=["a", "k10"])
        asking.http.delete("/v1/items/a")


def test_an_id_may_be_a_whole_number(asking: Asking) -> None:
    with added(asking, product("7", "Seven"), product("-8", "Minus eight")):
        asking.put({"item_id": 7, "title": "Another seven"})
        assert asking.get("/v1/items/7")["title"] == "Another seven"
        as_numbers, as_texts = (
            asking.post("/v1/rank", history=[one, {"item_id": two}], candidates=[two, "k10", {"item_id": one}])
            for one, two in ((7, -8), ("7", "-8"))
        )
        assert as_numbers["items"] == as_texts["items"] and sorted(ids(as_numbers)) == ["-8", "7", "k10"]
        assert ids(asking.post("/v1/similar", item_ids=[7], k=50)) == ids(
            asking.post("/v1/similar", item_ids=["7"], k=50)
        )
        assert "7" not in asking.rank(history=HISTORY, k=1000, rules={"block": [7]})
        asking.post("/v1/events", events=[{"user_id": 42, "item_id": 7.0}])
        assert [event["item_id"] for event in asking.get("/v1/users/42")["history"]] == ["7"]
        assert asking.rank(user_id=42, k=5) == asking.rank(user_id="42", k=5)
        asking.http.delete("/v1/users/42")


def test_the_signature_changes_with_the_catalogue_and_not_by_itself(asking: Asking) -> None:
    def signatures() -> dict[str, str]:
        return {card["name"]: card["signature"] for card in asking.get("/v1/models")["models"]}

    before = signatures()
    assert set(EVERY) <= set(before) and len(set(before.values())) == len(before)
    asking.rank(history=HISTORY, k=3)
    asking.post("/v1/events", events=[{"user_id": "signer", "item_id": "k01"}])
    assert signatures() == before
    assert asking.post("/v1/rank", history=HISTORY)["model"]["signature"] == before["tuned"]
    with added(asking, product("s-1", "Something")):
        changed = signatures()
        assert all(changed[name] != before[name] for name in before)
        assert asking.post("/v1/rank", history=HISTORY)["model"]["signature"] == changed["tuned"]
        asking.put(product("s-1", "Something"))
        assert signatures() == changed
        asking.put(product("s-1", "Something", colour="red"))
        assert all(signatures()[name] != changed[name] for name in before)
    assert signatures() == before
    asking.http.delete("/v1/users/signer")


# --------------------------------------------------------------------------- users


@pytest.mark.parametrize("model", EVERY)
def test_events_extend_the_history_that_a_ranking_reads(asking: Asking, model: str) -> None:
    user = f"event-{model}"
    try:
        for n, item in enumerate(["k10", "k11"]):
            assert asking.post("/v1/events", events=[{"user_id": user, "item_id": item, "rating": 4}]) == {"stored": 1}
            history = asking.get(f"/v1/users/{user}")["history"]
            assert [event["item_id"] for event in history] == ["k10", "k11"][: n + 1]
            assert history[-1]["rating"] == 4.0 and history[-1]["timestamp"] > 1.7e9
            found = asking.rank(user_id=user, k=1000, model=model)
            assert item not in found and len(found) >= 38
        told = [{key: event[key] for key in ("item_id", "rating", "timestamp")} for event in history]
        assert found == asking.rank(history=told, k=1000, model=model)
    finally:
        asking.http.delete(f"/v1/users/{user}")


def test_events_come_after_what_the_data_knows(asking: Asking) -> None:
    before = asking.get("/v1/users/u03")["history"]
    left = asking.rank(user_id="u03", k=1000, model="markov")
    assert asking.post("/v1/events", events=[{"user_id": "u03", "item_id": left[0]}]) == {"stored": 1}
    after = asking.get("/v1/users/u03")["history"]
    assert after[:-1] == before and after[-1]["item_id"] == left[0]
    assert set(asking.rank(user_id="u03", k=1000, model="markov")) == set(left[1:])


def test_events_of_which_one_is_wrong_are_not_stored(asking: Asking) -> None:
    events = [{"user_id": "half", "item_id": "k01"}, {"user_id": "half", "item_id": "no-such"}]
    assert asking.refused("/v1/events", 404, events=events)["at"] == "item_id"
    failure(asking.http.get("/v1/users/half"), 404)


def test_a_user_that_is_erased_is_not_known_any_more(asking: Asking) -> None:
    known = asking.get("/v1/users/u04")["history"]
    assert len(known) > 3
    asking.post("/v1/events", events=[{"user_id": "u04", "item_id": "k01"}, {"user_id": "u04", "item_id": "k02"}])
    erased = asking.http.delete("/v1/users/u04")
    assert erased.status_code == 200 and erased.json()["user_id"] == "u04" and erased.json()["events"] == 2
    # What the data of the run holds is not shown, and it is said that it is there.
    assert erased.json()["remains"]
    failure(asking.http.get("/v1/users/u04"), 404)
    assert asking.post("/v1/rank", user_id="u04", k=3)["cold"] is True
    # Erased again there is nothing, and one who comes back begins anew.
    assert asking.http.delete("/v1/users/u04").json()["events"] == 0
    asking.post("/v1/events", events=[{"user_id": "u04", "item_id": "k05"}])
    assert [event["item_id"] for event in asking.get("/v1/users/u04")["history"]] == ["k05"]
    asking.http.delete("/v1/users/u04")
    nobody = asking.http.delete("/v1/users/nobody-at-all").json()
    assert (nobody["events"], nobody["features"], nobody["remains"]) == (0, 0, [])


def test_what_a_service_was_told_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [{"user_id": "new", "item_id": "i3"}, {"user_id": "old", "item_id": "i4", "timestamp": 3, "rating": 2}]
    with faking(tmp_path, monkeypatch) as first:
        before = Asking(first.url)
        before.put({"item_id": "i8", "title": "Eight"}, {"item_id": "i2", "title": "Two anew"})
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
        after = Asking(second.url)
        assert after.get("/v1/users/old") == known and after.rank(user_id="old", k=20) == listed
        assert [event["item_id"] for event in after.get("/v1/users/new")["history"]] == ["i5"]
        assert after.get("/v1/items/i2")["title"] == "Two anew" and after.get("/v1/items?q=eight")["total"] == 1
        failure(after.http.get("/v1/items/i7"), 404)
        assert after.get("/v1/models") == cards
        assert after.http.delete("/v1/users/old").json()["remains"]
    with faking(tmp_path, monkeypatch) as third:
        last = Asking(third.url)
        failure(last.http.get("/v1/users/old"), 404)
        assert last.post("/v1/rank", user_id="old", k=1)["cold"] is True
    for each in (before, after, last):
        each.http.close()


# --------------------------------------------------------------------------- the service itself


def test_states_need_no_question(asking: Asking) -> None:
    assert asking.get("/health") == {"status": "ok"}
    ready = asking.get("/ready")
    assert ready["ready"] is True and ready["models"] == [card["name"] for card in asking.get("/v1/models")["models"]]
    for path in ("/", "/health", "/ready", "/metrics", "/openapi.json", "/v1/items", "/v1/items/k01", "/v1/models"):
        head = asking.http.head(path)
        assert head.status_code == 200 and head.content == b"", path
        if path not in ("/metrics",):
            assert head.headers["content-length"] == asking.http.get(path).headers["content-length"], path


def test_methods_that_an_address_does_not_have(asking: Asking) -> None:
    for method, path, allowed in (
        ("GET", "/v1/rank", "POST"),
        ("HEAD", "/v1/rank", "POST"),
        ("PUT", "/v1/rank", "POST"),
        ("OPTIONS", "/v1/rank", "POST"),
        ("POST", "/v1/items", "GET, HEAD, PUT"),
        ("PATCH", "/v1/items/k01", "DELETE, GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("TRACE", "/v1/users/u01", "DELETE, GET, HEAD"),
    ):
        answer = asking.http.request(method, path)
        assert answer.status_code == 405 and answer.headers["allow"] == allowed, (method, path)
        if method != "HEAD":
            assert failure(answer, 405)["kind"] == "unsupported"
    # A redirect would be to whatever host the client names.
    assert failure(asking.http.post("/v1/rank/", json={}), 404)["kind"] == "unknown-name"


def test_figures_are_what_prometheus_reads(asking: Asking) -> None:
    def figures() -> dict[str, float]:
        text = asking.http.get("/metrics").text
        return {
            f"{sample.name}{sorted(sample.labels.items())}": sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = figures()
    asking.rank(history=HISTORY, candidates=["k10", "k20"])
    asking.refused("/v1/rank", 404, history=HISTORY, model="secret-model-name")
    asking.http.get("/secret-path/no-such")
    asking.http.get("/v1/items/secret-item")
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


def test_the_document_describes_what_there_is(served: Served, asking: Asking) -> None:
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


def test_the_document_of_a_service_without_keys_asks_for_none(asking: Asking) -> None:
    document = asking.get("/openapi.json")
    assert "securitySchemes" not in document["components"]
    assert not [path for path, each in document["paths"].items() for one in each.values() if "security" in one]


def test_the_folder_of_the_run_holds_the_store_and_nothing_else_new(served: Served) -> None:
    assert {path.name for path in Path(served.run).iterdir()} <= {
        *("recipe.yaml", "merged", "service.sqlite", "service.sqlite-wal", "service.sqlite-shm"),
    }
