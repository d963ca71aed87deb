"""`llmrec init` on tables of a synthetic shop: the recipe, the commands of docs/your-data.md, and hostile names."""

from __future__ import annotations

import json
import random
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llmrec.cli.main import app
from llmrec.data import stats
from llmrec.data.read.tables import Table
from llmrec.data.sets.table import load_data
from llmrec.errors import LlmrecError
from llmrec.pipeline.leaks import audit_questions
from llmrec.pipeline.study import build_study
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Columns
from llmrec.start.columns import RequestedRoles, guess_roles, requested_roles
from llmrec.start.init import write_recipe
from llmrec.start.options import InitOptions
from llmrec.start.page import RecipeValues, filter_line, render_recipe, yaml_scalar
from llmrec.start.plan import BUDGET_SECONDS, RecipePlan, events_of_table, plan_recipe
from tests import shop

PAGE = Path(__file__).parent.parent.parent / "docs" / "your-data.md"


def llmrec(*arguments: str) -> str:
    """Run a command in this process, and return its output, errors included."""
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        if not isinstance(done.exception, LlmrecError):
            raise done.exception
        return f"error: {done.exception}"
    return done.output


# --------------------------------------------------------------------------- the page


def blocks(page: str) -> list[tuple[str, str]]:
    return [(kind, body) for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)]


def squeezed(line: str) -> str:
    return " ".join(line.split())


def assert_in_order(shown: str, real: str) -> None:
    """Assert that every line of the page is printed, in this order; `...` means omitted lines."""
    lines = iter([squeezed(line) for line in real.splitlines()])
    for line in shown.splitlines():
        if line.strip() not in ("...", ""):
            assert any(other == squeezed(line) for other in lines), f"not printed, or not here: {line!r} in\n{real}"


RUN = ("eval.backend=fake", "eval.scorer=fake", "eval.users=4", "eval.bootstrap=20", "train.steps=2", "-q")
SMALL = ("train.batch_tokens=512", "train.valid_rows=0", "train.lora.top_layers=1", "model.dtype=float32")


def test_commands_of_the_page_print_what_it_shows(folder: Path, llama_folder: Path) -> None:
    pytest.importorskip("trl", reason="the train extra is not installed")
    pytest.importorskip("rouge_score", reason="the text extra is not installed")
    printed, ran = "", []
    for kind, body in blocks(PAGE.read_text(encoding="utf-8")):
        if kind == "sh":
            assert len(body.splitlines()) == 1
            name, *arguments = shlex.split(body)
            printed = ""
            if name == "head":
                printed = subprocess.run([name, *arguments], cwd=folder, capture_output=True, text=True).stdout
            elif arguments[0] == "run":
                printed = llmrec(*arguments, f"model.name={llama_folder}", *SMALL, *RUN)
            elif arguments[0] in ("init", "check"):
                printed = llmrec(*arguments)
            ran.append(arguments[0])
        elif kind == "text" and ran[-1] not in ("auto", "serve"):
            assert printed
            assert_in_order(body, printed)
        elif kind == "yaml":
            assert_in_order(body, (folder / "shop.yaml").read_text(encoding="utf-8"))
    assert ran.count("init") >= 6 and {"auto", "serve", "rank", "check", "run", "export", "tune"} < set(ran)
    results = json.loads((folder / "runs" / "shop" / "results.json").read_text(encoding="utf-8"))
    rows = {(row["task"], row["arm"]) for row in results["rows"]}
    families = ("rating", "sequential", "direct", "explanation")
    assert {(task, arm) for task in families for arm in ("baseline", "zero-shot", "few-shot", "tuned")} == rows
    assert (folder / "runs" / "shop" / "report" / "index.html").is_file()


# --------------------------------------------------------------------------- the three shops


def test_written_recipe_is_valid(folder: Path) -> None:
    result = write_recipe("orders.csv")
    recipe = load_recipe(result.recipe)
    assert result.recipe == Path("orders.yaml") and recipe.name == "orders"
    assert recipe.data.columns == Columns(
        user="customer_id",
        item="product_id",
        rating="stars",
        time="ordered_at",
        title="product_name",
        text="comment",
        fields=("category", "price"),
    )
    assert recipe.data.duplicates == "keep_last" and recipe.data.noun == "products"
    assert recipe.data.rating_scale == (1.0, 5.0)
    assert set(recipe.tasks.present()) == {"rating", "sequential", "direct", "explanation"}
    study = build_study(recipe)
    assert study.data.dataset.interactions["timestamp"].null_count() == 0
    assert "valid" in llmrec("check", "orders.yaml")


def test_european_table_from_init_to_results(folder: Path, llama_folder: Path) -> None:
    assert "wrote mine.yaml" in llmrec("init", "bestellungen.csv", "--name", "mine", "--mend", "mended.parquet")
    assert "recipe mine is valid" in llmrec("check", "mine.yaml")
    out = llmrec("run", "mine.yaml", f"model.name={llama_folder}", "eval.arms=[zero-shot]", *RUN)
    assert "error" not in out.splitlines()[0]
    results = json.loads(Path("runs/mine/results.json").read_text(encoding="utf-8"))
    assert {row["task"] for row in results["rows"]} == {"rating", "sequential", "direct", "explanation"}
    titles = {item.title for item in build_study(load_recipe("mine.yaml")).data.dataset.items.values()}
    assert titles == {product.name for product in shop.products()}


def test_repaired_table_equals_the_plain_table(folder: Path) -> None:
    write_recipe("orders.csv")
    write_recipe("bestellungen.csv", mend=Path("mended.csv"))
    plain, mended = (build_study(load_recipe(name)).data.dataset for name in ("orders.yaml", "bestellungen.yaml"))
    assert plain.interactions.equals(mended.interactions)
    before = Path("bestellungen.csv").read_bytes()
    shop.write_european(Path("again.csv"))
    assert Path("again.csv").read_bytes() == before


def test_never_overwrites_without_force(folder: Path) -> None:
    write_recipe("orders.csv")
    Path("orders.yaml").write_text("mine\n", encoding="utf-8")
    assert llmrec("init", "orders.csv").startswith("error: orders.yaml exists")
    assert Path("orders.yaml").read_text(encoding="utf-8") == "mine\n"
    assert "wrote" in llmrec("init", "orders.csv", "--force")
    assert load_recipe("orders.yaml").name == "orders"
    Path("copy.csv").write_text("mine\n", encoding="utf-8")
    options = ("--name", "eu", "--mend", "copy.csv")
    assert "copy.csv exists" in llmrec("init", "bestellungen.csv", *options)
    assert Path("copy.csv").read_text(encoding="utf-8") == "mine\n" and not Path("eu.yaml").exists()
    before = Path("bestellungen.csv").read_bytes()
    assert "never overwritten" in llmrec("init", "bestellungen.csv", "--mend", "bestellungen.csv", "--force")
    assert Path("bestellungen.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["orders.csv", "--out", "orders.csv"], ["orders.csv", ".yaml"]),
        (["orders.csv", "--name", "a b"], ["'a b'", "letters"]),
        (["orders.csv", "--dates", "dayfirst"], ["did you mean 'day-first'"]),
        (["order.csv"], ["order.csv: file not found (did you mean 'orders.csv'?); give the path of a table"]),
        (["sqlite:///gone.db"], ["gone.db"]),
        (["orders.csv", "--query", "SELECT 1"], ["--query", "not a database"]),
        (["orders.csv", "--items", "sqlite:///shop.db"], ["sqlite:///shop.db", "Parquet"]),
        (["bestellungen.csv", "--mend", "x.txt"], ["x.txt", ".parquet"]),
        (["clicks.csv", "--items", "bestellungen.csv"], ["bestellungen.csv", "'product_id'"]),
    ],
)
def test_errors_are_one_paragraph_and_write_nothing(folder: Path, arguments: list[str], parts: list[str]) -> None:
    before = sorted(folder.iterdir())
    output = llmrec("init", *arguments)
    assert output.startswith("error: ") and len(output.splitlines()) == 1
    for part in parts:
        assert part in output
    assert sorted(folder.iterdir()) == before


def test_database_with_a_query(folder: Path) -> None:
    frame = pl.read_csv(folder / "clicks.csv")
    shop.database(folder / "shop.db", clicks=[tuple(frame.columns), *frame.rows()])
    output = llmrec("init", "sqlite:///shop.db")
    assert output.startswith("error: ") and "SELECT * FROM clicks" in output and not (folder / "shop.yaml").exists()
    llmrec("init", "sqlite:///shop.db", "--query", "SELECT * FROM clicks", "--items", "products.csv")
    llmrec("init", "clicks.csv", "--items", "products.csv")
    result, plain = load_recipe(folder / "shop.yaml"), load_recipe(folder / "clicks.yaml")
    assert result.data.path == "sqlite:///shop.db" and result.data.query == "SELECT * FROM clicks"
    assert result.data.columns == plain.data.columns
    assert load_data(result.data, seed=0).fingerprint == load_data(plain.data, seed=0).fingerprint
    assert "is valid" in llmrec("check", "shop.yaml")


def test_recipe_in_another_folder_finds_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llmrec("init", "clicks.csv", "--items", "products.csv", "--out", "recipes/mine.yaml")
    recipe = load_recipe(folder / "recipes" / "mine.yaml")
    assert Path(str(recipe.data.path)).is_absolute() and Path(str(recipe.data.items)).is_absolute()
    assert set(recipe.tasks.present()) == {"sequential", "direct"}
    titles = {item.title for item in build_study(recipe).data.dataset.items.values()}
    assert titles == {product.name for product in shop.products()}
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert "is valid" in llmrec("check", "../recipes/mine.yaml")
    assert "wrote near.yaml" in llmrec("init", "../orders.csv", "--name", "near")
    assert load_recipe("near.yaml").data.path == "../orders.csv"
    assert "is valid" in llmrec("check", "near.yaml")


def test_suggests_other_files(folder: Path) -> None:
    output = llmrec("init", "clicks.csv")
    assert "--items products.csv" in output and "no titles" in output
    assert load_recipe("clicks.yaml").data.columns.title is None
    frame = pl.read_csv("published.csv")
    for part in ("train", "test"):
        frame.filter(pl.col("part") == part).drop("part").write_csv(f"shop-{part}.csv")
    assert "shop-test.csv is in the same folder" in llmrec("init", "shop-train.csv")
    assert "in the same folder" not in llmrec("init", "shop-test.csv")


def test_warnings_about_encodings(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "other.csv").write_bytes(("who,what\n" + "u,é\n" * 40).encode("latin-1"))
    llmrec("init", "clicks.csv")
    assert "other.csv" not in caplog.text
    llmrec("init", "other.csv")
    assert "other.csv" in caplog.text and "Windows-1252" in caplog.text
    Path("clicks.yaml").unlink()
    for name in ("clicks.csv", "products.csv"):
        text = Path(name).read_text(encoding="utf-8").replace("e", "\u00e9").replace("\u00e9v", "ev")
        head, _, body = text.partition("\n")
        Path(name).write_bytes(f"{head.replace(chr(233), 'e')}\n{body}".encode("cp1252"))
    for command in (
        ["init", "clicks.csv", "--items", "products.csv"],
        ["check", "clicks.yaml"],
        ["data", "clicks.yaml"],
    ):
        caplog.clear()
        assert "error" not in llmrec(*command)
        notes = [record.getMessage().split()[0] for record in caplog.records if "Windows-1252" in record.getMessage()]
        assert sorted(notes) == ["clicks.csv", "products.csv"]


def test_column_of_parts_becomes_the_split(folder: Path) -> None:
    output = llmrec("init", "published.csv")
    assert "part split its values; train 612, valid 88, test 174" in squeezed(output)
    recipe = load_recipe("published.yaml")
    assert recipe.data.split.kind == "given" and recipe.data.columns.split == "part"
    data = build_study(recipe).data
    assert (data.train.height, data.valid.height, data.test.height) == (612, 88, 174)
    # With `--split none`, a new split is drawn, and the column is not a field of products.
    assert "leave_one_out" not in llmrec("init", "published.csv", "--name", "drawn", "--split", "none")
    drawn = load_recipe("drawn.yaml")
    assert drawn.data.split.kind == "leave_one_out" and drawn.data.columns.split is None
    assert drawn.data.columns.fields == ()
    error = llmrec("init", "published.csv", "--name", "wrong", "--split", "stars")
    assert error.startswith("error: published.csv: column 'stars' cannot be the split") and "train, valid" in error
    frame = pl.read_csv("published.csv")
    frame.with_columns(pl.col("stars").cast(pl.String) + ",0").write_csv("commas.csv")
    assert "--mend" in llmrec("init", "commas.csv")
    write_recipe("commas.csv", mend=Path("copy.csv"))
    assert build_study(load_recipe("commas.yaml")).data.test.height == 174


def test_other_words_are_no_split(folder: Path) -> None:
    frame = pl.read_csv("published.csv")
    for name, words in {
        "blank.csv": pl.when(pl.int_range(pl.len()) == 3).then(None).otherwise(pl.col("part")),
        "other.csv": pl.when(pl.int_range(pl.len()) == 3).then(pl.lit("holdout")).otherwise(pl.col("part")),
        "untested.csv": pl.when(pl.col("part") == "test").then(pl.lit("valid")).otherwise(pl.col("part")),
    }.items():
        frame.with_columns(words.alias("part")).write_csv(name)
        write_recipe(name)
        assert load_recipe(f"{name.removesuffix('.csv')}.yaml").data.split.kind == "leave_one_out"


def test_headline_is_not_a_title(folder: Path) -> None:
    """A column named title that differs within an item must not become the title, as it would if no title were set."""
    frame = pl.read_csv("orders.csv").rename({"comment": "title"}).drop("product_name")
    frame.write_csv("t.csv")
    write_recipe("t.csv")
    recipe = load_recipe("t.yaml")
    assert recipe.data.columns.title == "product_id"
    assert {item.title for item in build_study(recipe).data.dataset.items.values()} == set(frame["product_id"])


# --------------------------------------------------------------------------- decisions


def plan_of(rows: list[tuple[object, ...]], names: tuple[str, ...], **options: str) -> RecipePlan:
    frame = pl.DataFrame([[str(value) for value in row] for row in rows], schema=list(names), orient="row")
    return plan_recipe(
        events_of_table(guess_roles(Table("t.csv", frame), requested_roles(InitOptions(table="t", **options)))),
        ("item",),
        whole=True,
        backend="hf",
    )


def some(users: int, items: int, rows: int) -> list[tuple[object, ...]]:
    dice = random.Random(1)
    return [(f"u{dice.randrange(users)}", f"i{dice.randrange(items)}", dice.randint(2, 5)) for _ in range(rows)]


def test_candidates_and_estimate_of_a_plan() -> None:
    plan = plan_of(some(30, 12, 150), ("user", "item", "stars"))
    assert 2 <= plan.candidates < 12
    assert plan.candidates == 12 - plan.facts.history[2] + 1
    assert plan.scale == (1.0, 5.0)
    title = "A very long title of a thing that goes on and on and on " * 3
    rows = [(user, item, f"{title} {item}") for user, item, _ in some(200, 90, 4000)]
    plan = plan_of(rows, ("user", "item", "title"))
    assert plan.facts.title_tokens > 40
    assert sum(plan.seconds.values()) <= BUDGET_SECONDS
    assert plan.users < 100 or "few-shot" not in plan.arms


def test_disabled_tasks_have_a_reason() -> None:
    pairs = [row[:2] for row in some(30, 60, 300)]
    plan = plan_of(pairs, ("user", "item"))
    assert plan.on == ("sequential", "direct")
    assert "column of ratings" in plan.tasks["rating"][1] and "texts" in plan.tasks["explanation"][1]
    assert "in row order" in plan.tasks["sequential"][1]
    same = [(*pair, 5) for pair in pairs]
    assert "at least 2 values" in plan_of(same, ("user", "item", "stars"), rating="stars").tasks["rating"][1]
    wide = [(*pair, n) for n, pair in enumerate(pairs)]
    assert "101 steps" in plan_of(wide, ("user", "item", "points"), rating="points").tasks["rating"][1]
    short = [(f"u{n // 2}", item, stars) for n, (_, item, stars) in enumerate(some(30, 60, 300))]
    plan = plan_of(short, ("user", "item", "stars"))
    assert plan.on == ("rating",) and plan.split == "global_time"
    assert "0 of 150 users" in plan.tasks["sequential"][1]


def baskets(users: int, moments: int, each: int) -> list[tuple[object, ...]]:
    return [
        (f"u{user}", f"i{(7 * user + moment * each + position) % 40}", f"2024-01-{1 + moment:02d}")
        for user in range(users)
        for moment in range(moments)
        for position in range(each)
    ]


def test_holds_out_orders_of_several_items(folder: Path) -> None:
    pl.DataFrame(baskets(30, 4, 3), schema=["client", "sku", "date"], orient="row").write_csv("t.csv")
    output = llmrec("init", "t.csv")
    (note,) = [line for line in output.splitlines() if "last_basket" in line]
    assert "100% of the users chose several products at their last timestamp" in note and "whole orders" in note
    recipe = load_recipe("t.yaml")
    assert recipe.data.split.kind == "last_basket"
    study = build_study(recipe)
    assert (study.data.test.height, study.data.valid.height) == (90, 90) and not stats.basket_warning(study.data)
    plan = plan_of(baskets(30, 4, 3), ("user", "item", "date"))
    assert (plan.facts.able, plan.facts.teachable, plan.facts.targets) == (30, 30, 3.0)
    # Every item of a basket is one prompt.
    single = plan_of(baskets(30, 12, 1), ("user", "item", "date"))
    assert single.split == "leave_one_out" and single.facts.targets == 1.0 and single.facts.tied == 0.0
    few = [*baskets(9, 3, 2), *((f"v{row[0]}", *row[1:]) for row in baskets(40, 2, 3))]
    assert plan_of(few, ("user", "item", "date")).split == "leave_one_out"
    assert plan.seconds["evaluation"] / plan.users > 2 * single.seconds["evaluation"] / single.users


@pytest.mark.parametrize("form", ["%d.%m.%Y", "%s"])
def test_last_order_in_all_date_formats(form: str) -> None:
    """The last of three orders has one item, the others three; sorted as text, another order would be the last."""
    days = [datetime(2023, 12, 30, tzinfo=UTC), datetime(2024, 1, 16, tzinfo=UTC), datetime(2024, 11, 2, tzinfo=UTC)]
    written = [str(int(day.timestamp())) if form == "%s" else day.strftime(form) for day in days]
    rows = [
        (f"u{user}", f"i{(user + 5 * order + position) % 40}", day)
        for user in range(20)
        for order, day in enumerate(written)
        for position in range(1 if order == 2 else 3)
    ]
    assert plan_of(rows, ("user", "item", "date")).split == "leave_one_out"


def test_warns_about_zero_ratings(folder: Path) -> None:
    dice = random.Random(3)
    rows = [(f"u{dice.randrange(40)}", f"i{dice.randrange(60)}", dice.choice((0, 0, 6, 8, 10))) for _ in range(600)]
    pl.DataFrame(rows, schema=["user", "item", "stars"], orient="row").write_csv("t.csv")
    assert "min_rating" in llmrec("init", "t.csv")
    assert "filter: {min_rating: 1}" in Path("t.yaml").read_text(encoding="utf-8")
    assert load_recipe("t.yaml").data.filter.min_rating is None


# --------------------------------------------------------------------------- any name at all


def page(columns: Columns, plan: RecipePlan, *, path: str = "t.csv", items: str | None = None) -> RecipeValues:
    return RecipeValues(
        name="mine",
        made_from=path,
        path=path,
        items=items,
        columns=columns,
        why={key: f"why {value}" for key, value in columns.model_dump().items() if isinstance(value, str)},
        duplicates="",
        plan=plan,
    )


PLAN = plan_of(some(30, 60, 400), ("user", "item", "stars"))
names = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(
        ["no", "yes", "null", "~", "1.0", "1e3", "0x1f", "2024-01-01", "a: b", " x", "x ", "# c", "'", '"']
    ),
    st.sampled_from(
        ["- a", "{a}", "[a]", "a, b", "&a", "*a", "!a", "|", ">", "%a", "@a", "`a", "a\nb", "a\r\nb", "\ufeff"]
    ),
    st.sampled_from(
        ["=", "<<", "\u2028", "\x85", "\x1b[31m", "true", "none", "NaN", "用户", "😀", "on", "12:30:45", "?"]
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Columns,
        user=names,
        item=names,
        rating=st.none() | names,
        time=st.none() | names,
        title=st.none() | names,
        text=st.none() | names,
        fields=st.lists(names, max_size=3).map(tuple),
    ),
    names,
    st.none() | names,
)
def test_column_names_survive_the_recipe(tmp_path: Path, columns: Columns, path: str, items: str | None) -> None:
    (tmp_path / "r.yaml").write_text(render_recipe(page(columns, PLAN, path=path, items=items)), encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.data.columns == columns
    assert (recipe.data.path, recipe.data.items) == (path, items)
    assert set(recipe.tasks.present()) == set(PLAN.on)


@given(st.text(max_size=30))
def test_scalar_is_one_line_of_yaml(text: str) -> None:
    line = yaml_scalar(text)
    assert len(line.splitlines()) == 1
    assert yaml.safe_load(f"a: {line}  # remark") == {"a": text}


def test_reasons_are_escaped() -> None:
    plan = replace(PLAN, tasks={**PLAN.tasks, "explanation": (False, "a\ntrain: {steps: 1}")}, noun="a\nb: c")
    values = yaml.safe_load(render_recipe(page(Columns(user="a\nb", item="c"), plan)))
    assert values["train"]["steps"] == plan.steps
    assert values["data"]["noun"] == "a\nb: c"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_random_tables_give_a_valid_recipe_or_one_error(folder: Path, seed: int) -> None:
    """A random table gives either an error of one paragraph or a recipe that loads."""
    dice = random.Random(seed)
    size = dice.choice((4, 40, 150))
    kinds = (
        lambda: f"u{dice.randrange(12)}",
        lambda: str(dice.randrange(30)),
        lambda: dice.choice(("", "1", "2", "3.5")),
        lambda: str(dice.randint(1, 5)),
        lambda: f"2024-01-{dice.randint(1, 28):02d}",
        lambda: f"{dice.randint(1, 28)}/{dice.randint(1, 12)}/2024",
        lambda: " ".join(dice.choices(("good", "bad", "very", "nice"), k=dice.randint(0, 9))),
        lambda: f"{dice.randint(0, 5)},{dice.randint(0, 9)}",
        lambda: dice.choice(("Ä b\tc", "x,y", 'q"q', "\u2028z", "  ", " u1", "u1")),
        lambda: "",
    )
    columns = {"customer": [f"c{dice.randrange(9)}" for _ in range(size)]}
    columns["sku"] = [f"p{dice.randrange(40)}" for _ in range(size)]
    for name in dice.sample(("rating", "title", "text", "timestamp", "date", "no", "stars", "price", "a: b", "#"), 5):
        kind = dice.choice(kinds)
        columns[name] = [kind() for _ in range(size)]
    pl.DataFrame(columns).write_csv("fuzz.csv")
    Path("fuzz.yaml").unlink(missing_ok=True)
    try:
        write_recipe(
            "fuzz.csv", requested=RequestedRoles(), mend=Path("copy.csv") if dice.random() < 0.6 else None, force=True
        )
    except LlmrecError as error:
        assert "\n" not in str(error)
        assert not Path("fuzz.yaml").exists()
    else:
        build_study(load_recipe("fuzz.yaml"))


def _ratings(dice: random.Random) -> list[Callable[[int], float]]:
    """Return functions from user to rating; rare users, whom a core filter drops, rate outside the usual range."""
    return [
        lambda user: dice.randint(1, 5) if user < 30 else dice.choice((0, 7)),
        lambda user: round(dice.paretovariate(0.7) - 0.9, 1),
        lambda user: dice.choice((0.5, 1, 4.5)) if user < 30 else 123456.789,
        lambda user: dice.random() if user < 30 else -1e-7 * dice.random(),
        lambda user: dice.choice((1e6, 1e7, 1e16)) if user < 30 else 1e17,
        lambda user: dice.randint(-10, 10),
        lambda user: 3,
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.booleans())
def test_filtered_tables_give_a_valid_recipe(folder: Path, seed: int, kind: int, named: bool) -> None:
    """Tables are valid, but a core filter drops the rows with the lowest and the highest ratings.

    The recipe is written without a check, as for a table that is too large for one.
    """
    dice = random.Random(seed)
    rate = _ratings(dice)[kind]
    pairs = {(dice.randrange(30), dice.randrange(60)) for _ in range(700)}
    pairs |= {(user, dice.randrange(60)) for user in range(30, 200)}
    rows = [(f"u{user}", f"i{item}", f"{rate(user)}") for user, item in sorted(pairs)]
    pl.DataFrame(rows, schema=["customer", "sku", "stars"], orient="row").write_csv("sparse.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmrec.start.plan._CORE_ROWS", 100)
        patch.setattr("llmrec.start.plan._MIN_CORE_SIZE", 5)
        patch.setattr("llmrec.start.init._CHECKED_ROWS", 0)
        write_recipe("sparse.csv", requested=RequestedRoles(rating="stars") if named else RequestedRoles(), force=True)
    recipe = load_recipe("sparse.yaml")
    assert recipe.data.filter.user_core == 5
    study = build_study(recipe)
    if kind in (0, 5) and named:
        scale = study.data.dataset.rating_scale
        assert scale == recipe.data.rating_scale == ((0, 7) if kind == 0 else (-10, 10))


def test_suggested_line_filters_events(folder: Path) -> None:
    clicks = pl.read_csv("clicks.csv")
    for name, quoted in (("event", "event"), ("what happened", "col('what happened')")):
        kinds = pl.Series(name, [("view", "view", "purchase")[row % 3] for row in range(clicks.height)])
        clicks.with_columns(kinds).write_csv("events.csv")
        output = llmrec("init", "events.csv", "--force")
        line = f"""filter: {{where: "{quoted} == 'purchase'"}}"""
        assert line in output and f"  # {line}  # keeps one kind of event" in Path("events.yaml").read_text(
            encoding="utf-8"
        )
        text = Path("events.yaml").read_text(encoding="utf-8").replace(f"  # {line}", f"  {line}")
        Path("kept.yaml").write_text(text, encoding="utf-8")
        assert load_data(load_recipe("kept.yaml").data, seed=0).interactions.height <= clicks.height / 3
    # A core filter is in the same line, since a recipe has one filter.
    assert yaml.safe_load(filter_line("event", "buy", 5)) == {
        "filter": {"where": "event == 'buy'", "user_core": 5, "item_core": 5}
    }


def test_repeated_words_of_a_customer_are_no_leak(folder: Path) -> None:
    """The shop's customers repeat their own texts, as people do; the audit must not report a leak for that."""
    llmrec("init", "orders.csv", "--name", "shop")
    study = build_study(load_recipe("shop.yaml"))
    assert audit_questions(study, "explanation").verdict == "clean"
    repeated = [
        case
        for case in study.cases("explanation")
        if any(str(case.truth) == event.text for event in case.request.history)
    ]
    assert repeated, "no text is repeated, so this test shows nothing"
