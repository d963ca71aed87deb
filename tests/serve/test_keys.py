"""API keys: stored as digests, revoked while a service runs; rate limits."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.errors import DataError, LlmrecError
from llmrec.serve import keys as module
from llmrec.serve.keys import Keys, RateLimit, create_key, revoke_key
from tests.facts import Facts, raises


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "etc" / "keys.json"


def later(seconds: float = 2.0) -> float:
    """Return a time of the clock; the file is checked again after a second."""
    return time.monotonic() + seconds


def written(file: Path, value: object, mode: int = 0o600) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    file.chmod(mode)
    return file


def entry(**changes: object) -> dict[str, Any]:
    return {"name": "shop", "sha256": "0" * 64, "admin": False, "created": "2026-01-01T00:00:00+00:00"} | changes


def test_key_is_stored_as_its_digest(file: Path) -> None:
    shop, ops = create_key(file, "shop"), create_key(file, "ops@example.org", admin=True)
    assert all(re.fullmatch(r"llmrec_[A-Za-z0-9_-]{43}", key) for key in (shop, ops)) and shop != ops
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    stored = json.loads(file.read_text())
    assert stored["format"] == 1 and [list(each) for each in stored["keys"]] == [list(entry())] * 2
    assert stored["keys"][0]["sha256"] == hashlib.sha256(shop.encode()).hexdigest()
    assert shop not in file.read_text() and shop[7:] not in file.read_text()
    keys = Keys.read(file)
    results = [keys.find(key) for key in (shop, ops)]
    assert [(each.name, each.admin) for each in results if each] == [("shop", False), ("ops@example.org", True)]
    assert len(keys) == 2


def test_wrong_keys_are_unknown(file: Path) -> None:
    key = create_key(file, "shop")
    keys = Keys.read(file)
    digest = json.loads(file.read_text())["keys"][0]["sha256"]
    for wrong in ("", "llmrec_", key[:-1], key + "A", key.upper(), f" {key}", digest, "\ud800"):
        assert keys.find(wrong) is None


def test_all_keys_are_compared(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a comparison says nothing about the keys."""
    first, *_ = (create_key(file, f"k{n}") for n in range(3))
    keys, calls = Keys.read(file), []
    compare = hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: calls.append(1) or compare(a, b))
    assert keys.find(first) is not None and keys.find("wrong") is None and len(calls) == 6


@pytest.mark.parametrize("name", ["", "a b", "-x", "a" * 65, "a\n", "../x"])
def test_rejects_invalid_names(file: Path, name: str) -> None:
    with raises(DataError, Facts("bad-value", column="name")):
        create_key(file, name)
    assert not file.parent.exists()


def test_name_is_unique_until_revoked(file: Path) -> None:
    first = create_key(file, "shop")
    before = file.read_bytes()
    with raises(LlmrecError, Facts("duplicate", "keys.json", column="name", says="revoke")):
        create_key(file, "shop", admin=True)
    assert file.read_bytes() == before
    revoke_key(file, "shop")
    second = create_key(file, "shop")
    keys = Keys.read(file)
    assert keys.find(first) is None and keys.find(second) is not None


def test_revoke_needs_an_existing_key(file: Path) -> None:
    with raises(LlmrecError, Facts("missing-file", "keys.json")):
        revoke_key(file, "shop")
    assert not file.parent.exists()
    key = create_key(file, "shop")
    with raises(LlmrecError, Facts("unknown-name", "keys.json", says="did you mean 'shop'?")):
        revoke_key(file, "shopp")
    assert Keys.read(file).find(key) is not None
    revoke_key(file, "shop")
    assert json.loads(file.read_text()) == {"format": 1, "keys": []}
    assert Keys.read(file).find(key) is None and Keys.read(file).find("") is None


@pytest.mark.parametrize("mode", [0o640, 0o602])
def test_rejects_file_accessible_to_others(file: Path, mode: int) -> None:
    create_key(file, "shop")
    file.chmod(mode)
    before = file.read_bytes()
    calls = (lambda: Keys.read(file), lambda: create_key(file, "more"), lambda: revoke_key(file, "shop"))
    for call in calls:
        with raises(LlmrecError, Facts("unsafe", "keys.json", says=f"chmod 600 {file}")):
            call()
    assert file.read_bytes() == before
    for valid in (0o600, 0o400):
        file.chmod(valid)
        assert len(Keys.read(file)) == 1


@pytest.mark.parametrize(
    ("value", "facts"),
    [
        ("", Facts("damaged")),
        ("[" * 100_000, Facts("damaged")),
        ("\xff", Facts("damaged")),
        ([], Facts("damaged")),
        ({"format": 2, "keys": []}, Facts("unsupported", says="pip install -U llmrec")),
        ({"format": "1", "keys": []}, Facts("damaged", column="format")),
        ({"format": 1, "keys": [entry(admin="no")]}, Facts("damaged", column="keys.0.admin")),
        ({"format": 1, "keys": [entry(), entry(name="b", sha256="A" * 64)]}, Facts("damaged", column="keys.1.sha256")),
        ({"format": 1, "keys": [entry(expires="never")]}, Facts("damaged", column="keys.0.expires")),
        ({"format": 1, "keys": [entry(), entry(sha256="1" * 64)]}, Facts("duplicate", column="name")),
    ],
)
def test_damaged_file_is_one_error_and_stays_unchanged(file: Path, value: object, facts: Facts) -> None:
    written(file, value)
    before = file.read_bytes()
    for call in (lambda: Keys.read(file), lambda: create_key(file, "more"), lambda: revoke_key(file, "shop")):
        with raises(LlmrecError, facts) as error:
            call()
        assert error.value.file == str(file)
    assert file.read_bytes() == before


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "keys.json")
    for name, kind in (("folder", "unreadable"), ("pipe", "unreadable"), ("gone", "missing-file")):
        with raises(LlmrecError, Facts(kind, name)):
            Keys.read(tmp_path / name)
    for name in ("folder", "pipe"):
        with raises(LlmrecError, Facts("unreadable", name)):
            create_key(tmp_path / name, "shop")
    with raises(LlmrecError, Facts("unsafe", "link")):
        create_key(tmp_path / "link", "shop")
    with raises(LlmrecError, Facts("unreadable", says="cannot write the key file")):
        create_key(tmp_path / "gone" / ("x" * 300), "shop")
    assert not (tmp_path / "folder" / "keys.json").exists()


def test_concurrent_writes_lose_no_key(file: Path) -> None:
    def work(n: int) -> list[str]:
        created: list[str] = []
        while len(created) < 5:
            try:
                created.append(create_key(file, f"k{n}-{len(created)}"))
            except LlmrecError as error:
                assert error.kind == "busy"
                time.sleep(0.001)
        return created

    with ThreadPoolExecutor(4) as pool:
        created = [key for names in pool.map(work, range(4)) for key in names]
    keys = Keys.read(file)
    assert len(created) == 20 == len(keys) and all(keys.find(key) for key in created)
    assert {path.name for path in file.parent.iterdir()} == {"keys.json", ".keys.json.lock"}


def test_changes_of_the_file_are_followed(file: Path) -> None:
    shop = create_key(file, "shop")
    keys = Keys.read(file)
    more = create_key(file, "more")
    assert keys.find(more, later(0.0)) is None
    assert keys.find(more, later(2.0)) is not None
    revoke_key(file, "shop")
    assert keys.find(shop, later(2.5)) is not None
    assert keys.find(shop, later(4.0)) is None and keys.find(more, later(4.0)) is not None


def test_no_key_is_valid_while_the_file_is_damaged(file: Path) -> None:
    key = create_key(file, "shop")
    keys = Keys.read(file)
    valid = file.read_text()

    file.chmod(0o644)
    for seconds in (2.0, 2.1, 5.0):
        with raises(LlmrecError, Facts("unsafe", says="chmod 600")):
            keys.find(key, later(seconds))
    file.chmod(0o600)
    assert keys.find(key, later(6.0)) is not None

    file.write_text(valid[:-20])
    with raises(LlmrecError, Facts("damaged")):
        keys.find(key, later(8.0))
    file.unlink()
    with raises(LlmrecError, Facts("missing-file")):
        keys.find(key, later(10.0))
    written(file, valid)
    assert keys.find(key, later(10.1)) is not None


def test_threads_find_keys_while_the_file_changes(file: Path) -> None:
    key = create_key(file, "shop")
    keys = Keys.read(file)
    over = threading.Event()

    def work() -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            assert keys.find(key, later(2.0 * turn)) is not None and keys.find("wrong") is None

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(work) for _ in range(4)]
        for n in range(30):
            create_key(file, f"k{n}")
        over.set()
        for reader in readers:
            reader.result()
    assert keys.find(key, later(1e6)) is not None and len(keys) == 31


def test_bucket_allows_a_burst_and_then_its_rate() -> None:
    limit = RateLimit(per_minute=60, burst=3)
    assert [limit.take("a", now=100.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert limit.take("a", now=100.0) == pytest.approx(1.0)
    assert limit.take("a", now=100.25) == pytest.approx(0.75)
    assert limit.take("b", now=100.25) == 0.0
    assert limit.take("a", now=101.0) == 0.0 and limit.take("a", now=101.0) == pytest.approx(1.0)
    assert [limit.take("a", now=1e6) for _ in range(4)][:3] == [0.0] * 3
    assert limit.take("a", now=1e6) > 0


def test_clock_going_back_adds_no_tokens() -> None:
    limit = RateLimit(per_minute=60, burst=1)
    assert limit.take("a", now=100.0) == 0.0
    assert limit.take("a", now=0.0) == pytest.approx(1.0)
    assert limit.take("a", now=100.5) == pytest.approx(0.5)
    assert limit.take("a", now=101.0) == 0.0


@given(
    per_minute=st.integers(1, 10**6),
    burst=st.integers(1, 1000),
    pauses=st.lists(st.floats(0, 100), max_size=40),
)
def test_reported_wait_suffices_and_rate_holds(per_minute: int, burst: int, pauses: list[float]) -> None:
    limit = RateLimit(per_minute, burst)
    start = now = 1e5
    for taken, pause in enumerate(pauses, start=1):
        now += pause
        wait = limit.take("a", now)
        if wait:
            now += wait
            assert limit.take("a", now) == 0.0
        assert taken <= burst + (now - start) * per_minute / 60 + 1e-3


def test_number_of_buckets_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BUCKETS", 100)
    limit = RateLimit(per_minute=1, burst=1)
    for n in range(1000):
        assert limit.take(f"n{n}", now=0.0) == 0.0
        if n:
            assert limit.take("busy", now=0.0) > 0 or n == 1, "a name in use is forgotten"
    assert len(limit._left) == 100
