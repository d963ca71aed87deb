"""Suites of conversations: users, metrics by hand, resume, and the page."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmrec.answer.opening import open_baselines
from llmrec.backends.fake import FakeBackend
from llmrec.bench import conversations
from llmrec.bench.conversations import TABLE, ConversationData, conversation_row, conversation_tables
from llmrec.bench.engine import BenchmarkProgress, compare_models
from llmrec.bench.leaderboard import rewrite
from llmrec.bench.run import run_benchmark
from llmrec.chat import simulator
from llmrec.chat.audience import DataUser, data_user_conversations, data_users
from llmrec.chat.conversation import Conversation
from llmrec.chat.facts import Facts as Known
from llmrec.chat.fit import FitJudge
from llmrec.chat.managers import RuleManager
from llmrec.chat.reading import Reader
from llmrec.chat.state import ITEM, State
from llmrec.chat.tools import Tools
from llmrec.cli import main as cli
from llmrec.errors import DataError, RecipeError
from llmrec.recipe.comparisons import ChatSuite
from llmrec.recipe.load import detect_page_kind, load_chat_suite, load_recipe
from llmrec.types import Item
from tests.chat.shelf import MadeLists, items
from tests.facts import Facts, raises

PAGE: dict[str, Any] = {
    "chat": "made",
    "recipe": "recipes/made/classic.yaml",
    "users": 6,
    "seeds": [0, 1],
    "turns": 3,
    "bootstrap": 60,
    "rows": [
        {"manager": "random"},
        {"manager": "history"},
        {"manager": "rules"},
        {"manager": "rules", "name": "rules of brands", "knows": ["brand"], "users": 3},
    ],
    "pairs": [["rules", "history"], ["rules of brands", "history"]],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    run_benchmark(ChatSuite(**PAGE), out=folder / "out", results=folder / "eval" / "results")
    return folder


def test_suite_has_every_row_and_pair(ran: Path) -> None:
    result = json.loads((ran / "eval" / "results" / "made.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in result["rows"]}
    assert (
        list(rows) == ["random", "history", "rules", "rules of brands"]
        and result["tables"][0]["metric"] == "Hit@5-in-3"
    )
    assert [row["dialogues"]["conversations"] for row in rows.values()] == [12, 12, 12, 6]
    for row in rows.values():
        figures, held = row["tables"][TABLE], row["dialogues"]
        shares = [figures["metrics"][f"Hit@5-in-{turns}"]["value"] for turns in (1, 2, 3)]
        assert shares == sorted(shares) and figures["parse_rate"] == 1
        assert held["shown_outside_the_catalogue"] == 0 and held["seconds_a_turn"] > 0
    assert set(rows["history"]["dialogues"]["calls"]) == {"rank", "show"}
    # Rows with fewer users are compared on the conversations that both have.
    assert [pair.get("n", 12) for pair in result["pairs"]] == [12, 6]
    assert all(pair["p"] >= pair["p_raw"] and pair["low"] <= pair["value"] <= pair["high"] for pair in result["pairs"])
    page = (ran / "eval" / "made.md").read_text(encoding="utf-8")
    assert "| rules of brands (users know brand) |" in page and "rules − history" in page and "Exploratory" in page
    assert rewrite(ran / "eval" / "results") == [ran / "eval" / "made.md"]
    assert (ran / "eval" / "made.md").read_text(encoding="utf-8") == page


def test_only_changed_rows_are_computed_again(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    genuine = conversations.SharedSetting.held
    monkeypatch.setattr(
        conversations.SharedSetting, "held", lambda self, row, out: held.append(row.label) or genuine(self, row, out)
    )
    folders = {"out": ran / "out", "results": ran / "eval" / "results"}
    run_benchmark(ChatSuite(**{**PAGE, "pairs": [], "bootstrap": 50}), **folders)
    assert held == []
    rows = [*PAGE["rows"][:3], {**PAGE["rows"][3], "knows": ["category"]}]
    run_benchmark(ChatSuite(**{**PAGE, "rows": rows, "pairs": []}), **folders)
    assert held == ["rules of brands"]


def test_lists_graded_by_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str | None] = []

    @contextmanager
    def grader(name: str | None) -> Iterator[FitJudge | None]:
        opened.append(name)
        yield None if name is None else FitJudge(FakeBackend())

    monkeypatch.setattr(conversations, "open_grader", grader)
    rows = [{"manager": "rules"}, {"manager": "rules", "ranker": "a model", "users": 3}]
    suite = ChatSuite(**{**PAGE, "rows": rows, "pairs": [["rules, graded by a model", "rules"]]})
    run_benchmark(suite, out=tmp_path / "out", results=tmp_path / "eval" / "results")
    result = json.loads((tmp_path / "eval" / "results" / "made.json").read_text(encoding="utf-8"))
    alone, graded = result["rows"]
    assert opened == [None, "a model"] and graded["name"] == "rules, graded by a model"
    alone, held = alone["dialogues"], graded["dialogues"]
    assert (alone["ranker"], held["ranker"]) == (None, "a model")
    # Grading needs ten prompts per list.
    assert alone["tokens_a_turn"] == 0 < held["tokens_a_turn"] and held["conversations"] == 6
    assert result["pairs"][0]["n"] == 6
    page = (tmp_path / "eval" / "made.md").read_text(encoding="utf-8")
    assert "rules, graded by a model: the first items of each list are reranked by `a model`." in page
    assert "tools are chosen by" not in page


def talk(seed: int, user: str, hit: int | None, turns: int) -> ConversationData:
    return ConversationData(
        seed=seed, user=user, hit=hit, turns=turns, seconds=0.5, tokens=10, calls={"show": turns, "rank": 1}
    )


def test_metrics_by_hand() -> None:
    page = ChatSuite(
        **{**PAGE, "rows": [{"manager": "rules"}, {"manager": "history"}], "pairs": [["rules", "history"]]}
    )
    rules = [talk(0, "a", 1, 1), talk(0, "b", 3, 3), talk(1, "a", None, 3), talk(1, "c", 2, 2)]
    added = conversation_row(page, page.rows[0], rules)
    line, held = added.row.tables[TABLE], added.row.dialogues
    assert [line.metrics[f"Hit@5-in-{turns}"].value for turns in (1, 2, 3)] == [0.25, 0.5, 0.75]
    assert held is not None
    assert (held.conversations, held.users, held.turns, held.turns_to_a_hit) == (4, 3, 2.25, 2.0)
    assert (held.seconds_a_turn, held.tokens_a_turn) == (round(2 / 9, 4), round(40 / 9, 1))
    assert line.parse_rate == 1 and held.calls == {"rank": 4, "show": 9}
    bad = [rules[0].model_copy(update={"unread": 1}), *rules[1:]]
    assert conversation_row(page, page.rows[0], bad).row.tables[TABLE].parse_rate == 1 - 1 / 13
    history = [talk(0, "a", None, 3), talk(1, "a", None, 3), talk(1, "d", 1, 1)]
    rows = [added, conversation_row(page, page.rows[1], history)]
    (pair,) = compare_models(page, BenchmarkProgress(conversation_tables(page, rows), rows))["pairs"]
    # Only user a has both seeds: one hit compared with none.
    assert (pair.value, pair.n, pair.users) == (0.5, 2, 1)


def test_users_do_not_know_their_held_out_item() -> None:
    data = open_baselines(load_recipe("recipes/made/classic.yaml"), ["popularity"]).data
    assert data is not None
    facts = Known(data.dataset.items)
    few, many = data_users(data, facts, 4, 0, past=3), data_users(data, facts, 20, 0, past=3)
    assert few == many[:4] and few != data_users(data, facts, 4, 1, past=3)
    train = data.train.select("user_id", "item_id", "rating").rows()
    targets = dict(data.test.select("user_id", "item_id").rows())
    for one in many:
        known = [(item, rating) for user, item, rating in train if user == one.user]
        assert targets[one.user] == one.target and one.target not in {item for item, _ in known}
        assert [(wish.value, wish.op) for wish in one.state.profile] == [
            (item, "is" if rating >= 4 else "seen") for item, rating in known[-3:]
        ]
        assert one.state.past == tuple(item for item, _ in known[:-3])
        assert all(wish.field == ITEM and not wish.hard for wish in one.state.profile)
    with raises(DataError, Facts(kind="empty", column="data.columns.fields")):
        data_users(data, Known({name: Item(item_id=name, title=name) for name in facts.items}), 4, 0)


def test_users_mention_only_known_attributes() -> None:
    known = {
        name: Item(item_id=name, title=item.title, fields={**item.fields, "price": str(20 + n)})
        for n, (name, item) in enumerate(items().items())
    }
    facts = Known(known)
    assert facts.years == "year" and facts.numeric == {"year", "price"}
    # Years are the only numbers that users mention (as decades), so they do not mention prices.
    assert all("price" not in simulator.sample_user_knowledge(facts, name, (), 0).attributes for name in known)
    talk = Conversation(Tools(facts, MadeLists(known)), RuleManager(), Reader(facts))
    every = [DataUser("u", name, State(), ()) for name in known]
    lines = [line for _, held in data_user_conversations(talk, every, 0, 5, ("genres",)) for line in held.lines]
    # Users mention neither years nor directors.
    assert not re.search(r"\d|Vale|Quist|Marsh|Okoro", " ".join(lines)) and sum("Sci-Fi" in line for line in lines) > 2


@pytest.mark.parametrize(
    ("changed", "facts"),
    [
        ({"pairs": [["rules", "rule"]]}, Facts(kind="contradiction", says="history")),
        ({"rows": [{"manager": "rules"}, {"manager": "rules"}]}, Facts(kind="contradiction")),
        ({"rows": [{"manager": "rules", "knows": ["genre"]}], "pairs": []}, Facts(kind="unknown-name", column="knows")),
        ({"recommender": "mf", "pairs": []}, Facts(kind="unknown-name")),
        ({"items": "none.csv"}, Facts(kind="missing-file", column="items")),
        ({"k": 3}, Facts(kind="bad-value")),
    ],
)
def test_rejects_wrong_pages(changed: dict[str, Any], facts: Facts, tmp_path: Path) -> None:
    page = tmp_path / "made.yaml"
    page.write_text(json.dumps({**PAGE, **changed}), encoding="utf-8")
    assert detect_page_kind(page) == "chat"
    with raises(RecipeError, facts):
        run_benchmark(load_chat_suite(page), out=tmp_path / "out", results=tmp_path / "results")


def test_commands_check_and_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, results = tmp_path / "made.yaml", tmp_path / "eval" / "results"
    page.write_text(json.dumps({**PAGE, "users": 2, "seeds": [0]}), encoding="utf-8")
    for words in (
        ["check", str(page)],
        ["eval", str(page), "turns=2", "--out", str(tmp_path / "run"), "--results", str(results)],
    ):
        monkeypatch.setattr("sys.argv", ["llmrec", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    output = capsys.readouterr().out
    assert "4 models, 2 planned comparisons" in output and "Hit@5-in-2" in output
    assert json.loads((results / "made.json").read_text(encoding="utf-8"))["protocol"]["turns"] == 2


def test_language_model_as_manager(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the train extra is not installed")
    model = shutil.copytree(llama_folder, tmp_path / "model")
    rows = [{"manager": "rules"}, {"manager": str(model), "name": "model", "users": 1}]
    # Without a history, so that prompts fit: the test tokenizer splits most words into letters.
    page = ChatSuite(**{**PAGE, "seeds": [0], "turns": 1, "past": 0, "rows": rows, "pairs": [["model", "rules"]]})
    files = run_benchmark(page, out=tmp_path / "out", results=tmp_path / "results").files
    result = json.loads(files["results"].read_text(encoding="utf-8"))
    row = result["rows"][1]
    held = row["dialogues"]
    assert (held["conversations"], row["tables"][TABLE]["parse_rate"]) == (1, 1) and held["tokens_a_turn"] > 100
    assert result["pairs"][0]["n"] == 1 and "model: Exploratory" in files["page"].read_text(encoding="utf-8")
    before = conversations._model_files(str(model))
    os.utime(model / "config.json", ns=(1, 1))
    assert conversations._model_files(str(model)) != before and conversations._model_files("rules") == []
