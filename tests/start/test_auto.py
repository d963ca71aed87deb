"""`llmrec auto`: what is tried, what an early end leaves, and what comes out."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmrec.answer.loaded import load
from llmrec.answer.opening import default_sentence
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.data.dataset import Dataset
from llmrec.durable import Json
from llmrec.errors import DataError, EngineFailure, LlmrecError, RecipeError
from llmrec.pipeline.run import Run
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import dump, load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.results import FusionWeights, PartWeight
from llmrec.start import auto as autos
from llmrec.start.auto import Part, Plan, data_page, has_texts, judged, parts_for, plan, with_model
from llmrec.start.auto_trial import Done
from llmrec.start.options import AutoOptions, budget_seconds
from tests import planted

# Grids that are searched through in a moment, so that no test depends on a budget.
PLAIN: dict[str, Json] = {"weighting": "none", "shrinkage": 0.0, "asymmetry": 0.5}
FEW = [
    Part("popularity", "popularity"),
    Part("markov", "markov", {"order": 2}),
    Part("item-knn", "item-knn", {**PLAIN, "decay": 0.5}),
    Part("item-knn, whole history", "item-knn", {**PLAIN, "history": 200, "decay": 1.0}),
]
ENDLESS = 1e9
"""Seconds of a budget that is never spent."""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write 60 users who walk along a ring of 30 items, with a title each."""
    return walks(tmp_path)


def walks(folder: Path) -> Path:
    """Write the table into a folder."""
    draws, lines = np.random.default_rng(0), list[str]()
    for user in range(60):
        place = int(draws.integers(30))
        for step in range(8):
            place = (place + (1 if draws.random() < 0.9 else int(draws.integers(2, 9)))) % 30
            lines.append(f"u{user},i{place},Tale number {place},{1000 * user + step}")
    return Path(written(folder / "walks.csv", "user,item,title,time", lines))


def written(path: Path, header: str, rows: Iterable[str]) -> str:
    """Write a table, and return its path."""
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


def read(folder: Path, say: Callable[[str], None] = lambda line: None, **asked: str) -> Dataset:
    """Return the data that `auto` reads."""
    (folder / "state").mkdir(exist_ok=True)
    recipe = data_page(AutoOptions(**asked), "own-auto", folder / "state", say)  # type: ignore[arg-type]
    return load_split(recipe.data, 0).dataset


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try few recommenders, whose grids are small."""
    try_few(monkeypatch)


@dataclass(frozen=True)
class Whole:
    """A whole call: what was asked, what came of it, and the lines that were told."""

    options: AutoOptions
    made: autos.Auto
    lines: list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, lines = tmp_path_factory.mktemp("auto"), list[str]()
    options = AutoOptions(table=str(walks(folder)), budget=f"{ENDLESS}s", out=folder / "run", classic=True)
    with pytest.MonkeyPatch.context() as patch:
        try_few(patch)
        return Whole(options, autos.build(options, lines.append), lines)


def try_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `few`."""
    monkeypatch.setattr(autos, "parts_for", lambda dataset, encoder, **more: FEW)
    monkeypatch.setattr(autos, "installed_encoder", lambda: None)
    monkeypatch.setattr(autos, "_LEAST_FINISH", 1.0)


def test_a_table_becomes_a_recommender_and_a_second_call_tries_nothing_again(
    whole: Whole, tmp_path: Path, few: None, caplog: pytest.LogCaptureFixture
) -> None:
    options, made, lines = whole.options, whole.made, whole.lines
    best = {tried.part.label: tried.best for tried in made.tried}
    assert all(best.values()) and best["markov"].value > best["popularity"].value  # type: ignore[union-attr]
    # Every grid was searched through.
    assert [tried.note for tried in made.tried] == [""] * len(FEW)
    assert len(next(tried for tried in made.tried if tried.part.label == "item-knn").trials) > 3
    rows = {row["predictor"]: row for row in made.run.results["rows"]}
    assert "fusion" in rows and "random" in rows and "markov-1" in rows
    told = " ".join(autos.summary(made).split())
    assert "settings tried" in told and "1 setting tried" in told and "point" not in told + "".join(lines)
    chosen = load_recipe(made.folder / "recipe.yaml")
    assert chosen.eval.arms == () and not (made.folder / "merged").exists()

    record = json.loads((made.folder / "auto" / "auto.json").read_text())
    again: list[str] = []
    same = autos.build(options, again.append)
    found = json.loads((same.folder / "auto" / "auto.json").read_text())
    for each in (*record["parts"], *found["parts"]):
        each["seconds"] = 0
    assert found["parts"] == record["parts"] and (found["served"], found["sentence"]) == (made.served, made.sentence)
    assert not [line for line in again if "new setting" in line and " 0 new settings" not in line]
    assert "no language model: --classic" in again

    asked, lists = tmp_path / "asked.jsonl", tmp_path / "lists.jsonl"
    asked.write_text('{"id": "a", "history": ["i3", "i4"]}\n', encoding="utf-8")
    rank_file(RankOptions(baseline="fusion", recipe=str(made.folder), requests=asked, out=lists, top=3))
    (told,) = [json.loads(line) for line in lists.read_text(encoding="utf-8").splitlines()]
    with load(str(made.folder), backend="hf") as rec:
        assert told["items"] == [each.item_id for each in rec.rank(history=["i3", "i4"], k=3)]

    assert "have changed" not in caplog.text
    table = Path(options.table)
    table.write_text("".join(table.read_text(encoding="utf-8").splitlines(keepends=True)[:-3]), encoding="utf-8")
    rank_file(
        RankOptions(baseline="fusion", recipe=str(made.folder), requests=asked, out=tmp_path / "later.jsonl", top=3)
    )
    assert "have changed since its evaluation" in caplog.text


@pytest.mark.slow
def test_a_learned_ranker_is_served_where_it_is_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightgbm", reason="the ranker extra is not installed")
    data = planted.write(tmp_path / "data")
    try_few(monkeypatch)
    texts: dict[str, Json] = {"decay": 0.7, "history": 20, "whitening": 0.0}
    parts = [Part("popularity", "popularity"), Part("markov-1", "markov-1"), Part("content", "content", texts)]
    monkeypatch.setattr(autos, "parts_for", lambda dataset, encoder, **more: parts)
    options = AutoOptions(
        table=str(data / "events.csv"),
        items=str(data / "items.csv"),
        budget=f"{ENDLESS}s",
        out=tmp_path / "run",
        classic=True,
    )
    made = autos.build(options)
    rows = {row["predictor"]: row for row in made.run.results["rows"]}
    assert rows["fusion with texts"]["fusion"]["form"] == "ranker" and made.served == "fusion with texts"
    lamps = [f"i{n:02d}" for n in range(planted.ITEMS) if planted.WORDS[n % len(planted.WORDS)] == "lamp"]
    with load(str(made.folder)) as rec:
        assert rec.models[0] == "fusion with texts"
        assert {item.item_id for item in rec.rank(history=lamps[:2], k=4)} == set(lamps[2:])


def test_what_is_best_on_validation_is_served_and_named_everywhere(whole: Whole) -> None:
    made = whole.made
    choice, rows = made.run.results["choice"], {row["id"]: row for row in made.run.results["rows"]}
    # A fusion that is one part alone is that part.
    alone = {name for name, row in rows.items() if (row.get("fusion") or {}).get("form") == "alone"}
    assert set(choice["figures"]) == rows.keys() - alone - {"sequential/baseline/random"}
    assert 20 <= choice["users"] < 60
    assert choice["value"] == choice["figures"][choice["row"]] == max(choice["figures"].values())
    name = rows[choice["row"]]["predictor"]
    with load(str(made.folder)) as rec:
        assert made.served == rec.models[0] == name
    line = default_sentence(str(made.folder))
    assert line.startswith(
        f"the default is {name}, the best of {len(choice['figures'])} on {choice['users']} validation users"
    )

    # The terminal and the report say the same of the same row.
    report = (made.folder / "report" / "report.md").read_text(encoding="utf-8")
    page = (made.folder / "report" / "index.html").read_text(encoding="utf-8")
    figure = rows[choice["row"]]["metrics"]["NDCG@10"]["value"]
    short = name.partition("(")[0]
    assert made.sentence in report and made.sentence.startswith(short) and f" is {figure:.3f} [" in made.sentence
    assert f"Serve it ({name}): llmrec serve" in autos.summary(made)
    card = page[page.index('<article class="card">') :]
    assert f'<span class="figure">{figure:.3f}</span>' in card[: card.index("</article>")]
    assert "no significant difference" in page or "ahead" in page or "behind" in page
    # Of several rows of one method the sentence names one parameter that tells them apart.
    assert "weighting=none" not in made.sentence


def test_of_few_users_none_of_whom_weighs_the_best_trial_is_served(tmp_path: Path, few: None) -> None:
    rows = [f"u{user},i{(user + step) % 9},{10 * user + step}" for user in range(12) for step in range(6)]
    table = written(tmp_path / "t.csv", "user,item,time", rows)
    made = autos.build(AutoOptions(table=table, budget=f"{ENDLESS}s", out=tmp_path / "r", classic=True))
    best = max((tried for tried in made.tried if tried.best), key=lambda tried: tried.best.value if tried.best else 0)
    assert not any(row.get("fusion") for row in made.run.results["rows"])
    assert made.served.partition("(")[0] == best.part.baseline and made.sentence.startswith(f"{best.part.baseline}")
    with load(str(made.folder)) as rec:
        assert rec.models[0] == made.served


def search_of(table: Path, tmp_path: Path, parts: list[Part], seconds: float, lines: list[str]) -> autos._Search:
    """Return a search over a table's recommenders, which has not begun."""
    recipe = data_page(AutoOptions(table=str(table)), "walks-auto", tmp_path, lambda line: None)
    state = tmp_path / "auto"
    state.mkdir(parents=True)
    (state / "data.yaml").write_text(dump(recipe), encoding="utf-8")
    data = load_split(recipe.data, recipe.seed)
    return autos._Search(recipe, data.fingerprint, state, parts, time.monotonic() + seconds, seconds, lines.append)


def test_what_was_found_before_an_interrupt_is_chosen(
    table: Path, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, sleep = search_of(table, tmp_path, FEW, ENDLESS, []), time.sleep

    def interrupted(seconds: float) -> None:
        if sum(len(tried.trials) for tried in search.tried.values()) >= 2:
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(autos.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.first()
        search.rest()
    assert not search._left() <= 0
    chosen = search.chosen(10).tasks.present()["sequential"].baselines
    assert {"popularity", "markov", "random", "markov-1"} <= {each.name for each in chosen}


@pytest.mark.slow
def test_a_part_that_breaks_or_takes_too_long_leaves_the_others(table: Path, tmp_path: Path, few: None) -> None:
    lines: list[str] = []
    parts = [Part("broken", "item-knn", {"history": -1}), *FEW]
    search = search_of(table, tmp_path, parts, ENDLESS, lines)
    search.first()
    assert [len(tried.trials) for tried in search.tried.values()] == [0, 1, 1, 1, 1]
    assert "failed" in search.tried["broken"].note and "history" in (tmp_path / "auto/trials/log.txt").read_text()
    search.budget = 0.0  # no first trial may take any time
    search.parts = [Part("ease", "ease"), *FEW]
    search.first()
    assert search.tried["ease"].note == "its time limit was reached"
    names = [each.name for each in search.chosen(10).tasks.present()["sequential"].baselines]
    assert "ease" not in names and "popularity" in names


@pytest.mark.slow
def test_a_network_whose_epochs_are_too_slow_is_not_begun(table: Path, tmp_path: Path, few: None) -> None:
    pytest.importorskip("torch")
    lines: list[str] = []
    search = search_of(table, tmp_path, [Part("sasrec", "sasrec", {"quiet": True, "dim": 8})], ENDLESS, lines)
    slow = tmp_path / "auto" / "trials" / "sasrec.epoch.json"
    slow.parent.mkdir()
    slow.write_text(json.dumps({"key": search._key(search.parts[0]), "seconds": ENDLESS}), encoding="utf-8")
    search.first()
    assert search.tried["sasrec"].note == autos._SLOW and autos._SLOW in lines[-1]
    # It is told from one epoch, which is measured once.
    slow.write_text(json.dumps({"key": "of other data", "seconds": ENDLESS}), encoding="utf-8")
    search.first()
    assert search.tried["sasrec"].trials and 0 < json.loads(slow.read_text())["seconds"] < ENDLESS


def test_what_promises_more_gets_more_of_the_time() -> None:
    good, weak, nothing = (autos.Tried(Part(name, "markov")) for name in ("good", "weak", "nothing"))
    good.trials, weak.trials = [Done({}, 0.08, 1.0)], [Done({}, 0.01, 1.0), Done({}, 0.04, 1.0)]
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml")
    search = autos._Search(recipe, "", Path(), [], 290.0, 1.0, print, clock=lambda: 100.0)
    assert search._share([good, weak]) == pytest.approx(170.0 * (0.125 + 0.75 * 16 / 17))
    assert search._share([weak, weak]) == pytest.approx(85.0)
    assert search._share([nothing, good]) == pytest.approx(170.0 / 8)


def test_the_final_run_has_time_for_learned_rankers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autos, "installed", lambda package: True)
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml")
    left = {}
    for cases in (0, 199, 5000):
        search = autos._Search(recipe, "", Path(), [], 290.0, 1.0, print, clock=lambda: 100.0, cases=cases)
        search.tried = {name: autos.Tried(Part(name, "markov"), [Done({}, 0.1, 20.0)]) for name in "abcd"}
        left[cases] = search._left()
    # Without enough cases for a ranker only the fits of four members are to come, twice.
    assert left[0] == left[199] == pytest.approx(190.0 - 2 * 4 * 20)
    assert left[5000] == pytest.approx(left[0] - 5000 * 16 * 3e-4)


def test_no_time_is_an_error_that_names_the_option(table: Path, tmp_path: Path, few: None) -> None:
    with pytest.raises(DataError) as caught:
        autos.build(AutoOptions(table=str(table), budget="0.1s", out=tmp_path / "run"))
    assert caught.value.kind == "too-few" and "--budget" in str(caught.value)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("10", 600), ("2 min", 120)])
def test_budgets(text: str, seconds: float) -> None:
    assert budget_seconds(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3m", "0s", "3 weeks"])
def test_no_budgets(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        budget_seconds(text, "--budget")
    assert caught.value.column == "--budget"


def test_texts_and_size_decide_what_is_tried(table: Path, tmp_path: Path) -> None:
    recipe = data_page(AutoOptions(table=str(table)), "walks-auto", tmp_path, lambda line: None)
    data = load_split(recipe.data, 0).dataset
    assert has_texts(data)

    def labels(encoder: str | None, *, torch: bool, budget: float) -> set[str]:
        return {part.label for part in parts_for(data, encoder, texts=True, torch=torch, budget=budget)}

    assert {"content", "transitions-text", "ease"} < labels("all-MiniLM-L6-v2", torch=False, budget=7200)
    networks = {"sasrec", "transitions-tuned"}
    assert not networks & labels("all-MiniLM-L6-v2", torch=False, budget=7200)
    assert networks & labels("all-MiniLM-L6-v2", torch=True, budget=1800) == {"sasrec"}
    assert networks & labels("all-MiniLM-L6-v2", torch=True, budget=7200) == networks
    assert networks & labels(None, torch=True, budget=7200) == {"sasrec"}
    content = next(part for part in parts_for(data, None, texts=True, torch=True, budget=60) if part.label == "content")
    assert content.fixed == {}


def test_the_budget_says_whether_a_model_is_tuned() -> None:
    assert plan(1800, titles=True, device="cpu").steps == 0
    long = plan(4 * 3600, titles=True, device="cpu")
    assert long.steps > 600 and long.seconds == 2 * 3600
    assert plan(1800, titles=True, device="cuda").steps > 600
    assert plan(4 * 3600, titles=False, device="cuda").steps == 0
    assert "llmrec[train]" in plan(4 * 3600, titles=True, device=None).message


def test_the_recipe_with_a_model_joins_it_with_the_parts(table: Path, tmp_path: Path) -> None:
    recipe = data_page(AutoOptions(table=str(table)), "walks-auto", tmp_path, lambda line: None)
    made = with_model(recipe, plan(4 * 3600, titles=True, device="cpu"))
    assert made.eval.arms == ("tuned",) and made.eval.fusion.model_users == 200 and made.train.steps > 600
    assert made.tasks.present()["sequential"].baselines == recipe.tasks.present()["sequential"].baselines


@pytest.mark.parametrize(
    ("loss", "low", "kept"), [(0.01, 0.002, True), (0.01, -0.002, False), (-0.01, -0.02, False), (None, None, False)]
)
def test_validation_users_say_whether_a_model_is_kept(loss: float | None, low: float | None, kept: bool) -> None:
    part = PartWeight(name="search", weight=0.1, loss=loss, loss_low=low, loss_high=None if loss is None else 0.05)
    weights = FusionWeights(form="logit", parts=(PartWeight(name="markov", weight=1.0), part))
    model = SimpleNamespace(predictor="search", arm="tuned", fusion=None)
    joined = SimpleNamespace(predictor="fusion with models", arm="tuned", fusion=weights)
    found = judged(SimpleNamespace(rows=[model, joined]))  # type: ignore[arg-type]
    assert found.kept is kept and ("is used" in found.sentence) is kept


def test_the_best_of_equal_trials_is_the_first() -> None:
    tried = autos.Tried(FEW[0], [Done({"a": 1}, 0.5, 1.0), Done({"a": 2}, 0.5, 1.0)])
    assert tried.best == tried.trials[0]


def test_a_table_whose_faults_can_be_mended_is_mended_in_the_run_folder(tmp_path: Path) -> None:
    rows = [f"u{user},s{(user + step) % 12},{10 * user + step}" for user in range(20) for step in range(5)]
    table = written(tmp_path / "orders.csv", "user,product,time", rows)
    items = written(tmp_path / "items.csv", "sku,title", [f"s{n},Thing {n}" for n in range(12)])
    before = Path(table).read_bytes()
    data = read(tmp_path, table=table, items=items)
    assert data.items["s3"].title == "Thing 3" and len(data.interactions) == 100
    assert Path(table).read_bytes() == before


def test_rows_are_kept_where_nothing_needs_what_they_lack_and_lost_ones_are_told(tmp_path: Path) -> None:
    rows = [
        f"u{user},s{(user + step) % 12},{'' if step == 2 else 4},{'' if user == step == 0 else 10 * user + step}"
        for user in range(20)
        for step in range(5)
    ]
    table = written(tmp_path / "orders.csv", "user,product,stars,time", rows)
    listed = [f"s{n},{'' if n == 3 else f'Thing {n}'}" for n in range(11)]
    items = written(tmp_path / "items.csv", "product,title", listed)
    told: list[str] = []
    data = read(tmp_path, told.append, table=table, items=items)
    lost = sum("s11," in row for row in rows) + 1
    assert len(data.interactions) == 100 - lost and data.items["s3"].title == "s3" and data.name == "orders"
    assert "1 rows without a time were removed" in told
    assert any(line.startswith(f"{lost - 1} rows without an entry in ") for line in told)


def test_whoever_has_few_interactions_is_served_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.start.plan._CORE_ROWS", 100)
    monkeypatch.setattr("llmrec.start.plan._CORE_LEFT", 5)
    draws = np.random.default_rng(1)
    rows = [
        f"u{user},s{item},{n}" for user in range(120) for n, item in enumerate(draws.permutation(15)[: 1 + user % 7])
    ]
    data = read(tmp_path, table=written(tmp_path / "t.csv", "user,item,time", rows))
    assert "user_core: " in (tmp_path / "state" / "table.yaml").read_text(encoding="utf-8")
    assert data.interactions["user_id"].n_unique() == 120


def test_trials_belong_to_the_rows_of_the_table(table: Path, tmp_path: Path) -> None:
    first = search_of(table, tmp_path / "a", FEW, 9.0, [])
    same = search_of(table, tmp_path / "b", FEW, 9.0, [])
    with table.open("a", encoding="utf-8") as file:
        file.write("u0,i1,Tale number 1,999999\n")
    grown = search_of(table, tmp_path / "c", FEW, 9.0, [])
    assert first._key(FEW[0]) == same._key(FEW[0]) != grown._key(FEW[0])


def test_dates_and_a_query_can_be_asked_for(tmp_path: Path) -> None:
    rows = [f"u{user},s{(user + step) % 9},0{1 + step}/0{1 + user % 9}/2024" for user in range(20) for step in range(5)]
    table = written(tmp_path / "t.csv", "user,item,day", rows)
    assert read(tmp_path, table=table, dates="month-first").interactions.height == 100
    with closing(sqlite3.connect(tmp_path / "shop.db")) as shop:
        shop.execute("CREATE TABLE sales (user TEXT, item TEXT, day TEXT)")
        shop.executemany("INSERT INTO sales VALUES (?, ?, ?)", [row.split(",") for row in rows])
        shop.commit()
    url, query = f"sqlite:///{tmp_path / 'shop.db'}", "SELECT * FROM sales WHERE item != 's0'"
    assert 80 < read(tmp_path, table=url, dates="day-first", query=query).interactions.height < 100


def test_a_folder_of_somebody_else_is_refused(table: Path, tmp_path: Path, few: None) -> None:
    (tmp_path / "run" / "auto").mkdir(parents=True)
    (tmp_path / "run" / "auto" / "diary.txt").write_text("mine")
    with pytest.raises(LlmrecError) as caught:
        autos.build(AutoOptions(table=str(table), out=tmp_path / "run"))
    assert caught.value.kind == "exists" and (tmp_path / "run" / "auto" / "diary.txt").read_text() == "mine"


def test_a_missing_table_is_one_error() -> None:
    with pytest.raises(LlmrecError) as caught:
        autos.build(AutoOptions(table="nowhere.csv"))
    assert caught.value.kind == "missing-file"


def test_classic_recommenders_are_kept_where_no_engine_asks_the_tuned_model(
    table: Path, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = autos.run

    def run(recipe: Recipe, folder: Path, **more: Any) -> Run:
        if recipe.eval.arms:
            assert recipe.eval.backend == "auto"
            raise EngineFailure("2 of 9 rows were not evaluated: no memory; run it again", kind="failed")
        return ran(recipe, folder, **more)

    monkeypatch.setattr(autos, "run", run)
    monkeypatch.setattr(autos, "plan", lambda seconds, **more: Plan(2, 1.0, "a language model is tuned"))
    made = autos.build(AutoOptions(table=str(table), budget=f"{ENDLESS}s", out=tmp_path / "run"))
    assert made.folder == tmp_path / "run"
    assert made.sentence.endswith("language model is not used: 2 of 9 rows were not evaluated: no memory.")
