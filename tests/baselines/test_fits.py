"""Stored fits: exactly the same scores, a key of all inputs, and a size limit."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmrec import fingerprint
from llmrec.baselines import fits as store
from llmrec.baselines.fits import fit_baseline
from llmrec.data.split import SplitDataset
from llmrec.errors import RecipeError
from llmrec.types import Event, Request
from tests.baselines.test_baselines_neural import _ring
from tests.facts import Facts, raises

pytest.importorskip("torch")
NEURAL = {"quiet": True, "epochs": 2, "dim": 8}
PARAMETERS: dict[str, dict[str, Any]] = {
    "ease": {},
    "als": {"factors": 8},
    "bpr": {"factors": 8, "iterations": 5},
    "sasrec": NEURAL,
    "sasrec-text": NEURAL,
    "gru4rec": {**NEURAL, "patience": None},
    "unisrec": {**NEURAL, "ids": True},
}


@pytest.fixture(scope="module")
def data() -> SplitDataset:
    ring = _ring(users=60)
    items = {
        name: replace(item, title=f"number {name} of {int(name[1:]) % 7}") for name, item in ring.dataset.items.items()
    }
    return replace(ring, dataset=replace(ring.dataset, items=items))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    monkeypatch.setenv(store.LIMIT_VARIABLE, "1")
    monkeypatch.setattr(store, "MIN_STORED_SECONDS", 0.0)
    return tmp_path / "fits"


def requests() -> list[Request]:
    histories = [(), ("i01",), ("i03", "i07", "i02"), ("nothing",)]
    return [Request(id=str(n), user_id="u", history=tuple(map(_event, each))) for n, each in enumerate(histories)]


def _event(item: str) -> Event:
    return Event(item_id=item)


@pytest.mark.parametrize("name", PARAMETERS)
def test_stored_fit_gives_exactly_the_same_scores_and_has_no_user(
    data: SplitDataset, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit_baseline(name, PARAMETERS[name], data, seed=3)
    assert first.recalled == 0.0 and len(list(folder.glob(f"{name}-*.safetensors"))) == 1
    monkeypatch.setattr(type(first), "fit", lambda *args: pytest.fail("it was fitted again"))
    second = fit_baseline(name, PARAMETERS[name], data, seed=3)
    assert second.recalled > 0 and second.looked_at == first.looked_at and second.items == first.items
    for model in (first, second):
        assert model.scores(requests()).dtype == first.scores(requests()).dtype
    assert np.array_equal(second.scores(requests()), first.scores(requests()))
    assert second.answer(requests()) == first.answer(requests())
    again = second.state()
    assert all(np.array_equal(again[key], value) for key, value in first.state().items())
    (file,) = folder.glob("*.safetensors")
    assert all(user.encode() not in file.read_bytes() for user in data.users())


def test_answer_options_share_a_fit(data: SplitDataset, folder: Path) -> None:
    fit_baseline("als", {"factors": 8}, data, seed=0)
    solved = fit_baseline("als", {"factors": 8, "user": "solve"}, data, seed=0)
    fresh = type(solved)(solved.config, seed=0)
    fresh.fit(data)
    assert solved.recalled > 0 and np.array_equal(solved.scores(requests()), fresh.scores(requests()))


def test_key_covers_options_data_seed_and_code(
    data: SplitDataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_baseline("ease", {}, data, seed=0)
    others: list[tuple[dict[str, Any], SplitDataset, int]] = [
        ({"penalty": 9.0}, data, 0),
        ({}, data, 1),
        ({}, _ring(users=61), 0),
        ({}, replace(data, train=data.train.head(300)), 0),
    ]
    for count, (parameters, used, seed) in enumerate(others, start=2):
        assert fit_baseline("ease", parameters, used, seed=seed).recalled == 0.0
        assert len(list(folder.iterdir())) == count
    monkeypatch.setattr(fingerprint, "code_digest", lambda *modules: "other code")
    assert fit_baseline("ease", {}, data, seed=0).recalled == 0.0


@pytest.mark.parametrize("name", ["ease", "sasrec", "gru4rec"])
def test_validation_rows_are_part_of_the_key_of_neural_fits(data: SplitDataset, folder: Path, name: str) -> None:
    fit_baseline(name, PARAMETERS[name], replace(data, valid=data.valid.head(30)), seed=0)
    result = fit_baseline(name, PARAMETERS[name], data, seed=0)
    assert (result.recalled > 0) == (name == "ease")
    fresh = type(result)(result.config, seed=0)
    fresh.fit(data)
    assert np.array_equal(result.scores(requests()), fresh.scores(requests()))


def test_damaged_file_is_fitted_again(data: SplitDataset, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit_baseline("ease", {}, data, seed=0)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    for torn in (bytes(content[:-8]) + b"\1" * 8, bytes(content[: len(content) // 2]), b""):
        file.write_bytes(torn)
        with caplog.at_level(logging.WARNING):
            assert fit_baseline("ease", {}, data, seed=0).recalled == 0.0
        assert str(file) in caplog.text
        caplog.clear()
    assert fit_baseline("ease", {}, data, seed=0).recalled > 0


def stored_fit(folder: Path, name: str, seconds: float, size: int, days: float = 0.0) -> Path:
    """Write a stored fit that took some seconds and was last read some days ago."""
    path = folder / f"{name}.safetensors"
    save_file({"a": np.zeros(size, dtype=np.int8)}, path, metadata={"seconds": repr(seconds)})
    os.utime(path, (time.time() - 86_400 * days,) * 2)
    return path


def test_trim_keeps_fits_that_save_most_time(tmp_path: Path) -> None:
    network = stored_fit(tmp_path, "network", 2400.0, 1000, days=20)
    matrix, newer = stored_fit(tmp_path, "matrix", 3.0, 100_000), stored_fit(tmp_path, "newer", 4.0, 100_000)
    old = stored_fit(tmp_path, "old", 9000.0, 1000, days=store.STALE_DAYS + 1)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no such file")
    store._trim_cache(tmp_path, 10**6)
    assert len(list(tmp_path.iterdir())) == 5
    store._trim_cache(tmp_path, 150_000)
    assert sorted(tmp_path.iterdir()) == sorted([network, newer]), (matrix, old, damaged)


def test_fit_above_the_limit_is_not_stored(data: SplitDataset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_baseline("ease", {"penalty": 1.0}, data, seed=0)
    (first,) = folder.iterdir()
    monkeypatch.setenv(store.LIMIT_VARIABLE, str(0.5 * first.stat().st_size / 2**30))
    fit_baseline("ease", {"penalty": 4.0}, data, seed=0)
    assert list(folder.iterdir()) == [first]


def test_quick_fits_and_the_switch_store_nothing(
    data: SplitDataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_baseline("popularity", {}, data, seed=0)
    monkeypatch.setattr(store, "MIN_STORED_SECONDS", 1000.0)
    fit_baseline("ease", {}, data, seed=0)
    monkeypatch.setattr(store, "MIN_STORED_SECONDS", 0.0)
    monkeypatch.setenv(store.LIMIT_VARIABLE, "off")
    fit_baseline("ease", {}, data, seed=0)
    assert not folder.exists()
    for wrong in ("many", "-1", "nan"):
        monkeypatch.setenv(store.LIMIT_VARIABLE, wrong)
        with raises(RecipeError, Facts(kind="bad-value", column=store.LIMIT_VARIABLE)):
            fit_baseline("ease", {}, data, seed=0)
