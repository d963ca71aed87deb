"""`llmrec tune`: search spaces, trials, interrupted and failed trials, and the resulting recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llmrec.errors import LlmrecError, RecipeError
from llmrec.recipe.load import load_recipe
from llmrec.start import tune as tuning
from llmrec.start.options import TuneOptions
from llmrec.start.tune import SearchSpace, grid_points, parse_spaces


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Write a recipe of classic recommenders on a small table, whose item-knn has a parameter to tune."""
    rows = ["user,item,time"]
    rows += [f"u{user},i{(user + step) % 12},{10 * user + step}" for user in range(40) for step in range(6)]
    (tmp_path / "walks.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    recipe = {
        "name": "walks",
        "data": {
            "source": "table",
            "path": str(tmp_path / "walks.csv"),
            "columns": {"user": "user", "item": "item", "time": "time"},
        },
        "tasks": {"sequential": {"strategies": ["search"], "history": 5}},
        "eval": {"arms": [], "users": 40, "candidates": {"kind": "catalogue"}, "bootstrap": 50},
    }
    path = tmp_path / "walks.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def options(page: Path, tmp_path: Path, *over: str, **more: object) -> TuneOptions:
    return TuneOptions(recipe=str(page), over=over, out=tmp_path / "search", **more)  # type: ignore[arg-type]


def test_spaces_are_ranges_and_lists() -> None:
    rate, rank, kinds = parse_spaces(
        ["train.learning_rate=1e-4..1e-3", "train.lora.rank=8..64", "train.method=lora,full"]
    )
    assert (rate.low, rate.high, rate.log) == (1e-4, 1e-3, True)
    assert (rank.low, rank.high, rank.log) == (8, 64, False) and isinstance(rank.low, int)
    assert kinds.values == ("lora", "full") and grid_points([kinds]) == [
        {"train.method": "lora"},
        {"train.method": "full"},
    ]
    assert grid_points([rate, kinds]) is None
    assert parse_spaces(["a=1e-4,0.1,true"])[0].values == (1e-4, 0.1, True)
    assert rate.parameter(5e-4) == 5e-4 and rate.parameter(1.0) is None and kinds.parameter("qlora") is None
    import optuna

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    assert SearchSpace("a", (True, None, 1.5)).suggest(trial) in (True, None, 1.5)
    assert 1e-4 <= SearchSpace("b", (), 1e-4, 1e-3).suggest(trial) <= 1e-3  # type: ignore[operator]
    assert isinstance(SearchSpace("c", (), 2, 9).suggest(trial), int)


@pytest.mark.parametrize("text", ["a", "a=", "=1..2", "a=2..1", "a=x..y", "a={b: 1}", "a=["])
def test_rejects_invalid_spaces(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_spaces([text])
    assert caught.value.column == "--over" and caught.value.kind == "bad-value"


def test_search_over_a_list(page: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    request = options(page, tmp_path, "tasks.sequential.history=1,5,8", metric="sequential/NDCG@5")
    result = tuning.search_hyperparameters(request, lines.append)
    assert result.trials == 3 and result.first is not None and result.best >= result.first
    made = load_recipe(result.recipe)
    assert (
        made.eval.split == "test"
        and made.tasks.present()["sequential"].history
        == result.chosen[  # type: ignore[attr-defined]
            "tasks.sequential.history"
        ]
    )
    table = (tmp_path / "search" / "trials.csv").read_text().splitlines()
    assert table[0] == "trial,tasks.sequential.history,value,seconds,error" and len(table) == 4
    assert table[1].split(",")[1] == "5"  # the recipe's own value first
    record = json.loads((tmp_path / "search" / "tune.json").read_text())
    assert record["metric"] == "sequential/NDCG@5" and len(record["trials"]) == 3
    assert "best of 3 trials" in tuning.format_summary(result)

    again: list[str] = []
    assert tuning.search_hyperparameters(request, again.append).best == result.best and again == [
        "all settings were tried"
    ]
    with pytest.raises(RecipeError) as caught:
        tuning.search_hyperparameters(options(page, tmp_path, "tasks.sequential.history=1,2"))
    assert caught.value.kind == "mismatch"


def test_killed_trial_runs_again(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = options(page, tmp_path, "tasks.sequential.history=1,5")
    real = tuning.run

    def killed(*given: object, **named: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        tuning.search_hyperparameters(request)
    monkeypatch.setattr(tuning, "run", real)
    assert tuning.search_hyperparameters(request).trials == 2


def test_failed_trials_do_not_end_the_search(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuning.run

    def breaking(recipe: object, *given: object, **named: object) -> object:
        if recipe.tasks.present()["sequential"].history == 1:  # type: ignore[attr-defined]
            raise LlmrecError("no memory", kind="exhausted")
        return real(recipe, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "run", breaking)
    result = tuning.search_hyperparameters(options(page, tmp_path, "tasks.sequential.history=1,5"))
    assert (result.trials, result.failed, result.chosen) == (2, 1, {"tasks.sequential.history": 5})
    assert "no memory" in (tmp_path / "search" / "trials.csv").read_text()


def test_search_over_a_range_ends_after_the_trials(page: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    result = tuning.search_hyperparameters(
        options(page, tmp_path, "tasks.sequential.history=1..9", trials=2), lines.append
    )
    assert result.trials == 2 and lines[-1] == "2 trials are done" and result.first is not None


def test_rejects_a_space_that_changes_the_cases(page: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        tuning.search_hyperparameters(options(page, tmp_path, "eval.users=20,40"))
    assert (caught.value.kind, caught.value.column) == ("mismatch", "--over")
    assert "another number of cases" in str(caught.value)


@pytest.mark.parametrize(
    ("over", "more", "column"),
    [
        (("tasks.sequential.histroy=1,2",), {}, "tasks.sequential.histroy"),
        (("tasks.sequential.history=1,2", "tasks.sequential.history=3,4"), {}, "--over"),
        ((), {}, "--over"),
        (("tasks.sequential.history=1,2",), {"metric": "rating"}, "--metric"),
        (("tasks.sequential.history=5,2",), {"metric": "sequential/RMSE"}, "--metric"),
        (("tasks.sequential.history=1,2",), {"budget": "soon"}, "--budget"),
    ],
)
def test_rejects_invalid_options(
    over: tuple[str, ...], more: dict[str, str], column: str, page: Path, tmp_path: Path
) -> None:
    with pytest.raises(LlmrecError) as caught:
        tuning.search_hyperparameters(options(page, tmp_path, *over, **more))
    assert column in (caught.value.column, str(caught.value)) or column in str(caught.value)
