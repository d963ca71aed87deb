"""`llmrec auto`: the search, interrupts and limits, and the resulting recommender."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmrec.answer.loaded import load
from llmrec.answer.opening import describe_default_model
from llmrec.answer.rank.options import RankOptions
from llmrec.answer.rank.run import rank_file
from llmrec.data.dataset import Dataset
from llmrec.durable import Json
from llmrec.errors import DataError, EngineFailure, LlmrecError, RecipeError
from llmrec.pipeline.run import Run
from llmrec.pipeline.study import load_split
from llmrec.recipe.load import dump_recipe, load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.results import FusionWeights, PartWeight
from llmrec.start import auto as autos
from llmrec.start.auto import (
    FineTuningPlan,
    candidate_members,
    data_recipe,
    fine_tuning_decision,
    has_texts,
    plan_fine_tuning,
    with_language_model,
)
from llmrec.start.auto_trial import CandidateMember, TrialJob, TrialResult, run_trials
from llmrec.start.options import AutoOptions, budget_seconds
from tests.shop import database

# Grids that are searched completely in a short time, so that no test depends on a budget.
PLAIN: dict[str, Json] = {"weighting": "none", "shrinkage": 0.0, "asymmetry": 0.5}
FEW = [
    CandidateMember("popularity", "popularity"),
    CandidateMember("markov", "markov", {"order": 2}),
    CandidateMember("item-knn", "item-knn", {**PLAIN, "decay": 0.5}),
    CandidateMember("item-knn, whole history", "item-knn", {**PLAIN, "history": 200, "decay": 1.0}),
]
ENDLESS = 1e9
"""A budget in seconds that is never used up."""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write 60 users who walk along a ring of 30 items, with a title each."""
    return walks(tmp_path)


def walks(folder: Path) -> Path:
    """Write the table into a folder."""
    draws, lines = np.random.default_rng(0), list[str]()
    for user in range(60):
        item = int(draws.integers(30))
        for step in range(8):
            item = (item + (1 if draws.random() < 0.9 else int(draws.integers(2, 9)))) % 30
            lines.append(f"u{user},i{item},Tale number {item},{1000 * user + step}")
    return Path(written(folder / "walks.csv", "user,item,title,time", lines))


def written(path: Path, header: str, rows: Iterable[str]) -> str:
    """Write a table, and return its path."""
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


def read(folder: Path, say: Callable[[str], None] = lambda line: None, **options: str) -> Dataset:
    """Return the data that `auto` reads."""
    (folder / "state").mkdir(exist_ok=True)
    recipe = data_recipe(AutoOptions(**options), "test-auto", folder / "state", say)  # type: ignore[arg-type]
    return load_split(recipe.data, 0).dataset


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try few recommenders, whose grids are small."""
    try_few(monkeypatch)


@dataclass(frozen=True)
class Call:
    """A complete call: its options, its result, and its messages."""

    options: AutoOptions
    made: autos.Auto
    lines: list[str]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Call:
    folder, lines = tmp_path_factory.mktemp("auto"), list[str]()
    options = AutoOptions(table=str(walks(folder)), budget=f"{ENDLESS}s", out=folder / "run", classic=True)
    with pytest.MonkeyPatch.context() as patch:
        try_few(patch)
        return Call(options, autos.build_recommender(options, lines.append), lines)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune in this process, which saves starting another one."""

    @contextmanager
    def child(job: TrialJob, log: Path) -> Iterator[SimpleNamespace]:
        log.parent.mkdir(parents=True, exist_ok=True)
        run_trials(job)
        yield SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(autos, "_trial_process", child)


def try_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `few`."""
    monkeypatch.setattr(autos, "candidate_members", lambda dataset, encoder, **more: FEW)
    monkeypatch.setattr(autos, "installed_encoder", lambda: None)
    monkeypatch.setattr(autos, "_MIN_FINISH_SECONDS", 1.0)


def test_builds_a_recommender_and_a_second_call_reuses_trials(
    complete: Call, tmp_path: Path, few: None, in_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    options, made, lines = complete.options, complete.made, complete.lines
    best = {tried.part.label: tried.best for tried in made.tried}
    assert all(best.values()) and best["markov"].value > best["popularity"].value  # type: ignore[union-attr]
    # Every grid was searched completely.
    assert [tried.note for tried in made.tried] == [""] * len(FEW)
    assert len(next(tried for tried in made.tried if tried.part.label == "item-knn").trials) > 3
    rows = {row["predictor"]: row for row in made.run.results["rows"]}
    assert "fusion" in rows and "random" in rows and "markov-1" in rows
    output = " ".join(autos.format_summary(made).split())
    assert "settings tried" in output and "1 setting tried" in output and "point" not in output + "".join(lines)
    chosen = load_recipe(made.folder / "recipe.yaml")
    assert chosen.eval.arms == () and not (made.folder / "merged").exists()

    record = json.loads((made.folder / "auto" / "auto.json").read_text())
    again: list[str] = []
    same = autos.build_recommender(options, again.append)
    result = json.loads((same.folder / "auto" / "auto.json").read_text())
    for each in (*record["parts"], *result["parts"]):
        each["seconds"] = 0
    assert result["parts"] == record["parts"] and (result["served"], result["sentence"]) == (made.served, made.sentence)
    assert not [line for line in again if "new setting" in line and " 0 new settings" not in line]
    assert "no language model: --classic" in again

    requests, lists = tmp_path / "requests.jsonl", tmp_path / "lists.jsonl"
    requests.write_text('{"id": "a", "history": ["i3", "i4"]}\n', encoding="utf-8")
    rank_file(RankOptions(baseline="fusion", recipe=str(made.folder), requests=requests, out=lists, top=3))
    (output,) = [json.loads(line) for line in lists.read_text(encoding="utf-8").splitlines()]
    with load(str(made.folder), backend="hf") as rec:
        assert output["items"] == [each.item_id for each in rec.rank(history=["i3", "i4"], k=3)]

    assert "have changed" not in caplog.text
    table = Path(options.table)
    table.write_text("".join(table.read_text(encoding="utf-8").splitlines(keepends=True)[:-3]), encoding="utf-8")
    rank_file(
        RankOptions(baseline="fusion", recipe=str(made.folder), requests=requests, out=tmp_path / "later.jsonl", top=3)
    )
    assert "have changed since its evaluation" in caplog.text


def test_serves_and_reports_the_best_on_validation(complete: Call) -> None:
    result = complete.made
    choice, rows = result.run.results["choice"], {row["id"]: row for row in result.run.results["rows"]}
    # An ensemble of only one member is that member.
    alone = {name for name, row in rows.items() if (row.get("fusion") or {}).get("form") == "alone"}
    assert set(choice["figures"]) == rows.keys() - alone - {"sequential/baseline/random"}
    assert 20 <= choice["users"] < 60
    assert choice["value"] == choice["figures"][choice["row"]] == max(choice["figures"].values())
    name = rows[choice["row"]]["predictor"]
    with load(str(result.folder)) as rec:
        assert result.served == rec.models[0] == name
    line = describe_default_model(str(result.folder))
    assert line.startswith(
        f"the default is {name}, the best of {len(choice['figures'])} on {choice['users']} validation users"
    )

    # The terminal and the report say the same of the same row.
    report = (result.folder / "report" / "report.md").read_text(encoding="utf-8")
    page = (result.folder / "report" / "index.html").read_text(encoding="utf-8")
    figure = rows[choice["row"]]["metrics"]["NDCG@10"]["value"]
    short = name.partition("(")[0]
    assert result.sentence in report and result.sentence.startswith(short) and f" is {figure:.3f} [" in result.sentence
    assert f"Serve it ({name}): llmrec serve" in autos.format_summary(result)
    card = page[page.index('<article class="card">') :]
    assert f'<span class="figure">{figure:.3f}</span>' in card[: card.index("</article>")]
    assert "no significant difference" in page or "ahead" in page or "behind" in page
    # For several rows of one method, the sentence names one parameter that distinguishes them.
    assert "weighting=none" not in result.sentence


def test_serves_the_best_trial_for_few_users(tmp_path: Path, few: None, in_process: None) -> None:
    rows = [f"u{user},i{(user + step) % 9},{10 * user + step}" for user in range(12) for step in range(6)]
    table = written(tmp_path / "t.csv", "user,item,time", rows)
    result = autos.build_recommender(AutoOptions(table=table, budget=f"{ENDLESS}s", out=tmp_path / "r", classic=True))
    best = max((tried for tried in result.tried if tried.best), key=lambda tried: tried.best.value if tried.best else 0)
    assert not any(row.get("fusion") for row in result.run.results["rows"])
    assert result.served.partition("(")[0] == best.part.baseline and result.sentence.startswith(f"{best.part.baseline}")
    with load(str(result.folder)) as rec:
        assert rec.models[0] == result.served


def search_of(
    table: Path, tmp_path: Path, parts: list[CandidateMember], seconds: float, lines: list[str]
) -> autos._Search:
    """Return a search over a table's recommenders that has not started."""
    recipe = data_recipe(AutoOptions(table=str(table)), "walks-auto", tmp_path, lambda line: None)
    folder = tmp_path / "auto"
    folder.mkdir(parents=True)
    (folder / "data.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    data = load_split(recipe.data, recipe.seed)
    return autos._Search(recipe, data.fingerprint, folder, parts, time.monotonic() + seconds, seconds, lines.append)


def test_interrupt_keeps_the_results_so_far(
    table: Path, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, sleep = search_of(table, tmp_path, FEW, ENDLESS, []), time.sleep

    def interrupted(seconds: float) -> None:
        if sum(len(tried.trials) for tried in state.tried.values()) >= 2:
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(autos.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.first()
        state.rest()
    assert not state._left() <= 0
    chosen = state.chosen(10).tasks.present()["sequential"].baselines
    assert {"popularity", "markov", "random", "markov-1"} <= {each.name for each in chosen}


@pytest.mark.slow
def test_failed_or_slow_recommender_keeps_the_others(table: Path, tmp_path: Path, few: None) -> None:
    lines: list[str] = []
    parts = [CandidateMember("broken", "item-knn", {"history": -1}), *FEW]
    state = search_of(table, tmp_path, parts, ENDLESS, lines)
    state.first()
    assert [len(tried.trials) for tried in state.tried.values()] == [0, 1, 1, 1, 1]
    assert "failed" in state.tried["broken"].note and "history" in (tmp_path / "auto/trials/log.txt").read_text()
    state.budget = 0.0  # no first trial may take any time
    state.parts = [CandidateMember("ease", "ease"), *FEW]
    state.first()
    assert state.tried["ease"].note == "its time limit was reached"
    names = [each.name for each in state.chosen(10).tasks.present()["sequential"].baselines]
    assert "ease" not in names and "popularity" in names


@pytest.mark.slow
def test_skips_a_network_with_slow_epochs(table: Path, tmp_path: Path, few: None) -> None:
    pytest.importorskip("torch")
    lines: list[str] = []
    state = search_of(table, tmp_path, [CandidateMember("sasrec", "sasrec", {"quiet": True, "dim": 8})], ENDLESS, lines)
    slow = tmp_path / "auto" / "trials" / "sasrec.epoch.json"
    slow.parent.mkdir()
    slow.write_text(json.dumps({"key": state._key(state.parts[0]), "seconds": ENDLESS}), encoding="utf-8")
    state.first()
    assert state.tried["sasrec"].note == autos._SLOW_NOTE and autos._SLOW_NOTE in lines[-1]
    # One epoch is measured again for other data.
    slow.write_text(json.dumps({"key": "of other data", "seconds": ENDLESS}), encoding="utf-8")
    state.first()
    assert state.tried["sasrec"].trials and 0 < json.loads(slow.read_text())["seconds"] < ENDLESS


def test_trials_decide_on_the_time() -> None:
    good, weak, nothing = (autos.TunedMember(CandidateMember(name, "markov")) for name in ("good", "weak", "nothing"))
    good.trials, weak.trials = [TrialResult({}, 0.08, 1.0)], [TrialResult({}, 0.01, 1.0), TrialResult({}, 0.04, 1.0)]
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml")
    state = autos._Search(recipe, "", Path(), [], 290.0, 1.0, print, clock=lambda: 100.0)
    assert state._share([good, weak]) == pytest.approx(170.0 * (0.125 + 0.75 * 16 / 17))
    assert state._share([weak, weak]) == pytest.approx(85.0)
    assert state._share([nothing, good]) == pytest.approx(170.0 / 8)
    tried = autos.TunedMember(FEW[0], [TrialResult({"a": 1}, 0.5, 1.0), TrialResult({"a": 2}, 0.5, 1.0)])
    assert tried.best == tried.trials[0]


def test_recommenders_with_equal_hyperparameters_are_one_model(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = search_of(table, tmp_path, FEW[2:], ENDLESS, [])
    trials = [TrialResult({"history": 200, "decay": 1.0}, 0.2, 1.0)]
    monkeypatch.setattr(autos, "read_trials", lambda file, key: trials)
    state.tried = {part.label: autos.TunedMember(part) for part in state.parts}
    recipe = state.chosen(10)
    baselines = recipe.tasks.present()["sequential"].baselines
    assert sorted(entry.name for entry in baselines) == ["item-knn", "markov-1", "popularity", "random"]
    best = state.best(recipe, load_split(recipe.data, recipe.seed))
    assert best.figures == {"sequential/baseline/item-knn(decay=1.0, history=200)": 0.2}


def test_reserves_time_for_learned_rankers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autos, "is_installed", lambda package: True)
    recipe = load_recipe("recipes/movielens-100k/four-tasks.yaml")
    left = {}
    for cases in (0, 199, 5000):
        state = autos._Search(recipe, "", Path(), [], 290.0, 1.0, print, clock=lambda: 100.0, cases=cases)
        state.tried = {
            name: autos.TunedMember(CandidateMember(name, "markov"), [TrialResult({}, 0.1, 20.0)]) for name in "abcd"
        }
        left[cases] = state._left()
    # With too few cases for a ranker, only the four members remain to be fitted, twice each.
    assert left[0] == left[199] == pytest.approx(190.0 - 2 * 4 * 20)
    assert left[5000] == pytest.approx(left[0] - 5000 * 16 * 3e-4)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("10", 600), ("2 min", 120)])
def test_budgets(text: str, seconds: float) -> None:
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["soon", "-3m", "0s"])
def test_rejects_invalid_budgets(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        budget_seconds(text)
    assert caught.value.column == "--budget"


def test_recommenders_depend_on_texts_and_budget(table: Path, tmp_path: Path) -> None:
    recipe = data_recipe(AutoOptions(table=str(table)), "walks-auto", tmp_path, lambda line: None)
    data = load_split(recipe.data, 0).dataset
    assert has_texts(data)

    def labels(encoder: str | None, *, torch: bool, budget: float) -> set[str]:
        return {part.label for part in candidate_members(data, encoder, texts=True, torch=torch, budget=budget)}

    assert {"content", "transitions-text", "ease"} < labels("all-MiniLM-L6-v2", torch=False, budget=7200)
    networks = {"sasrec", "transitions-tuned"}
    assert not networks & labels("all-MiniLM-L6-v2", torch=False, budget=7200)
    assert networks & labels("all-MiniLM-L6-v2", torch=True, budget=1800) == {"sasrec"}
    assert networks & labels("all-MiniLM-L6-v2", torch=True, budget=7200) == networks
    assert networks & labels(None, torch=True, budget=7200) == {"sasrec"}
    content = next(
        part for part in candidate_members(data, None, texts=True, torch=True, budget=60) if part.label == "content"
    )
    assert content.fixed == {}


def test_budget_decides_on_a_tuned_model(table: Path, tmp_path: Path) -> None:
    assert plan_fine_tuning(1800, titles=True, device="cpu").steps == 0
    long = plan_fine_tuning(4 * 3600, titles=True, device="cpu")
    assert long.steps > 600 and long.seconds == 2 * 3600
    assert plan_fine_tuning(1800, titles=True, device="cuda").steps > 600
    assert plan_fine_tuning(4 * 3600, titles=False, device="cuda").steps == 0
    assert "llmrec[train]" in plan_fine_tuning(4 * 3600, titles=True, device=None).message
    recipe = data_recipe(AutoOptions(table=str(table)), "walks-auto", tmp_path, lambda line: None)
    result = with_language_model(recipe, plan_fine_tuning(4 * 3600, titles=True, device="cpu"))
    assert result.eval.arms == ("tuned",) and result.eval.fusion.model_users == 200 and result.train.steps > 600
    assert result.tasks.present()["sequential"].baselines == recipe.tasks.present()["sequential"].baselines


@pytest.mark.parametrize(
    ("loss", "low", "kept"), [(0.01, 0.002, True), (0.01, -0.002, False), (-0.01, -0.02, False), (None, None, False)]
)
def test_validation_decides_whether_a_model_is_kept(loss: float | None, low: float | None, kept: bool) -> None:
    part = PartWeight(name="search", weight=0.1, loss=loss, loss_low=low, loss_high=None if loss is None else 0.05)
    weights = FusionWeights(form="logit", parts=(PartWeight(name="markov", weight=1.0), part))
    model = SimpleNamespace(predictor="search", arm="tuned", fusion=None)
    joined = SimpleNamespace(predictor="fusion with models", arm="tuned", fusion=weights)
    decided, sentence = fine_tuning_decision(SimpleNamespace(rows=[model, joined]))  # type: ignore[arg-type]
    assert decided is kept and ("is used" in sentence) is kept


@pytest.mark.parametrize(("name", "kept"), [("search", True), ("markov", False)])
def test_model_that_is_better_alone_is_kept(name: str, kept: bool) -> None:
    parts = tuple(PartWeight(name=member, weight=float(member == name)) for member in ("markov", "search"))
    model = SimpleNamespace(predictor="search", arm="tuned", fusion=None)
    joined = SimpleNamespace(predictor="fusion", arm="tuned", fusion=FusionWeights(form="alone", parts=parts))
    decided, _ = fine_tuning_decision(SimpleNamespace(rows=[model, joined]))  # type: ignore[arg-type]
    assert decided is kept


def test_repairs_a_table_in_the_run_folder(tmp_path: Path) -> None:
    rows = [f"u{user},s{(user + step) % 12},{10 * user + step}" for user in range(20) for step in range(5)]
    table = written(tmp_path / "orders.csv", "user,product,time", rows)
    items = written(tmp_path / "items.csv", "sku,title", [f"s{n},Thing {n}" for n in range(12)])
    before = Path(table).read_bytes()
    data = read(tmp_path, table=table, items=items)
    assert data.items["s3"].title == "Thing 3" and len(data.interactions) == 100
    assert Path(table).read_bytes() == before


def test_keeps_usable_rows_and_reports_removed_ones(tmp_path: Path) -> None:
    rows = [
        f"u{user},s{(user + step) % 12},{'' if step == 2 else 4},{'' if user == step == 0 else 10 * user + step}"
        for user in range(20)
        for step in range(5)
    ]
    table = written(tmp_path / "orders.csv", "user,product,stars,time", rows)
    listed = [f"s{n},{'' if n == 3 else f'Thing {n}'}" for n in range(11)]
    items = written(tmp_path / "items.csv", "product,title", listed)
    output: list[str] = []
    data = read(tmp_path, output.append, table=table, items=items)
    lost = sum("s11," in row for row in rows) + 1
    assert len(data.interactions) == 100 - lost and data.items["s3"].title == "s3" and data.name == "orders"
    assert "1 rows without a time were removed" in output
    assert any(line.startswith(f"{lost - 1} rows without an entry in ") for line in output)


def test_keeps_users_with_few_interactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.start.plan._CORE_ROWS", 100)
    monkeypatch.setattr("llmrec.start.plan._MIN_CORE_SIZE", 5)
    draws = np.random.default_rng(1)
    rows = [
        f"u{user},s{item},{n}" for user in range(120) for n, item in enumerate(draws.permutation(15)[: 1 + user % 7])
    ]
    data = read(tmp_path, table=written(tmp_path / "t.csv", "user,item,time", rows))
    assert "user_core: " in (tmp_path / "state" / "table.yaml").read_text(encoding="utf-8")
    assert data.interactions["user_id"].n_unique() == 120


def test_trials_depend_on_the_table(table: Path, tmp_path: Path) -> None:
    first = search_of(table, tmp_path / "a", FEW, 9.0, [])
    same = search_of(table, tmp_path / "b", FEW, 9.0, [])
    with table.open("a", encoding="utf-8") as file:
        file.write("u0,i1,Tale number 1,999999\n")
    grown = search_of(table, tmp_path / "c", FEW, 9.0, [])
    assert first._key(FEW[0]) == same._key(FEW[0]) != grown._key(FEW[0])


def test_options_for_dates_and_query(tmp_path: Path) -> None:
    rows = [f"u{user},s{(user + step) % 9},0{1 + step}/0{1 + user % 9}/2024" for user in range(20) for step in range(5)]
    table = written(tmp_path / "t.csv", "user,item,day", rows)
    assert read(tmp_path, table=table, dates="month-first").interactions.height == 100
    database(tmp_path / "shop.db", sales=[("user", "item", "day"), *(tuple(row.split(",")) for row in rows)])
    url, query = f"sqlite:///{tmp_path / 'shop.db'}", "SELECT * FROM sales WHERE item != 's0'"
    assert 80 < read(tmp_path, table=url, dates="day-first", query=query).interactions.height < 100


def test_rejects_a_foreign_folder_and_a_small_budget(table: Path, tmp_path: Path, few: None) -> None:
    (tmp_path / "run" / "auto").mkdir(parents=True)
    (tmp_path / "run" / "auto" / "diary.txt").write_text("mine")
    with pytest.raises(LlmrecError) as caught:
        autos.build_recommender(AutoOptions(table=str(table), out=tmp_path / "run"))
    assert caught.value.kind == "exists" and (tmp_path / "run" / "auto" / "diary.txt").read_text() == "mine"
    with pytest.raises(DataError) as caught:
        autos.build_recommender(AutoOptions(table=str(table), budget="0.1s", out=tmp_path / "small"))
    assert caught.value.kind == "too-few" and "--budget" in str(caught.value)


def test_keeps_classic_recommenders_if_the_engine_fails(
    table: Path, tmp_path: Path, few: None, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = autos.run

    def run(recipe: Recipe, folder: Path, **more: Any) -> Run:
        if recipe.eval.arms:
            assert recipe.eval.backend == "auto"
            raise EngineFailure("2 of 9 rows were not evaluated: no memory; run it again", kind="failed")
        return ran(recipe, folder, **more)

    monkeypatch.setattr(autos, "run", run)
    monkeypatch.setattr(
        autos, "plan_fine_tuning", lambda seconds, **more: FineTuningPlan(2, 1.0, "a language model is tuned")
    )
    result = autos.build_recommender(AutoOptions(table=str(table), budget=f"{ENDLESS}s", out=tmp_path / "run"))
    assert result.folder == tmp_path / "run"
    assert result.sentence.endswith("language model is not used: 2 of 9 rows were not evaluated: no memory.")
