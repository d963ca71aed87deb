"""The functions of `llmrec`: public names, display of results, commands as functions, and error messages."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import llmrec
from llmrec.display import Summary, format_summary_html, format_summary_text
from llmrec.exports import export as exports
from llmrec.keywords import function_keywords, replace_options_by_keywords
from llmrec.recipe.load import as_recipe
from llmrec.results import Results

pytest.importorskip("llmrec.start", reason="the extension is not there")

from llmrec.start import auto as autos
from llmrec.start.auto_trial import CandidateMember, TrialResult

FRAME = pl.DataFrame(
    [
        {"user": f"u{user}", "item": f"i{(user + step) % 12}", "title": f"Tale {(user + step) % 12}", "time": step}
        for user in range(40)
        for step in range(6)
    ]
)
BASELINES = ["random", "popularity", "item-knn", "markov-1", "markov"]
HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e&"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = {
        "name": "tales",
        "data": {"source": "table", "columns": {"user": "user", "item": "item", "title": "title", "time": "time"}},
        "tasks": {"sequential": {"strategies": ["search"], "baselines": BASELINES}},
        "eval": {
            "arms": [],
            "users": 40,
            "candidates": {"kind": "catalogue"},
            "bootstrap": 50,
            "fusion": {"controls": True},
        },
    }
    return llmrec.run(recipe, tmp_path_factory.mktemp("python") / "run", data=FRAME, quiet=True)


def test_public_names() -> None:
    assert dir(llmrec) == sorted(llmrec.__all__)
    assert {
        "auto",
        "baselines",
        "export",
        "fit",
        "fuse",
        "init",
        "metrics",
        "load",
        "run",
        "score",
        "tune",
        "LlmrecError",
    } <= set(dir(llmrec))
    for name in llmrec.__all__:
        result = getattr(llmrec, name)
        assert result is getattr(llmrec, name) and (name == "__version__" or result.__doc__)
        if inspect.isfunction(result):
            assert pickle.loads(pickle.dumps(result)) is result
    with pytest.raises(AttributeError):
        llmrec.runs  # type: ignore[attr-defined]  # noqa: B018
    code = "import llmrec, sys; print([name for name in ('pydantic', 'torch') if name in sys.modules], dir(llmrec))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ") and "'tune'" in done.stdout


def test_display_of_results(run: Any) -> None:
    recipe = as_recipe(run.results["recipe"])
    with llmrec.load(str(run.folder)) as rec:
        shown = [run, run.results, Results.model_validate(run.results), run.rows[0], recipe, rec]
        shown += [rec.items, rec.known, rec._models, rec._models.data, rec._models.data.dataset, rec.rank(user="u1")]
        for each in shown:
            assert len(repr(each)) < 2500 and str(each) == repr(each)
            assert each._repr_html_().startswith("<div>")
        assert "popularity" in repr(rec)
    assert str(run.folder) in repr(run) and "NDCG@10" in repr(run) and "markov" in repr(run)
    assert "tales" in repr(recipe) and "sequential" in repr(recipe)
    assert run.results["rows"] and isinstance(run.results, dict)
    begun = llmrec.init(FRAME)
    assert "taken for" in repr(begun) and len(repr(begun)) < 2500
    path = run.folder / "data" / "interactions.parquet"
    assert begun.recipe.data.path is None and llmrec.init(path).recipe.data.path == str(path)
    checked = llmrec.check(run.results["recipe"])
    assert "sequential 40" in repr(checked)
    truth = FRAME.select("user", "item").unique(["user"], keep="last", maintain_order=True)
    lists = FRAME.select("user", "item").with_columns(score=pl.lit(1.0)).unique(["user", "item"])
    scores = llmrec.score(lists, truth, against=lists, resamples=20)
    assert "NDCG@10" in repr(scores) and str(scores) == repr(scores) and len(repr(scores)) < 2500


def test_display_is_escaped_cut_and_has_no_secret() -> None:
    result = Summary(HOSTILE, {HOSTILE: HOSTILE}, (HOSTILE,), [(HOSTILE * 100,)] * 50, "\n".join([HOSTILE] * 50))
    text, page = format_summary_text(result), format_summary_html(result)
    assert "<script" not in page and "&lt;script&gt;" in page
    for shown in (text, page):
        assert "\x1b" not in shown and "\u202e" not in shown
        assert "30 more rows" in shown and "20 more lines" in shown
    assert max(map(len, text.splitlines())) < 200
    tasks: dict[str, Any] = {"sequential": {}}
    data = {"source": "table", "path": "postgresql://ada:secret@host/shop", "query": "select 1"}
    shown = as_recipe({"data": data, "tasks": tasks, "eval": {"arms": []}})
    assert "secret" not in repr(shown) + shown._repr_html_()


def test_auto_accepts_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(search: Any) -> None:
        search.tried = {part.label: autos.TunedMember(part) for part in search.parts}

    # The search itself has separate tests: here every recommender has one trial.
    trial = TrialResult(parameters={}, value=0.5, seconds=0.1)
    parts = [CandidateMember(name, name) for name in ("popularity", "markov")]
    monkeypatch.setattr(autos, "candidate_members", lambda dataset, encoder, **more: parts)
    monkeypatch.setattr(autos, "read_trials", lambda file, key: [trial])
    monkeypatch.setattr(autos._Search, "first", first)
    monkeypatch.setattr(autos._Search, "rest", lambda search: None)
    monkeypatch.setattr(autos, "installed_encoder", lambda: None)
    for _ in range(2):
        result = llmrec.auto(
            FRAME.drop("title"), FRAME.select("item", "title").unique(), classic=True, out=tmp_path / "r"
        )
    assert result.folder == tmp_path / "r" and "NDCG@10" in repr(result)
    with llmrec.load(str(result.folder)) as rec:
        assert rec.rank(history=["i1", "i2"], k=1)[0].title.startswith("Tale")
    with pytest.raises(llmrec.LlmrecError, match=r'interactions frame: .*user="COLUMN"'):
        llmrec.auto(FRAME.rename({"user": "a", "item": "b"}), out=tmp_path / "other")
    with pytest.raises(llmrec.LlmrecError, match=r'^budget="soon"') as caught:
        llmrec.auto(FRAME, budget="soon", out=tmp_path / "other")
    assert caught.value.column == "budget"


def test_tune_accepts_values_and_frames(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    recipe = as_recipe({**run.results["recipe"], "data": {**run.results["recipe"]["data"], "path": None}})
    over = {"tasks.sequential.history": [1, 5]}
    result = llmrec.tune(recipe, over, data=FRAME, out=tmp_path / "search", quiet=True)
    assert result.trials == 2 and result.chosen.keys() == over.keys() and "on validation users" in repr(result)
    assert llmrec.load_recipe(result.recipe).data.path == str(tmp_path / "search" / "data" / "interactions.parquet")
    again = llmrec.tune(recipe, over, data=FRAME, out=tmp_path / "search", quiet=True)
    assert again.best == result.best
    with pytest.raises(llmrec.LlmrecError, match="such as over=") as caught:
        llmrec.tune(recipe, {}, data=FRAME, out=tmp_path / "none")
    assert caught.value.column == "over"


def test_fuse_accepts_runs_and_folders(run: Any, tmp_path: Path) -> None:
    other = llmrec.run(
        run.results["recipe"],
        tmp_path / "other",
        overrides={"tasks.sequential.baselines": [*BASELINES, "ease"]},
        quiet=True,
    )
    compared = llmrec.compare(run, other)
    assert compared.differences and all(pair.low <= pair.value <= pair.high for pair in compared.differences)
    joined = llmrec.fuse([run, other.folder], tmp_path / "joined")
    assert {"ease", "markov"} <= {row["predictor"] for row in joined.results["rows"]}


def test_export_passes_keywords(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(llmrec.LlmrecError, match="only baselines"):
        llmrec.export(run, tmp_path / "out")
    calls: list[Any] = []
    monkeypatch.setattr(exports, "write_export", lambda options, say: calls.append(options))
    llmrec.export(run, tmp_path / "out", check_users=3, adapter_only=True)
    (options,) = calls
    assert (options.run, options.check_users, options.adapter_only) == (run.folder, 3, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("say it with --user COLUMN --item COLUMN.", 'say it with user="COLUMN" item="COLUMN".'),
        ("set --fields 'Farbe x'", 'set fields="Farbe x"'),
        ("--fields Farbe shows it", 'fields="Farbe" shows it'),
        ("which is named by --user; its columns", "which is named by user; its columns"),
        ("--user=... --item=...", 'user="..." item="..."'),
        ("replace it with --force", "replace it with force=True"),
        ("drop --no-items", "drop with_items=False"),
        ("run `llmrec rank --user x`", "run `llmrec rank --user x`"),
        ("--set eval.permutations=4)", 'overrides="eval.permutations=4")'),
    ],
)
def test_messages_have_keywords(text: str, message: str) -> None:
    def function(
        user: str, item: str, fields: str, check_users: int, overrides: str, with_items: bool, force: bool = False
    ) -> None: ...

    assert replace_options_by_keywords(text, function_keywords(function)) == message


def test_messages_of_the_command_line_have_options() -> None:
    from llmrec.evaluate.scoring import score

    for function, column in ((llmrec.score, "k"), (score, "--k")):
        with pytest.raises(llmrec.LlmrecError) as caught:
            function([], [], k=[])
        assert caught.value.column == column
