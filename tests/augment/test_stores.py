"""Feature stores: created from texts, shown, compared, corrected, and with the data of a user deleted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llmrec.augment import stores
from llmrec.cli.main import app
from llmrec.data.features import Features, FeatureStore, Provenance, publish
from llmrec.errors import DataError, LlmrecError
from tests.encoders import tiny_encoder
from tests.facts import Facts, raises

pytest.importorskip("transformers")

MADE = Provenance(system="test", encoder={"name": "chance"})


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["features", *arguments])
    if isinstance(done.exception, LlmrecError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.csv"
    path.write_text("user_id,text\nu1,likes quiet films\nu2,likes loud films\nu3,\n", encoding="utf-8")
    seen = tmp_path / "seen.csv"
    seen.write_text("user_id,item_id\nu1,i1\nu1,i2\nu2,i1\n", encoding="utf-8")
    return path


def test_imports_texts(texts: Path, tmp_path: Path) -> None:
    folder, encoder = tmp_path / "store", tiny_encoder()
    seen = str(tmp_path / "seen.csv")
    output = run("import", str(texts), "--kind", "user", "--out", str(folder), "--encoder", encoder, "--seen", seen)
    assert "2 vectors" in output and "3 interactions" in output
    store = FeatureStore.open(folder)
    assert store.ids("user") == ["u1", "u2"] and store.seen_by("user")["u1"] == {("u1", "i1"), ("u1", "i2")}
    assert "likes quiet films" in run("show", str(folder), "u1") and "no text" in run("show", str(folder), "u3")
    items = tmp_path / "items.csv"
    items.write_text("item_id,about\ni1,a film\n", encoding="utf-8")
    run("import", str(items), "--text", "about", "--out", str(folder), "--encoder", encoder)
    assert FeatureStore.open(folder).kinds == ("user", "item")


def test_interactions_of_unknown_ids(texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = tmp_path / "seen.csv"
    seen.write_text("user_id,item_id\nU1,i1\nU2,i1\n", encoding="utf-8")
    with raises(DataError, Facts("mismatch", column="user_id", says="'u1'")):
        stores.features_from_table(str(texts), "user", seen=str(seen), encoder="chance")
    seen.write_text("user_id,item_id\nu1,i1\nU2,i1\n", encoding="utf-8")
    result = stores.features_from_table(str(texts), "user", seen=str(seen), encoder=tiny_encoder())
    # u3 has no text, so no interactions are recorded as seen.
    assert result.seen == {"u1": {("u1", "i1")}} and "1 of the 2 users" in caplog.text and "'u2'" in caplog.text


def test_corrected_text_has_another_vector(texts: Path, tmp_path: Path) -> None:
    folder, encoder = tmp_path / "store", tiny_encoder()
    run("import", str(texts), "--kind", "user", "--out", str(folder), "--encoder", encoder)
    before = FeatureStore.open(folder).get("user", ["u1", "u2"])[0]
    publish(tmp_path / "old", [stores.all_features(FeatureStore.open(folder), "user")])
    run("edit", str(folder), "u1", "--text", "likes every film")
    after = FeatureStore.open(folder).get("user", ["u1", "u2"])[0]
    assert not np.allclose(before[0], after[0]) and np.array_equal(before[1], after[1])
    output = run("diff", str(tmp_path / "old"), str(folder), code=1)
    assert "1 texts changed" in output and "+ likes every film" in output and "- likes quiet films" in output
    assert "0 texts changed" in run("diff", str(folder), str(folder))
    with raises(DataError, Facts("unknown-name", says="'u9'")):
        run("edit", str(folder), "u9", "--text", "x")
    with raises(DataError, Facts("bad-value", says="forget")):
        run("edit", str(folder), "u1", "--text", " ")


def test_forget_removes_a_user(tmp_path: Path) -> None:
    users = Features("user", ["u1", "u2"], np.eye(2), MADE, ["one", "two"], {"u1": frozenset({("u1", "i1")})})
    items = Features("item", ["i1", "i2"], np.eye(2), MADE, ["a", "b"], {"i1": frozenset({("u1", "i1"), ("u2", "i1")})})
    publish(tmp_path, [users, items])
    publish(tmp_path, [users, items])
    for name in ("answers.sqlite", "answers.sqlite-wal", "answers.sqlite.damaged"):
        (tmp_path / name).write_text("u1 said so")
    output = run("forget", str(tmp_path), "u1")
    assert "a text, 1 interactions" in output and "i1" in output
    store = FeatureStore.open(tmp_path)
    assert store.ids("user") == ["u2"] and store.seen() == {("u2", "i1")}
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    assert not any(b"u1" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    # The store lacks users with a blank answer, or whose deletion was killed at its end; leftovers are deleted.
    (tmp_path / "answers.sqlite").write_text("u1 said so")
    (tmp_path / ("0" * 16)).mkdir()
    with raises(DataError, Facts("unknown-name", says="'u1'")):
        run("forget", str(tmp_path), "u1")
    assert not list(tmp_path.glob("answers*")) and not (tmp_path / ("0" * 16)).exists()
    assert FeatureStore.open(tmp_path).ids("user") == ["u2"]


def test_edit_needs_the_same_encoder(tmp_path: Path) -> None:
    users = Features("user", ["u1"], np.eye(1), MADE, ["one"])
    publish(tmp_path / "bare", [replace(users, provenance=Provenance(system="x"))])
    with raises(DataError, Facts("unsupported")):
        stores.edit_text(tmp_path / "bare", "user", "u1", "two")
    other = Provenance(system="x", encoder={"name": "chance", "stamp": "another"})
    publish(tmp_path / "other", [replace(users, provenance=other)])
    with raises(DataError, Facts("mismatch")):
        stores.edit_text(tmp_path / "other", "user", "u1", "two")
    publish(tmp_path / "mute", [replace(users, texts=())])
    with raises(DataError, Facts("unknown-name")):
        stores.edit_text(tmp_path / "mute", "user", "u1", "two")


def test_lookup_times(tmp_path: Path) -> None:
    publish(tmp_path, [Features("user", [f"u{n}" for n in range(50)], np.eye(50), MADE)])
    found = stores.measure_latency(FeatureStore.open(tmp_path), "user")
    assert set(found) == {"single_p50_us", "single_p99_us", "hundred_p50_us", "hundred_p99_us"}
    assert 0 < found["single_p50_us"] <= found["single_p99_us"]


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        ("user_id,text\nu1,a\nu1,b\n", Facts("duplicate", says="'u1'")),
        ("user_id,said\nu1,a\n", Facts("missing-column", says="'text'")),
        ("who,text\nu1,a\n", Facts("missing-column", says="'user_id'")),
        ("user_id,text\nu1, \n", Facts("empty")),
    ],
)
def test_rejects_invalid_texts(tmp_path: Path, rows: str, facts: Facts) -> None:
    path = tmp_path / "texts.csv"
    path.write_text(rows, encoding="utf-8")
    with raises(DataError, facts):
        stores.features_from_table(str(path), "user", encoder="chance")
