"""Validation users for ensemble weights select no epoch, parameter or calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrec.data.split import split_validation_users
from llmrec.ensembles.members import PrecomputedMember, fit_ensemble
from llmrec.errors import LlmrecError
from llmrec.pipeline.evaluation import Evaluation
from llmrec.pipeline.resume import StageTimer
from llmrec.pipeline.study import build_study
from llmrec.pipeline.weighing import EnsembleUsers
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


def test_tuning_and_weights_use_different_validation_users() -> None:
    study = build_study(_recipe("eval.split=valid"))
    weigh = {case.request.user_id for case in EnsembleUsers(build_study(_recipe())).cases("sequential")}
    chosen = {case.request.user_id for case in study.cases("sequential")}
    assert weigh and chosen and not weigh & chosen
    assert chosen <= set(split_validation_users(study.data, study.recipe.eval.fusion.reserved)[0].valid["user_id"])
    # Without ensembles, all users are used for selection.
    alone = build_study(_recipe("eval.split=valid", "eval.users=9999", "eval.fusion.controls=false"))
    assert {case.request.user_id for case in alone.cases("sequential")} == set(alone.data.valid["user_id"])


def test_users_of_early_stopping_do_not_weigh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = build_study(_recipe())
    choose, weigh = (
        set(part.valid["user_id"]) for part in split_validation_users(study.data, study.recipe.eval.fusion.reserved)
    )

    def rows(folder: Path) -> dict[str, Any]:
        """Return the stored users of early stopping, by baseline."""
        Evaluation(study, None, folder, StageTimer(quiet=True), quiet=True).baselines()
        stored = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "rows").iterdir()]
        return {row["figures"]["predictor"].partition("(")[0]: set(row["looked_at"]) for row in stored}

    users = rows(tmp_path / "run")
    assert users["gru4rec"] == choose and not users["item-knn"] and "fusion" in users
    # Without users for its weights, the ensemble is left out.
    monkeypatch.setattr(EnsembleUsers, "choosing", lambda self, name, data: data)
    users = rows(tmp_path / "other")
    assert users["gru4rec"] == choose | weigh and "item-knn" in users and "fusion" not in users


def test_rejects_weights_from_users_of_early_stopping() -> None:
    cases = [Case(request=Request(id=f"r{n}", user_id=f"u{n}", candidates=("a", "b")), truth="a") for n in range(40)]
    answers = {
        case.request.id: Ranking(request_id=case.request.id, items=("a", "b"), scores=(1.0, 0.0)) for case in cases
    }
    parts = [
        PrecomputedMember("one", "events", "logits", answers),
        PrecomputedMember("other", "events", "logits", answers),
    ]
    assert fit_ensemble("both", parts, cases, Ranking).weights is not None
    parts[1] = PrecomputedMember("other", "events", "logits", answers, frozenset({"u3"}))
    with raises(LlmrecError, Facts("leak", says="1 of 40 users")):
        fit_ensemble("both", parts, cases, Ranking)
