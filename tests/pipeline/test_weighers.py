"""Validation users who weigh ensembles choose nothing: no epoch, no parameter, no calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrec.data.split import halves
from llmrec.ensembles.members import Recalled, join
from llmrec.errors import LlmrecError
from llmrec.pipeline.evaluation import Evaluation
from llmrec.pipeline.resume import Budget
from llmrec.pipeline.study import build_study
from llmrec.pipeline.weighing import Weighing
from llmrec.recipe.load import load_recipe
from llmrec.recipe.schema import Recipe
from llmrec.resources import resource
from llmrec.types import Case, Ranking, Request
from tests.facts import Facts, raises

NETWORK = "{name: gru4rec, epochs: 2, patience: 1, dim: 4}"


def _recipe(*more: str) -> Recipe:
    tasks = f"tasks={{sequential: {{baselines: [random, popularity, item-knn, markov-1, {NETWORK}]}}}}"
    small = ("eval.users=20", "eval.bootstrap=50")
    return load_recipe(str(resource("recipes", "made") / "classic.yaml"), [tasks, *small, *more])


def test_validation_figures_by_which_tune_chooses_are_of_users_that_do_not_weigh() -> None:
    study = build_study(_recipe("eval.split=valid"))
    weigh = {case.request.user_id for case in Weighing(build_study(_recipe())).cases("sequential")}
    chosen = {case.request.user_id for case in study.cases("sequential")}
    assert weigh and chosen and not weigh & chosen
    assert chosen <= set(halves(study.data, study.recipe.eval.fusion.reserved)[0].valid["user_id"])
    # Where nobody weighs, all choose.
    alone = build_study(_recipe("eval.split=valid", "eval.users=9999", "eval.fusion.controls=false"))
    assert {case.request.user_id for case in alone.cases("sequential")} == set(alone.data.valid["user_id"])


def test_a_row_says_who_chose_its_epoch_and_is_not_weighed_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = build_study(_recipe())
    choose, weigh = (set(part.valid["user_id"]) for part in halves(study.data, study.recipe.eval.fusion.reserved))

    def rows(folder: Path) -> dict[str, Any]:
        """Return who chose each row's epoch, by its predictor, as it is stored."""
        Evaluation(study, None, folder, Budget(quiet=True), quiet=True).baselines()
        found = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "rows").iterdir()]
        return {row["figures"]["predictor"].partition("(")[0]: set(row["looked_at"]) for row in found}

    found = rows(tmp_path / "run")
    assert found["gru4rec"] == choose and not found["item-knn"] and "fusion" in found
    # An ensemble of a part that all validation users stopped is left out, and the run goes on.
    monkeypatch.setattr(Weighing, "choosing", lambda self, name, data: data)
    found = rows(tmp_path / "other")
    assert found["gru4rec"] == choose | weigh and "item-knn" in found and "fusion" not in found


def test_remembered_answers_are_refused_to_the_users_that_chose_them() -> None:
    cases = [Case(request=Request(id=f"r{n}", user_id=f"u{n}", candidates=("a", "b")), truth="a") for n in range(40)]
    answers = {
        case.request.id: Ranking(request_id=case.request.id, items=("a", "b"), scores=(1.0, 0.0)) for case in cases
    }
    parts = [Recalled("one", "events", "logits", answers), Recalled("other", "events", "logits", answers)]
    assert join("both", parts, cases, Ranking).weights is not None
    parts[1] = Recalled("other", "events", "logits", answers, frozenset({"u3"}))
    with raises(LlmrecError, Facts("leak", says="1 of 40 users")):
        join("both", parts, cases, Ranking)
