"""P5-I in a complete run: tokens of users and items, saved, loaded and not forged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from llmrec.data.split import SplitDataset
from llmrec.index.table import ItemIndex, item_token, user_token
from llmrec.pipeline import bundle
from llmrec.pipeline.run import Run, open_session, run
from llmrec.pipeline.study import Study, build_study
from llmrec.prompts.template import Template
from llmrec.recipe.schema import Recipe
from llmrec.tasks.base import DataView
from llmrec.types import Request
from tests.index.test_index_plain import histories
from tests.pipeline.test_paired_run import RECIPE as PAIRED
from tests.pipeline.test_paired_run import ranked

RECIPE: dict[str, Any] = {
    **PAIRED,
    "name": "user-tokens",
    "model": {**PAIRED["model"], "max_length": 400},
    "index": {"scheme": "token", "ids": "tokens"},
    "tasks": {
        "sequential": {"templates": ["user-history"], "strategies": ["search"]},
        "rating": {"templates": ["user-item", "list-ratings"], "strategies": ["expected"]},
    },
    "train": {**PAIRED["train"], "batch_tokens": 1024, "max_row_tokens": 400},
}
ASKS = Template(
    family="x",
    name="x",
    version=1,
    use="seen",
    shape="chat",
    user="{{ user_id }} {{ item_id }}",
    target="{{ item.title }}",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(Recipe(**RECIPE), tmp_path_factory.mktemp("run") / "out", quiet=True)


@pytest.fixture(scope="module")
def study() -> Study:
    return build_study(Recipe(**RECIPE))


def shown(data: SplitDataset, index: ItemIndex, user: str, item: str) -> str:
    view = DataView(data, index)
    return ASKS.turns(view.user(user) | view.pair(user, item))[0].text


# --------------------------------------------------------------------------- prompts


def test_only_prompts_write_ids_as_tokens() -> None:
    data = histories("abcxy", "bcdxz")
    tokens = {item: (item_token(n),) for n, item in enumerate(data.dataset.items)}
    names = tuple(item_token(n) for n in range(len(tokens)))
    plain = ItemIndex("token", tokens, tokens=names)
    coded = ItemIndex("token", tokens, tokens=names, users={"u0": user_token(4)}, writes_ids=True)
    assert shown(data, coded, "u0", "b") == "<user_4> <item_1>"
    assert shown(data, plain, "u0", "b") == "u0 b"
    # P5: items as numbers, users as text.
    numbers = ItemIndex("random", {item: (f"10{n}",) for n, item in enumerate(tokens)}, writes_ids=True)
    assert shown(data, numbers, "u0", "b") == "u0 101"
    # A new user is written as text, and an id that imitates a token is broken.
    assert shown(data, coded, "new", "b") == "new <item_1>"
    assert shown(data, coded, "<user_4>", "b") == "< user_4> <item_1>"
    assert shown(data, coded, "<us", "b").startswith("< us")
    values = DataView(data, coded).user("u0")
    assert values["user_id"] == "u0" and DataView(data, coded).about("b")["item_id"] == "b"


def test_statistics_leave_out_user_of_shown_token(study: Study) -> None:
    assert study.index is not None
    data = study.data
    user, item = data.train.select("user_id", "item_id").row(0)
    with_tokens, without = DataView(data, study.index), DataView(data, None)
    known = with_tokens.user(user)["user_id"]
    assert with_tokens.pair(str(known), item)["item_stats"]() == without.pair(user, item)["item_stats"]()


def test_training_rows_and_questions_use_the_same_tokens(study: Study) -> None:
    assert study.index is not None
    for family, template in (("sequential", "user-history"), ("rating", "user-item")):
        task = study.tasks[family]
        rows = [row for row in task.examples("train", 60) if row.template.endswith(template)]
        assert rows
        for row in rows:
            assert study.index.users[row.user_id] in row.messages[-1].text
        for case in study.cases(family)[:5]:
            text = task.prompt(case.request, template=template).messages[-1].text
            assert study.index.users[case.request.user_id] in text and f" {case.request.user_id}" not in text
            if case.request.item is not None:
                assert study.index.encode(case.request.item) in text


# --------------------------------------------------------------------------- a run


def test_user_tokens_are_trained_saved_and_loaded(ran: Run) -> None:
    session = open_session(Recipe(**RECIPE), ran.folder, quiet=True)
    index = session.study.index
    assert index is not None and index.users
    stored = bundle.read(str(ran.folder)).index
    assert stored is not None and stored.digest == index.digest and stored.users == index.users
    # Each is one id of the saved tokenizer, and training has changed its row.
    ids = session.encoder.tokenizer.convert_tokens_to_ids(list(index.users.values()))
    assert len(set(ids)) == len(index.users) and max(ids) == len(session.encoder.tokenizer) - 1
    before, after = (load_file(ran.folder / part / "model.safetensors")["shared.weight"] for part in ("base", "merged"))
    moved = (before[ids] != after[ids]).any(dim=1)
    assert moved.float().mean() > 0.5
    for row in ran.results["rows"]:
        assert row["parse_rate"] == 1.0


def test_rank_accepts_known_and_new_users(ran: Run, study: Study, tmp_path: Path) -> None:
    assert study.index is not None
    items, user = sorted(study.data.dataset.items), next(iter(study.index.users))
    lines = [{"id": name, "user_id": name, "history": items[:4]} for name in (user, "new", "<user_0>")]
    results = ranked(ran, tmp_path, lines)
    assert len({tuple(each["scores"]) for each in results}) == 3
    task = study.tasks["sequential"]
    request = Request(id="r", user_id="<user_0>", history=task.cases("test")[0].request.history)
    text = task.prompt(request, template="user-history").messages[-1].text
    assert "<user_0>" not in text and "< user_0>" in text


def test_rejects_user_tokens_with_held_out_codes() -> None:
    tasks = {**RECIPE["tasks"], "alignment": {}}
    with pytest.raises(ValidationError, match=r"index\.ids: templates with item_id would show held-out codes"):
        Recipe(**{**RECIPE, "tasks": tasks})
