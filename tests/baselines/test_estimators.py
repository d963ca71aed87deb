"""Each baseline as an estimator with the conventions of scikit-learn: parameters, clones, fit and recommend."""

from __future__ import annotations

import copy
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import llmrec
from llmrec.answer.opening import prediction_family
from llmrec.errors import DataError, RecipeError
from llmrec.registry import BASELINES, import_component
from llmrec.types import Request, Text
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

pytest.importorskip("llmrec.start", reason="the extension is not there")

WORDS = ("fine", "dull", "long", "warm", "odd", "quick")
ROWS = [
    {
        "user": f"u{user:02d}",
        "item": f"i{item}",
        "title": f"The {WORDS[item % 6]} {WORDS[item % 5]} tale {item}",
        "rating": 1 + (user + item) % 5,
        "review": f"A {WORDS[user % 6]} and {WORDS[item % 6]} story. It is {WORDS[step % 6]}.",
        "time": 1_700_000_000 + 86_400 * (user + step),
    }
    for user in range(30)
    for step in range(8)
    for item in [(user * 3 + step * step) % 14]
]
FRAME = pl.DataFrame(ROWS).unique(["user", "item"], keep="last", maintain_order=True)
COLUMNS = {"user": "user", "item": "item", "title": "title", "time": "time", "text": "review"}
# Small and short.
SHORT = {"dim": 8, "hidden": "8", "epochs": 1, "steps": 2, "batch": 8, "factors": 4, "iterations": 2, "rounds": 2}
SHORT |= {"layers": 1, "experts": 2, "quiet": True}


@pytest.fixture
def parameters(name: str, llama_folder: Path) -> dict[str, Any]:
    """Return parameters that keep the fit short."""
    if (needs := BASELINES[name].needs) and find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    fields = import_component(BASELINES, name, "baseline").Config.model_fields
    encoder = str(llama_folder) if name == "state-tower" else tiny_encoder()
    settings = {**SHORT, "encoder": encoder, "model": str(llama_folder), "joint": 1}
    return {key: value for key, value in settings.items() if key in fields}


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_is_an_estimator(name: str, parameters: dict[str, Any]) -> None:
    kind = import_component(BASELINES, name, "baseline")
    model = kind(**parameters, seed=3)
    assert model.get_params() == {**dict(kind().config), **parameters, "seed": 3}
    assert list(inspect.signature(kind).parameters) == list(model.get_params())
    assert repr(kind()) == f"{kind.__name__}()" and repr(model).endswith("seed=3)")
    # As sklearn.base.clone.
    copied = {key: copy.deepcopy(value) for key, value in model.get_params(deep=False).items()}
    clone = kind(**copied)
    assert repr(clone) == repr(model) and all(clone.get_params()[key] is copied[key] for key in copied)
    assert kind().set_params(**parameters, seed=3).get_params() == model.get_params()
    with raises(DataError, Facts(kind="missing-value", says="not fitted")):
        model.recommend(["u01"])
    if name == "text-ridge":
        # It learns from the reviews of a source, which a frame does not have.
        with pytest.raises(DataError, match="needs reviews"):
            model.fit(FRAME, **COLUMNS)
        return
    assert model.fit(FRAME, **COLUMNS) is model
    family = prediction_family(name)
    if family is None:
        lists = model.recommend(["u01", "u02"], k=3)
        assert type(lists) is pl.DataFrame and lists["rank"].to_list() == [1, 2, 3] * 2
        seen = FRAME.filter(pl.col("user").is_in(["u01", "u02"])).select(user_id="user", item_id="item")
        assert lists.join(seen, on=["user_id", "item_id"], how="semi").is_empty()
    elif family in ("rating", "stars"):
        assert 1 <= model.recommender.rate("i3", user="u01") <= 5
    elif family == "ctr":
        assert 0 <= model.recommender.predict("i3", user="u01") <= 1
    elif family == "review":
        (answer,) = model.answer([Request(id="1", user_id="u01", item="i3", context={"review": "It is odd. Long."})])
        assert isinstance(answer, Text) and answer.text == "It is odd."
    else:
        assert model.recommender.explain("i3", user="u01")


def test_rejects_wrong_parameters() -> None:
    for ask in (llmrec.baselines.ItemKNN, llmrec.baselines.ItemKNN().set_params):
        with raises(RecipeError, Facts(kind="unknown-key", says="did you mean 'history'?")):
            ask(histry=5)
        with raises(RecipeError, Facts(kind="bad-value", says="history of 'item-knn'")):
            ask(history=0)


def test_namespace_has_all_classes() -> None:
    names = {entry.address.partition(":")[2] for entry in BASELINES.values()}
    assert set(dir(llmrec.baselines)) == names and llmrec.baselines.ItemKNN.name == "item-knn"
    with pytest.raises(AttributeError):
        llmrec.baselines.Nothing  # noqa: B018
