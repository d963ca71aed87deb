"""`llmrec rank` with every strategy: settings, profiles in two steps, servers, cost and order of candidates."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmrec.answer.prompting import rank_requests, ranking_notes
from llmrec.answer.rank.run import rank_file
from llmrec.answer.strategy import TaskStrategy, parse_strategy_settings, select_ranking_strategy
from llmrec.backends.encode import Encoder
from llmrec.backends.fake import FakeBackend
from llmrec.backends.hf.backend import HFBackend
from llmrec.data.requests import RankRequest, parse_request
from llmrec.errors import ErrorKind, LlmrecError, RecipeError
from llmrec.pipeline import bundle
from llmrec.types import Ranking, Unparsed
from tests.answer.rank_cases import TITLES, items_csv, jsonl, lines, make_run, options, records
from tests.conftest import make_tokenizer
from tests.facts import Facts, raises
from tests.servers.faulty import EVERYTHING, Behaviour, running

pytest.importorskip("torch", reason="the train extra is not installed")

TWO = TaskStrategy("direct", "with-profile", "two-step")
POOL = ["Alien", "Jaws", "Rocky"]


def requests_of(*requests: dict[str, Any]) -> list[RankRequest]:
    return [parse_request({"candidates": POOL, **each}, n, None) for n, each in enumerate(requests, start=1)]


def test_settings_change_cost(plain: bundle.Bundle, encoder: Encoder) -> None:
    for strategy, settings, forwards in (
        ("label", (), 1),
        ("label", ("eval.permutations=3",), 3),
        ("permutation", ("depth=1",), 1),
        ("permutation", ("depth=2", "permutations=2"), 4),
        ("pairwise", ("eval.all_pairs=0", "eval.depth=1"), 4),
        ("two-step", ("permutations=2",), 4),
    ):
        way = select_ranking_strategy(plain, strategy=strategy, settings=settings)
        backend = FakeBackend(complete=lambda text: "quiet films")
        (answer,) = rank_requests(
            plain, requests_of({"history": ["Heat"]}), way=way, backend=backend, encoder=encoder, batch=1
        )
        assert isinstance(answer, Ranking) and answer.cost.forwards == forwards, (strategy, settings)


@pytest.mark.parametrize(
    ("strategy", "settings", "kind", "key", "says"),
    [
        ("label", ("permutation=2",), "unknown-key", "eval.permutation", "did you mean 'permutations'"),
        ("label", ("eval.depth=2",), "unknown-key", "eval.depth", ("'label'", "its settings: eval.permutations")),
        ("likelihood", ("eval.depth=2",), "unknown-key", "eval.depth", "its settings: none"),
        ("label", ("eval.debias=measured",), "unsupported", "eval.debias", "--set eval.permutations=4"),
        ("search", ("eval.beams=5",), "unsupported", "eval.beams", "use the option --beams"),
        ("label", ("permutations",), "syntax", "--set", "key=value, such as eval.permutations=3"),
        ("label", ("permutations=0",), "bad-value", "eval.permutations", "greater than 0"),
        ("label", ("permutations=2", "eval.permutations=3"), "duplicate", "eval.permutations", ()),
        ("window", ("eval.window=3",), "bad-value", "eval.window_step", "below eval.window"),
    ],
)
def test_invalid_settings_are_refused(
    strategy: str, settings: tuple[str, ...], kind: ErrorKind, key: str, says: str | tuple[str, ...]
) -> None:
    with raises(RecipeError, Facts(kind, column=key, says=says)):
        parse_strategy_settings(strategy, settings)


def test_settings_change_the_key(llama_folder: Path, tmp_path: Path) -> None:
    path, items = jsonl(tmp_path / "in.jsonl", records(2)), items_csv(tmp_path)
    keys, costs = set(), []
    for settings in ((), ("eval.permutations=2",)):
        chosen = options(llama_folder, path, tmp_path / "out.jsonl", items=items, strategy="label", settings=settings)
        summary = rank_file(chosen)
        keys.add(summary["key"])
        costs.append([row["forwards"] for row in lines(chosen.out)])
    assert len(keys) == 2 and costs == [[1, 1], [2, 2]]
    assert summary["options"] == {"permutations": 2}


def test_two_step_needs_profile_template(plain: bundle.Bundle, llama_folder: Path, tmp_path: Path) -> None:
    assert select_ranking_strategy(plain, strategy="two-step") == TWO
    assert select_ranking_strategy(plain, strategy="two-step", template="profile-only").template == "profile-only"
    with raises(
        RecipeError, Facts("contradiction", column="--template", says=("--template shortlist", "with-profile"))
    ):
        select_ranking_strategy(plain, strategy="two-step", template="shortlist")
    tuned = bundle.read(str(make_run(llama_folder, tmp_path)))
    assert select_ranking_strategy(tuned, strategy="label").template == "shortlist"
    assert select_ranking_strategy(tuned, strategy="two-step").template == "with-profile"
    # A model evaluated with a template that shows a profile keeps this template.
    section = tuned.tasks.direct
    assert section is not None
    shown = section.model_copy(update={"templates": (), "eval_templates": ("profile-only",)})
    tuned = replace(tuned, tasks=tuned.tasks.model_copy(update={"direct": shown}))
    assert select_ranking_strategy(tuned, strategy="two-step").template == "profile-only"


def test_two_step_writes_missing_profiles(plain: bundle.Bundle, encoder: Encoder) -> None:
    texts: list[str] = []
    backend = FakeBackend(
        complete=lambda text: "quiet\nfilms",
        prefer=lambda text, label: texts.append(text) or -float(ord(label[-1])),  # type: ignore[func-returns-value]
    )
    requests = requests_of({"id": "a", "history": ["Heat"]}, {"id": "b", "profile": "likes noise"}, {"id": "c"})
    first, second, cold = rank_requests(plain, requests, way=TWO, backend=backend, encoder=encoder, batch=4)
    assert isinstance(first, Ranking) and first.raw == "quiet films" and first.cost.forwards == 2
    assert isinstance(second, Ranking) and second.raw is None and second.cost.forwards == 1
    assert "profile quiet films" in texts[0] and "profile likes noise" in texts[3] and "Heat" in texts[0]
    assert ranking_notes(TWO, requests[0], first) == ()
    assert "without a history" in ranking_notes(TWO, requests[2], cold)[0]


def test_too_long_profile_fails_alone(plain: bundle.Bundle, encoder: Encoder) -> None:
    tight = Encoder(encoder.tokenizer, max_length=700)

    class Strict(FakeBackend):
        """Rejects prompts that an engine would reject."""

        def score(self, prompts: Any, candidates: Any, *, closed: bool = True) -> Any:
            for prompt in prompts:
                tight.prompt(prompt)
            return super().score(prompts, candidates, closed=closed)

    backend = Strict(complete=lambda text: "ž" * 300 if "Heat" in text else "quiet films")
    requests = requests_of({"id": "a", "history": ["Heat"]}, {"id": "b", "history": ["Fargo"]})
    failed, ranked = rank_requests(plain, requests, way=TWO, backend=backend, encoder=tight, batch=4)
    assert isinstance(failed, Unparsed) and "second prompt" in failed.reason and "700" in failed.reason
    assert isinstance(ranked, Ranking) and ranked.raw == "quiet films"


def test_output_has_written_profiles(llama_folder: Path, tmp_path: Path) -> None:
    rows = [*records(2), {**records(3)[2], "profile": "likes noise"}]
    path, items = jsonl(tmp_path / "in.jsonl", rows), items_csv(tmp_path)
    chosen = options(llama_folder, path, tmp_path / "out.jsonl", items=items, strategy="two-step", batch=8)
    summary = rank_file(chosen)
    results = lines(chosen.out)
    assert all(row["error"] is None and sorted(row["items"]) == sorted(r["candidates"])
               for row, r in zip(results, rows, strict=True))  # fmt: skip
    assert results[0]["profile"] and results[2]["profile"] is None
    assert results[2]["forwards"] == 1 < results[0]["forwards"]
    for name in ("prompt_tokens", "completion_tokens", "forwards"):
        assert summary[name] == sum(row[name] for row in results)
        assert summary["per_request"][name] == pytest.approx(summary[name] / 3, abs=0.01)
    each = summary["seconds_per_request"]
    assert 0 < each["fastest_part"] <= each["mean"] <= each["slowest_part"]
    assert (summary["template"], summary["rationale"], summary["retriever"]) == ("with-profile", None, None)


def test_server_key_is_not_written(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, tokenizer = "sk-proj-Zx81QmW0pT7v", make_tokenizer()
    monkeypatch.setenv("FILMS_KEY", secret)
    path, items = jsonl(tmp_path / "in.jsonl", records(3)), items_csv(tmp_path)
    with running(Behaviour(key=secret, count=lambda text: len(tokenizer.encode(text)))) as server:
        ask = {"backend": "openai", "server_url": server.url, "server_model": "films", "server_key_env": "FILMS_KEY"}
        chosen = options(llama_folder, path, tmp_path / "out.jsonl", items=items, strategy="label", rationale=1, **ask)
        summary = rank_file(chosen)
    assert (summary["ranked"], summary["engine"], summary["server"]) == (3, "openai", "films")
    for row, request in zip(lines(chosen.out), records(3), strict=True):
        assert sorted(row["items"]) == sorted(request["candidates"]) and row["forwards"] == 1
        assert len(row["rationale"]) == 1 and row["rationale_forwards"] > 0
    assert all(secret.encode() not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_server_without_scores_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    path, items = jsonl(tmp_path / "in.jsonl", records(2)), items_csv(tmp_path)
    offers = EVERYTHING - {"logprobs", "named", "echo", "chat logprobs"}
    with (
        running(Behaviour(offers=offers)) as server,
        raises(LlmrecError, Facts("unsupported", says=("films", "list, parsed and text"))),
    ):
        ask = {"backend": "openai", "server_url": server.url, "server_model": "films"}
        rank_file(options(llama_folder, path, tmp_path / "out.jsonl", items=items, strategy="label", **ask))


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"backend": "openai"}, Facts("missing-key", column="--server-model")),
        ({"server_model": "films"}, Facts("contradiction", column="--server-model", says="--backend openai")),
        (
            {"backend": "openai", "server_model": "m", "server_url": "https://u:secret@h/v1"},
            Facts("bad-value", column="--server-url", says="http://host:port/v1"),
        ),
        (
            {"backend": "openai", "server_model": "m", "server_key_env": "sk-secret"},
            Facts("bad-value", column="--server-key-env", says="such as OPENAI_API_KEY"),
        ),
        (
            {"backend": "openai", "server_model": "m", "candidates": "all"},
            Facts("contradiction", column="--backend", says="--backend hf or vllm"),
        ),
    ],
)
def test_invalid_server_options_are_refused(
    llama_folder: Path, tmp_path: Path, changes: dict[str, Any], facts: Facts
) -> None:
    path = jsonl(tmp_path / "in.jsonl", [{"candidates": ["a", "b"]}])
    with raises(RecipeError, facts) as refused:
        rank_file(options(llama_folder, path, tmp_path / "out.jsonl", items=items_csv(tmp_path), **changes))
    assert "secret" not in str(refused.value)


STRATEGIES = (
    *("label", "permutation", "window", "pairwise", "setwise", "pointwise-yes", "two-step"),
    *("likelihood", "likelihood-prior"),
)


def way_of(name: str) -> TaskStrategy:
    if name.startswith("likelihood"):
        return TaskStrategy("sequential", "continue-list", name)
    return TaskStrategy("direct", "with-profile" if name == "two-step" else "shortlist", name)


def requests(count: int, candidates: int) -> list[RankRequest]:
    results = []
    for n, record in enumerate(records(count, candidates=candidates), start=1):
        texts = {key: [{"item_id": i, "title": TITLES[i]} for i in record[key]] for key in ("history", "candidates")}
        results.append(parse_request({**record, **texts}, n, None))
    return results


@pytest.mark.parametrize("name", STRATEGIES)
def test_ranking_does_not_depend_on_order(name: str, tools: tuple[bundle.Bundle, HFBackend, Encoder]) -> None:
    opened, backend, encoder = tools
    original = requests(3, 6)
    turned = []
    for request in original[::-1]:
        pool = list(request.candidates)
        random.Random(request.id).shuffle(pool)
        turned.append(replace(request, candidates=tuple(pool)))
    first, second = (
        rank_requests(opened, each, way=way_of(name), backend=backend, encoder=encoder, batch=2)
        for each in (original, turned)
    )
    for request, one, other in zip(original, first, second[::-1], strict=True):
        assert isinstance(one, Ranking) and isinstance(other, Ranking)
        assert sorted(one.items) == sorted(item.item_id for item in request.candidates)
        assert list(one.scores) == sorted(one.scores, reverse=True)
        assert one.items == other.items and one.cost.forwards > 0
        assert one.scores == pytest.approx(other.scores, abs=1e-3)


def test_single_candidate_needs_no_model(tools: tuple[bundle.Bundle, HFBackend, Encoder]) -> None:
    opened, backend, encoder = tools
    (request,) = requests(1, 1)
    for name in STRATEGIES:
        (answer,) = rank_requests(opened, [request], way=way_of(name), backend=backend, encoder=encoder, batch=1)
        assert isinstance(answer, Ranking)
        without = not name.startswith("likelihood")
        assert (answer.cost.forwards == 0) == without == bool(ranking_notes(way_of(name), request, answer))


def test_large_candidate_sets(tools: tuple[bundle.Bundle, HFBackend, Encoder]) -> None:
    opened, backend, encoder = tools
    many = [{"item_id": item, "title": each} for item, each in list(TITLES.items())[:40]]
    request = parse_request({"id": "large", "candidates": many}, 1, None)
    tight = Encoder(encoder.tokenizer, max_length=620)
    narrow = HFBackend(backend.model, tight)
    for name in ("label", "window", "setwise", "pointwise-yes"):
        (answer,) = rank_requests(opened, [request], way=way_of(name), backend=narrow, encoder=tight, batch=1)
        if name == "label":
            assert isinstance(answer, Unparsed) and "more than the maximum of 620" in answer.reason
        else:
            assert isinstance(answer, Ranking) and len(answer.items) == 40
